/* Pooling and ReLU of a block of planes.

   Codes are bit planes, tile by tile of planes: of each tile the lowest bit of all outputs (outputs, tile), then the
   next. Of a last tile that is not full only its planes are there, and bytes hold bits of two outputs. */

#ifndef SPECTRITON_POOLING_H
#define SPECTRITON_POOLING_H

#include "lanes.h"

typedef struct {
    uint8_t *codes, *signs; /* or NULL */
    const float *gain, *shift; /* (planes,), or NULL */
    int64_t planes, height, width, tile; /* of the outputs; planes in a tile, a multiple of 32 */
    int64_t kernel_height, kernel_width, stride_height, stride_width, bits, margin, rectify;
} Pooling;

/* Whether there is nothing to do but, where there is a margin, to leave it out. */
INLINE int is_plain(const Pooling *pooling)
{
    return pooling->kernel_height * pooling->kernel_width * pooling->stride_height * pooling->stride_width == 1 &&
           !pooling->codes && !pooling->signs && !pooling->gain && !pooling->rectify;
}

INLINE int64_t top_of(const Pooling *pooling, int64_t row)
{
    return pooling->margin + row * pooling->stride_height;
}

INLINE int64_t left_of(const Pooling *pooling, int64_t column)
{
    return pooling->margin + column * pooling->stride_width;
}

/* Where the bits of a block stand: those of an output follow those of the one before after so many. */
typedef struct {
    int64_t first, count;
} Bits;

INLINE Bits bits_of(const Pooling *pooling, int64_t bits, int64_t p)
{
    const int64_t first = p / pooling->tile * pooling->tile, left = pooling->planes - first;
    const int64_t outputs = pooling->height * pooling->width;
    return (Bits){first * bits * outputs + p - first, left < pooling->tile ? left : pooling->tile};
}

/* The bits of `some` planes from bit `at` on. */
INLINE Mask load_bits(const uint8_t *bytes, int64_t at, int64_t some)
{
    if (some == LANES && at % 8 == 0) {
        Mask mask;
        memcpy(&mask, bytes + at / 8, sizeof mask);
        return mask;
    }
    uint64_t word = 0;
    for (int64_t i = 0; i < (at % 8 + some + 7) / 8; i++)
        word |= (uint64_t)bytes[at / 8 + i] << (8 * i);
    return (Mask)(word >> at % 8 & ((1ull << some) - 1));
}

/* Writes them; where bytes are shared, there are zeros, and other threads may write theirs. */
INLINE void store_bits(uint8_t *bytes, int64_t at, int64_t some, Mask mask)
{
    if (some == LANES && at % 8 == 0) {
        memcpy(bytes + at / 8, &mask, sizeof mask);
        return;
    }
    const uint64_t word = (mask & ((1ull << some) - 1)) << at % 8;
    for (int64_t i = 0; i < (at % 8 + some + 7) / 8; i++) {
        const uint8_t byte = (uint8_t)(word >> (8 * i));
        PRAGMA(omp atomic)
        bytes[at / 8 + i] |= byte;
    }
}

/* A last tile that is not full shares bytes: they are put to zeros. */
static void clear_last(const Pooling *pooling, int64_t bits, uint8_t *bytes)
{
    const int64_t outputs = pooling->height * pooling->width, rest = pooling->planes % pooling->tile;
    if (bytes && rest)
        memset(bytes + (pooling->planes - rest) * bits * outputs / 8, 0, (rest * bits * outputs + 7) / 8);
}

INLINE void pool_row_as(const Pooling *pooling, int64_t p, int64_t some, int64_t row, const lanes *maps, int64_t width,
                        lanes *out, const int rows, const int columns, const int bits)
{
    const Bits of_codes = bits_of(pooling, bits, p), of_signs = bits_of(pooling, 1, p);
    const int64_t outputs = pooling->height * pooling->width;
    const int scaled = pooling->gain != 0;
    lanes gain = no_lanes(), shift = no_lanes();
    if (scaled) {
        gain = load(pooling->gain + p, some);
        shift = load(pooling->shift + p, some);
    }
    for (int64_t column = 0; column < pooling->width; column++) {
        const int64_t output = row * pooling->width + column;
        const lanes *corner = maps + top_of(pooling, row) * width + left_of(pooling, column);
        lanes best = scaled ? affine(corner[0], gain, shift) : corner[0];
        Mask code[8] = {0};
        for (int number = 1; number < rows * columns; number++) {
            lanes candidate = corner[number / columns * width + number % columns];
            if (scaled)
                candidate = affine(candidate, gain, shift);
            const Mask larger = is_larger(candidate, best);
            best = choose(larger | is_no_number(candidate), candidate, best);
            for (int bit = 0; bit < bits; bit++)
                code[bit] = number >> bit & 1 ? code[bit] | larger : code[bit] & ~larger;
        }
        for (int bit = 0; pooling->codes && bit < bits; bit++)
            store_bits(pooling->codes, of_codes.first + (bit * outputs + output) * of_codes.count, some, code[bit]);
        if (pooling->rectify) {
            const Mask positive = passes(best);
            if (pooling->signs)
                store_bits(pooling->signs, of_signs.first + output * of_signs.count, some, positive);
            best = masked(positive, best);
        }
        out[output] = best;
    }
}

