"""From half spectra to frequency-major rows, the way back from `unpack_planes`: `rows_of_half`.

Each program brings a block of planes and positions of the half spectrum across: reads follow the planes and writes the
rows. Positions whose conjugate is stored are read with the rest, and not written. Bytes that have to be moved: the half
spectra once, the rows once.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl

from ._device import convert
from ._launch import Launch
from .configs import ROWS_OF_HALF, Planes, ceil_div, next_power_of_2


class Grid(Protocol):
    """What `rows_of_half` needs of a frequency grid."""

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
    half_width = width // 2 + 1
    positions = height * half_width
    i_program = tl.program_id(0).to(tl.int64)
    n_position_blocks = tl.cdiv(positions, BLOCK_S)
    first_plane = i_program // n_position_blocks * BLOCK_P
    o_first = (i_program % n_position_blocks).to(tl.int32) * BLOCK_S

    i_plane = first_plane + tl.arange(0, BLOCK_P)
    o_real = o_first * 2 + tl.arange(0, 2 * BLOCK_S)
    m_half = (i_plane < count)[:, None] & (o_real < 2 * positions)[None, :]
    p_half = half_ptr + i_plane[:, None] * (2 * positions) + o_real[None, :]
    b_half = tl.load(p_half, mask=m_half, other=0.0)
    b_re, b_im = tl.split(tl.reshape(b_half, [BLOCK_P, BLOCK_S, 2]))

    o_position = o_first + tl.arange(0, BLOCK_S)
    row = tl.load(source_ptr + o_position, mask=o_position < positions, other=-1)
    m_stored = row >= 0
    if HAS_ROW_SCALE:
        factor = tl.load(row_scale_ptr + row, mask=m_stored, other=0.0).to(b_half.dtype)
        b_re *= factor[None, :]
        b_im *= factor[None, :]
    m_real = (o_position // half_width * 2 % height == 0) & (o_position % half_width * 2 % width == 0)
    b_im = tl.where(m_real[None, :], 0.0, b_im)
    b_out = tl.reshape(tl.join(tl.trans(b_re), tl.trans(b_im)), [BLOCK_S, 2 * BLOCK_P])
    o_out = first_plane * 2 + tl.arange(0, 2 * BLOCK_P)
    p_out = out_ptr + row.to(tl.int64)[:, None] * (2 * padded) + o_out[None, :]
    tl.store(p_out, convert(b_out, out_ptr), mask=m_stored[:, None] & (o_out < 2 * padded)[None, :])


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
