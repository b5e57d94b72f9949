"""Packed coefficients to small maps whose planes stand innermost, ``(H, W, n)``, and back."""

from __future__ import annotations

import ctypes

from torch import Tensor

from spectriton_native._call import FORMATS, call, check_complete
from spectriton_native.rows import Part

#: The largest side of maps, see ``csrc/transform.c``.
LARGEST_SIDE = 64

#: Cosines and sines of an ortho transform along the height, ``(bands, H / 2 + 1)``, then along the width,
#: ``(M, W / 2 + 1)``; for :func:`unpack_maps` they are transposed.
Turns = tuple[Tensor, Tensor, Tensor, Tensor]


class _Plan(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cos_y", "sin_y", "cos_x", "sin_x")),
        *((name, ctypes.c_int64) for name in ("height", "width", "planes", "bands", "columns")),
    )


def _plan(turns: Turns, maps: Tensor, counts: int) -> _Plan:
    """``counts`` is the dimension of the turns that counts frequencies."""
    cos_y, sin_y, cos_x, sin_x = turns
    pointers = (cos_y.data_ptr(), sin_y.data_ptr(), cos_x.data_ptr(), sin_x.data_ptr())
    return _Plan(*pointers, *maps.shape, cos_y.shape[counts], cos_x.shape[counts])


def unpack_maps(
    part: Part, values: Tensor, scales: Tensor, places: Tensor, factors: Tensor, turns: Turns, out: Tensor
) -> None:
    """Writes maps ``out`` ``(H, W, n)`` of the planes from the part's first tile on.

    Args:
        part: the frequencies that are kept.
        values, scales: of the packed spectrum.
        places: ``(F,)`` int64, see :class:`Products` of the reference.
        factors: ``(F,)``, by which coefficients are multiplied.
        turns: transposed.
        out: the maps.
    """
    given = (part, _plan(turns, out, 1), values, FORMATS[values.dtype], scales, places, factors)
    check_complete(call("unpack_maps", *given, out, result=ctypes.c_int))


def gather_maps(part: Part, maps: Tensor, places: Tensor, factors: Tensor, turns: Turns, out: Tensor) -> None:
    """The adjoint, for maps ``(H, W, n)``: writes ``out`` ``(N, 2)`` where the pattern keeps something."""
    check_complete(call("gather_maps", part, _plan(turns, maps, 0), maps, places, factors, out, result=ctypes.c_int))


def rows_of_maps(maps: Tensor, places: Tensor, turns: Turns, out: Tensor) -> None:
    """Writes pairs ``out`` ``(F, padded, 2)`` of the spectra of maps ``(H, W, n)``, zero where there is no plane."""
    call("rows_of_maps", _plan(turns, maps, 0), maps, places, out.shape[0], out.shape[1], out)
