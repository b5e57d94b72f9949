/* Blocks of planes: what is done to a value is done to that of 32 planes. */

#ifndef SPECTRITON_LANES_H
#define SPECTRITON_LANES_H

#include "pairs.h"

/* Planes of a block: two vectors of 16, so that a coefficient is read once for both. */
#define LANES 32

typedef float vector __attribute__((vector_size(64)));
typedef struct { vector v[2]; } lanes;

/* One bit a plane. */
typedef uint32_t Mask;

INLINE lanes add(lanes a, lanes b)
{
    return (lanes){{a.v[0] + b.v[0], a.v[1] + b.v[1]}};
}

INLINE lanes subtract(lanes a, lanes b)
{
    return (lanes){{a.v[0] - b.v[0], a.v[1] - b.v[1]}};
}

INLINE lanes no_lanes(void)
{
    return (lanes){{{0}, {0}}};
}

INLINE lanes times(float factor, lanes x)
{
    return (lanes){{factor * x.v[0], factor * x.v[1]}};
}

/* The first of `some` planes, zero beyond. */
INLINE lanes load(const float *source, int64_t some)
{
    lanes x = no_lanes();
    memcpy(&x, source, some * sizeof(float));
    return x;
}

#if WIDE

INLINE lanes add_product(lanes sum, float factor, lanes x)
{
    const __m512 factors = _mm512_set1_ps(factor);
    return (lanes){{(vector)_mm512_fmadd_ps(factors, (__m512)x.v[0], (__m512)sum.v[0]),
                    (vector)_mm512_fmadd_ps(factors, (__m512)x.v[1], (__m512)sum.v[1])}};
}

INLINE lanes affine(lanes x, lanes gain, lanes shift)
{
    return (lanes){{(vector)_mm512_fmadd_ps((__m512)x.v[0], (__m512)gain.v[0], (__m512)shift.v[0]),
                    (vector)_mm512_fmadd_ps((__m512)x.v[1], (__m512)gain.v[1], (__m512)shift.v[1])}};
}

#define COMPARE(a, b, how) \
    ((Mask)_mm512_cmp_ps_mask((__m512)(a).v[0], (__m512)(b).v[0], how) | \
     (Mask)_mm512_cmp_ps_mask((__m512)(a).v[1], (__m512)(b).v[1], how) << 16)

INLINE Mask is_larger(lanes a, lanes b)
{
    return COMPARE(a, b, _CMP_GT_OQ);
}

INLINE Mask is_no_number(lanes x)
{
    return COMPARE(x, x, _CMP_UNORD_Q);
}

/* Whether a gradient passes the ReLU; what is not a number does. */
INLINE Mask passes(lanes x)
{
    return COMPARE(x, no_lanes(), _CMP_NLE_UQ);
}

INLINE lanes choose(Mask mask, lanes set, lanes clear)
{
    return (lanes){{(vector)_mm512_mask_mov_ps((__m512)clear.v[0], (__mmask16)mask, (__m512)set.v[0]),
                    (vector)_mm512_mask_mov_ps((__m512)clear.v[1], (__mmask16)(mask >> 16), (__m512)set.v[1])}};
}

/* Sixteen rows of sixteen values to columns. */
INLINE void transpose(__m512 *x)
{
    __m512 y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            const __m512d a = _mm512_castps_pd(y[i + k]), b = _mm512_castps_pd(y[i + k + 2]);
            x[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    /* Quarter q of x[4 g + c] is column 4 q + c of the rows from 4 g on. */
    for (int c = 0; c < 4; c++) {
        const __m512 a = _mm512_shuffle_f32x4(x[c], x[4 + c], 0x44), b = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0x44);
        const __m512 d = _mm512_shuffle_f32x4(x[c], x[4 + c], 0xee), e = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0xee);
        y[c] = _mm512_shuffle_f32x4(a, b, 0x88);
        y[4 + c] = _mm512_shuffle_f32x4(a, b, 0xdd);
        y[8 + c] = _mm512_shuffle_f32x4(d, e, 0x88);
        y[12 + c] = _mm512_shuffle_f32x4(d, e, 0xdd);
    }
    for (int i = 0; i < 16; i++)
        x[i] = y[i];
}

INLINE __mmask16 first_of(int64_t some)
{
    return some >= 16 ? 0xffff : (__mmask16)((1u << (some < 0 ? 0 : some)) - 1);
}

#else

INLINE lanes add_product(lanes sum, float factor, lanes x)
{
    return add(sum, times(factor, x));
}

INLINE lanes affine(lanes x, lanes gain, lanes shift)
{
    return (lanes){{x.v[0] * gain.v[0] + shift.v[0], x.v[1] * gain.v[1] + shift.v[1]}};
}

