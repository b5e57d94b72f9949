"""Block coding in C against the reference, whose stored form it shares."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from spectriton._backend import Backend
from spectriton.reference import block_codec
from spectriton.reference.block_codec import BlockLayout, Plan
from tests.tolerances import TOLERANCES

WORKSPACE = 1 << 22
SEEDS = [None, torch.tensor(-7)]

# Shape of the maps, bits a value, channels in a group.
CASES = [
    ((2, 5, 9, 8), 4.0, 8),  # edges of 5 and 8 positions, blocks cut off
    ((33, 6, 7, 7), 2.0, 1),
    ((4, 1, 9, 10), 2.0, 1),  # one channel
    ((40, 10, 8, 8), 0.5, 4),  # 10 channels in groups of 4 are filled up to 12
    ((20, 66, 4, 5), 2.0, 3),
    ((17, 70, 6, 6), 1.0, 64),
    ((3, 3, 2, 1), 8.0, 2),  # blocks of two positions
    ((70, 2, 1, 1), 2.0, 1),
    ((2, 130, 8, 16), 1.0, 1),  # more channels than go through at a time
    ((1, 2, 20, 13), 7.9, 2),  # fields of all widths
]


@pytest.fixture
def native(build: str) -> Backend:
    """The backend on the library as it is used here, and on that of the branches that every processor can run."""
    from spectriton._native import NativeBackend

    return NativeBackend()


class Coded(NamedTuple):
    """Maps, and how they are coded by the reference and by the functions."""

    x: Tensor
    layout: BlockLayout
    plan: Plan
    own: Plan


def smooth(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x + x.roll(1, 2) + x.roll(1, 3) + x.roll(1, 1)
    return x * (1 + torch.arange(shape[1]).view(-1, 1, 1)) + 3


def coded(native: Backend, x: Tensor, rate: float, mix: int) -> Coded:
    layout = block_codec.block_layout(tuple(x.shape), rate, mix)
    stored = block_codec.fit(x, layout, WORKSPACE)
    return Coded(x, layout, block_codec.make_plan(stored, layout, compact=False), native.block_plan(stored, layout))


def poisoned(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan)


def decode_both(native: Backend, case: Coded, records: Tensor) -> tuple[Tensor, Tensor]:
    """The maps of records by the functions and by the reference."""
    own = native.decode_blocks(records, case.layout, case.own, poisoned(case.x), WORKSPACE)
    return own, block_codec.decode_blocks(records, case.layout, case.plan, poisoned(case.x), WORKSPACE)


@pytest.mark.parametrize("seed", SEEDS, ids=["nearest", "stochastic"])
@pytest.mark.parametrize(("shape", "rate", "mix"), CASES)
def test_records(native: Backend, shape: tuple[int, ...], rate: float, mix: int, seed: Tensor | None):
    """The codes are those of the reference, but where rounding carries a value over the edge of its cell."""
    case = coded(native, smooth(*shape), rate, mix)
    own = native.encode_blocks(case.x, case.layout, case.own, seed, WORKSPACE)
    expected = block_codec.encode_blocks(case.x, case.layout, case.plan, seed, WORKSPACE)
    assert own.shape == expected.shape
    values = (block_codec.read_fields(records, case.plan) for records in (own, expected))
    coded_rows = case.plan.width > 0
    differ = torch.ne(*values)[coded_rows]
    assert coded_rows.any() and differ.float().mean() <= 1e-3
    used = int(case.plan.width.sum())
    assert not (own[:, -(-used // 8) :]).any(), "bits beyond the last field"


@pytest.mark.parametrize(("shape", "rate", "mix"), CASES)
def test_maps_of_records(native: Backend, shape: tuple[int, ...], rate: float, mix: int):
    case = coded(native, smooth(*shape), rate, mix)
    size = (case.layout.blocks, case.layout.record)
    records = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    own, expected = decode_both(native, case, records)
    scale = float(expected.abs().max())
    torch.testing.assert_close(own / scale, expected / scale, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_formats_of_maps(native: Backend, dtype: torch.dtype):
    case = coded(native, smooth(6, 5, 9, 8).to(dtype), 3.0, 8)
    records = native.encode_blocks(case.x, case.layout, case.own, None, WORKSPACE)
    assert torch.equal(records, native.encode_blocks(case.x.float(), case.layout, case.own, None, WORKSPACE))
    own, expected = decode_both(native, case, records)
    assert own.dtype == dtype
    # In float64, too, maps are computed in float32.
    tolerance = TOLERANCES[torch.float32 if dtype == torch.float64 else dtype]
    scale = expected.abs().max()
    torch.testing.assert_close(own / scale, expected / scale, **tolerance)


def test_halves_are_rounded_to_nearest(native: Backend):
    """A large mean with little around it shows every rounding, a large scale what is beyond the range."""
    for factor in (1.0, 1e-6, 3e4):
        x = factor * smooth(16, 2, 8, 8)
        case = coded(native, x, 4.0, 1)
        records = native.encode_blocks(x, case.layout, case.own, None, WORKSPACE)
        exact = native.decode_blocks(records, case.layout, case.own, poisoned(x), WORKSPACE)
        for dtype in (torch.float16, torch.bfloat16):
            out = native.decode_blocks(records, case.layout, case.own, poisoned(x).to(dtype), WORKSPACE)
            limit = torch.finfo(dtype).max
            assert torch.equal(out, exact.clamp(-limit, limit).to(dtype))


def strided(x: Tensor) -> dict[str, Tensor]:
    """The same maps in other orders."""
    wide = torch.zeros(*x.shape[:3], 2 * x.shape[3])[..., ::2]
    return {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "batch innermost": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "every second column": wide.copy_(x),
    }


@pytest.mark.parametrize("order", ["channels last", "batch innermost", "every second column"])
def test_strides(native: Backend, order: str):
    case = coded(native, smooth(5, 6, 8, 12), 2.0, 4)
    records = native.encode_blocks(case.x, case.layout, case.own, None, WORKSPACE)
    other = strided(case.x)[order]
    assert torch.equal(native.encode_blocks(other, case.layout, case.own, None, WORKSPACE), records)
    dense = native.decode_blocks(records, case.layout, case.own, poisoned(case.x), WORKSPACE)
    out = native.decode_blocks(records, case.layout, case.own, strided(poisoned(case.x))[order], WORKSPACE)
    assert torch.equal(out, dense)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_leaves_other_groups_alone(native: Backend, value: float):
    x = smooth(12, 8, 8, 8)
    damaged = x.clone()
    damaged[3, 1, 2, 5] = value
    case = coded(native, damaged, 2.0, 4)
    records = native.encode_blocks(damaged, case.layout, case.own, None, WORKSPACE)
    own, expected = decode_both(native, case, records)
    assert own[:, :4].isnan().all() and own[:, 4:].isfinite().all()
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_constant_maps(native: Backend):
    x = torch.full((4, 3, 8, 8), 2.5)
    case = coded(native, x, 2.0, 4)
    records = native.encode_blocks(x, case.layout, case.own, None, WORKSPACE)
    assert torch.equal(native.decode_blocks(records, case.layout, case.own, poisoned(x), WORKSPACE), x)


def test_threads_do_not_matter(native: Backend):
    case = coded(native, smooth(9, 8, 24, 24), 2.0, 8)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            records = native.encode_blocks(case.x, case.layout, case.own, SEEDS[1], WORKSPACE)
            maps = native.decode_blocks(records, case.layout, case.own, poisoned(case.x), WORKSPACE)
            results.append((records, maps))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_fields_beyond_the_record(native: Backend):
    case = coded(native, smooth(4, 4, 8, 8), 2.0, 4)
    case.own.encoding.bits.fill_(8)
    with pytest.raises(ValueError, match="got fields beyond the end of their records"):
        native.encode_blocks(case.x, case.layout, case.own, None, WORKSPACE)


def classes_of(spectrum: Tensor) -> Tensor:
    """Classes of rows, or the logarithms that stand for them."""
    return spectrum.int() if spectrum.dtype == torch.int8 else torch.stack([spectrum & 15, spectrum >> 4], 1).int()


def check_fit(native: Backend, x: Tensor, layout: BlockLayout) -> None:
    """What is stored is that of the reference, but where rounding carries a number over the edge of its class."""
    scales, basis, spectrum = native.fit_blocks(x, layout, WORKSPACE)
    expected, of_group, classes = block_codec.fit(x, layout, WORKSPACE, native.channel_means(x, layout))
    torch.testing.assert_close(scales, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert (basis.shape, basis.dtype, spectrum.dtype) == (of_group.shape, torch.int8, classes.dtype)
    assert not basis.numel() or (basis.int() - of_group.int()).abs().max() <= 1
    own, theirs = classes_of(spectrum), classes_of(classes)
    apart = (own - theirs).abs()
    # Class 0 is that of a last row, too, whose bits the records have no room for.
    assert ((apart <= 1) | (own == 0) | (theirs == 0)).all()
    assert int((apart > 0).sum()) <= max(1, 0.02 * apart.numel())


@pytest.mark.parametrize(("shape", "rate", "mix"), [*CASES, ((8, 128, 4, 4), 0.6, 64), ((150, 6, 16, 9), 2.0, 6)])
def test_fit(native: Backend, shape: tuple[int, ...], rate: float, mix: int):
    layout = block_codec.block_layout(shape, rate, mix)
    check_fit(native, smooth(*shape), layout)
    check_fit(native, 1e-20 * smooth(*shape), layout)
    check_fit(native, 1e25 * smooth(*shape), layout)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_fit_of_damaged_and_constant_maps(native: Backend, value: float):
    x = smooth(40, 10, 8, 8)
    x[:, 5] = 7
    x[12, 1, 2, 5] = value
    check_fit(native, x, block_codec.block_layout(tuple(x.shape), 2.0, 4))
    check_fit(native, torch.zeros_like(x), block_codec.block_layout(tuple(x.shape), 2.0, 4))


def test_fit_in_other_orders_and_formats(native: Backend):
    x = smooth(9, 6, 20, 12).half().float()
    layout = block_codec.block_layout(tuple(x.shape), 2.0, 4)
    expected = native.fit_blocks(x, layout, WORKSPACE)
    for other in (*strided(x).values(), x.half(), x.double()):
        if other.dtype != torch.float32:
            check_fit(native, other, layout)
        else:
            assert all(map(torch.allclose, native.fit_blocks(other, layout, WORKSPACE), expected))


def test_threads_do_not_matter_to_fit(native: Backend):
    x = smooth(9, 8, 64, 64)
    layout = block_codec.block_layout(tuple(x.shape), 2.0, 4)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            stored = native.fit_blocks(x, layout, WORKSPACE)
            results.append((*stored, *native.block_plan(stored, layout).encoding[:3]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("shape", "rate", "mix"), CASES)
def test_plans(native: Backend, shape: tuple[int, ...], rate: float, mix: int):
    """Widths of fields are those of the reference to the bit: records could not be read otherwise."""
    case = coded(native, smooth(*shape), rate, mix)
    bits, deviation, basis, _ = case.own.encoding
    assert torch.equal(bits, case.plan.width.to(torch.uint8))
    assert torch.equal(case.own.change.inverse, case.plan.change.inverse)
    torch.testing.assert_close(deviation, case.plan.deviation, rtol=1e-6, atol=0)
    expected = case.plan.change.basis
    assert (basis is None) == (expected is None)
    if expected is not None:
        torch.testing.assert_close(basis, expected.mT, rtol=1e-5, atol=1e-5)


def test_damaged_spectrum(native: Backend):
    layout = block_codec.block_layout((4, 4, 8, 8), 2.0, 4)
    scales, basis, spectrum = native.fit_blocks(smooth(4, 4, 8, 8), layout, WORKSPACE)
    with pytest.raises(ValueError, match="bytes of the spectrum, expected"):
        native.block_plan((scales, basis, spectrum[1:]), layout)


def test_means(native: Backend):
    x = smooth(5, 7, 9, 33) + 100
    layout = block_codec.block_layout(tuple(x.shape), 2.0, 3)
    expected = x.double().mean((0, 2, 3)).float()
    for given in (x, x.contiguous(memory_format=torch.channels_last), x[:, :, ::2].repeat_interleave(2, 2)[:, :, :9]):
        mean = given.double().mean((0, 2, 3)).float()
        torch.testing.assert_close(native.channel_means(given, layout), mean, rtol=3e-7, atol=0)
    x[4, 2, 8, 32] = torch.inf
    got = native.channel_means(x, layout)
    group = slice(2 // layout.mix * layout.mix, (2 // layout.mix + 1) * layout.mix)
    assert got[group].isnan().all() and int(got.isnan().sum()) == layout.mix
    torch.testing.assert_close(got[~got.isnan()], expected[~got.isnan()], rtol=3e-7, atol=0)
