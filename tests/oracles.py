"""The same mathematics the long way round: dense tensors, spatial convolution, masks, plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "softsign": F.softsign,
    "asinh": torch.asinh,
    "atan": torch.atan,
    "identity": lambda v: v,
}


def half_spectrum(x: Tensor) -> Tensor:
    """`rfft2`, ortho; torch has no transform of an empty batch."""
    if x.numel() == 0:
        return torch.zeros(*x.shape[:-1], x.shape[-1] // 2 + 1, dtype=torch.complex128).to(
            torch.complex128 if x.dtype == torch.float64 else torch.complex64
        )
    return torch.fft.rfft2(x, norm="ortho")


def masked(spectrum: Tensor, threshold: float) -> Tensor:
    """The threshold as a mask: zero below it, except for the zero frequency."""
    keep = ~(spectrum.abs() < threshold)
    keep[..., 0, 0] = True
    return spectrum * keep


def same_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, padding_mode: str = "circular") -> Tensor:
    """Convolution in space with the output size of the input, left padding (k - 1) // 2."""
    kh, kw = weight.shape[2:]
    padding = ((kw - 1) // 2, kw // 2, (kh - 1) // 2, kh // 2)
    padded = F.pad(x, padding, mode="circular") if padding_mode == "circular" else F.pad(x, padding)
    return F.conv2d(padded, weight, bias, groups=groups)


def block(
    spectrum: Tensor,
    size: tuple[int, int],
    weight: Tensor,
    bias: Tensor | None,
    threshold: float,
    activation: str,
    scale: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """Algorithm 1 on a dense half spectrum, convolved in space."""
    x = torch.fft.irfft2(spectrum, s=size, norm="ortho")
    y = masked(torch.fft.rfft2(same_conv2d(x, weight, bias, groups), norm="ortho"), threshold)
    s = 1.0 if scale is None else scale[:, None, None]
    h = ACTIVATIONS[activation]
    return torch.complex(s * h(y.real / s), s * h(y.imag / s))
