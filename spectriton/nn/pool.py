"""Pooling of maps that keeps no maps for backward."""

from __future__ import annotations

from torch import Tensor, nn

from spectriton import ops
from spectriton.packed import PackedSpectrum


class _Pool2d(nn.Module):
    def __init__(self, kernel_size: int | tuple[int, int] = 2, stride: int | tuple[int, int] | None = None) -> None:
        super().__init__()
        kernel, steps = ops.check_window(type(self).__name__, kernel_size, stride)
        self.kernel_size = (kernel[0], kernel[1])
        self.stride = (steps[0], steps[1])

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


class MaxPool2d(_Pool2d):
    """``nn.MaxPool2d`` without padding that saves 2 to 8 bits per output for backward instead of its input.

    Takes real maps ``(B, C, H, W)`` or their :class:`~spectriton.PackedSpectrum`, of which it makes the maps a chunk
    at a time, and gives real maps.

    Args:
        kernel_size: window, at most 256 positions.
        stride: step, by default the window.
        workspace: bound on temporaries in bytes, for packed spectra.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int] = 2,
        stride: int | tuple[int, int] | None = None,
        workspace: int | None = None,
    ) -> None:
        super().__init__(kernel_size, stride)
        self.workspace = workspace

    def forward(self, x: Tensor | PackedSpectrum) -> Tensor:
        return ops.max_pool2d(x, self.kernel_size, self.stride, workspace=self.workspace)


class AvgPool2d(_Pool2d):
    """``nn.AvgPool2d`` without padding that saves nothing for backward.

    Args:
        kernel_size: window.
        stride: step, by default the window.
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.avg_pool2d(x, self.kernel_size, self.stride)
