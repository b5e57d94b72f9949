"""The C functions of rows against the reference, to the bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import spectriton_native as native
from spectriton import reference
from spectriton._backend import Backend
from spectriton._native import NativeBackend
from spectriton.reference.pattern import from_bits, tile_counts
from spectriton_native import Part
from tests.native.spectra import FORMATS, SIZES, Room, Spectrum, identical, parts_of, spectrum

pytestmark = pytest.mark.usefixtures("build")


def count_of(rows: slice | Tensor) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else rows.numel()


def chunk(given: Spectrum, rows: slice | Tensor, t0: int, t1: int, seed: int = 0) -> Tensor:
    """Random pairs for a part, ``(Fc, positions, 2)``."""
    shape = (count_of(rows), (t1 - t0) * given.tile, 2)
    y = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for number, special in enumerate((torch.nan, torch.inf, -torch.inf, -0.0)):
        y.view(-1)[number::13] = special
    return y


def part_of(given: Spectrum, rows: slice | Tensor, t0: int, t1: int) -> Part:
    return Part.of(given.bitmap, rows, t0, t1, given.offsets, given.values.shape[0])


def kept_of(given: Spectrum, rows: slice | Tensor, t0: int, t1: int) -> Tensor:
    """bool ``(Fc, Tc, tile)``."""
    chosen = given.bitmap[rows, t0:t1].contiguous()
    return from_bits(chosen)


def tight(given: Spectrum, rows: slice | Tensor, t0: int, t1: int) -> tuple[Tensor, Tensor, int]:
    """Of a part: what each tile keeps, where its values begin where they follow each other, and their number."""
    counts = kept_of(given, rows, t0, t1).sum(-1)
    return counts, (counts.flatten().cumsum(0).view_as(counts) - counts).to(torch.int32), int(counts.sum())


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_expand_rows(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    for density in (0.0, 0.05, 0.5, 1.0):
        given = spectrum(*size, dtype, density)
        for rows, t0, t1 in parts_of(given):
            room, expected = (Room(count_of(rows), (t1 - t0) * given.tile, 2) for _ in range(2))
            native.expand_rows(part_of(given, rows, t0, t1), given.values, given.scales, room.tensor)
            packed = (given.values, given.scales, given.bitmap, given.offsets)
            reference.unpack_rows(*packed, rows, t0, t1, expected.tensor)
            assert identical(room.tensor, expected.tensor) and room.guarded


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_store_rows(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    for density in (0.0, 0.05, 0.6, 1.0):
        given = spectrum(*size, dtype, density)
        for rows, t0, t1 in parts_of(given):
            y = chunk(given, rows, t0, t1)
            y[: len(y) // 2] = y[: len(y) // 2].nan_to_num(1e-6, 6e4, -2.0)  # scales of integers are numbers there
            results = []
            for store_rows in (NativeBackend().store_rows, reference.store_rows):
                room = Room(*given.values.shape, dtype=dtype)
                scales = Room(*given.scales.shape)
                store_rows(y, given.bitmap, given.offsets, rows, room.tensor, scales.tensor, t0=t0)
                assert room.guarded and scales.guarded
                results.append((room.tensor, scales.tensor))
            # What the pattern does not keep stays as it is, in gaps between tiles, too.
            assert all(identical(got, expected) for got, expected in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_as_by_torch(dtype: torch.dtype) -> None:
    """Numbers of all exponents, next to what lies between two halves and to the ends of their range."""
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    patterns = exact.view(torch.int32)
    middle = patterns + (1 << 12 if dtype == torch.float16 else 1 << 15)
    subnormal = (torch.arange(5000) * 2**-26).view(torch.int32)
    ends = torch.tensor([65504.0, 65519.99, 65520.0, 65536.0, 3.4e38, 1e-45, 2**-25, 2**-14]).view(torch.int32)
    numbers = torch.cat([near + d for near in (patterns, middle, subnormal, ends) for d in (-1, 0, 1)]).view(
        torch.float32
    )
    tiles = -(-numbers.numel() // 128)
    y = torch.zeros(1, tiles * 64, 2)
    y.view(-1)[: numbers.numel()] = numbers
    bitmap = torch.full((1, tiles, 8), 255, dtype=torch.uint8)
    room = Room(tiles * 64, 2, dtype=dtype)
    native.store_rows(Part.of(bitmap, slice(0, 1), 0, tiles, reference.tile_starts(bitmap), tiles * 64), y, room.tensor)
    assert identical(room.tensor, y[0].to(dtype)) and room.guarded


@pytest.mark.parametrize("size", SIZES)
def test_offsets_of_the_part_only(size: tuple[int, int, int]) -> None:
    """``local`` offsets stand in the order of the part; all are counted from ``base``."""
    given = spectrum(*size)
    for rows, t0, t1 in parts_of(given):
        _, starts, total = tight(given, rows, t0, t1)
        y = chunk(given, rows, t0, t1)
        local = Part.of(given.bitmap, rows, t0, t1, starts + 5, total, base=5, local=True)
        kept, back = Room(total, 2), Room(*y.shape)
        native.store_rows(local, y, kept.tensor)
        mask = kept_of(given, rows, t0, t1).view(y.shape[:2])
        assert identical(kept.tensor, y[mask]) and kept.guarded
        native.expand_rows(local, kept.tensor, given.scales, back.tensor)
        assert identical(back.tensor, torch.where(mask[..., None], y, 0)) and back.guarded


@pytest.mark.parametrize("size", SIZES)
def test_tile_starts(size: tuple[int, int, int]) -> None:
    given = spectrum(*size)
    for rows, t0, t1 in parts_of(given):
        _, expected, total = tight(given, rows, t0, t1)
        starts, count = native.tile_starts(Part.of(given.bitmap, rows, t0, t1))
        assert torch.equal(starts, expected) and count == total


@pytest.mark.filterwarnings("ignore:overflow")  # of the reference
@pytest.mark.parametrize("threshold", ["number", 1, 3, 8, 40, 0.0, 1e-30, torch.inf, 1e200])
@pytest.mark.parametrize("size", SIZES)
def test_threshold_rows(size: tuple[int, int, int], threshold: float | int | str) -> None:
    """By a number, or by one for each of 1, 3, 8 or 40 channels."""
    frequencies, planes, tile = size
    given = spectrum(*size)
    for rows, t0, t1 in parts_of(given):
        if isinstance(rows, Tensor):  # the reference takes them ascending
            rows = rows.flip(0)
        if not count_of(rows):
            continue
        y = chunk(given, rows, t0, t1)
        y[:, ::3] = torch.tensor([3.0, -4.0])  # of modulus 5, exactly
        y[:, 1::7] = torch.tensor([3.0, 3.75])
        y[:, 2::11] = 0
        bound: float | Tensor = threshold if isinstance(threshold, float) else 5.0
        channels = threshold if isinstance(threshold, int) else 1
        if isinstance(threshold, int):
            bound = torch.tensor([5.0, -4.5, 0.0, torch.inf, 1e-30, torch.nan]).repeat(7)[:channels]
        bitmaps = [torch.full((frequencies, given.tiles, tile // 8), 0x55, dtype=torch.uint8) for _ in range(2)]
        room = Room(*bitmaps[0].shape, dtype=torch.uint8)
        room.tensor.copy_(bitmaps[0])
        starts, count = native.threshold_rows(Part.of(room.tensor, rows, t0, t1), y, planes, bound)
        kept = reference.compact_rows(y, planes, bound, rows, t0, bitmaps[1], channels=channels)
        assert torch.equal(room.tensor, bitmaps[1]) and room.guarded
        counts = tile_counts(bitmaps[1][rows, t0:t1].contiguous())
        assert count == kept.shape[0]
        assert torch.equal(starts.long(), counts.flatten().cumsum(0).view_as(counts) - counts)


@pytest.mark.parametrize("channels", [1, 3, 7, 8, 9, 200])
@pytest.mark.parametrize("size", SIZES)
def test_gather_channels(size: tuple[int, int, int], channels: int) -> None:
    given = spectrum(*size)
    numbers = torch.randn(channels, generator=torch.Generator().manual_seed(1))
    numbers[::5] = torch.nan
    for rows, t0, t1 in parts_of(given):
        _, starts, total = tight(given, rows, t0, t1)
        room, first = Room(total), t0 * given.tile
        local = Part.of(given.bitmap, rows, t0, t1, starts, total, local=True)
        native.gather_channels(local, numbers, first, room.tensor)
        mask = kept_of(given, rows, t0, t1).flatten(1)
        of_places = numbers[torch.arange(first, first + mask.shape[1]) % channels]
        assert identical(room.tensor, of_places.expand(mask.shape)[mask]) and room.guarded


@pytest.mark.parametrize("size", SIZES)
def test_index_tiles(size: tuple[int, int, int]) -> None:
    for density in (0.0, 0.02, 0.5):
        given = spectrum(*size, density=density)
        _, in_order, _ = tight(given, slice(0, given.frequencies), 0, given.tiles)
        for offsets in (given.offsets, in_order):
            counts, starts, ordered = native.index_tiles(given.bitmap, offsets)
            expected = reference.TileIndex(given.bitmap, offsets)
            assert np.array_equal(counts.numpy(), expected.counts) and np.array_equal(starts.numpy(), expected.starts)
            assert ordered == expected.ordered and native.filled_rows(given.bitmap) == expected.filled
        assert ordered
    assert native.filled_rows(given.bitmap[:0]) == 0


@pytest.mark.parametrize("positions", [0, 1, 255, 256, 700])
def test_count_moduli(positions: int) -> None:
    """Multiples of (3, 4), whose moduli any way to compute them gives exactly; rows that stand apart, too."""
    factors = torch.randint(-50, 50, (3, positions + 2), generator=torch.Generator().manual_seed(6))
    y = factors[..., None] * torch.tensor([3.0, 4.0])
    y[0, ::7, 0], y[1, ::9, 1] = torch.nan, -torch.inf
    shift, guard = 20, 1 << 19
    for rows in (y[:, :positions], y[:2, 2:]):
        room, expected = Room(1 << 12, dtype=torch.int64), torch.ones(1 << 12, dtype=torch.int64)
        room.tensor.fill_(1)
        native.count_moduli(rows, guard, shift, room.tensor)
        reference.count_moduli(rows.contiguous(), guard, shift, expected)
        assert torch.equal(room.tensor, expected) and room.guarded
        assert int(room.tensor.sum()) == (1 << 12) + rows.shape[0] * rows.shape[1]


@pytest.mark.parametrize("size", SIZES)
def test_sum_rows(size: tuple[int, int, int]) -> None:
    given = spectrum(*size, density=0.6)
    pairs = torch.randn(given.values.shape, generator=torch.Generator().manual_seed(2))
    pairs[0] = torch.tensor([torch.inf, torch.nan])
    for rows, t0, t1 in parts_of(given):
        dense, room = Room(count_of(rows), (t1 - t0) * given.tile, 2), Room((t1 - t0) * given.tile, 2)
        packed = (pairs, torch.empty(0), given.bitmap, given.offsets)
        reference.unpack_rows(*packed, rows, t0, t1, dense.tensor)
        room.tensor.fill_(0.25)
        native.sum_rows(part_of(given, rows, t0, t1), pairs, room.tensor)
        expected = torch.full_like(room.tensor, 0.25)
        for row in dense.tensor:  # one after the other, as it is added up
            expected += row
        assert identical(room.tensor, expected) and room.guarded


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("counts", [[], [0, 0], [1], [5, 0, 3, 600, 1, 0], [1024, 256, 255, 257]])
def test_quantise(counts: list[int], dtype: torch.dtype, stochastic: bool) -> None:
    number = torch.tensor(counts, dtype=torch.int64)
    generator = torch.Generator().manual_seed(3)
    kept = torch.randn(int(number.sum()), 2, generator=generator)
    starts = (number.cumsum(0) - number).to(torch.int32)
    noise = torch.rand(kept.shape, generator=generator) if stochastic else None
    for special in (None, torch.nan, torch.inf, 1e-40, 0.0, 3e38):
        if special is not None:
            kept[: 1 if special in (torch.nan, torch.inf) else len(kept), 0] = special
        shape = kept.shape if dtype == torch.int8 else kept.shape[:1]
        room, scales = Room(*shape, dtype=dtype), Room(len(counts))
        native.quantise(kept, starts, room.tensor, scales.tensor, noise)
        values, expected = reference.quantise(kept, number, dtype, noise)
        assert identical(scales.tensor, expected) and identical(room.tensor, values)
        assert room.guarded and scales.guarded


@pytest.mark.parametrize(("dtype", "levels"), [(torch.int8, 127), (torch.uint8, 7)])
def test_quantise_rounds_halves_to_even(dtype: torch.dtype, levels: int) -> None:
    steps = torch.arange(-levels, levels) + 0.5
    kept = torch.stack([steps, torch.full_like(steps, levels)], dim=1)
    room, scales = Room(*(kept.shape if dtype == torch.int8 else steps.shape), dtype=dtype), Room(1)
    native.quantise(kept, torch.zeros(1, dtype=torch.int32), room.tensor, scales.tensor)
    assert scales.tensor.item() == 1
    values, _ = reference.quantise(kept, torch.tensor([len(steps)]), dtype)
    assert torch.equal(room.tensor, values) and room.guarded
    if dtype == torch.int8:
        assert torch.equal(room.tensor[:, 0].float(), torch.round(steps))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("count", [0, 1, 40])
def test_move_runs(count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    sizes = torch.randint(0, 20, (count,), generator=generator)
    values = spectrum(1, 1024, 1024, dtype, 1.0).values[: int(sizes.sum())]
    order = torch.randperm(count, generator=generator)
    begin = torch.empty_like(sizes)
    begin[order] = sizes[order].cumsum(0) - sizes[order]
    target = sizes.cumsum(0) - sizes
    room = Room(*values.shape, dtype=dtype)
    native.move_runs(values, begin, target, sizes, room.tensor)
    assert identical(room.tensor, reference.reorder(values, begin, sizes, target)) and room.guarded


def unpack_gradient(part: Part, given: Spectrum) -> None:
    out = torch.empty(*part.tiles_of(), given.tile, 2)
    native.unpack_gradient_rows(part, torch.zeros(given.values.shape), given.values, given.scales, torch.ones(3), out)


WITH_OFFSETS: dict[str, Callable[[Part, Spectrum], None]] = {
    "expand_rows": lambda part, given: native.expand_rows(
        part, given.values, given.scales, torch.empty(*part.tiles_of(), given.tile, 2)
    ),
    "store_rows": lambda part, given: native.store_rows(
        part, torch.zeros(*part.tiles_of(), given.tile, 2), given.values
    ),
    "gather_channels": lambda part, given: native.gather_channels(
        part, torch.zeros(3), 0, torch.empty(given.values.shape[0])
    ),
    "sum_rows": lambda part, given: native.sum_rows(
        part, given.values, torch.zeros(part.tiles_of()[1] * given.tile, 2)
    ),
    "unpack_gradient_rows": unpack_gradient,
}


@pytest.mark.parametrize("name", WITH_OFFSETS)
@pytest.mark.parametrize("offset", ["one too far", "far", "negative"])
def test_offsets_beyond_the_values_are_reported(name: str, offset: str) -> None:
    given = spectrum(3, 70, 32, density=0.9)
    last = given.values.shape[0] - int(kept_of(given, slice(1, 2), 1, 2).sum())
    given.offsets[1, 1] = {"one too far": last + 1, "far": 2**31 - 1, "negative": -1}[offset]
    with pytest.raises(ValueError, match="offsets beyond its values"):
        WITH_OFFSETS[name](part_of(given, slice(0, 3), 0, 3), given)
    given.offsets[1, 1] = last
    WITH_OFFSETS[name](part_of(given, slice(0, 3), 0, 3), given)


def test_an_empty_tile_may_have_any_offset() -> None:
    given = spectrum(3, 40, 32)
    assert not given.bitmap[2, 0].any()
    given.offsets[2, 0] = 2**31 - 1
    room = Room(1, 32, 2)
    native.expand_rows(part_of(given, slice(2, 3), 0, 1), given.values, given.scales, room.tensor)
    assert identical(room.tensor, torch.zeros(1, 32, 2)) and room.guarded


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("kind", ["identity", "tanh", "softsign"])
@pytest.mark.parametrize("channels", [1, 5, 32])
def test_pack_chunk(channels: int, kind: str, dtype: torch.dtype) -> None:
    """Thresholds and scales of channels that do not divide a tile, of all tiles and from one inside on."""
    frequencies, tile, tiles, planes = 4, 32, 5, 150
    threshold, scale = torch.linspace(0.5, 1.5, channels), torch.linspace(1.0, 2.0, channels)
    for t0, rows in ((0, slice(0, 4)), (2, slice(1, 3)), (2, torch.tensor([0, 1, 3]))):
        y = torch.randn(count_of(rows), (tiles - t0) * tile, 2, generator=torch.Generator().manual_seed(5))
        y[:, 3::50] = torch.tensor([torch.nan, 2.0])
        for of_channels in (None, scale):
            results = []
            for backend in (Backend(), NativeBackend()):
                bitmap, scales = torch.zeros(frequencies, tiles, tile // 8, dtype=torch.uint8), torch.zeros(0)
                if not dtype.is_floating_point:
                    scales = torch.full((frequencies, tiles), 7.0)
                chosen = (rows, t0, bitmap, scales, dtype, kind, of_channels, channels)
                results.append((bitmap, scales, backend.pack_chunk(y, planes, threshold, *chosen)))
            (*pattern, values), (*expected_pattern, expected) = results[1], results[0]
            if kind != "tanh":
                assert identical(values, expected)
            elif dtype == torch.uint8:
                assert (values != expected).float().sum() < 3  # next to the middle of two
            else:
                close = {"rtol": 2e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
                torch.testing.assert_close(values.float(), expected.float(), equal_nan=True, **close)
            for got, wanted in zip(pattern, expected_pattern, strict=True):
                torch.testing.assert_close(got, wanted, equal_nan=True)
            assert values.shape[0] > 50


def test_pack_chunk_rounds_stochastically_as_the_reference() -> None:
    y, seed = torch.randn(3, 64, 2, generator=torch.Generator().manual_seed(6)), torch.tensor(9)
    for dtype in (torch.bfloat16, torch.int8):
        results = []
        for backend in (Backend(), NativeBackend()):
            bitmap, scales = torch.zeros(3, 2, 4, dtype=torch.uint8), torch.zeros(3, 2)
            results.append(backend.pack_chunk(y, 60, 0.5, slice(0, 3), 0, bitmap, scales, dtype, seed=seed))
        assert identical(*results)


def test_numbers_of_rows_with_gaps_between_them_in_memory() -> None:
    given = spectrum(5, 40, 32)
    rows = torch.arange(5)[:, None].repeat(1, 2)[:, 0]
    assert not rows.is_contiguous()
    got, expected = torch.empty(5, 64, 2), torch.empty(5, 64, 2)
    native.expand_rows(part_of(given, rows, 0, 2), given.values, given.scales, got)
    native.expand_rows(part_of(given, slice(0, 5), 0, 2), given.values, given.scales, expected)
    assert identical(got, expected)
