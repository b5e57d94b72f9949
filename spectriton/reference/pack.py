"""Dense chunks to packed coefficients: threshold compaction, and applying an existing pattern."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spectriton.reference.pattern import (
    RowPattern,
    channel_of,
    from_bits,
    repeated,
    row_index,
    row_pattern,
    tile_counts,
    to_bits,
    true_positions,
)
from spectriton.reference.rounding import stochastic_cast, uniform
from spectriton.reference.spectral_activation import activate
from spectriton.reference.unpack import take_values

# Moduli are made for so many coefficients at a time: what one step writes, the next finds in the cache.
_MODULI = 1 << 16
# Tiles whose values are moved at a time.
_RUNS = 1 << 10


def modulus(y: Tensor) -> Tensor:
    """``|y|`` of interleaved pairs ``(..., 2)``."""
    pairs = torch.view_as_complex(y)
    if y.device.type == "cpu":
        return torch.from_numpy(np.abs(pairs.numpy()))
    return pairs.abs()


def bins_of_moduli(y: Tensor, guard: int, shift: int) -> Tensor:
    """``(n,)`` int32: the leading bits of the float32 patterns of the moduli of pairs ``(..., 2)``.

    Args:
        y: the pairs; what is not a number counts as infinite.
        guard: added to a pattern.
        shift: bits of it that do not count.
    """
    size = modulus(y).to(torch.float32).flatten().nan_to_num_(nan=torch.inf)
    return (size.view(torch.int32) + guard) >> shift


def count_moduli(y: Tensor, guard: int, shift: int, counts: Tensor) -> None:
    """Adds to ``counts`` ``(bins,)`` int64 how many moduli of pairs ``(rows, n, 2)`` are in each bin."""
    counts += torch.bincount(bins_of_moduli(y, guard, shift), minlength=counts.numel())


def kept_mask(y: Tensor, threshold: float | Tensor) -> Tensor:
    """bool ``(Fc, P)``: where the modulus of ``y`` ``(Fc, P, 2)`` is not below a number, or ``(P,)`` numbers.

    Not below, rather than above or equal: what is not a number is kept.
    """
    if y.device.type != "cpu":
        return ~(modulus(y) < threshold)
    pairs = torch.view_as_complex(y).numpy()
    bound = threshold.numpy() if isinstance(threshold, Tensor) else threshold
    mask = np.empty(pairs.shape, dtype=np.bool_)
    step = max(1, _MODULI // max(1, pairs.shape[1]))
    for first in range(0, pairs.shape[0], step):
        part = slice(first, first + step)
        np.less(np.abs(pairs[part]), bound, out=mask[part])
    return torch.from_numpy(np.logical_not(mask, out=mask))


def compact_rows(
    y: Tensor,
    length: int,
    threshold: float | Tensor,
    rows: slice | Tensor,
    t0: int,
    bitmap: Tensor,
    kind: str = "identity",
    scale: Tensor | None = None,
    channels: int = 1,
) -> Tensor:
    """Threshold and activate a dense chunk; arguments as for :func:`pack_rows`.

    Writes the bitmap at ``rows`` and the chunk's tiles.

    Returns:
        ``(n, 2)``: the kept coefficients, in row order.
    """
    chunk, padded = y.shape[:2]
    tile = bitmap.shape[2] * 8
    start = t0 * tile
    if isinstance(threshold, Tensor):
        threshold = threshold[torch.arange(start, start + padded, device=y.device) % channels].to(y.dtype)
    mask = kept_mask(y, threshold)
    index = row_index(rows)
    if chunk and int(index.start if isinstance(index, slice) else index[0]) == 0:
        mask[0] = True
    if start + padded > length:
        mask[:, max(0, length - start) :] = False
    bitmap[index, t0 : t0 + padded // tile] = to_bits(mask).view(chunk, -1, tile // 8)
    positions = true_positions(mask)
    kept = torch.view_as_real(torch.view_as_complex(y).view(-1).index_select(0, positions))
    if kind == "identity":
        return kept
    of_kept = None
    if scale is not None:
        of_kept = scale.to(y.dtype).index_select(0, channel_of(positions, padded, start, channels))[:, None]
    return activate(kept, kind, of_kept)


def pack_rows(
    y: Tensor,
    length: int,
    threshold: float | Tensor,
    rows: slice | Tensor,
    t0: int,
    bitmap: Tensor,
    offsets: Tensor,
    values: Tensor,
    cursor: Tensor,
    kind: str = "identity",
    scale: Tensor | None = None,
    channels: int = 1,
    scales: Tensor | None = None,
    seed: Tensor | None = None,
) -> None:
    """Threshold, activate and compact a dense chunk.

    Args:
        y: ``(Fc, Tc * tile, 2)`` coefficients.
        length: row length ``R``; what lies beyond is padding.
        threshold: coefficients whose modulus is below it are dropped; a number, or ``(channels,)``.
        rows: ``(Fc,)`` int64 frequencies, ascending, or a range of them. Row 0, the zero frequency, is kept whole.
        t0: first tile of the chunk.
        bitmap: ``(F, T, tile / 8)``; written at ``rows`` and the chunk's tiles.
        offsets: ``(F, T)``; likewise.
        values: kept coefficients are appended here from ``cursor`` on. Where they do not fit, none is written, and the
            tiles of the chunk are left empty.
        cursor: ``(1,)`` int64, advanced by the number kept, whether or not they fitted.
        kind: activation of the kept coefficients.
        scale: ``(channels,)`` scale of the activation.
        channels: channel = position in the row modulo ``channels``.
        scales: ``(F, T)``, for integer values: written at ``rows`` and the chunk's tiles.
        seed: of stochastic rounding, 0-dimensional int64; to nearest where left out.
    """
    kept = compact_rows(y, length, threshold, rows, t0, bitmap, kind, scale, channels)
    tiles = slice(t0, t0 + y.shape[1] // (bitmap.shape[2] * 8))
    place = (row_index(rows), tiles)
    counts = tile_counts(bitmap[place])
    first = int(cursor)
    cursor += kept.shape[0]
    offsets[place] = (torch.cumsum(counts.flatten(), 0).view_as(counts) - counts + first).to(offsets.dtype)
    kept, of_tiles = to_format(kept, bitmap, rows, tiles, values.dtype, seed)
    if scales is not None and of_tiles is not None:
        scales[place] = of_tiles
    if int(cursor) <= values.shape[0]:
        values[first : int(cursor)] = kept
    else:
        bitmap[place], offsets[place] = 0, 0


def to_format(
    kept: Tensor, bitmap: Tensor, rows: slice | Tensor, tiles: slice, dtype: torch.dtype, seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Kept coefficients ``(n, 2)`` of a chunk in their format, and the scales of its tiles where these are integers.

    Args:
        kept: in row order.
        bitmap: ``(F, T, tile / 8)``, which says at ``rows`` and ``tiles`` where they stand.
        rows, tiles: the frequencies and the tiles of the chunk.
        dtype: of the values; uint8 for 4 bits.
        seed: of stochastic rounding, 0-dimensional int64; to nearest where it is None.
    """
    bits = bitmap[row_index(rows), tiles].contiguous()
    noise = None
    if seed is not None:
        tile, padded = bitmap.shape[2] * 8, bitmap.shape[1] * bitmap.shape[2] * 8
        row, place = torch.nonzero(from_bits(bits).flatten(1), as_tuple=True)
        row = rows[row] if isinstance(rows, Tensor) else row + rows.start
        positions = row * padded + (place + tiles.start * tile)
        noise = uniform(seed, torch.stack([2 * positions, 2 * positions + 1], dim=1))
    if not dtype.is_floating_point:
        return quantise(kept, tile_counts(bits), dtype, noise)
    if noise is not None and dtype.itemsize < kept.dtype.itemsize:
        kept = stochastic_cast(kept, dtype, noise)
    return kept.to(dtype), None


