"""Pooling of maps that keeps no maps for backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectriton import ops
from spectriton.nn.transform import PackedOutput, checked_format, describe_rule
from spectriton.packed import PackedSpectrum


class _Pool2d(nn.Module):
    def __init__(self, kernel_size: int | tuple[int, int] = 2, stride: int | tuple[int, int] | None = None) -> None:
        super().__init__()
        kernel, steps = ops.check_window(type(self).__name__, kernel_size, stride)
        self.kernel_size = (kernel[0], kernel[1])
        self.stride = (steps[0], steps[1])

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


class MaxPool2d(_Pool2d, PackedOutput):
    """``nn.MaxPool2d`` without padding that saves 2 to 8 bits per output for backward instead of its input.

    Takes real maps ``(B, C, H, W)`` or their :class:`~spectriton.PackedSpectrum`, of which it makes the maps a chunk
    at a time. Gives real maps, or with a thresholding rule a packed spectrum: then nothing dense is ever whole.

    Args:
        kernel_size: window, at most 256 positions.
        stride: step, by default the window.
        margin: rows and columns at every side that are left out; none where the result is packed.
        threshold, density: one of them for packed maxima of packed maps: the smallest modulus of the ortho spectrum
            that is kept, or the fraction to keep.
        value_dtype: format of the kept values, by default that of the input.
        workspace: bound on temporaries in bytes, for packed spectra.

    Attributes:
        last_density: fraction kept by the last forward pass, None before the first and without a rule.
        last_packed: its size, a :class:`spectriton.packed.PackedSize`; None likewise.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int] = 2,
        stride: int | tuple[int, int] | None = None,
        *,
        margin: int = 0,
        threshold: float | None = None,
        density: float | None = None,
        value_dtype: torch.dtype | str | None = None,
        workspace: int | None = None,
    ) -> None:
        super().__init__(kernel_size, stride)
        self.threshold, self.density = ops.thresholding_rule("MaxPool2d", threshold, density, default=None)
        self.margin = margin
        self.value_dtype = checked_format("MaxPool2d", value_dtype)
        self.workspace = workspace

    def forward(self, x: Tensor | PackedSpectrum) -> Tensor | PackedSpectrum:
        out = ops.with_room(
            self._room,
            ops.max_pool2d,
            x,
            self.kernel_size,
            self.stride,
            margin=self.margin,
            threshold=self.threshold,
            density=self.density,
            value_dtype=self.value_dtype,
            workspace=self.workspace,
        )
        if isinstance(out, PackedSpectrum):
            return self._remember(out)
        self._last = None
        return out

    def extra_repr(self) -> str:
        window = super().extra_repr() + (f", margin={self.margin}" if self.margin else "")
        if self.threshold is None and self.density is None:
            return window
        return f"{window}, {describe_rule(self.threshold, self.density, self.value_dtype)}"


class AvgPool2d(_Pool2d):
    """``nn.AvgPool2d`` without padding that saves nothing for backward.

    Args:
        kernel_size: window.
        stride: step, by default the window.
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.avg_pool2d(x, self.kernel_size, self.stride)
