/* Rows of packed spectra to dense chunks of pairs (rows, positions, 2) and back, by the activation or as they are. */

#include "activation.h"

INLINE int expand_rows_as(const Part *part, const uint8_t *values, const float *scales, float *out, int threads, int format)
{
    const int64_t tiles = part->t1 - part->t0, bytes = part->tile_bytes;
    int missing = 0;
    PARALLEL_FOR(positions_of(part))
    for (int64_t i = 0; i < part->row_count; i++) {
        float *row = out + i * tiles * bytes * 16;
        for (int64_t t = part->t0; t < part->t1; t++, row += bytes * 16) {
            const int64_t start = start_of(part, i, t);
            if (start < 0) {
                missing = 1;
                continue;
            }
            const uint8_t *bits = bitmap_of(part, i, t), *source = values + start * stored_bytes(format);
            const float scale = format >= INT8 ? scales[row_of(part, i) * part->tiles + t] : 1;
            for (int64_t j = 0; j < bytes; j++) {
                expand(source, bits[j], format, scale, row + 16 * j);
                source += __builtin_popcount(bits[j]) * stored_bytes(format);
            }
        }
    }
    return missing;
}

/* Writes all of `out`: kept values, else zero. Scales are (F, tiles), of integer formats. */
int expand_rows(const Part *part, const uint8_t *values, int64_t format, const float *scales, float *out, int64_t threads)
{
    BY_FORMAT(expand_rows_as, part, values, scales, out, threads)
}

/* Set bits of each of `tiles`, and where its values begin.

   Returns whether values follow the tiles without gaps; empty tiles begin then where the next one does. */
int index_tiles(const uint8_t *bitmap, const int32_t *offsets, int64_t tiles, int64_t tile_bytes, int64_t *counts,
                int64_t *starts, int64_t threads)
{
    (void)threads;
    int64_t total = 0;
    int ordered = 1;
    for (int64_t t = 0; t < tiles; t++) {
        counts[t] = count_bits(bitmap + t * tile_bytes, tile_bytes);
        starts[t] = total;
        if (counts[t])
            ordered &= offsets[t] == total;
        total += counts[t];
    }
    if (!ordered)
        for (int64_t t = 0; t < tiles; t++)
            starts[t] = offsets[t];
    return ordered;
}

/* How many rows of `bytes` each come before the tail in which no bit is set. */
int64_t filled_rows(const uint8_t *bitmap, int64_t rows, int64_t bytes, int64_t threads)
{
    (void)threads;
    for (int64_t at = rows * bytes; at > 0; at -= 4) { /* rows are made of words */
        uint32_t word;
        memcpy(&word, bitmap + at - 4, 4);
        if (word)
            return (at - 1) / bytes + 1;
    }
    return 0;
}

/* Where the values of each tile begin where those of the part follow each other, (row_count, t1 - t0); returns how many
   there are. */
int64_t tile_starts(const Part *part, int32_t *starts, int64_t threads)
{
    (void)threads;
    int64_t total = 0;
    for (int64_t i = 0; i < part->row_count; i++)
        for (int64_t t = part->t0; t < part->t1; t++) {
            *starts++ = (int32_t)total;
            total += count_bits(bitmap_of(part, i, t), part->tile_bytes);
        }
    return total;
}

/* Eight bits: which pairs are not below a bound, by their squares. What is not a number is not below. */
INLINE uint8_t not_below(const float *pairs, const float *bounds, float bound)
{
    float squares[8];
    uint8_t bits = 0;
    for (int k = 0; k < 8; k++)
        squares[k] = pairs[2 * k] * pairs[2 * k] + pairs[2 * k + 1] * pairs[2 * k + 1];
    for (int k = 0; k < 8; k++)
        bits |= (uint8_t)(!(squares[k] < (bounds ? bounds[k] : bound))) << k;
    return bits;
}

