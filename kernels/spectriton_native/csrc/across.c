/* Pooling and ReLU of maps whose planes stand innermost in memory, (H, W, planes), sixteen planes at a time.

   Codes are bit planes, tile by tile of planes: of each tile the lowest bit of all outputs (outputs, tile), then the
   next. Of a last tile that is not full only its planes are there, and bytes hold bits of two outputs. */

#include "pairs.h"

#define LANES 16

typedef struct {
    int64_t planes, height, width, tile; /* of the outputs; planes in a tile, a multiple of 8 */
    int64_t kernel_height, kernel_width, stride_height, stride_width, bits;
} Windows;

/* One of the tiles of planes, and some of the rows of outputs. */
typedef struct {
    int64_t first, count, row, rows;
    int full;
} Unit;

/* Where a plane stands: how far apart planes, rows and columns are. */
typedef struct {
    int64_t plane, row, column;
} Strides;

INLINE int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

INLINE int64_t units_of(const Windows *windows, int by_row)
{
    return (windows->planes + windows->tile - 1) / windows->tile * (by_row ? windows->height : 1);
}

INLINE Unit unit_of(const Windows *windows, int by_row, int64_t number)
{
    const int64_t rows = by_row ? 1 : windows->height, parts = by_row ? windows->height : 1;
    const int64_t first = number / parts * windows->tile, count = smaller(windows->tile, windows->planes - first);
    return (Unit){first, count, number % parts, rows, count == windows->tile};
}

/* The bit of the first plane of a tile, of bit plane `bit` of an output; full tiles begin at bytes. */
INLINE int64_t bit_of(const Windows *windows, const Unit *unit, int64_t bits, int64_t bit, int64_t output)
{
    const int64_t outputs = windows->height * windows->width;
    return unit->first * bits * outputs + (bit * outputs + output) * unit->count;
}

/* Sixteen bits from bit `at` on, of which `some` count. */
INLINE unsigned load_bits(const uint8_t *bytes, int64_t at, int some)
{
    const int shift = at & 7, last = (shift + some + 7) / 8;
    unsigned word = 0;
    bytes += at >> 3;
    for (int i = 0; i < last; i++)
        word |= (unsigned)bytes[i] << (8 * i);
    return word >> shift & ((1u << some) - 1);
}

/* Writes `some` bits from bit `at` on; `over` what is there, else to where there are zeros. */
INLINE void store_bits(uint8_t *bytes, int64_t at, int some, unsigned bits, int over)
{
    const int shift = at & 7, last = (shift + some + 7) / 8;
    const unsigned word = bits << shift;
    bytes += at >> 3;
    for (int i = 0; i < last; i++)
        bytes[i] = (uint8_t)(word >> (8 * i)) | (over ? 0 : bytes[i]);
}

#if WIDE

typedef __m512 Lanes;
typedef __mmask16 Mask;

INLINE Lanes load(const float *source, int64_t stride, int some)
{
    if (stride == 1)
        return _mm512_maskz_loadu_ps((Mask)((1u << some) - 1), source);
    float lanes[LANES] = {0};
    for (int i = 0; i < some; i++)
        lanes[i] = source[i * stride];
    return _mm512_loadu_ps(lanes);
}

INLINE void store(Lanes lanes, float *target, int64_t stride, int some)
{
    if (stride == 1) {
        _mm512_mask_storeu_ps(target, (Mask)((1u << some) - 1), lanes);
        return;
    }
    float numbers[LANES];
    _mm512_storeu_ps(numbers, lanes);
    for (int i = 0; i < some; i++)
        target[i * stride] = numbers[i];
}

INLINE Lanes affine(Lanes lanes, Lanes gain, Lanes shift)
{
    return _mm512_fmadd_ps(lanes, gain, shift);
}

INLINE Mask is_larger(Lanes a, Lanes b)
{
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
}

INLINE Mask is_no_number(Lanes lanes)
{
    return _mm512_cmp_ps_mask(lanes, lanes, _CMP_UNORD_Q);
}

/* What is not a number passes. */
INLINE Mask passes(Lanes lanes)
{
    return _mm512_cmp_ps_mask(lanes, _mm512_setzero_ps(), _CMP_NLE_UQ);
}

INLINE Lanes choose(Mask mask, Lanes set, Lanes clear)
{
    return _mm512_mask_mov_ps(clear, mask, set);
}

INLINE Lanes masked(Mask mask, Lanes lanes)
{
    return _mm512_maskz_mov_ps(mask, lanes);
}

INLINE Lanes sum(Lanes a, Lanes b)
{
    return _mm512_add_ps(a, b);
}

#else

typedef struct {
    float at[LANES];
} Lanes;
typedef unsigned Mask;

