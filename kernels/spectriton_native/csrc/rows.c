/* Rows of packed spectra to dense chunks of pairs (rows, positions, 2) and back. */

#include "pairs.h"

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

/* Writes the pairs of the chunk `y` where the pattern keeps them. */
int gather_rows(const Part *part, const float *y, float *out, int64_t threads)
{
    const int64_t tiles = part->t1 - part->t0, bytes = part->tile_bytes;
    int missing = 0;
    PARALLEL_FOR(positions_of(part))
    for (int64_t i = 0; i < part->row_count; i++) {
        const float *row = y + i * tiles * bytes * 16;
        for (int64_t t = part->t0; t < part->t1; t++, row += bytes * 16) {
            const int64_t start = start_of(part, i, t);
            if (start < 0) {
                missing = 1;
                continue;
            }
            const uint8_t *bits = bitmap_of(part, i, t);
            float *target = out + 2 * start;
            for (int64_t j = 0; j < bytes; j++)
                target += 2 * compress(row + 16 * j, bits[j], target);
        }
    }
    return missing;
}

/* Set bits of each tile (F, tiles), where its values begin, and the rows before the tail at which nothing is kept.

   Returns whether values follow the tiles without gaps; empty tiles begin then where the next one does. */
int64_t index_tiles(const uint8_t *bitmap, const int32_t *offsets, int64_t frequencies, int64_t tiles, int64_t tile_bytes,
                    int64_t *counts, int64_t *starts, int64_t *filled, int64_t threads)
{
    (void)threads;
    int64_t total = 0, ordered = 1;
    *filled = 0;
    for (int64_t t = 0; t < frequencies * tiles; t++) {
        counts[t] = count_bits(bitmap + t * tile_bytes, tile_bytes);
        starts[t] = total;
        if (counts[t]) {
            *filled = t / tiles + 1;
            ordered &= offsets[t] == total;
        }
        total += counts[t];
    }
    if (!ordered)
        for (int64_t t = 0; t < frequencies * tiles; t++)
            starts[t] = offsets[t];
    return ordered;
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
    /* The sum stands in both places of a pair; the even ones go to the front. */
    const __m512 sums = _mm512_add_ps(squares, _mm512_permute_ps(squares, 0xb1));
    const __m256 sizes = _mm512_castps512_ps256(_mm512_permutexvar_ps(
        _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 12, 10, 8, 6, 4, 2, 0), sums));
    const __m256 limits = bounds ? _mm256_loadu_ps(bounds) : _mm256_set1_ps(bound);
    return _mm256_cmp_ps_mask(sizes, limits, _CMP_NLT_UQ);
}
#define not_below not_below_wide
#endif

/* Writes which pairs of the chunk `y` are kept, and where in the chunk's values each tile begins, (row_count, t1 - t0).

   Kept is what is not below a bound of the square of the modulus, one for all or, where `bounds` is given, one for each
   of `channels`, as gather_channels takes them; of row 0, if it is among the rows, everything. Nothing is kept beyond `length` positions of a whole row.
   Returns how many are kept. */
