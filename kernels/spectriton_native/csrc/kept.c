/* What is kept of rows of packed spectra, without dense rows: statistics, and factors by place and row.

   Numbers are pairs of float32 that follow each other as the values of the part do, from value `first` on. */

#include <math.h>

#include "pairs.h"

typedef struct {
    const Part *part;
    const uint8_t *values;
    const float *scales;
    int64_t first;
} Kept;

enum { EMPTY = -2, MISSING = -1 };

/* Where the values of a tile begin, if it has any and they are all there; and their scale. */
INLINE int64_t start_from(const Kept *kept, int64_t i, int64_t t, int format, float *scale)
{
    const Part *part = kept->part;
    if (count_bits(bitmap_of(part, i, t), part->tile_bytes) == 0)
        return EMPTY;
    const int64_t start = start_of(part, i, t);
    *scale = format >= INT8 ? kept->scales[row_of(part, i) * part->tiles + t] : 1;
    return start < kept->first ? MISSING : start;
}

/* Eight numbers, each of them twice. */
INLINE void twice(const float *numbers, float *out)
{
#if WIDE
    const __m512i places = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(places, _mm512_castps256_ps512(_mm256_loadu_ps(numbers))));
#else
    for (int k = 0; k < 16; k++)
        out[k] = numbers[k / 2];
#endif
}

/* Adds the products of eight pairs, real parts and imaginary parts, to those of the sums whose bits are set: a factor
   that is not a number must not reach the others. */
INLINE void add_products(const float *a, const float *b, uint8_t bits, double factor, double *sums)
{
#if WIDE
    const __m512 products = _mm512_mul_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b));
    const __m512i even = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512 pairs = _mm512_permutexvar_ps(even, _mm512_add_ps(products, _mm512_permute_ps(products, 0xb1)));
    const __m512d eight = _mm512_cvtps_pd(_mm512_castps512_ps256(pairs));
    _mm512_storeu_pd(sums, _mm512_mask3_fmadd_pd(eight, _mm512_set1_pd(factor), _mm512_loadu_pd(sums), bits));
#else
    for (int k = 0; k < 8; k++)
        if (bits >> k & 1)
            sums[k] += factor * (double)(a[2 * k] * b[2 * k] + a[2 * k + 1] * b[2 * k + 1]);
#endif
}

INLINE int sum_kept_as(const Kept *kept, const float *weight, const float *numbers, double *sums, int threads, int format)
{
    const Part *part = kept->part;
    const int64_t bytes = part->tile_bytes;
    int missing = 0;
    PARALLEL_FOR(positions_of(part))
    for (int64_t t = part->t0; t < part->t1; t++)
        for (int64_t i = 0; i < part->row_count; i++) {
            float scale = 1;
            const int64_t start = start_from(kept, i, t, format, &scale);
            if (start < 0) {
                missing |= start == MISSING;
                continue;
            }
            const uint8_t *bits = bitmap_of(part, i, t), *source = kept->values + start * stored_bytes(format);
            const float *other = numbers ? numbers + 2 * (start - kept->first) : 0;
            const double factor = (weight ? (double)weight[i] : 1) * scale * (numbers ? 1 : scale);
            double *target = sums + (t - part->t0) * bytes * 8;
            for (int64_t j = 0; j < bytes; j++) {
                const int count = __builtin_popcount(bits[j]);
                if (count == 0)
                    continue;
                float values[16], others[16];
                expand(source, bits[j], format, 1, values);
                source += count * stored_bytes(format);
                if (other) {
                    expand((const uint8_t *)other, bits[j], FLOAT32, 1, others);
                    other += 2 * count;
                }
                add_products(values, other ? others : values, bits[j], factor, target + 8 * j);
            }
        }
    return missing;
}

/* Adds up values times numbers, or, without numbers, the squares of values, over the rows, times `weight` (rows,) where
   given: to `sums` (positions,). */
int sum_kept(const Part *part, const uint8_t *values, int64_t format, const float *scales, int64_t first,
             const float *weight, const float *numbers, double *sums, int64_t threads)
{
    const Kept kept = {part, values, scales, first};
    BY_FORMAT(sum_kept_as, &kept, weight, numbers, sums, threads)
}

