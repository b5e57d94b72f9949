"""The spectrum of convolution taps, as real matrices ready for a batched matmul."""

from __future__ import annotations

import torch
from torch import Tensor


def complex_kernel_spectrum(weight: Tensor, basis: Tensor, groups: int) -> Tensor:
    """``K[f] = sum_t weight[o, i, t] basis[f, t]``.

    Args:
        weight: ``(O, I / g, kh, kw)`` real taps.
        basis: ``(Fc, kh * kw, 2)`` from :func:`spectriton.frequencies.tap_basis`.
        groups: number of groups ``g``.

    Returns:
        ``(Fc, g, I / g, O / g)`` complex.
    """
    outputs, inputs = weight.shape[:2]
    taps = weight.reshape(groups, outputs // groups, inputs, -1).permute(3, 0, 2, 1).flatten(1)
    # The taps are real, but a complex product leaves real and imaginary parts side by side, where a real one would
    # need another pass to bring them there.
    phases = torch.view_as_complex(basis.contiguous())
    return torch.mm(phases, taps.to(phases.dtype)).view(-1, groups, inputs, outputs // groups)


def complex_kernel_spectrum_adjoint(grad: Tensor, basis: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """The adjoint of :func:`complex_kernel_spectrum`: ``(Fc, g, I / g, O / g)`` to ``(O, I / g, kh, kw)``."""
    rows, groups, inputs, outputs = grad.shape
    taps = torch.mm(torch.view_as_complex(basis.contiguous()).mH, grad.reshape(rows, -1)).real
    return taps.view(-1, groups, inputs, outputs).permute(1, 3, 2, 0).reshape(groups * outputs, inputs, *kernel_size)


def kernel_spectrum(weight: Tensor, basis: Tensor, groups: int, out: Tensor) -> Tensor:
    """Taps to embedded weights: each complex weight becomes ``[[re, im], [-im, re]]``.

    Args:
        weight: ``(O, I / g, kh, kw)``.
        basis: ``(Fc, kh * kw, 2)``.
        groups: number of groups ``g``.
        out: ``(Fc, g, 2 I / g, 2 O / g)``; (input channel, part) by (output channel, part), written in full.
    """
    spectrum = complex_kernel_spectrum(weight, basis, groups)
    rows, _, inputs, outputs = spectrum.shape
    parts = torch.view_as_real(spectrum)
    embedded = out.view(rows, groups, inputs, 2, outputs, 2)
    embedded[:, :, :, 0].copy_(parts)
    embedded[:, :, :, 1, :, 0].copy_(-parts[..., 1])
    embedded[:, :, :, 1, :, 1].copy_(parts[..., 0])
    return out


def kernel_spectrum_adjoint(grad: Tensor, basis: Tensor, groups: int, out: Tensor) -> Tensor:
    """Adds the gradient for the taps, given that of the embedded weights, to ``out`` ``(O, I / g, kh, kw)``."""
    rows, _, inputs, outputs = grad.shape
    blocks = grad.reshape(rows, groups, inputs // 2, 2, outputs // 2, 2)
    real = blocks[:, :, :, 0, :, 0] + blocks[:, :, :, 1, :, 1]
    imaginary = blocks[:, :, :, 0, :, 1] - blocks[:, :, :, 1, :, 0]
    spectrum = torch.complex(real.to(out.dtype), imaginary.to(out.dtype))
    return out.add_(complex_kernel_spectrum_adjoint(spectrum, basis.to(out.dtype), (out.shape[2], out.shape[3])))
