"""Block transform coding: maps to records of bits (`encode_blocks`) and back (`decode_blocks`).

The format is that of `spectriton.reference.block_codec`. A program handles some blocks of a *slice*: a group of
channels, or as many small groups as fill `SLICE` channels, whose basis is then block diagonal. Channels are rotated and
positions transformed by two matrix products in which blocks stand side by side, so nothing is transposed between them.
They run on tensor cores in bfloat16. Of maps in bfloat16 factors are rounded to it, with an error as that of the maps
(2^-9); else each is a sum of two parts (relative error of about 2^-16).

A slice begins and ends anywhere in a byte of the record. Bytes that it shares with its neighbours go to a small array
beside, from which they are added to the records.

Bytes that have to be moved a value of the maps, at `r` bits a value: `4 + r / 8` in float32 and `2 + r / 8` in
bfloat16, either way. The tables of rows (8 bytes a row, and in encoding 4 a bit of the record) come from the caches.
Products take 768 operations a value for 64 channels and blocks of 64 positions, three for each one of float32: 0.8 ps
at the 990 TFLOP/s of an H100, on which moving four bytes takes 1.3 ps.
"""

from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl

from ._device import convert
from ._launch import Launch
from ._rounding import uniform
from .configs import DECODE_BLOCKS, ENCODE_BLOCKS, Blocks, ceil_div, next_power_of_2

#: Channels of a slice, and the most in a group.
SLICE = 64
# The least edge of a factor of a matrix product.
_LEAST = 16
# Bits of a field are told in four bits beside where it begins.
_WIDTH_BITS = 4
# Factors of products as sums of two bfloat16 parts; the interpreter knows no such thing, and computes in float32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PRECISION = tl.constexpr("ieee" if INTERPRETED else "bf16x3")
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
    """What `encode_blocks` takes of a plan; `encode_blocks_kernel` tells what the first four are.

    Attributes:
        fields, rates, bits, slices: as the kernel takes them.
        ends: `(2 * slices,)` int32, the bytes in which slices begin and end; None for a single slice.
    """

    fields: torch.Tensor
    rates: torch.Tensor
    bits: torch.Tensor
    slices: torch.Tensor
    ends: torch.Tensor | None


class DecodingTables(NamedTuple):
    """What `decode_blocks` takes of a plan; `decode_blocks_kernel` tells what they are."""

    fields: torch.Tensor
    deviation: torch.Tensor


@triton.jit
def product(b_left, b_right, PRECISE: tl.constexpr):
    """Of two matrices, in float32."""
    if PRECISE:
        return tl.dot(b_left, b_right, input_precision=PRECISION)
    b_left, b_right = b_left.to(tl.bfloat16), b_right.to(tl.bfloat16)
    if INTERPRETED:  # it would take such numbers for integers
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    return tl.dot(b_left, b_right)


@triton.jit
def load_rows(
    fields_ptr, factor_ptr, i_first, components, BLOCK_C: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr
):
    """(start, width, factor) of the rows of some components, (BLOCK_C, 1, BLOCK_M); 0 where there is none."""
    i_component = i_first + tl.arange(0, BLOCK_C)[:, None, None]
    o_m = tl.arange(0, BLOCK_M)[None, None, :]
    i_row = i_component * M + o_m
    b_field = tl.load(fields_ptr + i_row, mask=(i_component < components) & (o_m < M), other=0)
    width = b_field & 15
    return b_field >> 4, width, tl.load(factor_ptr + i_row, mask=width > 0, other=0.0)


