/* Statistics of feature maps and the bits that they give each number of a block, as spectriton.reference.block_codec
   describes it. Sums are taken over slices of the blocks whose number depends on the maps alone, so that results do not
   depend on the number of threads. */

#include "blocks.h"

#define SLICES 8 /* at most */
#define LONGEST 8 /* bits of a field, at most */

/* What classes of rows stand for. */
typedef struct {
    const float *edges; /* (15,) lower edges from class 1 on, log2 of the variance over the water level */
    const float *variance; /* (16,) likewise */
    const uint8_t *widths; /* (16,) bits */
    float headroom; /* of the last class */
    float nothing; /* logarithm of no variance */
} Classes;

INLINE float sum_of(Lanes v)
{
#if WIDE
    return _mm512_reduce_add_ps((__m512)v);
#else
    float sum = 0;
    for (int l = 0; l < LANES; l++)
        sum += v[l];
    return sum;
#endif
}

INLINE Lanes modulus_of(Lanes v)
{
    return (Lanes)((Words)v & 0x7fffffff);
}

INLINE float inverse_of(float scale)
{
    return scale == 0 ? 0 : 1 / scale;
}

INLINE int64_t slices_of(const Coding *c)
{
    const int64_t wanted = blocks_of(c) / (4 * LANES);
    return wanted < 1 ? 1 : smaller(wanted, SLICES);
}

/* Channels that there are in a part. */
INLINE int64_t channels_in(const Coding *c, int64_t part)
{
    return smaller(c->part, c->channels - part * c->part);
}

/* Channels from one frequency to the next: four at a time are multiplied, and one more keeps frequencies out of the same
   set of the cache. */
INLINE int64_t pitch_of(const Coding *c)
{
    return (c->part + 3) / 4 * 4 + 1;
}

/* What the functions work in. Of each slice: */
typedef struct {
    double *moduli; /* (slices, components) sums of the distances from the mean */
    float *products; /* (slices, components, part) sums of products of channels; of one part, without a basis */
    float *squares; /* (slices, components, frequencies) sums of squares of coefficients */
    float *size, *inverse; /* (components,) */
    float *basis; /* (components, part), components in the rows */
    float *logs; /* (components, frequencies) */
    uint8_t *threads; /* numbers of sixteen blocks, or matrices of a part, of each */
} Memory;

INLINE int64_t bytes_of_thread(const Coding *c)
{
    const int64_t numbers = c->edge_h * c->edge_w * pitch_of(c) * 64, matrices = aligned(2 * c->part * c->part * 4);
    return numbers > matrices ? numbers : matrices;
}

/* Returns the bytes. */
INLINE int64_t memory_in(const Coding *c, int64_t grouped, uint8_t *memory, int64_t threads, Memory *m)
{
    const int64_t slices = slices_of(c), row = grouped ? c->part : 1, rows = c->components * c->edge_h * c->edge_w;
    const int64_t sizes[] = {slices * c->components * 8, slices * c->components * row * 4, slices * rows * 4,
                             c->components * 4, c->components * 4, c->components * row * 4, rows * 4,
                             threads * bytes_of_thread(c)};
    void *places[8];
    int64_t used = 0;
    for (int i = 0; i < 8; i++) {
        places[i] = memory + used;
        used += aligned(sizes[i]);
    }
    *m = (Memory){places[0], places[1], places[2], places[3], places[4], places[5], places[6], places[7]};
    return used;
}

/* Bytes that fit_blocks takes. */
int64_t memory_of_fit(const Coding *c, int64_t grouped, int64_t threads)
{
    Memory m;
    static uint8_t none;
    return memory_in(c, grouped, &none, threads, &m);
}

/* -- sums over blocks ---------------------------------------------------------------------------------------------- */

