"""What batch norm and ReLU made of maps, once more."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectriton.reference.bits import clear_outside

__all__ = ["Statistics", "rebuild"]


class Statistics(NamedTuple):
    """What batch norm does to each channel, all ``(C,)``.

    Attributes:
        mean: subtracted; None for no batch norm.
        scale: inverse deviation, or the variance where an ``eps`` is given.
        weight, bias: or None.
    """

    mean: Tensor | None = None
    scale: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


def rebuild(
    x: Tensor,
    statistics: Statistics,
    eps: float | None,
    outside: Tensor | None,
    channels_last: bool,
    inplace: bool,
) -> Tensor:
    """Batch norm with known statistics, then ReLU by its bits, either of which may be missing.

    Args:
        x: maps ``(B, C, H, W)``; they may be written over with ``inplace``.
        statistics: of the batch norm.
        eps: added to the variance; None where the inverse deviation is given.
        outside: bits of the ReLU, as :func:`spectriton.reference.bits.outside` gives them, or None.
        channels_last: the order of the bits.
        inplace: whether to spare a copy.
    """
    mean, scale, weight, bias = statistics
    if mean is not None and scale is not None:
        if eps is not None:
            scale = torch.rsqrt(scale + eps)
        if weight is not None:
            scale = scale * weight
        shift = -mean * scale
        if bias is not None:
            shift = shift + bias
        x = (x if inplace else x.clone()).mul_(scale.view(-1, 1, 1)).add_(shift.view(-1, 1, 1))
        inplace = True
    if outside is None:
        return x
    x = x.clamp_(min=0) if inplace else x.clamp(min=0)
    return clear_outside(x, outside, channels_last, inplace=True)
