"""Packed coefficients to small maps and back in C against the matrix products of the reference."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import spectriton_native as native
from spectriton import PackedSpectrum, ops, reference
from spectriton._native import NativeBackend, _plan
from spectriton.frequencies import FrequencyGrid, frequency_grid
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
    native.rows_of_maps(maps.permute(2, 0, 1), *_plan(grid, grid.count), room.tensor)
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
    given, native = case((4, 5), 300, 0.4), NativeBackend()
    values, scales, bitmap, offsets = given.fields
    tiles, maps = (given.grid, 0, bitmap.shape[1]), torch.zeros(300, 4, 5)
    last = values.shape[0] - int(given.index.counts[1, 0])
    for place, fails in (({"one too far": last + 1, "far": 2**31 - 1, "negative": -1}[offset], True), (last, False)):
        offsets[1, 0] = place
        for run in (
            lambda: native.unpack_maps(values, scales, bitmap, offsets, *tiles, True, maps, given.index),
            lambda: native.gather_maps(maps, bitmap, offsets, *tiles, values.clone(), given.index),
        ):
            if fails:
                with pytest.raises(ValueError, match="offsets beyond its values"):
                    run()
            else:
                run()


def test_bits_beyond_the_last_plane_write_nothing() -> None:
    """A damaged bitmap must not damage memory."""
    given, native = case((4, 5), 40, 1.0), NativeBackend()
    values, scales, bitmap, offsets = given.fields
    bitmap.fill_(255)
    offsets.zero_()
    index = reference.TileIndex(bitmap, offsets)
    tiles, room, gathered = (given.grid, 0, bitmap.shape[1]), Room(4, 5, 40), Room(*values.shape)
    maps = room.tensor.permute(2, 0, 1)
    native.unpack_maps(values, scales, bitmap, offsets, *tiles, True, maps, index)
    native.gather_maps(maps, bitmap, offsets, *tiles, gathered.tensor, index)
    assert room.guarded and gathered.guarded


@pytest.mark.parametrize("planes", [1, 31, 70])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (6, 10), (3, 64)])
def test_memory_orders(size: tuple[int, int], planes: int) -> None:
    """Planes innermost, outermost and in between, with gaps; the same to the bit."""
    given, backend = case(size, planes, 0.5), NativeBackend()
    tiles, pattern = (given.grid, 0, given.packed.bitmap.shape[1]), given.fields[2:]
    maps, rows, gathered = [], [], []
    for order in ((1, 2, 0), (0, 1, 2), (1, 0, 2), (2, 1, 0)):
        room = Room(*((planes, *size)[i] for i in order))
        out = room.tensor.permute(*(order.index(i) for i in range(3)))
        backend.unpack_maps(*given.fields, *tiles, True, out, given.index)
        assert room.guarded
        maps.append(out)
    wide = torch.full((planes, size[0] + 2, size[1] + 3), torch.nan)
    backend.unpack_maps(*given.fields, *tiles, True, wide[:, 1:-1, 1:-2], given.index)
    maps.append(wide[:, 1:-1, 1:-2])
    assert int(wide.isnan().sum()) == wide.numel() - maps[0].numel()
    for made in maps:
        rows.append(backend.rows_of_maps(made, given.grid, planes))
        gathered.append(torch.empty(given.packed.kept, 2))
        backend.gather_maps(made, *pattern, *tiles, gathered[-1], given.index)
    for results in (maps, rows, gathered):
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("size", [(65, 4), (4, 65)])
def test_larger_maps_and_double_precision_go_to_the_reference(size: tuple[int, int]) -> None:
    for maps in (torch.randn(3, *size), torch.randn(3, 4, 4, dtype=torch.float64)):
        grid = frequency_grid(*maps.shape[1:])
        assert torch.equal(NativeBackend().rows_of_maps(maps, grid, 32), reference.rows_of_maps(maps, grid, 32))