/* Adds the distances of values from the means, each position of the maps once. */
static void add_moduli(const Coding *c, const void *maps, const Tile *tile, int64_t part, double *moduli)
{
    Lanes block[EDGE * EDGE];
    Words down, across, number;
    memcpy(&down, tile->rows_within, sizeof down);
    memcpy(&across, tile->columns_within, sizeof across);
    for (int l = 0; l < LANES; l++)
        number[l] = l;
    const Words there = number < (int32_t)tile->count;
    for (int64_t i = 0; i < channels_in(c, part); i++) {
        const int64_t channel = part * c->part + i;
        const Lanes mean = ALL(c->mean[channel]);
        load(maps, channel * c->stride_c, c, tile, block);
        Lanes sum = {0};
        for (int y = 0; y < c->edge_h; y++) {
            const Words rows = there & (y < down);
            for (int x = 0; x < c->edge_w; x++)
                sum += (Lanes)((Words)modulus_of(block[y * c->edge_w + x] - mean) & rows & (x < across));
        }
        moduli[channel] += sum_of(sum);
    }
}

/* Numbers (frequencies, pitch) of the channels of a part without mean and scale, transformed or not; zero beyond the
   last block. */
INLINE void standardise(const Coding *c, const void *maps, const Tile *tile, int64_t part, const float *inverse,
                        int transformed, Lanes *numbers)
{
    const int64_t positions = c->edge_h * c->edge_w, pitch = pitch_of(c);
    Lanes block[EDGE * EDGE];
    Words there;
    for (int l = 0; l < LANES; l++)
        there[l] = l < tile->count ? -1 : 0;
    for (int64_t i = 0; i < channels_in(c, part); i++) {
        const int64_t channel = part * c->part + i;
        const Lanes mean = ALL(c->mean[channel]), factor = ALL(inverse[channel]);
        load(maps, channel * c->stride_c, c, tile, block);
        for (int64_t m = 0; m < positions; m++)
            block[m] = (Lanes)((Words)((block[m] - mean) * factor) & there);
        if (transformed)
            dct_of_blocks(block, c);
        for (int64_t m = 0; m < positions; m++)
            numbers[m * pitch + i] = block[m];
    }
}

/* Adds the products of four channels with four others. */
INLINE void add_products_of_four(const Lanes *a, const Lanes *b, int64_t positions, int64_t pitch, int64_t part,
                                 int64_t rows, int64_t columns, float *products)
{
    Lanes sums[4][4];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
            sums[i][j] = (Lanes){0};
    for (int64_t m = 0; m < positions; m++, a += pitch, b += pitch)
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++)
                sums[i][j] = MULTIPLY_ADD(a[i], b[j], sums[i][j]);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++)
            products[i * part + j] += sum_of(sums[i][j]);
}

/* Adds products of all channels of a part: those above the diagonal, four by four, and the diagonal. */
static void add_products(const Coding *c, const Lanes *numbers, int64_t channels, float *products)
{
    const int64_t positions = c->edge_h * c->edge_w, pitch = pitch_of(c);
    for (int64_t i = 0; i < channels; i += 4)
        for (int64_t j = i; j < channels; j += 4)
            add_products_of_four(numbers + i, numbers + j, positions, pitch, c->part, smaller(4, channels - i),
                                 smaller(4, channels - j), products + i * c->part + j);
}

static void add_variances(const Coding *c, const Lanes *numbers, int64_t channels, float *products)
{
    const int64_t positions = c->edge_h * c->edge_w, pitch = pitch_of(c);
    for (int64_t i = 0; i < channels; i++) {
        Lanes sum = {0};
        for (int64_t m = 0; m < positions; m++)
            sum = MULTIPLY_ADD(numbers[m * pitch + i], numbers[m * pitch + i], sum);
        products[i] += sum_of(sum);
    }
}

/* Adds the squares of some components of one frequency. */
INLINE void add_some_squares(const Lanes *numbers, const float *basis, int64_t part, int64_t channels,
                             int64_t frequencies, float *squares, int count)
{
    Lanes sums[8];
    for (int j = 0; j < count; j++)
        sums[j] = (Lanes){0};
    for (int64_t i = 0; i < channels; i++)
        for (int j = 0; j < count; j++)
            sums[j] = MULTIPLY_ADD(numbers[i], ALL(basis[j * part + i]), sums[j]);
    for (int j = 0; j < count; j++)
        squares[j * frequencies] += sum_of(sums[j] * sums[j]);
}

