"""Dense rows to the values of an existing pattern, in any value format."""

from __future__ import annotations

import torch
from torch import Tensor

from spectriton.reference.pack import gather_rows, quantise
from spectriton.reference.pattern import RowPattern, row_pattern


def store_rows(
    y: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    rows: Tensor,
    values: Tensor,
    scales: Tensor,
    pattern: RowPattern | None = None,
) -> None:
    """:func:`gather_rows` that rounds to the format of ``values``.

    Args:
        y: ``(Fc, P, 2)`` contiguous, whole rows.
        bitmap, offsets: the pattern.
        rows: ``(Fc,)`` int64, ascending.
        values: written where the pattern keeps coefficients of ``rows``.
        scales: ``(F, T)`` for integer values, written at ``rows``; else empty.
        pattern: saves reading the bitmap again where the caller has it.
    """
    if pattern is None:
        pattern = row_pattern(bitmap, offsets, rows, 0, bitmap.shape[1])
    if values.dtype == y.dtype:
        gather_rows(y, bitmap, offsets, rows, 0, values, pattern)
        return
    kept = torch.view_as_real(torch.view_as_complex(y).view(-1).index_select(0, pattern.positions))
    if scales.numel():
        kept, tile_scales = quantise(kept, pattern.counts, values.dtype)
        scales[rows] = tile_scales.view(rows.numel(), -1)
    values[pattern.slots] = kept.to(values.dtype)
