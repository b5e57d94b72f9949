"""Activations as modules: of coefficients, and of the maps behind them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from spectriton import ops
from spectriton._check import check_threshold, fail
from spectriton.nn.norm import SpectralBatchNorm2d
from spectriton.nn.transform import PackingLayer
from spectriton.packed import PackedSize, PackedSpectrum


class SpectralActivation(nn.Module):
    """``s h(re / s) + i s h(im / s)`` of complex spectra ``(B, C, *F)``.

    Args:
        kind: tanh (the paper's), softsign, asinh, atan or identity.
        channels: number of channels of a learnable scale; None for no scale.
        scale: initial value of the learnable scale, in units of the ortho spectrum.
    """

    scale: Tensor | None

    def __init__(self, kind: str = "tanh", channels: int | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.kind = ops.check_activation("SpectralActivation", kind)
        self.register_parameter("scale", None)
        if channels is not None:
            self.scale = scale_parameter("SpectralActivation", "scale", channels, scale)

    def forward(self, x: Tensor) -> Tensor:
        return ops.spectral_activation(x, self.kind, self.scale)

    def extra_repr(self) -> str:
        return self.kind if self.scale is None else f"{self.kind}, channels={self.scale.numel()}"


class SpatialReLU(PackingLayer):
    """ReLU of the maps behind a packed spectrum, packed again; backward keeps one bit a value of the maps.

    Goes further than the paper: where an activation of coefficients works on each by itself, all frequencies of a map
    meet here. Maps exist a chunk at a time. The maximum over windows may follow in the same pass.

    Args:
        threshold: coefficients of the ortho spectrum whose modulus is below it are dropped; 0.5 where no density is
            given.
        density: instead of a threshold, the fraction of coefficients to keep.
        value_dtype: format of the kept values, by default that of the input.
        workspace: bound on temporaries in bytes.
        kernel_size, stride: of the windows, as for :class:`MaxPool2d`; none by default.

    Attributes:
        last_density: fraction kept by the last forward pass, None before the first.
        last_packed: sizes of what it gave; None where that is not held for backward but made again, as behind a norm
            without windows.

    Shapes: packed ``(B, C, H, W)`` to the same, or to the packed maxima.
    """

    _default_threshold = 0.5

    def __init__(
        self,
        threshold: float | None = None,
        density: float | None = None,
        value_dtype: torch.dtype | str | None = None,
        workspace: int | None = None,
        *,
        kernel_size: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__(threshold, density, value_dtype, workspace)
        kernel, steps = ops.check_window("SpatialReLU", kernel_size, stride)
        self.kernel_size = (kernel[0], kernel[1])
        self.stride = (steps[0], steps[1])
        self._made_again = False

    def forward(self, packed: PackedSpectrum, norm: SpectralBatchNorm2d | None = None) -> PackedSpectrum:
        """Rectify; a ``norm`` given is applied first, in the same pass."""
        settings: dict[str, Any] = {
            name: getattr(self, name) for name in ("threshold", "density", "value_dtype", "kernel_size", "stride")
        }
        if norm is None:
            out = ops.with_room(self._room, ops.spatial_relu, packed, workspace=self.workspace, **settings)
        else:
            out = ops.with_room(self._room, norm, packed, relu=settings)
        self._made_again = out.origin is not None
        return self._remember(out)

    @property
    def last_packed(self) -> PackedSize | None:
        return None if self._made_again else self._last_size()

    def extra_repr(self) -> str:
        windows = "" if self.kernel_size == (1, 1) else f"kernel_size={self.kernel_size}, stride={self.stride}, "
        return windows + super().extra_repr()


def scale_parameter(
    op: str,
    argument: str,
    channels: int,
    scale: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Parameter:
    """A learnable activation scale ``(channels,)``.

    Raises:
        TypeError, ValueError: the scale is not a positive finite number.
    """
    fix = "pass the modulus at which it saturates"
    if not 0 < check_threshold(op, scale, argument, fix) < math.inf:
        fail(op, argument, scale, "a positive number", fix)
    return nn.Parameter(torch.full((channels,), float(scale), device=device, dtype=dtype))
