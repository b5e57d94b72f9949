"""Rows of packed spectra to dense chunks of pairs and back."""

from __future__ import annotations

import ctypes
from math import gcd
from typing import Any

import torch
from torch import Tensor

from spectriton_native._call import FORMATS, call, check_complete

_GROUPS = 16  # of rows that csrc/rows.c adds up apart
_LEAST = 2.0**-149  # the least positive float32


class Part(ctypes.Structure):
    """A range of the rows and tiles of a packed spectrum, as the C functions take it. See :func:`Part.of`."""

    held: tuple[Tensor | None, ...]  # as long as there are pointers to them
    _fields_ = (
        ("bitmap", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("first_row", "row_count", "tiles", "tile_bytes", "t0", "t1")),
        *((name, ctypes.c_int64) for name in ("local", "base", "limit")),
    )

    @staticmethod
    def of(
        bitmap: Tensor,
        rows: slice | Tensor,
        t0: int,
        t1: int,
        offsets: Tensor | None = None,
        limit: int = 0,
        *,
        base: int = 0,
        local: bool = False,
    ) -> Part:
        """The frequencies ``rows`` and tiles ``t0:t1`` of a packed spectrum.

        Args:
            bitmap: ``(F, T, tile / 8)``.
            rows: a range of frequencies, or ``(Fc,)`` int64.
            t0: first tile.
            t1: one past the last.
            offsets: ``(F, T)`` int32; ``local``: of the part only, ``(Fc, t1 - t0)``. None where no values are asked
                for.
            limit: how many values there are; offsets beyond it are reported.
            base: what offsets are counted from.
            local: see ``offsets``.
        """
        _, tiles, size = bitmap.shape
        pointer = None if offsets is None else offsets.data_ptr()
        if isinstance(rows, slice):
            numbers, listed, first, count = None, None, rows.start, rows.stop - rows.start
        else:
            numbers = rows.contiguous()
            listed, first, count = numbers.data_ptr(), 0, numbers.numel()
        part = Part(bitmap.data_ptr(), pointer, listed, first, count, tiles, size, t0, t1, local, base, limit)
        part.held = (bitmap, offsets, numbers)
        part.positions = (t1 - t0) * size * 8
        return part

    def with_offsets(self, offsets: Tensor, limit: int) -> Part:
        """This part, with offsets of its own, ``(Fc, t1 - t0)``."""
        self.offsets, self.limit, self.local = offsets.data_ptr(), limit, True
        self.held = (*self.held, offsets)
        return self

    def tiles_of(self) -> tuple[int, int]:
        """``(Fc, t1 - t0)``."""
        return self.row_count, self.t1 - self.t0


def expand_rows(part: Part, values: Tensor, scales: Tensor, out: Tensor) -> None:
    """Writes all of ``out`` ``(Fc, positions, 2)``: stored values, those in integers times ``scales`` ``(F, T)``."""
    check_complete(call("expand_rows", part, values, FORMATS[values.dtype], scales, out, result=ctypes.c_int))


def store_rows(
    part: Part,
    y: Tensor,
    values: Tensor,
    scales: Tensor | None = None,
    active: bool = False,
    numbers: Tensor | None = None,
) -> None:
    """Writes stored ``values`` where the pattern keeps pairs of the chunk ``y`` ``(Fc, positions, 2)``.

    Args:
        part: rows and tiles.
        y: the chunk.
        values: in any format.
        scales: ``(F, T)``, written for the tiles of the part where values are integers.
        active: store ``s tanh(x / s)`` of both parts.
        numbers: ``(C,)``, the s of each channel; one where left out.
    """
    table, channels = (None, 1) if numbers is None else (_by_eights(numbers), numbers.numel())
    given = (part, y, table, channels, int(active), values, FORMATS[values.dtype], scales)
    check_complete(call("store_rows", *given, result=ctypes.c_int))


def unpack_gradient_rows(
    part: Part, grad: Tensor, values: Tensor, scales: Tensor, numbers: Tensor | None, out: Tensor
) -> Tensor | None:
    """Writes all of ``out`` ``(Fc, positions, 2)``: the gradient behind :func:`store_rows` where that was ``active``.

    Args:
        part: rows and tiles.
        grad: ``(N, 2)``, of the stored values.
        values: what was stored.
        scales: ``(F, T)``, of integers.
        numbers: as they were.
        out: zero where nothing is kept.

    Returns:
        The gradient of ``numbers``, of this part.
    """
    format = FORMATS[values.dtype]
    if numbers is None:
        given: tuple[Any, ...] = (None, 1, None, None)
    else:
        table = _by_eights(numbers)
        sums = torch.zeros(_GROUPS, table.numel(), dtype=torch.float64)
        given = (table, numbers.numel(), sums, torch.empty(numbers.shape))
    missing = call("unpack_gradient_rows", part, grad, values, format, scales, *given, out, result=ctypes.c_int)
    check_complete(missing)
    result: Tensor | None = given[3]
    return result


