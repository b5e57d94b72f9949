/* Stored coefficients, eight at a time: as many as a byte of a bitmap has bits.

   A pair is the real and the imaginary part of a coefficient. Dense pairs are float32, stored ones have a format. */

#ifndef SPECTRITON_PAIRS_H
#define SPECTRITON_PAIRS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define WIDE 1
#else
#define WIDE 0
#endif

/* What a helper is given as a constant is one in every copy of it. */
#define INLINE static inline __attribute__((always_inline))

#define STRINGIFY(x) #x
#define PRAGMA(x) _Pragma(STRINGIFY(x))
/* Where there is little to do, starting threads takes longer than doing it. */
#define PARALLEL_FOR(elements) PRAGMA(omp parallel for schedule(static) num_threads(threads) if ((elements) > 32768))
/* Where the first frequencies take most of the time, which keep most. */
#define PARALLEL_IN_TURNS(elements) \
    PRAGMA(omp parallel for schedule(static, 1) num_threads(threads) if ((elements) > 32768))

/* Coefficients in a tile, at most. */
#define LARGEST_TILE 1024

enum format { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, INT8 = 3, INT4 = 4 };

/* Returns `function(..., format)`, the format a constant. */
#define BY_FORMAT(function, ...) \
    switch (format) { \
    case FLOAT32: return function(__VA_ARGS__, FLOAT32); \
    case FLOAT16: return function(__VA_ARGS__, FLOAT16); \
    case BFLOAT16: return function(__VA_ARGS__, BFLOAT16); \
    case INT8: return function(__VA_ARGS__, INT8); \
    default: return function(__VA_ARGS__, INT4); \
    }

INLINE int64_t stored_bytes(int format)
{
    return format == FLOAT32 ? 8 : format == INT8 ? 2 : format == INT4 ? 1 : 4;
}

INLINE float from_bits(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

INLINE uint32_t to_bits(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return bits;
}

INLINE float float_of_half(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) /* infinite, or not a number */
        return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    const float size = rest < 0x400 ? (float)rest * 0x1p-24f : from_bits((rest << 13) + 0x38000000);
    return sign ? -size : size;
}

/* To nearest, of two to the even one. */
INLINE uint16_t half_of_float(float number)
{
    const uint32_t bits = to_bits(number), size = bits & 0x7fffffff, sign = (bits & 0x80000000) >> 16;
    const uint32_t rounded = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
    const uint32_t normal = rounded < 0x7c00 && size < 0x7f800000 ? rounded : 0x7c00;
    /* The last place of a half is that of halves below 2^-14. */
    const uint32_t subnormal = to_bits(from_bits(size) + 0.5f) - 0x3f000000;
    const uint32_t half = size < 0x38800000 ? subnormal : normal;
    return (uint16_t)(sign | (size > 0x7f800000 ? 0x7e00 : half));
}

/* Likewise, the leading half of the bits. */
INLINE uint16_t bfloat_of_float(float number)
{
    const uint32_t bits = to_bits(number);
    return (uint16_t)(number == number ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0);
}

/* Writes `count` parts in FLOAT16 or BFLOAT16. */
INLINE void write_halves(const float *parts, int64_t count, int format, uint8_t *out)
{
    int64_t i = 0;
#if WIDE
    if (format == FLOAT16)
        for (; i + 16 <= count; i += 16)
            _mm256_storeu_si256((__m256i *)(out + 2 * i), _mm512_cvtps_ph(_mm512_loadu_ps(parts + i), 0));
#endif
    for (; i < count; i++) {
        const uint16_t half = format == FLOAT16 ? half_of_float(parts[i]) : bfloat_of_float(parts[i]);
        memcpy(out + 2 * i, &half, 2);
    }
}

/* Real and imaginary part of the pair at `source`. */
INLINE void read_pair(const uint8_t *source, int format, float *re, float *im)
{
    if (format == FLOAT32) {
        memcpy(re, source, 4);
        memcpy(im, source + 4, 4);
    } else if (format == INT8) {
        *re = (float)(int8_t)source[0];
        *im = (float)(int8_t)source[1];
    } else if (format == INT4) { /* two's complement, real part low */
        *re = (float)((int8_t)(*source << 4) >> 4);
        *im = (float)((int8_t)*source >> 4);
    } else {
        uint16_t parts[2];
        memcpy(parts, source, 4);
        *re = format == FLOAT16 ? float_of_half(parts[0]) : from_bits((uint32_t)parts[0] << 16);
        *im = format == FLOAT16 ? float_of_half(parts[1]) : from_bits((uint32_t)parts[1] << 16);
    }
}

