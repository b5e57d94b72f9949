"""encode_blocks and decode_blocks against the reference, whose stored form they share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spectriton._backend import TritonBackend
from spectriton.codec import BlockCodec
from spectriton.reference import block_codec
from spectriton.reference.block_codec import BlockLayout, Plan, Transform
from spectriton_kernels import can_code, encode_blocks
from spectriton_kernels.block_codec import plan_encode_blocks, slice_components
from spectriton_kernels.configs import ENCODE_BLOCKS

pytestmark = pytest.mark.triton
WORKSPACE = 1 << 22

# Shape of the maps, bits a value, channels in a group. Groups of three fill up slices, which share bytes.
SHARED_BYTES = ((20, 66, 4, 5), 2.0, 3)
CASES = [
    ((2, 5, 9, 8), 4.0, 8),  # edges of 5 and 8 positions, blocks cut off
    ((8, 6, 7, 7), 2.0, 1),
    ((4, 1, 9, 10), 2.0, 1),  # one channel
    ((40, 10, 8, 8), 0.5, 4),  # 10 channels in groups of 4 are filled up to 12
    SHARED_BYTES,
    ((3, 3, 2, 1), 8.0, 2),  # blocks of two positions
    ((70, 2, 1, 1), 2.0, 1),  # several blocks in a program, one position each
]


class Coded(NamedTuple):
    """Maps, how they are coded, and their records as the reference writes them."""

    x: torch.Tensor
    layout: BlockLayout
    plan: Plan
    records: torch.Tensor


def smooth(*shape: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x + x.roll(1, 2) + x.roll(1, 3) + x.roll(1, 1)
    return x * (1 + torch.arange(shape[1]).view(-1, 1, 1)) + 3


def coded(
    shape: tuple[int, int, int, int],
    rate: float,
    mix: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: torch.Tensor | None = None,
) -> Coded:
    x = smooth(*shape).to(dtype).to(device)
    layout = block_codec.block_layout(shape, rate, mix)
    plan = block_codec.make_plan(block_codec.fit(x, layout, WORKSPACE), layout, compact=False)
    assert plan.width.any()
    return Coded(x, layout, plan, block_codec.encode_blocks(x, layout, plan, seed, WORKSPACE))


def codes_of(records: torch.Tensor, plan: Plan) -> NDArray[np.int64]:
    """`(N, rows with bits)` codes in two's complement, bit by bit."""
    bits = np.unpackbits(records.cpu().numpy(), axis=1, bitorder="little").astype(np.int64)
    columns = []
    for start, width in zip(plan.start.tolist(), plan.width.tolist(), strict=True):
        if width:
            field = bits[:, start : start + width] @ (1 << np.arange(width))
            columns.append(np.where(field >> (width - 1), field - (1 << width), field))
    return np.stack(columns, axis=1)


def assert_same_codes(records: torch.Tensor, given: Coded) -> None:
    """But for values at the edge of a cell, which rounding may move into the next one."""
    assert records.dtype == torch.uint8 and records.shape == given.records.shape
    difference = np.abs(codes_of(records, given.plan) - codes_of(given.records, given.plan))
    assert difference.max() <= 1
    # Of maps in bfloat16 products have factors of that precision.
    assert difference.sum() <= 1 + difference.size / (20 if given.x.dtype == torch.bfloat16 else 200)


def assert_close_maps(got: torch.Tensor, expected: torch.Tensor) -> None:
    """To the accuracy of the products, or that of a dtype of 16 bits."""
    share = max(1e-4, torch.finfo(got.dtype).eps)
    torch.testing.assert_close(got.float(), expected.float(), rtol=share, atol=share * float(expected.abs().max()))


@pytest.mark.parametrize(("shape", "rate", "mix"), CASES)
def test_both_ways(shape, rate, mix, device):
    given = coded(shape, rate, mix, device)
    assert can_code(given.layout)
    records = TritonBackend().encode_blocks(given.x, given.layout, given.plan, None, WORKSPACE)
    assert_same_codes(records, given)
    expected = block_codec.decode_blocks(records, given.layout, given.plan, torch.empty_like(given.x), WORKSPACE)
    right = block_codec.decode_blocks(given.records, given.layout, given.plan, torch.empty_like(given.x), WORKSPACE)
    assert (expected - right).norm() <= 0.01 * (right - given.x).norm() < 0.01 * given.x.norm()
    out = torch.full_like(given.x, torch.nan)
    assert TritonBackend().decode_blocks(records, given.layout, given.plan, out, WORKSPACE) is out
    assert_close_maps(out, expected)


