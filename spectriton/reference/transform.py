"""Fourier transforms of planes to and from frequency-major rows.

Small maps on the CPU are transformed by matrix products, all planes at once: a product with planes innermost gives the
rows of a packed spectrum as they are, where a fast transform, plane by plane, needs them brought to their place.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spectriton.frequencies import FrequencyGrid

# Products take O(side) operations a value. Up to these sides they are quicker than a fast transform and the transposing
# that brings spectra to rows; the smaller one is for maps that have to be transposed themselves for products.
_LARGEST_SIDE, _LARGEST_SIDE_TRANSPOSED = 32, 12


def planes_innermost(grid: FrequencyGrid) -> bool:
    """Whether maps on ``grid`` had best stand in memory in the order ``(H, W, n)``, for transforms by products."""
    return grid.index.device.type == "cpu" and max(grid.height, grid.width) <= _LARGEST_SIDE


def by_products(grid: FrequencyGrid, maps: Tensor) -> bool:
    """Whether maps ``(n, H, W)``, in the memory order that they have, are transformed by matrix products."""
    if maps.stride(0) == 1:
        return planes_innermost(grid)
    return grid.index.device.type == "cpu" and max(grid.height, grid.width) <= _LARGEST_SIDE_TRANSPOSED


class Products(NamedTuple):
    """The transform of real maps to the band ``|ky| <= K``, ``kx < M`` of their ortho spectra, as two real products.

    The spectrum is laid out as ``(ky, part, kx, n)``, real and imaginary part apart. The adjoint is by the transposes.

    Attributes:
        columns: ``(2 M, W)``: along the width, to (part, kx).
        rows: ``(2 (2 K + 1), 2 H)``, or ``2 H`` rows where that is all: along the height, (ky, part) from (h, part).
        places: ``(F,)`` int64: number of the row (ky, 0, kx) that holds the real part of a frequency of the grid; that
            of the imaginary part is ``M`` more. For those outside the band it means nothing.
        self_conjugate: ``(<= 4,)`` int64: rows of the real parts of the frequencies that are their own conjugate.
    """

    columns: Tensor
    rows: Tensor
    places: Tensor
    self_conjugate: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """``(H, W)``."""
        return self.rows.shape[1] // 2, self.columns.shape[1]

    @property
    def bands(self) -> int:
        """``K + 1``."""
        return self.rows.shape[0] // 4 + 1

    @property
    def band(self) -> int:
        """``M``: columns of the half spectrum that are made."""
        return self.columns.shape[0] // 2


def turns(frequencies: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(frequencies, size)`` of ``2 pi k n / size``, float64, zeros and ones exact."""
    steps = frequencies[:, None] * torch.arange(size) % size
    angle = steps.to(torch.float64) * (2 * math.pi / size)
    quarters = 4 * steps
    cosine, sine = angle.cos(), angle.sin()
    for quarter, (c, s) in enumerate(((1, 0), (0, 1), (-1, 0), (0, -1))):
        exact = quarters == quarter * size
        cosine[exact], sine[exact] = c, s
    return cosine, sine


@lru_cache(maxsize=64)
def _products(grid: FrequencyGrid, highest_y: int, highest_x: int, dtype: torch.dtype) -> Products:
    height, width = grid.height, grid.width
    kx = torch.arange(highest_x + 1)
    ky = torch.arange(-highest_y, highest_y + 1) if 2 * highest_y < height else torch.arange(height)
    cosine, sine = turns(kx, width)
    columns = torch.cat([cosine, -sine]) / math.sqrt(width)
    cosine, sine = (t / math.sqrt(height) for t in turns(ky % height, height))
    to_real, to_imaginary = torch.stack([cosine, sine], -1), torch.stack([-sine, cosine], -1)
    rows = torch.stack([to_real, to_imaginary], 1).view(2 * ky.numel(), 2 * height)
    places = (grid.ky - ky[0]) % height * (2 * kx.numel()) + grid.kx
    own = grid.self_conjugate
    inside = own[(grid.ky[own].abs() <= highest_y) & (grid.kx[own] <= highest_x)]
    return Products(columns.to(dtype), rows.to(dtype), places, places[inside])


