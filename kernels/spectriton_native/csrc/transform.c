/* Fourier transforms of small real maps whose planes stand innermost, (H, W, n), to the parts of their spectra.

   Parts are (ky, part, kx, n), real and imaginary part apart: kx = 0 ... columns - 1, ky = -(bands - 1) ... bands - 1 or,
   where -(bands - 1) would be bands - 1 again, 0 ... H - 1. Sums over a side are made of what is even and what is odd in it: cosines
   see one, sines the other, and frequencies k and -k share both, so a quarter of the products of a matrix will do.
   A block of planes goes through all of it in the cache. */

#include "pairs.h"

/* Vectors are handed from one inline function to another, never to foreign code. */
#pragma GCC diagnostic ignored "-Wpsabi"

/* Planes of a block: two vectors of 16, so that a coefficient is read once for both. */
#define LANES 32

typedef float vector __attribute__((vector_size(64)));
typedef struct { vector v[2]; } lanes;

/* The largest side; wherever a line is kept, there is room for so many. */
#define SIDE 64
#define HALF (SIDE / 2 + 1)

INLINE lanes add(lanes a, lanes b)
{
    return (lanes){{a.v[0] + b.v[0], a.v[1] + b.v[1]}};
}

INLINE lanes subtract(lanes a, lanes b)
{
    return (lanes){{a.v[0] - b.v[0], a.v[1] - b.v[1]}};
}

INLINE lanes add_product(lanes sum, float factor, lanes x)
{
#if WIDE
    const __m512 factors = _mm512_set1_ps(factor);
    return (lanes){{(vector)_mm512_fmadd_ps(factors, (__m512)x.v[0], (__m512)sum.v[0]),
                    (vector)_mm512_fmadd_ps(factors, (__m512)x.v[1], (__m512)sum.v[1])}};
#else
    return (lanes){{sum.v[0] + factor * x.v[0], sum.v[1] + factor * x.v[1]}};
#endif
}

INLINE lanes negative(lanes x)
{
    return (lanes){{-x.v[0], -x.v[1]}};
}

/* The planes of a block, as many as there are; `whole` is a constant. */
INLINE lanes load(const float *source, int64_t planes, const int whole)
{
    lanes x;
    if (whole) {
        memcpy(&x, source, sizeof x);
    } else {
        memset(&x, 0, sizeof x);
        memcpy(&x, source, planes * sizeof(float));
    }
    return x;
}

INLINE void store(lanes x, float *target, int64_t planes, const int whole)
{
    memcpy(target, &x, whole ? sizeof x : planes * sizeof(float));
}

/* Some rows of a product: out[k] = sum over i of matrix[k, i] x[i]. */
INLINE void some_rows(const float *matrix, int64_t pitch, const lanes *x, int64_t terms, lanes *out, const int rows)
{
    lanes sums[8]; /* of the size of the rows it would be memory */
    for (int k = 0; k < rows; k++)
        sums[k] = (lanes){{{0}, {0}}};
    for (int64_t i = 0; i < terms; i++) {
        const lanes term = x[i];
        for (int k = 0; k < rows; k++)
            sums[k] = add_product(sums[k], matrix[k * pitch + i], term);
    }
    for (int k = 0; k < rows; k++)
        out[k] = sums[k];
}

/* out (rows,) = matrix (rows, pitch), of which `terms` columns, times x (terms,). */
INLINE void product(const float *matrix, int64_t pitch, const lanes *x, int64_t terms, lanes *out, int64_t rows)
{
    int64_t k = 0;
    for (; k + 8 <= rows; k += 8)
        some_rows(matrix + k * pitch, pitch, x, terms, out + k, 8);
    if (rows - k >= 4) {
        some_rows(matrix + k * pitch, pitch, x, terms, out + k, 4);
        k += 4;
    }
    if (rows - k >= 2) {
        some_rows(matrix + k * pitch, pitch, x, terms, out + k, 2);
        k += 2;
    }
    if (rows - k)
        some_rows(matrix + k * pitch, pitch, x, terms, out + k, 1);
}

/* The sums x[i] + x[n - i] and the differences of a line; what is its own mirror stands in the sums alone. */
INLINE void fold(const lanes *x, int64_t n, lanes *even, lanes *odd)
{
    even[0] = x[0];
    for (int64_t i = 1; 2 * i <= n; i++) {
        if (2 * i == n)
            even[i] = x[i];
        else {
            even[i] = add(x[i], x[n - i]);
            odd[i] = subtract(x[i], x[n - i]);
        }
    }
}

/* Where the row of frequency k, or with `mirrored` of -k, stands. */
INLINE int64_t row_at(int64_t k, int mirrored, int64_t bands, int64_t height)
{
    if (2 * (bands - 1) < height)
        return mirrored ? bands - 1 - k : bands - 1 + k;
    return mirrored ? height - k : k;
}

/* Whether -k is another place on a side than k. */
INLINE int has_mirror(int64_t k, int64_t side)
{
    return k > 0 && 2 * k != side;
}

/* What a transform goes by. Turns of a side are cosines and sines (k, i) of its frequencies k and the positions i of its
   first half, in the adjoint (i, k). */
typedef struct {
    const float *cos_y, *sin_y, *cos_x, *sin_x;
    int64_t height, width, planes, bands, columns;
} Plan;

