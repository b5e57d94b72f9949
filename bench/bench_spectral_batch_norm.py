"""Batch norm in training: ``ops.spectral_batch_norm`` of a packed spectrum against batch norm of dense maps.

Maps are photograph-like, 0.24 of the coefficients are kept. Torch's batch norm takes maps that lie there dense, or goes
the way round through them: to maps, batch norm, and back.

Bytes: kept values read and written, in forward and in backward. All contenders are given this count, though those that
handle dense maps move more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.maps import Shape, independent, photograph_like, threshold_for
from bench.timing import DEVICE, Measure, by_size, contenders, error
from spectriton import PackedSpectrum, ops

SHAPE: Shape = by_size(cuda=(128, 128, 56, 56), cpu=(64, 64, 32, 32), quick=(8, 32, 16, 16))
DENSITY = 0.24


@pytest.mark.parametrize("passes", ["forward", "forward and backward"])
@contenders("spectriton", "spectriton reference", "torch of maps", "torch by way of maps")
def test_spectral_batch_norm(measure: Measure, contender: str, passes: str) -> None:
    half = torch.fft.rfft2(photograph_like(SHAPE), norm="ortho")
    threshold = threshold_for(independent(half, SHAPE[2:]).abs(), DENSITY)
    weight, bias = (torch.rand(SHAPE[1], device=DEVICE).requires_grad_() for _ in range(2))

    def of_packed(packed: PackedSpectrum) -> Any:
        return ops.spectral_batch_norm(packed, weight, bias, training=True)[0]

    def of_maps(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, weight, bias, training=True)

    def by_way_of_maps(packed: PackedSpectrum) -> PackedSpectrum:
        return ops.to_spectral(of_maps(ops.to_spatial(packed)), threshold=threshold)

    def packed(number: int) -> PackedSpectrum:
        return ops.to_spectral(photograph_like(SHAPE, number), threshold=threshold).requires_grad_()

    def inputs(number: int) -> tuple[Any, ...]:
        spectrum = packed(number)
        return (ops.to_spatial(spectrum).detach().requires_grad_() if contender == "torch of maps" else spectrum,)

    layer = {"torch of maps": of_maps, "torch by way of maps": by_way_of_maps}.get(contender, of_packed)

    def call(x: Any) -> Any:
        out = layer(x)
        if passes == "forward":
            return out
        leaf, end = (t.edge if isinstance(t, PackedSpectrum) else t for t in (x, out))
        return torch.autograd.grad(end, [leaf, weight, bias], torch.ones_like(end))

    spectrum = packed(0)
    assert error(ops.to_spatial(of_packed(spectrum)), of_maps(ops.to_spatial(spectrum))) < 1e-5
    moved = (2 if passes == "forward" else 4) * 8 * spectrum.kept
    measure(f"spectral_batch_norm, {passes}, {SHAPE} at density {DENSITY}", contender, call, inputs, moved)
