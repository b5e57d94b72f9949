"""What is done to dense maps in C against the reference: bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectriton._backend import Backend
from spectriton.reference.max_pool import Window
from spectriton.reference.rebuild import Statistics

REFERENCE = Backend()
SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (3, 8, 4, 4), (2, 16, 9, 9), (0, 3, 4, 4), (1, 2, 1, 3), (5, 20, 32, 32)]


@pytest.fixture
def native(build: str) -> Backend:
    """The backend on the library as it is used here, and on that of the branches that every processor can run."""
    from spectriton._native import NativeBackend

    return NativeBackend()


def maps(shape: tuple[int, ...], channels_last: bool = False, seed: int = 0) -> Tensor:
    """Maps with what comparisons may stumble over."""
    x = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 6.0, 1e-42])
    flat = x.view(-1)
    flat[:: max(1, len(flat) // 10)] = special.repeat(len(flat))[: len(flat[:: max(1, len(flat) // 10)])]
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def assert_same(got: Tensor, expected: Tensor) -> None:
    """The same bits, but that any NaN is as good as another."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit() & ~got.isnan(), expected.signbit() & ~expected.isnan())


ORDERS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
INPLACE = pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])


@INPLACE
@ORDERS
@pytest.mark.parametrize("limit", [float("inf"), 6.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_rectify(native: Backend, shape: tuple[int, ...], limit: float, channels_last: bool, inplace: bool):
    x = maps(shape, channels_last)
    given = x.clone()
    version = given._version
    y, bits = native.rectify(given, limit, inplace)
    expected, expected_bits = REFERENCE.rectify(x.clone(), limit, inplace)
    assert_same(y, expected)
    assert torch.equal(bits, expected_bits)
    assert y.stride() == expected.stride() or not y.numel()
    assert (y is given) == inplace and (given._version > version) == inplace
    if not inplace:
        assert_same(given, x)


@INPLACE
@ORDERS
@pytest.mark.parametrize("shape", SHAPES)
def test_clear_outside(native: Backend, shape: tuple[int, ...], channels_last: bool, inplace: bool):
    _, bits = REFERENCE.rectify(maps(shape, channels_last), float("inf"), False)
    for given in (maps(shape, channels_last, 1), maps(shape, not channels_last, 1)):
        kept = given.clone()
        expected = REFERENCE.clear_outside(given.clone(), bits, channels_last, inplace)
        assert_same(native.clear_outside(given, bits, channels_last, inplace), expected)
        if not inplace:
            assert_same(given, kept)


@INPLACE
@ORDERS
@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("norm", ["none", "plain", "affine", "variance"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 8, 4, 4), (2, 17, 9, 9), (0, 3, 4, 4)])
def test_rebuild(
    native: Backend, shape: tuple[int, ...], norm: str, rectified: bool, channels_last: bool, inplace: bool
):
    x = maps(shape, channels_last)
    draw = torch.Generator().manual_seed(2)
    mean, scale, weight, bias = (torch.randn(shape[1], generator=draw) for _ in range(4))
    statistics = {
        "none": Statistics(),
        "plain": Statistics(mean, scale),
        "affine": Statistics(mean, scale, weight, bias),
        "variance": Statistics(mean, scale.abs(), None, bias),
    }[norm]
    eps = 1e-3 if norm == "variance" else None
    bits = REFERENCE.rectify(maps(shape, channels_last, 1), float("inf"), False)[1] if rectified else None
    given = x.clone()
    got = native.rebuild(given, statistics, eps, bits, channels_last, inplace)
    assert_same(got, REFERENCE.rebuild(x.clone(), statistics, eps, bits, channels_last, inplace))
    if not inplace:
        assert_same(given, x)


WINDOWS = [
    Window((2, 2), (2, 2), (0, 0), (1, 1), False),
    Window((3, 3), (2, 2), (1, 1), (1, 1), False),
    Window((3, 2), (1, 2), (1, 0), (2, 1), True),
    Window((2, 2), (3, 3), (0, 0), (1, 1), True),
    Window((1, 2), (1, 1), (0, 1), (1, 3), False),
    Window((5, 5), (1, 1), (2, 2), (1, 1), False),
]
POOLED = [(2, 3, 9, 11), (3, 17, 5, 6), (1, 1, 5, 5), (2, 4, 6, 150)]
# Windows of two by two cover these: in several pieces, in one, with images that share a byte, with long rows.
POOLED += [(3, 16, 6, 12), (5, 4, 6, 6), (3, 3, 6, 6), (2, 4, 6, 128), (2, 2, 6, 260)]


@ORDERS
@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"{w.kernel}{w.stride}")
@pytest.mark.parametrize("shape", POOLED)
def test_pooling(native: Backend, shape: tuple[int, ...], window: Window, channels_last: bool):
    x = maps(shape, channels_last)
    y, codes = native.pool_maxima(x, window)
    expected, expected_codes = REFERENCE.pool_maxima(x, window)
    assert_same(y, expected)
    assert y.stride() == expected.stride()
    assert torch.equal(codes, expected_codes)
    for other in (maps(shape, False, 1), maps(shape, True, 1)):
        again = native.pool_maxima_again(other, window, codes, y.shape, channels_last)
        assert_same(again, REFERENCE.pool_maxima_again(other, window, codes, y.shape, channels_last))
    # Of whole numbers sums do not depend on their order.
    whole = torch.randint(-9, 9, y.shape, generator=torch.Generator().manual_seed(3)).float()
    for grad in (whole, whole.contiguous(memory_format=torch.channels_last), whole[:1, :1, :1, :1].expand(y.shape)):
        spread = native.spread_maxima(grad, window, codes, x.shape, channels_last)
        assert torch.equal(spread, REFERENCE.spread_maxima(grad, window, codes, x.shape, channels_last))


