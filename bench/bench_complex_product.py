"""Elementwise complex product: ``ops.complex_product`` against ``x * w`` and a compiled product of pairs.

Bytes: ``x`` and ``w`` read, the product written, 8 each complex number; a broadcast ``w`` is read once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.timing import DEVICE, Measure, by_size, compiled, contenders, error, generator, nbytes
from spectriton import ops

SHAPE = by_size(cuda=(128, 64, 56, 29), cpu=(32, 64, 32, 17), quick=(8, 32, 16, 9))
CASES = {"same shape": SHAPE, "conj": SHAPE, "w (C, H, Wh)": SHAPE[1:], "w (C, 1, 1)": (SHAPE[1], 1, 1)}


def spectrum(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.complex64, generator=generator(seed), device=DEVICE)


def eager(x: Tensor, w: Tensor, conj_w: bool) -> Tensor:
    return x * (w.conj() if conj_w else w)


def pairs(x: Tensor, w: Tensor, conj_w: bool) -> Tensor:
    """On (re, im) pairs, which a compiler can fuse."""
    (a, b), (c, d) = x.unbind(-1), w.unbind(-1)
    if conj_w:
        d = -d
    return torch.stack([a * c - b * d, a * d + b * c], dim=-1)


@pytest.mark.parametrize("case", CASES)
@contenders("spectriton", "torch", cuda=("torch.compile",))
def test_complex_product(measure: Measure, case: str, contender: str) -> None:
    conj_w = case == "conj"

    def inputs(number: int) -> tuple[Any, ...]:
        return spectrum(SHAPE, 2 * number), spectrum(CASES[case], 2 * number + 1), conj_w

    x, w, _ = inputs(0)
    wanted = x.to(torch.complex128) * (w.conj() if conj_w else w)
    if contender == "torch.compile":
        fused = compiled(pairs)
        assert error(torch.view_as_complex(fused(torch.view_as_real(x), torch.view_as_real(w), conj_w)), wanted) < 1e-6

        def as_pairs(number: int) -> tuple[Any, ...]:
            x, w, conj_w = inputs(number)
            return torch.view_as_real(x), torch.view_as_real(w), conj_w

        call, arguments = fused, as_pairs
    else:
        call, arguments = (ops.complex_product if contender == "spectriton" else eager), inputs
        assert error(call(x, w, conj_w), wanted) < 1e-6
    moved = 2 * nbytes(x) + nbytes(w)
    measure(f"complex_product {SHAPE}, {case}", contender, call, arguments, moved, flops=6 * x.numel())
