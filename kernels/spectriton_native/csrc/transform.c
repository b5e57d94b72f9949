/* Packed coefficients to small real maps and back, by Fourier transforms of a block of planes in the cache, where maps
   are pooled, too: of large maps that are made to be pooled nothing goes to memory.

   On the way there are the parts of a block's spectra, (ky, part, kx), real and imaginary part apart:
   kx = 0 ... columns - 1, ky = -(bands - 1) ... bands - 1 or, where -(bands - 1) would be bands - 1 again, 0 ... H - 1.
   Sums over a side are made of what is even and what is odd in it: cosines see one, sines the other, and frequencies k
   and -k share both. On a side of even length n, i and n / 2 - i have the same cosine where k is even, the opposite one
   where it is odd, and sines the other way round: an eighth of the products of a matrix will do. Frequencies of which a
   block keeps nothing are left out. */

#include "pooling.h"

/* The largest side; wherever a line is kept, there is room for so many. */
#define SIDE 64
#define HALF (SIDE / 2 + 1)

/* What a transform goes by. Turns of a side are cosines and sines (k, i) of its frequencies k and the positions i of its
   first half, in the adjoint (i, k). */
typedef struct {
    const float *cos_y, *sin_y, *cos_x, *sin_x;
    int64_t height, width, bands, columns;
} Plan;

/* They stand in many places: inlined, they would take a compiler minutes. */
#define OUTLINE static __attribute__((noinline)) void

/* Frequencies of a side that are not left out, the even ones apart from the odd ones. */
typedef struct {
    int64_t count[2];
    uint8_t k[2][HALF];
} Numbers;

INLINE void append(Numbers *numbers, int64_t k, int there)
{
    numbers->k[k & 1][numbers->count[k & 1]] = (uint8_t)k;
    numbers->count[k & 1] += there;
}

/* Parts and maps of a block, one after the other, and lines, which are transformed along the width alone: (h, part, kx),
   rows of an odd number of lanes, so that columns spread over the cache. */
#define PARTS (SIDE * 2 * HALF)

typedef struct {
    lanes maps[PARTS], lines[PARTS];
    Numbers columns, of_column[HALF]; /* kx, and ky of each */
    uint8_t filled[SIDE * HALF]; /* (ky, kx) */
} Room;

INLINE int64_t pitch_of(const Plan *by)
{
    return by->columns | 1;
}

INLINE int64_t rows_of(const Plan *by)
{
    return 2 * (by->bands - 1) < by->height ? 2 * by->bands - 1 : by->height;
}

/* Where the row of frequency k, or with `mirrored` of -k, stands. */
INLINE int64_t row_at(const Plan *by, int64_t k, int mirrored)
{
    if (2 * (by->bands - 1) < by->height)
        return mirrored ? by->bands - 1 - k : by->bands - 1 + k;
    return mirrored && k ? by->height - k : k;
}

/* Whether -k is another place on a side than k. */
INLINE int has_mirror(int64_t k, int64_t side)
{
    return k > 0 && 2 * k != side;
}

/* Which frequencies are there, from where the block's room is filled. */
static void find_numbers(const Plan *by, Room *room)
{
    room->columns.count[0] = room->columns.count[1] = 0;
    for (int64_t x = 0; x < by->columns; x++) {
        Numbers *numbers = room->of_column + x;
        numbers->count[0] = numbers->count[1] = 0;
        for (int64_t k = 0; k < by->bands; k++)
            append(numbers, k, room->filled[row_at(by, k, 0) * by->columns + x] |
                                   room->filled[row_at(by, k, 1) * by->columns + x]);
        append(&room->columns, x, numbers->count[0] + numbers->count[1] > 0);
    }
}

/* A line of n positions, `apart` lanes from one to the next, from half of its spectrum: the sum over k of cosines times
   x[k] less sines times y[k], or the other way round in place with `mirrored`; `count` positions from i on of the first
   quarter (or half, where n is odd) and those that go with them. The last two are constants. */
