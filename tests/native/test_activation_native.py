"""tanh of kept coefficients in C, and its backward, against the reference in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import spectriton_native as native
from spectriton.reference import activate, activate_backward
from tests.native.spectra import Room

pytestmark = pytest.mark.usefixtures("build")

SPECIAL = torch.tensor(
    [[0.0, -0.0], [torch.inf, -torch.inf], [torch.nan, 1.0], [0.6249999, -0.6250001], [1e-36, -9.01]]
)


def pairs(count: int) -> Tensor:
    """Of all sizes, with what functions could trip over at the end."""
    sizes = torch.tensor([1e-6, 1e-3, 0.1, 0.5, 1.0, 3.0, 30.0, 1e6]).repeat(count // 8 + 1)[:count, None]
    return torch.cat([torch.randn(count, 2, generator=torch.Generator().manual_seed(count)) * sizes, SPECIAL])


def some_scales(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(1)) * 10 + 0.1


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("count", [0, 1, 127, 5000])
def test_activate_tanh(count: int, scaled: bool) -> None:
    x = pairs(count)
    scales = some_scales(len(x)) if scaled else None
    room = Room(*x.shape)
    room.tensor.copy_(x)
    native.activate_tanh(room.tensor, scales)
    expected = activate(x.double(), "tanh", None if scales is None else scales.double()[:, None])
    torch.testing.assert_close(room.tensor.double(), expected, rtol=5e-7, atol=0, equal_nan=True)
    assert torch.equal(room.tensor.signbit(), x.signbit()) and room.guarded


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("count", [0, 1, 127, 5000])
def test_tanh_backward(count: int, scaled: bool) -> None:
    x = pairs(count)
    scales = some_scales(len(x)) if scaled else None
    wide = None if scales is None else scales.double()[:, None]
    output = activate(x.double(), "tanh", wide).float()
    grad, rooms = pairs(count).flip(0).clamp(-3, 3), (Room(*x.shape), Room(*x.shape))
    native.tanh_backward(grad, output, scales, rooms[0].tensor, rooms[1].tensor if scaled else None)
    of_input, terms = activate_backward(grad.double(), output.double(), "tanh", wide)
    torch.testing.assert_close(rooms[0].tensor.double(), of_input, rtol=1e-6, atol=2e-6, equal_nan=True)
    if terms is not None:
        torch.testing.assert_close(rooms[1].tensor.double(), terms, rtol=1e-6, atol=5e-6, equal_nan=True)
    assert all(room.guarded for room in rooms)
