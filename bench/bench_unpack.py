"""Packed to dense: ``unpack_rows`` and ``unpack_gradient_rows``, ``ops.unpack`` and ``ops.to_spatial`` against torch.

Plain torch is ``masked_scatter_`` into zeros with the mask held as a byte a coefficient; for ``to_spatial``, ``irfft2``
comes after. Maps are photograph-like, 0.24 of the coefficients are kept.

Bytes: kept values, bitmap, offsets and scales read once, the dense side written once. The result of the primitive, and
of ``masked_scatter_`` beside it, is there before the call. ``unpack_gradient_rows`` reads as many gradients, too.

Values of 8 and 4 bits are compared with int8 values of one scale, made float32 before they are scattered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.maps import (
    Shape,
    decided,
    independent,
    packed_nbytes,
    packed_rows,
    photograph_like,
    spectrum_rows,
    threshold_for,
)
from bench.timing import DEVICE, Measure, by_size, contenders, error, generator, nbytes
from spectriton import PackedSpectrum, ops, reference
from spectriton._backend import backend
from spectriton.packed import PackedSize, layout

SHAPE: Shape = by_size(cuda=(128, 128, 56, 56), cpu=(64, 64, 32, 32), quick=(8, 32, 16, 16))
DENSITY = 0.24


def scatter(values: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    return out.zero_().masked_scatter_(mask, values)


@contenders("spectriton", "spectriton reference", "torch masked_scatter_")
def test_unpack_rows(measure: Measure, contender: str) -> None:
    sizes = layout(SHAPE)
    rows = torch.arange(sizes.frequencies, device=DEVICE)
    threshold = threshold_for(torch.view_as_complex(spectrum_rows(SHAPE))[:, : sizes.row].abs(), DENSITY)
    primitives = backend(DEVICE)

    def unpack(values: Tensor, scales: Tensor, bitmap: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
        return primitives.unpack_rows(values, scales, bitmap, offsets, rows, 0, sizes.tiles, out)

    def packed(number: int) -> tuple[Any, ...]:
        y = spectrum_rows(SHAPE, number)
        return *packed_rows(y, sizes, threshold), torch.full_like(y, torch.nan)

    def masked(number: int) -> tuple[Any, ...]:
        values, scales, bitmap, offsets, out = packed(number)
        z = torch.view_as_complex(out)
        reference.unpack_rows(values, scales, bitmap, offsets, rows, 0, sizes.tiles, out)
        return torch.view_as_complex(values), z != 0, z.fill_(torch.nan)

    spectriton = contender.startswith("spectriton")
    call, inputs = (unpack, packed) if spectriton else (scatter, masked)
    z = torch.view_as_complex(spectrum_rows(SHAPE))
    wanted = torch.where(z.abs() >= threshold, z, 0)
    wanted[0] = z[0]
    got = call(*inputs(0))
    sure = decided(z, threshold)
    assert torch.equal((torch.view_as_complex(got) if spectriton else got)[sure], wanted[sure])
    moved = packed_nbytes(packed(0)[0].shape[0], sizes) + nbytes(z)
    measure(f"unpack_rows {SHAPE} at density {DENSITY}", contender, call, inputs, moved)


def scatter_gradient(grad: Tensor, values: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    return scatter(torch.view_as_complex(grad * (1 - values * values)), mask, out)


@contenders("spectriton", "spectriton reference", "torch masked_scatter_")
def test_unpack_gradient_rows(measure: Measure, contender: str) -> None:
    sizes = layout(SHAPE)
    every = slice(0, sizes.frequencies)
    threshold = threshold_for(torch.view_as_complex(spectrum_rows(SHAPE))[:, : sizes.row].abs(), DENSITY)
    primitives = backend(DEVICE)

    def unpack(grad: Tensor, values: Tensor, scales: Tensor, bitmap: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
        index = primitives.tile_index(bitmap, offsets)
        pattern = (values, scales, bitmap, offsets, every)
        primitives.unpack_gradient_rows(grad, *pattern, "tanh", None, sizes.channels, out, index)
        return out

    def packed(number: int) -> tuple[Any, ...]:
        y = spectrum_rows(SHAPE, number)
        values, *pattern = packed_rows(y, sizes, threshold)
        grad = torch.randn(values.shape, generator=generator(number), device=DEVICE)
        return grad, values.tanh(), *pattern, torch.full_like(y, torch.nan)

    def masked(number: int) -> tuple[Any, ...]:
        grad, values, scales, bitmap, offsets, out = packed(number)
        ones = torch.ones_like(values)
        rows = torch.arange(sizes.frequencies, device=DEVICE)
        reference.unpack_rows(ones, scales, bitmap, offsets, rows, 0, sizes.tiles, out)
        kept = out[..., 0] != 0
        # in the order of the mask, which that of the kernels need not be
        ordered = []
        for numbers in (grad, values):
            reference.unpack_rows(numbers, scales, bitmap, offsets, rows, 0, sizes.tiles, out)
            ordered.append(out[kept])
        return *ordered, kept, torch.view_as_complex(out).fill_(torch.nan)

    spectriton = contender.startswith("spectriton")
    call, inputs = (unpack, packed) if spectriton else (scatter_gradient, masked)
    got, (grad, values, kept, _) = call(*inputs(0)), masked(0)
    wanted = torch.zeros_like(got if spectriton else torch.view_as_real(got))
    wanted[kept] = (grad.double() * (1 - values.double() ** 2)).float()
    assert error(got if spectriton else torch.view_as_real(got), wanted) < 1e-5
    moved = packed_nbytes(len(grad), sizes) + nbytes(grad) + nbytes(wanted)
    measure(f"unpack_gradient_rows {SHAPE} at density {DENSITY}", contender, call, inputs, moved)


def scatter_int8(values: Tensor, mask: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    return scatter(torch.view_as_complex(values * scale), mask, out)


@contenders("spectriton int8", "spectriton int4", "spectriton reference int8", "torch masked_scatter_ int8")
def test_unpack_rows_of_low_bits(measure: Measure, contender: str) -> None:
    sizes = layout(SHAPE)
    rows = torch.arange(sizes.frequencies, device=DEVICE)
    threshold = threshold_for(torch.view_as_complex(spectrum_rows(SHAPE))[:, : sizes.row].abs(), DENSITY)
    value_dtype = "int4" if "int4" in contender else "int8"
    primitives = backend(DEVICE)

    def unpack(values: Tensor, scales: Tensor, bitmap: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
        return primitives.unpack_rows(values, scales, bitmap, offsets, rows, 0, sizes.tiles, out)

    def packed(number: int) -> tuple[Any, ...]:
        y = spectrum_rows(SHAPE, number)
        return *packed_rows(y, sizes, threshold, value_dtype), torch.full_like(y, torch.nan)

    def masked(number: int) -> tuple[Any, ...]:
        z = torch.view_as_complex(spectrum_rows(SHAPE, number))
        mask = z.abs() >= threshold
        mask[0] = True
        parts = torch.view_as_real(z[mask])
        scale = parts.abs().max() / 127
        return (parts / scale).round_().to(torch.int8), mask, scale, torch.full_like(z, torch.nan)

    values, *others = arguments = packed(0) if contender.startswith("spectriton") else masked(0)
    y = spectrum_rows(SHAPE)
    if contender.startswith("spectriton"):
        call, inputs = unpack, packed
        got, step = call(*arguments), others[0].repeat_interleave(sizes.tile, dim=1)[..., None]
    else:
        call, inputs = scatter_int8, masked
        got, step = torch.view_as_real(call(*arguments)), others[1]
    z = torch.view_as_complex(y)
    wanted = torch.where((z.abs() >= threshold) | (rows == 0)[:, None], z, 0)
    wrong = (got - torch.view_as_real(wanted)).abs() > 0.501 * step
    assert not wrong[decided(z, threshold)].any()
    moved = PackedSize(SHAPE, values.shape[0], value_dtype).nbytes + nbytes(y)
    measure(f"unpack_rows of low bits {SHAPE} at density {DENSITY}", contender, call, inputs, moved)


def spectra(number: int, threshold: float) -> tuple[Tensor, PackedSpectrum]:
    """(maps, their packed spectrum)."""
    x = photograph_like(SHAPE, number)
    return x, ops.to_spectral(x, threshold=threshold)


def threshold_of_maps() -> float:
    half = torch.fft.rfft2(photograph_like(SHAPE), norm="ortho")
    return threshold_for(independent(half, SHAPE[2:]).abs(), DENSITY)


def scatter_new(values: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter_(mask, values)


def scatter_and_transform(values: Tensor, mask: Tensor) -> Tensor:
    return torch.fft.irfft2(scatter_new(values, mask), s=SHAPE[2:], norm="ortho")


@contenders("spectriton", "spectriton reference", "torch masked_scatter_")
def test_unpack(measure: Measure, contender: str) -> None:
    threshold = threshold_of_maps()

    def packed(number: int) -> tuple[Any, ...]:
        return (spectra(number, threshold)[1],)

    def masked(number: int) -> tuple[Any, ...]:
        half = ops.unpack(spectra(number, threshold)[1])
        return half.masked_select(half != 0), half != 0

    call, inputs = (scatter_new, masked) if contender.startswith("torch") else (ops.unpack, packed)
    x, spectrum = spectra(0, threshold)
    half = torch.fft.rfft2(x, norm="ortho")
    dropped = error(call(*inputs(0)), half)
    # What is dropped, and nothing else, is missing.
    energy = torch.linalg.vector_norm(half[half.abs() < threshold]) / torch.linalg.vector_norm(half)
    assert abs(dropped - float(energy)) < 1e-3
    measure(f"unpack {SHAPE} at density {DENSITY}", contender, call, inputs, spectrum.nbytes + nbytes(half))


@contenders("spectriton", "spectriton reference", "torch masked_scatter_ + irfft2")
def test_to_spatial(measure: Measure, contender: str) -> None:
    threshold = threshold_of_maps()

    def packed(number: int) -> tuple[Any, ...]:
        return (spectra(number, threshold)[1],)

    def masked(number: int) -> tuple[Any, ...]:
        half = ops.unpack(spectra(number, threshold)[1])
        return half.masked_select(half != 0), half != 0

    call, inputs = (scatter_and_transform, masked) if contender.startswith("torch") else (ops.to_spatial, packed)
    x, spectrum = spectra(0, threshold)
    wanted = torch.fft.irfft2(ops.unpack(spectrum), s=SHAPE[2:], norm="ortho")
    assert error(wanted, x) < 0.5
    assert error(call(*inputs(0)), wanted) < 1e-5
    measure(f"to_spatial {SHAPE} at density {DENSITY}", contender, call, inputs, spectrum.nbytes + nbytes(x))