INLINE void some_positions(const float *cosines, const float *sines, int64_t pitch, const Numbers *numbers,
                           const lanes *x, const lanes *y, int64_t n, int64_t i, lanes *out, int64_t apart,
                           const int mirrored, const int count)
{
    lanes even[3], odd[3], sine_even[3], sine_odd[3];
    for (int r = 0; r < count; r++)
        even[r] = odd[r] = sine_even[r] = sine_odd[r] = no_lanes();
    for (int64_t j = 0; j < numbers->count[0]; j++) {
        const int64_t k = numbers->k[0][j];
        const lanes a = x[k], b = y[k];
        for (int r = 0; r < count; r++)
            even[r] = add_product(even[r], cosines[(i + r) * pitch + k], a);
        for (int r = 0; r < count; r++)
            sine_even[r] = add_product(sine_even[r], sines[(i + r) * pitch + k], b);
    }
    for (int64_t j = 0; j < numbers->count[1]; j++) {
        const int64_t k = numbers->k[1][j];
        const lanes a = x[k], b = y[k];
        for (int r = 0; r < count; r++)
            odd[r] = add_product(odd[r], cosines[(i + r) * pitch + k], a);
        for (int r = 0; r < count; r++)
            sine_odd[r] = add_product(sine_odd[r], sines[(i + r) * pitch + k], b);
    }
    for (int r = 0; r < count; r++) {
        const int64_t h = i + r, j = n / 2 - h;
        const lanes a = add(even[r], odd[r]), b = add(sine_even[r], sine_odd[r]);
        if (n % 2 == 0) {
            const lanes c = subtract(even[r], odd[r]), d = subtract(sine_odd[r], sine_even[r]);
            if (h > 0)
                out[(mirrored ? j : n - j) * apart] = add(c, d);
            out[(mirrored && h > 0 ? n - j : j) * apart] = subtract(c, d);
        }
        if (h > 0)
            out[(mirrored ? h : n - h) * apart] = add(a, b);
        out[(mirrored && h > 0 ? n - h : h) * apart] = subtract(a, b);
    }
}

/* The whole line. */
INLINE void positions(const float *cosines, const float *sines, int64_t pitch, const Numbers *numbers, const lanes *x,
                      const lanes *y, int64_t n, lanes *out, int64_t apart, const int mirrored)
{
    const int64_t end = n % 2 ? n / 2 + 1 : n / 4 + 1;
    for (int64_t i = 0, step; i < end; i += step) {
        step = end - i == 4 ? 2 : end - i < 3 ? end - i : 3;
        if (step == 3)
            some_positions(cosines, sines, pitch, numbers, x, y, n, i, out, apart, mirrored, 3);
        else if (step == 2)
            some_positions(cosines, sines, pitch, numbers, x, y, n, i, out, apart, mirrored, 2);
        else
            some_positions(cosines, sines, pitch, numbers, x, y, n, i, out, apart, mirrored, 1);
    }
}

OUTLINE row_of_line(const Plan *by, const Numbers *columns, const lanes *line, lanes *out)
{
    positions(by->cos_x, by->sin_x, by->columns, columns, line, line + pitch_of(by), by->width, out, 1, 0);
}

OUTLINE real_column(const Plan *by, const Numbers *numbers, const lanes *x, const lanes *y, lanes *out)
{
    positions(by->cos_y, by->sin_y, by->bands, numbers, x, y, by->height, out, 2 * pitch_of(by), 0);
}

OUTLINE imaginary_column(const Plan *by, const Numbers *numbers, const lanes *x, const lanes *y, lanes *out)
{
    positions(by->cos_y, by->sin_y, by->bands, numbers, x, y, by->height, out, 2 * pitch_of(by), 1);
}

/* Parts, of which only those that are filled count, to lines. */
static void lines_of_parts(const Plan *by, Room *room)
{
    const lanes zero = no_lanes();
    for (int64_t x = 0; x < by->columns; x++) {
        const Numbers *numbers = room->of_column + x;
        lanes sums[2][HALF], differences[2][HALF];
        for (int parity = 0; parity < 2; parity++)
            for (int64_t j = 0; j < numbers->count[parity]; j++) {
                const int64_t k = numbers->k[parity][j], row = row_at(by, k, 0), mirror = row_at(by, k, 1);
                const lanes *at = room->maps + row * 2 * by->columns + x;
                const lanes *mirrored = room->maps + mirror * 2 * by->columns + x;
                const int there = room->filled[row * by->columns + x];
                const int there_too = row != mirror && room->filled[mirror * by->columns + x];
                for (int part = 0; part < 2; part++, at += by->columns, mirrored += by->columns) {
                    const lanes a = *(there ? at : &zero), b = *(there_too ? mirrored : &zero);
                    sums[part][k] = add(a, b);
                    differences[part][k] = subtract(a, b);
                }
            }
        if (numbers->count[0] + numbers->count[1] == 0)
            continue;
        real_column(by, numbers, sums[0], differences[1], room->lines + x);
        imaginary_column(by, numbers, sums[1], differences[0], room->lines + pitch_of(by) + x);
    }
}

