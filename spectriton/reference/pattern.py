"""Which coefficients of a set of rows are kept, as positions: what unpacking and gathering need."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class TileIndex:
    """How many coefficients each tile of a packed spectrum keeps, and where they begin; counted when first asked for.

    Args:
        bitmap: ``(F, T, tile / 8)``.
        offsets: ``(F, T)``.
    """

    def __init__(self, bitmap: Tensor, offsets: Tensor) -> None:
        self._pattern = bitmap, offsets

    @property
    def counts(self) -> NDArray[np.int64]:
        """``(F, T)``, on the host."""
        return self._tiles[0]

    @property
    def starts(self) -> NDArray[np.int64]:
        """``(F, T)``, on the host."""
        return self._tiles[1]

    @property
    def ordered(self) -> bool:
        """Whether the values follow the tiles row by row, without gaps; empty tiles take part in it then."""
        return self._tiles[2]

    @cached_property
    def filled(self) -> int:
        """How many frequencies come before the tail at which nothing is kept."""
        rows = np.flatnonzero(self.counts.any(1))
        return int(rows[-1]) + 1 if rows.size else 0

    @cached_property
    def _tiles(self) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
        bitmap, offsets = self._pattern
        counts: NDArray[np.int64] = tile_counts(bitmap).cpu().numpy()
        starts: NDArray[np.int64] = offsets.cpu().numpy().astype(np.int64)
        following = (np.cumsum(counts) - counts.ravel()).reshape(counts.shape)
        ordered = bool(((starts == following) | (counts == 0)).all())
        return counts, following if ordered else starts, ordered


class RowPattern(NamedTuple):
    """The kept coefficients of a chunk of rows and tiles.

    Attributes:
        positions: ``(n,)`` int64, where they stand in the flattened chunk ``(Fc, Tc * tile)``, ascending.
        slots: where they stand in ``values``: a slice where they are contiguous and in order, else ``(n,)`` int64.
        counts: ``(Fc, Tc)`` int64, how many there are in each tile.
    """

    positions: Tensor
    slots: slice | Tensor
    counts: Tensor


def true_positions(mask: Tensor) -> Tensor:
    """``(n,)`` int64: flat indices of the True elements of a bool tensor."""
    if mask.device.type != "cpu":
        return torch.nonzero(mask.flatten()).flatten()
    flat = mask.numpy().ravel()
    count = int(np.count_nonzero(flat))
    if 0.02 * flat.size < count <= 0.1 * flat.size:
        # Up to a tenth NumPy searches from one to the next, which is slower than looking at every element unless
        # they are rare. A tail of ones makes it look at all.
        tail = np.ones(flat.size // 9 + 1, dtype=np.bool_)
        return torch.from_numpy(np.flatnonzero(np.concatenate([flat, tail]))[:count])
    return torch.from_numpy(np.flatnonzero(flat))


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


def tile_starts(bitmap: Tensor) -> Tensor:
    """int32 ``(F, T)``: where the values of each tile of a bitmap ``(F, T, tile / 8)`` begin, in row order."""
    counts = tile_counts(bitmap)
    return (torch.cumsum(counts.flatten(), 0).view_as(counts) - counts).to(torch.int32)


def row_index(rows: slice | Tensor) -> slice | Tensor:
    """``rows``, in any order, as a slice where they are consecutive: indexing gives a view then."""
    if isinstance(rows, slice):
        return rows
    if rows.numel() == 0:
        return slice(0, 0)
    first, last = int(rows[0]), int(rows[-1]) + 1
    # Frequencies that fold onto others are in no order, and may begin and end as if they were.
    consecutive = last - first == rows.numel() and bool((rows.diff() == 1).all())
    return slice(first, last) if consecutive else rows


def row_pattern(
    bitmap: Tensor, offsets: Tensor, rows: slice | Tensor, t0: int, t1: int, index: TileIndex | None = None
) -> RowPattern:
    """The :class:`RowPattern` of frequencies ``rows`` and tiles ``t0:t1``; ``index`` saves counting again."""
    if index is None:
        index = TileIndex(bitmap, offsets)
    chosen = row_index(rows)
    on_host: Any = chosen.cpu().numpy() if isinstance(chosen, Tensor) else chosen
    counts, starts = index.counts[on_host, t0:t1], index.starts[on_host, t0:t1]
    bits = bitmap[chosen, t0:t1].contiguous()
    positions = true_positions(from_bits(bits))
    whole = isinstance(chosen, slice) and t0 == 0 and t1 == index.counts.shape[1]
    places = slots(counts.ravel(), starts.ravel(), whole and index.ordered)
    if isinstance(places, Tensor):
        places = places.to(bits.device)
    return RowPattern(positions, places, torch.from_numpy(counts).to(bits.device))


def slots(counts: NDArray[np.int64], starts: NDArray[np.int64], ordered: bool = False) -> slice | Tensor:
    """Where the values of tiles stand, for ``(n,)`` tiles; ``ordered`` says that they follow each other."""
    count = int(counts.sum())
    if count == 0:
        return slice(0, 0)
    if ordered:
        return slice(int(starts[0]), int(starts[0]) + count)
    shift = starts - (np.cumsum(counts) - counts)
    first = int(shift[np.argmax(counts > 0)])
    if (shift[counts > 0] == first).all():
        return slice(first, first + count)
    return torch.from_numpy(np.arange(count) + np.repeat(shift, counts))


def repeated(values: Tensor, counts: Tensor) -> Tensor:
    """Each entry of ``values`` as often as ``counts``, of as many elements, says: ``(counts.sum(),)``."""
    if values.device.type == "cpu":  # several times as fast
        return torch.from_numpy(np.repeat(values.numpy().ravel(), counts.numpy().ravel()))
    return torch.repeat_interleave(values.flatten(), counts.flatten())


def per_row(values: Tensor, pattern: RowPattern) -> Tensor:
    """``(n,)``: for each coefficient of a pattern the entry of ``values`` ``(Fc,)`` of its row."""
    return repeated(values, pattern.counts.sum(1))


def half_positions(pattern: RowPattern, padded: int, index: Tensor, half_size: int) -> Tensor:
    """Where the coefficients of a pattern over all rows stand in flattened half spectra ``(n, H * Wh)``.

    Args:
        pattern: positions in ``(F, padded)``.
        padded: planes in the chunk, padding included.
        index: ``(F,)`` position of each frequency in a half spectrum.
        half_size: ``H * Wh``.
    """
    # Row r, plane p goes to index[r] + p * half_size: the position r * padded + p, scaled, and shifted by row.
    shift = index - torch.arange(index.numel(), device=index.device) * (padded * half_size)
    return per_row(shift, pattern).add_(pattern.positions, alpha=half_size)


def part_positions(pattern: RowPattern, padded: int, places: Tensor, planes: int) -> Tensor:
    """Where the coefficients of a pattern stand in flattened rows of ``planes``.

    Args:
        pattern: positions in rows of ``padded``.
        padded: planes in the chunk, padding included.
        places: ``(Fc,)`` number of the row that each frequency goes to.
        planes: length of those rows.
    """
    shift = places * planes - torch.arange(places.numel(), device=places.device) * padded
    return per_row(shift, pattern).add_(pattern.positions)


def channel_of(positions: Tensor, padded: int, start: int, channels: int) -> Tensor:
    """``(n,)`` int64: channels of positions in chunks whose rows have ``padded`` places and begin at ``start``."""
    if padded % channels:
        positions = positions - _divide(positions, padded) * padded
    if start % channels:
        positions = positions + start % channels
    return positions - _divide(positions, channels) * channels


def _divide(positions: Tensor, divisor: int) -> Tensor:
    if positions.device.type == "cpu":  # by multiplication and shift
        return torch.from_numpy(positions.numpy() // divisor)
    return positions.div(divisor, rounding_mode="floor")
