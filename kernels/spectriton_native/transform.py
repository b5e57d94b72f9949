"""Packed coefficients to small maps, pooled on the way where asked for, and back."""

from __future__ import annotations

import ctypes

from torch import Tensor

from spectriton_native._call import FORMATS, call, check_complete
from spectriton_native.rows import Part

#: The largest side of maps, see ``csrc/transform.c``.
LARGEST_SIDE = 64


class Plan(ctypes.Structure):
    """What a transform goes by. See :func:`Plan.of`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cos_y", "sin_y", "cos_x", "sin_x")),
        *((name, ctypes.c_int64) for name in ("height", "width", "bands", "columns")),
    )

    @staticmethod
    def of(height: int, width: int, turns: tuple[Tensor, Tensor, Tensor, Tensor], counts: int) -> Plan:
        """Of maps ``(n, height, width)``.

        Args:
            height, width: of the maps.
            turns: cosines and sines of an ortho transform along the height, ``(bands, H / 2 + 1)``, then along the
                width, ``(M, W / 2 + 1)``; for what makes maps they are transposed.
            counts: the dimension of the turns that counts frequencies.
        """
        turns = (turns[0].contiguous(), turns[1].contiguous(), turns[2].contiguous(), turns[3].contiguous())
        plan = Plan(*(t.data_ptr() for t in turns), height, width, turns[0].shape[counts], turns[2].shape[counts])
        plan.held = turns  # as long as there are pointers to them
        return plan


class Packed(ctypes.Structure):
    """Planes of a packed spectrum and how they are transformed. See :func:`Packed.of`."""

    _fields_ = (
        ("part", ctypes.POINTER(Part)),
        ("by", ctypes.POINTER(Plan)),
        *((name, ctypes.c_void_p) for name in ("places", "factors", "values", "scales")),
        ("format", ctypes.c_int64),
    )

    @staticmethod
    def of(
        part: Part,
        plan: Plan,
        places: Tensor,
        factors: Tensor,
        values: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> Packed:
        """The planes from the part's first tile on.

        Args:
            part: the frequencies that are kept.
            plan: of their maps.
            places: ``(F,)`` int64, see :class:`Products` of the reference.
            factors: ``(F,)``, by which coefficients are multiplied.
            values, scales: of the packed spectrum; None where they are to be written.
        """
        tensors = (places, factors, values, scales)
        pointers = (None if t is None else t.data_ptr() for t in tensors)
        form = 0 if values is None else FORMATS[values.dtype]
        packed = Packed(ctypes.pointer(part), ctypes.pointer(plan), *pointers, form)
        packed.held = (part, plan, tensors)
        return packed


class BlockPooling(ctypes.Structure):
    """What is done to maps on their way. See :func:`BlockPooling.of`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "signs", "gain", "shift")),
        *((name, ctypes.c_int64) for name in ("planes", "height", "width", "tile", "kernel_height", "kernel_width")),
        *((name, ctypes.c_int64) for name in ("stride_height", "stride_width", "bits", "margin", "rectify")),
    )

    @staticmethod
    def of(
        outputs: tuple[int, int, int],
        tile: int,
        kernel: tuple[int, int] = (1, 1),
        stride: tuple[int, int] = (1, 1),
        bits: int = 0,
        margin: int = 0,
        codes: Tensor | None = None,
        signs: Tensor | None = None,
        affine: tuple[Tensor, Tensor] | None = None,
        rectify: bool = False,
    ) -> BlockPooling:
        """Maxima of windows, by default of single elements: the maps themselves.

        Args:
            outputs: ``(n, Ho, Wo)``.
            tile: planes in a tile, a multiple of 32.
            kernel, stride: of the windows.
            bits: of a code, 0 without codes.
            margin, codes, signs, affine, rectify: see :func:`spectriton.reference.across.pool_across`.
        """
        gain, shift = (None, None) if affine is None else (t.contiguous() for t in affine)
        tensors = (codes, signs, gain, shift)
        pointers = (None if t is None else t.data_ptr() for t in tensors)
        pooling = BlockPooling(*pointers, *outputs, tile, *kernel, *stride, bits, margin, rectify)
        pooling.held = tensors
        return pooling


class _Maps(ctypes.Structure):
    _fields_ = (
        ("at", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("height", "width", "plane", "row", "column")),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        ("by", ctypes.POINTER(Plan)),
        ("places", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("frequencies", "padded")),
        ("at", ctypes.c_void_p),
    )


def _maps(maps: Tensor) -> _Maps:
    return _Maps(maps.data_ptr(), *maps.shape[1:], *maps.stride())


def _rows(out: Tensor, plan: Plan, places: Tensor) -> _Rows:
    return _Rows(ctypes.pointer(plan), places.data_ptr(), out.shape[0], out.shape[1], out.data_ptr())


def unpack_maps(packed: Packed, pooling: BlockPooling, out: Tensor) -> None:
    """Writes pooled maps ``out`` ``(n, Ho, Wo)``, of any strides."""
    check_complete(call("unpack_maps", packed, pooling, _maps(out), result=ctypes.c_int))


def unpack_rows_of_maps(packed: Packed, pooling: BlockPooling, plan: Plan, places: Tensor, out: Tensor) -> None:
    """Writes pairs ``out`` ``(F, padded, 2)`` of the spectra of pooled maps, zero where there is no plane.

    ``plan`` and ``places`` are those of the pooled maps.
    """
    check_complete(call("unpack_rows_of_maps", packed, pooling, _rows(out, plan, places), result=ctypes.c_int))


def rows_of_maps(maps: Tensor, plan: Plan, places: Tensor, out: Tensor) -> None:
    """Writes pairs ``out`` ``(F, padded, 2)`` of the spectra of maps ``(n, H, W)``, zero where there is no plane."""
    call("rows_of_maps", _maps(maps), maps.shape[0], _rows(out, plan, places), result=ctypes.c_int)


def gather_maps(packed: Packed, pooling: BlockPooling, grad: Tensor, out: Tensor) -> None:
    """The adjoint of :func:`unpack_maps`, for gradients ``(n, Ho, Wo)``: writes ``out`` ``(N, 2)`` where it is kept."""
    check_complete(call("gather_maps", packed, pooling, _maps(grad), out, result=ctypes.c_int))


def gather_packed_maps(packed: Packed, pooling: BlockPooling, grad: Packed, out: Tensor) -> None:
    """:func:`gather_maps` for gradients that are packed themselves."""
    check_complete(call("gather_packed_maps", packed, pooling, grad, out, result=ctypes.c_int))
