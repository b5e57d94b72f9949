"""Which coefficients of a set of rows are kept, as positions: what unpacking and gathering need."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class RowPattern(NamedTuple):
    """The kept coefficients of a chunk of rows and tiles.

    Attributes:
        positions: ``(n,)`` int64, where they stand in the flattened chunk ``(Fc, Tc * tile)``, ascending.
        slots: where they stand in ``values``: a slice where they are contiguous and in order, else ``(n,)`` int64.
        counts: ``(Fc * Tc,)`` int64, how many there are in each tile.
    """

    positions: Tensor
    slots: slice | Tensor
    counts: Tensor


def true_positions(mask: Tensor) -> Tensor:
    """``(n,)`` int64: flat indices of the True elements of a bool tensor."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return torch.nonzero(mask.flatten()).flatten()


def to_bits(mask: Tensor) -> Tensor:
    """bool ``(..., n)`` to uint8 ``(..., n / 8)``, least significant bit first."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    shifts = torch.arange(8, device=mask.device)
    return (mask.unflatten(-1, (-1, 8)).to(torch.int32) << shifts).sum(-1).to(torch.uint8)


def from_bits(bitmap: Tensor) -> Tensor:
    """uint8 ``(..., n / 8)`` to bool ``(..., n)``: the inverse of :func:`to_bits`."""
    if bitmap.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bitmap.numpy(), axis=-1, bitorder="little").view(np.bool_))
    shifts = torch.arange(8, device=bitmap.device)
    return ((bitmap.unsqueeze(-1) >> shifts) & 1).flatten(-2).to(torch.bool)


def tile_counts(bitmap: Tensor) -> Tensor:
    """int64 ``(...)``: set bits of each tile of a bitmap ``(..., tile / 8)``."""
    if bitmap.device.type == "cpu":
        words = np.bitwise_count(bitmap.contiguous().numpy().view(np.uint32))
        return torch.from_numpy(words.sum(-1, dtype=np.int64))
    return from_bits(bitmap).sum(-1)


def row_index(rows: Tensor) -> slice | Tensor:
    """``rows`` (ascending) as a slice where they are consecutive: indexing gives a view then."""
    if rows.numel() == 0:
        return slice(0, 0)
    first, last = int(rows[0]), int(rows[-1]) + 1
    return slice(first, last) if last - first == rows.numel() else rows


def row_pattern(bitmap: Tensor, offsets: Tensor, rows: Tensor | None, t0: int, t1: int) -> RowPattern:
    """The :class:`RowPattern` of frequencies ``rows`` ``(Fc,)``, all of them for None, and tiles ``t0:t1``."""
    index = slice(None) if rows is None else row_index(rows)
    bits = bitmap[index, t0:t1].contiguous()
    counts = tile_counts(bits).flatten()
    # The bookkeeping is short: NumPy gets through it in a fraction of the time.
    per_tile = counts.cpu().numpy()
    starts = offsets[index, t0:t1].reshape(-1).cpu().numpy()
    ends = np.cumsum(per_tile)
    shift = starts - (ends - per_tile)
    filled = shift[per_tile > 0]
    if filled.size == 0:
        return RowPattern(torch.empty(0, dtype=torch.int64, device=bits.device), slice(0, 0), counts)
    count, first = int(ends[-1]), int(filled[0])
    positions = _kept(bits, count)
    if (filled == first).all():
        return RowPattern(positions, slice(first, first + count), counts)
    slots = torch.from_numpy(np.arange(count) + np.repeat(shift, per_tile))
    return RowPattern(positions, slots.to(bits.device), counts)


def half_positions(pattern: RowPattern, padded: int, index: Tensor, half_size: int) -> Tensor:
    """Where the coefficients of a pattern over all rows stand in flattened half spectra ``(n, H * Wh)``.

    Args:
        pattern: positions in ``(F, padded)``.
        padded: planes in the chunk, padding included.
        index: ``(F,)`` position of each frequency in a half spectrum.
        half_size: ``H * Wh``.
    """
    positions = pattern.positions
    if padded & (padded - 1) == 0:  # a shift instead of a division, which is the slowest thing here
        row, plane = positions >> (padded.bit_length() - 1), positions & (padded - 1)
    else:
        row = positions.div(padded, rounding_mode="floor")
        plane = positions - row * padded
    return index.index_select(0, row).add_(plane, alpha=half_size)


def per_row(values: Tensor, pattern: RowPattern) -> Tensor:
    """``(n,)``: for each coefficient of a pattern the entry of ``values`` ``(Fc,)`` of its row."""
    return torch.repeat_interleave(values, pattern.counts.view(values.numel(), -1).sum(1))


def within_row(pattern: RowPattern, rows: int, padded: int) -> Tensor:
    """``(n,)`` int64: where in its row each coefficient of a pattern over ``(rows, padded)`` stands.

    Row starts are repeated and subtracted: much cheaper than a remainder for each coefficient.
    """
    return pattern.positions - per_row(torch.arange(rows, device=pattern.positions.device) * padded, pattern)


def _kept(bits: Tensor, count: int) -> Tensor:
    """Positions of the set bits; sparse bitmaps are scanned byte by byte first."""
    if bits.device.type != "cpu" or 16 * count > 8 * bits.numel():
        return true_positions(from_bits(bits))
    flat = bits.numpy().ravel()
    filled = np.flatnonzero(flat)
    within = np.flatnonzero(np.unpackbits(flat[filled], bitorder="little"))
    return torch.from_numpy((filled[within >> 3] << 3) | (within & 7))
