"""Packed coefficients to small maps and back in C against the matrix products of the reference."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import spectriton_native as native
from spectriton import PackedSpectrum, ops, reference
from spectriton._native import NativeBackend, _turns
from spectriton.frequencies import FrequencyGrid, frequency_grid
from spectriton.reference.transform import products
from spectriton_native import Part
from tests.native.spectra import Room

pytestmark = pytest.mark.usefixtures("build")

# Odd, twice odd and four times something, in all combinations of what is folded once and what twice.
SIZES = [(1, 1), (2, 3), (5, 12), (7, 9), (8, 5), (6, 10), (14, 14), (28, 28), (64, 3), (3, 64)]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Case(NamedTuple):
    """Packed maps, as the primitives take them."""

    packed: PackedSpectrum
    grid: FrequencyGrid
    index: reference.TileIndex

    @property
    def fields(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        packed = self.packed
        return packed.values, packed.scales, packed.bitmap, packed.offsets

    @property
    def tile(self) -> int:
        return self.packed.bitmap.shape[2] * 8

    def chunks(self, planes: int) -> list[tuple[int, int, int]]:
        """``(t0, t1, planes)``: all, and the last tile."""
        tiles = self.packed.bitmap.shape[1]
        return [(0, tiles, planes), (tiles - 1, tiles, planes - (tiles - 1) * self.tile)]


def case(size: tuple[int, int], planes: int, density: float, value_dtype: str = "float32") -> Case:
    maps = torch.randn(planes, 1, *size, generator=torch.Generator().manual_seed(planes))
    packed = ops.to_spectral(maps, density=density, value_dtype=value_dtype)
    return Case(packed, frequency_grid(*size), reference.TileIndex(packed.bitmap, packed.offsets))


@pytest.mark.parametrize("planes", [1, 31, 32, 300])
@pytest.mark.parametrize("size", SIZES)
def test_there_and_back(size: tuple[int, int], planes: int) -> None:
    backend, generator = NativeBackend(), torch.Generator().manual_seed(1)
    for density in (0.0, 0.3, 1.0):  # bands from a single frequency to all
        given = case(size, planes, density)
        for t0, t1, count in given.chunks(planes):
            for weighted in (False, True):
                expected, room = torch.empty(count, *size), Room(*size, count)
                reference.unpack_maps(*given.fields, given.grid, t0, t1, weighted, expected, given.index)
                out = room.tensor.permute(2, 0, 1)
                backend.unpack_maps(*given.fields, given.grid, t0, t1, weighted, out, given.index)
                torch.testing.assert_close(out, expected, **CLOSE)
                assert room.guarded
            maps = torch.randn(*size, count, generator=generator).permute(2, 0, 1)
            gathered, room = torch.full((given.packed.kept, 2), torch.nan), Room(given.packed.kept, 2)
            pattern = (*given.fields[2:], given.grid, t0, t1)
            reference.gather_maps(maps, *pattern, gathered, given.index)
            backend.gather_maps(maps, *pattern, room.tensor, given.index)
            torch.testing.assert_close(room.tensor, gathered, equal_nan=True, **CLOSE)
            assert room.guarded


@pytest.mark.parametrize("value_dtype", ["float16", "bfloat16", "int8", "int4"])
def test_value_formats(value_dtype: str) -> None:
    given = case((6, 7), 70, 0.4, value_dtype)
    t0, t1, planes = given.chunks(70)[0]
    expected, out = torch.empty(planes, 6, 7), torch.full((planes, 6, 7), torch.nan)  # planes outermost this time
    reference.unpack_maps(*given.fields, given.grid, t0, t1, True, expected, given.index)
    NativeBackend().unpack_maps(*given.fields, given.grid, t0, t1, True, out, given.index)
    torch.testing.assert_close(out, expected, **CLOSE)


@pytest.mark.parametrize("planes", [1, 31, 32, 70])
@pytest.mark.parametrize("size", SIZES)
def test_rows_of_maps(size: tuple[int, int], planes: int) -> None:
    grid, padded = frequency_grid(*size), 96
    maps = torch.randn(*size, planes, generator=torch.Generator().manual_seed(planes))
    expected, room = reference.rows_of_maps(maps.permute(2, 0, 1), grid, padded), Room(grid.count, padded, 2)
    by = products(grid, grid.count, torch.float32)
    native.rows_of_maps(maps, by.places, _turns(by), room.tensor)
    torch.testing.assert_close(room.tensor, expected, **CLOSE)
    assert room.guarded and (room.tensor[grid.self_conjugate, :, 1] == 0).all()
    assert (room.tensor[:, planes:] == 0).all() and not room.tensor[grid.self_conjugate, :, 1].signbit().any()


def test_what_is_not_a_number_stays_in_its_plane() -> None:
    maps = torch.randn(40, 6, 5)
    maps[7, 2, 3], maps[33, 3, 1] = torch.nan, torch.inf
    rows = NativeBackend().rows_of_maps(maps, frequency_grid(6, 5), 40)
    finite = [plane for plane in range(40) if plane not in (7, 33)]
    assert rows[:, finite].isfinite().all() and rows[:, 7, 0].isnan().all() and not rows[:, 33, 0].isfinite().any()


@pytest.mark.parametrize("offset", ["one too far", "far", "negative"])
def test_offsets_beyond_the_values_are_reported(offset: str) -> None:
    given = case((4, 5), 300, 0.4)
    values, scales, bitmap, offsets = given.fields
    by = products(given.grid, given.grid.count, torch.float32)
    every, factors, maps = slice(0, given.grid.count), torch.ones(given.grid.count), torch.zeros(4, 5, 300)
    last = values.shape[0] - int(given.index.counts[1, 0])
    for place, fails in (({"one too far": last + 1, "far": 2**31 - 1, "negative": -1}[offset], True), (last, False)):
        offsets[1, 0] = place
        part = Part.of(bitmap, every, 0, bitmap.shape[1], offsets, values.shape[0])
        for run in (
            lambda: native.unpack_maps(part, values, scales, by.places, factors, _turns(by, True), maps),  # noqa: B023
            lambda: native.gather_maps(part, maps, by.places, factors, _turns(by), values.clone()),  # noqa: B023
        ):
            if fails:
                with pytest.raises(ValueError, match="offsets beyond its values"):
                    run()
            else:
                run()


def test_bits_beyond_the_last_plane_write_nothing() -> None:
    """A damaged bitmap must not damage memory."""
    given = case((4, 5), 40, 1.0)
    values, scales, bitmap, offsets = given.fields
    bitmap.fill_(255)
    offsets.zero_()
    by, room = products(given.grid, given.grid.count, torch.float32), Room(4, 5, 40)
    part = Part.of(bitmap, slice(0, given.grid.count), 0, bitmap.shape[1], offsets, values.shape[0])
    factors = torch.ones(given.grid.count)
    native.unpack_maps(part, values, scales, by.places, factors, _turns(by, True), room.tensor)
    assert room.guarded
    gathered = Room(*values.shape)
    native.gather_maps(part, room.tensor, by.places, factors, _turns(by), gathered.tensor)
    assert gathered.guarded


@pytest.mark.parametrize("size", [(65, 4), (4, 65)])
def test_larger_maps_and_double_precision_go_to_the_reference(size: tuple[int, int]) -> None:
    for maps in (torch.randn(3, *size), torch.randn(3, 4, 4, dtype=torch.float64)):
        grid = frequency_grid(*maps.shape[1:])
        assert torch.equal(NativeBackend().rows_of_maps(maps, grid, 32), reference.rows_of_maps(maps, grid, 32))
