/* What is done to dense maps beside coding them: ReLU and its bits, batch norm again, maximum pooling, means of channels.

   Bits and codes stand in the order in which the maps stand in memory. */

#include "pairs.h"

typedef float Eight __attribute__((vector_size(32), may_alias, aligned(4)));
typedef int32_t Words __attribute__((vector_size(32), may_alias));

INLINE int bit_of(const uint8_t *bits, int64_t i)
{
    return bits[i >> 3] >> (i & 7) & 1;
}

/* ReLU as PyTorch has it: what is not a number stays, and so does the sign of zero. */
INLINE float rectified(float x)
{
    return 0 > x ? 0 : x;
}

INLINE Eight rectified_eight(Eight x)
{
    return (Eight)((Words)x & ~(0 > x));
}

/* Eight values with zeros where bits are set. */
INLINE Eight cleared(Eight x, uint8_t bits)
{
    const Words each = {1, 2, 4, 8, 16, 32, 64, 128};
    return (Eight)((Words)x & ((each & bits) == 0));
}

INLINE uint8_t bits_of(Words mask)
{
#if WIDE
    return (uint8_t)_mm256_movemask_ps((__m256)mask);
#else
    uint8_t bits = 0;
    for (int k = 0; k < 8; k++)
        bits |= (mask[k] & 1) << k;
    return bits;
#endif
}

/* Writes up to eight values between 0 and the limit; returns the bits of those outside. */
INLINE uint8_t rectify_eight(const float *x, int64_t count, float limit, float *y)
{
    float some[8] = {0};
    const int whole = count >= 8;
    if (!whole)
        memcpy(some, x, count * sizeof(float));
    const Eight values = *(const Eight *)(whole ? x : some);
    Words above = {0};
    if (limit < INFINITY)
        above = values >= limit;
    const Eight limits = limit - (Eight){0}, lower = rectified_eight(values);
    const Eight result = (Eight)(((Words)lower & ~above) | ((Words)limits & above));
    memcpy(y, &result, (whole ? 8 : count) * sizeof(float));
    return bits_of((values <= 0) | above) & (whole ? 255 : (1 << count) - 1);
}

/* Values between 0 and the limit, which may be infinite, and the bits of those outside. */
void rectify(const float *x, int64_t count, float limit, float *y, uint8_t *bits, int64_t threads)
{
    PARALLEL_FOR(count)
    for (int64_t i = 0; i < count; i += 8)
        bits[i >> 3] = rectify_eight(x + i, count - i, limit, y + i);
}

void clear_outside(const float *x, const uint8_t *bits, int64_t count, float *y, int64_t threads)
{
    PARALLEL_FOR(count)
    for (int64_t i = 0; i < count / 8; i++)
        *(Eight *)(y + 8 * i) = cleared(*(const Eight *)(x + 8 * i), bits[i]);
    for (int64_t i = count / 8 * 8; i < count; i++)
        y[i] = bit_of(bits, i) ? 0 : x[i];
}

/* Values first to last, all of one channel or (`per_place`) each with a factor and a shift of its own. */
INLINE void rebuild_some(const float *x, int64_t first, int64_t last, const float *factor, const float *shift,
                         int per_place, const uint8_t *bits, float *y)
{
    for (int64_t i = first; i < last;) {
        const int64_t place = per_place ? i - first : 0;
        if (i + 8 > last || (bits && i & 7)) {
            const float value = x[i] * factor[place] + shift[place];
            y[i] = !bits ? value : bit_of(bits, i) ? 0 : rectified(value);
            i++;
            continue;
        }
        const Eight values = *(const Eight *)(x + i);
        Eight result = per_place ? values * *(const Eight *)(factor + place) + *(const Eight *)(shift + place)
                                 : values * *factor + *shift;
        if (bits)
            result = cleared(rectified_eight(result), bits[i >> 3]);
        *(Eight *)(y + i) = result;
        i += 8;
    }
}

/* Batch norm, and ReLU by its bits where they are given, of maps of `size` positions.

   `norm` (2, channels) is room for the factor and the shift of each channel; weight and bias may be NULL. */
