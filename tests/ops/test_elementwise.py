"""complex_product, channel_mix, spectral_activation and kernel_spectrum."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from spectriton import ops
from spectriton.frequencies import frequency_grid
from tests import oracles

COMPLEX = torch.complex128


def random(*shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.randn(shape, dtype=COMPLEX, device=device, requires_grad=True)


@pytest.mark.parametrize(
    ("x", "w"),
    [
        ((2, 3, 4, 5), (2, 3, 4, 5)),
        ((2, 3, 4, 5), (3, 1, 5)),
        ((1,), (7, 1, 3)),
        ((), (4,)),
        ((0, 3), (3,)),
        ((5, 1), (1, 6)),
    ],
)
@pytest.mark.parametrize("conj_w", [False, True])
def test_complex_product(backend: str, device: torch.device, x: tuple[int, ...], w: tuple[int, ...], conj_w: bool):
    a, b = random(*x, device=device), random(*w, device=device)
    got = ops.complex_product(a, b, conj_w)
    expected = a * (b.conj() if conj_w else b)
    torch.testing.assert_close(got, expected.resolve_conj())
    assert got.is_contiguous()
    if got.numel():
        grad = torch.randn_like(got)
        pairs = zip(torch.autograd.grad(got, (a, b), grad), torch.autograd.grad(expected, (a, b), grad), strict=True)
        for mine, torchs in pairs:
            torch.testing.assert_close(mine, torchs)


def test_complex_product_of_views(backend: str, device: torch.device):
    a, b = random(6, 8, device=device).detach(), random(8, 6, device=device).detach()
    for x, w in ((a.T, b), (a[::2], a[1::2].conj()), (a.conj(), b.T), (a[:, 1:2].expand(6, 8), a)):
        torch.testing.assert_close(ops.complex_product(x, w), (x * w).resolve_conj())


def test_complex_product_keeps_nan_and_inf(backend: str, device: torch.device):
    x = torch.tensor([complex(float("nan"), 1), complex(float("inf"), 0), 1 + 1j], dtype=torch.complex64, device=device)
    got = ops.complex_product(x, torch.ones(3, dtype=torch.complex64, device=device))
    assert got[0].isnan() and got[1].real == float("inf") and got[2] == 1 + 1j


@pytest.mark.parametrize("conj_w", [False, True])
def test_complex_product_gradients(backend: str, device: torch.device, conj_w: bool):
    x, w = random(2, 3, 4, device=device), random(3, 1, device=device)
    assert gradcheck(lambda a, b: ops.complex_product(a, b, conj_w), (x, w), fast_mode=backend == "triton")
    if backend == "reference":
        assert gradgradcheck(lambda a, b: ops.complex_product(a, b, conj_w), (x, w))
        torch.library.opcheck(torch.ops.spectriton.complex_product.default, (x, w, conj_w))


@pytest.mark.parametrize("frequencies", [(), (7,), (4, 5)])
def test_channel_mix(frequencies: tuple[int, ...]):
    x, w = random(2, 3, *frequencies), random(5, 3, *frequencies)
    torch.testing.assert_close(ops.channel_mix(x, w), torch.einsum("bi...,oi...->bo...", x, w))
    assert gradcheck(ops.channel_mix, (x, w))
    torch.library.opcheck(torch.ops.spectriton.channel_mix.default, (x, w))


@pytest.mark.parametrize(("batch", "inputs"), [(0, 3), (2, 0)])
def test_channel_mix_of_nothing(batch: int, inputs: int):
    x, w = (torch.zeros(n, inputs, 4, 5, dtype=COMPLEX, requires_grad=True) for n in (batch, 6))
    y = ops.channel_mix(x, w)
    assert y.shape == (batch, 6, 4, 5) and not y.any()
    y.abs().sum().backward()
    assert w.grad is not None and not w.grad.any()


def test_channel_mix_of_views():
    x, w = random(6, 4, 3).detach().transpose(0, 2), random(5, 4, 6).detach().conj()
    torch.testing.assert_close(ops.channel_mix(x, w), torch.einsum("bif,oif->bof", x, w))


@pytest.mark.parametrize("kind", sorted(oracles.ACTIVATIONS))
@pytest.mark.parametrize("scaled", [False, True])
def test_spectral_activation(backend: str, device: torch.device, kind: str, scaled: bool):
    x = (3 * random(2, 3, 4, 5, device=device)).detach().requires_grad_()
    scale = (torch.rand(3, dtype=torch.float64, device=device) + 0.5).requires_grad_() if scaled else None
    got = ops.spectral_activation(x, kind, scale)
    s = 1.0 if scale is None else scale[:, None, None]
    h = oracles.ACTIVATIONS[kind]
    expected = torch.complex(s * h(x.real / s), s * h(x.imag / s))
    torch.testing.assert_close(got, expected)
    leaves = [x] if scale is None else [x, scale]
    grad = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, leaves, grad, retain_graph=True),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", sorted(oracles.ACTIVATIONS))
def test_spectral_activation_gradients(kind: str):
    x, scale = random(2, 3, 2, 2), (torch.rand(3, dtype=torch.float64) + 0.5).requires_grad_()
    assert gradcheck(lambda a: ops.spectral_activation(a, kind), (x,))
    assert gradcheck(lambda a, s: ops.spectral_activation(a, kind, s), (x, scale))
    torch.library.opcheck(torch.ops.spectriton.spectral_activation.default, (x, kind, scale))


@pytest.mark.parametrize("kind", sorted(oracles.ACTIVATIONS))
def test_spectral_activation_of_extremes(backend: str, device: torch.device, kind: str):
    """Saturated, infinite and undefined values go through, and gradients of saturated ones stay finite."""
    x = torch.tensor([1e30, -1e30, 100.0, 0.0, 1e-30], dtype=torch.float32, device=device)
    z = torch.complex(x, -x).requires_grad_()
    got = ops.spectral_activation(z[None], kind, torch.ones(5, device=device))
    torch.testing.assert_close(got[0].real, oracles.ACTIVATIONS[kind](x), rtol=1e-5, atol=0)
    got.abs().sum().backward()
    assert torch.isfinite(torch.view_as_real(z.grad)).all()
    odd = torch.tensor([complex(float("inf"), float("nan"))], dtype=torch.complex64, device=device)
    out = ops.spectral_activation(odd, kind)
    limit = {"tanh": 1.0, "softsign": 1.0, "atan": torch.pi / 2}.get(kind, float("inf"))
    assert out.real.item() == pytest.approx(limit) and out.imag.isnan().all()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [(5, 6), (4, 4), (1, 3)])
def test_kernel_spectrum_mixes_like_a_convolution(
    backend: str, device: torch.device, groups: int, size: tuple[int, int]
):
    """Interleaved spectra times the embedded matrices are the spectra of the convolution."""
    kernel = (min(3, size[0]), 2)
    x = torch.randn(2, 4, *size, dtype=torch.float64, device=device)
    weight = torch.randn(6, 4 // groups, *kernel, dtype=torch.float64, device=device)
    embedded = ops.kernel_spectrum(weight, size, None, groups)
    grid = frequency_grid(*size, device)
    rows = torch.fft.rfft2(x, norm="ortho").flatten(2)[..., grid.index].permute(2, 0, 1).contiguous()
    pairs = torch.view_as_real(rows).unflatten(2, (groups, -1)).transpose(1, 2).flatten(3)
    mixed = torch.matmul(pairs, embedded).transpose(1, 2).flatten(2).unflatten(2, (-1, 2)).contiguous()
    expected = torch.fft.rfft2(oracles.same_conv2d(x, weight, None, groups), norm="ortho").flatten(2)[..., grid.index]
    torch.testing.assert_close(torch.view_as_complex(mixed).permute(1, 2, 0), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_kernel_spectrum_gradients(backend: str, device: torch.device, groups: int):
    weight = torch.randn(4, 2, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    rows = torch.tensor([0, 3, 4, 9], device=device)
    assert gradcheck(lambda w: ops.kernel_spectrum(w, (5, 6), rows, groups), (weight,), fast_mode=backend == "triton")
    if backend == "reference":
        torch.library.opcheck(torch.ops.spectriton.kernel_spectrum.default, (weight, 5, 6, rows, groups))


SINGLE = torch.complex64
BAD = [
    (lambda: ops.complex_product(torch.zeros(2), torch.zeros(2, dtype=SINGLE)), TypeError, "expected a complex"),
    (lambda: ops.complex_product(*(torch.zeros(n, dtype=SINGLE) for n in (2, 3))), ValueError, "broadcast"),
    (lambda: ops.complex_product(torch.zeros(2, dtype=SINGLE), torch.zeros(2, dtype=COMPLEX)), TypeError, "dtype"),
    (lambda: ops.channel_mix(*(torch.zeros(2, n, 4, dtype=SINGLE) for n in (3, 5))), ValueError, "input channels"),
    (lambda: ops.channel_mix(*(torch.zeros(2, dtype=SINGLE) for _ in "xw")), ValueError, "at least 2 dimensions"),
    (lambda: ops.spectral_activation(torch.zeros(2, 3)), TypeError, "expected a complex tensor"),
    (lambda: ops.spectral_activation(torch.zeros(2, 3, dtype=SINGLE), "tan"), ValueError, "did you mean 'tanh'"),
    (lambda: ops.spectral_activation(torch.zeros(2, 3, dtype=SINGLE), scale=torch.ones(2)), ValueError, r"\(3,\)"),
    (lambda: ops.spectral_activation(torch.zeros(2, 3, dtype=SINGLE), scale=2.0), TypeError, "scale got 2.0"),
    (lambda: ops.complex_product(*(torch.zeros(2, dtype=SINGLE) for _ in "xw"), "yes"), TypeError, "conj_w got 'yes'"),
    (lambda: ops.kernel_spectrum(torch.zeros(2, 3, 3), (4, 4)), ValueError, "4 dimensions"),
    (lambda: ops.kernel_spectrum(torch.zeros(2, 1, 3, 3), 4), ValueError, "size got 4, expected"),
    (lambda: ops.kernel_spectrum(torch.zeros(2, 1, 3, 3), (4, 4), groups=3), ValueError, "divisor"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_bad_input(call, kind: type[Exception], text: str):
    with pytest.raises(kind, match=text):
        call()


@pytest.mark.parametrize("value_dtype", ["float64", "int8"])
@pytest.mark.parametrize("kind", ["tanh", "softsign"])
def test_activation_of_packed_spectra(backend: str, kind: str, value_dtype: str):
    """The dense activation at the kept coefficients, in chunks and as one; gradients of input and scale."""
    packed = ops.to_spectral(torch.randn(3, 5, 6, 7, dtype=torch.float64), threshold=0.8, value_dtype=value_dtype)
    packed.requires_grad_()
    scale = (torch.rand(5, dtype=torch.float64) + 0.5).requires_grad_()
    out = ops.spectral_activation(packed, kind, scale, workspace=1)
    dense = packed.to_dense()
    expected = ops.spectral_activation(dense, kind, scale)
    tolerance = 1e-12 if value_dtype == "float64" else 2e-2
    torch.testing.assert_close(out.to_dense(), expected, rtol=0, atol=tolerance)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, (packed.edge, scale), grad, retain_graph=True) for y in (out.to_dense(), expected)),
        rtol=10 * tolerance,
        atol=10 * tolerance,
    )
    assert out.bitmap is packed.bitmap and out.value_dtype == value_dtype


def test_activation_of_packed_spectra_as_an_op():
    packed = ops.to_spectral(torch.randn(2, 3, 4, 5, dtype=torch.float64), threshold=0.5).requires_grad_()
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    fields = (packed.edge, packed.values, packed.scales, packed.bitmap, packed.offsets)
    torch.library.opcheck(torch.ops.spectriton.packed_activation.default, (*fields, "tanh", scale, [2, 3, 4, 5], 0))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        ops.spectral_activation(packed, "tanh", torch.ones(4))
