"""Mixing of channels, one matrix product per frequency."""

from __future__ import annotations

import torch
from torch import Tensor


def channel_mix(x: Tensor, w: Tensor) -> Tensor:
    """``y[b, o, f] = sum_i x[b, i, f] * w[o, i, f]`` for ``(B, I, *F)`` and ``(O, I, *F)``; gives ``(B, O, *F)``."""
    frequencies = x.shape[2:]
    count = frequencies.numel()  # not -1: there may be no maps
    rows = x.reshape(*x.shape[:2], count).permute(2, 0, 1)
    weights = w.reshape(*w.shape[:2], count).permute(2, 1, 0)
    return torch.bmm(rows, weights).permute(1, 2, 0).reshape(x.shape[0], w.shape[0], *frequencies).contiguous()
