"""What is kept of rows of packed spectra, without dense rows: statistics, and factors by channel and frequency.

Numbers are ``(n, 2)``, one pair for each coefficient kept, in the order of the pattern. A table has one number for each
place of a row, ``(P,)``; a weight one for each row, ``(Fc,)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectriton.reference.pack import quantise
from spectriton.reference.pattern import RowPattern, TileIndex, row_pattern
from spectriton.reference.unpack import put_values, read_values, take_values


class KeptRows(NamedTuple):
    """Some rows of a packed spectrum, all of their tiles.

    Attributes:
        bitmap, offsets: the pattern.
        rows: ``(Fc,)`` int64, ascending.
        slots: where what is kept stands among the values.
        pattern: None where a backend reads the bitmap itself.
    """

    bitmap: Tensor
    offsets: Tensor
    rows: Tensor
    slots: slice | Tensor
    pattern: RowPattern | None

    @property
    def places(self) -> int:
        """Length of a row, ``P``."""
        return self.bitmap.shape[1] * self.bitmap.shape[2] * 8

    def positions(self) -> Tensor:
        """``(n,)`` int64: where the numbers stand in rows ``(Fc, P)``."""
        return self._pattern().positions

    def counts(self) -> Tensor:
        """``(Fc, T)`` int64: how many there are in each tile."""
        return self._pattern().counts

    def _pattern(self) -> RowPattern:
        assert self.pattern is not None
        return self.pattern


def kept_rows(bitmap: Tensor, offsets: Tensor, rows: Tensor, index: TileIndex | None, dtype: torch.dtype) -> KeptRows:
    """For numbers in precision ``dtype``."""
    pattern = row_pattern(bitmap, offsets, rows, 0, offsets.shape[1], index)
    return KeptRows(bitmap, offsets, rows, pattern.slots, pattern)


def _stored(kept: KeptRows, values: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Numbers, which may be the values, and what is left to multiply each tile by, ``(Fc, T)``."""
    pattern = kept._pattern()
    tile = scales[kept.rows].to(dtype) if scales.numel() else None
    if values.dtype == torch.int8:  # one factor a tile, which is cheaper in a table than one a number
        return take_values(values, pattern.slots).to(dtype), tile
    return read_values(values, scales, pattern, scales if tile is None else tile, dtype), None


def _tables(kept: KeptRows, table: Tensor, weight: Tensor | None, tile: Tensor | None) -> Tensor:
    """``(Fc, P)``, or ``(1, P)``: the product of what is given."""
    tables = table[None] if weight is None else weight[:, None] * table
    return tables if tile is None else tables * tile.repeat_interleave(kept.places // tile.shape[1], 1)


def spread_kept(kept: KeptRows, table: Tensor) -> Tensor:
    """Numbers: the entry of ``(P,)``, or of ``(Fc, P)``, for both parts."""
    whole = table.expand(kept.rows.numel(), -1).reshape(-1)
    of_kept = whole.index_select(0, kept.positions())
    # For both parts: a product of pairs by single numbers takes torch several times as long.
    return torch.view_as_real(torch.complex(of_kept, of_kept))


def sum_places(kept: KeptRows, numbers: Tensor) -> Tensor:
    """``(P,)``: numbers added up over rows and parts."""
    return _by_place(kept, numbers).sum(0)


def _by_place(kept: KeptRows, numbers: Tensor) -> Tensor:
    out = numbers.new_zeros(kept.rows.numel(), kept.places)
    out.view(-1).scatter_(0, kept.positions(), numbers[:, 0] + numbers[:, 1])  # several times as fast as sum(1)
    return out


def sum_kept(kept: KeptRows, values: Tensor, scales: Tensor, weight: Tensor, numbers: Tensor | None) -> Tensor:
    """``(P,)``: products of values and numbers, or squares of values, added up over rows, times ``weight``."""
    stored, tile = _stored(kept, values, scales, weight.dtype)
    places = _by_place(kept, stored.square() if numbers is None else stored * numbers)
    if tile is None:
        return torch.mv(places.T, weight)
    factor = (tile.square() if numbers is None else tile) * weight[:, None]
    return torch.einsum("ft,ftp->tp", factor, places.unflatten(1, (factor.shape[1], -1))).flatten()


def scale_kept(kept: KeptRows, values: Tensor, scales: Tensor, gain: Tensor) -> Tensor:
    """Numbers: values times the table ``gain``, in its precision."""
    stored, tile = _stored(kept, values, scales, gain.dtype)
    return stored * spread_kept(kept, _tables(kept, gain, None, tile))


def combine_kept(
    kept: KeptRows,
    numbers: Tensor,
    factors: Tensor,
    values: Tensor,
    scales: Tensor,
    gain: Tensor | None,
    weight: Tensor,
    out: Tensor,
) -> None:
    """Writes numbers ``out``, which may be ``numbers``: these times a table, plus values times ``gain`` and ``weight``.

    Values are left out without a ``gain``.
    """
    made = numbers * spread_kept(kept, factors)
    if gain is not None:
        stored, tile = _stored(kept, values, scales, numbers.dtype)
        made.addcmul_(stored, spread_kept(kept, _tables(kept, gain, weight, tile)))
    out.copy_(made)


def store_kept(kept: KeptRows, numbers: Tensor, values: Tensor, scales: Tensor) -> None:
    """Writes numbers to where their values stand, rounded to the format of these."""
    if scales.numel():
        numbers, scales[kept.rows] = quantise(numbers, kept.counts(), values.dtype)
    put_values(values, kept.slots, numbers.to(values.dtype))
