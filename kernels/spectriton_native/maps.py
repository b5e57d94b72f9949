"""Packed coefficients of planes to and from their places in spectra."""

from __future__ import annotations

import ctypes

from torch import Tensor

from spectriton_native._call import FORMATS, call, check_complete
from spectriton_native.rows import Part


def expand_parts(
    part: Part, values: Tensor, scales: Tensor, places: Tensor, factors: Tensor, band: int, out: Tensor
) -> None:
    """Writes ``out`` ``(rows, n)``: the real part of frequency ``f`` in row ``places[f]``, the other ``band`` below.

    Values are multiplied by ``factors`` ``(F,)``; rows of no frequency are zero.
    """
    given = (part, values, FORMATS[values.dtype], scales, places, factors, band, out.shape[1], out.shape[0])
    check_complete(call("expand_parts", *given, out, result=ctypes.c_int))


def gather_parts(part: Part, parts: Tensor, places: Tensor, factors: Tensor, band: int, out: Tensor) -> None:
    """The way back from parts ``(rows, n)``, times ``factors``: writes ``out`` ``(N, 2)`` where something is kept."""
    given = (part, parts, places, factors, band, parts.shape[1])
    check_complete(call("gather_parts", *given, out, result=ctypes.c_int))


def rows_of_parts(parts: Tensor, places: Tensor, band: int, out: Tensor) -> None:
    """Writes pairs ``out`` ``(F, padded, 2)`` of parts ``(rows, n)``, zero where there is no plane."""
    call("rows_of_parts", parts, places, band, out.shape[0], parts.shape[1], out.shape[1], out)


def expand_planes(
    part: Part, values: Tensor, scales: Tensor, index: Tensor, factors: Tensor | None, out: Tensor
) -> None:
    """Writes half spectra ``out`` ``(n, half, 2)``: frequency ``f`` at ``index[f]``, times ``factors``."""
    given = (part, values, FORMATS[values.dtype], scales, index, factors, out.shape[1], out.shape[0])
    check_complete(call("expand_planes", *given, out, result=ctypes.c_int))
