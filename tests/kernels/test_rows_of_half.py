"""rows_of_half against indexing."""

from __future__ import annotations

import pytest
import torch
from packed_by_hand import grid_by_hand

from spectriton._backend import TritonBackend
from spectriton.frequencies import frequency_grid
from spectriton.reference import rows_of_half, rows_of_maps
from spectriton_kernels.configs import ROWS_OF_HALF
from spectriton_kernels.rows_of_half import plan_rows_of_half

pytestmark = pytest.mark.triton
SIZES = [(1, 1), (1, 6), (6, 1), (2, 2), (4, 4), (5, 7), (3, 8), (6, 5), (12, 13)]


def spectra(count: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32):
    """Imaginary parts everywhere, some infinite, some not numbers."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(count, size[0], size[1] // 2 + 1, 2, dtype=dtype, generator=generator)
    half.view(-1)[::7] = torch.inf
    half.view(-1)[5::11] = torch.nan
    return half.to(device)


def run(half: torch.Tensor, size: tuple[int, int], padded: int, row_scale: torch.Tensor | None, config=None):
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
