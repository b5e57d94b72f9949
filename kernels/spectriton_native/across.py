"""Pooling and ReLU of maps whose planes stand innermost in memory."""

from __future__ import annotations

import ctypes

from torch import Tensor

from spectriton_native._call import call


class _Windows(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("planes", "height", "width", "tile", "kernel_height", "kernel_width", "stride_height")
        + ("stride_width", "bits")
    )


class _Strides(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("plane", "row", "column"))


def pool_across(
    maps: Tensor,
    kernel: list[int],
    stride: list[int],
    bits: int,
    tile: int,
    out: Tensor,
    codes: Tensor | None,
    signs: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    rectify: bool,
) -> None:
    """See :func:`spectriton.reference.across.pool_across`; ``bits`` is 0 where there are no codes."""
    windows = _Windows(*out.shape, tile, *kernel, *stride, bits)
    call("pool_across", windows, maps, _Strides(*maps.stride()), gain, shift, rectify, out, _Strides(*out.stride()),
         codes, signs)  # fmt: skip


def spread_across(
    grad: Tensor,
    kernel: list[int],
    stride: list[int],
    bits: int,
    tile: int,
    codes: Tensor | None,
    signs: Tensor | None,
    apart: bool,
    out: Tensor,
) -> None:
    """Writes gradients ``(n, Ho, Wo)`` to where maxima stood in ``out`` ``(n, H, W)``, whose planes are innermost.

    Not ``apart``, windows share elements, and gradients are added up in ``out``.
    """
    windows = _Windows(*grad.shape, tile, *kernel, *stride, bits)
    call("spread_across", windows, grad, _Strides(*grad.stride()), codes, signs, apart, out, _Strides(*out.stride()))
