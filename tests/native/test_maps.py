"""Packed coefficients to half spectra in C against the reference, to the bit."""

from __future__ import annotations

import pytest
import torch

import spectriton_native as native
from spectriton import reference
from spectriton._native import NativeBackend
from spectriton.frequencies import FrequencyGrid, frequency_grid
from spectriton.reference.unpack import fill_mirrors
from spectriton_native import Part
from tests.native.spectra import FORMATS, Room, Spectrum, identical, spectrum

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
    index = reference.TileIndex(given.bitmap, given.offsets)
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
def test_offsets_beyond_the_values_are_reported(offset: str) -> None:
    grid, given = made((4, 5, 70, 32))
    half = torch.empty(70, grid.height * grid.half_width, 2)

    def run() -> None:
        part = Part.of(given.bitmap, slice(0, grid.count), 0, 3, given.offsets, given.values.shape[0])
        native.expand_planes(part, given.values, given.scales, grid.index, None, half)

    last = given.values.shape[0] - int(reference.TileIndex(given.bitmap, given.offsets).counts[1, 1])
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
    part = Part.of(given.bitmap, slice(0, grid.count), 0, given.tiles, given.offsets, values.shape[0])
    half = Room(planes, grid.height * grid.half_width, 2)
    native.expand_planes(part, values, given.scales, grid.index, None, half.tensor)
    assert half.guarded and (half.tensor[:, grid.index] == 1).all()
