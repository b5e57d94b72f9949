"""Maximum pooling and ReLU of packed maps, packed again, against the way round through whole maps.

Forward, and forward with backward. Maps are photograph-like; one threshold keeps 0.24 of the input's coefficients and
is the result's, too. Beside both stand torch's layers on dense maps, which nothing packs: what they take is the price
of packing.

Bytes: kept values, bitmap and offsets of input and output, and with backward the gradients of their values; input and
output, and their gradients, for dense maps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.maps import Shape, independent, photograph_like, threshold_for
from bench.timing import DEVICE, Measure, by_size, contenders, error, generator, nbytes
from spectriton import PackedSpectrum, ops

# On the CPU the first two are transformed by matrix products, the last is not.
SHAPES: list[Shape] = by_size(
    cuda=[(128, 64, 28, 28), (128, 64, 56, 56)],
    cpu=[(128, 6, 28, 28), (128, 16, 16, 16), (32, 6, 56, 56)],
    quick=[(8, 6, 16, 16)],
)
DENSITY = 0.24
OPS: dict[str, tuple[Callable[..., Any], Callable[[Tensor], Tensor]]] = {
    "max_pool2d": (lambda packed, **rule: ops.max_pool2d(packed, 2, **rule), lambda x: F.max_pool2d(x, 2)),
    "spatial_relu": (ops.spatial_relu, F.relu),
}


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
@contenders("spectriton", "spectriton reference", "spectriton by way of maps", "torch on dense maps")
def test_pool2d(measure: Measure, name: str, shape: Shape, mode: str, contender: str) -> None:
    packed_op, dense_op = OPS[name]
    half = torch.fft.rfft2(photograph_like(shape), norm="ortho")
    threshold = threshold_for(independent(half, shape[2:]).abs(), DENSITY)

    def direct(packed: PackedSpectrum) -> PackedSpectrum:
        result: PackedSpectrum = packed_op(packed, threshold=threshold)
        return result

    def by_way_of_maps(packed: PackedSpectrum) -> PackedSpectrum:
        return ops.to_spectral(dense_op(ops.to_spatial(packed)), threshold=threshold)

    def packed(number: int) -> PackedSpectrum:
        return ops.to_spectral(photograph_like(shape, number), threshold=threshold).requires_grad_()

    call: Callable[[Any], Any]
    if contender == "torch on dense maps":
        call, result = dense_op, dense_op(photograph_like(shape))
        moved = nbytes(photograph_like(shape), result)
        gradients = moved

        def inputs(number: int) -> tuple[Any, ...]:
            return photograph_like(shape, number).requires_grad_(), gradient(dense_op(photograph_like(shape, number)))

    else:
        call = by_way_of_maps if contender.endswith("by way of maps") else direct
        entry, pooled, expected = packed(0), call(packed(0)), by_way_of_maps(packed(0))
        assert error(ops.to_spatial(pooled), ops.to_spatial(expected)) < 1e-2  # at the threshold either may happen
        moved, gradients = entry.nbytes + pooled.nbytes, 8 * (entry.kept + pooled.kept)

        def inputs(number: int) -> tuple[Any, ...]:
            return packed(number), gradient(call(packed(number)).values)

    def both(x: Any, grad: Tensor) -> Tensor:
        (result,) = torch.autograd.grad(differentiable(call(x)), differentiable(x), grad)
        return result

    group = f"{name} of {'x'.join(map(str, shape))} at density {DENSITY}, {mode}"
    if mode == "both":
        measure(group, contender, both, inputs, moved + gradients)
    else:
        measure(group, contender, lambda x, _: call(x), inputs, moved)


def gradient(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=generator(99), device=DEVICE)


def differentiable(x: Tensor | PackedSpectrum) -> Tensor:
    return x.edge if isinstance(x, PackedSpectrum) else x
