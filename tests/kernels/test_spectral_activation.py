"""spectral_activation against numpy in long double, its backward against autograd in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import TOLERANCES

from spectriton_kernels import spectral_activation, spectral_activation_backward
from spectriton_kernels.spectral_activation import KINDS

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
DTYPES = [torch.complex64, torch.complex128]

NUMPY = {
    "identity": lambda v: v,
    "tanh": np.tanh,
    "softsign": lambda v: v / (1 + np.abs(v)),
    "asinh": np.arcsinh,
    "atan": np.arctan,
}
TORCH = {
    "identity": lambda v: v,
    "tanh": torch.tanh,
    "softsign": torch.nn.functional.softsign,
    "asinh": torch.asinh,
    "atan": torch.atan,
}
LIMITS = {"identity": np.inf, "tanh": 1.0, "softsign": 1.0, "asinh": np.inf, "atan": np.pi / 2}


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0, size: float = 2.0) -> torch.Tensor:
    return (size * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))).to(device)


def scale_for(channels: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.linspace(0.5, 3.0, channels, dtype=dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_last_digits(kind, dtype, device):
    """Relative error over sixty orders of magnitude, in units in the last place."""
    real = dtype.to_real()
    v = torch.cat(
        [torch.logspace(-30, 30, 1501, dtype=torch.float64), torch.linspace(-9, 9, 2001, dtype=torch.float64)]
    )
    v = v.to(real).to(device)
    z = spectral_activation(torch.complex(v, -v), kind)
    expected = NUMPY[kind](v.cpu().numpy().astype(np.longdouble))
    error = np.abs(z.real.cpu().numpy().astype(np.longdouble) - expected)
    ulp = np.abs(expected) * torch.finfo(real).eps
    # a GPU's float32 exp and division are approximate to a unit or two each
    assert np.max(error / np.where(ulp == 0, 1, ulp)) < 4
    assert torch.equal(z.imag, -z.real)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_not_finite(kind, dtype, device):
    v = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0], dtype=dtype.to_real(), device=device)
    z = spectral_activation(torch.complex(v, v.flip(0)), kind)
    for part in (z.real, z.imag.flip(0)):
        assert part[0].isnan()
        assert part[1].item() == pytest.approx(LIMITS[kind], rel=1e-7)
        assert part[2].item() == pytest.approx(-LIMITS[kind], rel=1e-7)
        assert part[3] == 0


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3, 5, 4), (1, 7, 33), (2, 3000)])
def test_shapes_without_scale(shape, device):
    x = random(*shape, dtype=torch.complex64, device=device)
    z = spectral_activation(x, "tanh")
    expected = torch.complex(torch.tanh(x.real), torch.tanh(x.imag))
    torch.testing.assert_close(z, expected, **TOLERANCES[torch.complex64])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (3, 1, 7), (2, 5), (2, 2, 40, 13), (2, 5003, 1), (2, 2, 2100)])
def test_scale(shape, kind, dtype, device):
    x = random(*shape, dtype=dtype, device=device)
    scale = scale_for(shape[1], dtype.to_real(), device)
    s = scale.view(-1, *[1] * (len(shape) - 2))
    expected = torch.complex(s * TORCH[kind](x.real / s), s * TORCH[kind](x.imag / s))
    torch.testing.assert_close(spectral_activation(x, kind, scale), expected, **TOLERANCES[dtype])


def test_strides_and_conjugates(device):
    x = random(3, 4, 6, 5, dtype=torch.complex64, device=device)
    scale = scale_for(6, torch.float32, device)
    for view in (x.permute(3, 2, 0, 1), x.transpose(1, 2)[::2, :, 1:], x.transpose(1, 2).conj()):
        dense = torch.complex(view.real.contiguous(), view.imag.contiguous())
        assert torch.equal(spectral_activation(view, "tanh", scale), spectral_activation(dense, "tanh", scale))
        assert torch.equal(
            spectral_activation_backward(view, dense, "tanh", scale)[0],
            spectral_activation_backward(dense, view, "tanh", scale)[0],
        )
    spread = torch.stack([scale, scale.flip(0)], dim=1)[:, 0]
    assert torch.equal(
        spectral_activation(x.transpose(1, 2), "atan", spread), spectral_activation(x.transpose(1, 2), "atan", scale)
    )


def by_autograd(
    grad: torch.Tensor, x: torch.Tensor, kind: str, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Output, gradient of x and of the scale, in float64."""
    re, im = (part.double().requires_grad_() for part in (x.real, x.imag))
    s = None if scale is None else scale.double().requires_grad_()
    broadcast = 1.0 if s is None else s.view(-1, *[1] * (x.dim() - 2))
    z_re, z_im = (broadcast * TORCH[kind](part / broadcast) for part in (re, im))
    torch.autograd.backward([z_re, z_im], [grad.real.double(), grad.imag.double()])
    return torch.complex(z_re, z_im).detach(), torch.complex(re.grad, im.grad), None if s is None else s.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (3, 2, 1), (2, 5), (2, 1, 1100), (40, 70), (2, 2, 40, 13), (0, 2, 3)])
