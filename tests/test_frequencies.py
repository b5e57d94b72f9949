"""The grid of independent frequencies and the Fourier basis of taps."""

from __future__ import annotations

import itertools

import pytest
import torch

from spectriton.frequencies import frequency_grid, stored_frequencies, tap_basis

SIZES = list(itertools.product(range(1, 8), range(1, 8))) + [(32, 32), (28, 28), (17, 40)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_grid_holds_each_degree_of_freedom_once(height: int, width: int):
    grid = frequency_grid(height, width)
    assert grid.count == stored_frequencies(height, width)
    assert 2 * grid.count - grid.self_conjugate.numel() == height * width
    covered = torch.cat([grid.index, grid.mirror_index]).sort().values
    assert torch.equal(covered, torch.arange(height * grid.half_width))

    x = torch.randn(height, width, dtype=torch.float64)
    half = torch.fft.rfft2(x, norm="ortho").flatten()
    stored = half[grid.index]
    torch.testing.assert_close(half[grid.mirror_index], stored[grid.mirror_row].conj().resolve_conj())
    torch.testing.assert_close((grid.weight * stored.abs().square()).sum(), x.square().sum())
    assert stored[grid.self_conjugate].imag.abs().amax() < 1e-12


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_source_says_what_stands_at_each_position(height: int, width: int):
    grid = frequency_grid(height, width)
    half = torch.fft.rfft2(torch.randn(height, width, dtype=torch.float64)).flatten()
    rows = half[grid.index]
    assert grid.source.dtype == torch.int32 and grid.source.shape == half.shape
    source = grid.source.long()
    spread = torch.where(source < 0, rows[-1 - source.clamp(max=-1)].conj(), rows[source.clamp(min=0)])
    torch.testing.assert_close(spread, half)
    assert grid.source is grid.source


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5), (6, 9), (1, 4)])
def test_frequencies_run_from_low_to_high(height: int, width: int):
    grid = frequency_grid(height, width)
    radius = (grid.ky / height).square() + (grid.kx / width).square()
    assert (radius.diff() > -1e-12).all()
    assert grid.index[0] == 0
    on_axis = torch.fft.fftfreq(height, 1 / height).round().to(torch.int64)
    signed = on_axis[grid.index // grid.half_width]
    assert torch.equal(grid.ky.abs(), signed.abs())
    assert torch.equal(grid.ky % height, signed % height)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5), (6, 9), (1, 1)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 4), (5, 1)])
def test_basis_gives_the_spectrum_of_correlation(height: int, width: int, kernel: tuple[int, int]):
    """The basis applied to taps is the conjugate transform of the taps laid out around the origin."""
    grid = frequency_grid(height, width)
    taps = torch.randn(kernel, dtype=torch.float64)
    laid_out = torch.zeros(height, width, dtype=torch.float64)
    for ty, tx in itertools.product(range(kernel[0]), range(kernel[1])):
        laid_out[(ty - (kernel[0] - 1) // 2) % height, (tx - (kernel[1] - 1) // 2) % width] += taps[ty, tx]
    expected = torch.fft.rfft2(laid_out).conj().flatten()[grid.index]
    basis = torch.view_as_complex(tap_basis(grid, kernel, None, torch.float64).contiguous())
    torch.testing.assert_close(basis @ taps.flatten().to(torch.complex128), expected.resolve_conj())
    some = torch.arange(0, grid.count, 2)
    torch.testing.assert_close(tap_basis(grid, kernel, some, torch.float64), torch.view_as_real(basis)[some])


def test_basis_is_exactly_real_at_self_conjugate_frequencies():
    grid = frequency_grid(30, 14)
    basis = tap_basis(grid, (7, 5), grid.self_conjugate, torch.float32)
    assert (basis[..., 1] == 0).all()
    assert basis[..., 0].abs().unique().tolist() == [1.0]


def test_large_basis_is_made_by_rows_and_agrees():
    grid = frequency_grid(96, 96)  # beyond what is kept for the next call
    rows = torch.tensor([0, 5, 17, grid.count - 1])
    part = tap_basis(grid, (11, 11), rows, torch.float64)
    ty, tx = torch.arange(121).to(torch.float64).div(11).floor() - 5, torch.arange(121) % 11 - 5
    angle = 2 * torch.pi * (grid.ky[rows, None] * ty + grid.kx[rows, None] * tx) / 96
    torch.testing.assert_close(part, torch.stack([angle.cos(), angle.sin()], dim=-1))