void rebuild(const float *x, const float *mean, const float *scale, const float *weight, const float *bias,
             const uint8_t *bits, int64_t images, int64_t channels, int64_t size, int64_t channels_last, float *norm,
             float *y, int64_t threads)
{
    float *shift = norm + channels;
    for (int64_t c = 0; c < channels; c++) {
        norm[c] = weight ? scale[c] * weight[c] : scale[c];
        const float moved = -mean[c] * norm[c];
        shift[c] = bias ? moved + bias[c] : moved;
    }
    if (channels_last) {
        PARALLEL_FOR(images * size * channels)
        for (int64_t i = 0; i < images * size; i++)
            rebuild_some(x, i * channels, (i + 1) * channels, norm, shift, 1, bits, y);
    } else {
        PARALLEL_FOR(images * size * channels)
        for (int64_t i = 0; i < images * channels; i++)
            rebuild_some(x, i * size, (i + 1) * size, norm + i % channels, shift + i % channels, 0, bits, y);
    }
}

/* ReLU alone by its bits. */
void rectify_again(const float *x, const uint8_t *bits, int64_t count, float *y, int64_t threads)
{
    PARALLEL_FOR(count)
    for (int64_t i = 0; i < count / 8; i++)
        *(Eight *)(y + 8 * i) = cleared(rectified_eight(*(const Eight *)(x + 8 * i)), bits[i]);
    for (int64_t i = count / 8 * 8; i < count; i++)
        y[i] = bit_of(bits, i) ? 0 : rectified(x[i]);
}

/* -- maximum pooling ----------------------------------------------------------------------------------------------- */

/* Windows over maps, and how maps and maxima stand in memory. */
typedef struct {
    int64_t images, channels, height, width, down, across; /* of the maps, and maxima of each */
    int64_t stride_b, stride_c, stride_y, stride_x; /* of the maps, in elements */
    int64_t kernel_h, kernel_w, step_h, step_w, padding_h, padding_w, dilation_h, dilation_w;
    int64_t channels_last; /* the maxima; else they are contiguous */
    int64_t bits; /* of a code */
} Pooling;

/* Maxima that follow each other in memory: those of a row of windows, or of all channels of a window. */
typedef struct {
    int64_t origin; /* of the first window, in the maps; outside them where it begins in the padding */
    int64_t step; /* from window to window */
    int64_t top, left; /* of the first window */
} Run;

INLINE int64_t run_length(const Pooling *p)
{
    return p->channels_last ? p->channels : p->across;
}

INLINE int64_t runs_of_image(const Pooling *p)
{
    return p->down * (p->channels_last ? p->across : p->channels);
}

INLINE Run find_run(const Pooling *p, int64_t i)
{
    const int64_t image = i / runs_of_image(p), rest = i % runs_of_image(p);
    const int64_t row = p->channels_last ? rest / p->across : rest % p->down;
    const int64_t column = p->channels_last ? rest % p->across : 0, channel = p->channels_last ? 0 : rest / p->down;
    Run run = {0, 0, row * p->step_h - p->padding_h, column * p->step_w - p->padding_w};
    run.step = p->channels_last ? p->stride_c : p->step_w * p->stride_x;
    run.origin = image * p->stride_b + channel * p->stride_c + run.top * p->stride_y + run.left * p->stride_x;
    return run;
}

/* Takes what is larger than the best so far, or the first, or not a number. */
INLINE void take_larger(const float *x, int64_t step, int64_t count, int32_t code, float *best, int32_t *codes)
{
    for (int64_t i = 0; i < count; i++) {
        const float value = x[i * step];
        const int better = (value > best[i]) | (value != value) | (codes[i] < 0);
        best[i] = better ? value : best[i];
        codes[i] = better ? code : codes[i];
    }
}

/* The maxima of windows of a run, from `first` on, and their codes; where nothing of a window is within the map, a code
   is below 0. */
static void largest(const Pooling *p, const float *x, const Run *run, int64_t first, int64_t count, float *best,
                    int32_t *codes)
{
    for (int64_t i = 0; i < count; i++) {
        best[i] = -INFINITY;
        codes[i] = -1;
    }
    for (int64_t r = 0; r < p->kernel_h; r++) {
        const int64_t row = run->top + r * p->dilation_h;
        if (row < 0 || row >= p->height)
            continue;
        for (int64_t c = 0; c < p->kernel_w; c++) {
            const int64_t column = run->left + c * p->dilation_w, ahead = p->channels_last ? 0 : p->step_w;
            const int64_t shift = r * p->dilation_h * p->stride_y + c * p->dilation_w * p->stride_x;
            int64_t begin = 0, end = count;
            while (begin < end && column + (first + begin) * ahead < 0)
                begin++;
            while (begin < end && column + (first + end - 1) * ahead >= p->width)
                end--;
            if (begin == end || column + (first + begin) * ahead >= p->width)
                continue;
            const float *source = x + run->origin + shift + (first + begin) * run->step;
            const int32_t code = (int32_t)(r * p->kernel_w + c);
            if (run->step == 1)
                take_larger(source, 1, end - begin, code, best + begin, codes + begin);
            else if (run->step == 2)
                take_larger(source, 2, end - begin, code, best + begin, codes + begin);
            else
                take_larger(source, run->step, end - begin, code, best + begin, codes + begin);
        }
    }
}