@triton.jit
def load_basis(basis_ptr, i_first, components, MIX: tl.constexpr, BLOCK_C: tl.constexpr):
    """Components in the columns, (BLOCK_C, BLOCK_C): those of the groups of a slice along the diagonal."""
    o_channel = tl.arange(0, BLOCK_C)[:, None]
    o_component = tl.arange(0, BLOCK_C)[None, :]
    p_basis = basis_ptr + (i_first + o_channel) * MIX + o_component % MIX
    m_basis = (o_channel // MIX == o_component // MIX) & (i_first + o_channel < components)
    return tl.load(p_basis, mask=m_basis & (i_first + o_component < components), other=0.0)


@triton.jit
def load_dct(dct_ptr, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """Frequencies down, positions across: (BLOCK_M, BLOCK_M)."""
    o_m = tl.arange(0, BLOCK_M)[:, None]
    o_p = tl.arange(0, BLOCK_M)[None, :]
    return tl.load(dct_ptr + o_m * M + o_p, mask=(o_m < M) & (o_p < M), other=0.0)


@triton.jit
def place_blocks(i_block, down, across, EDGE_H: tl.constexpr, EDGE_W: tl.constexpr, BLOCK_M: tl.constexpr):
    """Image (1, BLOCKS, 1) and positions y and x (1, BLOCKS, BLOCK_M) of what blocks hold."""
    o_p = tl.arange(0, BLOCK_M)[None, None, :]
    i_row = i_block // across
    y = (i_row % down)[None, :, None] * EDGE_H + o_p // EDGE_W
    x = (i_block % across)[None, :, None] * EDGE_W + o_p % EDGE_W
    return (i_row // down)[None, :, None], y, x


@triton.jit
def offsets_of(i_image, i_channel, y, x, stride_b, stride_c, stride_y, stride_x, WIDE: tl.constexpr):
    """Of maps, in 64 bits where they need them."""
    if WIDE:
        i_image, i_channel, y, x = i_image.to(tl.int64), i_channel.to(tl.int64), y.to(tl.int64), x.to(tl.int64)
    return i_channel * stride_c + (i_image * stride_b + y * stride_y + x * stride_x)


@triton.jit
def decode_blocks_kernel(
    records_ptr,  # (N, length)
    fields_ptr,  # (components * M,)
    deviation_ptr,  # (components * M,)
    levels_ptr,  # (512,)
    basis_ptr,  # (components, MIX)
    dct_ptr,  # (M, M)
    mean_ptr,  # (C,)
    scale_ptr,  # (C,)
    out_ptr,  # (B, C, height, width)
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    blocks,
    length,
    components,
    channels,
    height,
    width,
    down,
    across,
    MIX: tl.constexpr,
    COMPONENTS: tl.constexpr,
    EDGE_H: tl.constexpr,
    EDGE_W: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Writes the maps of some blocks of a slice.

    Args:
        records_ptr: uint8 records.
        fields_ptr: int32, where the field of each row begins, shifted by 4 bits, and its width.
        deviation_ptr: deviation of each row.
        levels_ptr: levels of the quantisers, those of `b` bits from `2^b` on.
        basis_ptr: components of all groups (unused for MIX = 1).
        dct_ptr: transform of a block.
        mean_ptr, scale_ptr: of the channels.
        out_ptr: maps, of any strides.
        stride_b, stride_c, stride_y, stride_x: these.
        blocks: of all images, N.
        length: bytes of a record.
        components: channels, those that fill up the last group included.
        channels: C.
        height, width: of the maps.
        down, across: blocks of a map.
        MIX: channels of a group.
        COMPONENTS: channels of a slice.
        EDGE_H, EDGE_W: of a block; M is their product.
        WIDE: whether offsets of maps need 64 bits.
        PRECISE: whether products need more than factors in bfloat16.
        BLOCK_C, BLOCK_M: COMPONENTS and M, at least, as powers of two.
        BLOCKS: blocks that a program handles.
    """
    M: tl.constexpr = EDGE_H * EDGE_W
    n_tiles = tl.cdiv(blocks, BLOCKS)
    i_first = tl.program_id(0) // n_tiles * COMPONENTS
    i_first_block = tl.program_id(0) % n_tiles * BLOCKS
    i_block = i_first_block + tl.arange(0, BLOCKS)
    n_left = tl.minimum(components, i_first + COMPONENTS)

    start, n_bits, b_deviation = load_rows(fields_ptr, deviation_ptr, i_first, n_left, BLOCK_C, M, BLOCK_M)
    p_byte = records_ptr + i_first_block.to(tl.int64) * length
    p_byte += (tl.arange(0, BLOCKS) * length)[None, :, None] + (start >> 3)
    m_field = (n_bits > 0) & (i_block < blocks)[None, :, None]
    b_low = tl.load(p_byte, mask=m_field, other=0).to(tl.int32)
    # a field of up to eight bits lies within two bytes
    b_high = tl.load(p_byte + 1, mask=m_field & ((start & 7) + n_bits > 8), other=0).to(tl.int32)
    b_code = (((b_high << 8) | b_low) >> (start & 7)) & ((1 << n_bits) - 1)
    b_value = tl.load(levels_ptr + (1 << n_bits) + b_code, mask=m_field, other=0.0) * b_deviation

    b_value = tl.reshape(b_value, [BLOCK_C * BLOCKS, BLOCK_M])
    b_value = product(b_value, load_dct(dct_ptr, M, BLOCK_M), PRECISE)
    b_value = tl.reshape(b_value, [BLOCK_C, BLOCKS * BLOCK_M])
    if MIX > 1:
        b_basis = load_basis(basis_ptr, i_first, n_left, MIX, BLOCK_C)
        b_value = product(b_basis, b_value, PRECISE)
    b_value = tl.reshape(b_value, [BLOCK_C, BLOCKS, BLOCK_M])

    i_channel = i_first + tl.arange(0, BLOCK_C)[:, None, None]
    m_channel = i_channel < tl.minimum(n_left, channels)
    b_scale = tl.load(scale_ptr + i_channel, mask=m_channel, other=0.0)
    b_value = b_value * b_scale + tl.load(mean_ptr + i_channel, mask=m_channel, other=0.0)
    if out_ptr.dtype.element_ty == tl.float16:
        # what is finite stays so
        b_bound = tl.minimum(tl.maximum(b_value, -65504.0), 65504.0)
        b_value = tl.where(tl.abs(b_value) < float("inf"), b_bound, b_value)
    i_image, y, x = place_blocks(i_block, down, across, EDGE_H, EDGE_W, BLOCK_M)
    o_out = offsets_of(i_image, i_channel, y, x, stride_b, stride_c, stride_y, stride_x, WIDE)
    m_image = (
        (i_block < blocks)[None, :, None] & (tl.arange(0, BLOCK_M) < M)[None, None, :] & (y < height) & (x < width)
    )
    tl.store(out_ptr + o_out, convert(b_value, out_ptr), mask=m_channel & m_image)


@triton.jit
def level_of(levels_ptr, b_code, b_half, m_row):
    """Levels of codes from `-half` to `half - 1`."""
    return tl.load(levels_ptr + tl.where(b_code < 0, b_code + 4 * b_half, b_code + 2 * b_half), mask=m_row, other=0.0)


@triton.jit
def encode_blocks_kernel(
    x_ptr,  # (B, C, height, width)
    fields_ptr,  # (components * M,)
    rates_ptr,  # (components * M,)
    factors_ptr,  # (9,)
    levels_ptr,  # (512,)
    basis_ptr,  # (components, MIX)
    dct_ptr,  # (M, M)
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
    components,
    channels,
    height,
    width,
    down,
    across,
    MIX: tl.constexpr,
    COMPONENTS: tl.constexpr,
    EDGE_H: tl.constexpr,
    EDGE_W: tl.constexpr,
    WIDE: tl.constexpr,
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
        fields_ptr: int32, where the field of each row begins, shifted by 4 bits, and its width.
        rates_ptr: rate of the compander over the deviation of each row.
        factors_ptr: of the compander, by width.
        levels_ptr: levels of the quantisers, those of `b` bits from `2^b` on (used with STOCHASTIC).
        basis_ptr: components of all groups (unused for MIX = 1).
        dct_ptr: transform of a block.
        mean_ptr, inverse_ptr: mean of the channels and the inverse of their scales.
        bits_ptr: int32 for each bit of a record: the row, counted within its slice with rows of BLOCK_M, times 8, and
            which bit of its code; -1 for none.
        slices_ptr: int32, the bit with which each slice begins, and the end.
        key_ptr: int32, key of the noise (used with STOCHASTIC).
        records_ptr: uint8 records.
        shared_ptr: uint8, what a slice has of the byte with which it begins and of that with which it ends, where these
            are not its own (used with SHARED).
        stride_b, stride_c, stride_y, stride_x: of the maps.
        rate: of the compander.
        blocks: of all images, N.
        length: bytes of a record.
        components: channels, those that fill up the last group included.
        channels: C.
        height, width: of the maps; beyond their edges they are repeated.
        down, across: blocks of a map.
        MIX: channels of a group.
        COMPONENTS: channels of a slice.
        EDGE_H, EDGE_W: of a block; M is their product.
        WIDE: whether offsets of maps need 64 bits.
        PRECISE: whether products need more than factors in bfloat16.
        STOCHASTIC: whether noise decides between the levels on both sides of a value.
        SHARED: whether there are several slices.
        BLOCK_C, BLOCK_M: COMPONENTS and M, at least, as powers of two.
        BLOCKS: blocks that a program handles.
        BYTES: bytes of each record that are packed at a time.
    """
    M: tl.constexpr = EDGE_H * EDGE_W
    n_tiles = tl.cdiv(blocks, BLOCKS)
    i_slice = tl.program_id(0) // n_tiles
    i_first = i_slice * COMPONENTS
    i_block = tl.program_id(0) % n_tiles * BLOCKS + tl.arange(0, BLOCKS)
    n_left = tl.minimum(components, i_first + COMPONENTS)

    i_channel = i_first + tl.arange(0, BLOCK_C)[:, None, None]
    m_channel = i_channel < tl.minimum(n_left, channels)
    i_image, y, x = place_blocks(i_block, down, across, EDGE_H, EDGE_W, BLOCK_M)
    y, x = tl.minimum(y, height - 1), tl.minimum(x, width - 1)
    o_x = offsets_of(i_image, i_channel, y, x, stride_b, stride_c, stride_y, stride_x, WIDE)
    m_image = (i_block < blocks)[None, :, None] & (tl.arange(0, BLOCK_M) < M)[None, None, :]
    b_x = tl.load(x_ptr + o_x, mask=m_channel & m_image, other=0.0).to(tl.float32)
    b_x -= tl.load(mean_ptr + i_channel, mask=m_channel, other=0.0)
    b_x *= tl.load(inverse_ptr + i_channel, mask=m_channel, other=0.0)
    # a group without a mean must not spoil the others of the slice
    b_x = tl.where(b_x == b_x, b_x, 0.0)

    b_x = tl.reshape(b_x, [BLOCK_C * BLOCKS, BLOCK_M])
    b_x = product(b_x, tl.trans(load_dct(dct_ptr, M, BLOCK_M)), PRECISE)
    b_x = tl.reshape(b_x, [BLOCK_C, BLOCKS * BLOCK_M])
    if MIX > 1:
        b_basis = load_basis(basis_ptr, i_first, n_left, MIX, BLOCK_C)
        b_x = product(tl.trans(b_basis), b_x, PRECISE)
    b_x = tl.reshape(b_x, [BLOCK_C, BLOCKS, BLOCK_M])

    start, n_bits, b_rate = load_rows(fields_ptr, rates_ptr, i_first, n_left, BLOCK_C, M, BLOCK_M)
    b_factor = tl.load(factors_ptr + n_bits)
    b_half = (1 << n_bits) >> 1
    # the compander rises with the modulus; codes below zero mirror those above
    b_x *= b_rate
    b_cell = ((1.0 - tl.exp(-tl.abs(b_x))) * b_factor).to(tl.int32)
    b_cell = tl.minimum(tl.maximum(b_cell, 0), tl.maximum(b_half - 1, 0))
    b_code = tl.where(b_x < 0, -1 - b_cell, b_cell)
    if STOCHASTIC:
        m_row = (n_bits > 0) & (i_block < blocks)[None, :, None]
        b_scaled = b_x * (1.0 / rate)
        # the level of the cell, and the next one on the other side of the value
        b_here = level_of(levels_ptr, b_code, b_half, m_row)
        b_code = tl.maximum(tl.where(b_scaled < b_here, b_code - 1, b_code), -b_half)
        b_next = tl.minimum(b_code + 1, b_half - 1)
        b_below, b_above = level_of(levels_ptr, b_code, b_half, m_row), level_of(levels_ptr, b_next, b_half, m_row)
        b_share = (b_scaled - b_below) / tl.maximum(b_above - b_below, 1e-9)
        # 32 bits wrap, as they should
        b_position = ((i_block * (8 * length))[None, :, None] + start).to(tl.uint32, bitcast=True)
        b_noise = uniform(b_position, tl.load(key_ptr).to(tl.uint32, bitcast=True))
        b_code = tl.where(b_share + b_noise >= 1.0, b_next, b_code)
    b_code = tl.reshape((b_code & 255).to(tl.uint8), [BLOCK_C * BLOCKS * BLOCK_M])

    i_begin = tl.load(slices_ptr + i_slice)
    i_end = tl.load(slices_ptr + i_slice + 1)
    o_block = tl.arange(0, BLOCKS)[:, None]
    p_record = records_ptr + (i_block.to(tl.int64) * length)[:, None]
    i_byte = i_begin >> 3
    while i_byte * 8 < i_end:  # no range: the interpreter of triton 3.6 takes no loaded bounds from numpy 2.4
        o_byte = i_byte + tl.arange(0, BYTES)
        o_bit = o_byte[:, None] * 8 + tl.arange(0, 8)[None, :]
        b_bit = tl.load(bits_ptr + o_bit, mask=(o_bit >= i_begin) & (o_bit < i_end), other=-1)
        m_bit = b_bit >= 0
        i_row = tl.where(m_bit, b_bit >> 3, 0)[None, :, :]
        i_code = i_row // BLOCK_M * (BLOCKS * BLOCK_M) + o_block[:, :, None] * BLOCK_M + i_row % BLOCK_M
        b_found = tl.gather(b_code, tl.reshape(i_code, [BLOCKS * BYTES * 8]), axis=0).to(tl.int32)
        b_found = (tl.reshape(b_found, [BLOCKS, BYTES, 8]) >> (b_bit & 7)[None, :, :]) & m_bit[None, :, :].to(tl.int32)
        b_byte = tl.sum(b_found << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)
        m_byte = (i_block < blocks)[:, None] & (o_byte * 8 < i_end)[None, :]
        if SHARED:
            m_head = (o_byte * 8 < i_begin)[None, :]
            m_tail = (o_byte * 8 + 8 > i_end)[None, :]
            n_slices = tl.num_programs(0) // n_tiles
            p_shared = shared_ptr + (i_block.to(tl.int64) * n_slices + i_slice)[:, None] * 2 + tl.where(m_head, 0, 1)
            tl.store(p_shared, b_byte, mask=m_byte & (m_head | m_tail))
            m_byte = m_byte & (m_head == 0) & (m_tail == 0)
        tl.store(p_record + o_byte[None, :], b_byte, mask=m_byte)
        i_byte += BYTES


def can_code(layout: Layout) -> bool:
    """Whether the kernels take maps of a layout: groups of at most `SLICE` channels, and records below 16 MiB."""
    return layout.mix <= SLICE and 8 * layout.record < 1 << (31 - _WIDTH_BITS)


def slice_components(layout: Layout) -> int:
    """Channels of a slice: whole groups."""
    return min(layout.components, max(1, SLICE // layout.mix) * layout.mix)


def _block_m(layout: Layout) -> int:
    """Positions of a block, filled up."""
    return max(_LEAST, next_power_of_2(layout.edges[0] * layout.edges[1]))


def _shape(layout: Layout, maps: torch.Tensor, config: Blocks) -> tuple[dict[str, int], int]:
    """(constants that both kernels share, programs)."""
    components = slice_components(layout)
    block_c = max(_LEAST, next_power_of_2(components))
    frequencies = layout.edges[0] * layout.edges[1]
    block_m = _block_m(layout)
    blocks, num_warps = config.shape(block_c * block_m, layout.blocks, filled_up=frequencies < block_m)
    meta = {
        "MIX": layout.mix,
        "COMPONENTS": components,
        "EDGE_H": layout.edges[0],
        "EDGE_W": layout.edges[1],
        "WIDE": sum((size - 1) * step for size, step in zip(maps.shape, maps.stride(), strict=True)) >= 1 << 31,
        "PRECISE": maps.dtype != torch.bfloat16,
        "BLOCK_C": block_c,
        "BLOCKS": blocks,
        "BLOCK_M": block_m,
        "num_warps": num_warps,
    }
    return meta, ceil_div(layout.components, components) * ceil_div(layout.blocks, blocks)


def _sizes(layout: Layout) -> tuple[int, ...]:
    return layout.blocks, layout.components, layout.edges[0] * layout.edges[1], layout.mix


def _fields(plan: Plan) -> torch.Tensor:
    return ((plan.start << _WIDTH_BITS) | plan.width).to(torch.int32)


def _numbers(layout: Layout) -> tuple[int, ...]:
    return layout.blocks, layout.record, layout.components, *layout.shape[1:], *layout.grid


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
    if config is None:
        config = DECODE_BLOCKS.choose(out.device, (out.dtype,), _sizes(layout))
    meta, programs = _shape(layout, out, config)
    change = plan.change
    tables = plan.decoding or DecodingTables(_fields(plan), plan.deviation)
    args = (
        records,
        tables.fields,
        tables.deviation,
        levels,
        None if change.basis is None else change.basis.contiguous(),
        change.dct,
        change.mean.contiguous(),
        change.scale.contiguous(),
        out,
        *out.stride(),
        *_numbers(layout),
    )
    return Launch(decode_blocks_kernel, (programs,), args, meta)


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


def _encoding_tables(plan: Plan, layout: Layout, rate: float) -> EncodingTables:
    frequencies = layout.edges[0] * layout.edges[1]
    slice_rows = slice_components(layout) * frequencies
    bits = torch.arange(8 * layout.record, device=plan.start.device)
    end = plan.start + plan.width
    row = torch.searchsorted(end, bits, right=True).clamp_(max=end.shape[0] - 1)
    place = bits - plan.start[row]
    local = row % slice_rows
    entry = (local // frequencies * _block_m(layout) + local % frequencies) * 8 + place
    entry = torch.where(place < plan.width[row], entry, -1).to(torch.int32)
    slices = torch.cat([plan.start[::slice_rows], plan.start.new_full((1,), 8 * layout.record)]).to(torch.int32)
    ends = None
    if slices.shape[0] > 2:
        # a slice that ends with the record has nothing to add there
        ends = (torch.stack([slices[:-1], slices[1:]], 1).flatten() >> 3).clamp_(max=layout.record - 1)
    return EncodingTables(_fields(plan), rate / plan.deviation, entry, slices, ends)


def block_tables(plan: Plan, layout: Layout, rate: float) -> tuple[EncodingTables, DecodingTables]:
    """What `encode_blocks` and `decode_blocks` take of a plan, as its `encoding` and its `decoding`.

    Args:
        plan: of all rows.
        layout: of the maps, one that `can_code` takes.
        rate: of the compander.
    """
    encoding = _encoding_tables(plan, layout, rate)
    return encoding, DecodingTables(encoding.fields, plan.deviation)


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
    meta, programs = _shape(layout, x, config)
    tables = plan.encoding or _encoding_tables(plan, layout, rate)
    shared = None
    if tables.ends is not None:
        shared = torch.zeros(layout.blocks, tables.slices.shape[0] - 1, 2, dtype=torch.uint8, device=x.device)
    meta |= {
        "STOCHASTIC": key is not None,
        "SHARED": shared is not None,
        "BYTES": max(1, min(next_power_of_2(layout.record), _GATHERED // 8 // meta["BLOCKS"])),
    }
    change = plan.change
    args = (
        x,
        tables.fields,
        tables.rates,
        factors,
        levels,
        None if change.basis is None else change.basis.contiguous(),
        change.dct,
        change.mean.contiguous(),
        change.inverse.contiguous(),
        tables.bits,
        tables.slices,
        key,
        records,
        shared,
        *x.stride(),
        rate,
        *_numbers(layout),
    )
    return Launch(encode_blocks_kernel, (programs,), args, meta), tables.ends, shared


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
