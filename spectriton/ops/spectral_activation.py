"""Activation of spectra."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectriton._backend import backend
from spectriton._check import check_choice, check_complex, check_rank, fail
from spectriton.ops._define import define_op
from spectriton.reference import ACTIVATIONS


@define_op("(Tensor x, str kind, Tensor? scale) -> Tensor")
def _spectral_activation(x: Tensor, kind: str, scale: Tensor | None) -> Tensor:
    return backend(x.device).spectral_activation(x.resolve_conj().contiguous(), kind, scale)


@_spectral_activation.register_fake
def _(x: Tensor, kind: str, scale: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@define_op("(Tensor grad, Tensor z, str kind, Tensor? scale) -> (Tensor, Tensor)")
def _spectral_activation_backward(grad: Tensor, z: Tensor, kind: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    grad = grad.resolve_conj().contiguous()
    grad_x, grad_scale = backend(grad.device).spectral_activation_backward(grad, z.contiguous(), kind, scale)
    return grad_x, z.real.new_empty(0) if grad_scale is None else grad_scale


@_spectral_activation_backward.register_fake
def _(grad: Tensor, z: Tensor, kind: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), z.real.new_empty(0 if scale is None else scale.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.kind, scale = inputs
    ctx.save_for_backward(output, scale)  # the output alone gives the derivative


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
    z, scale = ctx.saved_tensors
    grad_x, grad_scale = _spectral_activation_backward(grad, z, ctx.kind, scale)
    return grad_x, None, None if scale is None else grad_scale.to(scale.dtype)


_spectral_activation.register_autograd(_autograd, setup_context=_setup)


def spectral_activation(x: Tensor, kind: str = "tanh", scale: Tensor | None = None) -> Tensor:
    """``h(re) + i h(im)`` with an odd monotone ``h``; Eq. of the spectral activation in arXiv 1905.10915.

    Odd functions keep the conjugate symmetry of spectra of real maps.

    Args:
        x: complex spectra, ``(B, C, *F)`` where a scale is given, any shape otherwise.
        kind: tanh (the paper's), softsign, asinh, atan or identity.
        scale: ``(C,)`` real; ``s h(x / s)``. Differentiable. Units are those of the ortho spectrum.

    Returns:
        The shape of ``x``; backward keeps only this output.

    Raises:
        TypeError: ``x`` is not complex.
        ValueError: no such activation, or the scale does not fit the channels.
    """
    op = "spectral_activation"
    check_complex(op, "x", x)
    check_choice(op, "kind", kind, ACTIVATIONS)
    if scale is not None:
        check_rank(op, "x", x, 2, at_least=True)
        if not scale.is_floating_point():
            fail(op, "scale", scale, "a real floating-point tensor", "pass one real scale per channel", TypeError)
        if tuple(scale.shape) != (x.shape[1],):
            fail(op, "scale", scale, f"shape ({x.shape[1]},)", "pass one scale per channel (dimension 1 of x)")
        scale = scale.to(torch.float64 if x.dtype == torch.complex128 else torch.float32)
    return _spectral_activation(x, kind, scale)