INLINE Mask is_larger(lanes a, lanes b)
{
    Mask mask = 0;
    for (int i = 0; i < LANES; i++)
        mask |= (Mask)(a.v[i / 16][i % 16] > b.v[i / 16][i % 16]) << i;
    return mask;
}

INLINE Mask is_no_number(lanes x)
{
    Mask mask = 0;
    for (int i = 0; i < LANES; i++)
        mask |= (Mask)(x.v[i / 16][i % 16] != x.v[i / 16][i % 16]) << i;
    return mask;
}

/* Whether a gradient passes the ReLU; what is not a number does. */
INLINE Mask passes(lanes x)
{
    Mask mask = 0;
    for (int i = 0; i < LANES; i++)
        mask |= (Mask)(!(x.v[i / 16][i % 16] <= 0)) << i;
    return mask;
}

INLINE lanes choose(Mask mask, lanes set, lanes clear)
{
    for (int i = 0; i < LANES; i++)
        clear.v[i / 16][i % 16] = mask >> i & 1 ? set.v[i / 16][i % 16] : clear.v[i / 16][i % 16];
    return clear;
}

#endif

INLINE lanes masked(Mask mask, lanes x)
{
    return choose(mask, x, no_lanes());
}

/* Maps (n, height, width) in memory, and how far apart planes, rows and columns are. */
typedef struct {
    float *at;
    int64_t height, width, plane, row, column;
} Maps;

INLINE void load_line(const float *source, int64_t plane, int64_t column, int64_t some, int64_t count, lanes *line)
{
    if (plane == 1) {
        for (int64_t i = 0; i < count; i++)
            line[i] = some == LANES ? load(source + i * column, LANES) : load(source + i * column, some);
        return;
    }
#if WIDE
    if (column == 1) {
        for (int64_t i = 0; i < count; i += 16)
            for (int half = 0; half < 2; half++) {
                __m512 x[16];
                const __mmask16 there = first_of(count - i);
                for (int k = 0; k < 16; k++)
                    x[k] = _mm512_maskz_loadu_ps(16 * half + k < some ? there : 0, source + (16 * half + k) * plane + i);
                transpose(x);
                for (int64_t k = 0; k < 16; k++)
                    if (i + k < count)
                        line[i + k].v[half] = (vector)x[k];
            }
        return;
    }
#endif
    for (int64_t i = 0; i < count; i++) {
        float numbers[LANES] = {0};
        for (int64_t k = 0; k < some; k++)
            numbers[k] = source[k * plane + i * column];
        line[i] = load(numbers, LANES);
    }
}

INLINE void store_line(const lanes *line, float *target, int64_t plane, int64_t column, int64_t some, int64_t count)
{
    if (plane == 1) {
        for (int64_t i = 0; i < count; i++)
            memcpy(target + i * column, line + i, some * sizeof(float));
        return;
    }
#if WIDE
    if (column == 1) {
        for (int64_t i = 0; i < count; i += 16)
            for (int half = 0; half < 2; half++) {
                __m512 x[16];
                for (int64_t k = 0; k < 16; k++)
                    x[k] = i + k < count ? (__m512)line[i + k].v[half] : _mm512_setzero_ps();
                transpose(x);
                const __mmask16 there = first_of(count - i);
                for (int k = 0; k < 16; k++)
                    _mm512_mask_storeu_ps(target + (16 * half + k) * plane + i, 16 * half + k < some ? there : 0, x[k]);
            }
        return;
    }
#endif
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < some; k++)
            target[k * plane + i * column] = ((const float *)(line + i))[k];
}

/* The planes from p on, `some` of them, to (height, width) lanes; zero where there are none. Those of one line where rows
   follow one another. */
static void load_block(const Maps *maps, int64_t p, int64_t some, lanes *block)
{
    const int dense = maps->row == maps->width * maps->column;
    const int64_t rows = dense ? 1 : maps->height, count = dense ? maps->height * maps->width : maps->width;
    for (int64_t h = 0; h < rows; h++)
        load_line(maps->at + p * maps->plane + h * maps->row, maps->plane, maps->column, some, count, block + h * count);
}

static void store_block(const lanes *block, const Maps *maps, int64_t p, int64_t some)
{
    const int dense = maps->row == maps->width * maps->column;
    const int64_t rows = dense ? 1 : maps->height, count = dense ? maps->height * maps->width : maps->width;
    for (int64_t h = 0; h < rows; h++)
        store_line(block + h * count, maps->at + p * maps->plane + h * maps->row, maps->plane, maps->column, some, count);
}

#endif
