"""Dense chunks to packed coefficients: threshold compaction, and applying an existing pattern."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spectriton.reference.pattern import RowPattern, row_pattern, tile_counts, to_bits, true_positions
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
    tile = bitmap.shape[2] * 8
    tiles = padded // tile
    start = t0 * tile

    def across(per_channel: Tensor) -> Tensor:
        return per_channel[torch.arange(start, start + padded, device=y.device) % channels]

    size = modulus(y)
    mask = size < (across(threshold).to(size.dtype) if isinstance(threshold, Tensor) else threshold)
    torch.logical_not(mask, out=mask)  # not below, rather than above or equal: NaN stays
    mask[rows == 0] = True
    mask[:, max(0, length - start) :] = False

    bits = to_bits(mask).view(chunk, tiles, tile // 8)
    counts = tile_counts(bits)
    positions = true_positions(mask)
    first = int(cursor)
    bitmap[rows, t0 : t0 + tiles] = bits
    running = torch.cumsum(counts.flatten(), 0).view_as(counts) - counts + first
    offsets[rows, t0 : t0 + tiles] = running.to(offsets.dtype)
    kept = torch.view_as_real(torch.view_as_complex(y).flatten().index_select(0, positions))
    if kind != "identity":
        of_kept = None if scale is None else across(scale)[positions % padded][:, None].to(y.dtype)
        kept = activate(kept, kind, of_kept)
    cursor += positions.numel()
    if scales is not None and scales.numel():
        stored, tile_scales = quantise(kept, counts, values.dtype)
        scales[rows, t0 : t0 + tiles] = tile_scales.to(scales.dtype)
    else:
        stored = kept
    if first + positions.numel() <= values.shape[0]:
        values[first : first + positions.numel()] = stored


def quantise(kept: Tensor, counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Kept coefficients ``(n, 2)`` as integers, and the scale of each tile (same shape as ``counts``).

    Int8 values run from -127 to 127, 4-bit values (held in uint8, real part in the low nibble) from -7 to 7, rounded
    to nearest. A tile with a NaN or an infinite value gets a NaN scale: what is not a number stays visible.
    """
    levels = 127 if dtype == torch.int8 else 7
    flat = counts.flatten()
    tile_of = torch.repeat_interleave(torch.arange(flat.numel(), device=kept.device), flat)
    largest = kept.abs().amax(-1)
    peak = torch.zeros(flat.numel(), dtype=kept.dtype, device=kept.device)
    peak.scatter_reduce_(0, tile_of, largest, "amax")
    peak[~peak.isfinite()] = torch.nan
    scale = (peak / levels).to(torch.float32)
    divisor = torch.where(scale > 0, scale, 1).to(kept.dtype)
    levels_of = (kept / divisor[tile_of][:, None]).round_().nan_to_num_(0).clamp_(-levels, levels).to(torch.int8)
    if dtype == torch.uint8:
        nibbles = levels_of.view(torch.uint8) & 15
        levels_of = nibbles[:, 0] | (nibbles[:, 1] << 4)
    return levels_of, scale.view(counts.shape)


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
