"""Mixing of channels, one matrix product per frequency."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectriton import reference
from spectriton._check import check_complex, check_rank, fail
from spectriton.ops._define import define_op


@define_op("(Tensor x, Tensor w) -> Tensor")
def _channel_mix(x: Tensor, w: Tensor) -> Tensor:
    x, w = x.resolve_conj(), w.resolve_conj()
    if x.device.type == "cpu":
        return reference.channel_mix(x, w)
    count = x.shape[2:].numel()
    # Real products of embedded weights: complex ones do not reach the tensor cores.
    rows = torch.view_as_real(x.reshape(*x.shape[:2], count).permute(2, 0, 1).contiguous()).flatten(2)
    weights = torch.view_as_real(w.reshape(*w.shape[:2], count).permute(2, 1, 0).contiguous())
    turned = torch.stack([-weights[..., 1], weights[..., 0]], dim=-1)
    embedded = torch.stack([weights, turned], dim=2).flatten(3).flatten(1, 2)
    mixed = torch.view_as_complex(torch.bmm(rows, embedded).unflatten(2, (-1, 2)))
    return mixed.permute(1, 2, 0).reshape(x.shape[0], w.shape[0], *x.shape[2:]).contiguous()


@_channel_mix.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0], *x.shape[2:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, w = ctx.saved_tensors
    grad_x = grad_w = None
    if ctx.needs_input_grad[0]:
        grad_x = _channel_mix(grad, w.transpose(0, 1).conj())
    if ctx.needs_input_grad[1]:
        # sum_b g[b, o] conj(x[b, i]): batch and channels change places.
        grad_w = _channel_mix(grad.transpose(0, 1), x.transpose(0, 1).conj())
    return grad_x, grad_w


_channel_mix.register_autograd(_autograd, setup_context=_setup)


def channel_mix(x: Tensor, w: Tensor) -> Tensor:
    """``y[b, o, f] = sum_i x[b, i, f] * w[o, i, f]``: a convolution's channel sum, frequency by frequency.

    Args:
        x: ``(B, I, *F)`` complex spectra.
        w: ``(O, I, *F)`` complex kernel spectra of the same dtype.

    Returns:
        ``(B, O, *F)``; differentiable.

    Raises:
        TypeError: a tensor is not complex, or the dtypes differ.
        ValueError: channels or frequencies do not agree.
    """
    op = "channel_mix"
    for name, tensor in (("x", x), ("w", w)):
        check_complex(op, name, tensor)
        check_rank(op, name, tensor, 2, at_least=True)
    if x.dtype != w.dtype:
        fail(op, "w", w, f"dtype {x.dtype} as x has", "convert one of them with .to()", TypeError)
    if x.shape[1:] != w.shape[1:]:
        expected = f"(O, {', '.join(str(n) for n in x.shape[1:])}) to go with x of shape {tuple(x.shape)}"
        fail(op, "w", w, expected, "match input channels and frequencies")
    return _channel_mix(x, w)
