"""Walks over the rows of a packed spectrum whose pattern is known, under a bounded workspace."""

from __future__ import annotations

import torch
from torch import Tensor

from spectriton import reference
from spectriton._backend import backend
from spectriton.packed import Layout
from spectriton.reference import RowPattern


def filled_rows(bitmap: Tensor) -> Tensor:
    """int64, ascending: the frequencies at which anything is kept. The zero frequency, kept whole, is the first."""
    return torch.nonzero(bitmap.flatten(1).any(1)).flatten()


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


def pair_view(chunk: Tensor) -> Tensor:
    """Pairs ``(Fc, P, 2)`` as ``(Fc, 2 P)``."""
    return chunk.view(chunk.shape[0], -1)


def count_bits(bitmap: Tensor) -> Tensor:
    """int64 ``(...)``: set bits of each tile of a bitmap ``(..., tile / 8)``, counted in parallel within each byte."""
    pairs = bitmap - ((bitmap >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((nibbles + (nibbles >> 4)) & 0x0F).sum(-1)


def store_rows(
    y: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    rows: Tensor,
    values: Tensor,
    scales: Tensor,
    pattern: RowPattern | None = None,
) -> None:
    """Applies a pattern to whole rows ``y`` ``(Fc, P, 2)`` and rounds to the format of ``values``.

    Integer values are left to the reference.
    """
    primitives = backend(y.device)
    if primitives.name == "reference" or scales.numel():
        reference.store_rows(y, bitmap, offsets, rows, values, scales, pattern)
    else:
        primitives.gather_rows(y, bitmap, offsets, rows, 0, values, pattern)
