"""rectify and clear_outside against PyTorch and the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from spectriton._backend import TritonBackend
from spectriton.reference import bits
from spectriton_kernels.configs import CLEAR_OUTSIDE, RECTIFY
from spectriton_kernels.sign_bits import plan_clear_outside, plan_rectify

pytestmark = pytest.mark.triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, 6.0, -1e-30, 1e-30)


def maps(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_last: bool = False) -> Tensor:
    x = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    count = min(len(SPECIAL), x.numel())
    x.view(-1)[:count] = torch.tensor(SPECIAL[:count])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.to(device, dtype).contiguous(memory_format=layout)


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype and got.stride() == expected.stride()
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(9), expected.nan_to_num(9))


@pytest.mark.parametrize("limit", [math.inf, 6.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (3, 5, 9, 33), (2, 16, 16, 16)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rectify(dtype, shape, limit, device):
    for channels_last in (False, True):
        x = maps(shape, dtype, device, channels_last)
        function = functional.relu if limit == math.inf else functional.relu6
        y, outside = TritonBackend().rectify(x, limit, inplace=False)
        assert_same(y, function(x))
        assert torch.equal(outside, bits.outside(x, limit))
        version, again = x._version, TritonBackend().rectify(x, limit, inplace=True)
        assert again[0] is x and x._version > version
        assert_same(x, y)
        assert torch.equal(again[1], outside)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (3, 5, 9, 33), (2, 16, 16, 16)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clear_outside(dtype, shape, device):
    for channels_last in (False, True):
        outside = bits.outside(maps(shape, dtype, device, channels_last))
        for of_gradient in (False, True):
            # The gradient stands as it likes; what is cleared may be NaN.
            grad = maps(shape, dtype, device, of_gradient)
            kept = grad.clone()
            expected = bits.clear_outside(grad, outside, channels_last, inplace=False)
            assert_same(TritonBackend().clear_outside(grad, outside, channels_last, inplace=False), expected)
            assert_same(grad, kept)
            cleared = TritonBackend().clear_outside(grad, outside, channels_last, inplace=True)
            assert_same(cleared, expected)
            assert (cleared is grad) == grad.is_contiguous(
                memory_format=torch.channels_last if channels_last else torch.contiguous_format
            )


def test_empty_maps_and_maps_with_gaps(device):
    y, outside = TritonBackend().rectify(torch.empty(2, 0, 3, 3, device=device), math.inf, inplace=False)
    assert y.shape == (2, 0, 3, 3) and outside.shape == (0,)
    x = maps((2, 3, 8, 9), torch.float32, device)[:, :, ::2, 1:]
    y, outside = TritonBackend().rectify(x, math.inf, inplace=False)
    assert_same(y, functional.relu(x))
    assert torch.equal(outside, bits.outside(x))


@pytest.mark.parametrize("config", RECTIFY.space, ids=str)
def test_every_configuration_of_rectifying(config, device):
    x = maps((1, 1, 3, 2731), torch.float32, device).view(-1)
    y, outside = torch.full_like(x, -7), torch.full((-(-x.numel() // 8),), 77, dtype=torch.uint8, device=device)
    plan_rectify(x, math.inf, y, outside, config).run()
    assert torch.equal(outside, bits.pack(x <= 0, 1))
    assert torch.equal(y.nan_to_num(9), x.relu().nan_to_num(9))


@pytest.mark.parametrize("config", CLEAR_OUTSIDE.space, ids=str)
def test_every_configuration_of_clearing(config, device):
    x = maps((1, 1, 3, 2731), torch.float32, device).view(-1)
    y, outside = torch.full_like(x, -7), bits.pack(x <= 0, 1)
    plan_clear_outside(x, outside, y, config).run()
    assert torch.equal(y.nan_to_num(9), x.masked_fill(x <= 0, 0).nan_to_num(9))
