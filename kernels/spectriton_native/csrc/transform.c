/* Packed coefficients to small real maps and back, by Fourier transforms of a block of planes in the cache. Planes stand
   innermost in memory, (H, W, n).

   On the way there are the parts of a block's spectra, (ky, part, kx), real and imaginary part apart: kx = 0 ... columns - 1, ky = -(bands - 1) ... bands - 1 or,
   where -(bands - 1) would be bands - 1 again, 0 ... H - 1. Sums over a side are made of what is even and what is odd in it: cosines
   see one, sines the other, and frequencies k and -k share both, so a quarter of the products of a matrix will do.
   A block of planes goes through all of it in the cache. */

#include "pairs.h"

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

/* The planes of a block, as many as there are; `whole`, a constant, says that it is full. */
INLINE lanes load(const float *source, int64_t planes, const int whole)
{
    lanes x = {{{0}, {0}}};
    memcpy(&x, source, whole ? sizeof x : planes * sizeof(float));
    return x;
}

INLINE void store(lanes x, float *target, int64_t planes, const int whole)
{
    memcpy(target, &x, whole ? sizeof x : planes * sizeof(float));
}

/* Some rows of a product: out[k * apart] = sum over i of matrix[k * pitch + i * step] x[i * step]. All but the matrix and
   its size are constants. */
INLINE void some_rows(const float *matrix, int64_t pitch, const lanes *x, int64_t terms, lanes *out, const int step,
                      const int apart, const int rows)
{
    lanes sums[8]; /* of the size of the rows it would be memory */
    for (int k = 0; k < rows; k++)
        sums[k] = (lanes){{{0}, {0}}};
    for (int64_t i = 0; i < terms * step; i += step) {
        const lanes term = x[i];
        for (int k = 0; k < rows; k++)
            sums[k] = add_product(sums[k], matrix[k * pitch + i], term);
    }
    for (int k = 0; k < rows; k++)
        out[k * apart] = sums[k];
}

INLINE void product(const float *matrix, int64_t pitch, const lanes *x, int64_t terms, lanes *out, int64_t rows,
                    const int step, const int apart)
{
    for (; rows >= 8; rows -= 8, matrix += 8 * pitch, out += 8 * apart)
        some_rows(matrix, pitch, x, terms, out, step, apart, 8);
    if (rows & 4) {
        some_rows(matrix, pitch, x, terms, out, step, apart, 4);
        matrix += 4 * pitch;
        out += 4 * apart;
    }
    if (rows & 2) {
        some_rows(matrix, pitch, x, terms, out, step, apart, 2);
        matrix += 2 * pitch;
        out += 2 * apart;
    }
    if (rows & 1)
        some_rows(matrix, pitch, x, terms, out, step, apart, 1);
}

/* They stand in many places: inlined, they would take a compiler minutes. */
#define OUTLINE static __attribute__((noinline)) void

/* out (rows,) = matrix (rows, terms), `pitch` floats a row, times x (terms,). */
OUTLINE product_of_all(const float *matrix, int64_t pitch, const lanes *x, int64_t terms, lanes *out, int64_t rows)
{
    product(matrix, pitch, x, terms, out, rows, 1, 1);
}

/* Every second of `out`. */
OUTLINE product_to_half(const float *matrix, int64_t pitch, const lanes *x, int64_t terms, lanes *out, int64_t rows)
{
    product(matrix, pitch, x, terms, out, rows, 1, 2);
}

/* Of every second column and term. */
OUTLINE product_of_half(const float *matrix, int64_t pitch, const lanes *x, int64_t terms, lanes *out, int64_t rows)
{
    product(matrix, pitch, x, terms, out, rows, 2, 1);
}

/* Sums over half a side n with its turns (k, i), i = 0 ... n / 2: out[k] = sum over i of turns[k, i] x[i].

   On a side of even length i and n / 2 - i have the same cosine where k is even, the opposite one where it is odd, and
   sines the other way round: so half of the products will do. `sine` is a constant. */
