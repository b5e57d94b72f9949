"""Maps that several blocks read: their values are made again once in backward, and nothing stays behind."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from torch import Tensor

from spectriton import ops
from spectriton.ops import _remade

WORKSPACE = 1 << 20
# The function of that name hides the module.
spec_block = sys.modules["spectriton.ops.spec_block"]


@pytest.fixture
def remade(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever values are made again."""
    made: list[int] = []

    def counted(*args: object) -> tuple[Tensor, Tensor]:
        made.append(1)
        return remake(*args)

    remake = spec_block.remake_relu
    monkeypatch.setattr(spec_block, "remake_relu", counted)
    return made


class Readers:
    """``count`` blocks that read what one batch norm and ReLU made; each also reads maps of its own."""

    def __init__(self, count: int, workspace: int = WORKSPACE) -> None:
        generator = torch.Generator().manual_seed(0)
        maps = torch.randn(2, 4, 8, 8, generator=generator)
        packed = ops.to_spectral(maps, density=0.6, value_dtype="int8")
        self.edge = packed.edge.requires_grad_()
        rectified = ops.batch_norm_relu(packed, training=True, threshold=0.05, workspace=workspace)[0]
        other = ops.to_spectral(maps.flip(0), density=0.3)
        self.weights = [torch.randn(3, 8, 3, 3, generator=generator).requires_grad_() for _ in range(count)]
        self.outputs = [
            ops.spec_block([rectified, other], weight, threshold=0.0, activation="identity", workspace=workspace)
            for weight in self.weights
        ]

    def gradients(self, outputs: slice = slice(None), retain: bool = False) -> tuple[Tensor, ...]:
        total = torch.stack([out.edge.square().sum() for out in self.outputs[outputs]]).sum()
        leaves = [self.edge, *self.weights[outputs]]
        return torch.autograd.grad(total, leaves, retain_graph=retain)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_made_once_for_all(count: int, remade: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Readers(count).gradients()
    assert len(remade) == 1 and _remade.held_bytes() == 0
    monkeypatch.setattr(spec_block, "made_once", lambda bitmap, make, room: make())
    single = Readers(count).gradients()
    assert len(remade) == 1 + count
    assert all(torch.equal(a, b) for a, b in zip(shared, single, strict=True))


def test_what_does_not_fit_is_made_each_time(remade: list[int]) -> None:
    Readers(2, workspace=1).gradients()
    assert len(remade) == 2 and _remade.held_bytes() == 0


def test_what_nobody_asks_for_goes_with_the_graph(remade: list[int]) -> None:
    readers = Readers(2)
    readers.gradients(slice(0, 1), retain=True)  # the second never asks
    assert _remade.held_bytes() > 0
    del readers
    gc.collect()
    assert _remade.held_bytes() == 0


def test_a_graph_that_is_kept_gives_the_same_again(remade: list[int]) -> None:
    readers = Readers(2)
    first = readers.gradients(retain=True)
    second = readers.gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert _remade.held_bytes() == 0
