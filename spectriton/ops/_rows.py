"""Rows of packed spectra whose pattern is known: what they take of the workspace, and how they are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from spectriton._backend import backend
from spectriton._counts import counts_of
from spectriton.packed import Layout
from spectriton.reference import RowPattern


def row_bytes(sizes: Layout, dtype: torch.dtype, kept: int, chunks: int = 1) -> int:
    """Temporaries in bytes for one row: dense chunks of pairs, and what reading and storing the pattern takes.

    Args:
        sizes: layout of the packed spectrum.
        dtype: real precision of the chunks.
        kept: coefficients kept in all rows.
        chunks: how many dense chunks stand side by side.
    """
    item = 2 * dtype.itemsize
    share = kept / max(1, sizes.frequencies * sizes.row)
    # A mask; per kept coefficient its position and slot, the value on its way, and what rounding makes of it.
    return int(sizes.padded_row * (chunks * item + 1 + share * (16 + 4 * item)))


def rows_to_visit(bitmap: Tensor) -> Tensor:
    """``(n,)`` int64, ascending: the frequencies to look at, those at which something is kept among them.

    Where nothing was noted of the spectrum these are they, which the host waits for; else all before the empty tail.
    """
    counts = counts_of(bitmap)
    if counts is not None:
        return torch.arange(counts.rows, device=bitmap.device)
    return torch.nonzero(bitmap.flatten(1).any(1)).flatten()


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
    """Applies a pattern to ``y`` ``(Fc, Tc * tile, 2)``, tiles from ``t0`` on; rounds to the format of ``values``."""
    backend(y.device).store_rows(y, bitmap, offsets, rows, values, scales, pattern, t0)
