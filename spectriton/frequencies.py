"""The independent Fourier frequencies of a real map, ordered from low to high.

``rfft2`` of a real map keeps about half of the spectrum, but the columns ``kx = 0`` and, for even widths, ``kx = W/2``
still hold conjugate pairs. A :class:`FrequencyGrid` lists exactly one of each pair, so that what is stored has as many
degrees of freedom as the map, and symmetry survives thresholding exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# A basis up to this size is kept for the next call; larger ones (large kernels on large maps) are made chunk by chunk,
# which takes twenty operators: on a GPU the host would be slower with them than the device is with the chunk.
_BASIS_CACHE_BYTES = 1 << 20
_BASIS_CACHE_BYTES_OF_GPU = 1 << 24


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

    @cached_property
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


class Aliases(NamedTuple):
    """Which frequencies of maps fold onto each frequency of the maps taken at every ``stride``-th position.

    Attributes:
        rows: ``(A, F_out)`` int64: a stored frequency of the large maps, for each of ``A`` aliases.
        conjugate: ``(A, F_out)`` bool: it is the conjugate of the stored coefficient that folds there.
        factor: ``(A, F_out)`` float64: by what it is multiplied, 0 where there is no further alias. Onto a frequency
            that is its own conjugate fold both halves of a pair: it is listed once, with twice the factor, and the
            real part of the sum is meant.
        real: ``(<= 4,)`` int64: those frequencies.
    """

    rows: Tensor
    conjugate: Tensor
    factor: Tensor
    real: Tensor


@lru_cache(maxsize=64)
def aliases(grid: FrequencyGrid, stride: tuple[int, int]) -> Aliases:
    """The :class:`Aliases` of maps on ``grid`` whose height and width are multiples of ``stride``."""
    height, width = grid.height // stride[0], grid.width // stride[1]
    out = frequency_grid(height, width)
    half = grid.half_width
    row_of = torch.full((grid.height * half,), -1, dtype=torch.int64)
    row_of[grid.index.cpu()] = torch.arange(grid.count)
    shifts = torch.cartesian_prod(torch.arange(stride[0]) * height, torch.arange(stride[1]) * width).view(-1, 2, 1)
    ky, kx = (out.ky + shifts[:, 0]) % grid.height, (out.kx + shifts[:, 1]) % grid.width
    conjugate = torch.where(kx < half, row_of[ky * half + kx.clamp(max=half - 1)], -1) < 0
    ky, kx = (torch.where(conjugate, -k % n, k) for k, n in ((ky, grid.height), (kx, grid.width)))
    rows = row_of[ky * half + kx]
    factor = torch.full(rows.shape, (stride[0] * stride[1]) ** -0.5, dtype=torch.float64)
    real = out.self_conjugate
    factor[:, real] *= torch.where(conjugate[:, real], 0, grid.weight.cpu()[rows[:, real]])
    device = grid.index.device
    return Aliases(*(t.to(device) for t in (rows, conjugate, factor, real)))


def _phase(
    grid: FrequencyGrid, kernel_size: tuple[int, int], dilation: tuple[int, int], rows: slice | Tensor
) -> Tensor:
    """``(Fc, kh * kw)`` complex128: ``exp(+2 pi i k.(d t - centre) / N)``.

    Phases are reduced in integers before the exponential, and the quarter turns are exact: a purely real frequency
    gets a purely real basis.
    """
    device = grid.index.device
    factors = []
    sizes = ((grid.ky, grid.height), (grid.kx, grid.width))
    for (frequency, size), taps, step in zip(sizes, kernel_size, dilation, strict=True):
        steps = torch.arange(size, device=device)
        angle = steps.to(torch.float64) * (2 * torch.pi / size)
        roots = torch.complex(angle.cos(), angle.sin())
        for quarter, exact in enumerate((1, 1j, -1, -1j)):
            roots.masked_fill_(4 * steps == quarter * size, exact)
        position = torch.arange(taps, device=device) * step - step * (taps - 1) // 2
        factors.append(roots[(frequency[rows, None] * position) % size])
    return (factors[0][:, :, None] * factors[1][:, None, :]).flatten(1)


@lru_cache(maxsize=64)
def _cached_basis(
    grid: FrequencyGrid, kernel_size: tuple[int, int], dilation: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    return torch.view_as_real(_phase(grid, kernel_size, dilation, slice(None))).to(dtype)


def tap_basis(
    grid: FrequencyGrid,
    kernel_size: tuple[int, int],
    rows: slice | Tensor | None,
    dtype: torch.dtype,
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """Fourier basis of the taps of a kernel centred as in ``nn.Conv2d(padding="same")``.

    Args:
        grid: frequencies of the map.
        kernel_size: ``(kh, kw)``.
        rows: frequencies wanted, as a range or ``(Fc,)`` int64; all of them for None.
        dtype: real dtype of the result.
        dilation: ``(dy, dx)``, distances between the taps.

    Returns:
        ``(Fc, kh * kw, 2)``: real and imaginary part of
        ``exp(+2 pi i (ky (dy ty - dy (kh-1)//2) / H + kx (dx tx - dx (kw-1)//2) / W))``.
    """
    chosen = slice(None) if rows is None else rows
    most = _BASIS_CACHE_BYTES if grid.index.device.type == "cpu" else _BASIS_CACHE_BYTES_OF_GPU
    if grid.count * kernel_size[0] * kernel_size[1] * 2 * dtype.itemsize <= most:
        return _cached_basis(grid, kernel_size, dilation, dtype)[chosen]
    return torch.view_as_real(_phase(grid, kernel_size, dilation, chosen)).to(dtype)