@pytest.mark.parametrize("width", [2, 4])
def test_halving_of_short_rows(native: Backend, width: int):
    x = maps((5, 24, width, width))
    for got, expected in zip(native.pool_maxima(x, WINDOWS[0]), REFERENCE.pool_maxima(x, WINDOWS[0]), strict=True):
        assert_same(got, expected)


@ORDERS
@pytest.mark.parametrize(("window", "shape"), [(WINDOWS[1], (2, 3, 6, 5)), (WINDOWS[0], (2, 4, 6, 10))])
def test_pooling_of_nothing_but_infinity_and_of_ties(
    native: Backend, window: Window, shape: tuple[int, ...], channels_last: bool
):
    for value in (-torch.inf, 0.0, torch.nan):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.full(shape, value).contiguous(memory_format=layout)
        got, expected = native.pool_maxima(x, window), REFERENCE.pool_maxima(x, window)
        assert_same(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_other_formats_and_gaps(native: Backend):
    """What the functions do not take is left to the reference."""
    window = WINDOWS[1]
    for x in (maps((2, 3, 5, 7)).double(), maps((2, 3, 5, 7)).bfloat16(), maps((2, 3, 5, 14))[..., ::2]):
        for got, expected in zip(native.rectify(x, 6.0, False), REFERENCE.rectify(x, 6.0, False), strict=True):
            assert_same(got, expected)
        _, bits = REFERENCE.rectify(x, 6.0, False)
        assert_same(native.clear_outside(x, bits, False, False), REFERENCE.clear_outside(x, bits, False, False))
        statistics = Statistics(torch.ones(3).to(x.dtype), torch.full((3,), 0.5).to(x.dtype))
        assert_same(
            native.rebuild(x, statistics, None, bits, False, False),
            REFERENCE.rebuild(x, statistics, None, bits, False, False),
        )
        y, codes = native.pool_maxima(x, window)
        expected, expected_codes = REFERENCE.pool_maxima(x, window)
        assert_same(y, expected)
        assert torch.equal(codes, expected_codes)
        again = native.pool_maxima_again(x, window, codes, y.shape, False)
        assert_same(again, REFERENCE.pool_maxima_again(x, window, codes, y.shape, False))
        spread = native.spread_maxima(torch.ones_like(y), window, codes, x.shape, False)
        assert torch.equal(spread, REFERENCE.spread_maxima(torch.ones_like(y), window, codes, x.shape, False))


def test_threads_do_not_matter(native: Backend):
    x = maps((5, 9, 33, 31))
    halved = maps((5, 8, 40, 32))
    statistics = Statistics(torch.ones(9), torch.full((9,), 0.5))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y, bits = native.rectify(x, 6.0, False)
            pooled, codes = native.pool_maxima(x, WINDOWS[1])
            results.append(
                (
                    *(y, bits, pooled, codes),
                    *native.pool_maxima(halved, WINDOWS[0]),
                    native.clear_outside(x, bits, False, False),
                    native.rebuild(x, statistics, None, bits, False, False),
                    native.pool_maxima_again(y, WINDOWS[1], codes, pooled.shape, False),
                    native.spread_maxima(pooled, WINDOWS[1], codes, x.shape, False),
                )
            )
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        torch.testing.assert_close(one, three, rtol=0, atol=0, equal_nan=True)