#if WIDE
INLINE uint8_t not_below_wide(const float *pairs, const float *bounds, float bound)
{
    const __m512 y = _mm512_loadu_ps(pairs), squares = _mm512_mul_ps(y, y);
    /* The sum stands in both places of a pair. */
    const __m256 sizes = even_ones(_mm512_add_ps(squares, _mm512_permute_ps(squares, 0xb1)));
    const __m256 limits = bounds ? _mm256_loadu_ps(bounds) : _mm256_set1_ps(bound);
    return _mm256_cmp_ps_mask(sizes, limits, _CMP_NLT_UQ);
}
#define not_below not_below_wide
#endif

/* Numbers of channels, which follow each other along a row, stand as often as it takes to fill whole eights, as many as
   bits in a byte; returns these. */
INLINE int64_t period_of(int64_t channels)
{
    return channels >> (channels % 8 ? __builtin_ctzll((uint64_t)channels) : 3);
}

/* Writes which pairs of the chunk `y` are kept, and where in the chunk's values each tile begins, (row_count, t1 - t0).

   Kept is what is not below a bound of the square of the modulus, one for all or, where `bounds` is given, one for each
   of `channels`, by eights (see `period_of`); of row 0, if it is among the rows, everything. Nothing is kept beyond
   `length` positions of a whole row. Returns how many are kept. */
int64_t threshold_rows(const Part *part, const float *y, int64_t length, const float *bounds, int64_t channels,
                       float bound, int32_t *starts, int64_t threads)
{
    const int64_t tiles = part->t1 - part->t0, bytes = part->tile_bytes, first = part->t0 * bytes * 8;
    const int64_t period = period_of(channels);
    PARALLEL_FOR(positions_of(part))
    for (int64_t i = 0; i < part->row_count; i++) {
        const int64_t all = row_of(part, i) == 0;
        uint8_t *bits = (uint8_t *)bitmap_of(part, i, part->t0);
        const float *row = y + i * tiles * bytes * 16;
        int64_t place = first / 8 % period;
        for (int64_t j = 0; j < tiles * bytes; j++, place = place + 1 < period ? place + 1 : 0) {
            const int64_t room = length - first - 8 * j;
            uint8_t kept = 0;
            if (room > 0) {
                kept = all ? 0xff : not_below(row + 16 * j, bounds ? bounds + 8 * place : 0, bound);
                if (room < 8)
                    kept &= (1u << room) - 1;
            }
            bits[j] = kept;
        }
        for (int64_t t = 0; t < tiles; t++)
            starts[i * tiles + t] = (int32_t)count_bits(bits + t * bytes, bytes);
    }
    int64_t total = 0;
    for (int64_t n = 0; n < part->row_count * tiles; n++) {
        const int32_t count = starts[n];
        starts[n] = (int32_t)total;
        total += count;
    }
    return total;
}

/* Counts moduli of pairs (rows, n), `pitch` floats a row, by the leading bits of their patterns, what is not a number as
   infinite. */
void count_moduli(const float *y, int64_t rows, int64_t n, int64_t pitch, int64_t guard, int64_t shift, int64_t *counts,
                  int64_t threads)
{
    (void)threads;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t first = 0; first < n; first += 256) {
            const int64_t some = n - first < 256 ? n - first : 256;
            const float *pairs = y + i * pitch + 2 * first;
            int32_t bins[256];
            for (int64_t k = 0; k < some; k++) {
                const float size = sqrtf(pairs[2 * k] * pairs[2 * k] + pairs[2 * k + 1] * pairs[2 * k + 1]);
                bins[k] = (int32_t)((to_bits(size <= INFINITY ? size : INFINITY) + (uint32_t)guard) >> shift);
            }
            for (int64_t k = 0; k < some; k++)
                counts[bins[k]]++;
        }
}

/* One of `numbers` for every kept coefficient: that of its channel.

   `first` is the first position of its row. `numbers` stand by eights, see `period_of`. */