@lru_cache(maxsize=64)
def _highest(grid: FrequencyGrid, count: int) -> tuple[int, int]:
    return int(grid.ky[:count].abs().max()), int(grid.kx[:count].max())


def products(grid: FrequencyGrid, count: int, dtype: torch.dtype) -> Products:
    """The :class:`Products` of a band that holds the first ``count`` frequencies of a grid, at least one."""
    return _products(grid, *_highest(grid, max(1, count)), dtype)


def maps_of_parts(parts: Tensor, by: Products, out: Tensor) -> None:
    """Writes ``out`` ``(H, W, n)``, contiguous: the adjoint of :func:`parts_of_maps` of ``(ky * 2 * M, n)``."""
    lines = torch.mm(by.rows.T, parts.view(by.rows.shape[0], -1))
    torch.matmul(by.columns.T, lines.view(out.shape[0], 2 * by.band, out.shape[2]), out=out)


def parts_of_maps(maps: Tensor, by: Products) -> Tensor:
    """Real maps ``(H, W, n)`` to the parts of their ortho spectra in a band, ``(ky * 2 * M, n)``."""
    lines = torch.matmul(by.columns, maps)
    return torch.mm(by.rows, lines.view(by.rows.shape[1], -1)).view(-1, maps.shape[2])


def _rows_by_products(maps: Tensor, grid: FrequencyGrid, padded: int) -> Tensor:
    """:func:`rows_of_maps` by matrix products."""
    by = products(grid, grid.count, maps.dtype)
    parts = parts_of_maps(maps.permute(1, 2, 0).contiguous(), by)
    real, imaginary = parts.index_select(0, by.places), parts.index_select(0, by.places + by.band)
    del parts
    rows = maps.new_empty(grid.count, padded, dtype=maps.dtype.to_complex())
    torch.complex(real, imaginary, out=rows[:, : maps.shape[0]])
    rows[:, maps.shape[0] :] = 0
    return torch.view_as_real(rows)


def rows_of_half(half: Tensor, grid: FrequencyGrid, padded: int) -> Tensor:
    """Half spectra ``(n, H, Wh)`` to pairs ``(F, padded, 2)``, zero where there is no plane.

    What is its own conjugate becomes exactly real.
    """
    rows = torch.view_as_real(half.flatten(1).T.contiguous().index_select(0, grid.index))
    if rows.shape[1] < padded:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, padded - rows.shape[1]))
    rows[:, :, 1].index_fill_(0, grid.self_conjugate, 0)  # by indexing, a GPU would be sent the number
    return rows


def rows_of_maps(maps: Tensor, grid: FrequencyGrid, padded: int) -> Tensor:
    """Real maps ``(n, H, W)`` to the pairs ``(F, padded, 2)`` of their ortho spectra; see :func:`rows_of_half`."""
    if by_products(grid, maps):
        return _rows_by_products(maps, grid, padded)
    return rows_of_half(torch.fft.rfft2(maps, norm="ortho"), grid, padded)


def maps_of_half(half: Tensor, grid: FrequencyGrid, out: Tensor) -> None:
    """Writes the real maps ``out`` ``(n, H, W)`` of half spectra ``(n, H, Wh)``."""
    size = (grid.height, grid.width)
    if out.is_contiguous():
        torch.fft.irfft2(half, s=size, norm="ortho", out=out)
    else:
        out.copy_(torch.fft.irfft2(half, s=size, norm="ortho"))


def spread_rows(rows: Tensor, grid: FrequencyGrid, out: Tensor) -> None:
    """Stored frequencies ``(F, n)`` to half spectra ``out`` ``(n, H, Wh)``, conjugate columns filled in."""
    flat = rows.new_empty(grid.height * grid.half_width, rows.shape[1])
    # Whole rows move to their place, and one transposition brings planes to the front.
    flat[grid.index] = rows
    flat[grid.mirror_index] = rows[grid.mirror_row].conj_physical()
    out.flatten(1).copy_(flat.T)