/* What frequencies see of a line: the even ones and the odd ones by cosines and by sines, (i <= n / 4). Where n is odd all
   see the same (i <= n / 2). */
typedef struct {
    lanes cosine[2][HALF], sine[2][HALF];
} Folded;

INLINE int64_t end_of(int64_t n)
{
    return n % 2 ? n / 2 + 1 : n / 4 + 1;
}

INLINE void fold(const lanes *x, int64_t n, int64_t apart, Folded *folded)
{
    if (n % 2) {
        folded->cosine[0][0] = x[0];
        for (int64_t i = 1; i < end_of(n); i++) {
            folded->cosine[0][i] = add(x[i * apart], x[(n - i) * apart]);
            folded->sine[0][i] = subtract(x[i * apart], x[(n - i) * apart]);
        }
        return;
    }
    folded->cosine[0][0] = add(x[0], x[n / 2 * apart]);
    folded->cosine[1][0] = subtract(x[0], x[n / 2 * apart]);
    for (int64_t i = 1; i < end_of(n); i++) {
        const int64_t j = n / 2 - i;
        const lanes even = add(x[i * apart], x[(n - i) * apart]), odd = subtract(x[i * apart], x[(n - i) * apart]);
        if (i == j) { /* of which the others see nothing */
            folded->cosine[0][i] = even;
            folded->sine[1][i] = odd;
            folded->cosine[1][i] = folded->sine[0][i] = no_lanes();
            continue;
        }
        const lanes even_too = add(x[j * apart], x[(n - j) * apart]), odd_too = subtract(x[j * apart], x[(n - j) * apart]);
        folded->cosine[0][i] = add(even, even_too);
        folded->cosine[1][i] = subtract(even, even_too);
        folded->sine[0][i] = subtract(odd, odd_too);
        folded->sine[1][i] = add(odd, odd_too);
    }
}

/* Some frequencies k: sums over i of cosines (k, i) times x[i] and of sines times y[i]. They are handed to `put`, with
   `count` constants. */
#define PUT(name) INLINE void name(const Plan *by, int64_t k, lanes cosine, lanes sine, lanes *out, int64_t apart)

PUT(put_apart)
{
    (void)by;
    out[k] = cosine;
    out[apart + k] = sine;
}

/* A line was re - i im: real parts are sum c re - s im, imaginary ones -(sum c im + s re). */
PUT(put_real)
{
    out[row_at(by, k, 0) * apart] = subtract(cosine, sine);
    if (has_mirror(k, by->height))
        out[row_at(by, k, 1) * apart] = add(cosine, sine);
}

PUT(put_imaginary)
{
    /* Of zeros that is zero, not minus zero. */
    out[row_at(by, k, 0) * apart] = subtract(subtract(no_lanes(), cosine), sine);
    if (has_mirror(k, by->height))
        out[row_at(by, k, 1) * apart] = subtract(sine, cosine);
}

#define SOME_FREQUENCIES(count, put) \
    case count: { \
        lanes c[count], s[count]; \
        for (int r = 0; r < count; r++) { \
            c[r] = times(cosines[ks[r] * half], x[0]); \
            s[r] = no_lanes(); \
        } \
        for (int64_t i = 1; i < end; i++) { \
            const lanes a = x[i], b = y[i]; \
            for (int r = 0; r < count; r++) \
                c[r] = add_product(c[r], cosines[ks[r] * half + i], a); \
            for (int r = 0; r < count; r++) \
                s[r] = add_product(s[r], sines[ks[r] * half + i], b); \
        } \
        for (int r = 0; r < count; r++) \
            put(by, ks[r], c[r], s[r], out, apart); \
    } break;

#define FREQUENCIES(name, put) \
    OUTLINE name(const Plan *by, const float *cosines, const float *sines, int64_t n, const Numbers *numbers, \
                 const Folded *of_cosine, const Folded *of_sine, lanes *out, int64_t apart) \
    { \
        const int64_t half = n / 2 + 1, end = end_of(n); \
        for (int parity = 0; parity < 2; parity++) { \
            const lanes *x = of_cosine->cosine[n % 2 ? 0 : parity], *y = of_sine->sine[n % 2 ? 0 : parity]; \
            const uint8_t *ks = numbers->k[parity]; \
            for (int64_t left = numbers->count[parity], step; left > 0; left -= step, ks += step) { \
                step = left == 5 ? 3 : left < 4 ? left : 4; \
                switch (step) { \
                    SOME_FREQUENCIES(1, put) \
                    SOME_FREQUENCIES(2, put) \
                    SOME_FREQUENCIES(3, put) \
                    SOME_FREQUENCIES(4, put) \
                } \
            } \
        } \
    }

