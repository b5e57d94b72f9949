"""Convolution taps to the real matrices that mix channels, frequency by frequency."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectriton._backend import backend
from spectriton._check import check_rank, fail
from spectriton.frequencies import frequency_grid, stored_frequencies, tap_basis
from spectriton.ops._arguments import check_size
from spectriton.ops._define import define_op


def _basis(weight: Tensor, height: int, width: int, rows: Tensor) -> Tensor:
    grid = frequency_grid(height, width, weight.device)
    return tap_basis(grid, (weight.shape[2], weight.shape[3]), rows, weight.dtype)


@define_op("(Tensor weight, int height, int width, Tensor rows, int groups) -> Tensor")
def _kernel_spectrum(weight: Tensor, height: int, width: int, rows: Tensor, groups: int) -> Tensor:
    outputs, inputs = weight.shape[:2]
    out = weight.new_empty(rows.numel(), groups, 2 * inputs, 2 * outputs // groups)
    return backend(weight.device).kernel_spectrum(weight.contiguous(), _basis(weight, height, width, rows), groups, out)


@_kernel_spectrum.register_fake
def _(weight: Tensor, height: int, width: int, rows: Tensor, groups: int) -> Tensor:
    return weight.new_empty(rows.shape[0], groups, 2 * weight.shape[1], 2 * weight.shape[0] // groups)


@define_op("(Tensor grad, Tensor weight, int height, int width, Tensor rows, int groups) -> Tensor")
def _kernel_spectrum_adjoint(
    grad: Tensor, weight: Tensor, height: int, width: int, rows: Tensor, groups: int
) -> Tensor:
    out = weight.new_zeros(weight.shape)
    backend(weight.device).kernel_spectrum_adjoint(grad.contiguous(), _basis(weight, height, width, rows), groups, out)
    return out


@_kernel_spectrum_adjoint.register_fake
def _(grad: Tensor, weight: Tensor, height: int, width: int, rows: Tensor, groups: int) -> Tensor:
    return weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ctx.height, ctx.width, rows, ctx.groups = inputs
    ctx.save_for_backward(weight, rows)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, rows = ctx.saved_tensors
    return _kernel_spectrum_adjoint(grad, weight, ctx.height, ctx.width, rows, ctx.groups), None, None, None, None


_kernel_spectrum.register_autograd(_autograd, setup_context=_setup)


def kernel_spectrum(weight: Tensor, size: tuple[int, int], rows: Tensor | None = None, groups: int = 1) -> Tensor:
    """The spectrum of convolution taps at chosen frequencies, embedded as real matrices.

    Args:
        weight: ``(O, I / groups, kh, kw)`` taps, oriented and centred as in ``nn.Conv2d(padding="same")``.
        size: ``(H, W)`` of the maps.
        rows: ``(Fc,)`` int64 stored frequencies, low to high as in
            :func:`spectriton.frequencies.frequency_grid`; all for None.
        groups: number of groups ``g``.

    Returns:
        ``(Fc, g, 2 I / g, 2 O / g)``: each complex ``K[f] = sum_t w[t] exp(+2 pi i f (t - (k-1)//2) / N)`` stands as
        ``[[re, im], [-im, re]]``, so that interleaved spectra times this matrix are mixed. Differentiable.

    Raises:
        TypeError, ValueError: ``weight`` is not real and four-dimensional, or ``groups`` does not divide its outputs.
    """
    op = "kernel_spectrum"
    check_rank(op, "weight", weight, 4)
    if not weight.is_floating_point():
        fail(op, "weight", weight, "real taps (O, I / groups, kh, kw)", "pass the spatial kernel", TypeError)
    if groups < 1 or weight.shape[0] % groups:
        fail(op, "groups", groups, f"a divisor of the {weight.shape[0]} output channels", "change groups or channels")
    height, width = check_size(op, size)
    if rows is None:
        rows = torch.arange(stored_frequencies(height, width), device=weight.device)
    return _kernel_spectrum(weight, height, width, rows, groups)