INLINE int combine_kept_as(const Kept *kept, const float *gain, const float *weight, const float *numbers,
                           const float *factors, float *out, int threads, int format)
{
    const Part *part = kept->part;
    const int64_t bytes = part->tile_bytes;
    int missing = 0;
    PARALLEL_FOR(positions_of(part))
    for (int64_t i = 0; i < part->row_count; i++)
        for (int64_t t = part->t0; t < part->t1; t++) {
            float scale = 1;
            const int64_t start = start_from(kept, i, t, format, &scale);
            if (start < 0) {
                missing |= start == MISSING;
                continue;
            }
            const uint8_t *bits = bitmap_of(part, i, t), *source = kept->values + start * stored_bytes(format);
            const int64_t position = (t - part->t0) * bytes * 8, at = 2 * (start - kept->first);
            const float *other = numbers ? numbers + at : 0, of_row = weight ? weight[i] * scale : scale;
            float *target = out + at;
            for (int64_t j = 0; j < bytes; j++) {
                const int count = __builtin_popcount(bits[j]);
                if (count == 0)
                    continue;
                float pairs[16], others[16], gains[16];
                if (gain) {
                    expand(source, bits[j], format, 1, pairs);
                    source += count * stored_bytes(format);
                    twice(gain + position + 8 * j, gains);
                    for (int k = 0; k < 16; k++)
                        pairs[k] *= gains[k] * of_row;
                }
                if (other) {
                    expand((const uint8_t *)other, bits[j], FLOAT32, 1, others);
                    other += 2 * count;
                    twice(factors + position + 8 * j, gains);
                    for (int k = 0; k < 16; k++)
                        pairs[k] = gain ? others[k] * gains[k] + pairs[k] : others[k] * gains[k];
                }
                target += 2 * compress(pairs, bits[j], target);
            }
        }
    return missing;
}

/* Writes values times `gain` (positions,) and, where given, `weight` (rows,), plus numbers times `factors` (positions,)
   where these are given; values are left out where there is no gain. `out` may be the numbers. */
int combine_kept(const Part *part, const uint8_t *values, int64_t format, const float *scales, int64_t first,
                 const float *gain, const float *weight, const float *numbers, const float *factors, float *out,
                 int64_t threads)
{
    const Kept kept = {part, values, scales, first};
    BY_FORMAT(combine_kept_as, &kept, gain, weight, numbers, factors, out, threads)
}

/* A batch norm of maps whose planes (batch, channels) stand in the rows of a part that begins with frequency zero. The
   frequencies behind it enter by sums, and that one, a constant of a map times the root of its elements, by itself: there
   is no small difference of large sums. */
typedef struct {
    int64_t batch, channels, elements; /* elements of a map */
    int64_t batch_statistics;
    const float *mean, *var, *gamma, *beta; /* (channels,); gamma and beta may be NULL */
    double eps;
} Norm;

static double root_of(const Norm *norm)
{
    return sqrt((double)norm->elements);
}

static double count_of(const Norm *norm)
{
    const int64_t count = norm->batch * norm->elements;
    return count ? (double)count : 1;
}

static double factor_of(const Norm *norm, int64_t channel)
{
    return (norm->gamma ? (double)norm->gamma[channel] : 1) / sqrt((double)norm->var[channel] + norm->eps);
}

/* The part without its first row. */
static Part rest_of(const Part *part)
{
    Part rest = *part;
    rest.first_row++;
    rest.row_count--;
    return rest;
}

/* Where the values of the first row stand, a number for each plane, -1 where none is kept. */
static int places_of_first(const Part *part, int64_t planes, int64_t *places)
{
    const int64_t tile = part->tile_bytes * 8;
    for (int64_t t = 0; t * tile < planes; t++) {
        const uint8_t *bits = bitmap_of(part, 0, t);
        int64_t place = start_of(part, 0, t);
        if (place < 0)
            return 1;
        for (int64_t k = 0; k < tile && t * tile + k < planes; k++)
            places[t * tile + k] = bits[k / 8] >> (k % 8) & 1 ? place++ : -1;
    }
    return 0;
}

static double first_value(const Part *part, const uint8_t *values, int format, const float *scales, int64_t plane,
                          int64_t place)
{
    float real, imaginary;
    if (place < 0)
        return 0;
    read_pair(values + place * stored_bytes(format), format, &real, &imaginary);
    return format >= INT8 ? real * scales[row_of(part, 0) * part->tiles + plane / (part->tile_bytes * 8)] : real;
}

