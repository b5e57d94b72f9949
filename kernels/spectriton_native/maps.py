"""Packed coefficients of planes to their places in half spectra."""

from __future__ import annotations

import ctypes

from torch import Tensor

from spectriton_native._call import FORMATS, call, check_complete
from spectriton_native.rows import Part


def expand_planes(
    part: Part, values: Tensor, scales: Tensor, index: Tensor, factors: Tensor | None, out: Tensor
) -> None:
    """Writes half spectra ``out`` ``(n, half, 2)``: frequency ``f`` at ``index[f]``, times ``factors``."""
    given = (part, values, FORMATS[values.dtype], scales, index, factors, out.shape[1], out.shape[0])
    check_complete(call("expand_planes", *given, out, result=ctypes.c_int))
