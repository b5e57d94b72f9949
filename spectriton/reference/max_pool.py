"""Maximum pooling that keeps where in its window each maximum stood, as a code of a few bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spectriton.reference.bits import bits_for, in_memory_order, pack, unpack

aten = torch.ops.aten

# Argmax positions are int64 on their way to a code; this many of them at a time.
_POSITIONS = 1 << 20


@dataclass(frozen=True)
class Window:
    """The windows of maximum pooling over maps ``(B, C, H, W)``.

    Where a maximum stands in its window is a code of 2 bits for 2x2 windows, 4 for 3x3 and 4x4, at most 8.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool

    @property
    def positions(self) -> int:
        """Of a window."""
        return self.kernel[0] * self.kernel[1]

    @property
    def bits(self) -> int:
        """Of a code."""
        return bits_for(self.positions)

    def settings(self) -> tuple[Any, ...]:
        """As PyTorch's operators take them."""
        return self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode

    def corners(self, outputs: torch.Size, width: int, device: torch.device) -> Tensor:
        """``(Ho, Wo)`` int64: position of each window's first element in a flattened map; outside it where padded."""
        rows, columns = (
            torch.arange(n, device=device) * s - p
            for n, s, p in zip(outputs[-2:], self.stride, self.padding, strict=True)
        )
        return rows[:, None] * width + columns

    def distances(self, width: int, device: torch.device) -> Tensor:
        """``(positions,)`` int64: of each element of a window from its first, in a flattened map."""
        rows, columns = (torch.arange(k, device=device) * d for k, d in zip(self.kernel, self.dilation, strict=True))
        return (rows[:, None] * width + columns).flatten()


@lru_cache(maxsize=256)
def pooled_size(window: Window, height: int, width: int) -> tuple[int, int]:
    """Maxima down and across a map. What PyTorch refuses is refused as PyTorch does."""
    down, across = functional.max_pool2d(torch.empty(1, height, width, device="meta"), *window.settings()).shape[1:]
    return down, across


def pool_maxima(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """The maxima of maps ``(B, C, H, W)``, and the packed codes in the order in which the maxima stand in memory."""
    width = x.shape[-1]
    distances = window.distances(width, x.device)
    rows, columns = ((k - 1) * d for k, d in zip(window.kernel, window.dilation, strict=True))
    code_of = torch.zeros(rows * width + columns + 1, dtype=torch.uint8, device=x.device)
    code_of[distances] = torch.arange(window.positions, device=x.device).to(torch.uint8)
    results, codes = [], []
    step = max(1, _POSITIONS * window.stride[0] * window.stride[1] // max(1, x.shape[1:].numel()))
    for part in x.split(step):
        y, index = functional.max_pool2d(part, *window.settings(), return_indices=True)
        index = in_memory_order(index.sub_(window.corners(y.shape, width, x.device)))
        codes.append(code_of.index_select(0, index.reshape(-1)))
        results.append(y)
    y = results[0] if len(results) == 1 else torch.cat(results)
    return y, pack(torch.cat(codes), window.bits)


def _index(
    codes: Tensor, window: Window, outputs: torch.Size, channels_last: bool, width: int
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the batch, and the positions ``(b, C, Ho, Wo)`` int64 of their maxima."""
    batch, channels, down, across = outputs
    stand = (batch, down, across, channels) if channels_last else tuple(outputs)
    chosen = unpack(codes, window.bits, outputs.numel()).view(stand)
    corners = window.corners(outputs, width, codes.device)
    distances = window.distances(width, codes.device)
    # Images so many at a time that their int64 positions stay small.
    step = max(1, _POSITIONS // max(1, outputs[1:].numel()))
    for first in range(0, batch, step):
        some = chosen[first : first + step]
        index = distances.index_select(0, some.flatten().int()).view(some.shape)
        yield slice(first, first + step), (index.permute(0, 3, 1, 2) if channels_last else index) + corners


def spread_maxima(grad: Tensor, window: Window, codes: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """The adjoint of :func:`pool_maxima`: the gradient of maps of a shape.

    Args:
        grad: ``(B, C, Ho, Wo)`` of the maxima.
        window: of the pooling.
        codes: what it gave.
        shape: ``(B, C, H, W)`` of the maps.
        channels_last: how the maxima stood.
    """
    parts = []
    for part, index in _index(codes, window, grad.shape, channels_last, shape[-1]):
        above = grad[part].contiguous()
        stand_in = grad.new_zeros(1).expand(len(above), *shape[1:])
        parts.append(aten.max_pool2d_with_indices_backward(above, stand_in, *window.settings(), index))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def pool_maxima_again(x: Tensor, window: Window, codes: Tensor, outputs: torch.Size, channels_last: bool) -> Tensor:
    """The values of maps ``(B, C, H, W)`` where maxima stood: ``outputs``, channels last or not as the maxima did."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.empty(outputs, dtype=x.dtype, device=x.device, memory_format=layout)
    for part, index in _index(codes, window, outputs, channels_last, x.shape[-1]):
        y[part] = x[part].flatten(2).gather(2, index.flatten(2)).view_as(index)
    return y
