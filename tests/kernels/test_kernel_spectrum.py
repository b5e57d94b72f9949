"""kernel_spectrum and its adjoint against sums of complex numbers in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import TOLERANCES

from spectriton_kernels import kernel_spectrum, kernel_spectrum_adjoint, kernel_spectrum_adjoint_sums
from spectriton_kernels.kernel_spectrum import plan_kernel_spectrum_adjoint

pytestmark = pytest.mark.triton

# outputs, inputs, groups, kernel height and width, frequencies
CASES = [
    (1, 1, 1, 1, 1, 1),
    (5, 3, 1, 3, 3, 7),
    (4, 6, 2, 2, 3, 5),
    (6, 6, 6, 3, 3, 9),  # depthwise
    (6, 3, 3, 1, 2, 4),  # more outputs than inputs a group
    (40, 9, 1, 3, 1, 3),  # several blocks of inputs and outputs
    (3, 2, 1, 7, 5, 4),  # several blocks of taps
    (2, 3, 1, 3, 3, 141),  # frequencies shared out (not evenly), and several blocks of them
]


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def basis_for(frequencies: int, height: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`(Fc, kh * kw, 2)` unit complex numbers at arbitrary angles."""
    angle = 2 * np.pi * torch.rand(frequencies, height * width, generator=torch.Generator().manual_seed(3)).double()
    return torch.stack([angle.cos(), angle.sin()], dim=-1).to(dtype).to(device)