static void add_squares(const Coding *c, const Lanes *numbers, const float *basis, int64_t channels, float *squares)
{
    const int64_t frequencies = c->edge_h * c->edge_w, pitch = pitch_of(c);
    for (int64_t m = 0; m < frequencies; m++) {
        const Lanes *own = numbers + m * pitch;
        if (!basis) {
            for (int64_t i = 0; i < channels; i++)
                squares[i * frequencies + m] += sum_of(own[i] * own[i]);
            continue;
        }
        IN_EIGHTS(c->part, add_some_squares(own, basis + at * c->part, c->part, channels, frequencies,
                                            squares + at * frequencies + m, count))
    }
}

/* Does something with every sixteen blocks of every part: `slice`, `part`, `tile` and `numbers` tell which, and where a
   thread may write. */
#define OVER_BLOCKS(...) \
    { \
        const int64_t tiles = (blocks_of(c) + LANES - 1) / LANES, slices = slices_of(c), tasks = slices * parts_of(c); \
        PARALLEL_FOR(c->batch * c->channels * c->height * c->width) \
        for (int64_t thread = 0; thread < threads; thread++) { \
            Lanes *numbers = (Lanes *)(m.threads + thread * bytes_of_thread(c)); \
            for (int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; task++) { \
                const int64_t slice = task % slices, part = task / slices; \
                for (int64_t t = tiles * slice / slices; t < tiles * (slice + 1) / slices; t++) { \
                    Tile tile; \
                    place(c, t * LANES, &tile); \
                    __VA_ARGS__; \
                } \
            } \
        } \
    }

/* Adds what the other slices have to that of the first. */
static void join_slices(float *sums, int64_t slices, int64_t count)
{
    for (int64_t s = 1; s < slices; s++)
        for (int64_t i = 0; i < count; i++)
            sums[i] += sums[s * count + i];
}

/* -- matrices of a group ------------------------------------------------------------------------------------------- */

INLINE float dot(const float *a, const float *b, int64_t n)
{
    float sums[LANES] = {0}, total = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++)
            sums[l] += a[i + l] * b[i + l];
    for (; i < n; i++)
        total += a[i] * b[i];
    for (int l = 0; l < LANES; l++)
        total += sums[l];
    return total;
}

INLINE void add_multiple(float *a, float factor, const float *b, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        a[i] += factor * b[i];
}

/* out = a b, all (n, n). */
static void multiply(const float *a, const float *b, int64_t n, float *out)
{
    memset(out, 0, n * n * sizeof(float));
    for (int64_t i = 0; i < n; i++)
        for (int64_t k = 0; k < n; k++)
            add_multiple(out + i * n, a[i * n + k], b + k * n, n);
}

/* a - (factor v.a) v */
INLINE void reflect(float *a, const float *v, float factor, int64_t n)
{
    add_multiple(a, -factor * dot(a, v, n), v, n);
}

/* Orthonormal rows `q` that span what the first, the first two, .. rows of `a` (n, n) span, by Householder reflections
   with the signs that LAPACK takes. `a` is overwritten. */
static void orthogonalise(float *a, int64_t n, float *q)
{
    memset(q, 0, n * n * sizeof(float));
    for (int64_t i = 0; i < n; i++)
        q[i * n + i] = 1;
    for (int64_t k = 0; k + 1 < n; k++) {
        float *v = a + k * n + k;
        const int64_t left = n - k;
        const float rest = dot(v + 1, v + 1, left - 1), first = v[0];
        if (rest == 0) {
            memset(v, 0, left * sizeof(float)); /* nothing to reflect */
            continue;
        }
        const float length = copysignf(sqrtf(first * first + rest), first);
        /* Scaled so that half of the outer product with itself is taken off twice. */
        const float scale = 1 / sqrtf(length * (first + length));
        v[0] = first + length;
        for (int64_t i = 0; i < left; i++)
            v[i] *= scale;
        for (int64_t j = k + 1; j < n; j++)
            reflect(a + j * n + k, v, 1, left);
    }
    for (int64_t k = n - 2; k >= 0; k--)
        for (int64_t j = k; j < n; j++)
            reflect(q + j * n + k, a + k * n + k, 1, n - k);
}

