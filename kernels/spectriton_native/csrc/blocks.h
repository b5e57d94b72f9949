/* Blocks of feature maps, sixteen side by side: one in each lane of a vector. What blocks.c and fit.c share. */

#ifndef SPECTRITON_BLOCKS_H
#define SPECTRITON_BLOCKS_H

#include "pairs.h"

#define LANES 16
#define EDGE 8 /* of a block, at most */

typedef float Lanes __attribute__((vector_size(64), may_alias));
typedef int32_t Words __attribute__((vector_size(64), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), may_alias));
typedef int8_t Bytes __attribute__((vector_size(16), may_alias));

#if WIDE
#define MULTIPLY_ADD(a, b, c) ((Lanes)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define ALL(number) ((Lanes)_mm512_set1_ps(number))
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#define ALL(number) ((number) - (Lanes){0})
#endif

enum map_format { MAP_FLOAT32 = 0, MAP_FLOAT16 = 1, MAP_BFLOAT16 = 2, MAP_FLOAT64 = 3 };

/* How maps are coded; and the maps, of which a plan knows nothing but their shape. */
typedef struct {
    const float *basis; /* (parts, part, part): the channels of each component; NULL for none */
    const uint8_t *bits; /* (components, edge_h * edge_w): of each number */
    const float *deviation; /* the same shape */
    const float *down, *across; /* DCT matrices (edge_h, edge_h) and (edge_w, edge_w), frequencies down */
    const float *levels; /* those of b bits from 2^b on */
    const float *compander; /* (9,) factors by bits */
    int64_t batch, channels, height, width;
    int64_t edge_h, edge_w, blocks_down, blocks_across;
    int64_t components, part; /* channels, those that fill up the last part included, and those of a part */
    int64_t record; /* bytes */
    float rate; /* of the compander */
    const float *mean, *factor; /* (channels,): what values are multiplied by, after the mean or before it */
    int64_t format;
    int64_t stride_b, stride_c, stride_y, stride_x; /* in elements */
} Coding;

INLINE int64_t parts_of(const Coding *c)
{
    return (c->components + c->part - 1) / c->part;
}

INLINE int64_t blocks_of(const Coding *c)
{
    return c->batch * c->blocks_down * c->blocks_across;
}

INLINE int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

INLINE int64_t aligned(int64_t bytes)
{
    return (bytes + 63) & ~(int64_t)63;
}

INLINE Coding of_maps(const Coding *plan, int64_t format, const float *mean, const float *factor, const int64_t *strides)
{
    Coding c = *plan;
    c.format = format;
    c.mean = mean;
    c.factor = factor;
    c.stride_b = strides[0];
    c.stride_c = strides[1];
    c.stride_y = strides[2];
    c.stride_x = strides[3];
    return c;
}

/* Does something from `at` on to `count` things at once. */
#define IN_STEPS(size, total, ...) \
    for (; at + (size) <= (total); at += (size)) { \
        enum { count = size }; \
        __VA_ARGS__; \
    }

/* To `total` of them: to eight at once, to what is left to four, two, one. */
#define IN_EIGHTS(total, ...) \
    { \
        int64_t at = 0; \
        IN_STEPS(8, total, __VA_ARGS__) \
        IN_STEPS(4, total, __VA_ARGS__) \
        IN_STEPS(2, total, __VA_ARGS__) \
        IN_STEPS(1, total, __VA_ARGS__) \
    }

/* -- DCT ----------------------------------------------------------------------------------------------------------- */

/* The two halves of a signal make the even and the odd frequencies, each half the products. */
INLINE void dct(Lanes *v, int step, int n, const float *matrix)
{
    Lanes sums[4], differences[4];
    for (int t = 0; t < n / 2; t++) {
        sums[t] = v[t * step] + v[(n - 1 - t) * step];
        differences[t] = v[t * step] - v[(n - 1 - t) * step];
    }
    const Lanes middle = v[n / 2 * step];
    for (int k = 0; k < n; k++) {
        const float *row = matrix + k * n;
        Lanes total = {0};
        if (n & 1 && !(k & 1))
            total = middle * row[n / 2];
        for (int t = 0; t < n / 2; t++)
            total = MULTIPLY_ADD(k & 1 ? differences[t] : sums[t], ALL(row[t]), total);
        v[k * step] = total;
    }
}

INLINE void dct_back(Lanes *v, int step, int n, const float *matrix)
{
    Lanes in[EDGE];
    for (int k = 0; k < n; k++)
        in[k] = v[k * step];
    for (int t = 0; t < (n + 1) / 2; t++) {
        Lanes even = in[0] * matrix[t], odd = {0};
        for (int k = 2; k < n; k += 2)
            even = MULTIPLY_ADD(in[k], ALL(matrix[k * n + t]), even);
        for (int k = 1; k < n; k += 2)
            odd = MULTIPLY_ADD(in[k], ALL(matrix[k * n + t]), odd);
        /* of the middle, which is its own mirror image, odd frequencies are nought */
        v[t * step] = even;
        if (n - 1 - t != t) {
            v[t * step] = even + odd;
            v[(n - 1 - t) * step] = even - odd;
        }
    }
}

/* `count` transforms of `n` values, a step apart, from places a distance apart. */
INLINE void dcts(Lanes *v, int count, int distance, int step, int n, const float *matrix, int back)
{
#define ONE_LENGTH(length) \
    case length: \
        for (int i = 0; i < count; i++) { \
            if (back) \
                dct_back(v + i * distance, step, length, matrix); \
            else \
                dct(v + i * distance, step, length, matrix); \
        } \
        break;
    switch (n) {
        ONE_LENGTH(2)
        ONE_LENGTH(3)
        ONE_LENGTH(4)
        ONE_LENGTH(5)
        ONE_LENGTH(6)
        ONE_LENGTH(7)
        ONE_LENGTH(8)
    default: break; /* of one value it is the value */
    }
#undef ONE_LENGTH
}

