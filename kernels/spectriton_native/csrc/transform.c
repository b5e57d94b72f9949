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

/* A matrix (rows, terms) within a larger one: every `step`-th of its columns, `pitch` floats from one row to the next. */
typedef struct {
    const float *data;
    int64_t pitch, step;
} Matrix;

/* Some rows of a product: out[k * step] = sum over i of matrix[k, i] x[i * step of the matrix]. */
INLINE void some_rows(Matrix matrix, const lanes *x, int64_t terms, lanes *out, int64_t step, const int rows)
{
    lanes sums[8]; /* of the size of the rows it would be memory */
    for (int k = 0; k < rows; k++)
        sums[k] = (lanes){{{0}, {0}}};
    for (int64_t i = 0; i < terms; i++) {
        const lanes term = x[i * matrix.step];
        for (int k = 0; k < rows; k++)
            sums[k] = add_product(sums[k], matrix.data[k * matrix.pitch + i * matrix.step], term);
    }
    for (int k = 0; k < rows; k++)
        out[k * step] = sums[k];
}

/* out (rows,), `step` apart, = matrix (rows, terms) times x (terms,), as far apart as the columns of the matrix. */
INLINE void product(Matrix matrix, const lanes *x, int64_t terms, lanes *out, int64_t step, int64_t rows)
{
    for (; rows >= 8; rows -= 8, matrix.data += 8 * matrix.pitch, out += 8 * step)
        some_rows(matrix, x, terms, out, step, 8);
    if (rows & 4) {
        some_rows(matrix, x, terms, out, step, 4);
        matrix.data += 4 * matrix.pitch;
        out += 4 * step;
    }
    if (rows & 2) {
        some_rows(matrix, x, terms, out, step, 2);
        matrix.data += 2 * matrix.pitch;
        out += 2 * step;
    }
    if (rows & 1)
        some_rows(matrix, x, terms, out, step, 1);
}

/* Sums over half a side n with its turns (k, i), i = 0 ... n / 2: out[k] = sum over i of turns[k, i] x[i].

   On a side of even length i and n / 2 - i have the same cosine where k is even, the opposite one where it is odd, and
   sines the other way round: so half of the products will do. `sine` is a constant. */
INLINE void sums_of_half(const float *turns, int64_t n, const lanes *x, lanes *out, int64_t count, const int sine)
{
    const int64_t half = n / 2 + 1, middle = n / 4;
    if (n % 2) {
        product((Matrix){turns + sine, half, 1}, x + sine, half - sine, out, 1, count);
        return;
    }
    lanes same[HALF / 2 + 1], opposite[HALF / 2 + 1];
    for (int64_t i = sine; i <= middle; i++) {
        if (4 * i == n) {
            same[i] = x[i];
        } else if (sine && i == 0) {
            continue;
        } else {
            same[i] = add(x[i], x[n / 2 - i]);
            opposite[i] = subtract(x[i], x[n / 2 - i]);
        }
    }
    const int64_t terms_same = middle + 1 - sine, terms_opposite = (n % 4 ? middle + 1 : middle) - sine;
    const lanes *of_even = sine ? opposite : same, *of_odd = sine ? same : opposite;
    const int64_t terms_even = sine ? terms_opposite : terms_same, terms_odd = sine ? terms_same : terms_opposite;
    product((Matrix){turns + sine, 2 * half, 1}, of_even + sine, terms_even, out, 2, (count + 1) / 2);
    product((Matrix){turns + half + sine, 2 * half, 1}, of_odd + sine, terms_odd, out + 1, 2, count / 2);
}

/* The adjoint, with turns (i, k): out[i] = sum over k of turns[i, k] x[k], i = 0 ... n / 2. */
INLINE void spread_to_half(const float *turns, int64_t n, const lanes *x, int64_t count, lanes *out, const int sine)
{
    const int64_t half = n / 2 + 1, middle = n / 4;
    if (n % 2) {
        product((Matrix){turns, count, 1}, x, count, out, 1, half);
        return;
    }
    lanes of_even[HALF / 2 + 1], of_odd[HALF / 2 + 1];
    product((Matrix){turns, count, 2}, x, (count + 1) / 2, of_even, 1, middle + 1);
    product((Matrix){turns + 1, count, 2}, x + 1, count / 2, of_odd, 1, middle + 1);
    for (int64_t i = 0; i <= middle; i++) {
        out[n / 2 - i] = sine ? subtract(of_odd[i], of_even[i]) : subtract(of_even[i], of_odd[i]);
        out[i] = add(of_even[i], of_odd[i]);
    }
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
    lanes line[SIDE], even[HALF], odd[HALF], lines[SIDE][2][HALF];
    for (int64_t h = 0; h < height; h++) {
        for (int64_t w = 0; w < width; w++)
            line[w] = load(maps + (h * width + w) * planes, some, whole);
        fold(line, width, even, odd);
        sums_of_half(by->cos_x, width, even, lines[h][0], columns, 0);
        sums_of_half(by->sin_x, width, odd, lines[h][1], columns, 1);
    }
    for (int64_t x = 0; x < columns; x++) {
        lanes from_even[2][HALF], from_odd[2][HALF];
        for (int part = 0; part < 2; part++) {
            for (int64_t h = 0; h < height; h++)
                line[h] = lines[h][part][x];
            fold(line, height, even, odd);
            sums_of_half(by->cos_y, height, even, from_even[part], bands, 0);
            sums_of_half(by->sin_y, height, odd, from_odd[part], bands, 1);
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
        spread_to_half(by->cos_y, height, sums[0], bands, a, 0);
        spread_to_half(by->sin_y, height, differences[1], bands, b, 1);
        for (int64_t h = 0; h < half_y; h++) {
            lines[h][0][x] = subtract(a[h], b[h]);
            if (has_mirror(h, height))
                lines[height - h][0][x] = add(a[h], b[h]);
        }
        spread_to_half(by->cos_y, height, sums[1], bands, a, 0);
        spread_to_half(by->sin_y, height, differences[0], bands, b, 1);
        for (int64_t h = 0; h < half_y; h++) {
            lines[h][1][x] = add(a[h], b[h]);
            if (has_mirror(h, height))
                lines[height - h][1][x] = subtract(a[h], b[h]);
        }
    }
    for (int64_t h = 0; h < height; h++) {
        lanes a[HALF], b[HALF];
        spread_to_half(by->cos_x, width, lines[h][0], columns, a, 0);
        spread_to_half(by->sin_x, width, lines[h][1], columns, b, 1);
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