@pytest.mark.parametrize("has_scale", [False, True])
def test_backward(has_scale, shape, kind, dtype, device):
    x = random(*shape, dtype=dtype, device=device, size=1.0)
    grad = random(*shape, dtype=dtype, device=device, seed=1)
    scale = scale_for(shape[1], dtype.to_real(), device) if has_scale else None
    z, grad_x, grad_scale = by_autograd(grad, x, kind, scale)
    out_x, out_scale = spectral_activation_backward(grad, z.to(dtype), kind, scale)
    assert out_x.dtype == dtype and out_x.is_contiguous()
    # from the output alone a derivative near a flat limit is known to the output's absolute precision only
    tolerance = {name: 10 * value for name, value in TOLERANCES[dtype].items()}
    torch.testing.assert_close(out_x, grad_x.to(dtype), **tolerance)
    if scale is None:
        assert out_scale is None
        return
    terms = 2 * x.numel() / shape[1]
    torch.testing.assert_close(
        out_scale, grad_scale.to(scale.dtype), rtol=tolerance["rtol"], atol=tolerance["atol"] * max(terms, 1) ** 0.5
    )
    if kind == "identity":
        assert torch.equal(out_scale, torch.zeros_like(scale))
    again_x, again_scale = spectral_activation_backward(grad, z.to(dtype), kind, scale)
    assert torch.equal(out_x, again_x) and torch.equal(out_scale, again_scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
def test_backward_at_the_limits(kind, dtype, device):
    """A saturated output passes nothing back, one rounded past its limit nothing wild, and NaN stays NaN."""
    real = dtype.to_real()
    limit = min(LIMITS[kind], 1e30)
    past = torch.nextafter(torch.tensor(limit, dtype=real), torch.tensor(2 * limit, dtype=real)).item()
    q = torch.tensor([limit, -limit, past, float("nan")], dtype=real, device=device).view(1, 4, 1)
    z = torch.complex(q, q)
    grad = torch.complex(torch.ones_like(q), torch.ones_like(q))
    scale = torch.ones(4, dtype=real, device=device)
    for backward in (
        spectral_activation_backward(grad, z, kind),
        spectral_activation_backward(grad, z, kind, scale),
    ):
        parts = torch.view_as_real(backward[0])[0, :, 0]
        assert (parts[:3].abs() < 1e-6).all()
        assert parts[3].isnan().all()
    # for |v| -> infinity d(s h(v))/ds is h's limit itself, once for each part
    grad_scale = spectral_activation_backward(grad, z, kind, scale)[1]
    expected = 2 * q[0, :2, 0]
    if kind == "asinh":
        expected = expected - 2 * torch.sign(q[0, :2, 0])
    torch.testing.assert_close(grad_scale[:2], expected, rtol=1e-5, atol=1e-5)
    assert grad_scale[2].isfinite() and grad_scale[3].isnan()
