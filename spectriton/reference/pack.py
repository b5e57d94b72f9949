"""Dense chunks to packed coefficients: threshold compaction, and applying an existing pattern."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spectriton.frequencies import FrequencyGrid
from spectriton.reference.pattern import (
    RowPattern,
    half_positions,
    per_row,
    row_index,
    row_pattern,
    tile_counts,
    to_bits,
    true_positions,
    within_row,
)
from spectriton.reference.spectral_activation import activate


def modulus(y: Tensor) -> Tensor:
    """``|y|`` of interleaved pairs ``(..., 2)``."""
    pairs = torch.view_as_complex(y)
    if y.device.type == "cpu":
        return torch.from_numpy(np.abs(pairs.numpy()))
    return pairs.abs()


def pack_rows(
    y: Tensor,
    length: int,
    threshold: float | Tensor,
    rows: Tensor,
    t0: int,
    bitmap: Tensor,
    offsets: Tensor,
    values: Tensor,
    cursor: Tensor,
    kind: str = "identity",
    scale: Tensor | None = None,
    channels: int = 1,
    scales: Tensor | None = None,
) -> None:
    """Threshold, activate and compact a dense chunk.

    Args:
        y: ``(Fc, Tc * tile, 2)`` coefficients.
        length: row length ``R``; what lies beyond is padding.
        threshold: coefficients whose modulus is below it are dropped; a number, or ``(channels,)``.
        rows: ``(Fc,)`` int64 frequencies. Row 0, the zero frequency, is kept whole.
        t0: first tile of the chunk.
        bitmap: ``(F, T, tile / 8)``; written at ``rows`` and the chunk's tiles.
        offsets: ``(F, T)``; likewise.
        values: kept coefficients are appended here from ``cursor`` on. Where they do not fit, none is written.
        cursor: ``(1,)`` int64, advanced by the number kept, whether or not they fitted.
        kind: activation of the kept coefficients.
        scale: ``(channels,)`` scale of the activation.
        channels: channel = position in the row modulo ``channels``.
        scales: ``(F, T)``, for integer values: written at ``rows`` and the chunk's tiles.
    """
    chunk, padded = y.shape[:2]
    start = t0 * bitmap.shape[2] * 8

    def across(per_channel: Tensor) -> Tensor:
        """Per channel to per position of a row."""
        return per_channel[torch.arange(start, start + padded, device=y.device) % channels].to(y.dtype)

    size = modulus(y)
    mask = size < (across(threshold) if isinstance(threshold, Tensor) else threshold)
    torch.logical_not(mask, out=mask)  # not below, rather than above or equal: NaN stays
    if chunk and int(rows[0]) == 0:
        mask[0] = True
    if start + padded > length:
        mask[:, max(0, length - start) :] = False
    pattern = _mark(mask, rows, t0, bitmap, offsets, cursor)
    kept = torch.view_as_real(torch.view_as_complex(y).view(-1).index_select(0, pattern.positions))
    if kind != "identity":
        of_kept = None
        if scale is not None:
            of_kept = across(scale).index_select(0, within_row(pattern, chunk, padded))[:, None]
        kept = activate(kept, kind, of_kept)
    _store(kept, pattern, rows, t0, values, cursor, scales)


def pack_planes(
    half: Tensor,
    grid: FrequencyGrid,
    threshold: float,
    t0: int,
    bitmap: Tensor,
    offsets: Tensor,
    values: Tensor,
    cursor: Tensor,
    scales: Tensor | None = None,
) -> None:
    """:func:`pack_rows` over all frequencies of a chunk of planes, from their half spectra ``half`` ``(n, H, Wh)``.

    The chunk ends with a tile or with the last plane. What is kept is read straight from ``half``: only the mask is
    transposed.
    """
    count = half.shape[0]
    tile = bitmap.shape[2] * 8
    padded = -(-count // tile) * tile
    flat = half.reshape(count, -1)
    below = modulus(torch.view_as_real(flat)) < threshold
    mask = torch.zeros(grid.count, padded, dtype=torch.bool, device=half.device)
    torch.logical_not(below.T.contiguous().index_select(0, grid.index), out=mask[:, :count])
    mask[0, :count] = True
    pattern = _mark(mask, None, t0, bitmap, offsets, cursor)
    places = half_positions(pattern, padded, grid.index, flat.shape[1])
    kept = torch.view_as_real(flat.view(-1).index_select(0, places))
    _store(kept, pattern, None, t0, values, cursor, scales)


def _mark(mask: Tensor, rows: Tensor | None, t0: int, bitmap: Tensor, offsets: Tensor, cursor: Tensor) -> RowPattern:
    """Writes bitmap and offsets of what ``mask`` ``(Fc, Tc * tile)`` keeps, values going to ``cursor`` and on."""
    tile = bitmap.shape[2] * 8
    bits = to_bits(mask).view(mask.shape[0], -1, tile // 8)
    place = _place(rows, t0, bits.shape[1])
    counts = tile_counts(bits)
    positions = true_positions(mask)
    first = int(cursor)
    bitmap[place] = bits
    offsets[place] = (torch.cumsum(counts.flatten(), 0).view_as(counts) - counts + first).to(offsets.dtype)
    counts = counts.flatten()
    return RowPattern(positions, slice(first, first + positions.numel()), counts)


def _place(rows: Tensor | None, t0: int, tiles: int) -> tuple[slice | Tensor, slice]:
    """Index of the tiles ``t0 ..`` of ``rows``, all rows for None."""
    return slice(None) if rows is None else row_index(rows), slice(t0, t0 + tiles)


def _store(
    kept: Tensor,
    pattern: RowPattern,
    rows: Tensor | None,
    t0: int,
    values: Tensor,
    cursor: Tensor,
    scales: Tensor | None,
) -> None:
    """Appends the kept coefficients, rounded to the format of ``values``, and advances the cursor."""
    cursor += kept.shape[0]
    if scales is not None and scales.numel():
        kept, tile_scales = quantise(kept, pattern.counts, values.dtype)
        by_tile = tile_scales.view(scales.shape[0] if rows is None else rows.numel(), -1)
        scales[_place(rows, t0, by_tile.shape[1])] = by_tile
    if int(cursor) <= values.shape[0]:
        values[pattern.slots] = kept


def quantise(kept: Tensor, counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Kept coefficients ``(n, 2)`` as integers, and the scale of each tile.

    Int8 values run from -127 to 127, 4-bit values (held in uint8, real part in the low nibble) from -7 to 7, rounded
    to nearest. A tile with a NaN or an infinite value gets a NaN scale: what is not a number stays visible.
    """
    levels = 127 if dtype == torch.int8 else 7
    tile_of = torch.repeat_interleave(torch.arange(counts.numel(), device=kept.device), counts)
    largest = kept.abs().amax(-1)
    peak = torch.zeros(counts.numel(), dtype=kept.dtype, device=kept.device)
    peak.scatter_reduce_(0, tile_of, largest, "amax")
    peak[~peak.isfinite()] = torch.nan
    scale = (peak / levels).to(torch.float32)
    divisor = torch.where(scale > 0, scale, 1).to(kept.dtype)
    levels_of = (kept / divisor[tile_of][:, None]).round_().nan_to_num_(0).clamp_(-levels, levels).to(torch.int8)
    if dtype == torch.uint8:
        nibbles = levels_of.view(torch.uint8) & 15
        levels_of = nibbles[:, 0] | (nibbles[:, 1] << 4)
    return levels_of, scale


