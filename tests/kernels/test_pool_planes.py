"""pool_planes and spread_planes against PyTorch, and the bytes of both against the operations on a GPU without them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from spectriton._backend import TritonBackend
from spectriton.reference.across import Pool, Windows
from spectriton.reference.bits import bits_for, pack
from spectriton_kernels import can_pool_planes
from spectriton_kernels.configs import POOL_PLANES, SPREAD_PLANES, Stream
from spectriton_kernels.pool_planes import plan_pool_planes, plan_spread_planes

pytestmark = pytest.mark.triton
# (kernel, stride), margin, maps
CASES = [
    (((1, 1), (1, 1)), 0, (5, 3, 7)),
    (((1, 1), (1, 1)), 0, (32, 8, 8)),
    (((2, 2), (2, 2)), 0, (32, 8, 8)),
    (((2, 2), (2, 2)), 0, (37, 7, 9)),  # rows and columns in no window
    (((2, 2), (2, 2)), 0, (1, 2, 2)),
    (((2, 2), (2, 2)), 2, (33, 11, 10)),
    (((3, 2), (2, 2)), 0, (9, 9, 10)),
    (((3, 3), (2, 2)), 1, (5, 9, 12)),  # windows overlap
    (((3, 2), (1, 3)), 0, (4, 6, 8)),
    (((5, 4), (3, 5)), 1, (3, 13, 15)),  # codes of a byte
    (((1, 1), (2, 3)), 0, (9, 7, 5)),
]


def windows_of(case: tuple[tuple[int, int], tuple[int, int]], margin: int) -> Windows:
    kernel, stride = map(list, case)
    return Windows(kernel, stride, bits_for(kernel[0] * kernel[1]), 32, margin)


def maps(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Few different values, so that maxima are not unique; some NaN and infinite, whole windows of them."""
    x = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).float()
    x[0, :4, :4] = -math.inf
    x[-1, ::3, ::2] = math.nan
    x[0, -2:, -2:] = math.nan
    x[-1, -1, 0] = math.inf
    return x.to(device, dtype)


