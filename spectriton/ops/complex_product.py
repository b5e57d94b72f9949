"""Elementwise complex product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectriton._backend import backend
from spectriton._check import check_complex, describe, fail
from spectriton.ops._define import define_op


@define_op("(Tensor x, Tensor w, bool conj_w) -> Tensor")
def _complex_product(x: Tensor, w: Tensor, conj_w: bool) -> Tensor:
    return backend(x.device).complex_product(x.resolve_conj(), w.resolve_conj(), conj_w)


@_complex_product.register_fake
def _(x: Tensor, w: Tensor, conj_w: bool) -> Tensor:
    return x.new_empty(torch.broadcast_shapes(x.shape, w.shape))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, ctx.conj_w = inputs
    ctx.save_for_backward(x, w)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, w = ctx.saved_tensors
    grad_x = grad_w = None
    if ctx.needs_input_grad[0]:
        grad_x = _complex_product(grad, w, not ctx.conj_w).sum_to_size(x.shape)
    if ctx.needs_input_grad[1]:
        # d(x w) pairs with conj(x) g; d(x conj(w)) with x conj(g).
        product = _complex_product(x, grad, True) if ctx.conj_w else _complex_product(grad, x, True)
        grad_w = product.sum_to_size(w.shape)
    return grad_x, grad_w, None


_complex_product.register_autograd(_autograd, setup_context=_setup)


def complex_product(x: Tensor, w: Tensor, conj_w: bool = False) -> Tensor:
    """``x * w``, or ``x * conj(w)``, elementwise with broadcasting.

    Args:
        x, w: complex tensors of broadcastable shapes, one dtype, one device.
        conj_w: take the conjugate of ``w``.

    Returns:
        A contiguous tensor of the broadcast shape; differentiable (twice, too).

    Raises:
        TypeError: a tensor is not complex, or the dtypes differ.
        ValueError: the shapes do not broadcast.
    """
    check_complex("complex_product", "x", x)
    check_complex("complex_product", "w", w)
    if not isinstance(conj_w, bool):
        fail("complex_product", "conj_w", describe(conj_w), "True or False", "pass a bool", TypeError)
    if x.dtype != w.dtype:
        fail("complex_product", "w", w, f"dtype {x.dtype} as x has", "convert one of them with .to()", TypeError)
    try:
        torch.broadcast_shapes(x.shape, w.shape)
    except RuntimeError:
        fail("complex_product", "w", w, f"a shape that broadcasts with {tuple(x.shape)}", "insert dimensions of size 1")
    return _complex_product(x, w, conj_w)
