"""The primitives ``encode_blocks`` and ``decode_blocks`` of the block codec, its statistics made before.

There is no like of them in PyTorch: they stand beside the reference. Maps are photograph-like, at one bit a
value in groups of 64 channels.

Bytes: the maps and the records, one read once, the other written once. Maps to be decoded to are there before the call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.maps import Shape, photograph_like
from bench.timing import DEVICE, Measure, by_size, contenders, error, nbytes
from spectriton._backend import Backend, backend
from spectriton.reference import block_codec
from spectriton.reference.block_codec import BlockLayout, Plan

SHAPE: Shape = by_size(cuda=(128, 256, 56, 56), cpu=(32, 64, 28, 28), quick=(4, 16, 16, 16))
RATE, MIX = 1.0, 64
WORKSPACE = 1 << 26


class Coded(NamedTuple):
    """Maps with their records and how these are to be read."""

    x: Tensor
    layout: BlockLayout
    plan: Plan
    records: Tensor


def coded(primitives: Backend, dtype: torch.dtype, number: int) -> Coded:
    x = photograph_like(SHAPE, number).to(dtype)
    layout = block_codec.block_layout(SHAPE, RATE, MIX)
    plan = primitives.block_plan(block_codec.fit(x, layout, WORKSPACE), layout)
    return Coded(x, layout, plan, primitives.encode_blocks(x, layout, plan, None, WORKSPACE))


def of_contender(name: str) -> tuple[Backend, torch.dtype]:
    """Its primitives and the dtype of its maps."""
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    return backend(DEVICE), dtype


@contenders("spectriton", "spectriton bf16", "spectriton reference")
def test_encode_blocks(measure: Measure, contender: str) -> None:
    primitives, dtype = of_contender(contender)

    def inputs(number: int) -> tuple[Tensor, BlockLayout, Plan]:
        return coded(primitives, dtype, number)[:3]

    def encode(x: Tensor, layout: BlockLayout, plan: Plan) -> Tensor:
        return primitives.encode_blocks(x, layout, plan, None, WORKSPACE)

    given = coded(primitives, dtype, 0)
    out = torch.empty_like(given.x)
    primitives.decode_blocks(encode(*inputs(0)), given.layout, given.plan, out, WORKSPACE)
    assert error(out, given.x) < 0.6
    measure(f"encode_blocks {SHAPE}", contender, encode, inputs, nbytes(given.x, given.records))


@contenders("spectriton", "spectriton bf16", "spectriton reference")
def test_decode_blocks(measure: Measure, contender: str) -> None:
    primitives, dtype = of_contender(contender)

    def inputs(number: int) -> tuple[Tensor, BlockLayout, Plan, Tensor]:
        given = coded(primitives, dtype, number)
        return given.records, given.layout, given.plan, torch.full_like(given.x, torch.nan)

    def decode(records: Tensor, layout: BlockLayout, plan: Plan, out: Tensor) -> Tensor:
        return primitives.decode_blocks(records, layout, plan, out, WORKSPACE)

    given = coded(primitives, dtype, 0)
    assert error(decode(*inputs(0)), given.x) < 0.6
    measure(f"decode_blocks {SHAPE}", contender, decode, inputs, nbytes(given.x, given.records))