FREQUENCIES(frequencies_apart, put_apart)
FREQUENCIES(real_frequencies, put_real)
FREQUENCIES(imaginary_frequencies, put_imaginary)

static void line_of_row(const Plan *by, const Numbers *columns, const lanes *row, lanes *line)
{
    Folded folded;
    fold(row, by->width, 1, &folded);
    frequencies_apart(by, by->cos_x, by->sin_x, by->width, columns, &folded, &folded, line, pitch_of(by));
}

/* Lines to those parts that are asked for. */
static void parts_of_lines(const Plan *by, Room *room)
{
    const int64_t pitch = pitch_of(by);
    for (int64_t x = 0; x < by->columns; x++) {
        const Numbers *numbers = room->of_column + x;
        if (numbers->count[0] + numbers->count[1] == 0)
            continue;
        Folded real, imaginary;
        fold(room->lines + x, by->height, 2 * pitch, &real);
        fold(room->lines + pitch + x, by->height, 2 * pitch, &imaginary);
        lanes *out = room->maps + x;
        const int64_t apart = 2 * by->columns;
        real_frequencies(by, by->cos_y, by->sin_y, by->height, numbers, &real, &imaginary, out, apart);
        imaginary_frequencies(by, by->cos_y, by->sin_y, by->height, numbers, &imaginary, &real, out + by->columns, apart);
    }
}

/* A packed spectrum of planes from tile t0 of its part on: the coefficient of frequency f, times `factors` (F,), is the
   part at `places` and, for its imaginary part, `columns` on. */
typedef struct {
    const Part *part;
    const Plan *by;
    const int64_t *places;
    const float *factors;
    const uint8_t *values;
    const float *scales; /* or NULL */
    int64_t format;
} Packed;

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

INLINE void fill(const Packed *packed, int64_t row, Room *room)
{
    const int64_t place = packed->places[row], columns = packed->by->columns;
    room->filled[place / (2 * columns) * columns + place % (2 * columns)] = 1;
}

INLINE void clear_filled(const Plan *by, Room *room, int filled)
{
    memset(room->filled, filled, rows_of(by) * by->columns);
}

INLINE int expand_block_as(const Packed *packed, int64_t p, Room *room, int format)
{
    const Part *part = packed->part;
    int missing = 0;
    clear_filled(packed->by, room, 0);
    for (int64_t i = 0; i < part->row_count; i++) {
        const uint8_t *bits;
        int64_t start, row = row_of(part, i);
        missing |= kept_of_block(part, i, p, &bits, &start);
        if (!bits)
            continue;
        fill(packed, row, room);
        const int64_t t = part->t0 + p / (part->tile_bytes * 8);
        const float scale = format >= INT8 ? packed->scales[row * part->tiles + t] : 1;
        const uint8_t *source = packed->values + start * stored_bytes(format);
        lanes *at = room->maps + packed->places[row];
        float *real = (float *)at, *imaginary = (float *)(at + packed->by->columns);
        for (int j = 0; j < LANES / 8; j++, real += 8, imaginary += 8) {
            expand_apart(source, bits[j], format, scale, packed->factors[row], real, imaginary);
            source += __builtin_popcount(bits[j]) * stored_bytes(format);
        }
    }
    return missing;
}

static int expand_block(const Packed *packed, int64_t p, Room *room)
{
    const int64_t format = packed->format;
    BY_FORMAT(expand_block_as, packed, p, room)
}

/* What is behind some planes, pooled: (height, width) lanes at room->maps. Returns whether values are missing. */
static int pooled_block(const Packed *packed, const Pooling *pooling, int64_t p, int64_t some, Room *room)
{
    const Plan *by = packed->by;
    const int missing = expand_block(packed, p, room);
    find_numbers(by, room);
    lines_of_parts(by, room);
    int64_t made = 0;
    for (int64_t row = 0; row < pooling->height; row++) {
        const int64_t top = top_of(pooling, row);
        for (made = made < top ? top : made; made < top + pooling->kernel_height; made++)
            row_of_line(by, &room->columns, room->lines + made * 2 * pitch_of(by), room->maps + made * by->width);
        if (!is_plain(pooling) || pooling->margin)
            pool_row(pooling, p, some, row, room->maps, by->width, room->maps);
    }
    return missing;
}

