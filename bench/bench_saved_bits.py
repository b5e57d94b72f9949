"""What compressed ReLU and maximum pooling run: ``rectify``, ``clear_outside``, ``rebuild``, ``pool_maxima`` and
``spread_maxima``, against what PyTorch runs in their places.

PyTorch's ReLU writes no bits and reads the whole result in backward; its pooling writes positions of 64 bits. For
``rebuild`` it runs batch norm in evaluation and ReLU. Maps are in bfloat16, channels last.

Bytes: what ours have to move, by which all are measured; contenders move others.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.timing import DEVICE, Measure, by_size, contenders, generator, nbytes
from spectriton._backend import backend
from spectriton.reference import bits
from spectriton.reference.max_pool import Window, pool_maxima, spread_maxima
from spectriton.reference.rebuild import Statistics, rebuild

SHAPE = by_size(cuda=(64, 64, 112, 112), cpu=(8, 64, 28, 28), quick=(2, 16, 8, 8))
WINDOWS = {edge: Window((edge, edge), (2, 2), (edge - 2, edge - 2), (1, 1), False) for edge in (2, 3)}
aten = torch.ops.aten


def maps(number: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    x = torch.randn(shape, generator=generator(number), device=DEVICE).to(torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last)


@contenders("spectriton", "torch")
def test_rectify(measure: Measure, contender: str) -> None:
    def inputs(number: int) -> tuple[Any, ...]:
        return (maps(number),)

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        return backend(DEVICE).rectify(x, math.inf, False)

    x = maps(0)
    y, outside = ours(x)
    assert torch.equal(y, x.relu()) and torch.equal(outside, bits.outside(x))
    measure(
        f"rectify {SHAPE}",
        contender,
        ours if contender == "spectriton" else torch.relu,
        inputs,
        nbytes(x, y, outside),
    )


@contenders("spectriton", "torch")
def test_clear_outside(measure: Measure, contender: str) -> None:
    def inputs(number: int) -> tuple[Any, ...]:
        x = maps(2 * number)
        return maps(2 * number + 1), bits.outside(x) if contender == "spectriton" else x.relu()

    def ours(grad: Tensor, outside: Tensor) -> Tensor:
        return backend(DEVICE).clear_outside(grad, outside, True, False)

    def theirs(grad: Tensor, y: Tensor) -> Tensor:
        cleared: Tensor = aten.threshold_backward(grad, y, 0)
        return cleared

    x, grad = maps(0), maps(1)
    outside = bits.outside(x)
    assert torch.equal(ours(grad, outside), theirs(grad, x.relu()))
    measure(
        f"clear_outside {SHAPE}",
        contender,
        ours if contender == "spectriton" else theirs,
        inputs,
        2 * nbytes(x) + nbytes(outside),
    )


@contenders("spectriton", "torch")
def test_rebuild(measure: Measure, contender: str) -> None:
    statistics = Statistics(*(torch.linspace(0.5, 2, SHAPE[1], device=DEVICE) for _ in range(4)))

    def inputs(number: int) -> tuple[Any, ...]:
        x = maps(number)
        return x, bits.outside(x)

    def ours(x: Tensor, outside: Tensor) -> Tensor:
        return backend(DEVICE).rebuild(x, statistics, 1e-5, outside, True, False)

    def theirs(x: Tensor, outside: Tensor) -> Tensor:
        return functional.batch_norm(x, *statistics, eps=1e-5).relu_()

    x, outside = inputs(0)
    expected = rebuild(x.float(), statistics, 1e-5, outside, True, False)
    torch.testing.assert_close(ours(x, outside).float(), expected, rtol=0.03, atol=0.03)
    measure(
        f"rebuild {SHAPE}",
        contender,
        ours if contender == "spectriton" else theirs,
        inputs,
        2 * nbytes(x) + nbytes(outside),
    )


@pytest.mark.parametrize("edge", WINDOWS)
@contenders("spectriton", "torch")
def test_pool_maxima(measure: Measure, edge: int, contender: str) -> None:
    window = WINDOWS[edge]

    def inputs(number: int) -> tuple[Any, ...]:
        return (maps(number),)

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        return backend(DEVICE).pool_maxima(x, window)

    def theirs(x: Tensor) -> Any:
        return functional.max_pool2d(x, *window.settings(), return_indices=True)

    x = maps(0)
    y, codes = ours(x)
    assert torch.equal(y, theirs(x)[0]) and torch.equal(codes, pool_maxima(x, window)[1])
    moved = nbytes(x, y, codes)
    measure(
        f"pool_maxima {SHAPE}, {edge}x{edge}", contender, ours if contender == "spectriton" else theirs, inputs, moved
    )


@pytest.mark.parametrize("edge", WINDOWS)
@contenders("spectriton", "torch")
def test_spread_maxima(measure: Measure, edge: int, contender: str) -> None:
    window = WINDOWS[edge]

    def inputs(number: int) -> tuple[Any, ...]:
        x = maps(2 * number)
        y, index = functional.max_pool2d(x, *window.settings(), return_indices=True)
        grad = maps(2 * number + 1, tuple(y.shape))
        return (grad, pool_maxima(x, window)[1]) if contender == "spectriton" else (grad, x, index)

    def ours(grad: Tensor, codes: Tensor) -> Tensor:
        return backend(DEVICE).spread_maxima(grad, window, codes, torch.Size(SHAPE), True)

    def theirs(grad: Tensor, x: Tensor, index: Tensor) -> Tensor:
        spread: Tensor = aten.max_pool2d_with_indices_backward(grad, x, *window.settings(), index)
        return spread

    x = maps(0)
    y, codes = pool_maxima(x, window)
    grad = maps(1, tuple(y.shape))
    expected = spread_maxima(grad.float(), window, codes, torch.Size(SHAPE), True)
    torch.testing.assert_close(ours(grad, codes).float(), expected, rtol=0.02, atol=0.02)
    moved = nbytes(x, grad, codes)
    measure(
        f"spread_maxima {SHAPE}, {edge}x{edge}", contender, ours if contender == "spectriton" else theirs, inputs, moved
    )
