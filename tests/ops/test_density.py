"""A set fraction of the coefficients: never more than asked for, hence bytes that are known in advance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectriton import PackedSpectrum, ops
from spectriton.packed import VALUE_DTYPES, layout

SHAPES = [(2, 3, 8, 8), (1, 1, 5, 7), (3, 20, 4, 3), (1, 2, 1, 1), (0, 3, 4, 4)]
DENSITIES = [0.0, 1e-3, 0.1, 0.25, 0.5, 0.999, 1.0]


def most(shape: tuple[int, ...], density: float) -> int:
    """Coefficients that may be kept: of all, or the zero frequency of each map."""
    coefficients = math.prod(shape[:2]) * layout(shape).frequencies
    return max(math.prod(shape[:2]), round(density * coefficients))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_many_as_asked_for_and_the_largest(backend: str, device: torch.device, shape: tuple[int, ...], dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, device=device)
    everything = ops.to_spectral(x, threshold=0.0)
    moduli = everything.values.norm(dim=1)[math.prod(shape[:2]) :] if backend == "reference" else None
    for density in DENSITIES:
        packed = ops.to_spectral(x, density=density)
        bound = most(shape, density)
        # Moduli of one bin of the histogram, of 0.2 %, go together.
        assert bound - max(2, 0.01 * bound) <= packed.kept <= bound
        assert packed.nbytes <= PackedSpectrum.bytes_for(shape, density, dtype)
        if moduli is not None and math.prod(shape[:2]) < packed.kept < everything.kept:
            dropped = moduli.sort(descending=True).values[packed.kept - math.prod(shape[:2])]
            smallest = packed.values.norm(dim=1)[math.prod(shape[:2]) :].min()
            assert smallest >= dropped
    assert ops.to_spectral(x, density=1.0).kept == everything.kept
    assert ops.to_spectral(x, density=0.0).kept == math.prod(shape[:2])


def impulses(shape: tuple[int, ...]) -> Tensor:
    """Maps whose coefficients all have the same modulus."""
    x = torch.zeros(shape)
    x[:, :, 0, 0] = 1.0
    return x


def sparse(shape: tuple[int, ...]) -> Tensor:
    """Maps of which a quarter is not zero, as a dead channel leaves them."""
    x = torch.randn(shape)
    x[:, shape[1] // 4 :] = 0
    return x


@pytest.mark.parametrize("maps", [impulses, sparse, lambda shape: 1e-30 * torch.randn(shape), torch.zeros])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_ties_zeros_and_tiny_values_do_not_go_beyond(backend: str, device: torch.device, maps, density: float):
    shape = (2, 4, 8, 8)
    packed = ops.to_spectral(maps(shape).to(device), density=density)
    assert packed.kept <= most(shape, density)


def test_what_fits_is_kept_but_for_zeros(backend: str, device: torch.device):
    """A quarter of the maps is not zero: half the coefficients would hold more than all of that."""
    shape = (2, 4, 8, 8)
    packed = ops.to_spectral(sparse(shape).to(device), density=0.5)
    zero_frequencies_of_the_rest = 2 * 3
    assert packed.kept == 2 * layout(shape).frequencies + zero_frequencies_of_the_rest


def test_ties_at_the_edge_of_a_bin_are_kept_where_there_is_room(backend: str, device: torch.device):
    """The moduli of impulses of height 8 in 8x8 maps are 1, where a bin of the histogram begins."""
    x = torch.cat([8 * impulses((1, 1, 8, 8)), torch.zeros(1, 1, 8, 8)]).to(device)
    packed = ops.to_spectral(x, density=0.6)
    assert packed.kept == layout((1, 1, 8, 8)).frequencies + 1


@pytest.mark.parametrize("scale", [2.0**-6, 1.0, 3.0])
def test_rounding_of_squares_does_not_go_beyond(backend: str, device: torch.device, scale: float):
    """Moduli within a few units in the last place of one another, around the beginning of a bin."""
    half = torch.zeros(1, 64, 4, 3, dtype=torch.complex64)
    steps = 1 + 2**-24 * torch.arange(-32, 32)
    angle = torch.linspace(0, 6, 64)
    half[0, :, 1, 1] = torch.polar(scale * steps, angle)
    for kept in range(0, 64, 5):
        density = (64 + kept) / (64 * layout((1, 64, 4, 4)).frequencies)
        packed = ops.pack(half.to(device), (4, 4), density=density)
        assert packed.kept <= 64 + kept


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_and_hides_nothing(backend: str, device: torch.device, bad: float):
    half = torch.randn(1, 4, 8, 5, dtype=torch.complex64)
    half[0, 1, 2, 3] = bad
    for density in (0.0, 0.2):
        packed = ops.pack(half.to(device), (8, 8), density=density)
        assert packed.kept <= most((1, 4, 8, 8), density) + 1
        assert not torch.view_as_real(packed.to_dense())[0, 1, 2, 3].isfinite().all()


@pytest.mark.parametrize("value_dtype", sorted(VALUE_DTYPES))
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_those_of_the_tensors(value_dtype: str, shape: tuple[int, ...]):
    packed = ops.to_spectral(torch.randn(shape, dtype=torch.float64), density=0.3, value_dtype=value_dtype)
    assert packed.packed_size.nbytes == packed.nbytes <= PackedSpectrum.bytes_for(shape, 0.3, value_dtype)
    everything = ops.to_spectral(torch.randn(shape, dtype=torch.float64), threshold=0.0, value_dtype=value_dtype)
    assert everything.nbytes == PackedSpectrum.bytes_for(shape, value_dtype=value_dtype)
    nothing = ops.to_spectral(torch.randn(shape, dtype=torch.float64), threshold=math.inf, value_dtype=value_dtype)
    assert nothing.nbytes == packed.packed_size.least_nbytes == PackedSpectrum.bytes_for(shape, 0.0, value_dtype)
    assert packed.packed_size.dense_nbytes == 4 * math.prod(shape)


def test_blocks_and_pooling_keep_to_it(backend: str, device: torch.device):
    packed = ops.to_spectral(torch.randn(3, 4, 8, 8, device=device), threshold=0.5)
    weight = torch.randn(5, 4, 3, 3, device=device)
    out = ops.spec_block(packed, weight, density=0.3)
    assert 0.29 < out.density and out.nbytes <= PackedSpectrum.bytes_for((3, 5, 8, 8), 0.3)
    with pytest.raises(ValueError, match="none together with a density"):
        ops.spec_block(packed, weight, density=0.3, threshold_scale=torch.ones(5, device=device))
    pooled = ops.max_pool2d(packed, 2, density=0.3)
    assert isinstance(pooled, PackedSpectrum)
    assert 0.28 < pooled.density and pooled.nbytes <= PackedSpectrum.bytes_for((3, 4, 4, 4), 0.3)


@pytest.mark.parametrize(("arguments", "message"), [
    (((2, 3, 8),), r"\(B, C, H, W\) of maps"),
    (((2, 3, 0, 8),), r"\(B, C, H, W\) of maps"),
    (((2, 3, 8, 8), 1.5), "fraction from 0 to 1"),
    (((2, 3, 8, 8), -0.5), "not negative"),
    (((2, 3, 8, 8), 0.5, "int3"), "did you mean 'int"),
])  # fmt: skip
def test_bad_arguments(arguments, message: str):
    with pytest.raises(ValueError, match=message):
        PackedSpectrum.bytes_for(*arguments)
