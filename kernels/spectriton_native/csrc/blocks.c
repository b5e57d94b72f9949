/* Block transform coding of feature maps, as spectriton.reference.block_codec describes it, in one pass.

   Sixteen blocks stand side by side, one in each lane of a vector, from the maps to the bits of the records. A part of
   the channels (a group, or some channels where groups are of one) goes through at a time, so that what is computed on
   stays in the caches. Positions are transformed before channels are mixed: only the numbers that have bits are mixed,
   and most have none. */

#include "blocks.h"

/* A number that has bits. */
typedef struct {
    int32_t component; /* within its part */
    int32_t start; /* bit of the record with which its field begins */
    int32_t slot; /* its number in the order of the record, within its part */
    int32_t width;
    float deviation;
    float scale; /* of two bits, the modulus that tells cells apart; else the rate of the compander */
} Field;

/* All numbers that have bits, part by part, in the order of the frequencies; `order` lists them in that of the record. */
typedef struct {
    Field *fields;
    int32_t *order;
    int32_t *first; /* (parts, frequencies + 1): the first of each frequency */
} Fields;

/* What a thread works with. */
typedef struct {
    Lanes *numbers; /* (frequencies, part + 1): one more, or all would fall into one set of the cache */
    Lanes *coded; /* (fields of a part,) */
    Bytes *codes; /* the same */
    Halves *words; /* of the records */
} Space;

INLINE int64_t most_fields(const Coding *c, int64_t channels)
{
    return smaller(channels * c->edge_h * c->edge_w, 8 * c->record);
}

INLINE int64_t words_of(const Coding *c)
{
    return (c->record + 1) / 2 + 1;
}

INLINE Fields fields_in(const Coding *c, uint8_t *memory)
{
    const int64_t most = most_fields(c, c->components);
    Fields f;
    f.fields = (Field *)memory;
    f.order = (int32_t *)(memory + aligned(most * (int64_t)sizeof(Field)));
    f.first = (int32_t *)((uint8_t *)f.order + aligned(most * 4));
    return f;
}

INLINE int64_t bytes_of_fields(const Coding *c)
{
    const int64_t most = most_fields(c, c->components);
    return aligned(most * (int64_t)sizeof(Field)) + aligned(most * 4)
        + aligned(parts_of(c) * (c->edge_h * c->edge_w + 1) * 4);
}

INLINE Space space_in(const Coding *c, uint8_t *memory)
{
    const int64_t most = most_fields(c, c->part);
    Space s;
    s.numbers = (Lanes *)memory;
    s.coded = s.numbers + c->edge_h * c->edge_w * (c->part + 1);
    s.codes = (Bytes *)s.coded; /* a number is one or the other */
    s.words = (Halves *)(s.coded + most);
    return s;
}

INLINE int64_t bytes_of_space(const Coding *c)
{
    const int64_t numbers = c->edge_h * c->edge_w * (c->part + 1) + most_fields(c, c->part);
    return numbers * 64 + aligned(words_of(c) * 32);
}

/* Bytes of memory, aligned to 64, that encoding and decoding take. */
int64_t memory_of_blocks(const Coding *c, int64_t threads)
{
    return bytes_of_fields(c) + threads * bytes_of_space(c);
}

/* Returns 0 where fields do not fit the record. */
INLINE int list_fields(const Coding *c, Fields *f)
{
    const int64_t frequencies = c->edge_h * c->edge_w;
    const float threshold = -logf(1 - 1 / c->compander[2]) / c->rate;
    int64_t count = 0, start = 0;
    for (int64_t part = 0, k = 0; k < c->components; part++, k += c->part) {
        const int64_t own = smaller(c->part, c->components - k);
        const uint8_t *bits = c->bits + k * frequencies;
        int32_t *first = f->first + part * (frequencies + 1);
        int32_t next[EDGE * EDGE] = {0};
        for (int64_t i = 0; i < own * frequencies;)
            for (int64_t m = 0; m < frequencies; m++, i++)
                next[m] += bits[i] != 0;
        int64_t total = count;
        for (int64_t m = 0; m < frequencies; m++) {
            first[m] = (int32_t)total;
            total += next[m];
            next[m] = first[m];
        }
        first[frequencies] = (int32_t)total;
        if (total > most_fields(c, c->components) || total - count > most_fields(c, c->part))
            return 0;
        int32_t slot = 0;
        for (int64_t i = 0; i < own; i++)
            for (int64_t m = 0; m < frequencies; m++) {
                const int32_t width = bits[i * frequencies + m];
                if (width == 0)
                    continue;
                const int32_t place = next[m]++;
                const float deviation = c->deviation[(k + i) * frequencies + m];
                const float scale = width == 2 ? threshold * deviation : c->rate / deviation;
                f->fields[place] = (Field){(int32_t)i, (int32_t)start, slot, width, deviation, scale};
                f->order[count + slot++] = place;
                start += width;
            }
        count = total;
    }
    return start <= 8 * c->record;
}
/* -- maps ---------------------------------------------------------------------------------------------------------- */

