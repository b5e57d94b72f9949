"""Dense rows to the values of an existing pattern, in any value format."""

from __future__ import annotations

import torch
from torch import Tensor

from spectriton.reference.pack import gather_rows, quantise
from spectriton.reference.pattern import RowPattern, row_pattern
from spectriton.reference.unpack import put_values


def store_rows(
    y: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    rows: slice | Tensor,
    values: Tensor,
    scales: Tensor,
    pattern: RowPattern | None = None,
    t0: int = 0,
) -> None:
    """:func:`gather_rows` that rounds to the format of ``values``.

    Args:
        y: ``(Fc, Tc * tile, 2)`` contiguous.
        bitmap, offsets: the pattern.
        rows: ``(Fc,)`` int64 frequencies, ascending, or a range of them.
        values: written where the pattern keeps coefficients of ``rows``.
        scales: ``(F, T)`` for integer values, written at ``rows`` and the chunk's tiles; else empty.
        pattern: saves reading the bitmap again where the caller has it.
        t0: first tile of the chunk.
    """
    tiles = slice(t0, t0 + y.shape[1] // (bitmap.shape[2] * 8))
    if pattern is None:
        pattern = row_pattern(bitmap, offsets, rows, tiles.start, tiles.stop)
    if values.dtype == y.dtype:
        gather_rows(y, bitmap, offsets, rows, t0, values, pattern)
        return
    kept = torch.view_as_real(torch.view_as_complex(y).view(-1).index_select(0, pattern.positions))
    if scales.numel():
        kept, tile_scales = quantise(kept, pattern.counts, values.dtype)
        scales[rows, tiles] = tile_scales
    put_values(values, pattern.slots, kept.to(values.dtype))
