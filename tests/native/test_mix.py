"""Mixing of channels and its gradients in C against the complex products of the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spectriton._mixing import Mixing
from spectriton._native import NativeBackend, NativeMixing
from tests.native.spectra import Room

pytestmark = [
    pytest.mark.usefixtures("build"),
    pytest.mark.parametrize("build", ["this processor", "portable", "AVX"], indirect=True),
]

# (frequencies, batch, inputs, outputs, groups, taps): tails of rows, of vectors and of panels; nothing at all.
SIZES = [
    (5, 3, 1, 6, 1, 25),
    (3, 128, 6, 16, 1, 25),
    (7, 1, 5, 3, 1, 1),
    (2, 9, 17, 33, 1, 9),
    (2, 11, 70, 20, 1, 9),
    (65, 5, 3, 1, 1, 4),
    (1, 4, 2, 2, 1, 130),
    (3, 10, 12, 6, 3, 9),
    (2, 7, 5, 5, 5, 6),
    (0, 4, 3, 5, 1, 9),
    (3, 0, 3, 5, 1, 9),
]
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padded(frequencies: int, batch: int, channels: int, seed: int) -> tuple[Tensor, Room]:
    """Pairs ``(Fc, B, C, 2)`` whose rows have padding, in memory that shows what is written around it."""
    room = Room(frequencies, batch * channels + 5, 2)
    pairs = room.tensor[:, : batch * channels].view(frequencies, batch, channels, 2)
    return pairs.copy_(draw(*pairs.shape, seed=seed)), room


def untouched(room: Room, positions: int) -> bool:
    """Whether a row's padding is as it was."""
    return room.guarded and bool(room.tensor[:, positions:].isnan().all())


def both(weight: Tensor, groups: int) -> tuple[Any, Any]:
    return NativeMixing(weight, groups), Mixing(weight.double(), groups)


@pytest.mark.parametrize("size", SIZES)
def test_products(size: tuple[int, ...]) -> None:
    frequencies, batch, inputs, outputs, groups, taps = size
    weight, basis = draw(outputs, inputs // groups, taps, 1), draw(frequencies, taps, 2, seed=1)
    native, expected = both(weight, groups)
    weights, wanted = native.weights(basis), expected.weights(basis.double())
    torch.testing.assert_close(weights, torch.view_as_real(wanted).float(), **CLOSE)
    x, x_room = padded(frequencies, batch, inputs, 2)
    y, y_room = padded(frequencies, batch, outputs, 3)
    out = y.double()
    for add in (True, False):
        native.mix(x, weights, y, add)
        expected.mix(x.double(), wanted, out, add)
        torch.testing.assert_close(y.double(), out, **CLOSE)
    for _ in range(2):  # chunk after chunk
        native.add_grad_taps(x, y, basis)
        expected.add_grad_taps(x.double(), out, basis.double())
    taps_grad = expected.grad_taps()
    close = {"rtol": 1e-5, "atol": 1e-6 * (1 + float(taps_grad.abs().max()))}
    torch.testing.assert_close(native.grad_taps().double(), taps_grad, **close)
    assert native.grad_taps().is_contiguous()
    grad_input = x.double()
    native.mix_grad_input(y, weights, x)
    expected.mix_grad_input(out, wanted, grad_input)
    close = {"rtol": 1e-5, "atol": 1e-6 * (1 + float(grad_input.abs().max() if grad_input.numel() else 0))}
    torch.testing.assert_close(x.double(), grad_input, **close)
    assert untouched(x_room, batch * inputs) and untouched(y_room, batch * outputs)


def test_several_inputs() -> None:
    """Each range of input channels by itself makes up the whole."""
    weight, basis, x = draw(9, 7, 3, 3), draw(4, 9, 2, seed=1), draw(4, 6, 7, 2, seed=2)
    native, expected = both(weight, 1)
    weights, wanted = native.weights(basis), expected.weights(basis.double())
    out, y, grad = torch.empty(4, 6, 9, 2), torch.empty(4, 6, 9, 2).double(), draw(4, 6, 9, 2, seed=3)
    expected.mix(x.double(), wanted, y)
    expected.add_grad_taps(x.double(), grad.double(), basis.double())
    grad_input = x.double()
    expected.mix_grad_input(grad.double(), wanted, grad_input)
    for n, part in enumerate((slice(0, 2), slice(2, 7))):
        some, chosen = x[:, :, part].contiguous(), native.of_inputs(weights, part)
        native.mix(some, chosen, out, add=n > 0)
        native.add_grad_taps(some, grad, basis, part)
        native.mix_grad_input(grad, chosen, some)
        torch.testing.assert_close(some.double(), grad_input[:, :, part], **CLOSE)
    torch.testing.assert_close(out.double(), y, **CLOSE)
    torch.testing.assert_close(native.grad_taps().double(), expected.grad_taps(), **CLOSE)


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_what_is_not_a_number_comes_through(special: float) -> None:
    """Where the reference has it, and nowhere else: not in another frequency, plane or channel."""
    weight, basis, x, grad = draw(5, 3, 3, 3), draw(2, 9, 2, seed=1), draw(2, 9, 3, 2, seed=2), draw(2, 9, 5, 2, seed=3)
    x[1, 4, 2, 0], grad[0, 8, 4, 1] = special, special
    results = []
    for mixing in both(weight, 1):
        dtype = torch.float32 if isinstance(mixing, NativeMixing) else torch.float64
        given = (x.to(dtype), grad.to(dtype), basis.to(dtype))
        weights = mixing.weights(given[2])
        out, grad_input = torch.empty(2, 9, 5, 2, dtype=dtype), torch.empty(2, 9, 3, 2, dtype=dtype)
        mixing.mix(given[0], weights, out)
        mixing.mix_grad_input(given[1], weights, grad_input)
        mixing.add_grad_taps(*given)
        results.append([out, grad_input, mixing.grad_taps()])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got.isfinite(), expected.isfinite()) and not got.isfinite().all()


