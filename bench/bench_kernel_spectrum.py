"""Taps to embedded weights ``[[re, im], [-im, re]]`` at all stored frequencies, and the adjoint, against torch.

Plain torch: ``rfft2`` of the padded and centred taps, or a matrix product with the Fourier basis, each followed by
picking the stored frequencies and embedding; for the adjoint, folding the blocks and the transposed matrix product.

Bytes: taps, basis and weights, each once. Taps and basis are next to nothing: writing (the adjoint: reading) the
weights is the work.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.timing import DEVICE, Measure, by_size, compiled, contenders, error, generator, nbytes, precision
from spectriton import ops
from spectriton._backend import backend
from spectriton.frequencies import frequency_grid, tap_basis

# (kernel size, input channels, output channels, size of the maps)
CASES = by_size(
    cuda=[(3, 128, 128, 32), (7, 64, 64, 32)], cpu=[(3, 32, 32, 32), (7, 32, 32, 16)], quick=[(3, 16, 16, 8)]
)
NAMES = ["{0}x{0}, {1} to {2} channels, maps {3}x{3}".format(*case) for case in CASES]


def taps(case: tuple[int, int, int, int], seed: int) -> Tensor:
    k, inputs, outputs, _ = case
    return torch.randn(outputs, inputs, k, k, generator=generator(seed), device=DEVICE)


def basis_of(case: tuple[int, int, int, int]) -> Tensor:
    """``(F, k * k, 2)``."""
    k, _, _, size = case
    return tap_basis(frequency_grid(size, size, DEVICE), (k, k), None, torch.float32)


def embed(real: Tensor, imaginary: Tensor) -> Tensor:
    """``(F, I, O)`` twice to ``(F, 1, 2 I, 2 O)``."""
    first = torch.stack([real, imaginary], dim=-1)
    second = torch.stack([-imaginary, real], dim=-1)
    return torch.stack([first, second], dim=2).flatten(3).flatten(1, 2).unsqueeze(1)


def by_fft(weight: Tensor, basis: Tensor, size: int) -> Tensor:
    k = weight.shape[2]
    padded = torch.nn.functional.pad(weight, (0, size - k, 0, size - k))
    shift = -((k - 1) // 2)
    half = torch.fft.rfft2(torch.roll(padded, (shift, shift), (2, 3))).conj_physical()
    rows = half.flatten(2)[..., frequency_grid(size, size, DEVICE).index].permute(2, 1, 0)
    return embed(rows.real, rows.imag)


def by_matmul(weight: Tensor, basis: Tensor, size: int) -> Tensor:
    flat = weight.flatten(2)
    return embed(*(torch.einsum("oit,ft->fio", flat, part) for part in basis.unbind(-1)))


def spectriton(weight: Tensor, basis: Tensor, size: int) -> Tensor:
    return ops.kernel_spectrum(weight, (size, size))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@contenders("spectriton", "torch rfft2", "torch matmul", cuda=("torch.compile matmul",))
def test_kernel_spectrum(measure: Measure, case: tuple[int, int, int, int], contender: str) -> None:
    basis, size = basis_of(case), case[3]
    if contender == "torch.compile matmul":
        call = compiled(by_matmul)
    else:
        call = {"spectriton": spectriton, "torch rfft2": by_fft, "torch matmul": by_matmul}[contender]

    def inputs(number: int) -> tuple[Any, ...]:
        return taps(case, number), basis, size

    with precision("fp32"):
        weight = inputs(0)[0]
        wanted = by_matmul(weight.double(), basis.double(), size)
        assert error(call(*inputs(0)), wanted) < 1e-5
        moved = nbytes(weight, basis) + 4 * wanted.numel()
        group = f"kernel_spectrum {NAMES[CASES.index(case)]}"
        measure(group, contender, call, inputs, moved, flops=4 * weight.numel() * basis.shape[0])


def adjoint_by_matmul(grad: Tensor, basis: Tensor, out: Tensor) -> Tensor:
    blocks = grad[:, 0].unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
    real = blocks[:, :, 0, :, 0] + blocks[:, :, 1, :, 1]
    imaginary = blocks[:, :, 0, :, 1] - blocks[:, :, 1, :, 0]
    cosine, sine = basis.unbind(-1)
    out += (torch.einsum("fio,ft->oit", real, cosine) + torch.einsum("fio,ft->oit", imaginary, sine)).view_as(out)
    return out


def adjoint(grad: Tensor, basis: Tensor, out: Tensor) -> Tensor:
    backend(DEVICE).kernel_spectrum_adjoint(grad, basis, 1, out)
    return out


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@contenders("spectriton", "torch matmul", cuda=("torch.compile matmul",))
def test_kernel_spectrum_adjoint(measure: Measure, case: tuple[int, int, int, int], contender: str) -> None:
    _, channels_in, channels_out, _ = case
    basis = basis_of(case)
    if contender == "torch.compile matmul":
        call = compiled(adjoint_by_matmul)
    else:
        call = adjoint if contender == "spectriton" else adjoint_by_matmul

    def inputs(number: int) -> tuple[Any, ...]:
        shape = (basis.shape[0], 1, 2 * channels_in, 2 * channels_out)
        grad = torch.randn(shape, generator=generator(number), device=DEVICE)
        return grad, basis, torch.zeros_like(taps(case, number))

    with precision("fp32"):
        grad, _, out = inputs(0)
        wanted = adjoint_by_matmul(grad.double(), basis.double(), out.double())
        assert error(call(*inputs(0)), wanted) < 1e-4
        moved = nbytes(grad, basis) + 2 * nbytes(out)
        group = f"kernel_spectrum_adjoint {NAMES[CASES.index(case)]}"
        measure(group, contender, call, inputs, moved, flops=4 * out.numel() * basis.shape[0])
