"""ReLU and its bits, batch norm again, maximum pooling and means, on dense maps."""

from __future__ import annotations

import ctypes
from typing import Protocol

from torch import Tensor

from spectriton_native._call import call


class Window(Protocol):
    """What is needed of a window; :class:`spectriton.reference.max_pool.Window` tells what these are."""

    @property
    def kernel(self) -> tuple[int, int]: ...
    @property
    def stride(self) -> tuple[int, int]: ...
    @property
    def padding(self) -> tuple[int, int]: ...
    @property
    def dilation(self) -> tuple[int, int]: ...
    @property
    def bits(self) -> int: ...


class Pooling(ctypes.Structure):
    """Windows over maps, as the C functions take it. See :meth:`Pooling.of`."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("images", "channels", "height", "width", "down", "across"),
            *("stride_b", "stride_c", "stride_y", "stride_x"),
            *("kernel_h", "kernel_w", "step_h", "step_w", "padding_h", "padding_w", "dilation_h", "dilation_w"),
            *("channels_last", "bits"),
        )
    )

    @staticmethod
    def of(maps: Tensor, maxima: Tensor, window: Window, channels_last: bool) -> Pooling:
        """Windows over ``maps`` ``(B, C, H, W)``, of any strides, with ``maxima`` ``(B, C, Ho, Wo)`` without gaps.

        Args:
            maps, maxima: these.
            window: with codes of 1, 2, 4 or 8 bits.
            channels_last: how the maxima stand; codes have the same order.
        """
        steps = (*window.kernel, *window.stride, *window.padding, *window.dilation)
        return Pooling(*maps.shape, *maxima.shape[2:], *maps.stride(), *steps, channels_last, window.bits)


def rectify(x: Tensor, limit: float, y: Tensor, bits: Tensor) -> None:
    """Writes ``y`` ``(n,)``, ``x`` between 0 and ``limit``, and ``bits`` ``(ceil(n / 8),)`` uint8 of what lies outside.

    ``limit`` may be infinite; ``y`` may be ``x``.
    """
    call("rectify", x, x.numel(), limit, y, bits)


def clear_outside(x: Tensor, bits: Tensor, y: Tensor) -> None:
    """Writes ``y`` ``(n,)``, which may be ``x``: zeros where ``bits`` say so."""
    call("clear_outside", x, bits, x.numel(), y)


def rectify_again(x: Tensor, bits: Tensor, y: Tensor) -> None:
    """Writes ``y`` ``(n,)``, which may be ``x``: zeros where ``bits`` say so, and where ``x`` is below zero."""
    call("rectify_again", x, bits, x.numel(), y)


def rebuild(
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bits: Tensor | None,
    channels_last: bool,
    y: Tensor,
) -> None:
    """Writes ``y`` ``(B, C, H, W)``, which may be ``x``: ``(x - mean) * scale * weight + bias``, then ReLU by its bits.

    Both without gaps, in the order that ``channels_last`` says; ``bits`` as :func:`rectify` gives them, or None.
    """
    images, channels, height, width = x.shape
    sizes = (images, channels, height * width, channels_last)
    call("rebuild", x, mean, scale, weight, bias, bits, *sizes, x.new_empty(2, channels), y)


def pool_maxima(pooling: Pooling, x: Tensor, y: Tensor, codes: Tensor) -> None:
    """Writes the maxima ``y``, and where in its window each stood, ``codes`` ``(ceil(n * bits / 8),)`` uint8."""
    call("pool_maxima", pooling, x, y, codes)


def pool_maxima_again(pooling: Pooling, x: Tensor, codes: Tensor, y: Tensor) -> None:
    """Writes ``y``, the values of ``x`` where the maxima stood."""
    call("pool_maxima_again", pooling, x, codes, y)


def spread_maxima(pooling: Pooling, grad: Tensor, codes: Tensor, out: Tensor) -> None:
    """Writes ``out``, the gradient of maps without gaps between them, from that of the maxima."""
    call("spread_maxima", pooling, grad, codes, out)


def channel_means(x: Tensor, channels_last: bool, group: int, mean: Tensor) -> None:
    """Writes the ``mean`` ``(C,)`` of each channel of maps ``(B, C, H, W)`` without gaps.

    A group of channels that holds values that are not finite gets NaN throughout.
    """
    images, channels, height, width = x.shape
    call("channel_means", x, images, channels, height * width, channels_last, group, mean)