def test_other_strides() -> None:
    """Planes in another order: copied on the way in, written where they belong on the way out."""
    weight, basis = draw(4, 3, 3, 3), draw(2, 9, 2, seed=1)
    native, expected = both(weight, 1)
    weights, wanted = native.weights(basis), expected.weights(basis.double())
    x, y = (draw(2, channels, 5, 2, seed=2).transpose(1, 2) for channels in (3, 4))
    out, grad_input = y.double(), torch.empty(2, 5, 3, 2).double()
    native.mix(x, weights, y, add=True)
    expected.mix(x.double(), wanted, out, add=True)
    torch.testing.assert_close(y.double(), out, **CLOSE)
    native.add_grad_taps(x, y, basis)
    expected.add_grad_taps(x.double().contiguous(), out.contiguous(), basis.double())
    torch.testing.assert_close(native.grad_taps().double(), expected.grad_taps(), rtol=1e-5, atol=1e-4)
    native.mix_grad_input(y, weights, x)
    expected.mix_grad_input(out.contiguous(), wanted, grad_input)
    torch.testing.assert_close(x.double(), grad_input, rtol=1e-5, atol=1e-4)


def test_threads_do_not_matter() -> None:
    before, results = torch.get_num_threads(), []
    weight, basis = draw(20, 12, 3, 3), draw(60, 9, 2, seed=1)
    x, grad = draw(60, 40, 12, 2, seed=2), draw(60, 40, 20, 2, seed=3)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            mixing = NativeMixing(weight, 1)
            weights, out, grad_input = mixing.weights(basis), torch.empty_like(grad), torch.empty_like(x)
            mixing.mix(x, weights, out)
            mixing.mix_grad_input(grad, weights, grad_input)
            mixing.add_grad_taps(x, grad, basis)
            results.append((weights, out, grad_input, mixing.grad_taps()))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_which_products_are_made_in_c() -> None:
    backend = NativeBackend()
    assert type(backend.mixing(torch.ones(6, 1, 5, 5), 1)) is NativeMixing
    assert type(backend.mixing(torch.ones(512, 1, 1, 1), 512)) is NativeMixing
    assert type(backend.mixing(torch.ones(6, 1, 5, 5).double(), 1)) is Mixing
    assert type(backend.mixing(torch.ones(512, 512, 1, 1), 1)) is Mixing
