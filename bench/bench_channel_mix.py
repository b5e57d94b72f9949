"""Mixing of channels, frequency by frequency: ``ops.channel_mix`` against ``torch.einsum`` on complex64.

On a GPU ``ops.channel_mix`` multiplies embedded real matrices, on which TF32 takes effect. The complex product of
einsum is asked for TF32 as well, for what it makes of it.

Bytes: ``x`` and ``w`` read, the result written. Operations: eight for each complex multiplication and addition.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.timing import DEVICE, Measure, by_size, compiled, contenders, error, generator, nbytes, precision
from spectriton import ops

# (batch, input channels, output channels, height, width of the half spectrum)
CASES = by_size(
    cuda=[(128, 64, 64, 32, 17), (128, 256, 256, 8, 5)],
    cpu=[(32, 64, 64, 16, 9), (32, 128, 128, 8, 5)],
    quick=[(8, 16, 16, 8, 5)],
)


def einsum(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bihw,oihw->bohw", x, w)


def einsum_of_parts(x: Tensor, w: Tensor) -> Tensor:
    """Four real products, which a compiler and the tensor cores can deal with."""
    (a, b), (c, d) = x.unbind(-1), w.unbind(-1)
    return torch.stack([einsum(a, c) - einsum(b, d), einsum(a, d) + einsum(b, c)], dim=-1)


@pytest.mark.parametrize("case", CASES, ids=str)
@contenders(
    "spectriton",
    "torch einsum",
    cuda=("spectriton tf32", "torch einsum tf32", "torch.compile parts", "torch.compile parts tf32"),
)
def test_channel_mix(measure: Measure, case: tuple[int, int, int, int, int], contender: str) -> None:
    batch, channels_in, channels_out, *frequencies = case

    def inputs(number: int) -> tuple[Any, ...]:
        return tuple(
            torch.randn(n, channels_in, *frequencies, dtype=torch.complex64, generator=generator(seed), device=DEVICE)
            for n, seed in ((batch, 2 * number), (channels_out, 2 * number + 1))
        )

    def parts(number: int) -> tuple[Any, ...]:
        return tuple(torch.view_as_real(t) for t in inputs(number))

    with precision("tf32" if contender.endswith("tf32") else "fp32"):
        x, w = inputs(0)
        wanted = einsum(x.to(torch.complex128), w.to(torch.complex128))
        if contender.startswith("torch.compile"):
            call, arguments = compiled(einsum_of_parts), parts
            got = torch.view_as_complex(call(*parts(0)))
        else:
            call, arguments = (ops.channel_mix if contender.startswith("spectriton") else einsum), inputs
            got = call(x, w)
        assert error(got, wanted) < (2e-3 if contender.endswith("tf32") else 1e-5)
        moved = nbytes(x, w) + 8 * wanted.numel()
        flops = 8 * batch * channels_in * channels_out * frequencies[0] * frequencies[1]
        measure(f"channel_mix {case}", contender, call, arguments, moved, flops=flops)
