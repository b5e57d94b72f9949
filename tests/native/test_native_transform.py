"""Transforms of small maps in C against the matrix products of the reference."""

from __future__ import annotations

import pytest
import torch

from spectriton import reference
from spectriton._native import NativeBackend
from spectriton.frequencies import frequency_grid
from spectriton.reference.transform import products
from tests.native.spectra import Room

pytestmark = pytest.mark.usefixtures("build")

# Odd, twice odd and four times something, in all combinations of what is folded once and what twice.
SIZES = [(1, 1), (2, 3), (5, 12), (7, 9), (8, 5), (6, 10), (14, 14), (28, 28), (64, 3), (3, 64)]


@pytest.mark.parametrize("planes", [1, 31, 32, 70])
@pytest.mark.parametrize("size", SIZES)
def test_parts_and_maps(size: tuple[int, int], planes: int) -> None:
    native, grid = NativeBackend(), frequency_grid(*size)
    generator = torch.Generator().manual_seed(planes)
    for count in sorted({1, 2, grid.count // 2 + 1, grid.count}):  # bands from a single frequency to all
        by = products(grid, min(count, grid.count), torch.float32)
        maps = torch.randn(*size, planes, generator=generator)
        parts = reference.parts_of_maps(maps, by)
        torch.testing.assert_close(native.parts_of_maps(maps, by), parts, rtol=1e-5, atol=1e-5)
        expected, room = torch.empty_like(maps), Room(*maps.shape)
        reference.maps_of_parts(parts, by, expected)
        native.maps_of_parts(parts, by, room.tensor)
        torch.testing.assert_close(room.tensor, expected, rtol=1e-5, atol=1e-5)
        assert room.guarded


def test_what_is_not_a_number_stays_in_its_plane() -> None:
    native, grid = NativeBackend(), frequency_grid(6, 5)
    by = products(grid, grid.count, torch.float32)
    maps = torch.randn(6, 5, 40)
    maps[2, 3, 7], maps[3, 1, 33] = torch.nan, torch.inf
    parts = native.parts_of_maps(maps, by)
    finite = [plane for plane in range(40) if plane not in (7, 33)]
    assert parts[:, finite].isfinite().all() and parts[:, 7].isnan().all() and not parts[:, 33].isfinite().any()


@pytest.mark.parametrize("size", [(65, 4), (4, 65)])
def test_larger_maps_and_double_precision_go_to_the_reference(size: tuple[int, int]) -> None:
    native = NativeBackend()
    grid = frequency_grid(*size)
    maps = torch.randn(*size, 3)
    by = products(grid, grid.count, torch.float32)
    assert torch.equal(native.parts_of_maps(maps, by), reference.parts_of_maps(maps, by))
    small = frequency_grid(4, 4)
    double, by = torch.randn(4, 4, 3, dtype=torch.float64), products(small, small.count, torch.float64)
    assert torch.equal(native.parts_of_maps(double, by), reference.parts_of_maps(double, by))
