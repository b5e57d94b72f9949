"""Transforms of small maps by matrix products, planes innermost in memory, against the fast transform."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectriton import ops, reference
from spectriton._backend import backend
from spectriton.frequencies import frequency_grid
from spectriton.reference.transform import by_products, maps_of_parts, parts_of_maps, products

SIZES = [(1, 1), (1, 5), (6, 1), (2, 2), (4, 4), (7, 9), (8, 5), (5, 12), (14, 14), (28, 28), (31, 32)]


def innermost(maps: Tensor) -> Tensor:
    """The same maps ``(n, H, W)`` in memory ``(H, W, n)``."""
    return maps.permute(1, 2, 0).contiguous().permute(2, 0, 1)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("planes", [2, 5])
def test_rows_of_maps(height: int, width: int, planes: int):
    maps, grid = torch.randn(planes, height, width, dtype=torch.float64), frequency_grid(height, width)
    assert by_products(grid, innermost(maps))
    rows = reference.rows_of_maps(innermost(maps), grid, planes + 3)
    expected = torch.fft.rfft2(maps, norm="ortho").flatten(1)[:, grid.index].T
    torch.testing.assert_close(torch.view_as_complex(rows[:, :planes]), expected, rtol=0, atol=1e-13)
    assert (rows[grid.self_conjugate, :, 1] == 0).all() and (rows[:, planes:] == 0).all()


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("filled", [0.3, 1.0])
def test_maps_of_packed(height: int, width: int, filled: float):
    """Both ways, of chunks of tiles and of a part of the frequencies, equal to the fast transform."""
    grid = frequency_grid(height, width)
    rows = max(1, int(filled * grid.count))
    half = torch.zeros(37, height * grid.half_width, dtype=torch.complex128)
    half[:, grid.index[:rows]] = torch.randn(37, rows, dtype=torch.complex128)
    spectrum = half.view(37, 1, height, -1)
    packed = ops.pack(spectrum, (height, width), threshold=0.4)
    fields = (packed.values, packed.scales, packed.bitmap, packed.offsets)
    tile, tiles, size = packed.layout.tile, packed.layout.tiles, (height, width)
    primitives = backend(packed.device)
    index = reference.TileIndex(packed.bitmap, packed.offsets)
    expected = torch.fft.irfft2(packed.to_dense(), s=size, norm="ortho")[:, 0]
    grad = torch.randn_like(expected)
    gathered = torch.full_like(packed.values, torch.nan)
    for t0 in range(tiles):
        part = slice(t0 * tile, min(37, (t0 + 1) * tile))
        for make in (innermost, torch.clone):
            maps = make(torch.full_like(expected[part], torch.nan))
            primitives.unpack_maps(*fields, grid, t0, t0 + 1, True, maps, index)
            torch.testing.assert_close(maps, expected[part], rtol=0, atol=1e-12)
            primitives.unpack_maps(*fields, grid, t0, t0 + 1, False, maps, index)
            primitives.gather_maps(make(grad[part]), *fields[2:], grid, t0, t0 + 1, gathered, index)
    edge = packed.edge.clone().requires_grad_()
    maps = torch.ops.spectriton.to_spatial(edge, *fields, [37, 1, *size], 0)
    torch.testing.assert_close(torch.autograd.grad(maps, edge, grad[:, None])[0], 2 * gathered, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(6, 8), (7, 5), (14, 14)])
@pytest.mark.parametrize("count", [1, 9, 15])
def test_products_are_adjoint(height: int, width: int, count: int):
    grid = frequency_grid(height, width)
    by = products(grid, count, torch.float64)
    x = torch.randn(height, width, 3, dtype=torch.float64)
    parts = parts_of_maps(x, by)
    y, back = torch.randn_like(parts), torch.empty_like(x)
    maps_of_parts(y, by, back)
    torch.testing.assert_close((parts * y).sum(), (x * back).sum())
    spectrum = torch.fft.rfft2(x.permute(2, 0, 1), norm="ortho").flatten(1)[:, grid.index[:count]].T
    places = by.places[:count]
    torch.testing.assert_close(torch.complex(parts[places], parts[places + by.band]), spectrum)


def test_large_maps_keep_to_the_fast_transform():
    """A matter of size and memory order alone."""
    for size, across, along in ((12, True, True), (13, True, False), (32, True, False), (33, False, False)):
        maps, grid = torch.zeros(3, size, size), frequency_grid(size, size)
        assert by_products(grid, innermost(maps)) == across == reference.planes_innermost(grid)
        assert by_products(grid, maps) == along