static inline void dct_of_blocks(Lanes *tile, const Coding *c)
{
    const int down = (int)c->edge_h, across = (int)c->edge_w;
    dcts(tile, down, across, 1, across, c->across, 0);
    dcts(tile, across, 1, across, down, c->down, 0);
}

static inline void blocks_of_dct(Lanes *tile, const Coding *c)
{
    const int down = (int)c->edge_h, across = (int)c->edge_w;
    dcts(tile, across, 1, across, down, c->down, 1);
    dcts(tile, down, across, 1, across, c->across, 1);
}

/* -- maps ---------------------------------------------------------------------------------------------------------- */

/* Sixteen blocks and where they stand in the maps. Beyond the last block the last is repeated, beyond the edge of a map
   its last row and column. */
typedef struct {
    int64_t first, count;
    int64_t rows[EDGE][LANES]; /* of each row, from the start of the channel */
    int32_t rows_within[LANES], columns_within[LANES];
    int whole; /* whether all of a row is within the map, for all blocks */
} Tile;

static inline void place(const Coding *c, int64_t first, Tile *tile)
{
    tile->first = first;
    tile->count = smaller(LANES, blocks_of(c) - first);
    tile->whole = c->stride_x == 1 && c->edge_w >= 4 && c->width % c->edge_w == 0;
    for (int64_t l = 0; l < LANES; l++) {
        const int64_t block = first + smaller(l, tile->count - 1), line = block / c->blocks_across;
        const int64_t y = line % c->blocks_down * c->edge_h, x = block % c->blocks_across * c->edge_w;
        const int64_t origin = line / c->blocks_down * c->stride_b + x * c->stride_x;
        tile->rows_within[l] = (int32_t)smaller(c->edge_h, c->height - y);
        tile->columns_within[l] = (int32_t)smaller(c->edge_w, c->width - x);
        for (int64_t i = 0; i < c->edge_h; i++)
            tile->rows[i][l] = origin + (y + smaller(i, tile->rows_within[l] - 1)) * c->stride_y;
    }
}

INLINE float read_map(const void *maps, int64_t at, int format)
{
    if (format == MAP_FLOAT32)
        return ((const float *)maps)[at];
    if (format == MAP_FLOAT16)
        return float_of_half(((const uint16_t *)maps)[at]);
    if (format == MAP_BFLOAT16)
        return from_bits((uint32_t)((const uint16_t *)maps)[at] << 16);
    return (float)((const double *)maps)[at];
}
#if WIDE
/* Four rows of four in each quarter, transposed. */
INLINE void transpose_quarters(__m512 *v)
{
    const __m512 a = _mm512_unpacklo_ps(v[0], v[1]), b = _mm512_unpackhi_ps(v[0], v[1]);
    const __m512 c = _mm512_unpacklo_ps(v[2], v[3]), d = _mm512_unpackhi_ps(v[2], v[3]);
    v[0] = _mm512_shuffle_ps(a, c, 0x44);
    v[1] = _mm512_shuffle_ps(a, c, 0xee);
    v[2] = _mm512_shuffle_ps(b, d, 0x44);
    v[3] = _mm512_shuffle_ps(b, d, 0xee);
}

/* Four neighbours of each block, from column x on, to four vectors. */
INLINE void load_four(const float *maps, const int64_t *rows, int64_t x, Lanes *out)
{
    __m512 v[4];
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_castps128_ps512(_mm_loadu_ps(maps + rows[i] + x));
        v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps(maps + rows[4 + i] + x), 1);
        v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps(maps + rows[8 + i] + x), 2);
        v[i] = _mm512_insertf32x4(v[i], _mm_loadu_ps(maps + rows[12 + i] + x), 3);
    }
    transpose_quarters(v);
    for (int i = 0; i < 4; i++)
        out[x + i] = (Lanes)v[i];
}
#endif

INLINE void load_as(const void *maps, int64_t channel, const Coding *c, const Tile *tile, Lanes *out, int format)
{
    for (int64_t y = 0; y < c->edge_h; y++) {
        float *row = (float *)(out + y * c->edge_w);
        for (int64_t l = 0; l < LANES; l++)
            for (int64_t x = 0; x < c->edge_w; x++) {
                const int64_t within = smaller(x, tile->columns_within[l] - 1);
                row[x * LANES + l] = read_map(maps, channel + tile->rows[y][l] + within * c->stride_x, format);
            }
    }
}

/* The blocks of a channel that begins at `channel`. */
static inline void load(const void *maps, int64_t channel, const Coding *c, const Tile *tile, Lanes *out)
{
#if WIDE
    if (c->format == MAP_FLOAT32 && tile->whole) {
        const float *own = (const float *)maps + channel;
        for (int64_t y = 0; y < c->edge_h; y++) {
            load_four(own, tile->rows[y], 0, out + y * c->edge_w);
            if (c->edge_w > 4)
                load_four(own, tile->rows[y], c->edge_w - 4, out + y * c->edge_w);
        }
        return;
    }
#endif
    if (c->format == MAP_FLOAT32)
        load_as(maps, channel, c, tile, out, MAP_FLOAT32);
    else if (c->format == MAP_FLOAT16)
        load_as(maps, channel, c, tile, out, MAP_FLOAT16);
    else if (c->format == MAP_BFLOAT16)
        load_as(maps, channel, c, tile, out, MAP_BFLOAT16);
    else
        load_as(maps, channel, c, tile, out, MAP_FLOAT64);
}

#endif