INLINE void write_map(void *maps, int64_t at, int format, float value)
{
    if (format == MAP_FLOAT32) {
        ((float *)maps)[at] = value;
    } else if (format == MAP_FLOAT16) {
        const float largest = 65504; /* what is finite stays so */
        const float within = value > largest ? largest : (value < -largest ? -largest : value);
        ((uint16_t *)maps)[at] = half_of_float(fabsf(value) < INFINITY ? within : value);
    } else if (format == MAP_BFLOAT16) {
        ((uint16_t *)maps)[at] = bfloat_of_float(value);
    } else {
        ((double *)maps)[at] = value;
    }
}
#if WIDE
INLINE void store_four(float *maps, const int64_t *rows, int64_t x, const Lanes *in)
{
    __m512 v[4];
    for (int i = 0; i < 4; i++)
        v[i] = (__m512)in[x + i];
    transpose_quarters(v);
    for (int i = 0; i < 4; i++) {
        _mm_storeu_ps(maps + rows[i] + x, _mm512_castps512_ps128(v[i]));
        _mm_storeu_ps(maps + rows[4 + i] + x, _mm512_extractf32x4_ps(v[i], 1));
        _mm_storeu_ps(maps + rows[8 + i] + x, _mm512_extractf32x4_ps(v[i], 2));
        _mm_storeu_ps(maps + rows[12 + i] + x, _mm512_extractf32x4_ps(v[i], 3));
    }
}
#endif
INLINE void store_as(void *maps, int64_t channel, const Coding *c, const Tile *tile, const Lanes *in, int format)
{
    for (int64_t l = 0; l < tile->count; l++)
        for (int64_t y = 0; y < tile->rows_within[l]; y++) {
            const float *row = (const float *)(in + y * c->edge_w) + l;
            for (int64_t x = 0; x < tile->columns_within[l]; x++)
                write_map(maps, channel + tile->rows[y][l] + x * c->stride_x, format, row[x * LANES]);
        }
}

static void store(void *maps, int64_t channel, const Coding *c, const Tile *tile, const Lanes *in)
{
#if WIDE
    if (c->format == MAP_FLOAT32 && tile->whole && tile->count == LANES && c->height % c->edge_h == 0) {
        float *own = (float *)maps + channel;
        for (int64_t y = 0; y < c->edge_h; y++) {
            store_four(own, tile->rows[y], 0, in + y * c->edge_w);
            if (c->edge_w > 4)
                store_four(own, tile->rows[y], c->edge_w - 4, in + y * c->edge_w);
        }
        return;
    }
#endif
    if (c->format == MAP_FLOAT32)
        store_as(maps, channel, c, tile, in, MAP_FLOAT32);
    else if (c->format == MAP_FLOAT16)
        store_as(maps, channel, c, tile, in, MAP_FLOAT16);
    else if (c->format == MAP_BFLOAT16)
        store_as(maps, channel, c, tile, in, MAP_BFLOAT16);
    else
        store_as(maps, channel, c, tile, in, MAP_FLOAT64);
}

/* -- quantiser ----------------------------------------------------------------------------------------------------- */

INLINE Lanes choose(Words mask, Lanes yes, Lanes no)
{
    return (Lanes)((mask & (Words)yes) | (~mask & (Words)no));
}

/* exp(-x) for x from 0 on, to float32 rounding. */
INLINE Lanes decay(Lanes x)
{
    const Lanes turns = x * -1.44269504f, power = choose(turns > -126.0f, turns, ALL(-126.0f));
    /* Adding so large a number leaves the nearest whole one in the lowest bits. */
    const Lanes shifted = power + 12582912.0f, rest = power - (shifted - 12582912.0f);
    Lanes sum = ALL(1.54035304e-4f);
    sum = MULTIPLY_ADD(sum, rest, ALL(1.33335581e-3f));
    sum = MULTIPLY_ADD(sum, rest, ALL(9.61812911e-3f));
    sum = MULTIPLY_ADD(sum, rest, ALL(5.55041087e-2f));
    sum = MULTIPLY_ADD(sum, rest, ALL(2.40226507e-1f));
    sum = MULTIPLY_ADD(sum, rest, ALL(6.93147181e-1f));
    sum = MULTIPLY_ADD(sum, rest, ALL(1.0f));
    return (Lanes)((Words)sum + ((Words)shifted << 23));
}