INLINE void sums_of_half(const float *turns, int64_t n, const lanes *x, lanes *out, int64_t count, const int sine)
{
    const int64_t half = n / 2 + 1, middle = n / 4;
    if (n % 2) {
        product_of_all(turns + sine, half, x + sine, half - sine, out, count);
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
    product_to_half(turns + sine, 2 * half, of_even + sine, terms_even, out, (count + 1) / 2);
    product_to_half(turns + half + sine, 2 * half, of_odd + sine, terms_odd, out + 1, count / 2);
}

/* The adjoint, with turns (i, k): out[i] = sum over k of turns[i, k] x[k], i = 0 ... n / 2. */
INLINE void spread_to_half(const float *turns, int64_t n, const lanes *x, int64_t count, lanes *out, const int sine)
{
    const int64_t half = n / 2 + 1, middle = n / 4;
    if (n % 2) {
        product_of_all(turns, count, x, count, out, half);
        return;
    }
    lanes of_even[HALF / 2 + 1], of_odd[HALF / 2 + 1];
    product_of_half(turns, count, x, (count + 1) / 2, of_even, middle + 1);
    product_of_half(turns + 1, count, x + 1, count / 2, of_odd, middle + 1);
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

/* Parts of a block: as many rows as frequencies along the height, of 2 * columns. */
#define PARTS (SIDE * 2 * HALF)

INLINE int64_t part_at(const Plan *by, int64_t k, int mirrored, int64_t x)
{
    return row_at(k, mirrored, by->bands, by->height) * 2 * by->columns + x;
}

INLINE int64_t parts_of(const Plan *by)
{
    const int64_t rows = 2 * (by->bands - 1) < by->height ? 2 * by->bands - 1 : by->height;
    return rows * 2 * by->columns;
}

INLINE void parts_of_block(const Plan *by, const float *maps, lanes *parts, int64_t some, const int whole)
{
    const int64_t height = by->height, width = by->width, planes = by->planes, bands = by->bands, columns = by->columns;
    const lanes zero = {{{0}, {0}}};
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
            lanes *at = parts + part_at(by, k, 0, x);
            at[0] = subtract(from_even[0][k], from_odd[1][k]);
            /* Of zeros that is zero, not minus zero. */
            at[columns] = subtract(subtract(zero, from_even[1][k]), from_odd[0][k]);
            if (has_mirror(k, height)) {
                at = parts + part_at(by, k, 1, x);
                at[0] = add(from_even[0][k], from_odd[1][k]);
                at[columns] = subtract(from_odd[0][k], from_even[1][k]);
            }
        }
    }
}

