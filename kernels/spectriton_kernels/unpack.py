"""From the packed spectrum back to dense: `unpack_rows` gives frequency-major chunks, `unpack_planes` half spectra.

The format is the one of docs/packed-format.md. `unpack_rows` handles some tiles a program. `unpack_gradient_rows` does
the same with gradients, taken through an activation on their way. `unpack_planes` is driven by what it writes: each
program owns a block of half-spectrum positions and walks a tile of planes, so that reads follow the tile (kept
coefficients are contiguous there) and writes follow the plane, and positions whose conjugate is stored are no special
case.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl

from ._device import convert, divide, load_kept
from ._launch import Launch
from ._rounding import dequantise, words
from .configs import (
    UNPACK_GRADIENT_ROWS,
    UNPACK_PLANES,
    UNPACK_ROWS,
    Planes,
    Tiles,
    ceil_div,
    next_power_of_2,
    rows_in_turn,
)
from .pack import check_values, tile_geometry
from .spectral_activation import KINDS, derivative

# More rows one after the other save next to nothing: sums are a quarter of the bytes of a row, once for all of them.
_MOST_ROWS = 8


class Grid(Protocol):
    """What `unpack_planes` needs of a frequency grid."""

    @property
    def source(self) -> torch.Tensor:
        """`(H * Wh,)` int32: the row stored for each half-spectrum position, -1 - row where its conjugate stands."""


@triton.jit
def load_pairs(values_ptr, scales_ptr, i_tile, m_tile, start, b_rank, b_kept, DTYPE: tl.constexpr):
    """Kept coefficients as pairs (TILES, TILE, 2), 0 for others; in DTYPE for low-bit values.

    Args:
        values_ptr: values.
        scales_ptr: (F, T) float32 scales (unused for floats).
        i_tile, m_tile: (TILES,) number of each tile, row * T + tile, and which of them exist.
        start: (TILES,) where the values of each tile begin.
        b_rank: (TILES, TILE) places of its coefficients after that.
        b_kept: 1 where they are kept, else 0.
        DTYPE: float32 or float64.
    """
    m_kept = b_kept != 0
    if values_ptr.dtype.element_ty.is_floating():
        # pairs, so that each coefficient is one access
        o_part = tl.arange(0, 2)[None, None, :]
        p_pair = values_ptr + (start * 2)[:, None, None] + (b_rank[:, :, None] * 2 + o_part)
        return tl.load(p_pair, mask=m_kept[:, :, None] & (o_part < 2), other=0.0)
    else:
        b_word = tl.load(words(values_ptr) + start[:, None] + b_rank, mask=m_kept, other=0)
        scale = tl.load(scales_ptr + i_tile, mask=m_tile, other=0.0).to(DTYPE)
        # of a tile whose scale is NaN, what is not kept is zero still
        return tl.where(m_kept[:, :, None], dequantise(b_word, scale), 0.0)


@triton.jit
def unpack_rows_kernel(
    values_ptr,  # (N, 2), or (N,) for 4 bits
    scales_ptr,  # (F, T)
    bitmap_ptr,  # (F, T, TILE // 8)
    offsets_ptr,  # (F, T)
    rows_ptr,  # (Fc,)
    out_ptr,  # (Fc, Tc, TILE, 2)
    first_tile,
    chunk_tiles,
    row_tiles,
    tiles,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Writes a dense chunk.

    Args:
        values_ptr: kept coefficients.
        scales_ptr: float32 scales of low-bit values (else unused).
        bitmap_ptr: uint8 bitmap.
        offsets_ptr: int32 offsets.
        rows_ptr: int64 frequency row of each chunk row.
        out_ptr: dense chunk.
        first_tile: tile t0 of the row with which the chunk begins.
        chunk_tiles: tiles of a chunk row, Tc.
        row_tiles: tiles of a row, T.
        tiles: tiles of the chunk, Fc * Tc.
        TILE: coefficients of a tile.
        TILES: tiles a program handles.
    """
    i_first = tl.program_id(0) * TILES
    i_dense = i_first + tl.arange(0, TILES)
    m_tile = i_dense < tiles
    row = tl.load(rows_ptr + i_dense // chunk_tiles, mask=m_tile, other=0)
    i_tile = row * row_tiles + first_tile + i_dense % chunk_tiles
    b_kept = load_kept(bitmap_ptr, i_tile, m_tile, TILE)
    start = tl.load(offsets_ptr + i_tile, mask=m_tile, other=0).to(tl.int64)
    b_rank = tl.cumsum(b_kept, axis=1) - b_kept
    DTYPE: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    b_value = load_pairs(values_ptr, scales_ptr, i_tile, m_tile, start, b_rank, b_kept, DTYPE)
    # flat offsets give 128-bit stores
    o_real = tl.arange(0, TILES * 2 * TILE)
    m_real = o_real < tl.minimum(tiles - i_first, TILES) * (2 * TILE)
    b_out = tl.reshape(convert(b_value, out_ptr), [TILES * 2 * TILE])
    tl.store(out_ptr + i_first.to(tl.int64) * (2 * TILE) + o_real, b_out, mask=m_real)


@triton.jit
def unpack_gradient_rows_kernel(
    grad_ptr,  # (N, 2)
    values_ptr,  # (N, 2), or (N,) for 4 bits
    scales_ptr,  # (F, T)
    bitmap_ptr,  # (F, T, TILE // 8)
    offsets_ptr,  # (F, T)
    rows_ptr,  # (Fc,)
    scale_ptr,  # (channels,)
    out_ptr,  # (Fc, T, TILE, 2)
    partial_ptr,  # (row blocks, T, TILE)
    rows,
    row_tiles,
    channels,
    KIND: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Writes a dense chunk of gradients behind an activation as those before it; sums for the scale down the rows.

    A program walks down a column of tiles: a position of the row is one channel, so that no sum needs atomics.

    Args:
        grad_ptr: gradients of the kept coefficients, in their order.
        values_ptr: the kept coefficients, which the activation gave.
        scales_ptr: float32 scales of low-bit values (else unused).
        bitmap_ptr: uint8 bitmap.
        offsets_ptr: int32 offsets.
        rows_ptr: int64 frequency row of each chunk row.
        scale_ptr: scale s of each channel (unused without HAS_SCALE).
        out_ptr: dense chunk.
        partial_ptr: what a block of rows adds to the gradient of the scale (unused without HAS_SCALE).
        rows: rows of the chunk, Fc.
        row_tiles: tiles of a row, T.
        channels: C; the channel of a position of the row is its remainder by it.
        KIND: name of the activation.
        HAS_SCALE: whether there is a scale.
        ROWS: rows a program handles one after the other.
        TILE: coefficients of a tile.
        TILES: tiles of a row that a program handles at once.
    """
    i_program = tl.program_id(0)
    n_column_blocks = tl.cdiv(row_tiles, TILES)
    i_first = i_program % n_column_blocks * TILES
    i_row_block = i_program // n_column_blocks
    i_column = i_first + tl.arange(0, TILES)
    m_column = i_column < row_tiles
    o_real = tl.arange(0, TILES * 2 * TILE)
    m_real = o_real < tl.minimum(row_tiles - i_first, TILES) * (2 * TILE)
    DTYPE: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    if HAS_SCALE:
        o_coefficient = tl.arange(0, TILE)[None, :]
        m_coefficient = m_column[:, None] & (o_coefficient < TILE)
        i_channel = (i_column % channels * TILE % channels)[:, None] + o_coefficient
        i_channel -= divide(i_channel, channels) * channels
        b_inverse = 1.0 / tl.load(scale_ptr + i_channel, mask=m_coefficient, other=1.0).to(DTYPE)
        b_sum = tl.zeros([TILES, TILE], DTYPE)
    for i in range(ROWS):
        i_row = i_row_block * ROWS + i
        m_tile = m_column & (i_row < rows)
        row = tl.load(rows_ptr + i_row, mask=i_row < rows, other=0)
        i_tile = row * row_tiles + i_column
        b_kept = load_kept(bitmap_ptr, i_tile, m_tile, TILE)
        start = tl.load(offsets_ptr + i_tile, mask=m_tile, other=0).to(tl.int64)
        b_rank = tl.cumsum(b_kept, axis=1) - b_kept
        b_z = load_pairs(values_ptr, scales_ptr, i_tile, m_tile, start, b_rank, b_kept, DTYPE).to(DTYPE)
        b_grad = load_pairs(grad_ptr, scales_ptr, i_tile, m_tile, start, b_rank, b_kept, DTYPE).to(DTYPE)
        if HAS_SCALE:
            slope, rest = derivative(b_z * b_inverse[:, :, None], KIND)
            b_sum += tl.sum(b_grad * rest, axis=2)  # zero where nothing is kept, as the gradient is
        else:
            slope, _ = derivative(b_z, KIND)
        b_out = tl.reshape(convert(b_grad * slope, out_ptr), [TILES * 2 * TILE])
        i_dense = i_row.to(tl.int64) * row_tiles + i_first
        tl.store(out_ptr + i_dense * (2 * TILE) + o_real, b_out, mask=m_real & (i_row < rows))
    if HAS_SCALE:
        p_partial = partial_ptr + (i_row_block.to(tl.int64) * row_tiles + i_column)[:, None] * TILE + o_coefficient
        tl.store(p_partial, b_sum, mask=m_coefficient)


@triton.jit
def unpack_planes_kernel(
    values_ptr,  # (N, 2), or (N,) for 4 bits
    scales_ptr,  # (F, T)
    bitmap_ptr,  # (F, T, TILE // 8)
    offsets_ptr,  # (F, T)
    source_ptr,  # (positions,)
    row_scale_ptr,  # (F,)
    out_ptr,  # (count, positions, 2)
    first_tile,
    row_tiles,
    count,
    positions,
    HAS_ROW_SCALE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Writes half spectra, plane by plane.

    Args:
        values_ptr: kept coefficients.
        scales_ptr: float32 scales of low-bit values (else unused).
        bitmap_ptr: uint8 bitmap.
        offsets_ptr: int32 offsets.
        source_ptr: int32 row stored for each position of the half spectrum, or -1 - row where its conjugate stands.
        row_scale_ptr: factor of each row (unused without HAS_ROW_SCALE).
        out_ptr: half spectra.
        first_tile: tile t0 that holds the first plane.
        row_tiles: tiles of a row, T.
        count: planes.
        positions: positions of a half spectrum, H * Wh.
        HAS_ROW_SCALE: whether there are factors.
        TILE: coefficients of a tile.
        BLOCK_P: planes handled at once, a divisor of TILE.
        BLOCK_S: positions a program handles.
    """
    i_program = tl.program_id(0).to(tl.int64)
    n_position_blocks = tl.cdiv(positions, BLOCK_S)
    i_tile = i_program // n_position_blocks
    o_first = i_program % n_position_blocks * BLOCK_S

    o_position = o_first + tl.arange(0, BLOCK_S)
    m_position = o_position < positions
    source = tl.load(source_ptr + o_position, mask=m_position, other=0)
    row = tl.where(source < 0, -1 - source, source).to(tl.int64)
    o_tile = row * row_tiles + first_tile + i_tile
    o_value = tl.load(offsets_ptr + o_tile, mask=m_position, other=0).to(tl.int64)
    if out_ptr.dtype.element_ty == tl.float64:
        factor = tl.full([BLOCK_S], 1.0, tl.float64)
    else:
        factor = tl.full([BLOCK_S], 1.0, tl.float32)
    if HAS_ROW_SCALE:
        factor = tl.load(row_scale_ptr + row, mask=m_position, other=0.0).to(factor.dtype)
    factor_im = tl.where(source < 0, -factor, factor)

    o_real = o_first * 2 + tl.arange(0, 2 * BLOCK_S)
    m_real = o_real < 2 * positions
    o_plane = tl.arange(0, BLOCK_P)
    for i_block in range(TILE // BLOCK_P):
        # planes run along the last dimension here, which neighbouring threads share: their values are contiguous
        o_byte = i_block * (BLOCK_P // 8) + tl.arange(0, BLOCK_P // 8)
        p_byte = bitmap_ptr + o_tile[:, None] * (TILE // 8) + o_byte[None, :]
        m_byte = m_position[:, None] & (o_byte < TILE // 8)[None, :]
        b_byte = tl.load(p_byte, mask=m_byte, other=0).to(tl.int32)
        b_bits = (b_byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        b_kept = tl.reshape(b_bits, [BLOCK_S, BLOCK_P])
        b_rank = tl.cumsum(b_kept, axis=1) - b_kept
        b_pair = load_pairs(values_ptr, scales_ptr, o_tile, m_position, o_value, b_rank, b_kept, factor.dtype)
        b_re, b_im = tl.split(b_pair.to(factor.dtype))
        b_re = tl.trans(b_re * factor[:, None])
        b_im = tl.trans(b_im * factor_im[:, None])
        o_value += tl.sum(b_kept, axis=1)

        b_out = tl.reshape(tl.join(b_re, b_im), [BLOCK_P, 2 * BLOCK_S])
        i_plane = i_tile * TILE + i_block * BLOCK_P + o_plane
        p_out = out_ptr + i_plane[:, None] * (2 * positions) + o_real[None, :]
        m_out = (i_plane < count)[:, None] & m_real[None, :]
        tl.store(p_out, convert(b_out, out_ptr), mask=m_out)


def plan_unpack_rows(
    values: torch.Tensor,
    scales: torch.Tensor | None,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    t0: int,
    t1: int,
    out: torch.Tensor,
    config: Tiles | None = None,
) -> Launch:
    """The launch behind `unpack_rows`, by default in the configuration chosen for it."""
    scales = check_values(values, scales, offsets)
    assert out.is_contiguous(), "out must be contiguous"
    tile, row_tiles, chunk_tiles = tile_geometry(bitmap, out)
    assert chunk_tiles == t1 - t0 and out.shape[0] == rows.shape[0], "out must have the shape of the chunk"
    tiles = rows.shape[0] * chunk_tiles
    if config is None:
        config = UNPACK_ROWS.choose(out.device, (out.dtype, values.dtype), (tiles, tile))
    block_tiles, num_warps = config.shape(tile, out.element_size())
    args = (values, scales, bitmap, offsets, rows, out, t0, chunk_tiles, row_tiles, tiles)
    meta = {"TILE": tile, "TILES": block_tiles, "num_warps": num_warps}
    return Launch(unpack_rows_kernel, (ceil_div(tiles, block_tiles),), args, meta)


def unpack_rows(
    values: torch.Tensor,
    scales: torch.Tensor | None,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    t0: int,
    t1: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Writes all of a dense chunk: kept coefficients, zero elsewhere.

    Args:
        values: `(N, 2)` float32, float64, float16, bfloat16 or int8, or `(N,)` uint8 for 4 bits.
        scales: `(F, T)` float32 of low-bit values; else None or empty.
        bitmap: `(F, T, tile // 8)` uint8.
        offsets: `(F, T)` int32.
        rows: `(Fc,)` int64, frequency rows.
        t0, t1: range of tiles, `Tc = t1 - t0`.
        out: `(Fc, Tc * tile, 2)` contiguous, any float dtype.

    Returns:
        `out`.
    """
    plan_unpack_rows(values, scales, bitmap, offsets, rows, t0, t1, out).run()
    return out


def plan_unpack_gradient_rows(
    grad: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    kind: str,
    scale: torch.Tensor | None,
    channels: int,
    out: torch.Tensor,
    config: Tiles | None = None,
) -> tuple[Launch, torch.Tensor | None]:
    """The launch behind `unpack_gradient_rows`, by default in the configuration chosen for it.

    Returns:
        The launch, and the sums for the scale, `(row blocks, T * tile)` (None without one).
    """
    scales = check_values(values, scales, offsets)
    assert kind in KINDS, kind
    assert grad.is_contiguous() and grad.shape == (values.shape[0], 2), "a pair for each value"
    assert out.is_contiguous() and out.shape[0] == rows.shape[0], "out must have the shape of the chunk"
    tile, row_tiles, chunk_tiles = tile_geometry(bitmap, out)
    assert chunk_tiles == row_tiles, "whole rows"
    assert channels < 2**19 or scale is None, "the kernel divides by way of float32"
    count = rows.shape[0]
    if config is None:
        config = UNPACK_GRADIENT_ROWS.choose(out.device, (out.dtype, values.dtype), (count * row_tiles, tile))
    block_tiles, num_warps = config.shape_in_row(tile, out.element_size(), row_tiles)
    if scale is None:  # the derivative alone takes few registers
        num_warps = max(1, num_warps // 2)
    column_blocks = ceil_div(row_tiles, block_tiles)
    # nothing is summed without a scale; in float64 the constants of a loop would spill
    in_turn = 1 if scale is None or out.dtype == torch.float64 else rows_in_turn(count, column_blocks, _MOST_ROWS)
    row_blocks = ceil_div(count, in_turn)
    partial = None
    if scale is not None:
        partial = torch.empty(row_blocks, out.shape[1], dtype=out.dtype, device=out.device)
    args = (
        grad,
        values,
        scales,
        bitmap,
        offsets,
        rows,
        None if scale is None else scale.contiguous(),
        out,
        partial,
        count,
        row_tiles,
        channels,
    )
    meta = {
        "KIND": kind,
        "HAS_SCALE": scale is not None,
        "ROWS": in_turn,
        "TILE": tile,
        "TILES": block_tiles,
        "num_warps": num_warps,
    }
    return Launch(unpack_gradient_rows_kernel, (row_blocks * column_blocks,), args, meta), partial


def unpack_gradient_rows(
    grad: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    kind: str,
    scale: torch.Tensor | None,
    channels: int,
    out: torch.Tensor,
) -> torch.Tensor | None:
    """Writes all of a dense chunk: `grad * h'` where a coefficient is kept, zero elsewhere.

    Args:
        grad: `(N, 2)` contiguous, float32 or float64: gradients of what the activation gave.
        values: what it gave, `(N, 2)` float32, float64, float16, bfloat16 or int8, or `(N,)` uint8 for 4 bits.
        scales: `(F, T)` float32 of low-bit values; else None or empty.
        bitmap: `(F, T, tile // 8)` uint8.
        offsets: `(F, T)` int32.
        rows: `(Fc,)` int64, frequency rows.
        kind: activation `h`, one of `spectral_activation.KINDS`.
        scale: `(channels,)` scale of the activation, or None.
        channels: C; the channel of a position of the row is its remainder by it.
        out: `(Fc, T * tile, 2)` contiguous, float32 or float64.

    Returns:
        `(channels,)` gradient of the scale, None without one; bit by bit the same from run to run in one configuration.
    """
    launch, partial = plan_unpack_gradient_rows(grad, values, scales, bitmap, offsets, rows, kind, scale, channels, out)
    launch.run()
    if partial is None:
        return None
    # positions beyond the last whole set of channels are padding
    return partial[:, : partial.shape[1] // channels * channels].reshape(-1, channels).sum(0)


def plan_unpack_planes(
    values: torch.Tensor,
    scales: torch.Tensor | None,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    grid: Grid,
    t0: int,
    t1: int,
    count: int,
    row_scale: torch.Tensor | None,
    out: torch.Tensor,
    config: Planes | None = None,
) -> Launch:
    """The launch behind `unpack_planes`, by default in the configuration chosen for it."""
    scales = check_values(values, scales, offsets)
    assert out.is_contiguous() and out.shape[0] == count, "out must be contiguous and hold `count` planes"
    tile, row_tiles = bitmap.shape[2] * 8, bitmap.shape[1]
    assert count <= (t1 - t0) * tile, "more planes than the tiles hold"
    positions = out.shape[1] * out.shape[2]
    if config is None:
        config = UNPACK_PLANES.choose(out.device, (out.dtype, values.dtype), (count, positions, tile))
    block_positions = min(next_power_of_2(positions), config.positions)
    args = (
        values,
        scales,
        bitmap,
        offsets,
        grid.source,
        row_scale,
        out,
        t0,
        row_tiles,
        count,
        positions,
    )
    meta = {
        "HAS_ROW_SCALE": row_scale is not None,
        "TILE": tile,
        "BLOCK_P": min(tile, config.planes),
        "BLOCK_S": block_positions,
        "num_warps": config.num_warps,
    }
    # tiles without a plane to write need no program
    programs = ceil_div(positions, block_positions) * ceil_div(count, tile)
    return Launch(unpack_planes_kernel, (programs,), args, meta)


def unpack_planes(
    values: torch.Tensor,
    scales: torch.Tensor | None,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    grid: Grid,
    t0: int,
    t1: int,
    count: int,
    row_scale: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Writes the half spectra of the planes from `t0 * tile` on, conjugate mirror positions included.

    Args:
        values: `(N, 2)` float32, float64, float16, bfloat16 or int8, or `(N,)` uint8 for 4 bits.
        scales: `(F, T)` float32 of low-bit values; else None or empty.
        bitmap: `(F, T, tile // 8)` uint8.
        offsets: `(F, T)` int32.
        grid: frequency grid whose `source` is on the device of the data.
        t0, t1: range of tiles the planes lie in.
        count: planes, at most `(t1 - t0) * tile`.
        row_scale: `(F,)` factor of each row, or None.
        out: `(count, H, Wh, 2)` contiguous, any float dtype.

    Returns:
        `out`.
    """
    plan_unpack_planes(values, scales, bitmap, offsets, grid, t0, t1, count, row_scale, out).run()
    return out