INLINE Lanes load(const float *source, int64_t stride, int some)
{
    Lanes lanes = {{0}};
    for (int i = 0; i < some; i++)
        lanes.at[i] = source[i * stride];
    return lanes;
}

INLINE void store(Lanes lanes, float *target, int64_t stride, int some)
{
    for (int i = 0; i < some; i++)
        target[i * stride] = lanes.at[i];
}

INLINE Lanes affine(Lanes lanes, Lanes gain, Lanes shift)
{
    for (int i = 0; i < LANES; i++)
        lanes.at[i] = lanes.at[i] * gain.at[i] + shift.at[i];
    return lanes;
}

INLINE Mask is_larger(Lanes a, Lanes b)
{
    Mask mask = 0;
    for (int i = 0; i < LANES; i++)
        mask |= (Mask)(a.at[i] > b.at[i]) << i;
    return mask;
}

INLINE Mask is_no_number(Lanes lanes)
{
    Mask mask = 0;
    for (int i = 0; i < LANES; i++)
        mask |= (Mask)(lanes.at[i] != lanes.at[i]) << i;
    return mask;
}

/* What is not a number passes. */
INLINE Mask passes(Lanes lanes)
{
    Mask mask = 0;
    for (int i = 0; i < LANES; i++)
        mask |= (Mask)(!(lanes.at[i] <= 0)) << i;
    return mask;
}

INLINE Lanes choose(Mask mask, Lanes set, Lanes clear)
{
    for (int i = 0; i < LANES; i++)
        clear.at[i] = mask >> i & 1 ? set.at[i] : clear.at[i];
    return clear;
}

INLINE Lanes masked(Mask mask, Lanes lanes)
{
    for (int i = 0; i < LANES; i++)
        lanes.at[i] = mask >> i & 1 ? lanes.at[i] : 0;
    return lanes;
}

INLINE Lanes sum(Lanes a, Lanes b)
{
    for (int i = 0; i < LANES; i++)
        a.at[i] += b.at[i];
    return a;
}

#endif

typedef struct {
    const float *maps, *gain, *shift;
    Strides in, to;
    uint8_t *codes, *signs;
    float *out;
    int rectify;
} Pool;

INLINE void pool_unit(const Windows *windows, const Unit *unit, const Pool *pool, int height, int width, int bits,
                      int with_affine)
{
    for (int64_t row = unit->row; row < unit->row + unit->rows; row++)
        for (int64_t column = 0; column < windows->width; column++) {
            const int64_t output = row * windows->width + column;
            const float *corner = pool->maps + row * windows->stride_height * pool->in.row +
                                  column * windows->stride_width * pool->in.column;
            float *target = pool->out + row * pool->to.row + column * pool->to.column;
            for (int64_t p = 0; p < unit->count; p += LANES) {
                const int some = (int)smaller(LANES, unit->count - p);
                const int64_t plane = unit->first + p;
                const float *source = corner + plane * pool->in.plane;
                Lanes gain = {0}, shift = {0}, best = load(source, pool->in.plane, some);
                if (with_affine) {
                    gain = load(pool->gain + plane, 1, some);
                    shift = load(pool->shift + plane, 1, some);
                    best = affine(best, gain, shift);
                }
                Mask code[8] = {0};
                for (int number = 1; number < height * width; number++) {
                    const int64_t place = number / width * pool->in.row + number % width * pool->in.column;
                    Lanes candidate = load(source + place, pool->in.plane, some);
                    if (with_affine)
                        candidate = affine(candidate, gain, shift);
                    const Mask larger = is_larger(candidate, best);
                    best = choose(larger | is_no_number(candidate), candidate, best);
                    for (int bit = 0; bit < bits; bit++)
                        code[bit] = number >> bit & 1 ? code[bit] | larger : code[bit] & ~larger;
                }
                for (int bit = 0; bit < bits; bit++)
                    store_bits(pool->codes, bit_of(windows, unit, bits, bit, output) + p, some,
                               code[bit] & ((1u << some) - 1), unit->full);
                if (pool->rectify) {
                    const Mask positive = passes(best);
                    if (pool->signs)
                        store_bits(pool->signs, bit_of(windows, unit, 1, 0, output) + p, some,
                                   positive & ((1u << some) - 1), unit->full);
                    best = masked(positive, best);
                }
                store(best, target + plane * pool->to.plane, pool->to.plane, some);
            }
        }
}

/* The last tile is not full: its bits are put to zeros. */
INLINE void clear_last(const Windows *windows, int64_t bits, uint8_t *bytes)
{
    const int64_t outputs = windows->height * windows->width, rest = windows->planes % windows->tile;
    if (bytes && rest)
        memset(bytes + (windows->planes - rest) * bits * outputs / 8, 0, (rest * bits * outputs + 7) / 8);
}