int gather_channels(const Part *part, const float *numbers, int64_t channels, int64_t first, float *out, int64_t threads)
{
    const int64_t bytes = part->tile_bytes, period = period_of(channels);
    int missing = 0;
    PARALLEL_FOR(positions_of(part))
    for (int64_t i = 0; i < part->row_count; i++)
        for (int64_t t = part->t0; t < part->t1; t++) {
            const int64_t start = start_of(part, i, t);
            if (start < 0) {
                missing = 1;
                continue;
            }
            const uint8_t *bits = bitmap_of(part, i, t);
            int64_t place = (first / 8 + (t - part->t0) * bytes) % period;
            float *target = out + start;
            for (int64_t j = 0; j < bytes; j++, place = place + 1 < period ? place + 1 : 0) {
                const float *source = numbers + 8 * place;
#if WIDE
                const int count = __builtin_popcount(bits[j]);
                _mm256_mask_storeu_ps(target, (1u << count) - 1, _mm256_maskz_compress_ps(bits[j], _mm256_loadu_ps(source)));
                target += count;
#else
                for (unsigned left = bits[j]; left; left &= left - 1)
                    *target++ = source[__builtin_ctz(left)];
#endif
            }
        }
    return missing;
}

/* Sums over rows of pairs that stand at the places of the pattern, added to `sums` (positions, 2). */
int sum_rows(const Part *part, const float *pairs, float *sums, int64_t threads)
{
    const int64_t bytes = part->tile_bytes;
    int missing = 0;
    PARALLEL_FOR(positions_of(part))
    for (int64_t t = part->t0; t < part->t1; t++)
        for (int64_t i = 0; i < part->row_count; i++) {
            const int64_t start = start_of(part, i, t);
            if (start < 0) {
                missing = 1;
                continue;
            }
            const uint8_t *bits = bitmap_of(part, i, t);
            const float *source = pairs + 2 * start;
            float *target = sums + (t - part->t0) * bytes * 16;
            for (int64_t j = 0; j < bytes; j++, target += 16) {
                float some[16];
                expand((const uint8_t *)source, bits[j], FLOAT32, 1, some);
                for (int k = 0; k < 16; k++)
                    target[k] += some[k];
                source += 2 * __builtin_popcount(bits[j]);
            }
        }
    return missing;
}

/* `count` parts of a tile as integers of up to `levels`; returns the scale. See `quantise`. */
INLINE float quantise_tile(const float *parts, int64_t count, int64_t levels, const float *noise, uint8_t *out)
{
    int32_t peak = 0; /* patterns of sizes are in the order of the sizes; what is not a number comes last */
    for (int64_t k = 0; k < count; k++) {
        const int32_t size = to_bits(parts[k]) & 0x7fffffff;
        peak = size > peak ? size : peak;
    }
    float scale = peak < 0x7f800000 ? from_bits(peak) / (float)levels : NAN;
    if (scale < 0x1p-126f)
        scale = 0x1p-126f;
    const float inverse = 1 / scale, limit = (float)levels;
    int8_t steps[512];
    for (int64_t first = 0; first < count; first += 512) {
        const int64_t some = count - first < 512 ? count - first : 512;
        int8_t *target = levels == 127 ? (int8_t *)out + first : steps;
        for (int64_t k = 0; k < some; k++) {
            float step = parts[first + k] * inverse;
            step = noise ? floorf(step + noise[first + k]) : rintf(step);
            step = step >= -limit ? step : (step < -limit ? -limit : 0); /* 0 for what is not a number */
            target[k] = (int8_t)(step < limit ? step : limit);
        }
        if (levels != 127)
            for (int64_t k = 0; k < some; k += 2)
                out[(first + k) / 2] = (uint8_t)((steps[k] & 15) | (steps[k + 1] & 15) << 4);
    }
    return scale;
}

/* Kept pairs as integers of up to `levels`, tile by tile, and the tiles' scales.

   Tiles begin at `starts` (count,), the last ends at `total`. `noise`, of the shape of the pairs, rounds stochastically;
   NULL to nearest. Where something is not finite the scale is not a number. */
