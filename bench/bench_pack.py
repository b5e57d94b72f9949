"""Threshold compaction: the primitive ``pack_rows``, ``ops.pack`` and ``ops.to_spectral`` against torch.

Plain torch is ``abs``, a comparison and ``masked_select``, which gives the same values but, as their places, a byte a
coefficient instead of a bit; for ``to_spectral``, ``rfft2`` goes before. Maps are photograph-like, the threshold keeps
0.24 of the coefficients.

Bytes: the dense side read once; kept values, bitmap, offsets and scales written once. (The half spectrum in between is
not counted in ``to_spectral``: staying in the cache is the point.) Buffers of the primitive are there before the call.

Values of 8 and 4 bits are compared with rounding what ``masked_select`` gives to int8 with one scale for all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.maps import (
    Shape,
    decided,
    empty_packed,
    independent,
    packed_nbytes,
    photograph_like,
    spectrum_rows,
    threshold_for,
)
from bench.timing import CUDA, DEVICE, Measure, by_size, contenders, error, nbytes
from spectriton import PackedSpectrum, ops, reference
from spectriton._backend import backend
from spectriton.packed import PackedSize, layout

SHAPE: Shape = by_size(cuda=(128, 128, 56, 56), cpu=(64, 64, 32, 32), quick=(8, 32, 16, 16))
DENSITY = 0.24


def select(z: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Plain torch: (kept values, where they stood)."""
    mask = z.abs() >= threshold
    return z.masked_select(mask), mask


def half_spectrum(x: Tensor) -> Tensor:
    return torch.fft.rfft2(x, norm="ortho")


def thresholded(half: Tensor, threshold: float) -> Tensor:
    """The dense half spectrum of what is kept, in another way than packing: the oracle."""
    kept = half * (half.abs() >= threshold)
    kept[..., 0, 0] = half[..., 0, 0]
    return kept


@contenders("spectriton", "spectriton reference", "torch masked_select")
def test_pack_rows(measure: Measure, contender: str) -> None:
    sizes = layout(SHAPE)
    rows = torch.arange(sizes.frequencies, device=DEVICE)
    y = spectrum_rows(SHAPE)
    z = torch.view_as_complex(y)
    threshold = threshold_for(z[:, : sizes.row].abs(), DENSITY)
    kept = int((z.abs() >= threshold).sum())
    primitives = backend(DEVICE)

    def pack(y: Tensor, bitmap: Tensor, offsets: Tensor, values: Tensor, cursor: Tensor, scales: Tensor) -> None:
        primitives.pack_rows(y, sizes.row, threshold, rows, 0, bitmap, offsets, values, cursor)

    def rewound(y: Tensor, *packed: Tensor) -> tuple[Any, ...]:
        packed[3].zero_()
        return y, *packed

    def room(number: int) -> tuple[Any, ...]:
        return spectrum_rows(SHAPE, number), *empty_packed(sizes, 2 * kept)

    def dense(number: int) -> tuple[Any, ...]:
        return torch.view_as_complex(spectrum_rows(SHAPE, number)), threshold

    dc = z[0].clone()
    wanted = torch.where(z.abs() >= threshold, z, 0)
    wanted[0] = dc
    moved = nbytes(y) + packed_nbytes(kept, sizes)
    group = f"pack_rows {SHAPE} at density {DENSITY}"
    if contender.startswith("spectriton"):
        bitmap, offsets, values, cursor, _ = packed = empty_packed(sizes, 2 * kept)
        pack(y, *packed)
        assert abs(int(cursor) - kept) <= sizes.row
        got = reference.unpack_rows(
            values, values.new_empty(0), bitmap, offsets, rows, 0, sizes.tiles, torch.empty_like(y)
        )
        sure = decided(z, threshold)
        assert torch.equal(torch.view_as_complex(got)[sure], wanted[sure])
        measure(group, contender, pack, room, moved, prepare=rewound)
    else:
        values, mask = select(z, threshold)
        assert torch.equal(torch.zeros_like(z).masked_scatter_(mask, values)[1:], wanted[1:])
        measure(group, contender, select, dense, moved)