INLINE void parts_of_block(const Plan *by, const float *maps, float *parts, int64_t some, const int whole)
{
    const int64_t height = by->height, width = by->width, planes = by->planes, bands = by->bands, columns = by->columns;
    const int64_t half_y = height / 2 + 1, half_x = width / 2 + 1, odd_y = (height - 1) / 2, odd_x = (width - 1) / 2;
    lanes line[SIDE], even[HALF], odd[HALF], lines[SIDE][2][HALF];
    for (int64_t h = 0; h < height; h++) {
        for (int64_t w = 0; w < width; w++)
            line[w] = load(maps + (h * width + w) * planes, some, whole);
        fold(line, width, even, odd);
        product(by->cos_x, half_x, even, half_x, lines[h][0], columns);
        product(by->sin_x + 1, half_x, odd + 1, odd_x, lines[h][1], columns);
    }
    for (int64_t x = 0; x < columns; x++) {
        lanes from_even[2][HALF], from_odd[2][HALF];
        for (int part = 0; part < 2; part++) {
            for (int64_t h = 0; h < height; h++)
                line[h] = lines[h][part][x];
            fold(line, height, even, odd);
            product(by->cos_y, half_y, even, half_y, from_even[part], bands);
            product(by->sin_y + 1, half_y, odd + 1, odd_y, from_odd[part], bands);
        }
        /* A line was re - i im: real parts are sum c re - s im, imaginary ones -(sum c im + s re). */
        for (int64_t k = 0; k < bands; k++) {
            float *at = parts + (row_at(k, 0, bands, height) * 2 * columns + x) * planes;
            store(subtract(from_even[0][k], from_odd[1][k]), at, some, whole);
            store(negative(add(from_even[1][k], from_odd[0][k])), at + columns * planes, some, whole);
            if (has_mirror(k, height)) {
                at = parts + (row_at(k, 1, bands, height) * 2 * columns + x) * planes;
                store(add(from_even[0][k], from_odd[1][k]), at, some, whole);
                store(subtract(from_odd[0][k], from_even[1][k]), at + columns * planes, some, whole);
            }
        }
    }
}

INLINE void maps_of_block(const Plan *by, const float *parts, float *maps, int64_t some, const int whole)
{
    const int64_t height = by->height, width = by->width, planes = by->planes, bands = by->bands, columns = by->columns;
    const int64_t half_y = height / 2 + 1, half_x = width / 2 + 1;
    lanes lines[SIDE][2][HALF];
    for (int64_t x = 0; x < columns; x++) {
        lanes sums[2][HALF], differences[2][HALF], a[HALF], b[HALF];
        for (int64_t k = 0; k < bands; k++) {
            const float *at = parts + (row_at(k, 0, bands, height) * 2 * columns + x) * planes;
            for (int part = 0; part < 2; part++)
                sums[part][k] = differences[part][k] = load(at + part * columns * planes, some, whole);
            if (has_mirror(k, height)) {
                at = parts + (row_at(k, 1, bands, height) * 2 * columns + x) * planes;
                for (int part = 0; part < 2; part++) {
                    const lanes mirrored = load(at + part * columns * planes, some, whole);
                    sums[part][k] = add(sums[part][k], mirrored);
                    differences[part][k] = subtract(differences[part][k], mirrored);
                }
            }
        }
        product(by->cos_y, bands, sums[0], bands, a, half_y);
        product(by->sin_y, bands, differences[1], bands, b, half_y);
        for (int64_t h = 0; h < half_y; h++) {
            lines[h][0][x] = subtract(a[h], b[h]);
            if (has_mirror(h, height))
                lines[height - h][0][x] = add(a[h], b[h]);
        }
        product(by->cos_y, bands, sums[1], bands, a, half_y);
        product(by->sin_y, bands, differences[0], bands, b, half_y);
        for (int64_t h = 0; h < half_y; h++) {
            lines[h][1][x] = add(a[h], b[h]);
            if (has_mirror(h, height))
                lines[height - h][1][x] = subtract(a[h], b[h]);
        }
    }
    for (int64_t h = 0; h < height; h++) {
        lanes a[HALF], b[HALF];
        product(by->cos_x, columns, lines[h][0], columns, a, half_x);
        product(by->sin_x, columns, lines[h][1], columns, b, half_x);
        for (int64_t w = 0; w < half_x; w++) {
            store(subtract(a[w], b[w]), maps + (h * width + w) * planes, some, whole);
            if (has_mirror(w, width))
                store(add(a[w], b[w]), maps + (h * width + width - w) * planes, some, whole);
        }
    }
}

/* maps (H, W, n) to parts (rows, 2, columns, n). */
void parts_of_maps(const Plan *by, const float *maps, float *parts, int64_t threads)
{
    PARALLEL_FOR(by->planes * by->height * by->width)
    for (int64_t p = 0; p < by->planes; p += LANES)
        if (p + LANES <= by->planes)
            parts_of_block(by, maps + p, parts + p, LANES, 1);
        else
            parts_of_block(by, maps + p, parts + p, by->planes - p, 0);
}

/* The adjoint: parts to maps. */
void maps_of_parts(const Plan *by, const float *parts, float *maps, int64_t threads)
{
    PARALLEL_FOR(by->planes * by->height * by->width)
    for (int64_t p = 0; p < by->planes; p += LANES)
        if (p + LANES <= by->planes)
            maps_of_block(by, parts + p, maps + p, LANES, 1);
        else
            maps_of_block(by, parts + p, maps + p, by->planes - p, 0);
}