void quantise(const float *pairs, const int32_t *starts, int64_t count, int64_t total, int64_t levels, const float *noise,
              uint8_t *out, float *scales, int64_t threads)
{
    PARALLEL_FOR(total)
    for (int64_t t = 0; t < count; t++) {
        const int64_t first = starts[t], last = t + 1 < count ? starts[t + 1] : total;
        scales[t] = quantise_tile(pairs + 2 * first, 2 * (last - first), levels, noise ? noise + 2 * first : 0,
                                  out + (levels == 127 ? 2 : 1) * first);
    }
}

/* The bytes of a tile in which a bit is set. */
typedef struct {
    int64_t count;
    int32_t byte[LARGEST_TILE / 8], place[LARGEST_TILE / 8]; /* place: among the eights of channels, see `period_of` */
} Filled;

/* Without a branch, which half of the time would go the other way. */
INLINE void find_filled(const uint8_t *bits, int64_t bytes, int64_t first, int64_t period, Filled *out)
{
    int32_t n = 0, place = (int32_t)(first % period);
    for (int32_t j = 0; j < bytes; j++) {
        out->byte[n] = j;
        out->place[n] = place;
        n += bits[j] != 0;
        place = place + 1 < period ? place + 1 : 0;
    }
    out->count = n;
}

INLINE int store_rows_as(const Part *part, const float *y, const float *numbers, int64_t channels, int64_t active,
                         uint8_t *values, float *scales, int threads, int format)
{
    const int64_t tiles = part->t1 - part->t0, bytes = part->tile_bytes, period = period_of(channels);
    int missing = 0;
    PARALLEL_IN_TURNS(positions_of(part))
    for (int64_t i = 0; i < part->row_count; i++) {
        const float *row = y + i * tiles * bytes * 16;
        for (int64_t t = part->t0; t < part->t1; t++, row += bytes * 16) {
            const int64_t start = start_of(part, i, t);
            if (start < 0) {
                missing = 1;
                continue;
            }
            const uint8_t *bits = bitmap_of(part, i, t);
            uint8_t *target = values + start * stored_bytes(format);
            float pairs[2 * LARGEST_TILE], of_kept[2 * LARGEST_TILE];
            float *kept = format == FLOAT32 ? (float *)target : pairs;
            Filled filled;
            find_filled(bits, bytes, t * bytes, period, &filled);
            int64_t count = 0;
            for (int64_t n = 0; n < filled.count; n++) {
                const int64_t j = filled.byte[n];
                if (numbers)
                    compress_doubled(numbers + 8 * filled.place[n], bits[j], of_kept + 2 * count);
                count += compress(row + 16 * j, bits[j], kept + 2 * count);
            }
            if (active)
                activate_tanh(kept, numbers ? of_kept : 0, 2 * count);
            if (format == FLOAT16 || format == BFLOAT16)
                write_halves(kept, 2 * count, format, target);
            else if (format != FLOAT32)
                scales[row_of(part, i) * part->tiles + t] =
                    quantise_tile(kept, 2 * count, format == INT8 ? 127 : 7, 0, target);
        }
    }
    return missing;
}

/* Writes the pairs of the chunk `y` that the pattern keeps, in a format, and of integers the scales (F, tiles).

   `active`: s tanh(x / s) of them, s that of their channel, which is the position in the row modulo `channels`; `numbers`
   are the s by eights (see `period_of`), NULL for ones. */
int store_rows(const Part *part, const float *y, const float *numbers, int64_t channels, int64_t active, uint8_t *values,
               int64_t format, float *scales, int64_t threads)
{
    BY_FORMAT(store_rows_as, part, y, numbers, channels, active, values, scales, threads)
}

/* Moves `count` runs of `sizes` values of `bytes` each from where they stand to where they belong. */
void move_runs(const uint8_t *values, const int64_t *from, const int64_t *to, const int64_t *sizes, int64_t count,
               int64_t bytes, uint8_t *out, int64_t threads)
{
    PARALLEL_FOR(count * 64)
    for (int64_t i = 0; i < count; i++)
        memcpy(out + to[i] * bytes, values + from[i] * bytes, sizes[i] * bytes);
}

