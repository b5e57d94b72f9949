/* The activation tanh of kept coefficients, s tanh(x / s) of both parts, and its backward from what it gave.

   Polynomials are least squares fits of our own, reweighted until their errors are even; relative errors are below 2e-8 of
   the function. */

#ifndef SPECTRITON_ACTIVATION_H
#define SPECTRITON_ACTIVATION_H

#include "pairs.h"

INLINE float size_of(float x)
{
    return from_bits(to_bits(x) & 0x7fffffff);
}

INLINE float with_sign(float size, float of)
{
    return from_bits((to_bits(size) & 0x7fffffff) | (to_bits(of) & 0x80000000));
}

/* exp(x) for 0 <= x <= 20. */
INLINE float exponential(float x)
{
    const float n = rintf(x * 1.44269504f);
    /* log 2 in two parts, the first with few bits, so that the product is exact. */
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float p = 1.394114069e-3f;
    const float e = (((p * r + 8.363197070e-3f) * r + 4.166637496e-2f) * r + 1.666657687e-1f) * r + 0.5f;
    return (r * r * e + r + 1) * from_bits((uint32_t)((int32_t)n + 127) << 23);
}

INLINE float tanh_of(float x)
{
    const float a = size_of(x), z = a * a;
    const float p = (((-6.113343473e-3f * z + 2.101018884e-2f) * z - 5.385409374e-2f) * z + 1.333279473e-1f) * z;
    const float small = a + a * (z * (p - 3.333332925e-1f));
    const float large = 1 - 2 / (exponential(a < 10 ? 2 * a : 20) + 1);
    const float size = a < 0.625f ? small : large;
    return x == x ? with_sign(size, x) : x;
}

/* For -1 <= q <= 1; at the ends as at the numbers next to them. */
INLINE float atanh_of(float q)
{
    const float below_one = 0.99999994f;
    const float a = size_of(q) < below_one ? size_of(q) : below_one, z = a * a;
    float p = (1.584127697e-1f * z + 6.440088614e-2f) * z + 1.148070299e-1f;
    p = ((p * z + 1.426314700e-1f) * z + 2.000048984e-1f) * z + 3.333333183e-1f;
    const float small = a + a * (z * p);
    /* Half of the logarithm of u = 2^n m, m next to 1. */
    const float u = (1 + a) / (1 - a);
    const int32_t n = (int32_t)((to_bits(u) - 0x3f3504f3) >> 23);
    const float m = from_bits(to_bits(u) - ((uint32_t)n << 23)), s = (m - 1) / (m + 1), y = s * s;
    const float l = (1.479188386e-1f * y + 1.999434405e-1f) * y + 3.333334263e-1f;
    const float large = (float)n * 0.34657359f + (s + s * (y * l));
    const float size = a < 0.5f ? small : large;
    return q == q ? with_sign(size, q) : q;
}

/* s tanh(x / s) of `count` numbers, in place; s = 1 where there are no scales. */
INLINE void activate_tanh(float *x, const float *scales, int64_t count)
{
    if (scales)
        for (int64_t i = 0; i < count; i++)
            x[i] = scales[i] * tanh_of(x[i] / scales[i]);
    else
        for (int64_t i = 0; i < count; i++)
            x[i] = tanh_of(x[i]);
}

/* Gradients of `count` numbers from those of the output, and, where there are scales, the terms whose sum is theirs. */
INLINE void tanh_backward(const float *grad, const float *output, const float *scales, int64_t count, float *out,
                          float *terms)
{
    if (scales)
        for (int64_t i = 0; i < count; i++) {
            const float q = output[i] / scales[i], slope = 1 - q * q;
            out[i] = grad[i] * slope;
            terms[i] = grad[i] * (q - atanh_of(q) * slope);
        }
    else
        for (int64_t i = 0; i < count; i++)
            out[i] = grad[i] * (1 - output[i] * output[i]);
}

#endif