/* Principal components (n, n) int8 of a correlation matrix, in the columns: orthogonal iteration from the identity. */
static void components_of(float *correlation, int64_t n, int rounds, float *basis, float *other, int8_t *stored)
{
    for (int64_t i = 0; i < n; i++)
        correlation[i * n + i] += 1e-6f;
    memcpy(other, correlation, n * n * sizeof(float));
    for (int round = 0; round < rounds; round++) {
        if (round)
            multiply(basis, correlation, n, other);
        orthogonalise(other, n, basis);
    }
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) {
            const float number = rintf(127 * basis[j * n + i]);
            stored[i * n + j] = number == number ? (int8_t)number : 0;
        }
}

/* Stored components (n, n) as orthonormal rows: two rounds of Newton and Schulz; `memory` is (2, n, n). */
static void orthonormal(const int8_t *stored, int64_t n, float *rows, float *memory)
{
    float *product = memory, *next = memory + n * n;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++)
            rows[j * n + i] = (float)stored[i * n + j] / 127;
    for (int round = 0; round < 2; round++) {
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = i; j < n; j++)
                product[i * n + j] = product[j * n + i] = -0.5f * dot(rows + i * n, rows + j * n, n);
        for (int64_t i = 0; i < n; i++)
            product[i * n + i] += 1.5f;
        multiply(product, rows, n, next);
        memcpy(rows, next, n * n * sizeof(float));
    }
}

/* -- bits ---------------------------------------------------------------------------------------------------------- */

INLINE float log_of(float variance, const Classes *classes)
{
    const float log = log2f(variance);
    return fabsf(log) < INFINITY ? log : classes->nothing;
}

INLINE float within_a_byte(float log)
{
    return fminf(fmaxf(rintf(log), -100), 27);
}

/* Logarithms of the variance of each component and of each frequency, as they are stored. */
static void separate_logs(const float *variance, int64_t components, int64_t frequencies, const Classes *classes,
                          int8_t *spectrum)
{
    double by_frequency[EDGE * EDGE] = {0}, all = 0;
    for (int64_t k = 0; k < components; k++) {
        double own = 0;
        for (int64_t m = 0; m < frequencies; m++) {
            own += variance[k * frequencies + m];
            by_frequency[m] += variance[k * frequencies + m];
        }
        spectrum[k] = (int8_t)within_a_byte(log_of((float)(own / (double)frequencies), classes));
        all += own;
    }
    for (int64_t m = 0; m < frequencies; m++) {
        const float log = log2f((float)(by_frequency[m] / all) * (float)frequencies);
        spectrum[components + m] = (int8_t)within_a_byte(log != log || log == INFINITY ? 0 : log);
    }
}

static void join_logs(const int8_t *spectrum, int64_t components, int64_t frequencies, float *logs)
{
    for (int64_t k = 0; k < components; k++)
        for (int64_t m = 0; m < frequencies; m++)
            logs[k * frequencies + m] = (float)(spectrum[k] + spectrum[components + m]);
}

/* Order of floats as that of whole numbers, and back. */
INLINE int32_t ordered(int32_t bits)
{
    return bits ^ (bits >> 31 & 0x7fffffff);
}

/* The lowest level at which the fields of all rows have at most so many bits: bisection between all floats. */
static float water_level(const float *logs, int64_t rows, int64_t bits, const Classes *classes)
{
    float first[LONGEST], highest = -INFINITY;
    for (int k = 1, width = 0; k < 16; k++)
        if (classes->widths[k] > width)
            first[width++] = classes->edges[k - 1];
    for (int64_t i = 0; i < rows; i++)
        highest = logs[i] > highest ? logs[i] : highest;
    float level = highest - classes->headroom;
    if (bits < rows * LONGEST) {
        int64_t low = ordered((int32_t)to_bits(-INFINITY)), high = ordered((int32_t)to_bits(highest));
        while (low < high) {
            const int64_t middle = (low + high) >> 1;
            const float tried = from_bits((uint32_t)ordered((int32_t)middle));
            int64_t above = 0;
            for (int width = 0; width < LONGEST; width++) {
                int32_t own = 0;
                for (int64_t i = 0; i < rows; i++)
                    own += logs[i] - first[width] > tried;
                above += own;
            }
            if (above > bits)
                low = middle + 1;
            else
                high = middle;
        }
        level = fmaxf(level, from_bits((uint32_t)ordered((int32_t)low)));
    }
    return fmaxf(level, classes->nothing / 2);
}