def select_int8(z: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Plain torch: (kept values as int8, where they stood, their scale)."""
    values, mask = select(z, threshold)
    parts = torch.view_as_real(values)
    scale = parts.abs().max() / 127
    return (parts / scale).round_().to(torch.int8), mask, scale


@contenders(
    "spectriton int8",
    "spectriton int4",
    "spectriton int8 stochastic",
    "spectriton reference int8",
    "torch masked_select int8",
)
def test_pack_rows_in_low_bits(measure: Measure, contender: str) -> None:
    sizes = layout(SHAPE)
    rows = torch.arange(sizes.frequencies, device=DEVICE)
    y = spectrum_rows(SHAPE)
    z = torch.view_as_complex(y)
    threshold = threshold_for(z[:, : sizes.row].abs(), DENSITY)
    kept = int((z.abs() >= threshold).sum())
    value_dtype = "int4" if "int4" in contender else "int8"
    seed = torch.zeros((), dtype=torch.int64, device=DEVICE) if "stochastic" in contender else None
    primitives = backend(DEVICE)

    def pack(y: Tensor, bitmap: Tensor, offsets: Tensor, values: Tensor, cursor: Tensor, scales: Tensor) -> None:
        target = (bitmap, offsets, values, cursor)
        primitives.pack_rows(y, sizes.row, threshold, rows, 0, *target, scales=scales, seed=seed)

    def rewound(y: Tensor, *packed: Tensor) -> tuple[Any, ...]:
        packed[3].zero_()
        return y, *packed

    def room(number: int) -> tuple[Any, ...]:
        return spectrum_rows(SHAPE, number), *empty_packed(sizes, 2 * kept, value_dtype)

    def dense(number: int) -> tuple[Any, ...]:
        return torch.view_as_complex(spectrum_rows(SHAPE, number)), threshold

    moved = nbytes(y) + PackedSize(SHAPE, kept, value_dtype).nbytes
    group = f"pack_rows in low bits {SHAPE} at density {DENSITY}"
    if contender.startswith("torch"):
        values, mask, scale = select_int8(z, threshold)
        got = torch.zeros_like(z).masked_scatter_(mask, torch.view_as_complex(values * scale))
        assert (torch.view_as_real(got - torch.where(mask, z, 0)).abs() <= 0.501 * scale).all()
        measure(group, contender, select_int8, dense, moved)
        return
    bitmap, offsets, values, _, scales = packed = empty_packed(sizes, 2 * kept, value_dtype)
    pack(y, *packed)
    got = reference.unpack_rows(values, scales, bitmap, offsets, rows, 0, sizes.tiles, torch.empty_like(y))
    step = scales.repeat_interleave(sizes.tile, dim=1)[..., None]
    wrong = (got - y).abs() > step * (1.001 if seed is not None else 0.501)
    assert not wrong[decided(z, threshold) & ((z.abs() >= threshold) | (rows == 0)[:, None])].any()
    measure(group, contender, pack, room, moved, prepare=rewound)


@contenders("spectriton", "spectriton reference", "torch masked_select")
def test_pack(measure: Measure, contender: str) -> None:
    half = half_spectrum(photograph_like(SHAPE))
    threshold = threshold_for(independent(half, SHAPE[2:]).abs(), DENSITY)

    def pack(half: Tensor, threshold: float) -> PackedSpectrum:
        return ops.pack(half, SHAPE[2:], threshold=threshold)

    def inputs(number: int) -> tuple[Any, ...]:
        return half_spectrum(photograph_like(SHAPE, number)), threshold

    packed = pack(half, threshold)
    assert abs(packed.density - DENSITY) < 0.02
    assert error(packed.to_dense(), thresholded(half, threshold)) < 1e-3
    measure(
        f"pack {SHAPE} at density {DENSITY}",
        contender,
        select if contender.startswith("torch") else pack,
        inputs,
        nbytes(half) + packed.nbytes,
    )


@contenders("spectriton", "spectriton reference", "torch rfft2 + masked_select")
def test_to_spectral(measure: Measure, contender: str) -> None:
    x = photograph_like(SHAPE)
    half = half_spectrum(x)
    threshold = threshold_for(independent(half, SHAPE[2:]).abs(), DENSITY)

    def to_spectral(x: Tensor, threshold: float) -> PackedSpectrum:
        return ops.to_spectral(x, threshold=threshold)

    def transform_and_select(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        return select(half_spectrum(x), threshold)

    def inputs(number: int) -> tuple[Any, ...]:
        return photograph_like(SHAPE, number), threshold

    packed = to_spectral(x, threshold)
    # A GPU transforms batches of other sizes by other algorithms, so coefficients at the threshold may fall either way.
    assert error(packed.to_dense(), thresholded(half, threshold)) < (1e-2 if CUDA else 1e-3)
    measure(
        f"to_spectral {SHAPE} at density {DENSITY}",
        contender,
        transform_and_select if contender.startswith("torch") else to_spectral,
        inputs,
        nbytes(x) + packed.nbytes,
    )