/* The adjoint of what pooled_block does behind the lines: from gradients at room->maps, for the columns there are. They are
   taken from the last row on, each before the maps are written, which stand beyond it. */
static void lines_of_gradients(const Plan *by, const Pooling *pooling, int64_t p, int64_t some, Room *room)
{
    const int64_t width = by->width, bottom = top_of(pooling, pooling->height - 1) + pooling->kernel_height;
    const int64_t pitch = 2 * pitch_of(by);
    if (is_plain(pooling) && !pooling->margin) {
        for (int64_t h = 0; h < by->height; h++)
            line_of_row(by, &room->columns, room->maps + h * width, room->lines + h * pitch);
        return;
    }
    clear_lanes(room->lines + bottom * pitch, room->lines + by->height * pitch);
    clear_lanes(room->lines, room->lines + pooling->margin * pitch);
    int64_t cleared = bottom, done = bottom; /* from where on */
    for (int64_t row = pooling->height - 1; row >= 0; row--) {
        const int64_t top = top_of(pooling, row), above = top_of(pooling, row - 1) + pooling->kernel_height;
        lanes grads[SIDE];
        memcpy(grads, room->maps + row * pooling->width, pooling->width * sizeof(lanes));
        for (; cleared > top; cleared--)
            clear_row(pooling, row, cleared - 1, room->maps, width);
        spread_row(pooling, p, some, row, grads, room->maps, width);
        for (const int64_t until = row == 0 || above < top ? top : above; done > until; done--)
            line_of_row(by, &room->columns, room->maps + (done - 1) * width, room->lines + (done - 1) * pitch);
    }
}

/* What a block keeps of each row. */
typedef struct {
    int64_t row, start;
    const uint8_t *bits;
} Kept;

/* As many frequencies as maps of SIDE can have. */
#define FREQUENCIES_MOST (SIDE * HALF)

/* Lines to the coefficients that a pattern keeps of a block; `kept` are so many. */
static void gather_block(const Packed *packed, const Kept *kept, int64_t count, Room *room, float *out)
{
    parts_of_lines(packed->by, room);
    for (; count > 0; count--, kept++) {
        const lanes *at = room->maps + packed->places[kept->row];
        const float *real = (const float *)at, *imaginary = (const float *)(at + packed->by->columns);
        float *target = out + 2 * kept->start;
        for (int j = 0; j < LANES / 8; j++)
            target += 2 * compress_apart(real + 8 * j, imaginary + 8 * j, packed->factors[kept->row], kept->bits[j], target);
    }
}

/* Fills `kept` with what a block keeps, and says so in its room; returns whether values are missing. */
static int find_kept(const Packed *packed, int64_t p, Room *room, Kept *kept, int64_t *count)
{
    int missing = 0;
    *count = 0;
    clear_filled(packed->by, room, 0);
    for (int64_t i = 0; i < packed->part->row_count; i++) {
        Kept *found = kept + *count;
        missing |= kept_of_block(packed->part, i, p, &found->bits, &found->start);
        if (!found->bits)
            continue;
        found->row = row_of(packed->part, i);
        fill(packed, found->row, room);
        ++*count;
    }
    find_numbers(packed->by, room);
    return missing;
}

/* Eight times four pairs of real and imaginary parts, or `some` of them. */
INLINE void interleave(lanes real, lanes imaginary, int64_t some, float *out)
{
#if WIDE
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int half = 0; half < 2; half++) {
        const __m512 re = (__m512)real.v[half], im = (__m512)imaginary.v[half];
        const int64_t left = 2 * (some - 16 * half);
        _mm512_mask_storeu_ps(out + 32 * half, first_of(left), _mm512_permutex2var_ps(re, low, im));
        _mm512_mask_storeu_ps(out + 32 * half + 16, first_of(left - 16), _mm512_permutex2var_ps(re, high, im));
    }
#else
    for (int64_t k = 0; k < some; k++) {
        out[2 * k] = real.v[k / 16][k % 16];
        out[2 * k + 1] = imaginary.v[k / 16][k % 16];
    }
#endif
}

/* Pairs (frequencies, padded, 2) of spectra, zero where there is no plane. */
typedef struct {
    const Plan *by;
    const int64_t *places;
    int64_t frequencies, padded;
    float *at;
} Rows;