int64_t threshold_rows(const Part *part, const float *y, int64_t length, const float *bounds, int64_t channels,
                       float bound, int32_t *starts, int64_t threads)
{
    const int64_t tiles = part->t1 - part->t0, bytes = part->tile_bytes, first = part->t0 * bytes * 8;
    const int64_t step = 8 % channels;
    PARALLEL_FOR(positions_of(part))
    for (int64_t i = 0; i < part->row_count; i++) {
        const int64_t all = row_of(part, i) == 0;
        uint8_t *bits = (uint8_t *)bitmap_of(part, i, part->t0);
        const float *row = y + i * tiles * bytes * 16;
        int64_t channel = first % channels;
        for (int64_t j = 0; j < tiles * bytes; j++) {
            const int64_t room = length - first - 8 * j;
            uint8_t kept = 0;
            if (room > 0) {
                kept = all ? 0xff : not_below(row + 16 * j, bounds ? bounds + channel : 0, bound);
                if (room < 8)
                    kept &= (1u << room) - 1;
            }
            bits[j] = kept;
            channel += step;
            if (channel >= channels)
                channel -= channels;
        }
    }
    return tile_starts(part, starts, threads);
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

   Channels follow each other, `first` is that of the first position. `numbers` (channels + 8,) go on from the start. */
int gather_channels(const Part *part, const float *numbers, int64_t channels, int64_t first, float *out, int64_t threads)
{
    const int64_t bytes = part->tile_bytes, step = 8 % channels;
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
            int64_t channel = (first + (t - part->t0) * bytes * 8) % channels;
            float *target = out + start;
            for (int64_t j = 0; j < bytes; j++) {
                const float *source = numbers + channel;
#if WIDE
                const int count = __builtin_popcount(bits[j]);
                _mm256_mask_storeu_ps(target, (1u << count) - 1, _mm256_maskz_compress_ps(bits[j], _mm256_loadu_ps(source)));
                target += count;
#else
                for (unsigned left = bits[j]; left; left &= left - 1)
                    *target++ = source[__builtin_ctz(left)];
#endif
                channel += step;
                if (channel >= channels)
                    channel -= channels;
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

/* Kept pairs as integers of up to `levels`, tile by tile, and the tiles' scales.

   Tiles begin at `starts` (count,), the last ends at `total`. `noise`, of the shape of the pairs, rounds stochastically;
   NULL to nearest. Where something is not finite the scale is not a number. */
void quantise(const float *pairs, const int32_t *starts, int64_t count, int64_t total, int64_t levels, const float *noise,
              uint8_t *out, float *scales, int64_t threads)
{
    PARALLEL_FOR(total)
    for (int64_t t = 0; t < count; t++) {
        const int64_t first = 2 * (int64_t)starts[t], last = 2 * (t + 1 < count ? starts[t + 1] : total);
        int32_t peak = 0; /* patterns of sizes are in the order of the sizes; what is not a number comes last */
        for (int64_t k = first; k < last; k++) {
            const int32_t size = to_bits(pairs[k]) & 0x7fffffff;
            peak = size > peak ? size : peak;
        }
        float scale = peak < 0x7f800000 ? from_bits(peak) / (float)levels : NAN;
        if (scale < 0x1p-126f)
            scale = 0x1p-126f;
        scales[t] = scale;
        const float inverse = 1 / scale, limit = (float)levels;
        int8_t parts[512];
        for (int64_t at = first; at < last; at += 512) {
            const int64_t some = last - at < 512 ? last - at : 512;
            int8_t *target = levels == 127 ? (int8_t *)out + at : parts;
            for (int64_t k = 0; k < some; k++) {
                float step = pairs[at + k] * inverse;
                step = noise ? floorf(step + noise[at + k]) : rintf(step);
                step = step >= -limit ? step : (step < -limit ? -limit : 0); /* 0 for what is not a number */
                target[k] = (int8_t)(step < limit ? step : limit);
            }
            if (levels != 127)
                for (int64_t k = 0; k < some; k += 2)
                    out[(at + k) / 2] = (uint8_t)((parts[k] & 15) | (parts[k + 1] & 15) << 4);
        }
    }
}

INLINE int read_rows_as(const Part *part, const uint8_t *values, const float *scales, int64_t first, float *out,
                        int threads, int format)
{
    int missing = 0;
    PARALLEL_FOR(positions_of(part))
    for (int64_t i = 0; i < part->row_count; i++)
        for (int64_t t = part->t0; t < part->t1; t++) {
            const int64_t count = count_bits(bitmap_of(part, i, t), part->tile_bytes), start = start_of(part, i, t);
            if (start < 0 || (count && start < first)) {
                missing = 1;
                continue;
            }
            const uint8_t *source = values + start * stored_bytes(format);
            const float scale = format >= INT8 ? scales[row_of(part, i) * part->tiles + t] : 1;
            float *target = out + 2 * (start - first);
            for (int64_t k = 0; k < count; k++, source += stored_bytes(format)) {
                float re, im;
                read_pair(source, format, &re, &im);
                target[2 * k] = format >= INT8 ? re * scale : re;
                target[2 * k + 1] = format >= INT8 ? im * scale : im;
            }
        }
    return missing;
}

/* Kept values, which follow each other from `first` on, as pairs (n, 2). */
int read_rows(const Part *part, const uint8_t *values, int64_t format, const float *scales, int64_t first, float *out,
              int64_t threads)
{
    BY_FORMAT(read_rows_as, part, values, scales, first, out, threads)
}

/* Writes values of `bytes` each, those of a tile from its entry of `starts` (row_count, t1 - t0) on, to where the pattern
   has them. */
int place_values(const Part *part, const uint8_t *values, const int32_t *starts, int64_t bytes, uint8_t *out,
                 int64_t threads)
{
    const int64_t tiles = part->t1 - part->t0;
    int missing = 0;
    PARALLEL_FOR(positions_of(part))
    for (int64_t i = 0; i < part->row_count; i++)
        for (int64_t t = part->t0; t < part->t1; t++) {
            const int64_t start = start_of(part, i, t);
            const int64_t count = count_bits(bitmap_of(part, i, t), part->tile_bytes);
            if (start < 0)
                missing = 1;
            else
                memcpy(out + start * bytes, values + starts[i * tiles + t - part->t0] * bytes, count * bytes);
        }
    return missing;
}

/* Moves `count` runs of `sizes` values of `bytes` each from where they stand to where they belong. */
void move_runs(const uint8_t *values, const int64_t *from, const int64_t *to, const int64_t *sizes, int64_t count,
               int64_t bytes, uint8_t *out, int64_t threads)
{
    PARALLEL_FOR(count * 64)
    for (int64_t i = 0; i < count; i++)
        memcpy(out + to[i] * bytes, values + from[i] * bytes, sizes[i] * bytes);
}
