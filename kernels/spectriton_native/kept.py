"""What is kept of rows of packed spectra."""

from __future__ import annotations

import ctypes

from torch import Tensor

from spectriton_native._call import FORMATS, call, check_complete
from spectriton_native.rows import Part


def sum_kept(
    part: Part, values: Tensor, scales: Tensor, first: int, weight: Tensor, numbers: Tensor | None, sums: Tensor
) -> None:
    """Adds to ``sums`` ``(positions,)`` float64, over rows times ``weight`` ``(Fc,)``: values times ``numbers``.

    ``numbers`` ``(n, 2)`` stand as the values do from ``first`` on; without them values are squared.
    """
    given = (part, values, FORMATS[values.dtype], scales, first, weight, numbers)
    check_complete(call("sum_kept", *given, sums, result=ctypes.c_int))


def combine_kept(
    part: Part,
    values: Tensor,
    scales: Tensor,
    first: int,
    gain: Tensor | None,
    weight: Tensor | None,
    numbers: Tensor | None,
    factors: Tensor | None,
    out: Tensor,
) -> None:
    """Writes ``out`` ``(n, 2)``: values times ``gain`` (a place) and ``weight`` (a row), plus ``numbers * factors``.

    Values are left out without a ``gain``. ``out`` may be the numbers.
    """
    given = (part, values, FORMATS[values.dtype], scales, first, gain, weight, numbers, factors)
    check_complete(call("combine_kept", *given, out, result=ctypes.c_int))
