"""From half spectra to the packed spectrum, the ways back from `unpack_planes`: all of them as frequency-major rows
(`rows_of_half`), or what a pattern keeps (`gather_planes`).

Each program brings a block of planes and positions of the half spectrum across: reads follow the planes and writes the
rows. Positions whose conjugate is stored are read with the rest, and not written. Bytes that have to be moved: the half
spectra once, the rows or the kept coefficients once.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl

from ._device import convert
from ._launch import Launch
from .configs import GATHER_PLANES, ROWS_OF_HALF, Planes, ceil_div, next_power_of_2


class Grid(Protocol):
    """What is needed of a frequency grid."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def source(self) -> torch.Tensor:
        """`(H * Wh,)` int32: the row stored for each half-spectrum position, -1 - row where its conjugate stands."""


@triton.jit
def load_half(
    half_ptr,
    source_ptr,
    row_scale_ptr,
    i_plane,
    o_first,
    count,
    height,
    width,
    HAS_ROW_SCALE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A block of half spectra, times the factors of rows; what is its own conjugate is real.

    Args:
        half_ptr .. row_scale_ptr, count .. HAS_ROW_SCALE: as of `rows_of_half`.
        i_plane: (BLOCK_P,) int64 planes.
        o_first: first position.

    Returns:
        (real, imaginary), each (BLOCK_S, BLOCK_P), zero where there is nothing.
    """
    half_width = width // 2 + 1
    positions = height * half_width
    o_real = o_first * 2 + tl.arange(0, 2 * BLOCK_S)
    m_half = (i_plane < count)[:, None] & (o_real < 2 * positions)[None, :]
    p_half = half_ptr + i_plane[:, None] * (2 * positions) + o_real[None, :]
    b_half = tl.load(p_half, mask=m_half, other=0.0)
    b_re, b_im = tl.split(tl.reshape(b_half, [BLOCK_P, BLOCK_S, 2]))
    o_position = o_first + tl.arange(0, BLOCK_S)
    if HAS_ROW_SCALE:
        row = tl.load(source_ptr + o_position, mask=o_position < positions, other=-1)
        factor = tl.load(row_scale_ptr + row, mask=row >= 0, other=0.0).to(b_half.dtype)
        b_re *= factor[None, :]
        b_im *= factor[None, :]
    m_real = (o_position // half_width * 2 % height == 0) & (o_position % half_width * 2 % width == 0)
    return tl.trans(b_re), tl.trans(tl.where(m_real[None, :], 0.0, b_im))


@triton.jit
def count_bits(b_word):
    """How many bits of each int32 are set."""
    b_word -= (b_word >> 1) & 0x55555555
    b_word = (b_word & 0x33333333) + ((b_word >> 2) & 0x33333333)
    return (((b_word + (b_word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def rows_of_half_kernel(
    half_ptr,  # (count, height * half_width, 2)
    source_ptr,  # (height * half_width,)
    row_scale_ptr,  # (F,)
    out_ptr,  # (F, padded, 2)
    count,
    padded,
    height,
    width,
    HAS_ROW_SCALE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Writes rows, zero where there is no plane; what is its own conjugate becomes real.

    Args:
        half_ptr: half spectra.
        source_ptr: int32 row stored for each position, negative where its conjugate is stored.
        row_scale_ptr: factor of each row (unused without HAS_ROW_SCALE).
        out_ptr: rows.
        count: planes.
        padded: planes of a row.
        height, width: of the maps.
        HAS_ROW_SCALE: whether there are factors.
        BLOCK_P, BLOCK_S: planes and positions a program handles.
    """
    positions = height * (width // 2 + 1)
    i_program = tl.program_id(0).to(tl.int64)
    n_position_blocks = tl.cdiv(positions, BLOCK_S)
    first_plane = i_program // n_position_blocks * BLOCK_P
    o_first = (i_program % n_position_blocks).to(tl.int32) * BLOCK_S
    o_position = o_first + tl.arange(0, BLOCK_S)
    row = tl.load(source_ptr + o_position, mask=o_position < positions, other=-1)
    i_plane = first_plane + tl.arange(0, BLOCK_P)
    b_re, b_im = load_half(
        half_ptr, source_ptr, row_scale_ptr, i_plane, o_first, count, height, width, HAS_ROW_SCALE, BLOCK_P, BLOCK_S
    )
    b_out = tl.reshape(tl.join(b_re, b_im), [BLOCK_S, 2 * BLOCK_P])
    o_out = first_plane * 2 + tl.arange(0, 2 * BLOCK_P)
    p_out = out_ptr + row.to(tl.int64)[:, None] * (2 * padded) + o_out[None, :]
    tl.store(p_out, convert(b_out, out_ptr), mask=(row >= 0)[:, None] & (o_out < 2 * padded)[None, :])


@triton.jit
def gather_planes_kernel(
    half_ptr,  # (count, height * half_width, 2)
    source_ptr,  # (height * half_width,)
    row_scale_ptr,  # (F,)
    bitmap_ptr,  # (F, T, TILE // 8)
    offsets_ptr,  # (F, T)
    out_ptr,  # (N, 2)
    first_tile,
    row_tiles,
    count,
    height,
    width,
    HAS_ROW_SCALE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Writes what a pattern keeps; what is its own conjugate becomes real.

    Args:
        half_ptr: half spectra of the planes of some tiles.
        source_ptr, row_scale_ptr, count, height, width, HAS_ROW_SCALE: as of `rows_of_half`.
        bitmap_ptr: uint8 bitmap; nothing is kept beyond the planes.
        offsets_ptr: int32 offsets.
        out_ptr: kept coefficients.
        first_tile: tile t0 that holds the first plane.
        row_tiles: tiles of a row, T.
        TILE: coefficients of a tile.
        BLOCK_P: planes a program handles, a multiple of 32 and a divisor of TILE.
        BLOCK_S: positions a program handles.
    """
    positions = height * (width // 2 + 1)
    i_program = tl.program_id(0).to(tl.int64)
    n_position_blocks = tl.cdiv(positions, BLOCK_S)
    i_block = i_program // n_position_blocks
    i_tile, i_part = i_block // (TILE // BLOCK_P), (i_block % (TILE // BLOCK_P)).to(tl.int32)
    o_first = (i_program % n_position_blocks).to(tl.int32) * BLOCK_S
    o_position = o_first + tl.arange(0, BLOCK_S)
    row = tl.load(source_ptr + o_position, mask=o_position < positions, other=-1)
    m_stored = row >= 0
    o_tile = row.to(tl.int64) * row_tiles + first_tile + i_tile
    o_value = tl.load(offsets_ptr + o_tile, mask=m_stored, other=0).to(tl.int64)
    if BLOCK_P < TILE:
        o_word = tl.arange(0, TILE // 32)
        p_word = bitmap_ptr.to(tl.pointer_type(tl.int32)) + o_tile[:, None] * (TILE // 32) + o_word[None, :]
        m_word = m_stored[:, None] & (o_word < i_part * (BLOCK_P // 32))[None, :]
        o_value += tl.sum(count_bits(tl.load(p_word, mask=m_word, other=0)), axis=1)
    o_byte = i_part * (BLOCK_P // 8) + tl.arange(0, BLOCK_P // 8)
    p_byte = bitmap_ptr + o_tile[:, None] * (TILE // 8) + o_byte[None, :]
    m_byte = m_stored[:, None] & (o_byte < TILE // 8)[None, :]
    b_byte = tl.load(p_byte, mask=m_byte, other=0).to(tl.int32)
    b_kept = tl.reshape((b_byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, [BLOCK_S, BLOCK_P])
    b_place = o_value[:, None] + (tl.cumsum(b_kept, axis=1) - b_kept)
    i_plane = i_tile * TILE + i_part * BLOCK_P + tl.arange(0, BLOCK_P)
    b_re, b_im = load_half(
        half_ptr, source_ptr, row_scale_ptr, i_plane, o_first, count, height, width, HAS_ROW_SCALE, BLOCK_P, BLOCK_S
    )
    o_part = tl.arange(0, 2)[None, None, :]
    p_out = out_ptr + (b_place[:, :, None] * 2 + o_part)
    tl.store(p_out, convert(tl.join(b_re, b_im), out_ptr), mask=(b_kept != 0)[:, :, None] & (o_part < 2))


def plan_rows_of_half(
    half: torch.Tensor,
    grid: Grid,
    row_scale: torch.Tensor | None,
    out: torch.Tensor,
    config: Planes | None = None,
) -> Launch:
    """The launch behind `rows_of_half`, by default in the configuration chosen for it."""
    count, padded, positions = half.shape[0], out.shape[1], grid.source.numel()
    assert half.is_contiguous() and half.numel() == 2 * count * positions, "half spectra must fit the grid"
    assert out.is_contiguous() and out.shape[0] == grid.count and padded >= count, "out must hold every plane"
    if config is None:
        config = ROWS_OF_HALF.choose(out.device, (out.dtype,), (padded, positions))
    block_planes = min(next_power_of_2(padded), config.planes)
    block_positions = min(next_power_of_2(positions), config.positions)
    meta = {
        "HAS_ROW_SCALE": row_scale is not None,
        "BLOCK_P": block_planes,
        "BLOCK_S": block_positions,
        "num_warps": config.num_warps,
    }
    args = (half, grid.source, row_scale, out, count, padded, grid.height, grid.width)
    programs = ceil_div(padded, block_planes) * ceil_div(positions, block_positions)
    return Launch(rows_of_half_kernel, (programs,), args, meta)


def rows_of_half(half: torch.Tensor, grid: Grid, row_scale: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """Writes the stored frequencies of half spectra as rows.

    Args:
        half: `(n, H, Wh, 2)` contiguous, any float dtype.
        grid: frequency grid whose `source` is on the device of the data.
        row_scale: `(F,)` factor of each row, or None.
        out: `(F, padded, 2)` contiguous; zero from plane `n` on.

    Returns:
        `out`.
    """
    plan_rows_of_half(half, grid, row_scale, out).run()
    return out


def plan_gather_planes(
    half: torch.Tensor,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    grid: Grid,
    t0: int,
    row_scale: torch.Tensor | None,
    out: torch.Tensor,
    config: Planes | None = None,
) -> Launch:
    """The launch behind `gather_planes`, by default in the configuration chosen for it."""
    count, positions = half.shape[0], grid.source.numel()
    tile, row_tiles = bitmap.shape[2] * 8, bitmap.shape[1]
    assert half.is_contiguous() and half.numel() == 2 * count * positions, "half spectra must fit the grid"
    assert bitmap.is_contiguous() and offsets.is_contiguous() and out.is_contiguous(), "the pattern must be contiguous"
    assert t0 * tile + count <= row_tiles * tile, "more planes than the tiles hold"
    if config is None:
        config = GATHER_PLANES.choose(out.device, (half.dtype,), (count, positions, tile))
    block_positions = min(next_power_of_2(positions), config.positions)
    meta = {
        "HAS_ROW_SCALE": row_scale is not None,
        "TILE": tile,
        "BLOCK_P": min(tile, config.planes),
        "BLOCK_S": block_positions,
        "num_warps": config.num_warps,
    }
    args = (
        *(half, grid.source, row_scale, bitmap, offsets, out),
        *(t0, row_tiles, count, grid.height, grid.width),
    )
    programs = ceil_div(positions, block_positions) * ceil_div(count, meta["BLOCK_P"])
    return Launch(gather_planes_kernel, (programs,), args, meta)


def gather_planes(
    half: torch.Tensor,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    grid: Grid,
    t0: int,
    row_scale: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Writes the coefficients of half spectra that a pattern keeps, as `gather_rows` does of rows.

    Args:
        half: `(n, H, Wh, 2)` contiguous, any float dtype: the planes from `t0 * tile` on, whole tiles but for the last.
        bitmap: `(F, T, tile // 8)` uint8.
        offsets: `(F, T)` int32.
        grid: frequency grid whose `source` is on the device of the data.
        t0: first tile.
        row_scale: `(F,)` factor of each row, or None.
        out: `(N, 2)` contiguous, any float dtype.

    Returns:
        `out`.
    """
    plan_gather_planes(half, bitmap, offsets, grid, t0, row_scale, out).run()
    return out