/* The maxima of windows of maps, which are times `gain` plus `shift` (planes,) where these are given, and negative ones
   zero where they are to be rectified. `bits` is 0, or how many a code takes: where in its window each maximum stands,
   the first of equals. `signs` (where given): one bit an output, whether a gradient passes its ReLU. */
void pool_across(const Windows *windows, const float *maps, const Strides *in, const float *gain, const float *shift,
                 int64_t rectify, float *out, const Strides *to, uint8_t *codes, uint8_t *signs, int64_t threads)
{
    const Pool pool = {maps, gain, shift, *in, *to, codes, signs, out, (int)rectify};
    const int height = (int)windows->kernel_height, width = (int)windows->kernel_width, bits = (int)windows->bits;
    /* Bytes between two outputs are written by one thread. */
    const int by_row = windows->planes % windows->tile == 0;
    clear_last(windows, bits, codes);
    clear_last(windows, 1, signs);
    PARALLEL_FOR(windows->planes * windows->height * windows->width)
    for (int64_t number = 0; number < units_of(windows, by_row); number++) {
        const Unit unit = unit_of(windows, by_row, number);
        if (height == 2 && width == 2 && bits == 2) {
            if (gain)
                pool_unit(windows, &unit, &pool, 2, 2, 2, 1);
            else
                pool_unit(windows, &unit, &pool, 2, 2, 2, 0);
        } else if (height * width == 1 && bits == 0 && gain) {
            pool_unit(windows, &unit, &pool, 1, 1, 0, 1);
        } else {
            pool_unit(windows, &unit, &pool, height, width, bits, gain != 0);
        }
    }
}

typedef struct {
    const float *grad;
    Strides in, to;
    const uint8_t *codes, *signs;
    float *out;
    int apart;
} Spread;

INLINE void spread_unit(const Windows *windows, const Unit *unit, const Spread *spread, int height, int width, int bits)
{
    /* Backwards, so that an element of several windows adds them up in the order of its place in them. */
    for (int64_t row = unit->row + unit->rows - 1; row >= unit->row; row--)
        for (int64_t column = windows->width - 1; column >= 0; column--) {
            const int64_t output = row * windows->width + column;
            const float *source = spread->grad + row * spread->in.row + column * spread->in.column;
            float *corner = spread->out + row * windows->stride_height * spread->to.row +
                            column * windows->stride_width * spread->to.column;
            for (int64_t p = 0; p < unit->count; p += LANES) {
                const int some = (int)smaller(LANES, unit->count - p);
                const int64_t plane = unit->first + p;
                Lanes grad = load(source + plane * spread->in.plane, spread->in.plane, some);
                if (spread->signs)
                    grad = masked((Mask)load_bits(spread->signs, bit_of(windows, unit, 1, 0, output) + p, some), grad);
                Mask code[8] = {0};
                for (int bit = 0; bit < bits; bit++)
                    code[bit] = (Mask)load_bits(spread->codes, bit_of(windows, unit, bits, bit, output) + p, some);
                for (int number = 0; number < height * width; number++) {
                    Mask here = 0xffff;
                    for (int bit = 0; bit < bits; bit++)
                        here &= number >> bit & 1 ? code[bit] : ~code[bit];
                    float *target =
                        corner + number / width * spread->to.row + number % width * spread->to.column + plane;
                    const Lanes part = masked(here, grad);
                    store(spread->apart ? part : sum(load(target, 1, some), part), target, 1, some);
                }
            }
        }
}

/* The adjoint of pool_across without gain: gradients go to where the maxima stood. What no window writes is left; where
   windows are not `apart`, gradients are added to what is there. */
void spread_across(const Windows *windows, const float *grad, const Strides *in, const uint8_t *codes,
                   const uint8_t *signs, int64_t apart, float *out, const Strides *to, int64_t threads)
{
    const Spread spread = {grad, *in, *to, codes, signs, out, (int)apart};
    const int height = (int)windows->kernel_height, width = (int)windows->kernel_width, bits = (int)windows->bits;
    PARALLEL_FOR(windows->planes * windows->height * windows->width)
    for (int64_t number = 0; number < units_of(windows, (int)apart); number++) {
        const Unit unit = unit_of(windows, (int)apart, number);
        if (height == 2 && width == 2 && bits == 2 && apart)
            spread_unit(windows, &unit, &spread, 2, 2, 2);
        else if (height * width == 1 && bits == 0)
            spread_unit(windows, &unit, &spread, 1, 1, 0);
        else
            spread_unit(windows, &unit, &spread, height, width, bits);
    }
}