/* Noise in [0, 1) of a position: spectriton.reference.rounding.uniform. */
INLINE float uniform(uint32_t key, uint32_t position)
{
    uint32_t word = position * 0x9E3779B9u + key;
    word = (word ^ word >> 16) * 0x7FEB352Du;
    word = (word ^ word >> 15) * 0x846CA68Bu;
    return (float)((word ^ word >> 16) >> 8) * 0x1p-24f;
}

/* One of the two levels on both sides of a value, without bias between the extreme ones; cells are given. */
static void round_at_random(const Coding *c, const Field *field, const float *values, int32_t *cells, int64_t block,
                            uint32_t key)
{
    const int32_t half = 1 << (field->width - 1);
    const float *levels = c->levels + 2 * half;
    for (int l = 0; l < LANES; l++) {
        const float scaled = values[l] / field->deviation;
        int32_t code = cells[l];
        if (scaled < levels[code & (2 * half - 1)] && code > -half)
            code--;
        const int32_t next = code < half - 1 ? code + 1 : code;
        const float below = levels[code & (2 * half - 1)], gap = levels[next & (2 * half - 1)] - below;
        const uint32_t position = (uint32_t)((block + l) * 8 * c->record + field->start);
        const float share = (scaled - below) / (gap > 1e-9f ? gap : 1e-9f);
        cells[l] = share + uniform(key, position) >= 1 ? next : code;
    }
}

/* Codes in two's complement; those below zero mirror those above. What is not a number is taken for zero. */
INLINE Bytes quantise_numbers(const Coding *c, const Field *field, const Lanes *given, int64_t block, const uint32_t *key)
{
    const Lanes values = (Lanes)((Words)*given & (*given == *given));
    const Words below = values < 0.0f;
    const Lanes size = (Lanes)((Words)values & 0x7fffffff);
    Words cells;
    if (field->width == 1) {
        cells = (Words){0};
    } else if (field->width == 2) {
        cells = (Words)(size >= field->scale) & 1;
    } else {
        const Lanes steps = (1.0f - decay(size * field->scale)) * c->compander[field->width];
        const int32_t last = (1 << (field->width - 1)) - 1;
        cells = __builtin_convertvector(steps, Words);
        const Words within = cells < last;
        cells = (cells & within) | (~within & last);
    }
    cells ^= below; /* -1 - cell */
    if (key)
        round_at_random(c, field, (const float *)&values, (int32_t *)&cells, block, *key);
    return __builtin_convertvector(cells, Bytes);
}

INLINE Lanes look_up(const Coding *c, int32_t width, Words codes)
{
    const float *levels = c->levels + (1 << width);
    if (width == 1) /* the second level is the first below zero */
        return (Lanes)((Words)ALL(levels[0]) ^ (codes << 31));
#if WIDE
    const __m512 first = _mm512_loadu_ps(levels);
    if (width <= 4)
        return (Lanes)_mm512_permutexvar_ps((__m512i)codes, first);
    if (width == 5)
        return (Lanes)_mm512_permutex2var_ps(first, (__m512i)codes, _mm512_loadu_ps(levels + 16));
    return (Lanes)_mm512_i32gather_ps((__m512i)codes, levels, 4);
#else
    Lanes values;
    for (int l = 0; l < LANES; l++)
        values[l] = levels[codes[l]];
    return values;
#endif
}

/* -- mixing of channels -------------------------------------------------------------------------------------------- */

/* Codes of some numbers of one frequency. */
INLINE void mix_some(const Coding *c, const Field *fields, const Lanes *numbers, const float *basis, int64_t channels,
                     Bytes *codes, int64_t block, const uint32_t *key, int count)
{
    Lanes sums[8];
    for (int j = 0; j < count; j++)
        sums[j] = (Lanes){0};
    if (basis) {
        const float *rows[8];
        for (int j = 0; j < count; j++)
            rows[j] = basis + fields[j].component * c->part;
        for (int64_t i = 0; i < channels; i++)
            for (int j = 0; j < count; j++)
                sums[j] = MULTIPLY_ADD(numbers[i], ALL(rows[j][i]), sums[j]);
    } else {
        for (int j = 0; j < count; j++)
            sums[j] = numbers[fields[j].component];
    }
    for (int j = 0; j < count; j++)
        codes[fields[j].slot] = quantise_numbers(c, fields + j, sums + j, block, key);
}

