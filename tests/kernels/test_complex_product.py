"""complex_product against the formula written with separate parts."""

from __future__ import annotations

import pytest
import torch
from tolerances import TOLERANCES

from spectriton_kernels import complex_product

pytestmark = pytest.mark.triton
DTYPES = [torch.complex64, torch.complex128]


def by_parts(x: torch.Tensor, w: torch.Tensor, conj_w: bool = False) -> torch.Tensor:
    a, b = x.real, x.imag
    c, d = w.real, -w.imag if conj_w else w.imag
    return torch.complex(a * c - b * d, a * d + b * c)


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).to(device)


def check(x: torch.Tensor, w: torch.Tensor, conj_w: bool = False) -> None:
    out = complex_product(x, w, conj_w)
    expected = by_parts(x, w, conj_w)
    assert out.is_contiguous() and out.dtype == x.dtype
    torch.testing.assert_close(out, expected, **TOLERANCES[x.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conj_w", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 4, 5), (3, 683), (16, 256)])
def test_same_shape(shape, conj_w, dtype, device):
    check(random(*shape, dtype=dtype, device=device), random(*shape, dtype=dtype, device=device, seed=1), conj_w)


@pytest.mark.parametrize("conj_w", [False, True])
@pytest.mark.parametrize(
    ("shape_x", "shape_w"),
    [
        ((3, 4, 5, 3), (4, 5, 3)),  # one factor a channel and frequency
        ((3, 4, 5, 3), (4, 1, 1)),  # one factor a channel: broadcast columns
        ((4, 1, 1), (3, 4, 5, 3)),
        ((3, 1, 5, 1), (1, 4, 1, 3)),  # both broadcast, crosswise
        ((6, 1), (1, 5)),
        ((2, 1, 3, 1, 2), (1, 2, 1, 2, 1)),  # five dimensions, none mergeable
        ((2, 1, 3, 1, 2, 1), (1, 2, 1, 2, 1, 3)),  # six
        ((5, 7), ()),
        ((2, 1200), (1200,)),  # several column blocks
        ((700, 3), (1, 3)),  # several row blocks
    ],
)
def test_broadcast(shape_x, shape_w, conj_w, device):
    x = random(*shape_x, dtype=torch.complex64, device=device)
    w = random(*shape_w, dtype=torch.complex64, device=device, seed=1)
    check(x, w, conj_w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype, device):
    x = random(4, 6, 5, dtype=dtype, device=device)
    w = random(5, 6, 4, dtype=dtype, device=device, seed=1)
    check(x, w.permute(2, 1, 0))
    check(x[:, ::2], w.permute(2, 1, 0)[:, 1::2])
    check(x[..., 1:4], w[:3, 0, 0])
    check(x.transpose(0, 1), w.permute(1, 2, 0)[:, :, 2:3])
    check(x[:, :, ::2], x[:, :, 1:4:1])
    check(x.expand(2, 4, 6, 5), w.permute(2, 1, 0).expand(2, 4, 6, 5))


def test_lazy_conjugates(device):
    x, w = (
        random(3, 5, dtype=torch.complex64, device=device),
        random(3, 5, dtype=torch.complex64, device=device, seed=1),
    )
    assert x.conj().is_conj()
    for conj_w in (False, True):
        check(x.conj(), w, conj_w)
        check(x, w.conj(), conj_w)
        check(x.conj(), w.conj()[:1], conj_w)


def test_broadcast_does_not_write_more_than_the_result(device):
    assert complex_product(
        torch.ones(0, 3, dtype=torch.complex64, device=device), torch.ones(3, dtype=torch.complex64, device=device)
    ).shape == (0, 3)
    assert (
        complex_product(
            torch.ones((), dtype=torch.complex64, device=device), torch.ones((), dtype=torch.complex64, device=device)
        ).shape
        == ()
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(dtype, device):
    parts = torch.tensor([0.0, 2.0, float("inf"), float("-inf"), float("nan")], dtype=dtype.to_real(), device=device)
    x = torch.complex(*torch.meshgrid(parts, parts, indexing="ij"))
    w = random(5, 5, dtype=dtype, device=device)
    for out, expected in (
        (complex_product(x, w), by_parts(x, w)),
        (complex_product(x, w[:, :1]), by_parts(x, w[:, :1])),
    ):
        assert torch.equal(torch.view_as_real(out).isnan(), torch.view_as_real(expected).isnan())
        assert torch.view_as_real(expected).isinf().any()
        torch.testing.assert_close(out, expected, equal_nan=True, **TOLERANCES[dtype])
