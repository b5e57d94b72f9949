/* Packed coefficients of planes to and from their places in spectra.

   Parts are (row, plane): of a frequency the real part stands in row `places`, the imaginary one `band` rows below. */

#include "pairs.h"

/* Eight stored pairs, times `scale` and `factor`, apart: as many real and imaginary parts as there are planes. */
INLINE void expand_apart(const uint8_t *source, uint8_t bits, int format, float scale, float factor, int64_t some,
                         float *real, float *imaginary)
{
#if WIDE
    const __m512 pairs = _mm512_mul_ps(expand_scaled(source, bits, format, scale), _mm512_set1_ps(factor));
    const __m512i order = _mm512_set_epi32(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512 apart = _mm512_permutexvar_ps(order, pairs);
    const __mmask8 there = some >= 8 ? 0xff : (1u << some) - 1;
    _mm256_mask_storeu_ps(real, there, _mm512_castps512_ps256(apart));
    _mm256_mask_storeu_ps(imaginary, there, _mm512_extractf32x8_ps(apart, 1));
#else
    float pairs[16], re[8], im[8];
    expand(source, bits, format, scale, pairs);
    split(pairs, re, im);
    for (int k = 0; k < 8 && k < some; k++) {
        real[k] = re[k] * factor;
        imaginary[k] = im[k] * factor;
    }
#endif
}

INLINE int expand_parts_as(const Part *part, const uint8_t *values, const float *scales, const int64_t *places,
                           const float *factors, int64_t band, int64_t planes, float *out, int threads, int format)
{
    const int64_t bytes = part->tile_bytes;
    int missing = 0;
    PARALLEL_FOR(positions_of(part))
    for (int64_t i = 0; i < part->row_count; i++) {
        const int64_t row = row_of(part, i);
        float *real = out + places[row] * planes, *imaginary = real + band * planes;
        for (int64_t t = part->t0; t < part->t1; t++) {
            const int64_t start = start_of(part, i, t), first = (t - part->t0) * bytes * 8;
            if (start < 0) {
                missing = 1;
                continue;
            }
            const uint8_t *bits = bitmap_of(part, i, t), *source = values + start * stored_bytes(format);
            const float factor = factors[row], scale = format >= INT8 ? scales[row * part->tiles + t] : 1;
            for (int64_t p = first; p < first + 8 * bytes && p < planes; p += 8, bits++) {
                expand_apart(source, *bits, format, scale, factor, planes - p, real + p, imaginary + p);
                source += __builtin_popcount(*bits) * stored_bytes(format);
            }
        }
    }
    return missing;
}

/* Clears the rows of parts that belong to no frequency of the part. */
static void clear_others(const Part *part, const int64_t *places, int64_t band, int64_t planes, int64_t rows, float *out)
{
    uint8_t taken[512];
    for (int64_t first = 0; first < rows; first += 512) {
        memset(taken, 0, sizeof taken);
        for (int64_t i = 0; i < part->row_count; i++) {
            const int64_t real = places[row_of(part, i)] - first, imaginary = real + band;
            if (real >= 0 && real < 512)
                taken[real] = 1;
            if (imaginary >= 0 && imaginary < 512)
                taken[imaginary] = 1;
        }
        for (int64_t row = first; row < first + 512 && row < rows; row++)
            if (!taken[row - first])
                memset(out + row * planes, 0, planes * sizeof(float));
    }
}

/* Writes the parts `out` (rows, planes): those of frequencies of the part times `factors` (F,), zero elsewhere. */
int expand_parts(const Part *part, const uint8_t *values, int64_t format, const float *scales, const int64_t *places,
                 const float *factors, int64_t band, int64_t planes, int64_t rows, float *out, int64_t threads)
{
    clear_others(part, places, band, planes, rows, out);
    BY_FORMAT(expand_parts_as, part, values, scales, places, factors, band, planes, out, threads)
}

/* Writes those of eight pairs of the parts of a frequency whose bits are set, zero beyond the last plane; returns how
   many. */
INLINE int compress_apart(const float *real, const float *imaginary, int64_t some, float factor, uint8_t bits,
                          float *out)
{
#if WIDE
    const __mmask8 there = some >= 8 ? 0xff : (1u << some) - 1;
    const __m256 re = _mm256_maskz_loadu_ps(there, real), im = _mm256_maskz_loadu_ps(there, imaginary);
    const __m512i order = _mm512_set_epi32(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
    const __m512 pairs = _mm512_permutexvar_ps(order, _mm512_insertf32x8(_mm512_castps256_ps512(re), im, 1));
    return compress_wide(_mm512_mul_ps(pairs, _mm512_set1_ps(factor)), bits, out);
#else
    float pairs[16] = {0};
    for (int k = 0; k < 8 && k < some; k++) {
        pairs[2 * k] = real[k] * factor;
        pairs[2 * k + 1] = imaginary[k] * factor;
    }
    return compress(pairs, bits, out);
#endif
}

/* Writes the pairs of parts where the pattern keeps them, times `factors` (F,). */
int gather_parts(const Part *part, const float *parts, const int64_t *places, const float *factors, int64_t band,
                 int64_t planes, float *out, int64_t threads)
{
    const int64_t bytes = part->tile_bytes;
    int missing = 0;
    PARALLEL_FOR(positions_of(part))
    for (int64_t i = 0; i < part->row_count; i++) {
        const int64_t row = row_of(part, i);
        const float *real = parts + places[row] * planes, *imaginary = real + band * planes;
        for (int64_t t = part->t0; t < part->t1; t++) {
            const int64_t start = start_of(part, i, t), first = (t - part->t0) * bytes * 8;
            if (start < 0) {
                missing = 1;
                continue;
            }
            const uint8_t *bits = bitmap_of(part, i, t);
            float *target = out + 2 * start;
            for (int64_t p = first; p < first + 8 * bytes && p < planes; p += 8, bits++) {
                if (*bits)
                    target += 2 * compress_apart(real + p, imaginary + p, planes - p, factors[row], *bits, target);
            }
        }
    }
    return missing;
}

/* Pairs (frequencies, padded, 2) of parts, zero where there is no plane. */
void rows_of_parts(const float *parts, const int64_t *places, int64_t band, int64_t frequencies, int64_t planes,
                   int64_t padded, float *out, int64_t threads)
{
    PARALLEL_FOR(frequencies * padded)
    for (int64_t f = 0; f < frequencies; f++) {
        const float *real = parts + places[f] * planes, *imaginary = real + band * planes;
        float *row = out + f * padded * 2;
        int64_t p = 0;
        for (; p < planes; p++) {
            row[2 * p] = real[p];
            row[2 * p + 1] = imaginary[p];
        }
        memset(row + 2 * planes, 0, (padded - planes) * 2 * sizeof(float));
    }
}

INLINE int expand_planes_as(const Part *part, const uint8_t *values, const float *scales, const int64_t *index,
                            const float *factors, int64_t half, int64_t planes, float *out, int threads, int format)
{
    const int64_t bytes = part->tile_bytes;
    int missing = 0;
    PARALLEL_FOR(positions_of(part))
    for (int64_t t = part->t0; t < part->t1; t++) {
        const int64_t first = (t - part->t0) * bytes * 8, left = planes - first;
        if (left <= 0)
            continue;
        float *target = out + first * half * 2;
        memset(target, 0, (left < 8 * bytes ? left : 8 * bytes) * half * 2 * sizeof(float));
        for (int64_t i = 0; i < part->row_count; i++) {
            const int64_t start = start_of(part, i, t), row = row_of(part, i);
            if (start < 0) {
                missing = 1;
                continue;
            }
            const uint8_t *bits = bitmap_of(part, i, t), *source = values + start * stored_bytes(format);
            const float factor = factors ? factors[row] : 1, scale = format >= INT8 ? scales[row * part->tiles + t] : 1;
            float *column = target + index[row] * 2;
            for (int64_t j = 0; j < bytes && 8 * j < left; j++, column += 16 * half) {
                /* There are no planes for bits beyond the last one. */
                unsigned kept = left - 8 * j >= 8 ? bits[j] : bits[j] & ((1u << (left - 8 * j)) - 1);
                for (; kept; kept &= kept - 1, source += stored_bytes(format)) {
                    float *pair = column + __builtin_ctz(kept) * half * 2, re, im;
                    read_pair(source, format, &re, &im);
                    pair[0] = re * scale * factor;
                    pair[1] = im * scale * factor;
                }
            }
        }
    }
    return missing;
}

/* Half spectra (planes, half, 2) but for the mirrors: frequency f at `index`, times `factors` where given (F,). */
int expand_planes(const Part *part, const uint8_t *values, int64_t format, const float *scales, const int64_t *index,
                  const float *factors, int64_t half, int64_t planes, float *out, int64_t threads)
{
    BY_FORMAT(expand_planes_as, part, values, scales, index, factors, half, planes, out, threads)
}