#if WIDE

/* The stored pairs that stand from `source` on, at the places whose bits are set; zero elsewhere. */
INLINE __m512 expand_wide(const uint8_t *source, uint8_t bits, int format)
{
    if (format == FLOAT32)
        return _mm512_castpd_ps(_mm512_maskz_expandloadu_pd(bits, source));
    if (format == FLOAT16)
        return _mm512_cvtph_ps(_mm256_maskz_expandloadu_epi32(bits, source));
    if (format == BFLOAT16) {
        const __m256i pairs = _mm256_maskz_expandloadu_epi32(bits, source);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(pairs), 16));
    }
#ifdef __AVX512VBMI2__
    __m128i parts;
    if (format == INT8) {
        parts = _mm_maskz_expandloadu_epi16(bits, source);
    } else {
        const __m128i pairs = _mm_cvtepu8_epi16(_mm_maskz_expandloadu_epi8(bits, source));
        const __m128i low = _mm_and_si128(pairs, _mm_set1_epi16(0x0f));
        const __m128i high = _mm_slli_epi16(_mm_and_si128(pairs, _mm_set1_epi16(0xf0)), 4);
        const __m128i sign = _mm_set1_epi8(8);
        parts = _mm_sub_epi8(_mm_xor_si128(_mm_or_si128(low, high), sign), sign);
    }
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(parts));
#else
    float pairs[16] = {0};
    for (unsigned left = bits; left; left &= left - 1, source += stored_bytes(format)) {
        const int place = __builtin_ctz(left);
        read_pair(source, format, pairs + 2 * place, pairs + 2 * place + 1);
    }
    return _mm512_loadu_ps(pairs);
#endif
}

/* Times `scale`, in the formats that have one. */
INLINE __m512 expand_scaled(const uint8_t *source, uint8_t bits, int format, float scale)
{
    const __m512 pairs = expand_wide(source, bits, format);
    if (format < INT8)
        return pairs;
    /* Zero stays zero where the scale is not a number. */
    const __m512 scaled = _mm512_mul_ps(pairs, _mm512_set1_ps(scale));
    return _mm512_castpd_ps(_mm512_maskz_mov_pd(bits, _mm512_castps_pd(scaled)));
}

#endif

/* Writes eight pairs: the stored ones at the places whose bits are set, times `scale`, zero elsewhere. */
INLINE void expand(const uint8_t *source, uint8_t bits, int format, float scale, float *out)
{
#if WIDE
    _mm512_storeu_ps(out, expand_scaled(source, bits, format, scale));
#else
    memset(out, 0, 16 * sizeof(float));
    for (unsigned left = bits; left; left &= left - 1, source += stored_bytes(format)) {
        float *pair = out + 2 * __builtin_ctz(left);
        read_pair(source, format, pair, pair + 1);
        if (format >= INT8) {
            pair[0] *= scale;
            pair[1] *= scale;
        }
    }
#endif
}

#if WIDE

/* The real parts of eight pairs. */
INLINE __m256 even_ones(__m512 pairs)
{
    const __m512i even = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_castps512_ps256(_mm512_permutexvar_ps(even, pairs));
}

/* What `compress` does, of pairs that are loaded. */
INLINE int compress_wide(__m512 pairs, uint8_t bits, float *out)
{
    const int count = __builtin_popcount(bits);
    _mm512_mask_storeu_pd(out, (1u << count) - 1, _mm512_maskz_compress_pd(bits, _mm512_castps_pd(pairs)));
    return count;
}

#endif

