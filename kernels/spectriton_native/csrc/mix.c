/* Products of small complex matrices at every frequency: spectra of taps, mixing of channels, and their gradients.

   A complex matrix stands as pairs. Rows of a product are made from a panel of the right factor, some columns of it, that
   stays in the cache: a number of the left factor times a vector of the panel is added to a vector of the result. */

#include "pairs.h"

/* A vector is one of the processor's: GCC keeps larger ones in memory. */
#if WIDE
#define BYTES 64
#elif defined(__AVX__)
#include <immintrin.h>
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float vector __attribute__((vector_size(BYTES)));
typedef int32_t integers __attribute__((vector_size(BYTES)));

/* Pairs of a vector, vectors of a row of a panel, and rows of a panel. */
#define PAIRS (BYTES / 8)
#define VECTORS 2
#define TERMS 128

/* Rows of a product, and of a sum, that are made at once: with their vectors, as many as there are registers for. */
#if WIDE
#define ROWS 8
#define SUMS 4
#else
#define ROWS 4
#define SUMS 2
#endif

/* Up to how many channels the functions take less time than MKL: at batch 128, 1.1 to 5 times less from 1 to 256 channels,
   as much with 512 (AVX-512 on a Zen 4). Without AVX-512 they take less with few channels, with 32 up to 2.5 times more. */
#if WIDE
#define MOST_CHANNELS 256
#else
#define MOST_CHANNELS 8
#endif