/* Maps of `some` planes at room->maps to their rows. */
static void rows_of_block(const Rows *rows, int64_t p, int64_t some, int last, Room *room)
{
    const Plan *by = rows->by;
    clear_filled(by, room, 1);
    find_numbers(by, room);
    for (int64_t h = 0; h < by->height; h++)
        line_of_row(by, &room->columns, room->maps + h * by->width, room->lines + h * 2 * pitch_of(by));
    parts_of_lines(by, room);
    for (int64_t f = 0; f < rows->frequencies; f++) {
        const lanes *at = room->maps + rows->places[f];
        float *row = rows->at + f * rows->padded * 2;
        interleave(at[0], at[by->columns], some, row + 2 * p);
        if (last)
            memset(row + 2 * (p + some), 0, (rows->padded - p - some) * 2 * sizeof(float));
    }
}

/* Blocks of planes take longer where they keep more. */
#define FOR_BLOCKS(elements) \
    PRAGMA(omp parallel for schedule(dynamic) num_threads(threads) reduction(|:missing) if ((elements) > 32768)) \
    for (int64_t p = 0; p < planes; p += LANES)

INLINE int64_t some_of(int64_t planes, int64_t p)
{
    return planes - p < LANES ? planes - p : LANES;
}

INLINE void clear_bits(const Pooling *pooling)
{
    clear_last(pooling, pooling->bits, pooling->codes);
    clear_last(pooling, 1, pooling->signs);
}

/* What is behind packed planes, pooled, to maps. */
int unpack_maps(const Packed *packed, const Pooling *pooling, const Maps *out, int64_t threads)
{
    const int64_t planes = pooling->planes;
    int missing = 0;
    clear_bits(pooling);
    FOR_BLOCKS(planes * packed->by->height * packed->by->width)
    {
        Room room;
        missing |= pooled_block(packed, pooling, p, some_of(planes, p), &room);
        store_block(room.maps, out, p, some_of(planes, p));
    }
    return missing;
}

/* The same to the rows of the spectra of the pooled maps. */
int unpack_rows_of_maps(const Packed *packed, const Pooling *pooling, const Rows *out, int64_t threads)
{
    const int64_t planes = pooling->planes;
    int missing = 0;
    clear_bits(pooling);
    FOR_BLOCKS(planes * packed->by->height * packed->by->width)
    {
        Room room;
        missing |= pooled_block(packed, pooling, p, some_of(planes, p), &room);
        rows_of_block(out, p, some_of(planes, p), p + LANES >= planes, &room);
    }
    return missing;
}

/* Rows of the spectra of maps. */
int rows_of_maps(const Maps *maps, int64_t planes, const Rows *out, int64_t threads)
{
    int missing = 0;
    FOR_BLOCKS(planes * maps->height * maps->width)
    {
        Room room;
        load_block(maps, p, some_of(planes, p), room.maps);
        rows_of_block(out, p, some_of(planes, p), p + LANES >= planes, &room);
    }
    return missing;
}

/* The adjoint of unpack_maps, for gradients of the pooled maps: writes pairs where the pattern keeps them. */
int gather_maps(const Packed *packed, const Pooling *pooling, const Maps *grad, float *out, int64_t threads)
{
    const int64_t planes = pooling->planes;
    int missing = 0;
    FOR_BLOCKS(planes * packed->by->height * packed->by->width)
    {
        Room room;
        Kept kept[FREQUENCIES_MOST];
        int64_t count;
        missing |= find_kept(packed, p, &room, kept, &count);
        load_block(grad, p, some_of(planes, p), room.maps);
        lines_of_gradients(packed->by, pooling, p, some_of(planes, p), &room);
        gather_block(packed, kept, count, &room, out);
    }
    return missing;
}

/* The same for gradients that are packed themselves. */
int gather_packed_maps(const Packed *packed, const Pooling *pooling, const Packed *grad, float *out, int64_t threads)
{
    const int64_t planes = pooling->planes;
    const Pooling none = {.planes = planes, .height = pooling->height, .width = pooling->width, .tile = pooling->tile,
                          .kernel_height = 1, .kernel_width = 1, .stride_height = 1, .stride_width = 1};
    int missing = 0;
    FOR_BLOCKS(planes * packed->by->height * packed->by->width)
    {
        Room room;
        Kept kept[FREQUENCIES_MOST];
        int64_t count;
        missing |= pooled_block(grad, &none, p, some_of(planes, p), &room);
        missing |= find_kept(packed, p, &room, kept, &count);
        lines_of_gradients(packed->by, pooling, p, some_of(planes, p), &room);
        gather_block(packed, kept, count, &room, out);
    }
    return missing;
}