def quantise(kept: Tensor, counts: Tensor, dtype: torch.dtype, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Kept coefficients ``(n, 2)`` as integers, and the scale of each tile, in the shape of ``counts``.

    Int8 values run from -127 to 127, 4-bit values (held in uint8, real part in the low nibble) from -7 to 7, rounded
    to nearest, or stochastically by ``noise`` ``(n, 2)``, uniform in [0, 1). A tile with a NaN or an infinite value has
    a NaN scale: what is not a number stays visible.
    """
    levels = 127 if dtype == torch.int8 else 7
    counts = 2 * counts  # of parts
    peak = _peaks(kept.abs().view(-1), counts.view(-1))
    peak = torch.where(peak.isfinite(), peak, torch.nan)
    # Not subnormal, so that it has an inverse.
    scale = (peak / levels).to(torch.float32).clamp_(min=torch.finfo(torch.float32).tiny)
    # Factors are spelt out: of a pair by one of them torch makes little more than an element at a time.
    steps = repeated(1 / scale.to(kept.dtype), counts).view(-1, 2).mul_(kept)
    steps = steps.round_() if noise is None else steps.add_(noise).floor_()
    levels_of = steps.nan_to_num_(0).clamp_(-levels, levels).to(torch.int8)
    if dtype == torch.uint8:
        nibbles = levels_of.view(torch.uint8) & 15
        levels_of = nibbles[:, 0] | (nibbles[:, 1] << 4)
    return levels_of, scale.view_as(counts)


def _peaks(sizes: Tensor, counts: Tensor) -> Tensor:
    """The largest of each run of ``counts`` numbers that are not negative; 0 of an empty one."""
    peak = sizes.new_zeros(counts.numel())
    if sizes.device.type == "cpu":
        filled = np.flatnonzero(counts.numpy())
        starts = (torch.cumsum(counts, 0) - counts).numpy()[filled]
        peak.numpy()[filled] = np.maximum.reduceat(sizes.numpy(), starts) if filled.size else 0
        return peak
    return peak.scatter_reduce_(0, repeated(torch.arange(counts.numel(), device=sizes.device), counts), sizes, "amax")


def reorder(values: Tensor, starts: Tensor, counts: Tensor, targets: Tensor) -> Tensor:
    """``values`` with the run of ``counts[i]`` that begins at ``starts[i]`` moved to ``targets[i]``.

    These are ``(n,)`` int64. The runs take up all of it, here and there, and ``targets`` ascend.
    """
    out = torch.empty_like(values)
    for first in range(0, counts.numel(), _RUNS):  # so that the places of few values stand beside them
        part = slice(first, first + _RUNS)
        of_part, begin = counts[part].numpy(), starts[part].numpy()
        count, at = int(of_part.sum()), int(targets[first])
        places = np.arange(count) + np.repeat(begin - (np.cumsum(of_part) - of_part), of_part)
        out[at : at + count] = take_values(values, torch.from_numpy(places).to(values.device))
    return out


def gather_rows(
    y: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    rows: slice | Tensor,
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
        kept = pairs.index_select(0, pattern.positions).to(target.dtype)
        if isinstance(pattern.slots, slice):
            target[pattern.slots] = kept
        else:
            target.scatter_(0, pattern.slots, kept)
    return out