INLINE vector add_product(vector sum, vector a, vector b)
{
#if WIDE
    return (vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
    return (vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

INLINE vector all_of(float number)
{
#if WIDE
    return (vector)_mm512_set1_ps(number);
#elif defined(__AVX__)
    return (vector)_mm256_set1_ps(number);
#else
    return (vector){number, number, number, number};
#endif
}

INLINE vector all_of_pair(const float *pair)
{
#if WIDE || defined(__AVX__)
    double both;
    memcpy(&both, pair, sizeof both);
#endif
#if WIDE
    return (vector)_mm512_set1_pd(both);
#elif defined(__AVX__)
    return (vector)_mm256_set1_pd(both);
#else
    return (vector){pair[0], pair[1], pair[0], pair[1]};
#endif
}

/* Real and imaginary parts in each other's place. */
INLINE vector swap(vector x)
{
#if WIDE
    return (vector)_mm512_permute_ps((__m512)x, 0xb1);
#elif defined(__AVX__)
    return (vector)_mm256_permute_ps((__m256)x, 0xb1);
#else
    return (vector){x[1], x[0], x[3], x[2]};
#endif
}

/* Real or, with `imaginary`, imaginary parts with the opposite sign. */
INLINE vector negate(vector x, const int imaginary)
{
    integers signs;
    for (int k = 0; k < 2 * PAIRS; k++)
        signs[k] = k % 2 == imaginary ? INT32_MIN : 0;
    return (vector)((integers)x ^ signs);
}

/* Real parts of one, imaginary parts of another. */
INLINE vector real_and_imaginary(vector real, vector imaginary)
{
    integers chosen;
    for (int k = 0; k < 2 * PAIRS; k++)
        chosen[k] = -(k % 2);
    return (vector)(((integers)imaginary & chosen) | ((integers)real & ~chosen));
}

/* The first of a vector's pairs, zero for the others. */
INLINE vector load(const float *source, int64_t pairs)
{
#if WIDE
    return (vector)_mm512_castpd_ps(_mm512_maskz_loadu_pd((1u << pairs) - 1, source));
#else
    vector x = {0};
    if (pairs == PAIRS) {
        memcpy(&x, source, sizeof x);
        return x;
    }
    for (int64_t k = 0; k < pairs; k++)
        memcpy((float *)&x + 2 * k, source + 2 * k, 2 * sizeof(float));
    return x;
#endif
}

INLINE void store(vector x, float *target, int64_t pairs)
{
#if WIDE
    _mm512_mask_storeu_pd(target, (1u << pairs) - 1, _mm512_castps_pd((__m512)x));
#else
    if (pairs == PAIRS)
        memcpy(target, &x, sizeof x);
    else
        for (int64_t k = 0; k < pairs; k++)
            memcpy(target + 2 * k, (float *)&x + 2 * k, 2 * sizeof(float));
#endif
}

/* How many of a row's pairs are in its vector v. */
INLINE int64_t pairs_of(int64_t pairs, const int v, const int vectors)
{
    return v < vectors - 1 ? PAIRS : pairs - (vectors - 1) * PAIRS;
}

/* Some rows of a product, of left factors that are numbers or, with `paired`, pairs; `add` adds them to what is there.
   What says how many rows and vectors is a constant. */
INLINE void some_rows(const float *x, int64_t pitch, int64_t terms, const vector *panel, float *out, int64_t out_pitch,
                      int64_t pairs, int add, const int paired, const int rows, const int vectors)
{
    vector sums[ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sums[r][v] = (vector){0};
    for (int64_t k = 0; k < terms; k++) {
        for (int r = 0; r < rows; r++) {
            const float *factor = x + r * pitch + (paired ? 2 * k : k);
            const vector factors = paired ? all_of_pair(factor) : all_of(*factor);
            for (int v = 0; v < vectors; v++)
                sums[r][v] = add_product(sums[r][v], factors, panel[k * vectors + v]);
        }
    }
    for (int r = 0; r < rows; r++) {
        for (int v = 0; v < vectors; v++) {
            float *target = out + r * out_pitch + v * 2 * PAIRS;
            const int64_t some = pairs_of(pairs, v, vectors);
            store(add ? load(target, some) + sums[r][v] : sums[r][v], target, some);
        }
    }
}

INLINE void all_rows(const float *x, int64_t pitch, int64_t rows, int64_t terms, const vector *panel, float *out,
                     int64_t out_pitch, int64_t pairs, int add, const int paired, const int vectors)
{
    for (; rows >= ROWS; rows -= ROWS, x += ROWS * pitch, out += ROWS * out_pitch)
        some_rows(x, pitch, terms, panel, out, out_pitch, pairs, add, paired, ROWS, vectors);
    for (; rows >= 2; rows -= 2, x += 2 * pitch, out += 2 * out_pitch)
        some_rows(x, pitch, terms, panel, out, out_pitch, pairs, add, paired, 2, vectors);
    if (rows)
        some_rows(x, pitch, terms, panel, out, out_pitch, pairs, add, paired, 1, vectors);
}

/* `out` (rows, pairs) from the left factor `x` (rows, terms) and a panel of so many pairs. */
INLINE void multiply(const float *x, int64_t pitch, int64_t rows, int64_t terms, const vector *panel, float *out,
                     int64_t out_pitch, int64_t pairs, int add, const int paired)
{
    if (pairs <= PAIRS)
        all_rows(x, pitch, rows, terms, panel, out, out_pitch, pairs, add, paired, 1);
    else
        all_rows(x, pitch, rows, terms, panel, out, out_pitch, pairs, add, paired, VECTORS);
}

INLINE int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* A panel for left factors in pairs, as real numbers: the rows of a complex matrix, conjugated if asked, each followed by
   itself times i. Its element (k, n) stands `k * pitch + n * apart` floats on. */
INLINE void fill_panel(const float *matrix, int64_t pitch, int64_t apart, int64_t terms, int64_t pairs, int conjugated,
                       vector *panel)
{
    const int vectors = pairs <= PAIRS ? 1 : VECTORS;
    for (int64_t k = 0; k < terms; k++) {
        for (int v = 0; v < vectors; v++) {
            vector *target = panel + 2 * k * vectors + v;
            const float *source = matrix + k * pitch + v * PAIRS * apart;
            const int64_t some = pairs_of(pairs, v, vectors);
            if (apart == 2) {
                *target = load(source, some);
                continue;
            }
            *target = (vector){0};
            for (int64_t n = 0; n < some; n++)
                memcpy((float *)target + 2 * n, source + n * apart, 2 * sizeof(float));
        }
    }
    for (int64_t k = 0; k < terms; k++) {
        for (int v = 0; v < vectors; v++) {
            vector *target = panel + 2 * k * vectors + v;
            if (conjugated)
                *target = negate(*target, 1);
            target[vectors] = negate(swap(*target), 0);
        }
    }
}

/* out[f, b, g, n] = sum over k of x[f, b, g, k] w[f, g, k, n] or, with `transposed`, of conj(w[f, g, n, k]); `add` adds it
   to what is there. Frequencies are `x_pitch`, `w_pitch` and `out_pitch` floats apart. */
void mix(const float *x, int64_t x_pitch, const float *w, int64_t w_pitch, int64_t frequencies, int64_t batch,
         int64_t groups, int64_t terms, int64_t columns, int64_t transposed, int64_t add, float *out, int64_t out_pitch,
         int64_t threads)
{
    const int64_t pitch = transposed ? 2 : 2 * columns, apart = transposed ? 2 * terms : 2;
    PARALLEL_FOR(frequencies * groups * batch * (terms + columns))
    for (int64_t i = 0; i < frequencies * groups; i++) {
        const int64_t f = i / groups, g = i % groups;
        const float *left = x + f * x_pitch + g * terms * 2, *right = w + f * w_pitch + g * terms * columns * 2;
        float *target = out + f * out_pitch + g * columns * 2;
        vector panel[TERMS * VECTORS];
        for (int64_t n = 0; n < columns; n += PAIRS * VECTORS) {
            const int64_t pairs = least(columns - n, PAIRS * VECTORS);
            for (int64_t k = 0; k < terms; k += TERMS / 2) {
                const int64_t some = least(terms - k, TERMS / 2);
                fill_panel(right + k * pitch + n * apart, pitch, apart, some, pairs, transposed, panel);
                multiply(left + 2 * k, groups * terms * 2, batch, 2 * some, panel, target + 2 * n, groups * columns * 2,
                         pairs, add || k, 0);
            }
        }
    }
}

/* out[f, n] = sum over t of basis[f, t] taps[t, n], of real taps. */
void kernel_spectrum(const float *taps, const float *basis, int64_t frequencies, int64_t terms, int64_t columns,
                     float *out, int64_t threads)
{
    const int64_t panels = (columns + PAIRS * VECTORS - 1) / (PAIRS * VECTORS), rows = 64;
    const int64_t blocks = (frequencies + rows - 1) / rows;
    PARALLEL_FOR(frequencies * columns * terms)
    for (int64_t i = 0; i < blocks * panels; i++) {
        const int64_t f = i / panels * rows, n = i % panels * PAIRS * VECTORS;
        const int64_t pairs = least(columns - n, PAIRS * VECTORS);
        const int vectors = pairs <= PAIRS ? 1 : VECTORS;
        vector panel[TERMS * VECTORS];
        for (int64_t t = 0; t < terms; t += TERMS) {
            const int64_t some = least(terms - t, TERMS);
            memset(panel, 0, some * vectors * sizeof(vector));
            for (int64_t k = 0; k < some; k++) {
                const float *source = taps + (t + k) * columns + n;
                float *target = (float *)(panel + k * vectors);
                for (int64_t j = 0; j < pairs; j++)
                    target[2 * j] = target[2 * j + 1] = source[j];
            }
            multiply(basis + (f * terms + t) * 2, 2 * terms, least(frequencies - f, rows), some, panel,
                     out + (f * columns + n) * 2, 2 * columns, pairs, t > 0, 1);
        }
    }
}

/* Adds conj(x) y for some numbers of x and pairs of y, as the sums of neighbours in `same` and their differences in
   `crossed`, which `real` leaves out. */
INLINE void add_products(const float *x, const float *y, int64_t pairs, vector *same, vector *crossed, const int real,
                         const int rows, const int vectors)
{
    vector z[VECTORS];
    for (int v = 0; v < vectors; v++)
        z[v] = load(y + v * 2 * PAIRS, pairs_of(pairs, v, vectors));
    for (int r = 0; r < rows; r++) {
        const vector factors = all_of_pair(x + 2 * r);
        for (int v = 0; v < vectors; v++) {
            const int sum = r * vectors + v;
            same[sum] = add_product(same[sum], factors, z[v]);
            if (!real)
                crossed[sum] = add_product(crossed[sum], factors, swap(z[v]));
        }
    }
}

/* Some rows of x^H y, sums over the rows of both: complex ones are written, with `real` the real parts added to `out`. */
INLINE void some_sums(const float *x, int64_t x_pitch, const float *y, int64_t y_pitch, int64_t count, float *out,
                      int64_t out_pitch, int64_t pairs, const int real, const int rows, const int vectors)
{
    /* Few sums would wait for one another: several take turns. */
    const int turns = SUMS * VECTORS / (rows * vectors);
    vector same[SUMS * VECTORS], crossed[SUMS * VECTORS];
    for (int k = 0; k < SUMS * VECTORS; k++)
        same[k] = crossed[k] = (vector){0};
    int64_t k = 0;
    for (; k + turns <= count; k += turns)
        for (int turn = 0; turn < turns; turn++)
            add_products(x + (k + turn) * x_pitch, y + (k + turn) * y_pitch, pairs, same + turn * rows * vectors,
                         crossed + turn * rows * vectors, real, rows, vectors);
    for (; k < count; k++)
        add_products(x + k * x_pitch, y + k * y_pitch, pairs, same, crossed, real, rows, vectors);
    for (int sum = rows * vectors; sum < SUMS * VECTORS; sum++) {
        same[sum % (rows * vectors)] += same[sum];
        crossed[sum % (rows * vectors)] += crossed[sum];
    }
    for (int r = 0; r < rows; r++) {
        for (int v = 0; v < vectors; v++) {
            const int64_t some = pairs_of(pairs, v, vectors);
            const vector re = same[r * vectors + v] + swap(same[r * vectors + v]);
            if (real) {
                for (int64_t k = 0; k < some; k++)
                    out[r * out_pitch + v * PAIRS + k] += re[2 * k];
                continue;
            }
            const vector im = swap(crossed[r * vectors + v]) - crossed[r * vectors + v];
            store(real_and_imaginary(re, im), out + r * out_pitch + v * 2 * PAIRS, some);
        }
    }
}

INLINE void sums(const float *x, int64_t x_pitch, const float *y, int64_t y_pitch, int64_t count, float *out,
                 int64_t out_pitch, int64_t rows, int64_t pairs, const int real)
{
    const int vectors = pairs <= PAIRS ? 1 : VECTORS;
    for (int64_t r = 0, some; r < rows; r += some, x += 2 * some, out += some * out_pitch) {
        some = rows - r >= SUMS ? SUMS : rows - r >= 2 ? 2 : 1;
        if (some == SUMS && vectors == 1)
            some_sums(x, x_pitch, y, y_pitch, count, out, out_pitch, pairs, real, SUMS, 1);
        else if (some == SUMS)
            some_sums(x, x_pitch, y, y_pitch, count, out, out_pitch, pairs, real, SUMS, VECTORS);
        else if (some == 2 && vectors == 1)
            some_sums(x, x_pitch, y, y_pitch, count, out, out_pitch, pairs, real, 2, 1);
        else if (some == 2)
            some_sums(x, x_pitch, y, y_pitch, count, out, out_pitch, pairs, real, 2, VECTORS);
        else if (vectors == 1)
            some_sums(x, x_pitch, y, y_pitch, count, out, out_pitch, pairs, real, 1, 1);
        else
            some_sums(x, x_pitch, y, y_pitch, count, out, out_pitch, pairs, real, 1, VECTORS);
    }
}

/* out[f, g, i, o] = sum over b of conj(x[f, b, g, i]) y[f, b, g, o]. */
void mix_grad_weights(const float *x, int64_t x_pitch, const float *y, int64_t y_pitch, int64_t frequencies,
                      int64_t batch, int64_t groups, int64_t inputs, int64_t outputs, float *out, int64_t threads)
{
    PARALLEL_FOR(frequencies * groups * batch * (inputs + outputs))
    for (int64_t i = 0; i < frequencies * groups; i++) {
        const int64_t f = i / groups, g = i % groups;
        const float *left = x + f * x_pitch + g * inputs * 2, *right = y + f * y_pitch + g * outputs * 2;
        float *target = out + i * inputs * outputs * 2;
        for (int64_t n = 0; n < outputs; n += PAIRS * VECTORS)
            sums(left, groups * inputs * 2, right + 2 * n, groups * outputs * 2, batch, target + 2 * n, 2 * outputs,
                 inputs, least(outputs - n, PAIRS * VECTORS), 0);
    }
}

/* Adds sum over f of Re(conj(basis[f, t]) grad[f, n]) to taps[t, n], whose rows are `pitch` floats apart. */
void kernel_spectrum_adjoint(const float *grad, const float *basis, int64_t frequencies, int64_t terms, int64_t columns,
                             float *taps, int64_t pitch, int64_t threads)
{
    const int64_t panels = (columns + PAIRS * VECTORS - 1) / (PAIRS * VECTORS), blocks = (terms + SUMS - 1) / SUMS;
    PARALLEL_FOR(frequencies * columns * terms)
    for (int64_t i = 0; i < blocks * panels; i++) {
        const int64_t n = i / blocks * PAIRS * VECTORS, t = i % blocks * SUMS;
        sums(basis + 2 * t, 2 * terms, grad + 2 * n, 2 * columns, frequencies, taps + t * pitch + n, pitch,
             least(terms - t, SUMS), least(columns - n, PAIRS * VECTORS), 1);
    }
}

int64_t most_channels(int64_t threads)
{
    (void)threads;
    return MOST_CHANNELS;
}
