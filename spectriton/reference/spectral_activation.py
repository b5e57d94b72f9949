"""Activations of spectra: an odd monotone function of the real and of the imaginary part.

Derivatives are taken from the output, so that nothing but the output needs to be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """An odd monotone ``h`` with what backward needs, as functions of the output ``q = h(v)``."""

    forward: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    v_derivative: Callable[[Tensor], Tensor]  # v * h'(v)


def _below_one(q: Tensor) -> Tensor:
    limit = 1 - torch.finfo(q.dtype).eps / 2
    return q.clamp(-limit, limit)


ACTIVATIONS: dict[str, Activation] = {
    "tanh": Activation(torch.tanh, lambda q: 1 - q * q, lambda q: torch.atanh(_below_one(q)) * (1 - q * q)),
    "softsign": Activation(
        lambda v: torch.where(v.isinf(), v.sign(), v / (1 + v.abs())),
        lambda q: (1 - q.abs()).square(),
        lambda q: q * (1 - q.abs()),
    ),
    "asinh": Activation(torch.asinh, lambda q: 1 / torch.cosh(q), torch.tanh),
    "atan": Activation(torch.atan, lambda q: torch.cos(q).square(), lambda q: torch.sin(q) * torch.cos(q)),
    "identity": Activation(lambda v: v, torch.ones_like, lambda q: q),
}


def activate(parts: Tensor, kind: str, scale: Tensor | None) -> Tensor:
    """``scale * h(parts / scale)`` of real numbers; ``scale`` broadcasts."""
    if kind == "identity":
        return parts.clone()
    h = ACTIVATIONS[kind].forward
    return h(parts) if scale is None else scale * h(parts / scale)


def activate_backward(grad: Tensor, output: Tensor, kind: str, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradient for the input of :func:`activate`, and the terms whose sum is the gradient for ``scale``."""
    if kind == "identity":
        return grad.clone(), None if scale is None else torch.zeros_like(grad)
    rule = ACTIVATIONS[kind]
    if scale is None:
        return grad * rule.derivative(output), None
    q = output / scale
    return grad * rule.derivative(q), grad * (q - rule.v_derivative(q))


def activate_backward_input(
    grad: Tensor, parts: Tensor, kind: str, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """:func:`activate_backward` from the input, which says more where the output is saturated."""
    if kind == "identity":
        return grad.clone(), None if scale is None else torch.zeros_like(grad)
    v = parts if scale is None else parts / scale
    rule = ACTIVATIONS[kind]
    q = rule.forward(v)
    slope = rule.derivative(q)
    # Where the slope is zero, v may be infinite.
    terms = None if scale is None else grad * (q - (v * slope).masked_fill_(slope == 0, 0))
    return grad * slope, terms


def _per_channel(scale: Tensor | None, ndim: int) -> Tensor | None:
    return None if scale is None else scale.view(-1, *(1,) * (ndim - 1))


def spectral_activation(x: Tensor, kind: str, scale: Tensor | None = None) -> Tensor:
    """``s h(re / s) + i s h(im / s)``; ``x`` is complex, ``(B, C, *F)`` where a ``(C,)`` scale is given."""
    parts = torch.view_as_real(x.contiguous())
    out = activate(parts, kind, _per_channel(scale, parts.ndim - 1))
    return torch.view_as_complex(out)


def spectral_activation_backward(
    grad: Tensor, z: Tensor, kind: str, scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients for ``x`` and ``scale`` of :func:`spectral_activation` from its output ``z``."""
    grad_parts = torch.view_as_real(grad.resolve_conj().contiguous())
    parts = torch.view_as_real(z.contiguous())
    grad_x, terms = activate_backward(grad_parts, parts, kind, _per_channel(scale, parts.ndim - 1))
    grad_scale = None
    if terms is not None:
        channel_last = [dim for dim in range(terms.ndim) if dim != 1]
        grad_scale = terms.sum(channel_last)
    return torch.view_as_complex(grad_x.contiguous()), grad_scale