/* The class of each row; 0 where the fields would not fit a record of so many bits. */
static void classify(const float *logs, int64_t rows, float level, int64_t bits, const Classes *classes, uint8_t *out)
{
    int64_t end = 0;
    for (int64_t i = 0; i < rows; i++) {
        const float log = logs[i] - level;
        int class = 0;
        for (int k = 0; k < 15; k++)
            class += classes->edges[k] < log;
        end += classes->widths[class];
        out[i] = (uint8_t)(end <= bits ? class : 0);
    }
}

/* -- both ---------------------------------------------------------------------------------------------------------- */

/* Scales (2 channels + 1), basis (components, part) where there are groups, and spectrum of maps.

   `plan` tells their geometry and the length of a record, `mean` is that of each channel. `memory` is as much as
   memory_of_fit says. */
void fit_blocks(const Coding *plan, const Classes *classes, int64_t grouped, int64_t separable, int64_t rounds,
                const void *maps, int64_t format, int64_t stride_b, int64_t stride_c, int64_t stride_y,
                int64_t stride_x, const float *mean, uint8_t *memory, float *scales, int8_t *basis, uint8_t *spectrum,
                int64_t threads)
{
    Coding own = of_maps(plan, format, mean, 0, (int64_t[]){stride_b, stride_c, stride_y, stride_x});
    const Coding *c = &own;
    const int64_t frequencies = c->edge_h * c->edge_w, rows = c->components * frequencies, slices = slices_of(c);
    const int64_t row = grouped ? c->part : 1, values = c->batch * c->height * c->width;
    const float blocks = (float)blocks_of(c);
    float *means = scales, *scale = scales + c->channels;
    Memory m;
    memory_in(c, grouped, memory, threads, &m);
    memset(memory, 0, m.threads - memory);

    OVER_BLOCKS(add_moduli(c, maps, &tile, part, m.moduli + slice * c->components); (void)numbers)
    for (int64_t k = 0; k < c->channels; k++) {
        double sum = 0;
        for (int64_t s = 0; s < slices; s++)
            sum += m.moduli[s * c->components + k];
        const float size = (float)(sum / (double)values);
        /* What rounding leaves of a constant is none. */
        m.size[k] = size <= 1e-6f * fabsf(mean[k]) ? 0 : size;
        m.inverse[k] = inverse_of(m.size[k]);
    }

    OVER_BLOCKS(float *products = m.products + (slice * c->components + part * c->part) * row;
                standardise(c, maps, &tile, part, m.inverse, 0, numbers);
                if (grouped)
                    add_products(c, numbers, channels_in(c, part), products);
                else
                    add_variances(c, numbers, channels_in(c, part), products))
    join_slices(m.products, slices, c->components * row);

    for (int64_t k = 0; k < c->channels; k++) {
        const float variance = m.products[k * row + (grouped ? k % c->part : 0)] / ((float)frequencies * blocks);
        const float deviation = sqrtf(variance);
        scale[k] = m.size[k] * deviation;
        m.size[k] = inverse_of(deviation);
        m.inverse[k] = inverse_of(scale[k]);
    }
    /* One value that is not a number leaves nothing of its group. */
    for (int64_t k = 0; k < c->channels; k += row) {
        const int64_t end = smaller(k + row, c->channels);
        float sum = 0;
        for (int64_t i = k; i < end; i++)
            sum += mean[i] + scale[i];
        for (int64_t i = k; i < end; i++)
            means[i] = mean[i] + 0 * sum;
    }

    if (grouped) {
        const int64_t n = c->part, groups = parts_of(c);
        PARALLEL_FOR(groups * n * n * n)
        for (int64_t thread = 0; thread < threads; thread++)
            for (int64_t g = groups * thread / threads; g < groups * (thread + 1) / threads; g++) {
                float *correlation = (float *)(m.threads + thread * bytes_of_thread(c)), *other = correlation + n * n;
                float *of_group = m.basis + g * n * n;
                const float *products = m.products + g * n * n, *deviations = m.size + g * n;
                for (int64_t i = 0; i < n; i++)
                    for (int64_t j = i; j < n; j++) {
                        const float covariance = products[i * n + j] / ((float)frequencies * blocks);
                        correlation[i * n + j] = correlation[j * n + i] = covariance * deviations[i] * deviations[j];
                    }
                components_of(correlation, n, (int)rounds, of_group, other, basis + g * n * n);
                orthonormal(basis + g * n * n, n, of_group, correlation);
            }
    }

    own.mean = means;
    OVER_BLOCKS(standardise(c, maps, &tile, part, m.inverse, 1, numbers);
                add_squares(c, numbers, grouped ? m.basis + part * c->part * c->part : 0, channels_in(c, part),
                            m.squares + (slice * c->components + part * c->part) * frequencies))
    join_slices(m.squares, slices, rows);

    for (int64_t i = 0; i < rows; i++)
        m.squares[i] /= blocks;
    if (separable) {
        separate_logs(m.squares, c->components, frequencies, classes, (int8_t *)spectrum);
        join_logs((const int8_t *)spectrum, c->components, frequencies, m.logs);
    } else {
        for (int64_t i = 0; i < rows; i++)
            m.logs[i] = log_of(m.squares[i], classes);
    }
    const float level = water_level(m.logs, rows, 8 * c->record, classes);
    scales[2 * c->channels] = level;
    if (separable)
        return;
    uint8_t *class = (uint8_t *)m.squares; /* which are of no more use */
    classify(m.logs, rows, level, 8 * c->record, classes, class);
    for (int64_t i = 0; 2 * i < rows; i++)
        spectrum[i] = (uint8_t)(class[2 * i] | (2 * i + 1 < rows ? class[2 * i + 1] << 4 : 0));
}

