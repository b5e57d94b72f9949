"""Spectral activation ``h(re) + i h(im)``: ``ops.spectral_activation`` against torch, forward and backward.

Contenders: ``torch.complex(tanh(re), tanh(im))`` as it is usually written, tanh of ``view_as_real`` (one pass over
contiguous memory: the best that eager torch can do), and that compiled. With a scale: ``s tanh(x / s)``, per channel.

Bytes: forward reads ``x`` and writes the result; backward reads the gradient and the result and writes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.timing import DEVICE, Measure, by_size, compiled, contenders, error, generator, nbytes
from spectriton import ops

SHAPE = by_size(cuda=(128, 64, 56, 29), cpu=(32, 64, 32, 17), quick=(8, 32, 16, 9))
MODES = ("forward", "backward", "forward with scale", "backward with scale")


def apart(x: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return torch.complex(torch.tanh(x.real), torch.tanh(x.imag))
    s = scale[:, None, None]
    return torch.complex(s * torch.tanh(x.real / s), s * torch.tanh(x.imag / s))


def on_pairs(pairs: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return torch.tanh(pairs)
    s = scale[:, None, None, None]
    return s * torch.tanh(pairs / s)


def in_pairs(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of pairs as one of complex tensors."""
    return lambda x, scale: torch.view_as_complex(function(torch.view_as_real(x), scale))


def contender_of(name: str) -> Callable[[Tensor, Tensor | None], Tensor]:
    if name == "spectriton":
        return lambda x, scale: ops.spectral_activation(x, "tanh", scale)
    if name == "torch re, im":
        return apart
    return in_pairs(compiled(on_pairs) if name == "torch.compile" else on_pairs)


@pytest.mark.parametrize("mode", MODES)
@contenders("spectriton", "torch re, im", "torch pairs", cuda=("torch.compile",))
def test_spectral_activation(measure: Measure, mode: str, contender: str) -> None:
    backward, scaled = mode.startswith("backward"), mode.endswith("scale")
    activate = contender_of(contender)
    scale = torch.full((SHAPE[1],), 3.0, device=DEVICE, requires_grad=backward) if scaled else None

    def inputs(number: int) -> tuple[Any, ...]:
        x = torch.randn(SHAPE, dtype=torch.complex64, generator=generator(number), device=DEVICE)
        return (x.requires_grad_() if backward else x), scale

    def prepare(x: Tensor, scale: Tensor | None) -> tuple[Any, ...]:
        return activate(x, scale), [t for t in (x, scale) if t is not None], grad

    x, _ = inputs(0)
    grad = torch.randn(SHAPE, dtype=torch.complex64, generator=generator(99), device=DEVICE)
    with torch.no_grad():
        wide = None if scale is None else scale.double()
        assert error(activate(x, scale), apart(x.to(torch.complex128), wide)) < 1e-6
    if backward:
        leaves = [t.detach().to(torch.complex128 if t.is_complex() else torch.float64) for t in prepare(x, scale)[1]]
        wanted = torch.autograd.grad(
            apart(*(t.requires_grad_() for t in leaves), *([None] * (2 - len(leaves)))),
            leaves,
            grad.to(torch.complex128),
        )
        for got, want in zip(torch.autograd.grad(*prepare(x, scale)), wanted, strict=True):
            assert error(got, want) < 1e-4
    measure(
        f"spectral_activation {SHAPE}, {mode}",
        contender,
        torch.autograd.grad if backward else activate,
        inputs,
        (3 if backward else 2) * nbytes(x),
        prepare=prepare if backward else None,
        state=(grad,),
    )
