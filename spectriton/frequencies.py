"""The independent Fourier frequencies of a real map, ordered from low to high.

``rfft2`` of a real map keeps about half of the spectrum, but the columns ``kx = 0`` and, for even widths, ``kx = W/2``
still hold conjugate pairs. A :class:`FrequencyGrid` lists exactly one of each pair, so that what is stored has as many
degrees of freedom as the map, and symmetry survives thresholding exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

# A basis up to this size is kept for the next call; larger ones (large kernels on large maps) are made chunk by chunk.
_BASIS_CACHE_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class FrequencyGrid:
    """The ``F`` stored frequencies of real maps of ``height x width``; all tensors live on one device.

    Attributes:
        height, width: spatial size of the map; ``half_width = width // 2 + 1`` columns in its half spectrum.
        index: ``(F,)`` int64, position in the flattened half spectrum, low frequencies first.
        ky, kx: ``(F,)`` int64, integer frequencies (``ky`` signed).
        weight: ``(F,)`` float64, how many coefficients of the full spectrum a stored one stands for (Parseval): 2, or 1
            where a frequency is its own conjugate.
        mirror_index: ``(M,)`` int64, positions of the half spectrum that are not stored.
        mirror_row: ``(M,)`` int64, the stored frequency whose conjugate stands at ``mirror_index``.
    """

    height: int
    width: int
    index: Tensor
    ky: Tensor
    kx: Tensor
    weight: Tensor
    mirror_index: Tensor
    mirror_row: Tensor

    @property
    def half_width(self) -> int:
        """Columns of the half spectrum."""
        return self.width // 2 + 1

    @property
    def count(self) -> int:
        """Number of stored frequencies ``F``."""
        return self.index.numel()

    @property
    def self_conjugate(self) -> Tensor:
        """``(<= 4,)`` int64: rows of the frequencies that are their own conjugate, whose coefficients are real."""
        return torch.nonzero(self.weight == 1).flatten()

    @cached_property
    def source(self) -> Tensor:
        """``(H * Wh,)`` int32: the row stored for each position of the half spectrum, or ``-1 - row`` where the
        conjugate of that row stands."""
        device = self.index.device
        source = torch.empty(self.height * self.half_width, dtype=torch.int32, device=device)
        source[self.index] = torch.arange(self.count, dtype=torch.int32, device=device)
        source[self.mirror_index] = (-1 - self.mirror_row).to(torch.int32)
        return source


def _build(height: int, width: int) -> FrequencyGrid:
    half = width // 2 + 1
    row, kx = np.divmod(np.arange(height * half, dtype=np.int64), half)
    ky = np.where(row <= height // 2, row, row - height)
    paired_column = (kx == 0) | (2 * kx == width)
    stored = ~paired_column | (row <= height // 2)
    self_conjugate = paired_column & ((row == 0) | (2 * row == height))

    # |k| compared in integers: (ky / H)^2 + (kx / W)^2 scaled by (H W)^2. A stable sort keeps ties in position order.
    radius = (ky * width) ** 2 + (kx * height) ** 2
    index = np.flatnonzero(stored)
    index = index[np.argsort(radius[index], kind="stable")]
    row_of_index = np.full(height * half, -1, dtype=np.int64)
    row_of_index[index] = np.arange(index.size)
    mirror = np.flatnonzero(~stored)
    partner = (height - row[mirror]) % height * half + kx[mirror]
    return FrequencyGrid(
        height,
        width,
        index=torch.from_numpy(index),
        ky=torch.from_numpy(ky[index].copy()),
        kx=torch.from_numpy(kx[index].copy()),
        weight=torch.from_numpy(np.where(self_conjugate[index], 1.0, 2.0)),
        mirror_index=torch.from_numpy(mirror),
        mirror_row=torch.from_numpy(row_of_index[partner]),
    )


@lru_cache(maxsize=64)
def _grid(height: int, width: int, device: torch.device) -> FrequencyGrid:
    grid = _build(height, width)
    if device.type == "cpu":
        return grid
    fields = ("index", "ky", "kx", "weight", "mirror_index", "mirror_row")
    return FrequencyGrid(height, width, **{name: getattr(grid, name).to(device) for name in fields})


def frequency_grid(height: int, width: int, device: torch.device | str = "cpu") -> FrequencyGrid:
    """The :class:`FrequencyGrid` of real maps of ``height x width`` on ``device`` (made once, then shared)."""
    return _grid(int(height), int(width), torch.device(device))


def stored_frequencies(height: int, width: int) -> int:
    """Number of independent frequencies ``F`` of a real map, without building the grid."""
    columns = 1 + (width % 2 == 0 and width > 1)
    return height * (width // 2 + 1 - columns) + columns * (height // 2 + 1)


def _phase(grid: FrequencyGrid, kernel_size: tuple[int, int], rows: slice | Tensor) -> Tensor:
    """``(Fc, kh * kw)`` complex128: ``exp(+2 pi i k.(t - centre) / N)``.

    Phases are reduced in integers before the exponential, and the quarter turns are exact: a purely real frequency
    gets a purely real basis.
    """
    device = grid.index.device
    factors = []
    for frequency, taps, size in ((grid.ky, kernel_size[0], grid.height), (grid.kx, kernel_size[1], grid.width)):
        steps = torch.arange(size, device=device)
        angle = steps.to(torch.float64) * (2 * torch.pi / size)
        roots = torch.complex(angle.cos(), angle.sin())
        for quarter, exact in enumerate((1, 1j, -1, -1j)):
            roots.masked_fill_(4 * steps == quarter * size, exact)
        position = torch.arange(taps, device=device) - (taps - 1) // 2
        factors.append(roots[(frequency[rows, None] * position) % size])
    return (factors[0][:, :, None] * factors[1][:, None, :]).flatten(1)


@lru_cache(maxsize=64)
def _cached_basis(
    height: int, width: int, kernel_size: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    grid = frequency_grid(height, width, device)
    return torch.view_as_real(_phase(grid, kernel_size, slice(None))).to(dtype)


def tap_basis(grid: FrequencyGrid, kernel_size: tuple[int, int], rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Fourier basis of the taps of a kernel centred as in ``nn.Conv2d(padding="same")``.

    Args:
        grid: frequencies of the map.
        kernel_size: ``(kh, kw)``.
        rows: ``(Fc,)`` int64 frequencies wanted, all of them for None.
        dtype: real dtype of the result.

    Returns:
        ``(Fc, kh * kw, 2)``: real and imaginary part of
        ``exp(+2 pi i (ky (ty - (kh-1)//2) / H + kx (tx - (kw-1)//2) / W))``.
    """
    device = grid.index.device
    bytes_needed = grid.count * kernel_size[0] * kernel_size[1] * 2 * dtype.itemsize
    if bytes_needed <= _BASIS_CACHE_BYTES:
        basis = _cached_basis(grid.height, grid.width, kernel_size, dtype, device)
        return basis if rows is None else basis[rows]
    return torch.view_as_real(_phase(grid, kernel_size, slice(None) if rows is None else rows)).to(dtype)
