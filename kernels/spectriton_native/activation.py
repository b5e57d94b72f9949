"""The activation tanh of kept coefficients."""

from __future__ import annotations

from torch import Tensor

from spectriton_native._call import call


def activate_tanh(pairs: Tensor, scales: Tensor | None) -> None:
    """``s tanh(x / s)`` of both parts of pairs ``(n, 2)``, in place; ``scales`` are ``(n,)``, one where left out."""
    call("activate_tanh", pairs, scales, pairs.shape[0])


def tanh_backward(grad: Tensor, output: Tensor, scales: Tensor | None, out: Tensor, terms: Tensor | None) -> None:
    """Writes the gradient of pairs to ``out``, and to ``terms`` what adds up to those of the scales; all ``(n, 2)``."""
    call("tanh_backward", grad, output, scales, grad.shape[0], out, terms)
