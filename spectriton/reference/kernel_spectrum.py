"""The spectrum of convolution taps, as real matrices ready for a batched matmul."""

from __future__ import annotations

import torch
from torch import Tensor


def taps_matrix(weight: Tensor, groups: int) -> Tensor:
    """Taps ``(O, I / g, kh, kw)`` as ``(kh * kw, g * I / g * O / g)`` complex, for :func:`complex_kernel_spectrum`.

    The taps are real, but a complex product leaves real and imaginary parts side by side, where a real one would need
    another pass to bring them there.
    """
    outputs, inputs = weight.shape[:2]
    taps = weight.reshape(groups, outputs // groups, inputs, -1).permute(3, 0, 2, 1).flatten(1)
    return taps.to(weight.dtype.to_complex())


def complex_kernel_spectrum(taps: Tensor, basis: Tensor) -> Tensor:
    """``K[f] = sum_t taps[t] basis[f, t]``.

    Args:
        taps: ``(kh * kw, n)`` complex, from :func:`taps_matrix`.
        basis: ``(Fc, kh * kw, 2)`` from :func:`spectriton.frequencies.tap_basis`.

    Returns:
        ``(Fc, n)`` complex.
    """
    return torch.mm(torch.view_as_complex(basis.contiguous()), taps)


def complex_kernel_spectrum_adjoint(grad: Tensor, basis: Tensor) -> Tensor:
    """The adjoint of :func:`complex_kernel_spectrum`: ``(Fc, n)`` complex to ``(kh * kw, n)``."""
    return torch.mm(torch.view_as_complex(basis.contiguous()).mH, grad)


def taps_of_matrix(matrix: Tensor, weight_shape: tuple[int, ...] | torch.Size, groups: int) -> Tensor:
    """The adjoint of :func:`taps_matrix`: complex to real taps of shape ``weight_shape``, contiguous."""
    outputs, inputs = weight_shape[:2]
    taps = matrix.real.view(-1, groups, inputs, outputs // groups)
    return taps.permute(1, 3, 2, 0).contiguous().view(weight_shape)


def kernel_spectrum(weight: Tensor, basis: Tensor, groups: int, out: Tensor) -> Tensor:
    """Taps to embedded weights: each complex weight becomes ``[[re, im], [-im, re]]``.

    Args:
        weight: ``(O, I / g, kh, kw)``.
        basis: ``(Fc, kh * kw, 2)``.
        groups: number of groups ``g``.
        out: ``(Fc, g, 2 I / g, 2 O / g)``; (input channel, part) by (output channel, part), written in full.
    """
    outputs, inputs = weight.shape[:2]
    spectrum = complex_kernel_spectrum(taps_matrix(weight, groups), basis)
    parts = torch.view_as_real(spectrum.view(-1, groups, inputs, outputs // groups))
    embedded = out.view(-1, groups, inputs, 2, outputs // groups, 2)
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
    spectrum = torch.complex(real.to(out.dtype), imaginary.to(out.dtype)).view(rows, -1)
    return out.add_(taps_of_matrix(complex_kernel_spectrum_adjoint(spectrum, basis.to(out.dtype)), out.shape, groups))