#define TOGETHER 64

static void pool_image(const Pooling *p, const float *x, int64_t image, float *y, uint8_t *codes)
{
    const int64_t runs = runs_of_image(p), length = run_length(p), first = image * runs * length;
    int64_t bit = first * p->bits;
    for (int64_t i = 0; i < runs; i++) {
        const Run run = find_run(p, image * runs + i);
        for (int64_t at = 0; at < length; at += TOGETHER) {
            const int64_t some = length - at < TOGETHER ? length - at : TOGETHER;
            int32_t found[TOGETHER];
            largest(p, x, &run, at, some, y + first + i * length + at, found);
            for (int64_t k = 0; k < some; k++, bit += p->bits) {
                const uint8_t code = (uint8_t)(found[k] << (bit & 7));
                codes[bit >> 3] = bit & 7 ? codes[bit >> 3] | code : code;
            }
        }
    }
}

#define PIECE 256 /* maxima */

/* Whether windows are two by two side by side, cover contiguous maps exactly, and no two images share a byte. */
INLINE int is_halving(const Pooling *p)
{
    const int squares = p->kernel_h == 2 && p->kernel_w == 2 && p->dilation_h == 1 && p->dilation_w == 1;
    const int apart = p->step_h == 2 && p->step_w == 2 && p->padding_h == 0 && p->padding_w == 0;
    const int exact = p->height == 2 * p->down && p->width == 2 * p->across;
    const int dense = !p->channels_last && p->stride_x == 1 && p->stride_y == p->width
        && p->stride_c == p->height * p->width && p->stride_b == p->channels * p->stride_c;
    const int whole = p->bits == 2 && p->channels * p->down * p->across % 4 == 0;
    return squares && apart && exact && dense && whole && 0 < p->across && 4 * p->across <= PIECE;
}

/* Such windows of one image, whose rows follow one another whatever the channel: the four values of each apart, so that
   short rows are compared as fast as long ones. */
static void halve_image(const Pooling *p, const float *x, int64_t image, float *y, uint8_t *codes)
{
    const int64_t across = p->across, rows = p->channels * p->down, most = PIECE / across / 4 * 4;
    float values[4][PIECE];
    int32_t found[PIECE];
    x += image * rows * 4 * across;
    y += image * rows * across;
    codes += image * rows * across / 4;
    for (int64_t row = 0; row < rows; row += most) {
        const int64_t some = rows - row < most ? rows - row : most, count = some * across;
        for (int64_t r = 0; r < 2 * some; r++) {
            float *left = values[r % 2 * 2] + r / 2 * across, *right = values[r % 2 * 2 + 1] + r / 2 * across;
            for (int64_t i = 0; i < across; i++) {
                left[i] = x[2 * i];
                right[i] = x[2 * i + 1];
            }
            x += 2 * across;
        }
        memset(found, 0, count * sizeof(int32_t));
        for (int32_t code = 1; code < 4; code++)
            take_larger(values[code], 1, count, code, values[0], found);
        memcpy(y, values[0], count * sizeof(float));
        for (int64_t i = 0; i < count / 4; i++) {
            const int32_t *four = found + 4 * i;
            codes[i] = (uint8_t)(four[0] | four[1] << 2 | four[2] << 4 | four[3] << 6);
        }
        y += count;
        codes += count / 4;
    }
}

/* Writes the maxima and their codes, several to a byte: of those that are not numbers the last, else the first of the
   greatest. */
void pool_maxima(const Pooling *p, const float *x, float *y, uint8_t *codes, int64_t threads)
{
    const int64_t maxima = runs_of_image(p) * run_length(p);
    /* Images that share a byte have to come one after the other. */
    if (maxima * p->bits % 8)
        threads = 1;
    const int halving = is_halving(p);
    PARALLEL_FOR(p->images * maxima)
    for (int64_t image = 0; image < p->images; image++) {
        if (halving)
            halve_image(p, x, image, y, codes);
        else
            pool_image(p, x, image, y, codes);
    }
}

/* How far from the first element of a window each code points, in the maps. */
INLINE void list_distances(const Pooling *p, int64_t *distances)
{
    for (int64_t r = 0; r < p->kernel_h; r++)
        for (int64_t c = 0; c < p->kernel_w; c++)
            *distances++ = r * p->dilation_h * p->stride_y + c * p->dilation_w * p->stride_x;
}