/* Writes those of eight pairs whose bits are set, one after the other; returns how many. */
INLINE int compress(const float *pairs, uint8_t bits, float *out)
{
#if WIDE
    return compress_wide(_mm512_loadu_ps(pairs), bits, out);
#else
    const int count = __builtin_popcount(bits);
    for (unsigned left = bits; left; left &= left - 1, out += 2)
        memcpy(out, pairs + 2 * __builtin_ctz(left), 2 * sizeof(float));
    return count;
#endif
}

/* Writes those of eight numbers whose bits are set, one after the other, each twice. */
INLINE void compress_doubled(const float *numbers, uint8_t bits, float *out)
{
#if WIDE
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512 eight = _mm512_castps256_ps512(_mm256_loadu_ps(numbers));
    compress_wide(_mm512_permutexvar_ps(twice, eight), bits, out);
#else
    for (unsigned left = bits; left; left &= left - 1, out += 2)
        out[0] = out[1] = numbers[__builtin_ctz(left)];
#endif
}

/* Adds the sums of the parts of pairs, which follow each other, to those of eight numbers whose bits are set. */
INLINE void add_expanded(const float *pairs, uint8_t bits, double *numbers)
{
#if WIDE
    const __m512 all = expand_wide((const uint8_t *)pairs, bits, FLOAT32);
    const __m512 sums = _mm512_add_ps(all, _mm512_permute_ps(all, 0xb1));
    _mm512_storeu_pd(numbers, _mm512_add_pd(_mm512_loadu_pd(numbers), _mm512_cvtps_pd(even_ones(sums))));
#else
    for (unsigned left = bits; left; left &= left - 1, pairs += 2)
        numbers[__builtin_ctz(left)] += pairs[0] + pairs[1];
#endif
}

/* `count` stored pairs that follow each other, times `scale`, in the formats that have one. */
INLINE void read_pairs(const uint8_t *source, int64_t count, int format, float scale, float *out)
{
    int64_t i = 0;
#if WIDE
    for (; i + 8 <= count; i += 8)
        _mm512_storeu_ps(out + 2 * i, expand_scaled(source + i * stored_bytes(format), 0xff, format, scale));
#endif
    for (; i < count; i++) {
        read_pair(source + i * stored_bytes(format), format, out + 2 * i, out + 2 * i + 1);
        if (format >= INT8) {
            out[2 * i] *= scale;
            out[2 * i + 1] *= scale;
        }
    }
}

INLINE int64_t count_bits(const uint8_t *bitmap, int64_t bytes)
{
    int64_t count = 0;
    for (int64_t i = 0; i + 4 <= bytes; i += 4) {
        uint32_t word;
        memcpy(&word, bitmap + i, 4);
        count += __builtin_popcount(word);
    }
    return count;
}

/* A range of the rows and tiles of a packed spectrum.

   The values of a tile stand from its offset on, less `base`; those of all tiles are `limit`. */
typedef struct {
    const uint8_t *bitmap; /* (F, tiles, tile_bytes) */
    const int32_t *offsets; /* (F, tiles); local: (row_count, t1 - t0) */
    const int64_t *rows; /* (row_count,), or NULL: row_count from first_row on */
    int64_t first_row, row_count, tiles, tile_bytes, t0, t1, local, base, limit;
} Part;

INLINE int64_t row_of(const Part *part, int64_t i)
{
    return part->rows ? part->rows[i] : part->first_row + i;
}

INLINE const uint8_t *bitmap_of(const Part *part, int64_t i, int64_t t)
{
    return part->bitmap + (row_of(part, i) * part->tiles + t) * part->tile_bytes;
}

INLINE int64_t tile_of(const Part *part, int64_t i, int64_t t)
{
    return part->local ? i * (part->t1 - part->t0) + t - part->t0 : row_of(part, i) * part->tiles + t;
}

/* Where the values of a tile begin; -1 where they are not all there. */
INLINE int64_t start_of(const Part *part, int64_t i, int64_t t)
{
    const int64_t count = count_bits(bitmap_of(part, i, t), part->tile_bytes);
    if (count == 0)
        return 0;
    const int64_t start = part->offsets[tile_of(part, i, t)] - part->base;
    return start >= 0 && start + count <= part->limit ? start : -1;
}

INLINE int64_t positions_of(const Part *part)
{
    return part->row_count * (part->t1 - part->t0) * part->tile_bytes * 8;
}

#endif
