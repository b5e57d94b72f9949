"""The C functions of planes against the reference, to the bit."""

from __future__ import annotations

import pytest
import torch

import spectriton_native as native
from spectriton import reference
from spectriton._native import NativeBackend
from spectriton.frequencies import FrequencyGrid, frequency_grid
from spectriton.reference.transform import Products, products
from spectriton.reference.unpack import fill_mirrors
from spectriton_native import Part
from tests.native.spectra import FORMATS, Room, Spectrum, identical, spectrum
from tests.tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("build")

# (height, width, planes, tile): one plane, odd and even sides, a tail, several tiles.
SIZES = [(1, 1, 1, 32), (4, 5, 7, 32), (5, 4, 100, 32), (6, 6, 128, 64)]


def made(
    size: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, cut: int = 1
) -> tuple[FrequencyGrid, Spectrum]:
    """A spectrum of whole maps; ``cut`` leaves the last frequencies empty.

    What is its own conjugate has no imaginary part, and twice a value is not beyond the numbers that there are.
    """
    height, width, planes, tile = size
    grid = frequency_grid(height, width)
    given = spectrum(grid.count, planes, tile, dtype, 0.4)
    if dtype.is_floating_point:
        given.values[given.values.isfinite() & (given.values.abs() > 1e37)] = 3
    index = reference.tile_index(given.bitmap, given.offsets)
    own = grid.self_conjugate
    for start, count in zip(index.starts[own].flat, index.counts[own].flat, strict=True):
        if dtype == torch.uint8:
            given.values[start : start + count] &= 15
        else:
            given.values[start : start + count, 1] = 0
    given.bitmap[-(-grid.count // cut) :] = 0
    return grid, given


def ranges(given: Spectrum) -> list[tuple[int, int, int]]:
    """``(t0, t1, planes)`` of chunks: all, the end, and where there is one a tile inside."""
    last = given.tiles - 1
    chunks = [(0, given.tiles, given.planes), (last, given.tiles, given.planes - last * given.tile)]
    return chunks + [(1, 2, given.tile)] * (given.tiles > 2)


def band(grid: FrequencyGrid, given: Spectrum) -> tuple[reference.TileIndex, Products, int]:
    index = reference.tile_index(given.bitmap, given.offsets)
    return index, products(grid, index.filled, torch.float32), index.filled


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_expand_parts(size: tuple[int, int, int, int], dtype: torch.dtype, weighted: bool) -> None:
    for cut in (1, 2):
        grid, given = made(size, dtype, cut)
        index, by, filled = band(grid, given)
        factors = grid.weight.float() if weighted else torch.ones(grid.count)
        packed = (given.values, given.scales, given.bitmap, given.offsets)
        for t0, t1, planes in ranges(given):
            rooms = [Room(by.rows.shape[0] * by.band, planes) for _ in range(3)]
            room, by_backend, expected = rooms
            reference.expand_parts(*packed, grid, t0, t1, weighted, by, expected.tensor, index)
            NativeBackend().expand_parts(*packed, grid, t0, t1, weighted, by, by_backend.tensor, index)
            assert identical(by_backend.tensor, expected.tensor)
            part = Part.of(given.bitmap, slice(0, filled), t0, t1, given.offsets, given.values.shape[0])
            native.expand_parts(part, given.values, given.scales, by.places, factors, by.band, room.tensor)
            assert identical(room.tensor, expected.tensor)
            assert all(each.guarded for each in rooms)


@pytest.mark.parametrize("size", SIZES)
def test_gather_parts(size: tuple[int, int, int, int]) -> None:
    for cut in (1, 2):
        grid, given = made(size, cut=cut)
        index, by, filled = band(grid, given)
        for t0, t1, planes in ranges(given):
            parts = torch.randn(by.rows.shape[0] * by.band, planes, generator=torch.Generator().manual_seed(1))
            parts[:, ::5], parts[0, 1:2] = torch.nan, -torch.inf
            parts[by.self_conjugate + by.band] = 0  # as it is of real maps
            rooms = [Room(*given.values.shape) for _ in range(3)]
            room, by_backend, expected = rooms
            part = Part.of(given.bitmap, slice(0, filled), t0, t1, given.offsets, given.values.shape[0])
            native.gather_parts(part, parts, by.places, grid.weight.float() / 2, by.band, room.tensor)
            pattern = (given.bitmap, given.offsets, grid, t0, t1, by)
            NativeBackend().gather_parts(parts.clone(), *pattern, by_backend.tensor, index)
            reference.gather_parts(parts, *pattern, expected.tensor, index)
            for each in (room, by_backend):
                assert identical(each.tensor, expected.tensor) and each.guarded


@pytest.mark.parametrize("size", SIZES)
def test_rows_of_parts(size: tuple[int, int, int, int]) -> None:
    height, width, planes, tile = size
    grid = frequency_grid(height, width)
    maps = torch.randn(height, width, planes, generator=torch.Generator().manual_seed(2)).permute(2, 0, 1)
    by = products(grid, grid.count, torch.float32)
    for padded in (planes, -(-planes // tile) * tile):
        room = Room(grid.count, padded, 2)
        native.rows_of_parts(reference.parts_of_maps(maps.permute(1, 2, 0), by), by.places, by.band, room.tensor)
        expected = reference.rows_of_maps(maps, grid, padded)
        assert identical(room.tensor, expected) and room.guarded
        by_backend = NativeBackend().rows_of_maps(maps, grid, padded)
        torch.testing.assert_close(by_backend, expected, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("row_scale", [None, "weights", "any"])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_expand_planes(size: tuple[int, int, int, int], dtype: torch.dtype, row_scale: str | None) -> None:
    grid, given = made(size, dtype)
    packed = (given.values, given.scales, given.bitmap, given.offsets)
    factors = {None: None, "weights": grid.weight.float() / 2, "any": torch.linspace(0.3, 3, grid.count)}[row_scale]
    for t0, t1, planes in ranges(given):
        room, expected = (Room(planes, grid.height * grid.half_width, 2) for _ in range(2))
        part = Part.of(given.bitmap, slice(0, grid.count), t0, t1, given.offsets, given.values.shape[0])
        native.expand_planes(part, given.values, given.scales, grid.index, factors, room.tensor)
        assert (room.tensor[:, grid.mirror_index] == 0).all() and room.guarded
        fill_mirrors(torch.view_as_complex(room.tensor), grid)
        whole = expected.tensor.view(planes, grid.height, grid.half_width, 2)
        reference.unpack_planes(*packed, grid, t0, t1, planes, factors, whole)
        assert identical(room.tensor, expected.tensor)
        out = torch.empty_like(whole)
        NativeBackend().unpack_planes(*packed, grid, t0, t1, planes, factors, out)
        assert identical(out.view_as(room.tensor), room.tensor)


@pytest.mark.parametrize("offset", ["one too far", "far", "negative"])
@pytest.mark.parametrize("name", ["expand_parts", "gather_parts", "expand_planes"])
def test_offsets_beyond_the_values_are_reported(name: str, offset: str) -> None:
    grid, given = made((4, 5, 70, 32))
    _, by, filled = band(grid, given)
    parts, factors = torch.zeros(by.rows.shape[0] * by.band, 70), torch.ones(grid.count)
    half = torch.empty(70, grid.height * grid.half_width, 2)

    def run() -> None:
        part = Part.of(given.bitmap, slice(0, filled), 0, 3, given.offsets, given.values.shape[0])
        if name == "expand_parts":
            native.expand_parts(part, given.values, given.scales, by.places, factors, by.band, parts)
        elif name == "gather_parts":
            native.gather_parts(part, parts, by.places, factors, by.band, given.values)
        else:
            native.expand_planes(part, given.values, given.scales, grid.index, factors, half)

    last = given.values.shape[0] - int(reference.tile_index(given.bitmap, given.offsets).counts[1, 1])
    given.offsets[1, 1] = {"one too far": last + 1, "far": 2**31 - 1, "negative": -1}[offset]
    with pytest.raises(ValueError, match="offsets beyond its values"):
        run()
    given.offsets[1, 1] = last
    run()


@pytest.mark.parametrize("planes", [1, 9, 40])
def test_bits_beyond_the_last_plane_write_nothing(planes: int) -> None:
    """A damaged bitmap must not damage memory."""
    grid, given = made((4, 5, 64, 32))
    given.bitmap[:] = 255
    given.offsets[:] = torch.arange(given.offsets.numel()).view_as(given.offsets)
    values = torch.ones(given.offsets.numel() + 32, 2)
    _, by, filled = band(grid, given)
    part = Part.of(given.bitmap, slice(0, filled), 0, given.tiles, given.offsets, values.shape[0])
    half, parts = Room(planes, grid.height * grid.half_width, 2), Room(by.rows.shape[0] * by.band, planes)
    native.expand_planes(part, values, given.scales, grid.index, None, half.tensor)
    native.expand_parts(part, values, given.scales, by.places, torch.ones(grid.count), by.band, parts.tensor)
    assert half.guarded and parts.guarded
    assert (half.tensor[:, grid.index] == 1).all()
