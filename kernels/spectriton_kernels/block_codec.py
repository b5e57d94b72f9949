"""Block transform coding: maps to records of bits (`encode_blocks`) and back (`decode_blocks`).

The format is that of `spectriton.reference.block_codec`. A program handles some blocks of a *slice*: a group of
channels, or as many small groups as fill `SLICE` channels, whose basis is then block diagonal. Channels are rotated and
positions transformed by two matrix products in which blocks stand side by side, so nothing is transposed between them.
They run on tensor cores in bfloat16. Of maps in bfloat16 factors are rounded to it, with an error as that of the maps
(2^-9); else each is a sum of two parts (relative error of about 2^-16).

What the kernels take of rows stands in tables of slices, filled up to powers of two, so that loads are wide and none is
masked. The fields of four rows that follow one another have at most 32 bits: decoding takes them from two words of the
record. Encoding rotates each code to the place of its bits within a byte of the record, and gathers for each byte the
eight codes that its bits are of.

A slice begins and ends anywhere in a byte of the record. Bytes that it shares with its neighbours go to a small array
beside, from which they are added to the records.

Bytes that have to be moved a value of the maps, at `r` bits a value: `4 + r / 8` in float32 and `2 + r / 8` in
bfloat16, either way. The tables of rows (about 8 bytes a row, in encoding 12 and 2 a bit of the record) come from the
caches. Products take 256 operations a value for 64 channels and blocks of 64 positions, three times as many for
float32: 0.3 ps at the 990 TFLOP/s of an H100, on which moving four bytes takes 1.3 ps.
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch.nn import functional
from triton.language.extra import libdevice

from ._device import convert
from ._launch import Launch
from ._rounding import uniform
from .configs import DECODE_BLOCKS, ENCODE_BLOCKS, Blocks, ceil_div, next_power_of_2

#: Channels of a slice, and the most in a group.
SLICE = 64
# The least edge of a factor of a matrix product.
_LEAST = 16
# Blocks whose numbers float32 can divide.
_MANY_BLOCKS = 1 << 20
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# What is no number becomes this: finite, and so are its products.
LEAST_VALUE = tl.constexpr(-1e30)
# Added to numbers between -256 and 256, it leaves their floor in the bits from 14 on.
CELL_OFFSET = tl.constexpr(768.0)
_FLOOR_BIT = 14
# Bits of a record that are gathered at a time, over all blocks of a program.
_GATHERED = 4096


class Layout(Protocol):
    """What is needed of a layout; `spectriton.reference.block_codec.BlockLayout` tells what these are."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...
    @property
    def edges(self) -> tuple[int, int]: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def mix(self) -> int: ...
    @property
    def record(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def components(self) -> int: ...


class Plan(Protocol):
    """What is needed of a plan for all rows; `spectriton.reference.block_codec.Plan` tells what these are."""

    @property
    def change(self) -> Any: ...
    @property
    def width(self) -> torch.Tensor: ...
    @property
    def start(self) -> torch.Tensor: ...
    @property
    def deviation(self) -> torch.Tensor: ...
    @property
    def encoding(self) -> Any: ...
    @property
    def decoding(self) -> Any: ...


class EncodingTables(NamedTuple):
    """What `encode_blocks` takes of a plan; `encode_blocks_kernel` tells what all but the last are.

    Attributes:
        rates, factors, places, starts, basis, dct, bits, slices: as the kernel takes them.
        ends: `(2 * slices,)` int32, the bytes in which slices begin and end; None for a single slice.
    """

    rates: torch.Tensor
    factors: torch.Tensor
    places: torch.Tensor
    starts: torch.Tensor
    basis: torch.Tensor | None
    dct: torch.Tensor
    bits: torch.Tensor
    slices: torch.Tensor
    ends: torch.Tensor | None


class DecodingTables(NamedTuple):
    """What `decode_blocks` takes of a plan; `decode_blocks_kernel` tells what they are."""

    starts: torch.Tensor
    fields: torch.Tensor
    deviation: torch.Tensor
    basis: torch.Tensor | None
    dct: torch.Tensor


@triton.jit
def dot(b_left, b_right, b_sum):
    """`b_sum` and the product of two matrices in bfloat16, in float32."""
    if INTERPRETED:  # it would take such numbers for integers
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_sum)


@triton.jit
def product(b_left, b_left_rest, b_right, b_right_rest, PRECISE: tl.constexpr):
    """Of two matrices, each the sum of a part in bfloat16 and, given PRECISE, a rest."""
    b_sum = tl.zeros([b_left.shape[0], b_right.shape[1]], tl.float32)
    if PRECISE:
        b_sum = dot(b_left_rest, b_right, dot(b_left, b_right_rest, b_sum))
    return dot(b_left, b_right, b_sum)