/* Numbers of some channels from those of the components that have bits at one frequency. */
INLINE void unmix_some(const Coding *c, const Field *fields, int64_t coded, const Lanes *values, const float *basis,
                       Lanes *numbers, int count)
{
    Lanes sums[8];
    for (int j = 0; j < count; j++)
        sums[j] = (Lanes){0};
    for (int64_t i = 0; i < coded; i++) {
        const float *row = basis + fields[i].component * c->part;
        for (int j = 0; j < count; j++)
            sums[j] = MULTIPLY_ADD(values[i], ALL(row[j]), sums[j]);
    }
    for (int j = 0; j < count; j++)
        numbers[j] = sums[j];
}

/* -- records ------------------------------------------------------------------------------------------------------- */

/* Bits that wait until there are sixteen of them. */
typedef struct {
    Words bits;
    int32_t fill;
    Halves *words;
} Writer;

INLINE void write_codes(Writer *writer, const Field *fields, const int32_t *order, int64_t count, const Bytes *codes)
{
    Words bits = writer->bits;
    int32_t fill = writer->fill;
    Halves *words = writer->words;
    for (int64_t slot = 0; slot < count; slot++) {
        const int32_t width = fields[order[slot]].width;
        bits |= (__builtin_convertvector(codes[slot], Words) & ((1 << width) - 1)) << fill;
        fill += width;
        if (fill >= 16) {
            *words++ = __builtin_convertvector(bits, Halves);
            bits >>= 16; /* at most 23 are there */
            fill -= 16;
        }
    }
    *writer = (Writer){bits, fill, words};
}

static void write_records(const Coding *c, const Tile *tile, const Halves *words, uint8_t *records)
{
    for (int64_t l = 0; l < tile->count; l++) {
        uint8_t *record = records + (tile->first + l) * c->record;
        const uint16_t *own = (const uint16_t *)words + l;
        for (int64_t i = 0; i < c->record / 2; i++)
            memcpy(record + 2 * i, own + i * LANES, 2);
        if (c->record & 1)
            record[c->record - 1] = (uint8_t)own[c->record / 2 * LANES];
    }
}

static void read_records(const Coding *c, const Tile *tile, const uint8_t *records, Halves *words)
{
    for (int64_t l = 0; l < LANES; l++) {
        const uint8_t *record = records + (tile->first + smaller(l, tile->count - 1)) * c->record;
        uint16_t *own = (uint16_t *)words + l;
        for (int64_t i = 0; i < c->record / 2; i++)
            memcpy(own + i * LANES, record + 2 * i, 2);
        if (c->record & 1)
            own[c->record / 2 * LANES] = record[c->record - 1];
    }
}

INLINE Lanes read_field(const Coding *c, const Field *field, const Halves *words)
{
    const Halves *own = words + (field->start >> 4);
    const Words low = __builtin_convertvector(own[0], Words), high = __builtin_convertvector(own[1], Words);
    /* The sign bit may come along: what the shift leaves of it is masked. */
    const Words codes = ((low | high << 16) >> (field->start & 15)) & ((1 << field->width) - 1);
    return look_up(c, field->width, codes) * field->deviation;
}

/* -- both ways ----------------------------------------------------------------------------------------------------- */

static void encode_tile(const Coding *c, const Fields *f, const Space *s, const void *maps, int64_t first,
                        const uint32_t *key, uint8_t *records)
{
    const int64_t frequencies = c->edge_h * c->edge_w;
    Lanes block[EDGE * EDGE];
    Tile tile;
    place(c, first, &tile);
    Writer writer = {{0}, 0, s->words};
    memset(s->words, 0, words_of(c) * sizeof(Halves));
    for (int64_t part = 0; part < parts_of(c); part++) {
        const int64_t k = part * c->part, channels = smaller(c->part, c->channels - k);
        const int32_t *begin = f->first + part * (frequencies + 1);
        const float *basis = c->basis ? c->basis + k * c->part : 0;
        for (int64_t i = 0; i < channels; i++) {
            const Lanes mean = ALL(c->mean[k + i]), factor = ALL(c->factor[k + i]);
            load(maps, (k + i) * c->stride_c, c, &tile, block);
            for (int64_t m = 0; m < frequencies; m++)
                block[m] = (block[m] - mean) * factor;
            dct_of_blocks(block, c);
            for (int64_t m = 0; m < frequencies; m++)
                s->numbers[m * (c->part + 1) + i] = block[m];
        }
        for (int64_t m = 0; m < frequencies; m++) {
            const Field *fields = f->fields + begin[m];
            const Lanes *numbers = s->numbers + m * (c->part + 1);
            IN_EIGHTS(begin[m + 1] - begin[m],
                      mix_some(c, fields + at, numbers, basis, channels, s->codes, first, key, count))
        }
        write_codes(&writer, f->fields, f->order + begin[0], begin[frequencies] - begin[0], s->codes);
    }
    if (writer.fill)
        *writer.words = __builtin_convertvector(writer.bits, Halves);
    write_records(c, &tile, s->words, records);
}