def expected(x: Tensor, pool: Pool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results, codes, signs, and where the maxima stood in the flattened maps."""
    if pool.affine is not None:
        gain, shift = (t[:, None, None] for t in pool.affine)
        x = x * gain + shift
    margin, (kernel, stride) = pool.windows.margin, pool.windows[:2]
    inner = x[:, margin : x.shape[1] - margin, margin : x.shape[2] - margin]
    y, index = functional.max_pool2d(inner[:, None], kernel, stride, return_indices=True)
    y, index = y[:, 0], index[:, 0]
    row, column = index // inner.shape[2], index % inner.shape[2]
    first_row, first_column = (torch.arange(n, device=x.device) * s for n, s in zip(y.shape[1:], stride, strict=True))
    code = (row - first_row[:, None]) * kernel[1] + column - first_column
    codes = pack(code.flatten().to(torch.uint8), pool.windows.bits)
    signs = pack((y <= 0).logical_not_().flatten(), 1)
    return y.clamp_min(0) if pool.rectify else y, codes, signs, (row + margin) * x.shape[2] + column + margin


def spent(windows: Windows, outputs: int, device: torch.device, signs: bool) -> tuple[Tensor | None, Tensor | None]:
    """Room for codes and signs, full of something else."""
    plain = windows.kernel == [1, 1] == windows.stride
    rooms = [None if plain else -(-outputs * windows.bits // 8), -(-outputs // 8) if signs else None]
    codes, bits = (None if n is None else torch.full((n,), 0xA5, dtype=torch.uint8, device=device) for n in rooms)
    return codes, bits


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("case", "margin", "shape"), CASES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_there_and_back(relu, norm, case, margin, shape, device):
    primitives, windows, x = TritonBackend(), windows_of(case, margin), maps(shape, device)
    # Of both signs, and such that nothing is rounded.
    gain = torch.tensor([0.5, -2.0, 1.0], device=device).repeat(shape[0])[: shape[0]]
    pool = Pool(windows, None, None, (gain, gain.roll(1) + 0.25) if norm else None, relu)
    y, codes, signs, index = expected(x, pool)
    written = spent(windows, y.numel(), device, relu)
    out, pool = torch.full_like(y, -7.0), pool._replace(codes=written[0], signs=written[1])
    assert primitives.pool_planes(x.clone(), pool, out)
    same(out, y)
    assert written[0] is None or torch.equal(written[0], codes)
    assert written[1] is None or torch.equal(written[1], signs)

    if written == (None, None):
        return
    grad = torch.arange(1, y.numel() + 1, dtype=y.dtype, device=device).view_as(y)
    passed = grad.masked_fill(y <= 0, 0) if relu else grad
    spread = torch.zeros(shape[0], shape[1] * shape[2], device=device)
    spread.scatter_add_(1, index.flatten(1), passed.flatten(1))
    got = primitives.spread_planes(grad, pool, list(shape[1:]))
    assert got is not None
    same(got, spread.view(shape))


def test_results_in_place_of_maps(device):
    windows, x = windows_of(((1, 1), (1, 1)), 0), maps((3, 5, 7), device, torch.float64)
    y, _, signs, _ = expected(x, Pool(windows, rectify=True))
    _, written = spent(windows, x.numel(), device, True)
    assert TritonBackend().pool_planes(x, Pool(windows, None, written, None, True), x)
    same(x, y)
    assert torch.equal(written, signs)
    grad = torch.full_like(x, math.nan)
    got = TritonBackend().spread_planes(grad, Pool(windows, None, written), [5, 7])
    assert got is grad and torch.equal(got == 0, y == 0)


def test_what_the_kernels_do_not_take(device):
    wide = Windows([9, 9], [1, 1], 8, 32)
    assert not can_pool_planes(wide, torch.float32) and not can_pool_planes(wide._replace(kernel=[2, 2]), torch.float16)
    x = torch.zeros(1, 9, 9, device=device)
    assert not TritonBackend().pool_planes(x, Pool(wide), x)
    assert TritonBackend().spread_planes(x, Pool(wide), [9, 9]) is None


@pytest.mark.parametrize("config", POOL_PLANES.space, ids=str)
def test_every_configuration_of_pooling(config, device):
    x = maps((33, 31, 21), device)
    pool = Pool(windows_of(((2, 2), (2, 2)), 0), rectify=True)
    y, codes, signs, _ = expected(x, pool)
    written, out = spent(pool.windows, y.numel(), device, True), torch.full_like(y, -7.0)
    plan_pool_planes(x, pool.windows, out, *written, None, True, config).run()
    same(out, y)
    assert torch.equal(written[0], codes) and torch.equal(written[1], signs)


@pytest.mark.parametrize("config", SPREAD_PLANES.space, ids=str)
def test_every_configuration_of_spreading(config, device):
    for width in (21, 22):  # one by one, and in pairs
        x = maps((33, 31, width), device)
        pool = Pool(windows_of(((2, 2), (2, 2)), 0))
        y, codes, signs, index = expected(x, pool)
        grad, out = torch.arange(1.0, y.numel() + 1, device=device).view_as(y), torch.full_like(x, -7.0)
        plan_spread_planes(grad, pool.windows, codes, signs, out, config).run()
        passed = grad.masked_fill(y <= 0, 0).flatten(1)
        same(out, torch.zeros_like(x).flatten(1).scatter_(1, index.flatten(1), passed).view_as(x))


def test_large_planes(device):
    """Beyond the numbers that are divided in float32."""
    x, config = maps((1, 1026, 1031), device), Stream(1 << 18, 8)  # few programs for the interpreter
    pool = Pool(windows_of(((2, 2), (2, 2)), 0))
    y, codes, _, index = expected(x, pool)
    written, out = torch.zeros_like(codes), torch.full_like(y, -7.0)
    launch = plan_pool_planes(x, pool.windows, out, written, None, None, False, config)
    assert launch.meta["SMALL"]  # of a quarter as many results
    launch.run()
    same(out, y)
    assert torch.equal(written, codes)
    spread = torch.full_like(x, -7.0)
    launch = plan_spread_planes(torch.ones_like(y), pool.windows, codes, None, spread, config)
    assert not launch.meta["SMALL"]
    launch.run()
    same(spread, torch.zeros_like(x).flatten(1).scatter_(1, index.flatten(1), 1.0).view_as(x))
