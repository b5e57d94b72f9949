"""Device functions that round values to their format, to the bit as `spectriton.reference` does.

A format is told by the dtype behind a pointer: floats, int8, and uint8 for the two 4-bit parts of a coefficient.
"""

import triton
import triton.language as tl

from ._device import convert

# The smallest normal float32.
_LEAST_SCALE = tl.constexpr(2.0**-126)
# Added to a number, they leave the nearest integer (of two the even one) in the low bits.
_TO_INTEGER = tl.constexpr(1.5 * 2.0**23)
_TO_INTEGER_64 = tl.constexpr(1.5 * 2.0**52)


@triton.jit
def uniform(b_position, key):
    """Noise in [0, 1) of positions (uint32) for a key, as `spectriton.reference.rounding.uniform` makes it."""
    b_word = b_position * 0x9E3779B9 + key
    b_word = (b_word ^ (b_word >> 16)) * 0x7FEB352D
    b_word = (b_word ^ (b_word >> 15)) * 0x846CA68B
    b_word = b_word ^ (b_word >> 16)
    return (b_word >> 8).to(tl.float32) * (1.0 / (1 << 24))


@triton.jit
def divide_nearest(b_x, b_y):
    """`b_x / b_y` rounded to nearest, as `/` of float32 need not be."""
    if b_x.dtype == tl.float64:
        return b_x / b_y
    else:
        return tl.div_rn(b_x, b_y)


@triton.jit
def scale_of(b_re, b_im, m_kept, LEVELS: tl.constexpr):
    """Scales (TILES,) of tiles, float32: the largest part over LEVELS; NaN where one is not finite.

    Args:
        b_re, b_im: parts (TILES, TILE), float32 or float64.
        m_kept: which of them count.
        LEVELS: the largest integer.
    """
    b_size = tl.maximum(tl.abs(b_re), tl.abs(b_im), propagate_nan=tl.PropagateNan.ALL)
    b_size = tl.where(m_kept, b_size, 0.0)
    # the bits of what is not negative are in its order, above all those of NaN, which a maximum of floats may drop
    INTEGER: tl.constexpr = tl.int64 if b_size.dtype == tl.float64 else tl.int32
    peak = tl.max(b_size.to(INTEGER, bitcast=True), axis=1).to(b_size.dtype, bitcast=True)
    scale = divide_nearest(peak, tl.zeros_like(peak) + LEVELS).to(tl.float32)
    return tl.where(peak < float("inf"), tl.maximum(scale, _LEAST_SCALE), float("nan"))


@triton.jit
def to_levels(b_x, b_inverse, b_position, key, LEVELS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """`b_x * b_inverse`, at most by rounding errors beyond LEVELS, as integers from -LEVELS to LEVELS: their low bits.

    What is beyond, or no number, gives any bits.
    """
    # the bound, too, keeps product and sum from being rounded as one
    b_step = tl.minimum(b_x * b_inverse, LEVELS)
    if STOCHASTIC:
        b_step = tl.floor(b_step + uniform(b_position, key))
        b_step = tl.minimum(tl.maximum(b_step, -LEVELS), LEVELS)
    if b_x.dtype == tl.float64:
        return (b_step + _TO_INTEGER_64).to(tl.int64, bitcast=True).to(tl.int32)
    else:
        return (b_step + _TO_INTEGER).to(tl.int32, bitcast=True)


@triton.jit
def quantise(b_re, b_im, scale, b_position, key, LEVELS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Parts (TILES, TILE) over the scales of their tiles: both integers in a word, the real part in its low half.

    The words are uint16 for 127 levels, and uint8 for 7; zero where the scale is NaN.
    """
    BITS: tl.constexpr = 8 if LEVELS == 127 else 4
    wide = scale.to(b_re.dtype)
    b_inverse = divide_nearest(tl.zeros_like(wide) + 1, wide)[:, None]
    b_re = to_levels(b_re, b_inverse, b_position, key, LEVELS, STOCHASTIC)
    b_im = to_levels(b_im, b_inverse, b_position + 1, key, LEVELS, STOCHASTIC)
    MASK: tl.constexpr = (1 << BITS) - 1
    b_word = tl.where((scale == scale)[:, None], (b_re & MASK) | ((b_im & MASK) << BITS), 0)
    return b_word.to(tl.uint16 if BITS == 8 else tl.uint8)


@triton.jit
def dequantise(b_word, scale):
    """Words of `quantise` (TILES, TILE) to pairs (TILES, TILE, 2) in the dtype of the scales (TILES,)."""
    if b_word.dtype == tl.uint16:
        b_signed = b_word.to(tl.int16, bitcast=True)
        b_pair = tl.join((b_signed << 8) >> 8, b_signed >> 8)
    else:
        b_signed = b_word.to(tl.int8, bitcast=True)
        b_pair = tl.join((b_signed << 4) >> 4, b_signed >> 4)
    return b_pair.to(scale.dtype) * scale[:, None, None]


@triton.jit
def words(ptr):
    """Of low-bit values: a pointer to coefficients as one word each, uint16 for int8 and uint8 for 4 bits."""
    if ptr.dtype.element_ty == tl.int8:
        return ptr.to(tl.pointer_type(tl.uint16), bitcast=True)
    else:
        return ptr


@triton.jit
def convert_stochastic(b_x, ptr, b_position, key):
    """`b_x` (float32 or float64) in the narrower format behind `ptr`: one of its neighbours there, without bias.

    What is finite stays so, the rest passes as it is.
    """
    DIGITS: tl.constexpr = ptr.dtype.element_ty.fp_mantissa_width
    OUT_BIAS: tl.constexpr = ptr.dtype.element_ty.exponent_bias
    LARGEST: tl.constexpr = (2.0 - 2.0**-DIGITS) * 2.0**OUT_BIAS
    BIAS: tl.constexpr = b_x.dtype.exponent_bias
    SHIFT: tl.constexpr = b_x.dtype.fp_mantissa_width
    if b_x.dtype == tl.float64:
        b_bits = b_x.to(tl.int64, bitcast=True)
    else:
        b_bits = b_x.to(tl.int32, bitcast=True)
    # below its normal range the spacing of the format no longer shrinks
    b_exponent = tl.maximum((b_bits >> SHIFT) & (2 * BIAS + 1), BIAS + 1 - OUT_BIAS)
    # powers of two from their bits: the spacing itself may be too small, and its inverse too large, for a normal number
    b_up = ((2 * BIAS + 1 - b_exponent) << SHIFT).to(b_x.dtype, bitcast=True)
    b_down = (b_exponent << SHIFT).to(b_x.dtype, bitcast=True)
    b_step = tl.floor(b_x * b_up * 2.0 ** (DIGITS - 1) + uniform(b_position, key))
    b_rounded = tl.minimum(tl.maximum(b_step * 2.0**-DIGITS * b_down, -LARGEST), LARGEST)
    return convert(tl.where(tl.abs(b_x) < float("inf"), b_rounded, b_x), ptr)
