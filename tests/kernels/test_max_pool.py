"""pool_maxima and spread_maxima against PyTorch and the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from spectriton._backend import TritonBackend
from spectriton.reference import max_pool
from spectriton.reference.max_pool import Window
from spectriton_kernels import can_pool
from spectriton_kernels.configs import POOL_MAXIMA, SPREAD_MAXIMA
from spectriton_kernels.max_pool import plan_pool_maxima, plan_spread_maxima

pytestmark = pytest.mark.triton
ONE = (1, 1)
WINDOWS = [
    Window((2, 2), (2, 2), (0, 0), ONE, False),
    Window((3, 3), (2, 2), (1, 1), ONE, False),  # as in front of a ResNet: windows overlap
    Window((3, 2), (2, 1), (1, 0), (1, 2), True),
    Window((3, 3), (1, 2), (1, 1), (2, 1), False),
    Window((2, 2), (3, 3), (1, 1), ONE, True),  # positions that are in no window
    Window((5, 5), (2, 2), (2, 2), ONE, False),  # codes of 8 bits
]


def maps(
    shape: tuple[int, ...], device: torch.device, channels_last: bool, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Few different values, so that maxima are not unique; some NaN and infinite, whole windows of them."""
    x = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).float()
    if x.numel():
        x[0, 0, :3, :3] = -math.inf
        x[-1, -1, ::3, ::2] = math.nan
        x[0, -1, :2, -2:] = math.nan
        x[-1, 0, -1] = math.inf
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.to(device, dtype).contiguous(memory_format=layout)


def same(a: Tensor, b: Tensor) -> bool:
    strides = a.stride() == b.stride() or a.numel() <= 1
    return strides and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(99), b.nan_to_num(99))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 8, 9, 7), (3, 12, 5, 15)])
def test_everything_is_pytorchs(shape, window, channels_last, device):
    x = maps(shape, device, channels_last)
    expected, index = functional.max_pool2d(x, *window.settings(), return_indices=True)
    y, codes = TritonBackend().pool_maxima(x, window)
    assert same(y, expected)
    assert torch.equal(codes, max_pool.pool_maxima(x, window)[1])
    # Whole numbers, which add up alike in any order.
    grad = torch.arange(y.numel(), dtype=torch.float32, device=device).view_as(y)
    spread = TritonBackend().spread_maxima(grad, window, codes, x.shape, channels_last)
    plain = torch.ops.aten.max_pool2d_with_indices_backward(
        grad.contiguous(), x.contiguous(), *window.settings(), index
    )
    assert torch.equal(spread, plain)
    again = TritonBackend().pool_maxima_again(x * 2, window, codes, y.shape, channels_last)
    assert same(again, 2 * expected)
    assert torch.equal(
        again.nan_to_num(9),
        max_pool.pool_maxima_again(x * 2, window, codes, y.shape, channels_last).nan_to_num(9),
    )


def test_those_above_do_run_the_kernels():
    assert all(can_pool(window, (2, 4, 3, 5), True) for window in WINDOWS)
    assert not can_pool(WINDOWS[0], (2, 3, 4, 7), True) and not can_pool(WINDOWS[0], (2, 3, 4, 7), False)
    assert can_pool(WINDOWS[0], (2, 3, 4, 8), False)
    assert not can_pool(Window((9, 9), ONE, ONE, ONE, False), (2, 8, 8, 8), True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_strides(dtype, device):
    wide = maps((2, 8, 9, 20), device, True, dtype)
    # Channels last with gaps between them.
    x = wide[:, :, :, ::2]
    out = torch.empty(2, 8, 5, 5, dtype=dtype, device=device, memory_format=torch.channels_last)
    codes = torch.empty(out.numel() // 2, dtype=torch.uint8, device=device)
    plan_pool_maxima(x, WINDOWS[1], True, out, codes, False).run()
    dense = x.contiguous(memory_format=torch.channels_last)
    expected, expected_codes = max_pool.pool_maxima(dense, WINDOWS[1])
    assert same(out, expected) and torch.equal(codes, expected_codes)
    y, _ = TritonBackend().pool_maxima(x, WINDOWS[1])
    assert torch.equal(y.nan_to_num(9), expected.nan_to_num(9))
    # Whatever the order of the gradient.
    grad = torch.ones(out.shape, dtype=dtype, device=device)
    spread = TritonBackend().spread_maxima(grad, WINDOWS[1], codes, x.shape, True)
    assert spread.dtype == dtype
    assert torch.equal(spread, max_pool.spread_maxima(grad, WINDOWS[1], codes, x.shape, True))


def test_empty_maps(device):
    x = torch.empty(0, 4, 8, 8, device=device)
    y, codes = TritonBackend().pool_maxima(x, WINDOWS[0])
    assert y.shape == (0, 4, 4, 4) and codes.shape == (0,)
    assert TritonBackend().spread_maxima(y, WINDOWS[0], codes, x.shape, False).shape == x.shape


def test_what_pytorch_refuses_is_refused(device):
    with pytest.raises(RuntimeError, match="pad"):
        TritonBackend().pool_maxima(maps((1, 8, 4, 4), device, True), Window((2, 2), (2, 2), (2, 2), ONE, False))


@pytest.mark.parametrize("config", POOL_MAXIMA.space, ids=str)
def test_every_configuration_of_pooling(config, device):
    window, x = WINDOWS[1], maps((2, 24, 9, 9), device, True)
    expected, expected_codes = max_pool.pool_maxima(x, window)
    out, codes = torch.empty_like(expected), torch.empty_like(expected_codes)
    plan_pool_maxima(x, window, True, out, codes, False, config).run()
    assert same(out, expected) and torch.equal(codes, expected_codes)


@pytest.mark.parametrize("config", SPREAD_MAXIMA.space, ids=str)
def test_every_configuration_of_spreading(config, device):
    window, x = WINDOWS[1], maps((2, 24, 9, 9), device, True)
    out, codes = max_pool.pool_maxima(x, window)
    grad, spread = torch.ones_like(out), torch.full_like(x, 7)
    plan_spread_maxima(grad, window, True, codes, spread, config).run()
    assert torch.equal(spread, max_pool.spread_maxima(grad, window, codes, x.shape, True))