def index_tiles(bitmap: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Counts, starts and order of :class:`spectriton.reference.TileIndex`, of ``(F, T, tile / 8)`` and ``(F, T)``."""
    counts, starts = torch.empty(offsets.shape, dtype=torch.int64), torch.empty(offsets.shape, dtype=torch.int64)
    ordered = call(
        "index_tiles", bitmap, offsets, offsets.numel(), bitmap.shape[2], counts, starts, result=ctypes.c_int
    )
    return counts, starts, bool(ordered)


def filled_rows(bitmap: Tensor) -> int:
    """How many rows of a bitmap ``(F, T, tile / 8)`` come before the tail in which no bit is set."""
    frequencies, tiles, size = bitmap.shape
    return int(call("filled_rows", bitmap, frequencies, tiles * size, result=ctypes.c_int64))


def _by_eights(numbers: Tensor) -> Tensor:
    """Numbers of channels ``(C,)``, as often as it takes to fill whole eights."""
    return torch.cat((numbers,) * (8 // gcd(numbers.numel(), 8)))  # repeat() takes ten times as long


def threshold_rows(part: Part, y: Tensor, length: int, threshold: float | Tensor) -> tuple[Tensor, int]:
    """Writes the bitmap of a chunk ``y`` ``(Fc, positions, 2)``; see :func:`spectriton.reference.pack_rows`.

    ``threshold`` is a number or one for each channel, ``(C,)``; squares are compared. Zeros are below any threshold but
    zero, whose square may be too small for a number; nothing is below a negative one.

    Returns:
        Where the values of each tile begin, ``(Fc, t1 - t0)`` int32, and how many values there are.
    """
    starts = torch.empty(part.tiles_of(), dtype=torch.int32)
    bounds, channels, bound = None, 1, 0.0
    if isinstance(threshold, Tensor):
        squares = torch.where(threshold > 0, threshold.square().clamp_min_(_LEAST), threshold.clamp_max(0))
        bounds, channels = _by_eights(squares), threshold.numel()
    elif threshold > 0:
        bound = max(float(threshold * threshold), _LEAST)  # a power that is too large is an error
    return starts, call("threshold_rows", part, y, length, bounds, channels, bound, starts, result=ctypes.c_int64)


def count_moduli(y: Tensor, guard: int, shift: int, counts: Tensor) -> None:
    """See :func:`spectriton.reference.count_moduli`; rows of ``y`` ``(rows, n, 2)`` may stand apart."""
    call("count_moduli", y, y.shape[0], y.shape[1], y.stride(0), guard, shift, counts)


def tile_starts(part: Part) -> tuple[Tensor, int]:
    """Where the values of each tile begin where they follow each other, ``(Fc, t1 - t0)`` int32, and their number."""
    starts = torch.empty(part.tiles_of(), dtype=torch.int32)
    return starts, call("tile_starts", part, starts, result=ctypes.c_int64)


def gather_channels(part: Part, numbers: Tensor, first: int, out: Tensor) -> None:
    """Writes ``out`` ``(N,)``: for each value the one of ``numbers`` ``(C,)`` that belongs to its channel.

    ``first`` is the place of the first position in its row, a multiple of eight.
    """
    given = (_by_eights(numbers), numbers.numel(), first)
    check_complete(call("gather_channels", part, *given, out, result=ctypes.c_int))


def sum_rows(part: Part, pairs: Tensor, sums: Tensor) -> None:
    """Adds pairs ``(N, 2)``, which stand as values do, up over the rows: to ``sums`` ``(positions, 2)``."""
    check_complete(call("sum_rows", part, pairs, sums, result=ctypes.c_int))


def quantise(kept: Tensor, starts: Tensor, out: Tensor, scales: Tensor, noise: Tensor | None = None) -> None:
    """See :func:`spectriton.reference.quantise`; tiles begin at ``starts``, and ``scales`` are written for them."""
    levels = 127 if out.dtype == torch.int8 else 7
    call("quantise", kept, starts, starts.numel(), kept.shape[0], levels, noise, out, scales)


def move_runs(values: Tensor, begin: Tensor, target: Tensor, sizes: Tensor, out: Tensor) -> None:
    """Copies runs of ``sizes`` values that begin at ``begin`` to ``target`` in ``out``; all int64, of one length."""
    size = values.element_size() * (1 if values.ndim == 1 else 2)
    call("move_runs", values, begin, target, sizes, sizes.numel(), size, out)