/* Mean and biased variance (channels,) of maps; `weight` (rows,) says how often a coefficient counts. `places` (planes,)
   and `sums` (positions,), which are zeros, are room. */
int norm_statistics(const Part *part, const uint8_t *values, int64_t format, const float *scales, const float *weight,
                    const Norm *norm, int64_t *places, double *sums, float *mean, float *var, int64_t threads)
{
    const Part rest = rest_of(part);
    const int64_t channels = norm->channels, planes = norm->batch * channels;
    if (places_of_first(part, planes, places) ||
        sum_kept(&rest, values, format, scales, 0, weight + 1, 0, sums, threads))
        return 1;
    for (int64_t c = 0; c < channels; c++) {
        double total = 0, power = 0;
        for (int64_t p = c; p < planes; p += channels)
            total += first_value(part, values, (int)format, scales, p, places[p]);
        const double centre = norm->batch ? total / (double)norm->batch : 0;
        for (int64_t p = c; p < planes; p += channels) {
            const double deviation = first_value(part, values, (int)format, scales, p, places[p]) - centre;
            power += deviation * deviation + sums[p];
        }
        mean[c] = (float)(centre / root_of(norm));
        var[c] = (float)(power / count_of(norm));
    }
    return 0;
}

/* Gradients of gamma and beta (channels,), and of the values: `out`, left out where NULL, which may be `grad`. `places`
   (planes,), `sums` (positions,), which are zeros, and `tables` (2, positions) are room. */
int norm_gradients(const Part *part, const uint8_t *values, int64_t format, const float *scales, const float *weight,
                   const Norm *norm, const float *grad, int64_t *places, double *sums, float *tables, float *out,
                   float *grad_gamma, float *grad_beta, int64_t threads)
{
    const Part rest = rest_of(part);
    const int64_t channels = norm->channels, planes = norm->batch * channels;
    float *factors = tables, *pulls = tables + positions_of(part) / (part->row_count ? part->row_count : 1);
    if (places_of_first(part, planes, places) || sum_kept(&rest, values, format, scales, 0, 0, grad, sums, threads))
        return 1;
    for (int64_t c = 0; c < channels; c++) {
        const double mean = norm->mean[c] * root_of(norm), factor = factor_of(norm, c);
        const double variance = (double)norm->var[c] + norm->eps;
        double total = 0, inner = 0;
        for (int64_t p = c; p < planes; p += channels) {
            const double zero = places[p] < 0 ? 0 : grad[2 * places[p]];
            total += zero;
            inner += zero * (first_value(part, values, (int)format, scales, p, places[p]) - mean) + sums[p];
        }
        grad_gamma[c] = (float)(inner / sqrt(variance));
        grad_beta[c] = (float)(total * root_of(norm));
        const double pull = norm->batch_statistics ? factor / variance * inner / count_of(norm) : 0;
        for (int64_t p = c; p < planes; p += channels) {
            factors[p] = (float)factor;
            pulls[p] = (float)-pull;
            if (!out || places[p] < 0)
                continue;
            const float *from = grad + 2 * places[p];
            float *to = out + 2 * places[p], shift = 0;
            if (norm->batch_statistics)
                shift = (float)(-factor * total / (double)norm->batch -
                                pull * (first_value(part, values, (int)format, scales, p, places[p]) - mean));
            to[0] = from[0] * (float)factor + shift;
            to[1] = from[1] * (float)factor;
        }
    }
    if (!out)
        return 0;
    return combine_kept(&rest, values, format, scales, 0, norm->batch_statistics ? pulls : 0, weight + 1, grad, factors,
                        out, threads);
}

/* The norm as a factor and a shift for each plane, (planes,). */
void norm_planes(const Norm *norm, float *gain, float *shift, int64_t threads)
{
    (void)threads;
    for (int64_t c = 0; c < norm->channels; c++) {
        const double factor = factor_of(norm, c);
        const double offset = (norm->beta ? (double)norm->beta[c] : 0) - norm->mean[c] * factor;
        for (int64_t p = c; p < norm->batch * norm->channels; p += norm->channels) {
            gain[p] = (float)factor;
            shift[p] = (float)offset;
        }
    }
}