INLINE int64_t code_of(const Pooling *p, const uint8_t *codes, int64_t i)
{
    const int64_t bit = i * p->bits;
    return codes[bit >> 3] >> (bit & 7) & ((1 << p->bits) - 1);
}

/* Writes the values of maps where the maxima stood. */
void pool_maxima_again(const Pooling *p, const float *x, const uint8_t *codes, float *y, int64_t threads)
{
    const int64_t runs = p->images * runs_of_image(p), length = run_length(p);
    int64_t distances[256] = {0};
    list_distances(p, distances);
    PARALLEL_FOR(runs * length)
    for (int64_t i = 0; i < runs; i++) {
        const Run run = find_run(p, i);
        for (int64_t k = 0; k < length; k++)
            y[i * length + k] = x[run.origin + k * run.step + distances[code_of(p, codes, i * length + k)]];
    }
}

/* Writes all of the gradient `out` of the maps, which stand without gaps, from that of the maxima. */
void spread_maxima(const Pooling *p, const float *gradient, const uint8_t *codes, float *out, int64_t threads)
{
    const int64_t size = p->channels * p->height * p->width, runs = runs_of_image(p), length = run_length(p);
    int64_t distances[256] = {0};
    list_distances(p, distances);
    PARALLEL_FOR(p->images * size)
    for (int64_t image = 0; image < p->images; image++) {
        memset(out + image * size, 0, size * sizeof(float));
        for (int64_t i = image * runs; i < (image + 1) * runs; i++) {
            const Run run = find_run(p, i);
            for (int64_t k = 0; k < length; k++)
                out[run.origin + k * run.step + distances[code_of(p, codes, i * length + k)]] += gradient[i * length + k];
        }
    }
}

/* -- means --------------------------------------------------------------------------------------------------------- */

#define AT_ONCE 16
#define MOST_TERMS 256 /* of a sum in float32 */

typedef float Sixteen __attribute__((vector_size(64), may_alias, aligned(4)));

INLINE double total_of(const Sixteen *given)
{
    const Sixteen sums = *given;
    double total = 0;
    for (int k = 0; k < AT_ONCE; k++)
        total += sums[k];
    return total;
}

/* What is not finite leaves nothing of its group. */
static void spread_over_groups(float *mean, int64_t channels, int64_t group)
{
    for (int64_t first = 0; first < channels; first += group) {
        const int64_t last = first + group < channels ? first + group : channels;
        float total = 0;
        for (int64_t c = first; c < last; c++)
            total += mean[c];
        for (int64_t c = first; c < last; c++)
            mean[c] += total * 0;
    }
}

static void take_means(const float *x, int64_t images, int64_t channels, int64_t size, int64_t channels_last, float *mean,
                       int64_t threads)
{
    const double count = (double)images * (double)size;
    if (!channels_last) {
        PARALLEL_FOR(images * channels * size)
        for (int64_t c = 0; c < channels; c++) {
            double total = 0;
            Sixteen sums = {0};
            int room = MOST_TERMS;
            for (int64_t b = 0; b < images; b++) {
                const float *map = x + (b * channels + c) * size;
                int64_t i = 0;
                for (; i + AT_ONCE <= size; i += AT_ONCE) {
                    sums += *(const Sixteen *)(map + i);
                    if (--room == 0) {
                        total += total_of(&sums);
                        sums = (Sixteen){0};
                        room = MOST_TERMS;
                    }
                }
                for (; i < size; i++)
                    total += map[i];
            }
            total += total_of(&sums);
            mean[c] = (float)(total / count);
        }
        return;
    }
    PARALLEL_FOR(images * channels * size)
    for (int64_t first = 0; first < channels; first += AT_ONCE) {
        const int64_t some = channels - first < AT_ONCE ? channels - first : AT_ONCE;
        double totals[AT_ONCE] = {0};
        for (int64_t i = 0; i < images * size; i++)
            for (int64_t k = 0; k < some; k++)
                totals[k] += x[i * channels + first + k];
        for (int64_t k = 0; k < some; k++)
            mean[first + k] = (float)(totals[k] / count);
    }
}

/* The means of the channels of maps of `size` positions; NaN in all of a group of channels that holds something that is
   not finite. */
void channel_means(const float *x, int64_t images, int64_t channels, int64_t size, int64_t channels_last, int64_t group,
                   float *mean, int64_t threads)
{
    take_means(x, images, channels, size, channels_last, mean, threads);
    spread_over_groups(mean, channels, group);
}