def complex_spectrum(weight: torch.Tensor, basis: torch.Tensor, groups: int) -> torch.Tensor:
    """`(Fc, g, I/g, O/g)` in complex128."""
    outputs, inputs = weight.shape[:2]
    taps = weight.double().reshape(groups, outputs // groups, inputs, -1)
    exponentials = torch.complex(basis[..., 0].double(), basis[..., 1].double())
    return torch.einsum("goit,ft->fgio", taps.to(torch.complex128), exponentials)


def embed(spectrum: torch.Tensor) -> torch.Tensor:
    """`(Fc, g, I/g, O/g)` to `(Fc, g, 2 I/g, 2 O/g)` real, block by block."""
    frequencies, groups, inputs, outputs = spectrum.shape
    out = torch.empty(frequencies, groups, 2 * inputs, 2 * outputs, dtype=torch.float64, device=spectrum.device)
    out[:, :, 0::2, 0::2] = spectrum.real
    out[:, :, 0::2, 1::2] = spectrum.imag
    out[:, :, 1::2, 0::2] = -spectrum.imag
    out[:, :, 1::2, 1::2] = spectrum.real
    return out


def poisoned(spectrum_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    frequencies, groups, inputs, outputs = spectrum_shape
    return torch.full((frequencies, groups, 2 * inputs, 2 * outputs), float("nan"), dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_kernel_spectrum(case, dtype, device):
    outputs, inputs, groups, height, width, frequencies = case
    weight = random(outputs, inputs // groups, height, width, dtype=dtype, device=device)
    basis = basis_for(frequencies, height, width, dtype, device)
    expected = complex_spectrum(weight, basis, groups)
    out = poisoned(expected.shape, dtype, device)
    assert kernel_spectrum(weight, basis, groups, out) is out
    torch.testing.assert_close(out.double(), embed(expected), **TOLERANCES[dtype])


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_out_dtypes(dtype, out_dtype, device):
    weight = random(4, 3, 3, 3, dtype=dtype, device=device)
    basis = basis_for(5, 3, 3, dtype, device)
    expected = complex_spectrum(weight, basis, 1)
    out = poisoned(expected.shape, out_dtype, device)
    kernel_spectrum(weight, basis, 1, out)
    limit = max(dtype, out_dtype, key=lambda kind: TOLERANCES[kind]["rtol"])
    torch.testing.assert_close(out.double(), embed(expected), **TOLERANCES[limit])


def test_embedding_is_the_complex_product(device):
    """Interleaved rows times the embedded matrix are the complex row times the complex matrix."""
    weight = random(4, 3, 3, 3, dtype=torch.float64, device=device)
    basis = basis_for(5, 3, 3, torch.float64, device)
    out = poisoned(torch.Size((5, 1, 3, 4)), torch.float64, device)
    kernel_spectrum(weight, basis, 1, out)
    x = torch.view_as_complex(random(5, 2, 3, 2, dtype=torch.float64, device=device, seed=4))
    mixed = torch.bmm(torch.view_as_real(x).reshape(5, 2, 6), out[:, 0]).view(5, 2, 4, 2)
    expected = torch.bmm(x, complex_spectrum(weight, basis, 1)[:, 0])
    torch.testing.assert_close(torch.view_as_complex(mixed), expected, **TOLERANCES[torch.complex128])


def test_not_contiguous(device):
    weight = random(3, 3, 3, 4, dtype=torch.float32, device=device).permute(3, 0, 1, 2)
    basis = basis_for(9, 3, 3, torch.float32, device)[::2]
    expected = complex_spectrum(weight, basis, 1)
    out = poisoned(expected.shape, torch.float32, device)
    kernel_spectrum(weight, basis, 1, out)
    torch.testing.assert_close(out.double(), embed(expected), **TOLERANCES[torch.float32])
    gradient = random(8, 1, 6, 5, dtype=torch.float32, device=device).transpose(2, 3)[:, :, :4]
    result = torch.zeros(3, 2, 3, 3, device=device)
    kernel_spectrum_adjoint(gradient, basis_for(8, 3, 3, torch.float32, device), 1, result)
    dense = torch.zeros_like(result)
    kernel_spectrum_adjoint(gradient.contiguous(), basis_for(8, 3, 3, torch.float32, device), 1, dense)
    assert torch.equal(result, dense)


def test_not_finite(device):
    weight = torch.ones(2, 2, 1, 1, device=device)
    weight[1, 0] = float("nan")
    basis = torch.tensor([[[1.0, 0.5]]], device=device)
    out = torch.zeros(1, 1, 4, 4, device=device)
    kernel_spectrum(weight, basis, 1, out)
    expected = torch.zeros(4, 4, dtype=torch.bool, device=device)
    expected[0:2, 2:4] = True  # input 0, output 1
    assert torch.equal(out[0, 0].isnan(), expected)


def adjoint_by_hand(grad: torch.Tensor, basis: torch.Tensor, shape: torch.Size, groups: int) -> torch.Tensor:
    """Gradient of `sum(grad * embed(spectrum(weight)))` by autograd in float64."""
    weight = torch.zeros(shape, dtype=torch.float64, device=grad.device, requires_grad=True)
    spectrum = complex_spectrum(weight, basis, groups)
    (embed(spectrum) * grad.double()).sum().backward()
    return weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_adjoint(case, dtype, device):
    outputs, inputs, groups, height, width, frequencies = case
    basis = basis_for(frequencies, height, width, dtype, device)
    grad = random(frequencies, groups, 2 * inputs // groups, 2 * outputs // groups, dtype=dtype, device=device)
    before = random(outputs, inputs // groups, height, width, dtype=dtype, device=device, seed=1)
    expected = before.double() + adjoint_by_hand(grad, basis, before.shape, groups)
    out = before.clone()
    assert kernel_spectrum_adjoint(grad, basis, groups, out) is out
    tolerance = {name: 4 * value for name, value in TOLERANCES[dtype].items()}  # sums of hundreds of terms
    torch.testing.assert_close(out.double(), expected, **tolerance)
    again = before.clone()
    kernel_spectrum_adjoint(grad, basis, groups, again)
    assert torch.equal(out, again)


def test_adjoint_shares_frequencies_out(device):
    """The last case takes the path with partial sums, the others add straight to the result."""
    for case in CASES:
        outputs, inputs, groups, height, width, frequencies = case
        out = torch.zeros(outputs, inputs // groups, height, width, device=device)
        grad = torch.zeros(frequencies, groups, 2 * inputs // groups, 2 * outputs // groups, device=device)
        basis = torch.zeros(frequencies, height * width, 2, device=device)
        partial = plan_kernel_spectrum_adjoint(grad, basis, groups, out)[1]
        assert (partial is not None) == (case is CASES[-1])


@pytest.mark.parametrize("frequencies", [(70, 70, 3), (70,), (5, 1)])
def test_adjoint_sums(frequencies, device):
    """Chunks, shared out or not, the last ones smaller, add up to the gradient of all of them."""
    shape, chunks, sums = torch.Size((4, 3, 3, 3)), [], None
    for seed, count in enumerate(frequencies):
        basis = basis_for(count, 3, 3, torch.float32, device)
        grad = random(count, 2, 6, 4, dtype=torch.float32, device=device, seed=seed)
        chunks.append((grad, basis))
        sums = kernel_spectrum_adjoint_sums(grad, basis, 2, shape, sums)
        assert sums.shape == (2 if frequencies[0] == 70 else 1, *shape)
    expected = sum(adjoint_by_hand(grad, basis, shape, 2) for grad, basis in chunks)
    torch.testing.assert_close(sums.sum(0).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("grad_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_adjoint_grad_dtypes(grad_dtype, device):
    basis = basis_for(6, 3, 3, torch.float32, device)
    grad = random(6, 1, 4, 6, dtype=grad_dtype, device=device)
    out = torch.zeros(3, 2, 3, 3, device=device)
    kernel_spectrum_adjoint(grad, basis, 1, out)
    expected = adjoint_by_hand(grad, basis, out.shape, 1)
    # the gradient is read exactly, only the sums are in float32
    torch.testing.assert_close(out.double(), expected, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("groups", [1, 2])
def test_adjointness(groups, device):
    """<kernel_spectrum(w), g> = <w, kernel_spectrum_adjoint(g)>."""
    weight = random(4, 3, 3, 3, dtype=torch.float64, device=device)
    basis = basis_for(6, 3, 3, torch.float64, device)
    out = poisoned(torch.Size((6, groups, 3, 4 // groups)), torch.float64, device)
    kernel_spectrum(weight, basis, groups, out)
    grad = random(*out.shape, dtype=torch.float64, device=device, seed=5)
    taps = torch.zeros_like(weight)
    kernel_spectrum_adjoint(grad, basis, groups, taps)
    torch.testing.assert_close((out * grad).sum(), (weight * taps).sum(), **TOLERANCES[torch.float64])