/* One row of outputs of maps (H, width). It may be written over the maps: to where no later window reads. */
static void pool_row(const Pooling *pooling, int64_t p, int64_t some, int64_t row, const lanes *maps, int64_t width,
                     lanes *out)
{
    const int rows = (int)pooling->kernel_height, columns = (int)pooling->kernel_width, bits = (int)pooling->bits;
    if (rows == 2 && columns == 2 && bits == 2)
        pool_row_as(pooling, p, some, row, maps, width, out, 2, 2, 2);
    else
        pool_row_as(pooling, p, some, row, maps, width, out, rows, columns, bits);
}

INLINE int are_apart(const Pooling *pooling)
{
    return pooling->stride_height >= pooling->kernel_height && pooling->stride_width >= pooling->kernel_width;
}

INLINE void clear_lanes(lanes *from, const lanes *to)
{
    for (; from < to; from++)
        *from = no_lanes();
}

INLINE void spread_row_as(const Pooling *pooling, int64_t p, int64_t some, int64_t row, const lanes *grads, lanes *maps,
                          int64_t width, const int rows, const int columns, const int bits, const int apart)
{
    const Bits of_codes = bits_of(pooling, bits, p), of_signs = bits_of(pooling, 1, p);
    const int64_t outputs = pooling->height * pooling->width;
    /* Backwards, so that an element of several windows adds them up in the order of its place in them. */
    for (int64_t column = pooling->width - 1; column >= 0; column--) {
        const int64_t output = row * pooling->width + column;
        lanes grad = grads[column], *corner = maps + top_of(pooling, row) * width + left_of(pooling, column);
        if (pooling->signs)
            grad = masked(load_bits(pooling->signs, of_signs.first + output * of_signs.count, some), grad);
        Mask code[8] = {0};
        for (int bit = 0; bit < bits; bit++)
            code[bit] = load_bits(pooling->codes, of_codes.first + (bit * outputs + output) * of_codes.count, some);
        for (int number = 0; number < rows * columns; number++) {
            Mask here = ~(Mask)0;
            for (int bit = 0; bit < bits; bit++)
                here &= number >> bit & 1 ? code[bit] : ~code[bit];
            lanes *target = corner + number / columns * width + number % columns;
            const lanes part = masked(here, grad);
            *target = apart ? part : add(*target, part);
        }
    }
}

/* The adjoint: gradients of a row of outputs are added to maps (H, width) or, where windows are apart, written there. */
static void spread_row(const Pooling *pooling, int64_t p, int64_t some, int64_t row, const lanes *grads, lanes *maps,
                       int64_t width)
{
    const int rows = (int)pooling->kernel_height, columns = (int)pooling->kernel_width, bits = (int)pooling->bits;
    const int apart = are_apart(pooling);
    if (rows == 2 && columns == 2 && bits == 2 && apart)
        spread_row_as(pooling, p, some, row, grads, maps, width, 2, 2, 2, 1);
    else
        spread_row_as(pooling, p, some, row, grads, maps, width, rows, columns, bits, apart);
}

/* Zeros in row h of maps (H, width), before the windows of output row `row` are added or, where they are apart, but for
   what they write. */
static void clear_row(const Pooling *pooling, int64_t row, int64_t h, lanes *maps, int64_t width)
{
    lanes *line = maps + h * width;
    if (!are_apart(pooling) || h < top_of(pooling, row) || h >= top_of(pooling, row) + pooling->kernel_height) {
        clear_lanes(line, line + width);
        return;
    }
    int64_t from = 0;
    for (int64_t column = 0; column < pooling->width; column++) {
        clear_lanes(line + from, line + left_of(pooling, column));
        from = left_of(pooling, column) + pooling->kernel_width;
    }
    clear_lanes(line + from, line + width);
}

#endif