/* How rows are coded, from what is stored: `inverse` of the scale of each channel, `bits` and `deviation` of each row,
   and `rows` (components, part), the components of groups of `part` channels; `part` is 0 without groups. `memory` is
   (threads, 2, part, part). */
void plan_blocks(const Classes *classes, int64_t channels, int64_t components, int64_t frequencies, int64_t part,
                 int64_t separable, int64_t record, const float *scales, const int8_t *basis, const uint8_t *spectrum,
                 float *memory, float *inverse, uint8_t *bits, float *deviation, float *rows, int64_t threads)
{
    const float level = scales[2 * channels];
    float deviations[16];
    for (int64_t i = 0; i < channels; i++)
        inverse[i] = inverse_of(scales[channels + i]);
    for (int k = 0; k < 16; k++)
        deviations[k] = exp2f((classes->variance[k] + level) / 2);
    if (separable) {
        join_logs((const int8_t *)spectrum, components, frequencies, deviation);
        classify(deviation, components * frequencies, level, 8 * record, classes, bits);
    } else {
        for (int64_t i = 0; i < components * frequencies; i++)
            bits[i] = spectrum[i / 2] >> (i & 1 ? 4 : 0) & 15;
    }
    for (int64_t i = 0; i < components * frequencies; i++) {
        deviation[i] = deviations[bits[i]];
        bits[i] = classes->widths[bits[i]];
    }
    if (part == 0)
        return;
    const int64_t groups = components / part, size = part * part;
    PARALLEL_FOR(groups * size * part)
    for (int64_t thread = 0; thread < threads; thread++)
        for (int64_t g = groups * thread / threads; g < groups * (thread + 1) / threads; g++)
            orthonormal(basis + g * size, part, rows + g * size, memory + 2 * thread * size);
}