@pytest.mark.parametrize(("shape", "rate", "mix"), [CASES[0], CASES[1]])
@pytest.mark.parametrize("seed", [7, -(1 << 40)])
def test_stochastic(shape, rate, mix, seed, device):
    number = torch.tensor(seed, device=device)
    given = coded(shape, rate, mix, device, seed=number)
    records = TritonBackend().encode_blocks(given.x, given.layout, given.plan, number, WORKSPACE)
    assert_same_codes(records, given)
    other = TritonBackend().encode_blocks(given.x, given.layout, given.plan, number + 1, WORKSPACE)
    assert not torch.equal(records, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, device):
    given = coded((2, 5, 9, 8), 2.0, 8, device, dtype)
    records = TritonBackend().encode_blocks(given.x, given.layout, given.plan, None, WORKSPACE)
    assert_same_codes(records, given)
    decoded = [
        decode(records, given.layout, given.plan, torch.empty_like(given.x), WORKSPACE)
        for decode in (TritonBackend().decode_blocks, block_codec.decode_blocks)
    ]
    assert_close_maps(*decoded)


def test_float16_saturates(device):
    given = coded((2, 4, 8, 8), 2.0, 4, device)
    scale = given.plan.change.scale * 1e6
    plan = given.plan._replace(change=given.plan.change._replace(scale=scale))
    out = torch.empty_like(given.x, dtype=torch.float16)
    TritonBackend().decode_blocks(given.records, given.layout, plan, out, WORKSPACE)
    assert float(out.max()) == 65504 and float(out.min()) == -65504


def test_strides(device):
    """And what lies between is left alone."""
    given = coded((2, 5, 9, 8), 2.0, 8, device)
    wide = torch.full((9, 2, 8, 10), -77.0, device=device)
    view = wide.permute(1, 3, 0, 2)[:, ::2]
    view.copy_(given.x)
    records = TritonBackend().encode_blocks(view, given.layout, given.plan, None, WORKSPACE)
    assert torch.equal(records, TritonBackend().encode_blocks(given.x, given.layout, given.plan, None, WORKSPACE))
    expected = TritonBackend().decode_blocks(records, given.layout, given.plan, torch.empty_like(given.x), WORKSPACE)
    TritonBackend().decode_blocks(records, given.layout, given.plan, view, WORKSPACE)
    assert torch.equal(view, expected)
    assert (wide.permute(1, 3, 0, 2)[:, 1::2] == -77).all()


def test_what_is_not_finite_spoils_its_group_only(device, monkeypatch):
    monkeypatch.setenv("SPECTRITON_BACKEND", "triton")
    x = smooth(4, 6, 8, 8).to(device)
    codec = BlockCodec(density=1, bits=3, mix=2)
    expected = codec.encode(x).decode()
    for value in (torch.nan, torch.inf):
        spoilt = x.clone()
        spoilt[1, 2, 3, 4] = value
        out = codec.encode(spoilt).decode()
        assert out[:, 2:4].isnan().all()
        assert out.isnan().sum() == out[:, 2:4].numel()
        kept = [0, 1, 4, 5]
        assert (out - x)[:, kept].norm() < 1.01 * (expected - x)[:, kept].norm()


@pytest.mark.parametrize(("shape", "rate", "mix"), [CASES[0], SHARED_BYTES])
def test_tables_that_are_ready_change_nothing(shape, rate, mix, device):
    given, runs = coded(shape, rate, mix, device), TritonBackend()
    ready = runs.ready_plan(given.plan, given.layout)
    # Of what the kernels do not take nothing stays.
    assert ready.width.numel() == ready.start.numel() == ready.rows.numel() == 0
    records, again = (runs.encode_blocks(given.x, given.layout, p, None, WORKSPACE) for p in (given.plan, ready))
    assert torch.equal(records, again)
    maps, again = (
        runs.decode_blocks(records, given.layout, p, torch.empty_like(given.x), WORKSPACE) for p in (given.plan, ready)
    )
    assert torch.equal(maps, again)


