"""Spectral pooling to half the size: of a packed spectrum, and of maps against cropping between transforms.

Maps are photograph-like, 0.24 of the coefficients are kept. Beside the packed op stands the way round through maps;
beside pooling of maps ``torch.nn.functional.avg_pool2d``, which computes something else that serves the same end.

Bytes: kept values, bitmap and offsets of input and output for packed spectra, input and output for maps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.maps import Shape, independent, photograph_like, threshold_for
from bench.timing import Measure, by_size, contenders, error, nbytes
from spectriton import PackedSpectrum, ops, reference

SHAPE: Shape = by_size(cuda=(128, 128, 56, 56), cpu=(64, 64, 32, 32), quick=(8, 32, 16, 16))
SIZE, SMALL = SHAPE[2:], (SHAPE[2] // 2, SHAPE[3] // 2)
DENSITY = 0.24


def cropped(x: Tensor) -> Tensor:
    pooled = reference.spectral_pool2d(torch.fft.rfft2(x, norm="ortho"), SIZE, SMALL)
    return torch.fft.irfft2(pooled, s=SMALL, norm="ortho")


@contenders("spectriton", "torch by way of maps")
def test_spectral_pool2d(measure: Measure, contender: str) -> None:
    half = torch.fft.rfft2(photograph_like(SHAPE), norm="ortho")
    threshold = threshold_for(independent(half, SHAPE[2:]).abs(), DENSITY)

    def packed(number: int) -> tuple[Any, ...]:
        return (ops.to_spectral(photograph_like(SHAPE, number), threshold=threshold),)

    def by_way_of_maps(packed: PackedSpectrum) -> PackedSpectrum:
        return ops.to_spectral(cropped(ops.to_spatial(packed)), threshold=threshold)

    (spectrum,) = packed(0)
    pooled: Any = ops.spectral_pool2d(spectrum)
    assert error(ops.to_spatial(pooled), cropped(ops.to_spatial(spectrum))) < 1e-5
    call = ops.spectral_pool2d if contender == "spectriton" else by_way_of_maps
    measure(f"spectral_pool2d {SHAPE} at density {DENSITY}", contender, call, packed, spectrum.nbytes + pooled.nbytes)


@contenders("spectriton", "torch rfft2, crop, irfft2", "torch avg_pool2d")
def test_spectral_pool2d_maps(measure: Measure, contender: str) -> None:
    def maps(number: int) -> tuple[Any, ...]:
        return (photograph_like(SHAPE, number),)

    call = {
        "spectriton": ops.spectral_pool2d,
        "torch rfft2, crop, irfft2": cropped,
        "torch avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    }[contender]
    (x,) = maps(0)
    got = call(x)
    assert contender == "torch avg_pool2d" or error(got, cropped(x.double())) < 1e-5
    measure(f"spectral_pool2d of maps {SHAPE}", contender, call, maps, nbytes(x, got))
