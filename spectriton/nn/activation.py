"""Activation of spectra as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectriton import ops
from spectriton._check import fail


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
        self.register_parameter("scale", None if channels is None else scale_parameter(channels, scale))

    def forward(self, x: Tensor) -> Tensor:
        return ops.spectral_activation(x, self.kind, self.scale)

    def extra_repr(self) -> str:
        return self.kind if self.scale is None else f"{self.kind}, channels={self.scale.numel()}"


def scale_parameter(
    channels: int,
    scale: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Parameter:
    """A learnable activation scale ``(channels,)``.

    Raises:
        ValueError: the scale is not a positive number.
    """
    if not scale > 0:
        fail("SpectralActivation", "scale", repr(scale), "a positive number", "pass the modulus at which it saturates")
    return nn.Parameter(torch.full((channels,), float(scale), device=device, dtype=dtype))
