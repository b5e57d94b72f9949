"""Packed coefficients to dense chunks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spectriton.frequencies import FrequencyGrid
from spectriton.reference.pattern import (
    RowPattern,
    TileIndex,
    half_positions,
    part_positions,
    repeated,
    row_index,
    row_pattern,
)
from spectriton.reference.transform import maps_of_parts, parts_of_maps, products

# A pair of parts, seen as one element: indexing moves it as a whole.
_PAIR = {
    torch.float64: torch.complex128,
    torch.float32: torch.complex64,
    torch.float16: torch.int32,
    torch.bfloat16: torch.int32,
    torch.int8: torch.int16,
}


def take_values(values: Tensor, places: slice | Tensor) -> Tensor:
    """``values[places]`` of stored values, ``(N, 2)`` or 4-bit pairs ``(N,)``."""
    if isinstance(places, slice):
        return values[places]
    pair = _PAIR.get(values.dtype)
    if pair is None:
        return values.index_select(0, places)
    return values.view(pair).view(-1).index_select(0, places).view(values.dtype).view(-1, 2)


def put_values(values: Tensor, places: slice | Tensor, new: Tensor) -> None:
    """``values[places] = new`` of stored values, which :func:`take_values` gives back."""
    pair = _PAIR.get(values.dtype)
    if isinstance(places, slice) or pair is None:
        values[places] = new
    else:  # several times as fast as by rows of two
        values.view(pair).view(-1).scatter_(0, places, new.view(pair).view(-1))


def read_values(values: Tensor, scales: Tensor, pattern: RowPattern, tile_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``(n, 2)`` values of a pattern in precision ``dtype``; ``tile_scales`` are the scales of its tiles."""
    stored = take_values(values, pattern.slots)
    if values.dtype == torch.uint8:  # two's complement nibbles, real part low
        stored = torch.stack([(stored & 15).to(torch.int8), (stored >> 4).to(torch.int8)], dim=-1)
        stored = stored - ((stored & 8) << 1)
    stored = stored.to(dtype)
    if scales.numel():
        stored.view(-1).mul_(repeated(tile_scales.to(dtype), 2 * pattern.counts))
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


def fill_mirrors(half: Tensor, grid: FrequencyGrid) -> None:
    """Writes the conjugates of stored coefficients where half spectra ``(n, H * Wh)`` repeat them."""
    if half.device.type != "cpu":
        half[:, grid.mirror_index] = half[:, grid.index[grid.mirror_row]].conj_physical()
        return
    planes = half.view(-1, grid.height, grid.half_width).numpy()
    # They are the rows beyond the middle of the columns kx = 0 and W / 2, in the opposite order.
    for column in {0, grid.width // 2} if grid.width % 2 == 0 else {0}:
        np.conjugate(planes[:, (grid.height - 1) // 2 : 0 : -1, column], out=planes[:, grid.height // 2 + 1 :, column])


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
    every = slice(0, grid.count)
    pattern = row_pattern(bitmap, offsets, every, t0, t1, index)
    tile_scales = scales[:, t0:t1] if scales.numel() else scales
    kept = read_values(values, scales, pattern, tile_scales, out.dtype)
    if row_scale is not None:
        kept = kept * repeated(row_scale.to(kept.dtype), 2 * pattern.counts.sum(1)).view(-1, 2)
    half = torch.view_as_complex(out).view(count, -1)
    half.zero_()
    # Straight to its place in its plane: only what is kept moves, and nothing dense is transposed.
    places = half_positions(pattern, (t1 - t0) * bitmap.shape[2] * 8, grid.index, half.shape[1])
    half.view(-1).scatter_(0, places, torch.view_as_complex(kept))
    fill_mirrors(half, grid)
    return out


def unpack_maps(
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    grid: FrequencyGrid,
    t0: int,
    t1: int,
    weighted: bool,
    out: Tensor,
    index: TileIndex,
) -> None:
    """Writes the real maps ``out`` ``(n, H, W)`` of the planes from ``t0 * tile`` on, by matrix products.

    ``weighted`` counts a coefficient for its conjugate, too, where that is not stored, as ``irfft2`` does. The adjoint
    of maps to their stored coefficients does not.
    """
    count, filled = out.shape[0], slice(0, index.filled)
    by = products(grid, filled.stop, out.dtype)
    pattern = row_pattern(bitmap, offsets, filled, t0, t1, index)
    kept = read_values(values, scales, pattern, scales[filled, t0:t1] if scales.numel() else scales, out.dtype)
    if weighted:
        kept = kept * 2
    places = part_positions(pattern, (t1 - t0) * bitmap.shape[2] * 8, by.places[filled], count)
    parts = out.new_zeros(by.rows.shape[0] * by.band, count)
    parts.view(-1).scatter_(0, places, kept[:, 0])
    parts[by.band :].view(-1).scatter_(0, places, kept[:, 1])
    if weighted:
        parts[by.self_conjugate] *= 0.5
    del pattern, kept, places
    maps = out.permute(1, 2, 0)
    if maps.is_contiguous():
        maps_of_parts(parts, by, maps)
    else:
        innermost = torch.empty_like(maps, memory_format=torch.contiguous_format)
        maps_of_parts(parts, by, innermost)
        if out.is_contiguous():  # of two dimensions torch transposes blocks
            out.view(count, -1).copy_(innermost.view(-1, count).T)
        else:
            maps.copy_(innermost)


def gather_maps(
    maps: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    grid: FrequencyGrid,
    t0: int,
    t1: int,
    out: Tensor,
    index: TileIndex,
) -> None:
    """Half of the adjoint of weighted :func:`unpack_maps`: ``out`` ``(N, 2)`` gets what maps ``(n, H, W)`` give."""
    filled = slice(0, index.filled)
    by = products(grid, filled.stop, maps.dtype)
    parts = parts_of_maps(maps.permute(1, 2, 0).contiguous(), by)
    parts[by.self_conjugate] *= 0.5
    pattern = row_pattern(bitmap, offsets, filled, t0, t1, index)
    places = part_positions(pattern, (t1 - t0) * bitmap.shape[2] * 8, by.places[filled], maps.shape[0])
    target, slots = torch.view_as_complex(out), pattern.slots
    del pattern  # as large as the maps
    real, imaginary = (part.view(-1).index_select(0, places) for part in (parts, parts[by.band :]))
    del parts, places
    if isinstance(slots, slice):
        torch.complex(real, imaginary, out=target[slots])
    else:
        target.scatter_(0, slots, torch.complex(real, imaginary))