static void decode_tile(const Coding *c, const Fields *f, const Space *s, const uint8_t *records, int64_t first,
                        void *maps)
{
    const int64_t frequencies = c->edge_h * c->edge_w;
    Lanes block[EDGE * EDGE];
    Tile tile;
    place(c, first, &tile);
    read_records(c, &tile, records, s->words);
    for (int64_t part = 0; part < parts_of(c); part++) {
        const int64_t k = part * c->part, channels = smaller(c->part, c->channels - k);
        const int32_t *begin = f->first + part * (frequencies + 1);
        const float *basis = c->basis ? c->basis + k * c->part : 0;
        for (int64_t m = 0; m < frequencies; m++) {
            const Field *fields = f->fields + begin[m];
            const int64_t coded = begin[m + 1] - begin[m];
            Lanes *numbers = s->numbers + m * (c->part + 1);
            if (!basis || coded == 0)
                memset(numbers, 0, channels * sizeof(Lanes));
            for (int64_t j = 0; j < coded; j++)
                *(basis ? s->coded + j : numbers + fields[j].component) = read_field(c, fields + j, s->words);
            if (basis && coded)
                IN_EIGHTS(channels, unmix_some(c, fields, coded, s->coded, basis + at, numbers + at, count))
        }
        for (int64_t i = 0; i < channels; i++) {
            const Lanes mean = ALL(c->mean[k + i]), factor = ALL(c->factor[k + i]);
            for (int64_t m = 0; m < frequencies; m++)
                block[m] = s->numbers[m * (c->part + 1) + i];
            blocks_of_dct(block, c);
            for (int64_t m = 0; m < frequencies; m++)
                block[m] = block[m] * factor + mean;
            store(maps, (k + i) * c->stride_c, c, &tile, block);
        }
    }
}

/* Calls `one(..., first)` for every sixteen blocks, on all threads. */
#define OVER_TILES(one) \
    const int64_t tiles = (blocks_of(c) + LANES - 1) / LANES; \
    PARALLEL_FOR(c->batch * c->channels * c->height * c->width) \
    for (int64_t thread = 0; thread < threads; thread++) { \
        const Space s = space_in(c, memory + bytes_of_fields(c) + thread * bytes_of_space(c)); \
        for (int64_t t = tiles * thread / threads; t < tiles * (thread + 1) / threads; t++) \
            one; \
    }

/* Writes the records (blocks, record) of maps; bits beyond the last field are 0.

   `factor` is the inverse of the channels' scales; `key` is that of the noise of stochastic rounding, NULL rounds to the
   nearest cell; `memory` is as much as memory_of_blocks says. Returns 1 where the fields do not fit the records. */
int encode_blocks(const Coding *plan, const void *maps, int64_t format, int64_t stride_b, int64_t stride_c,
                  int64_t stride_y, int64_t stride_x, const float *mean, const float *factor, const uint32_t *key,
                  uint8_t *memory, uint8_t *records, int64_t threads)
{
    const Coding own = of_maps(plan, format, mean, factor, (int64_t[]){stride_b, stride_c, stride_y, stride_x});
    const Coding *c = &own;
    Fields f = fields_in(c, memory);
    if (!list_fields(c, &f))
        return 1;
    OVER_TILES(encode_tile(c, &f, &s, maps, t * LANES, key, records))
    return 0;
}

/* Writes the maps of records; `factor` is the scale of each channel. Returns as encode_blocks. */
int decode_blocks(const Coding *plan, void *maps, int64_t format, int64_t stride_b, int64_t stride_c, int64_t stride_y,
                  int64_t stride_x, const float *mean, const float *factor, const uint8_t *records, uint8_t *memory,
                  int64_t threads)
{
    const Coding own = of_maps(plan, format, mean, factor, (int64_t[]){stride_b, stride_c, stride_y, stride_x});
    const Coding *c = &own;
    Fields f = fields_in(c, memory);
    if (!list_fields(c, &f))
        return 1;
    OVER_TILES(decode_tile(c, &f, &s, records, t * LANES, maps))
    return 0;
}
