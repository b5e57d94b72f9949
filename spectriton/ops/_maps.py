"""What compressed modules do to dense maps besides coding them, on the backend of their device. Nothing differentiates
through this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectriton._backend import backend
from spectriton.reference.bits import clear, is_channels_last, outside, pack, unpack
from spectriton.reference.max_pool import Window
from spectriton.reference.rebuild import Statistics

__all__ = [
    "Statistics",
    "Window",
    "clear",
    "clear_outside",
    "is_channels_last",
    "outside",
    "pack",
    "pool_maxima",
    "pool_maxima_again",
    "rebuild",
    "rectify",
    "spread_maxima",
    "unpack",
]


def rectify(x: Tensor, limit: float, inplace: bool) -> tuple[Tensor, Tensor]:
    """See :func:`spectriton.reference.bits.rectify`."""
    return backend(x.device).rectify(x, limit, inplace)


def clear_outside(x: Tensor, bits: Tensor, channels_last: bool, inplace: bool) -> Tensor:
    """See :func:`spectriton.reference.bits.clear_outside`."""
    return backend(x.device).clear_outside(x, bits, channels_last, inplace)


def rebuild(
    x: Tensor, statistics: Statistics, eps: float | None, outside: Tensor | None, channels_last: bool, inplace: bool
) -> Tensor:
    """See :func:`spectriton.reference.rebuild.rebuild`."""
    return backend(x.device).rebuild(x, statistics, eps, outside, channels_last, inplace)


def pool_maxima(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """See :func:`spectriton.reference.max_pool.pool_maxima`."""
    return backend(x.device).pool_maxima(x, window)


def pool_maxima_again(x: Tensor, window: Window, codes: Tensor, outputs: torch.Size, channels_last: bool) -> Tensor:
    """See :func:`spectriton.reference.max_pool.pool_maxima_again`."""
    return backend(x.device).pool_maxima_again(x, window, codes, outputs, channels_last)


def spread_maxima(grad: Tensor, window: Window, codes: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """See :func:`spectriton.reference.max_pool.spread_maxima`."""
    return backend(grad.device).spread_maxima(grad, window, codes, shape, channels_last)