def test_records_anywhere_in_memory(device):
    """And the last bytes of the memory are as good as any."""
    given = coded((2, 5, 9, 8), 3.0, 5, device)
    expected = TritonBackend().decode_blocks(
        given.records, given.layout, given.plan, torch.empty_like(given.x), WORKSPACE
    )
    for before in (1, 2, 3):
        own = torch.empty(before + given.records.numel(), dtype=torch.uint8, device=device)[before:]
        own = own.view(given.records.shape).copy_(given.records)
        out = TritonBackend().decode_blocks(own, given.layout, given.plan, torch.empty_like(given.x), WORKSPACE)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_and_many_blocks_change_nothing(dtype, device, monkeypatch):
    given = coded((2, 16, 16, 8), 2.0, 8, device, dtype)
    runs = TritonBackend()
    records = runs.encode_blocks(given.x, given.layout, given.plan, None, WORKSPACE)
    maps = runs.decode_blocks(records, given.layout, given.plan, torch.empty_like(given.x), WORKSPACE)
    monkeypatch.setattr("spectriton_kernels.block_codec._MANY_BLOCKS", 1)
    last = given.x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(records, runs.encode_blocks(last, given.layout, given.plan, None, WORKSPACE))
    assert torch.equal(maps, runs.decode_blocks(records, given.layout, given.plan, torch.empty_like(last), WORKSPACE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [1.0, 4.0])
def test_error_is_that_of_the_reference(dtype, rate, device):
    given = coded((4, 16, 16, 16), rate, 16, device, dtype)
    records = TritonBackend().encode_blocks(given.x, given.layout, given.plan, None, WORKSPACE)
    out = torch.empty_like(given.x, dtype=torch.float32)
    error, expected = (
        (decode(r, given.layout, given.plan, out, WORKSPACE) - given.x).norm()
        for decode, r in (
            (TritonBackend().decode_blocks, records),
            (block_codec.decode_blocks, given.records),
        )
    )
    assert error < 1.01 * expected


def test_slices_that_share_a_byte(device):
    """Two in the case of 66 channels, all four here."""
    given = coded(*SHARED_BYTES, device)
    starts = given.plan.start[:: slice_components(given.layout) * given.layout.frequencies]
    assert len(starts) == 2 and int(starts[1]) % 8

    layout = block_codec.block_layout((9, 200, 4, 4), 2.0, 1)._replace(record=2)
    width = torch.zeros(layout.rows, dtype=torch.int64, device=device)
    width[[3, 64 * 16 + 5, 64 * 16 + 9, 128 * 16, 199 * 16 + 15]] = torch.tensor([2, 1, 2, 2, 6], device=device)
    one = torch.ones(200, device=device)
    change = Transform(0 * one, one, one, None, block_codec.dct_matrix((4, 4), device))
    rows, deviation = torch.arange(layout.rows, device=device), torch.ones(layout.rows, device=device)
    plan = Plan(change, rows, width, width.cumsum(0) - width, deviation)
    x = smooth(9, 200, 4, 4).to(device)
    expected = Coded(x, layout, plan, block_codec.encode_blocks(x, layout, plan, None, WORKSPACE))
    assert_same_codes(TritonBackend().encode_blocks(x, layout, plan, None, WORKSPACE), expected)


@pytest.mark.parametrize("config", ENCODE_BLOCKS.space, ids=str)
def test_every_configuration_packs_long_records_in_pieces(config, device):
    given = coded((2, 40, 8, 8), 8.0, 1, device)
    levels, factors = block_codec.quantiser_levels(device), block_codec.compander_factors(device)
    records = torch.zeros_like(given.records)
    common = (given.x, given.layout, given.plan, levels, factors, block_codec.RATE, None)
    launch, _, shared = plan_encode_blocks(*common, records, config)
    assert shared is None and launch.meta["BYTES"] < given.layout.record
    launch.run()
    assert_same_codes(records, given)
    assert torch.equal(records, encode_blocks(*common))


def test_large_groups_are_left_to_the_reference(device):
    given = coded((300, 80, 4, 4), 4.0, 80, device)
    assert given.layout.mix == 80 and not can_code(given.layout)
    records = TritonBackend().encode_blocks(given.x, given.layout, given.plan, None, WORKSPACE)
    assert torch.equal(records, given.records)
    out = TritonBackend().decode_blocks(records, given.layout, given.plan, torch.empty_like(given.x), WORKSPACE)
    assert (out - given.x).norm() < 0.3 * given.x.norm()