@triton.jit
def parts_of(b_x):
    """Two parts in bfloat16 of a matrix of values, of which the first is a factor of its own where that will do."""
    # without this sum over one value the compiler for sm_80 makes the values anew in each warp that takes them
    b_x = tl.sum(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], 1]), axis=2)
    b_large = b_x.to(tl.bfloat16)
    return b_large, (b_x - b_large.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def exp2(b_x):
    """Powers of two; results that are no normal numbers may be 0, which saves telling them apart."""
    if INTERPRETED:
        return tl.exp2(b_x)
    else:
        return libdevice.exp2(b_x)


@triton.jit
def rotate(b_word, b_count):
    """Words (uint32) rotated up by so many bits, of which the lowest five count: a single instruction."""
    return (b_word << (b_count & 31)) | (b_word >> ((0 - b_count) & 31))


@triton.jit
def load_rows(rows_ptr, i_slice, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of a table of rows, what belongs to a slice: (BLOCK_C, 1, BLOCK_M)."""
    o_row = tl.arange(0, BLOCK_C)[:, None, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, None, :]
    return tl.load(rows_ptr + i_slice * (BLOCK_C * BLOCK_M) + o_row)


@triton.jit
def load_parts(matrix_ptr, i_slice, slices, EDGE: tl.constexpr, PRECISE: tl.constexpr):
    """Both parts of the matrix of a slice, or the first one twice: (EDGE, EDGE)."""
    p_matrix = matrix_ptr + tl.arange(0, EDGE)[:, None] * EDGE + tl.arange(0, EDGE)[None, :]
    p_matrix += i_slice * (EDGE * EDGE)
    b_matrix = tl.load(p_matrix)
    b_rest = b_matrix
    if PRECISE:
        b_rest = tl.load(p_matrix + slices * (EDGE * EDGE))
    return b_matrix, b_rest


@triton.jit
def place_blocks(
    i_block,
    down,
    across,
    per_down,
    per_across,
    EDGE_H: tl.constexpr,
    EDGE_W: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Image (1, BLOCKS, 1) and positions y and x (1, BLOCKS, BLOCK_M) of what blocks hold."""
    if MANY:
        i_row = i_block // across
        i_image = i_row // down
    else:
        # the quotient lies at least half of the inverse from any integer, which float32 resolves up to there
        i_row = ((i_block.to(tl.float32) + 0.5) * per_across).to(tl.int32)
        i_image = ((i_row.to(tl.float32) + 0.5) * per_down).to(tl.int32)
    o_p = tl.arange(0, BLOCK_M)[None, None, :]
    y = (i_row - i_image * down)[None, :, None] * EDGE_H + o_p // EDGE_W
    x = (i_block - i_row * across)[None, :, None] * EDGE_W + o_p % EDGE_W
    return i_image[None, :, None], y, x


@triton.jit
def own_channels(i_first, channels, COMPONENTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which channels of a slice there are: (BLOCK_C, 1, 1)."""
    o_channel = tl.arange(0, BLOCK_C)[:, None, None]
    m_channel = i_first + o_channel < channels
    if COMPONENTS < BLOCK_C:
        m_channel &= o_channel < COMPONENTS
    return m_channel


@triton.jit
def offsets_of(
    i_image, i_channel, y, x, stride_b, stride_c, stride_y, stride_x, WIDE: tl.constexpr, ALIGNED: tl.constexpr
):
    """Of maps, in 64 bits where they need them."""
    if WIDE:
        i_image, i_channel, y, x = i_image.to(tl.int64), i_channel.to(tl.int64), y.to(tl.int64), x.to(tl.int64)
    o_map = i_channel * stride_c + (i_image * stride_b + y * stride_y + x * stride_x)
    if ALIGNED:
        o_map = tl.multiple_of(o_map, [1, 1, 8])
    return o_map


@triton.jit
def decode_blocks_kernel(
    records_ptr,  # (N, length)
    starts_ptr,  # (slices, BLOCK_C, BLOCK_M / 4)
    fields_ptr,  # (slices, BLOCK_C, BLOCK_M)
    deviation_ptr,  # (slices, BLOCK_C, BLOCK_M)
    levels_ptr,  # (512,)
    basis_ptr,  # (2, slices, BLOCK_C, BLOCK_C)
    dct_ptr,  # (2, BLOCK_M, BLOCK_M)
    mean_ptr,  # (C,)
    scale_ptr,  # (C,)
    out_ptr,  # (B, C, height, width)
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    blocks,
    length,
    channels,
    height,
    width,
    down,
    across,
    per_down,
    per_across,
    MIX: tl.constexpr,
    COMPONENTS: tl.constexpr,
    EDGE_H: tl.constexpr,
    EDGE_W: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MANY: tl.constexpr,
    PRECISE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Writes the maps of some blocks of a slice.

    Args:
        records_ptr: uint8 records, at an address divisible by 4.
        starts_ptr: int32, where the fields of each four rows begin; 0 where there are none.
        fields_ptr: int32 of each row, times 256 the width of its field. The lowest five bits tell by how much to rotate
            the 32 bits from the start of its four for the field to end with the highest of them.
        deviation_ptr: deviation of each row, 0 of those without bits.
        levels_ptr: levels of the quantisers, those of `b` bits from `2^b` on, and 0 before.
        basis_ptr: components of the groups of each slice along the diagonal, in two parts (unused for MIX = 1).
        dct_ptr: transform of a block, in two parts.
        mean_ptr, scale_ptr: of the channels.
        out_ptr: maps, of any strides.
        stride_b, stride_c, stride_y, stride_x: these.
        blocks: of all images, N.
        length: bytes of a record.
        channels: C.
        height, width: of the maps.
        down, across: blocks of a map.
        per_down, per_across: their inverses.
        MIX: channels of a group.
        COMPONENTS: channels of a slice.
        EDGE_H, EDGE_W: of a block; M is their product.
        WHOLE: whether the maps are made of whole blocks.
        WIDE: whether offsets of maps need 64 bits.
        ALIGNED: whether a row of a block is eight values side by side that begin at a multiple of eight.
        MANY: whether the numbers of blocks exceed 2^20.
        PRECISE: whether products need more than factors in bfloat16.
        BLOCK_C, BLOCK_M: COMPONENTS and M, at least, as powers of two.
        BLOCKS: blocks that a program handles.
    """
    M: tl.constexpr = EDGE_H * EDGE_W
    i_slice = tl.program_id(1)
    i_first = i_slice * COMPONENTS
    i_block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    m_block = i_block < blocks

    # fields of four rows lie within 32 bits, and these within two words
    b_byte = i_block.to(tl.int64) * length
    b_word = b_byte >> 2
    n_words = tl.minimum(((tl.cast(blocks, tl.int64) * length + 3) >> 2) - b_word, 1 << 30).to(tl.int32)
    o_four = tl.arange(0, BLOCK_C)[:, None, None] * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)[None, None, :]
    b_start = tl.load(starts_ptr + i_slice * (BLOCK_C * BLOCK_M // 4) + o_four)
    b_start += ((b_byte & 3) * 8).to(tl.int32)[None, :, None]
    o_word = b_start >> 5
    p_word = records_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + b_word[None, :, None] + o_word
    b_low = tl.load(p_word, mask=m_block[None, :, None], other=0)
    b_high = tl.load(p_word + 1, mask=o_word + 1 < n_words[None, :, None], other=0)
    b_four = (((b_high.to(tl.uint64) << 32) | b_low) >> (b_start & 31).to(tl.uint64)).to(tl.uint32)

    o_row = tl.arange(0, BLOCK_C)[:, None, None, None] * BLOCK_M + tl.arange(0, BLOCK_M // 4)[None, None, :, None] * 4
    o_row += tl.arange(0, 4)[None, None, None, :] + i_slice * (BLOCK_C * BLOCK_M)
    b_field = tl.load(fields_ptr + o_row).to(tl.uint32, bitcast=True)
    # the field at the top of a word, and then below a one, which tells its width
    n_bits = b_field >> 8
    b_four = rotate(b_four[:, :, :, None], b_field)
    i_level = (1 << (n_bits & 31)) | ((b_four >> 1) >> (31 - (n_bits & 31)))
    b_value = tl.load(levels_ptr + i_level) * tl.load(deviation_ptr + o_row)

    if MIX > 1:
        b_value, b_rest = parts_of(tl.reshape(b_value, [BLOCK_C, BLOCKS * BLOCK_M]))
        b_basis, b_basis_rest = load_parts(basis_ptr, i_slice, tl.num_programs(1), BLOCK_C, PRECISE)
        b_value = product(b_basis, b_basis_rest, b_value, b_rest, PRECISE)
    b_value, b_rest = parts_of(tl.reshape(b_value, [BLOCK_C * BLOCKS, BLOCK_M]))
    b_dct, b_dct_rest = load_parts(dct_ptr, 0, 1, BLOCK_M, PRECISE)
    b_value = product(b_value, b_rest, b_dct, b_dct_rest, PRECISE)
    b_value = tl.reshape(b_value, [BLOCK_C, BLOCKS, BLOCK_M])

    i_channel = i_first + tl.arange(0, BLOCK_C)[:, None, None]
    m_channel = own_channels(i_first, channels, COMPONENTS, BLOCK_C)
    b_scale = tl.load(scale_ptr + i_channel, mask=m_channel, other=0.0)
    b_value = b_value * b_scale + tl.load(mean_ptr + i_channel, mask=m_channel, other=0.0)
    if out_ptr.dtype.element_ty == tl.float16:
        # what is finite stays so
        b_bound = tl.minimum(tl.maximum(b_value, -65504.0), 65504.0)
        b_value = tl.where(tl.abs(b_value) < float("inf"), b_bound, b_value)
    i_image, y, x = place_blocks(i_block, down, across, per_down, per_across, EDGE_H, EDGE_W, MANY, BLOCK_M)
    o_out = offsets_of(i_image, i_channel, y, x, stride_b, stride_c, stride_y, stride_x, WIDE, ALIGNED)
    m_image = m_block[None, :, None]
    if M < BLOCK_M:
        m_image &= (tl.arange(0, BLOCK_M) < M)[None, None, :]
    if not WHOLE:
        m_image &= (y < height) & (x < width)
    tl.store(out_ptr + o_out, convert(b_value, out_ptr), mask=m_channel & m_image)


@triton.jit
def level_of(levels_ptr, b_code, b_half):
    """Levels of codes from `-half` to `half - 1`."""
    i_level = tl.where(b_code < 0, b_code + 4 * b_half, b_code + 2 * b_half)
    return tl.load(levels_ptr + i_level, mask=b_half > 0, other=0.0)


@triton.jit
def encode_blocks_kernel(
    x_ptr,  # (B, C, height, width)
    rates_ptr,  # (slices, BLOCK_C, BLOCK_M)
    factors_ptr,  # (slices, BLOCK_C, BLOCK_M)
    places_ptr,  # (slices, BLOCK_C, BLOCK_M)
    starts_ptr,  # (slices, BLOCK_C, BLOCK_M)
    levels_ptr,  # (512,)
    basis_ptr,  # (2, slices, BLOCK_C, BLOCK_C)
    dct_ptr,  # (2, BLOCK_M, BLOCK_M)
    mean_ptr,  # (C,)
    inverse_ptr,  # (C,)
    bits_ptr,  # (8 * length,)
    slices_ptr,  # (slices + 1,)
    key_ptr,  # ()
    records_ptr,  # (N, length)
    shared_ptr,  # (N, slices, 2)
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    rate,
    blocks,
    length,
    channels,
    height,
    width,
    down,
    across,
    per_down,
    per_across,
    MIX: tl.constexpr,
    COMPONENTS: tl.constexpr,
    EDGE_H: tl.constexpr,
    EDGE_W: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MANY: tl.constexpr,
    PRECISE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Writes what some blocks of a slice put into their records.

    Args:
        x_ptr: maps, of any strides.
        rates_ptr: rate of the compander over the deviation of each row, negative, for powers of two; 0 of rows without
            bits.
        factors_ptr: factor of the compander of each row. Its lowest five bits tell by how much to rotate up a number
            that has its floor from bit 14 on, for the code to stand where it will in a byte of the record.
        places_ptr: int32 of each row, which bits its code has then, and the next ones for those of the following byte.
            As float32 it is the bound of the cells: less than their number of either sign, by less than one.
        starts_ptr: int32, where the field of each row begins (used with STOCHASTIC).
        levels_ptr: levels of the quantisers, those of `b` bits from `2^b` on (used with STOCHASTIC).
        basis_ptr: components of the groups of each slice along the diagonal, in two parts (unused for MIX = 1).
        dct_ptr: transform of a block, in two parts.
        mean_ptr, inverse_ptr: mean of the channels and the inverse of their scales.
        bits_ptr: int16 for each bit of a record, the row, counted within its slice with rows of BLOCK_M.
        slices_ptr: int32, the bit with which each slice begins, and the end.
        key_ptr: int32, key of the noise (used with STOCHASTIC).
        records_ptr: uint8 records.
        shared_ptr: uint8, what a slice has of the byte with which it begins and of that with which it ends, where these
            are not its own (used with SHARED).
        stride_b, stride_c, stride_y, stride_x: of the maps.
        rate: of the compander, for powers of two.
        blocks: of all images, N.
        length: bytes of a record.
        channels: C.
        height, width: of the maps; beyond their edges they are repeated.
        down, across: blocks of a map.
        per_down, per_across: their inverses.
        MIX: channels of a group.
        COMPONENTS: channels of a slice.
        EDGE_H, EDGE_W: of a block; M is their product.
        WHOLE: whether the maps are made of whole blocks.
        WIDE: whether offsets of maps need 64 bits.
        ALIGNED: whether a row of a block is eight values side by side that begin at a multiple of eight.
        MANY: whether the numbers of blocks exceed 2^20.
        PRECISE: whether products need more than factors in bfloat16.
        STOCHASTIC: whether noise decides between the levels on both sides of a value.
        SHARED: whether there are several slices.
        BLOCK_C, BLOCK_M: COMPONENTS and M, at least, as powers of two.
        BLOCKS: blocks that a program handles.
        BYTES: bytes of each record that are packed at a time.
    """
    M: tl.constexpr = EDGE_H * EDGE_W
    i_slice = tl.program_id(1)
    i_first = i_slice * COMPONENTS
    i_block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    m_block = i_block < blocks

    i_channel = i_first + tl.arange(0, BLOCK_C)[:, None, None]
    m_channel = own_channels(i_first, channels, COMPONENTS, BLOCK_C)
    i_image, y, x = place_blocks(i_block, down, across, per_down, per_across, EDGE_H, EDGE_W, MANY, BLOCK_M)
    if not WHOLE:
        y, x = tl.minimum(y, height - 1), tl.minimum(x, width - 1)
    o_x = offsets_of(i_image, i_channel, y, x, stride_b, stride_c, stride_y, stride_x, WIDE, ALIGNED)
    m_image = m_block[None, :, None]
    if M < BLOCK_M:
        m_image &= (tl.arange(0, BLOCK_M) < M)[None, None, :]
    b_x = tl.load(x_ptr + o_x, mask=m_channel & m_image, other=0.0).to(tl.float32)
    b_inverse = tl.load(inverse_ptr + i_channel, mask=m_channel, other=0.0)
    b_x = b_x * b_inverse - tl.load(mean_ptr + i_channel, mask=m_channel, other=0.0) * b_inverse
    # a group without a mean must not spoil the others of the slice: what is no number becomes one
    b_x = tl.where(b_x > LEAST_VALUE, b_x, LEAST_VALUE)

    if MIX > 1:
        b_x, b_rest = parts_of(tl.reshape(b_x, [BLOCK_C, BLOCKS * BLOCK_M]))
        b_basis, b_basis_rest = load_parts(basis_ptr, i_slice, tl.num_programs(1), BLOCK_C, PRECISE)
        b_x = product(tl.trans(b_basis), tl.trans(b_basis_rest), b_x, b_rest, PRECISE)
    b_x, b_rest = parts_of(tl.reshape(b_x, [BLOCK_C * BLOCKS, BLOCK_M]))
    b_dct, b_dct_rest = load_parts(dct_ptr, 0, 1, BLOCK_M, PRECISE)
    b_x = product(b_x, b_rest, tl.trans(b_dct), tl.trans(b_dct_rest), PRECISE)
    b_x = tl.reshape(b_x, [BLOCK_C, BLOCKS, BLOCK_M])

    # the compander rises with the modulus; codes below zero mirror those above
    b_rate = load_rows(rates_ptr, i_slice, BLOCK_C, BLOCK_M)
    b_factor = load_rows(factors_ptr, i_slice, BLOCK_C, BLOCK_M)
    b_place = load_rows(places_ptr, i_slice, BLOCK_C, BLOCK_M)
    b_cell = b_factor - b_factor * exp2(tl.abs(b_x) * b_rate)
    b_cell = tl.minimum(b_cell, b_place.to(tl.float32, bitcast=True))
    b_code = (b_cell + CELL_OFFSET).to(tl.int32, bitcast=True) ^ (b_x.to(tl.int32, bitcast=True) >> 31)
    if STOCHASTIC:
        b_code = b_code << 10 >> 24
        # the bound of the cells is less than their number, by less than one
        i_half = tl.where(b_rate < 0, b_place.to(tl.float32, bitcast=True).to(tl.int32) + 1, 0)
        b_scaled = b_x * b_rate * (-1.0 / rate)
        # the level of the cell, and the next one on the other side of the value
        b_here = level_of(levels_ptr, b_code, i_half)
        b_code = tl.maximum(tl.where(b_scaled < b_here, b_code - 1, b_code), -i_half)
        b_next = tl.minimum(b_code + 1, i_half - 1)
        b_below, b_above = level_of(levels_ptr, b_code, i_half), level_of(levels_ptr, b_next, i_half)
        b_share = (b_scaled - b_below) / tl.maximum(b_above - b_below, 1e-9)
        # 32 bits wrap, as they should
        b_start = load_rows(starts_ptr, i_slice, BLOCK_C, BLOCK_M)
        b_position = ((i_block * (8 * length))[None, :, None] + b_start).to(tl.uint32, bitcast=True)
        b_noise = uniform(b_position, tl.load(key_ptr).to(tl.uint32, bitcast=True))
        b_code = tl.where(b_share + b_noise >= 1.0, b_next, b_code)
        b_code = b_code << 14
    # bits stand where they will in a byte of the record, and above them those of the next byte; the highest are any
    b_code = rotate(b_code.to(tl.uint32, bitcast=True), b_factor.to(tl.uint32, bitcast=True))
    b_code &= b_place.to(tl.uint32, bitcast=True)
    b_code = tl.reshape(b_code | (b_code >> 8), [BLOCK_C * BLOCKS * BLOCK_M])

    i_begin = tl.load(slices_ptr + i_slice)
    i_end = tl.load(slices_ptr + i_slice + 1)
    o_block = tl.arange(0, BLOCKS)[None, :, None] * BLOCK_M
    p_record = records_ptr + (i_block.to(tl.int64) * length)[:, None]
    i_byte = i_begin >> 3
    while i_byte * 8 < i_end:  # no range: the interpreter of triton 3.6 takes no loaded bounds from numpy 2.4
        o_byte = i_byte + tl.arange(0, BYTES)
        o_bit = o_byte[:, None] * 8 + tl.arange(0, 8)[None, :]
        b_row = tl.load(bits_ptr + o_bit, mask=(o_byte < length)[:, None], other=0)
        # bits of a byte as far apart as they can be: a thread has them all
        b_row = tl.trans(b_row).to(tl.int32)
        if BLOCKS > 1:
            b_row = b_row // BLOCK_M * (BLOCKS * BLOCK_M) + b_row % BLOCK_M
        i_code = b_row[:, None, :] + o_block
        b_found = tl.gather(b_code, tl.reshape(i_code, [8 * BLOCKS * BYTES]), axis=0)
        b_found = tl.reshape(b_found, [8, BLOCKS, BYTES]) & (1 << tl.arange(0, 8)).to(tl.uint32)[:, None, None]
        b_byte = tl.xor_sum(b_found, axis=0)
        # bits of other slices, and those beyond the last field
        n_before, n_after = tl.maximum(i_begin - o_byte * 8, 0), tl.maximum(o_byte * 8 + 8 - i_end, 0)
        b_byte = (b_byte & ((255 >> n_after) & (255 << n_before)).to(tl.uint32)[None, :]).to(tl.uint8)
        m_byte = m_block[:, None] & (o_byte * 8 < i_end)[None, :]
        if SHARED:
            m_head = (n_before > 0)[None, :]
            m_tail = (n_after > 0)[None, :]
            n_slices = tl.num_programs(1)
            p_shared = shared_ptr + (i_block.to(tl.int64) * n_slices + i_slice)[:, None] * 2 + tl.where(m_head, 0, 1)
            tl.store(p_shared, b_byte, mask=m_byte & (m_head | m_tail))
            m_byte = m_byte & (m_head == 0) & (m_tail == 0)
        tl.store(p_record + o_byte[None, :], b_byte, mask=m_byte)
        i_byte += BYTES


def can_code(layout: Layout) -> bool:
    """Whether the kernels take maps of a layout: groups of at most `SLICE` channels, and records below 128 MiB."""
    return layout.mix <= SLICE and 8 * layout.record < 1 << 30


def slice_components(layout: Layout) -> int:
    """Channels of a slice: whole groups."""
    return min(layout.components, max(1, SLICE // layout.mix) * layout.mix)


def _block_m(layout: Layout) -> int:
    """Positions of a block, filled up."""
    return max(_LEAST, next_power_of_2(layout.edges[0] * layout.edges[1]))


def _block_c(layout: Layout) -> int:
    """Channels of a slice, filled up."""
    return max(_LEAST, next_power_of_2(slice_components(layout)))


def _aligned(layout: Layout, maps: torch.Tensor) -> bool:
    """Whether rows of blocks are eight values side by side, that begin at multiples of eight."""
    *steps, step = maps.stride()
    return step == 1 and layout.edges[1] == 8 and layout.shape[3] % 8 == 0 and all(n % 8 == 0 for n in steps)


def _shape(layout: Layout, maps: torch.Tensor, config: Blocks) -> tuple[dict[str, int], tuple[int, int]]:
    """(constants that both kernels share, grid)."""
    components, block_c = slice_components(layout), _block_c(layout)
    block_m = _block_m(layout)
    blocks, num_warps = config.shape(block_c * block_m, layout.blocks)
    meta = {
        "MIX": layout.mix,
        "COMPONENTS": components,
        "EDGE_H": layout.edges[0],
        "EDGE_W": layout.edges[1],
        "WHOLE": layout.shape[2] % layout.edges[0] == layout.shape[3] % layout.edges[1] == 0,
        "WIDE": sum((size - 1) * step for size, step in zip(maps.shape, maps.stride(), strict=True)) >= 1 << 31,
        "ALIGNED": _aligned(layout, maps),
        "MANY": layout.blocks > _MANY_BLOCKS,
        "PRECISE": maps.dtype != torch.bfloat16,
        "BLOCK_C": block_c,
        "BLOCKS": blocks,
        "BLOCK_M": block_m,
        "num_warps": num_warps,
    }
    return meta, (ceil_div(layout.blocks, blocks), ceil_div(layout.components, components))


def _sizes(layout: Layout) -> tuple[int, ...]:
    return layout.blocks, layout.components, layout.edges[0] * layout.edges[1], layout.mix


def _of_slices(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """`(rows,)` as `(slices, BLOCK_C, BLOCK_M)`, filled up with 0."""
    components, frequencies = slice_components(layout), layout.edges[0] * layout.edges[1]
    missing = -layout.components % components
    rows = functional.pad(rows.view(-1, frequencies), (0, _block_m(layout) - frequencies, 0, missing))
    rows = rows.view(-1, components, rows.shape[1])
    return functional.pad(rows, (0, 0, 0, _block_c(layout) - components))


def _parts(x: torch.Tensor) -> torch.Tensor:
    """`(2, ...)` bfloat16, the sum is `x` up to 2^-16 of it."""
    large = x.to(torch.bfloat16)
    return torch.stack([large, (x - large).to(torch.bfloat16)])


def _matrices(plan: Plan, layout: Layout) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(bases of the groups of each slice along the diagonal, transform of blocks), filled up with 0."""
    basis, dct = plan.change.basis, plan.change.dct
    missing = _block_m(layout) - dct.shape[0]
    dct = functional.pad(dct, (0, missing, 0, missing))
    if basis is None:
        return None, _parts(dct)
    groups = slice_components(layout) // layout.mix
    basis = functional.pad(basis, (0, 0, 0, 0, 0, -basis.shape[0] % groups))
    basis = basis.reshape(-1, groups, layout.mix, 1, layout.mix)
    own = torch.eye(groups, dtype=torch.bool, device=basis.device).view(groups, 1, groups, 1)
    missing = _block_c(layout) - groups * layout.mix
    basis = torch.where(own, basis, 0).reshape(-1, groups * layout.mix, groups * layout.mix)
    return _parts(functional.pad(basis, (0, missing, 0, missing))), _parts(dct)


def _numbers(layout: Layout) -> tuple[float, ...]:
    return layout.blocks, layout.record, *layout.shape[1:], *layout.grid, *(1 / n for n in layout.grid)


def plan_decode_blocks(
    records: torch.Tensor,
    layout: Layout,
    plan: Plan,
    levels: torch.Tensor,
    out: torch.Tensor,
    config: Blocks | None = None,
) -> Launch:
    """The launch behind `decode_blocks`, by default in the configuration chosen for it."""
    assert can_code(layout), "groups or records too large"
    assert records.is_contiguous() and records.shape == (layout.blocks, layout.record)
    assert out.shape == tuple(layout.shape), "out must have the shape of the layout"
    if records.storage_offset() % 4:
        records = records.clone()  # they are read by words
    if config is None:
        config = DECODE_BLOCKS.choose(out.device, (out.dtype,), _sizes(layout))
    meta, grid = _shape(layout, out, config)
    change = plan.change
    tables = plan.decoding or _decoding_tables(plan, layout)
    args = (
        records,
        tables.starts,
        tables.fields,
        tables.deviation,
        levels,
        tables.basis,
        tables.dct,
        change.mean.contiguous(),
        change.scale.contiguous(),
        out,
        *out.stride(),
        *_numbers(layout),
    )
    return Launch(decode_blocks_kernel, grid, args, meta)


def decode_blocks(
    records: torch.Tensor, layout: Layout, plan: Plan, levels: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Writes all maps of records.

    Args:
        records: `(N, L)` uint8, contiguous.
        layout: of the maps, one that `can_code` takes.
        plan: of all rows.
        levels: `(512,)` float32, levels of the quantisers of all widths.
        out: `(B, C, H, W)` of any strides, any float dtype. In float16 what is finite stays so.

    Returns:
        `out`.
    """
    plan_decode_blocks(records, layout, plan, levels, out).run()
    return out


def _encoding_tables(plan: Plan, layout: Layout, factors: torch.Tensor, rate: float) -> EncodingTables:
    frequencies = layout.edges[0] * layout.edges[1]
    slice_rows = slice_components(layout) * frequencies
    end = plan.start + plan.width
    bits = torch.arange(8 * layout.record, device=plan.start.device)
    row = torch.searchsorted(end, bits, right=True).clamp_(max=end.shape[0] - 1) % slice_rows
    row = row // frequencies * _block_m(layout) + row % frequencies
    slices = torch.cat([plan.start[::slice_rows], end[-1:]]).to(torch.int32)
    ends = None
    if slices.shape[0] > 2:
        # a slice that ends with the record has nothing to add there
        ends = (torch.stack([slices[:-1], slices[1:]], 1).flatten() >> 3).clamp_(max=layout.record - 1)
    coded = plan.width > 0
    shift = plan.start & 7
    # `2^(b-1) (1 - 2^-8)` ends in zeros
    bound = torch.exp2(plan.width.to(torch.float32) - 1).mul_(1 - 2**-8).view(torch.int32)
    places = torch.where(coded, bound.bitwise_or_((((1 << plan.width) - 1) << shift).to(torch.int32)), 0)
    rates = torch.where(coded, -rate * math.log2(math.e) / plan.deviation, 0.0)
    scaled = factors[plan.width].view(torch.int32).bitwise_and_(-32)
    scaled = scaled.bitwise_or_((32 - _FLOOR_BIT + shift).to(torch.int32)).view(torch.float32)
    return EncodingTables(
        _of_slices(rates, layout),
        _of_slices(scaled, layout),
        _of_slices(places, layout),
        _of_slices(plan.start.to(torch.int32), layout),
        *_matrices(plan, layout),
        row.to(torch.int16),
        slices,
        ends,
    )


def _decoding_tables(plan: Plan, layout: Layout) -> DecodingTables:
    start, width = _of_slices(plan.start, layout), _of_slices(plan.width, layout)
    starts, coded = start[:, :, ::4], width > 0
    first = starts.repeat_interleave(4, 2)
    fields = ((first - start - width) & 31) | (width << 8)
    starts = torch.where(coded.unflatten(2, (-1, 4)).any(3), starts, 0)
    deviation = torch.where(coded, _of_slices(plan.deviation, layout), 0.0)
    return DecodingTables(starts.to(torch.int32), fields.to(torch.int32), deviation, *_matrices(plan, layout))


def block_tables(
    plan: Plan, layout: Layout, factors: torch.Tensor, rate: float
) -> tuple[EncodingTables, DecodingTables]:
    """What `encode_blocks` and `decode_blocks` take of a plan, as its `encoding` and its `decoding`.

    Args:
        plan: of all rows.
        layout: of the maps, one that `can_code` takes.
        factors: `(9,)` float32, factors of the compander by width, 0 for none.
        rate: of the compander.
    """
    return _encoding_tables(plan, layout, factors, rate), _decoding_tables(plan, layout)


def plan_encode_blocks(
    x: torch.Tensor,
    layout: Layout,
    plan: Plan,
    levels: torch.Tensor,
    factors: torch.Tensor,
    rate: float,
    key: torch.Tensor | None,
    records: torch.Tensor,
    config: Blocks | None = None,
) -> tuple[Launch, torch.Tensor | None, torch.Tensor | None]:
    """The launch behind `encode_blocks`, by default in the configuration chosen for it.

    Returns:
        The launch, the bytes in which slices begin and end, and what is left to be added to them (None for both: there
        is a single slice).
    """
    assert can_code(layout), "groups or records too large"
    assert records.is_contiguous() and records.shape == (layout.blocks, layout.record)
    assert x.shape == tuple(layout.shape), "x must have the shape of the layout"
    if config is None:
        config = ENCODE_BLOCKS.choose(x.device, (x.dtype,), _sizes(layout))
    meta, grid = _shape(layout, x, config)
    tables = plan.encoding or _encoding_tables(plan, layout, factors, rate)
    shared = None
    if tables.ends is not None:
        shared = torch.zeros(layout.blocks, tables.slices.shape[0] - 1, 2, dtype=torch.uint8, device=x.device)
    meta |= {
        "STOCHASTIC": key is not None,
        "SHARED": shared is not None,
        "BYTES": max(1, min(next_power_of_2(layout.record), _GATHERED // 8 // meta["BLOCKS"])),
    }
    if key is not None:
        meta["num_warps"] = min(16, 4 * meta["num_warps"])  # the levels about each value take registers
    change = plan.change
    args = (
        x,
        tables.rates,
        tables.factors,
        tables.places,
        None if key is None else tables.starts,
        None if key is None else levels,
        tables.basis,
        tables.dct,
        change.mean.contiguous(),
        change.inverse.contiguous(),
        tables.bits,
        tables.slices,
        key,
        records,
        shared,
        *x.stride(),
        rate * math.log2(math.e),
        *_numbers(layout),
    )
    return Launch(encode_blocks_kernel, grid, args, meta), tables.ends, shared


def add_shared(records: torch.Tensor, ends: torch.Tensor | None, shared: torch.Tensor | None) -> None:
    """Completes records by the bytes that slices share; arguments as `plan_encode_blocks` returns them."""
    if ends is not None and shared is not None:
        records.index_add_(1, ends, shared.view(records.shape[0], -1))


def encode_blocks(
    x: torch.Tensor,
    layout: Layout,
    plan: Plan,
    levels: torch.Tensor,
    factors: torch.Tensor,
    rate: float,
    key: torch.Tensor | None,
) -> torch.Tensor:
    """The records of maps.

    Args:
        x: `(B, C, H, W)` of any strides, any float dtype.
        layout: of the maps, one that `can_code` takes.
        plan: of all rows.
        levels: `(512,)` float32, levels of the quantisers of all widths.
        factors: `(9,)` float32, factors of the compander by width, 0 for none.
        rate: of the compander.
        key: 0-dimensional int32, key of the noise; None rounds to the nearest cell.

    Returns:
        `(N, L)` uint8; bits beyond the last field are 0.
    """
    # where slices share bytes these are added to, the others written
    records = torch.zeros(layout.blocks, layout.record, dtype=torch.uint8, device=x.device)
    launch, ends, shared = plan_encode_blocks(x, layout, plan, levels, factors, rate, key, records)
    launch.run()
    add_shared(records, ends, shared)
    return records
