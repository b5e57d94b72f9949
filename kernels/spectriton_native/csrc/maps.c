/* Packed coefficients of planes to and from their places in spectra.

   Parts are (row, plane): of a frequency the real part stands in row `places`, the imaginary one `band` rows below. */

#include "pairs.h"

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
            const float factor = factors[row] * (format >= INT8 ? scales[row * part->tiles + t] : 1);
            for (int64_t p = first; p < first + 8 * bytes && p < planes; p += 8, bits++) {
                float pairs[16], re[8], im[8];
                expand(source, *bits, format, 1, pairs);
                source += __builtin_popcount(*bits) * stored_bytes(format);
                split(pairs, re, im);
                const int64_t some = planes - p;
                if (some >= 8) {
                    for (int k = 0; k < 8; k++) {
                        real[p + k] = re[k] * factor;
                        imaginary[p + k] = im[k] * factor;
                    }
                } else {
                    for (int k = 0; k < some; k++) {
                        real[p + k] = re[k] * factor;
                        imaginary[p + k] = im[k] * factor;
                    }
                }
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

/* Eight pairs of the parts of a frequency, zero beyond the last plane. */
INLINE void join(const float *real, const float *imaginary, int64_t some, float factor, float *pairs)
{
    if (some >= 8) {
        for (int k = 0; k < 8; k++) {
            pairs[2 * k] = real[k] * factor;
            pairs[2 * k + 1] = imaginary[k] * factor;
        }
    } else {
        memset(pairs, 0, 16 * sizeof(float));
        for (int k = 0; k < some; k++) {
            pairs[2 * k] = real[k] * factor;
            pairs[2 * k + 1] = imaginary[k] * factor;
        }
    }
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
                if (*bits == 0)
                    continue;
                float pairs[16];
                join(real + p, imaginary + p, planes - p, factors[row], pairs);
                target += 2 * compress(pairs, *bits, target);
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
            const float factor =
                (factors ? factors[row] : 1) * (format >= INT8 ? scales[row * part->tiles + t] : 1);
            float *column = target + index[row] * 2;
            for (int64_t j = 0; j < bytes; j++, column += 16 * half)
                for (unsigned kept = bits[j]; kept; kept &= kept - 1, source += stored_bytes(format)) {
                    float *pair = column + __builtin_ctz(kept) * half * 2, re, im;
                    read_pair(source, format, &re, &im);
                    pair[0] = re * factor;
                    pair[1] = im * factor;
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
