"""Packed coefficients to dense chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from spectriton.frequencies import FrequencyGrid
from spectriton.reference.pattern import RowPattern, TileIndex, row_index, row_pattern
from spectriton.reference.transform import spread_rows


def read_values(values: Tensor, scales: Tensor, pattern: RowPattern, tile_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``(n, 2)`` values of a pattern in precision ``dtype``; ``tile_scales`` are the scales of its tiles."""
    stored = values[pattern.slots]
    if values.dtype == torch.uint8:  # two's complement nibbles, real part low
        stored = torch.stack([(stored & 15).to(torch.int8), (stored >> 4).to(torch.int8)], dim=-1)
        stored = stored - ((stored & 8) << 1)
    stored = stored.to(dtype)
    if scales.numel():
        stored *= torch.repeat_interleave(tile_scales.flatten().to(dtype), pattern.counts.flatten())[:, None]
    return stored


def unpack_rows(
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    rows: slice | Tensor,
    t0: int,
    t1: int,
    out: Tensor,
    pattern: RowPattern | None = None,
) -> Tensor:
    """Writes all of ``out`` ``(Fc, Tc * tile, 2)``: the kept coefficients of ``rows`` and tiles ``t0:t1``, else zero.

    ``pattern`` saves reading the bitmap again where the caller has it.
    """
    if pattern is None:
        pattern = row_pattern(bitmap, offsets, rows, t0, t1)
    tile_scales = scales[row_index(rows), t0:t1] if scales.numel() else scales
    kept = read_values(values, scales, pattern, tile_scales, out.dtype)
    flat = torch.view_as_complex(out).view(-1)
    flat.zero_()
    # A pair moves as one element; scatter_ is the quickest of torch's indexed writes.
    flat.scatter_(0, pattern.positions, torch.view_as_complex(kept))
    return out


def unpack_planes(
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    grid: FrequencyGrid,
    t0: int,
    t1: int,
    count: int,
    row_scale: Tensor | None,
    out: Tensor,
    index: TileIndex | None = None,
) -> Tensor:
    """Writes ``out`` ``(count, H, Wh, 2)``: the half spectra of the planes from ``t0 * tile`` on, mirrors filled in.

    ``row_scale`` ``(F,)``, where given, multiplies each frequency.
    """
    rows = out.new_empty(grid.count, (t1 - t0) * bitmap.shape[2] * 8, 2)
    every = slice(0, grid.count)
    unpack_rows(
        values, scales, bitmap, offsets, every, t0, t1, rows, row_pattern(bitmap, offsets, every, t0, t1, index)
    )
    if row_scale is not None:
        rows *= row_scale.to(rows.dtype)[:, None, None]
    spread_rows(torch.view_as_complex(rows[:, :count]), grid, torch.view_as_complex(out))
    return out