/* The adjoint. */
INLINE void maps_of_block(const Plan *by, const lanes *parts, float *maps, int64_t some, const int whole)
{
    const int64_t height = by->height, width = by->width, planes = by->planes, bands = by->bands, columns = by->columns;
    const int64_t half_y = height / 2 + 1, half_x = width / 2 + 1;
    lanes lines[SIDE][2][HALF];
    for (int64_t x = 0; x < columns; x++) {
        lanes sums[2][HALF], differences[2][HALF], a[HALF], b[HALF];
        for (int64_t k = 0; k < bands; k++) {
            const lanes *at = parts + part_at(by, k, 0, x), *mirrored = parts + part_at(by, k, 1, x);
            for (int part = 0; part < 2; part++, at += columns, mirrored += columns) {
                sums[part][k] = differences[part][k] = *at;
                if (has_mirror(k, height)) {
                    sums[part][k] = add(*at, *mirrored);
                    differences[part][k] = subtract(*at, *mirrored);
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

static void parts_of_planes(const Plan *by, const float *maps, int64_t p, lanes *parts)
{
    if (p + LANES <= by->planes)
        parts_of_block(by, maps + p, parts, LANES, 1);
    else
        parts_of_block(by, maps + p, parts, by->planes - p, 0);
}

static void maps_of_planes(const Plan *by, const lanes *parts, int64_t p, float *maps)
{
    if (p + LANES <= by->planes)
        maps_of_block(by, parts, maps + p, LANES, 1);
    else
        maps_of_block(by, parts, maps + p, by->planes - p, 0);
}

/* What a row keeps of a block of planes that begins at plane p of the part: its bits, and where the first value stands.
   Returns whether it is not all there. */
INLINE int kept_of_block(const Part *part, int64_t i, int64_t p, const uint8_t **bits, int64_t *start)
{
    const int64_t tile = part->tile_bytes * 8, t = part->t0 + p / tile, first = p % tile / 8;
    const uint8_t *bitmap = bitmap_of(part, i, t);
    *bits = bitmap + first;
    const int64_t count = count_bits(*bits, LANES / 8);
    if (count == 0) {
        *bits = 0;
        return 0;
    }
    *start = part->offsets[tile_of(part, i, t)] - part->base + count_bits(bitmap, first);
    if (*start < 0 || *start + count > part->limit) {
        *bits = 0;
        return 1;
    }
    return 0;
}

/* Eight stored pairs, times `scale` and `factor`, real and imaginary parts apart. */
INLINE void expand_apart(const uint8_t *source, uint8_t bits, int format, float scale, float factor, float *real,
                         float *imaginary)
{
#if WIDE
    const __m512 pairs = _mm512_mul_ps(expand_scaled(source, bits, format, scale), _mm512_set1_ps(factor));
    const __m512i order = _mm512_set_epi32(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512 apart = _mm512_permutexvar_ps(order, pairs);
    _mm256_storeu_ps(real, _mm512_castps512_ps256(apart));
    _mm256_storeu_ps(imaginary, _mm512_extractf32x8_ps(apart, 1));
#else
    float pairs[16];
    expand(source, bits, format, scale, pairs);
    for (int k = 0; k < 8; k++) {
        real[k] = pairs[2 * k] * factor;
        imaginary[k] = pairs[2 * k + 1] * factor;
    }
#endif
}

/* Writes those of eight pairs whose bits are set, times `factor`; returns how many. */
INLINE int compress_apart(const float *real, const float *imaginary, float factor, uint8_t bits, float *out)
{
#if WIDE
    const __m512i order = _mm512_set_epi32(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
    const __m512 apart = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(real)), _mm256_loadu_ps(imaginary), 1);
    return compress_wide(_mm512_mul_ps(_mm512_permutexvar_ps(order, apart), _mm512_set1_ps(factor)), bits, out);
#else
    float pairs[16];
    for (int k = 0; k < 8; k++) {
        pairs[2 * k] = real[k] * factor;
        pairs[2 * k + 1] = imaginary[k] * factor;
    }
    return compress(pairs, bits, out);
#endif
}

INLINE int unpack_maps_as(const Part *part, const Plan *by, const uint8_t *values, const float *scales,
                          const int64_t *places, const float *factors, float *maps, int threads, int format)
{
    int missing = 0;
    PARALLEL_FOR(by->planes * by->height * by->width)
    for (int64_t p = 0; p < by->planes; p += LANES) {
        lanes parts[PARTS];
        memset(parts, 0, parts_of(by) * sizeof(lanes));
        for (int64_t i = 0; i < part->row_count; i++) {
            const uint8_t *bits;
            int64_t start, row = row_of(part, i);
            if (kept_of_block(part, i, p, &bits, &start))
                missing = 1;
            if (!bits)
                continue;
            const int64_t t = part->t0 + p / (part->tile_bytes * 8);
            const float scale = format >= INT8 ? scales[row * part->tiles + t] : 1;
            const uint8_t *source = values + start * stored_bytes(format);
            float *real = (float *)(parts + places[row]), *imaginary = (float *)(parts + places[row] + by->columns);
            for (int j = 0; j < LANES / 8; j++, real += 8, imaginary += 8) {
                expand_apart(source, bits[j], format, scale, factors[row], real, imaginary);
                source += __builtin_popcount(bits[j]) * stored_bytes(format);
            }
        }
        maps_of_planes(by, parts, p, maps);
    }
    return missing;
}

/* Maps (H, W, n) of the planes from tile t0 on: the coefficient of frequency f, times `factors` (F,), is the part at
   `places` and, for its imaginary part, `columns` on. */
int unpack_maps(const Part *part, const Plan *by, const uint8_t *values, int64_t format, const float *scales,
                const int64_t *places, const float *factors, float *maps, int64_t threads)
{
    BY_FORMAT(unpack_maps_as, part, by, values, scales, places, factors, maps, threads)
}

/* The adjoint: writes pairs where the pattern keeps them. */
int gather_maps(const Part *part, const Plan *by, const float *maps, const int64_t *places, const float *factors,
                float *out, int64_t threads)
{
    int missing = 0;
    PARALLEL_FOR(by->planes * by->height * by->width)
    for (int64_t p = 0; p < by->planes; p += LANES) {
        lanes parts[PARTS];
        parts_of_planes(by, maps, p, parts);
        for (int64_t i = 0; i < part->row_count; i++) {
            const uint8_t *bits;
            int64_t start, row = row_of(part, i);
            if (kept_of_block(part, i, p, &bits, &start))
                missing = 1;
            if (!bits)
                continue;
            const float *real = (float *)(parts + places[row]), *imaginary = (float *)(parts + places[row] + by->columns);
            float *target = out + 2 * start;
            for (int j = 0; j < LANES / 8; j++)
                target += 2 * compress_apart(real + 8 * j, imaginary + 8 * j, factors[row], bits[j], target);
        }
    }
    return missing;
}

/* Pairs (frequencies, padded, 2) of the spectra of maps, zero where there is no plane. */
void rows_of_maps(const Plan *by, const float *maps, const int64_t *places, int64_t frequencies, int64_t padded,
                  float *out, int64_t threads)
{
    PARALLEL_FOR(by->planes * by->height * by->width)
    for (int64_t p = 0; p < by->planes; p += LANES) {
        lanes parts[PARTS];
        parts_of_planes(by, maps, p, parts);
        const int64_t last = p + LANES < by->planes ? p + LANES : by->planes;
        for (int64_t f = 0; f < frequencies; f++) {
            const float *real = (float *)(parts + places[f]), *imaginary = (float *)(parts + places[f] + by->columns);
            float *row = out + f * padded * 2;
            for (int64_t k = p; k < last; k++) {
                row[2 * k] = real[k - p];
                row[2 * k + 1] = imaginary[k - p];
            }
            if (last == by->planes)
                memset(row + 2 * last, 0, (padded - last) * 2 * sizeof(float));
        }
    }
}
