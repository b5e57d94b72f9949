"""Fourier transforms of small maps whose planes stand innermost."""

from __future__ import annotations

import ctypes

from torch import Tensor

from spectriton_native._call import call

#: The largest side of maps, see ``csrc/transform.c``.
LARGEST_SIDE = 64

#: Cosines and sines along the height, then along the width.
Turns = tuple[Tensor, Tensor, Tensor, Tensor]


class _Plan(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cos_y", "sin_y", "cos_x", "sin_x")),
        *((name, ctypes.c_int64) for name in ("height", "width", "planes", "bands", "columns")),
    )


def parts_of_maps(maps: Tensor, turns: Turns, out: Tensor) -> None:
    """Writes the parts ``out`` ``(ky * 2 * M, n)`` of real maps ``(H, W, n)``; see :class:`Products` of the reference.

    ``turns`` of an ortho transform are ``(bands, H / 2 + 1)`` and ``(M, W / 2 + 1)``.
    """
    plan = _Plan(*(t.data_ptr() for t in turns), *maps.shape, turns[0].shape[0], turns[2].shape[0])
    call("parts_of_maps", plan, maps, out)


def maps_of_parts(parts: Tensor, turns: Turns, out: Tensor) -> None:
    """Writes real maps ``out`` ``(H, W, n)``: the adjoint; ``turns`` are transposed."""
    plan = _Plan(*(t.data_ptr() for t in turns), *out.shape, turns[0].shape[1], turns[2].shape[1])
    call("maps_of_parts", plan, parts, out)