def gather_rows(
    y: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    rows: Tensor,
    t0: int,
    out: Tensor,
    pattern: RowPattern | None = None,
) -> Tensor:
    """Applies an existing pattern: ``out`` ``(N, 2)`` gets the chunk ``y`` ``(Fc, Tc * tile, 2)`` where it is kept."""
    if pattern is None:
        tiles = y.shape[1] // (bitmap.shape[2] * 8)
        pattern = row_pattern(bitmap, offsets, rows, t0, t0 + tiles)
    pairs = torch.view_as_complex(y).flatten()
    target = torch.view_as_complex(out)
    if isinstance(pattern.slots, slice) and out.dtype == y.dtype:
        torch.index_select(pairs, 0, pattern.positions, out=target[pattern.slots])
    else:
        target[pattern.slots] = pairs.index_select(0, pattern.positions).to(target.dtype)
    return out


def gather_planes(
    half: Tensor,
    grid: FrequencyGrid,
    bitmap: Tensor,
    offsets: Tensor,
    t0: int,
    row_scale: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Applies an existing pattern to the half spectra ``half`` ``(n, H, Wh)`` of a chunk of planes.

    ``row_scale`` ``(F,)``, where given, multiplies each frequency. Writes ``out`` ``(N, 2)`` where the chunk is kept.
    """
    count = half.shape[0]
    tile = bitmap.shape[2] * 8
    tiles = -(-count // tile)
    pattern = row_pattern(bitmap, offsets, None, t0, t0 + tiles)
    flat = half.reshape(count, -1)
    places = half_positions(pattern, tiles * tile, grid.index, flat.shape[1])
    kept = torch.view_as_real(flat.view(-1).index_select(0, places))
    if row_scale is not None:
        kept *= per_row(row_scale.to(kept.dtype), pattern)[:, None]
    out[pattern.slots] = kept
    return out
