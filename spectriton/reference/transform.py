"""Fourier transforms of planes to and from frequency-major rows."""

from __future__ import annotations

import torch
from torch import Tensor

from spectriton.frequencies import FrequencyGrid


def rows_of_half(half: Tensor, grid: FrequencyGrid, padded: int) -> Tensor:
    """Half spectra ``(n, H, Wh)`` to pairs ``(F, padded, 2)``, zero where there is no plane."""
    rows = torch.view_as_real(half.flatten(1).T.contiguous().index_select(0, grid.index))
    if rows.shape[1] < padded:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, padded - rows.shape[1]))
    return rows


def rows_of_maps(maps: Tensor, grid: FrequencyGrid, padded: int) -> Tensor:
    """Real maps ``(n, H, W)`` to the pairs ``(F, padded, 2)`` of their ortho spectra, zero where there is no plane.

    What is its own conjugate is exactly real.
    """
    rows = rows_of_half(torch.fft.rfft2(maps, norm="ortho"), grid, padded)
    rows[:, :, 1].index_fill_(0, grid.self_conjugate, 0)  # by indexing, a GPU would be sent the number
    return rows


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
