"""rows_of_half and gather_planes against indexing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from packed_by_hand import grid_by_hand, pack_by_hand
from torch import Tensor

from spectriton._backend import Backend, TritonBackend
from spectriton.frequencies import frequency_grid
from spectriton.reference import rows_of_half, rows_of_maps
from spectriton_kernels.configs import GATHER_PLANES, ROWS_OF_HALF
from spectriton_kernels.planes import plan_gather_planes, plan_rows_of_half

pytestmark = pytest.mark.triton
SIZES = [(1, 1), (1, 6), (6, 1), (2, 2), (4, 4), (5, 7), (3, 8), (6, 5), (12, 13)]


def spectra(count: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32):
    """Imaginary parts everywhere, some infinite, some not numbers."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(count, size[0], size[1] // 2 + 1, 2, dtype=dtype, generator=generator)
    half.view(-1)[::7] = torch.inf
    half.view(-1)[5::11] = torch.nan
    return half.to(device)


def run(half: Tensor, size: tuple[int, int], padded: int, row_scale: Tensor | None, config=None):
    grid = grid_by_hand(*size, half.device)
    grid.count = grid.index.numel()
    out = torch.full((grid.count, padded, 2), 7.0, dtype=half.dtype, device=half.device)
    plan_rows_of_half(half, grid, row_scale, out, config).run()
    expected = torch.zeros_like(out)
    expected[:, : len(half)] = half.flatten(1, 2)[:, grid.index].transpose(0, 1)
    if row_scale is not None:
        expected *= row_scale[:, None, None]
    ky, kx = grid.index // grid.half_width, grid.index % grid.half_width
    expected[(2 * ky % size[0] == 0) & (2 * kx % size[1] == 0), :, 1] = 0
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("count", "padded"), [(1, 32), (32, 32), (37, 64), (3, 3)])
def test_rows_of_half(count, padded, size, device):
    run(spectra(count, size, device), size, padded, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_of_rows(dtype, device):
    size = (5, 8)
    rows = grid_by_hand(*size, device).index.numel()
    factors = torch.randn(rows, dtype=dtype, generator=torch.Generator().manual_seed(1)).to(device)
    run(spectra(37, size, device, dtype), size, 64, factors)


@pytest.mark.parametrize("config", ROWS_OF_HALF.space, ids=str)
def test_every_configuration(config, device):
    run(spectra(70, (6, 20), device), (6, 20), 96, None, config)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_backend_does_as_the_reference(size, device):
    grid, primitives = frequency_grid(*size, device), TritonBackend()
    half = torch.view_as_complex(spectra(5, size, device))
    for given in (half, half.mT.contiguous().mT):
        got, expected = primitives.rows_of_half(given, grid, 32), rows_of_half(given, grid, 32)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    maps = torch.randn(5, *size, generator=torch.Generator().manual_seed(2)).to(device)
    torch.testing.assert_close(primitives.rows_of_maps(maps, grid, 32), rows_of_maps(maps, grid, 32))


def test_no_planes(device):
    run(spectra(0, (4, 4), device), (4, 4), 32, None)


def gather(half: Tensor, size: tuple[int, int], tile: int, length: int, t0: int, config=None) -> None:
    """``half`` holds the planes from tile ``t0`` on, of ``length``."""
    grid = grid_by_hand(*size, half.device)
    grid.count = grid.index.numel()
    mask = torch.rand(grid.count, length, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[0], mask[1:2] = True, False
    places = torch.arange(1, 2 * mask.numel() + 1, dtype=half.dtype).view(grid.count, length, 2)
    packed = pack_by_hand(places.to(half.device), mask.to(half.device), tile, half.dtype, np.random.default_rng(4))
    factors = 0.5 + torch.arange(grid.count, dtype=half.dtype, device=half.device) % 3
    out = torch.full_like(packed.values, 7.0)
    plan_gather_planes(half, packed.bitmap, packed.offsets, grid, t0, factors, out, config).run()

    rows = half.flatten(1, 2)[:, grid.index].transpose(0, 1) * factors[:, None, None]
    ky, kx = grid.index // grid.half_width, grid.index % grid.half_width
    rows[(2 * ky % size[0] == 0) & (2 * kx % size[1] == 0), :, 1] = 0
    dense, first = torch.full((grid.count, length, 2), 7.0, dtype=half.dtype, device=half.device), t0 * tile
    dense[:, first : first + len(half)] = rows
    # Which coefficient stands where, the values tell.
    order = packed.values[:, 0].long() // 2
    torch.testing.assert_close(out, dense.flatten(0, 1)[order], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("tile", "length", "t0", "count"),
    [(32, 70, 0, 70), (32, 70, 1, 38), (32, 70, 1, 32), (64, 6, 0, 6), (128, 300, 1, 172), (128, 300, 0, 128)],
)
def test_gather_planes(tile, length, t0, count, size, device):
    gather(spectra(count, size, device), size, tile, length, t0)


@pytest.mark.parametrize("config", GATHER_PLANES.space, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_configuration_of_gathering(dtype, config, device):
    gather(spectra(140, (6, 10), device, dtype), (6, 10), 64, 140, 0, config)


def test_the_backend_gathers_as_the_reference(device):
    size, tile, length = (5, 6), 32, 75
    grid = frequency_grid(*size, device)
    mask = torch.rand(grid.count, length, generator=torch.Generator().manual_seed(3)).to(device) < 0.5
    packed = pack_by_hand(torch.zeros(grid.count, length, 2, device=device), mask, tile, torch.float32)
    maps = torch.randn(43, *size, generator=torch.Generator().manual_seed(2)).to(device)
    results = []
    for primitives in (Backend(), TritonBackend()):
        out, index = torch.zeros_like(packed.values), primitives.tile_index(packed.bitmap, packed.offsets)
        primitives.gather_maps(maps, packed.bitmap, packed.offsets, grid, 1, 3, out, index)
        results.append(out)
    torch.testing.assert_close(*results)
