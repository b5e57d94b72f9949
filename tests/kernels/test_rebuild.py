"""rebuild against the reference, and batch norm and ReLU of PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from spectriton._backend import TritonBackend
from spectriton.reference import bits
from spectriton.reference.rebuild import Statistics, rebuild
from spectriton_kernels.configs import REBUILD
from spectriton_kernels.rebuild import plan_rebuild

pytestmark = pytest.mark.triton
EPS = 1e-3


def given(
    shape: tuple[int, ...], device: torch.device, channels_last: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Statistics, Tensor]:
    """Maps, mean, variance, weight and bias of their channels, and the bits of ReLU behind the batch norm."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean, variance, weight, bias = (torch.rand(shape[1], generator=generator, dtype=wide) for _ in range(4))
    statistics = Statistics(*(t.to(device) for t in (mean, variance + 0.5, weight + 0.5, bias - 0.5)))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = x.to(device, dtype).contiguous(memory_format=layout)
    return x, statistics, bits.outside(rebuild(x, statistics, EPS, None, channels_last, False))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 16, 4, 4), (1, 1, 3, 3), (0, 4, 4, 4)])
def test_batch_norm_and_relu(shape, channels_last, device):
    x, statistics, outside = given(shape, device, channels_last)
    expected = functional.batch_norm(x, *statistics, eps=EPS)
    kept = x.clone()
    for plain in (statistics, statistics._replace(weight=None), statistics._replace(bias=None)):
        y = TritonBackend().rebuild(x, plain, EPS, None, channels_last, False)
        torch.testing.assert_close(y, functional.batch_norm(x, *plain, eps=EPS))
        assert y.stride() == x.stride() or x.numel() <= 1
    y = TritonBackend().rebuild(x, statistics, EPS, outside, channels_last, False)
    torch.testing.assert_close(y, expected.relu())
    assert torch.equal(x, kept)
    inverse = statistics._replace(scale=torch.rsqrt(statistics.scale + EPS))
    again = TritonBackend().rebuild(x, inverse, None, outside, channels_last, True)
    assert again is x
    torch.testing.assert_close(again, y)


@pytest.mark.parametrize("channels_last", [False, True])
def test_relu_alone_keeps_what_is_inside_unless_negative(channels_last, device):
    """Decoded maps are not those that the bits were taken of."""
    x, _, _ = given((2, 5, 6, 7), device, channels_last)
    x[:, 1] = math.nan
    outside = bits.outside(x.roll(1, 0))
    expected = rebuild(x, Statistics(), None, outside, channels_last, False)
    y = TritonBackend().rebuild(x, Statistics(), None, outside, channels_last, False)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(9), expected.nan_to_num(9))
    # Whatever the order of the maps.
    other = x.contiguous(memory_format=torch.contiguous_format if channels_last else torch.channels_last)
    y = TritonBackend().rebuild(other, Statistics(), None, outside, channels_last, False)
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert torch.equal(y.nan_to_num(9), expected.nan_to_num(9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, device):
    x, statistics, outside = given((2, 8, 5, 5), device, True, dtype)
    y = TritonBackend().rebuild(x, statistics, EPS, outside, True, False)
    expected = functional.batch_norm(x.double(), *(t.double() for t in statistics), eps=EPS).relu()
    assert y.dtype == dtype
    # Where rounding of the reference decides the bit, a value close to nothing becomes nothing.
    share = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=2 * share, atol=4 * share)


@pytest.mark.parametrize("config", REBUILD.space, ids=str)
def test_every_configuration(config, device):
    x, statistics, outside = given((2, 24, 9, 9), device, True)
    out = torch.full_like(x, 7)
    plan_rebuild(x, statistics, EPS, outside, True, out, config).run()
    torch.testing.assert_close(out, functional.batch_norm(x, *statistics, eps=EPS).relu())
