"""Pooling in C against the reference, to the bit: codes, signs, maxima and what backward makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectriton._backend import Backend, why_not_native
from spectriton.ops.pool2d import _code_bits, _output_size
from spectriton.reference.across import Windows, empty_across

pytestmark = [
    pytest.mark.skipif(why_not_native() is not None, reason=f"no C functions: {why_not_native()}"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # infinity less infinity, in NumPy
]


@pytest.fixture(scope="module")
def native() -> Backend:
    from spectriton._native import NativeBackend

    return NativeBackend()


WINDOWS = [
    ((6, 8), (2, 2), (2, 2), 0),
    ((7, 9), (2, 2), (2, 2), 0),  # a row and a column are left over
    ((7, 8), (3, 3), (2, 2), 0),  # they overlap
    ((7, 6), (3, 2), (1, 1), 0),
    ((8, 9), (2, 1), (3, 2), 0),  # with gaps
    ((9, 8), (2, 2), (2, 2), 2),
    ((9, 9), (3, 3), (2, 2), 1),
    ((5, 5), (1, 1), (1, 1), 0),
    ((18, 17), (16, 16), (1, 1), 0),  # codes of a byte
]


def maps_of(planes: int, size: tuple[int, int]) -> Tensor:
    """Many equals, what is no number, zeros of both signs, and infinities; planes innermost."""
    generator = torch.Generator().manual_seed(planes)
    maps = empty_across(torch.empty(0), planes, list(size))
    maps.copy_(torch.randn(maps.shape, generator=generator).round(decimals=1))
    picks = torch.rand(maps.shape, generator=generator)
    for number, value in enumerate((float("nan"), float("inf"), -float("inf"), 0.0, -0.0)):
        maps[(picks > 0.02 * number) & (picks < 0.02 * number + 0.02)] = value
    return maps


def code_bytes(outputs: int, bits: int) -> Tensor:
    return torch.full((-(-outputs * bits // 8),), 0xA5, dtype=torch.uint8)


def check(native: Backend, planes: int, case: tuple, tile: int, affine: bool, rectify: bool) -> None:
    size, kernel, stride, margin = case
    windows = Windows(list(kernel), list(stride), _code_bits(list(kernel)), tile, margin)
    outputs = _output_size([n - 2 * margin for n in size], list(kernel), list(stride))
    maps = maps_of(planes, size)
    scaled = (torch.tensor([2.0, -0.5, 0.0]).repeat(planes)[:planes], torch.linspace(-1, 1, planes)) if affine else None
    made = []
    for backend in (Backend(), native):
        out = torch.full((*outputs, planes), float("nan")).permute(2, 0, 1)
        codes, signs = code_bytes(out.numel(), windows.bits), code_bytes(out.numel(), 1) if rectify else None
        backend.pool_across(maps.clone(), windows, out, codes, signs, scaled, rectify)
        made.append((out, codes, signs))
    (expected, codes, signs), (got, *bits) = made
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(bits[0], codes)
    assert signs is None or torch.equal(bits[1], signs)

    grad = maps_of(planes, tuple(outputs))
    expected = Backend().spread_across(grad.clone(), windows, list(size), codes, signs)
    got = native.spread_across(grad.clone(), windows, list(size), codes, signs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", WINDOWS)
@pytest.mark.parametrize(("planes", "tile"), [(1, 32), (77, 32), (64, 32), (40, 8), (300, 256)])
def test_equals_the_reference(native: Backend, planes: int, case: tuple, tile: int):
    check(native, planes, case, tile, affine=False, rectify=False)
    check(native, planes, case, tile, affine=False, rectify=True)


@pytest.mark.parametrize("case", WINDOWS[:3])
def test_scaled_first(native: Backend, case: tuple):
    """By powers of two, which leaves equals equal however the sum is rounded."""
    check(native, 77, case, 32, affine=True, rectify=True)


@pytest.mark.parametrize("planes", [1, 77, 128])
def test_relu_of_the_maps_themselves(native: Backend, planes: int):
    """Over what was there, forward and backward."""
    windows, maps = Windows([1, 1], [1, 1], 1, 32), maps_of(planes, (5, 3))
    affine = torch.full((planes,), -2.0), torch.zeros(planes)
    made = []
    for backend in (Backend(), native):
        out, signs = maps.clone(), code_bytes(maps.numel(), 1)
        backend.pool_across(out, windows, out, None, signs, affine, rectify=True)
        grad = maps_of(planes, (5, 3))
        back = backend.spread_across(grad, windows, [5, 3], None, signs)
        assert back.data_ptr() == grad.data_ptr()
        made.append((out, signs, back))
    for expected, got in zip(*made, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_planes_that_stand_apart(native: Backend):
    """Maxima and gradients of which the planes are not innermost, and chunks of larger maps."""
    windows, maps = Windows([2, 2], [2, 2], 2, 32), maps_of(96, (6, 6))[32:77]
    made = []
    for backend in (Backend(), native):
        out, codes = torch.empty(45, 3, 3), code_bytes(45 * 9, 2)
        backend.pool_across(maps, windows, out, codes)
        made.append((out, codes, backend.spread_across(out + 1, windows, [6, 6], codes)))
    for expected, got in zip(*made, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_no_planes(native: Backend):
    windows, maps, out = Windows([2, 2], [2, 2], 2, 32), maps_of(0, (4, 4)), maps_of(0, (2, 2))
    native.pool_across(maps, windows, out, code_bytes(0, 2), code_bytes(0, 1), rectify=True)
    assert native.spread_across(out, windows, [4, 4], code_bytes(0, 2)).shape == (0, 4, 4)


def test_double_precision_goes_to_the_reference(native: Backend):
    windows, maps = Windows([2, 2], [2, 2], 2, 32), maps_of(40, (4, 4)).double()
    out, codes = torch.empty(2, 2, 40, dtype=torch.float64).permute(2, 0, 1), code_bytes(160, 2)
    native.pool_across(maps, windows, out, codes)
    torch.testing.assert_close(out, torch.nn.functional.max_pool2d(maps, 2), equal_nan=True)
    assert native.spread_across(out, windows, [4, 4], codes).dtype == torch.float64
