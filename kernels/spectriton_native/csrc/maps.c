/* Packed coefficients of planes to their places in half spectra. */

#include "pairs.h"

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