/* Rows are added up in so many groups, however many threads there are. */
#define GROUPS 16

INLINE int unpack_gradient_rows_as(const Part *part, const float *grad, const uint8_t *values, const float *scales,
                                   const float *numbers, int64_t channels, double *sums, float *out, int threads,
                                   int format)
{
    const int64_t tiles = part->t1 - part->t0, bytes = part->tile_bytes, period = period_of(channels);
    int missing = 0;
    PARALLEL_FOR(positions_of(part))
    for (int64_t group = 0; group < GROUPS; group++)
        for (int64_t i = group; i < part->row_count; i += GROUPS) {
            float *row = out + i * tiles * bytes * 16;
            for (int64_t t = part->t0; t < part->t1; t++, row += bytes * 16) {
                const int64_t start = start_of(part, i, t);
                if (start < 0) {
                    missing = 1;
                    continue;
                }
                const uint8_t *bits = bitmap_of(part, i, t);
                float output[2 * LARGEST_TILE], of_kept[2 * LARGEST_TILE], kept[2 * LARGEST_TILE], terms[2 * LARGEST_TILE];
                const int64_t all = count_bits(bits, bytes);
                Filled filled;
                filled.count = 0;
                if (numbers)
                    find_filled(bits, bytes, t * bytes, period, &filled);
                for (int64_t n = 0, count = 0; n < filled.count; n++) {
                    const uint8_t some = bits[filled.byte[n]];
                    compress_doubled(numbers + 8 * filled.place[n], some, of_kept + 2 * count);
                    count += __builtin_popcount(some);
                }
                const float scale = format >= INT8 ? scales[row_of(part, i) * part->tiles + t] : 1;
                read_pairs(values + start * stored_bytes(format), all, format, scale, output);
                tanh_backward(grad + 2 * start, output, numbers ? of_kept : 0, 2 * all, kept, terms);
                if (!numbers) {
                    for (int64_t j = 0, count = 0; j < bytes; j++) {
                        expand((const uint8_t *)(kept + 2 * count), bits[j], FLOAT32, 1, row + 16 * j);
                        count += __builtin_popcount(bits[j]);
                    }
                    continue;
                }
                memset(row, 0, bytes * 16 * sizeof(float));
                for (int64_t n = 0, count = 0; n < filled.count; n++) {
                    const uint8_t some = bits[filled.byte[n]];
                    expand((const uint8_t *)(kept + 2 * count), some, FLOAT32, 1, row + 16 * filled.byte[n]);
                    add_expanded(terms + 2 * count, some, sums + 8 * (group * period + filled.place[n]));
                    count += __builtin_popcount(some);
                }
            }
        }
    return missing;
}

static int unpack_gradient_rows_by(const Part *part, const float *grad, const uint8_t *values, int64_t format,
                                   const float *scales, const float *numbers, int64_t channels, double *sums, float *out,
                                   int threads)
{
    BY_FORMAT(unpack_gradient_rows_as, part, grad, values, scales, numbers, channels, sums, out, threads)
}

/* Writes all of `out`: gradients (N, 2) of what is kept, taken back through tanh from its outputs, the `values`; else zero.

   `numbers` and `channels` as of `store_rows`. Where there are numbers, their gradient is written to `grad_numbers`
   (channels,); `sums`, of sixteen times as many, are zeros to add it up in. */
int unpack_gradient_rows(const Part *part, const float *grad, const uint8_t *values, int64_t format, const float *scales,
                         const float *numbers, int64_t channels, double *sums, float *grad_numbers, float *out,
                         int64_t threads)
{
    const int missing =
        unpack_gradient_rows_by(part, grad, values, format, scales, numbers, channels, sums, out, (int)threads);
    if (numbers) {
        for (int64_t c = channels; c < 8 * GROUPS * period_of(channels); c++)
            sums[c % channels] += sums[c];
        for (int64_t c = 0; c < channels; c++)
            grad_numbers[c] = (float)sums[c];
    }
    return missing;
}
