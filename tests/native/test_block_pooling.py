"""Pooling between packed spectra in C: against the reference's pooling of maps that C makes, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectriton import PackedSpectrum, ops, reference
from spectriton._backend import Backend
from spectriton._native import NativeBackend
from spectriton.frequencies import FrequencyGrid, frequency_grid
from spectriton.ops.pool2d import _code_bits, _output_size
from spectriton.packed import tile_size
from spectriton.reference import TileIndex
from spectriton.reference.across import Pool, Windows, empty_across
from tests.native.spectra import Room

pytestmark = [
    pytest.mark.usefixtures("build"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # infinity less infinity, in NumPy
]

# Size, kernel, stride and margin.
WINDOWS = [
    ((6, 8), (2, 2), (2, 2), 0),
    ((7, 9), (2, 2), (2, 2), 0),  # a row and a column are left over
    ((7, 8), (3, 3), (2, 2), 0),  # they overlap
    ((7, 6), (3, 2), (1, 1), 0),
    ((9, 8), (3, 3), (1, 1), 1),
    ((8, 9), (2, 1), (3, 2), 0),  # with gaps
    ((9, 8), (2, 2), (2, 2), 2),
    ((9, 9), (3, 3), (2, 2), 1),
    ((5, 5), (1, 1), (1, 1), 0),
    ((6, 5), (1, 1), (1, 1), 1),
    ((4, 3), (4, 3), (4, 3), 0),
    ((18, 17), (16, 16), (1, 1), 0),  # codes of a byte
    ((64, 3), (2, 3), (2, 3), 0),
]
# (batch, channels): one plane, parts of a block and of a tile, whole blocks; tiles of which the last shares bytes.
PLANES = [(1, 1), (11, 7), (4, 16)]
MANY = (1, 1500)


class Case:
    """Packed maps, and what is done to them."""

    def __init__(
        self, planes: tuple[int, int], case: tuple, value_dtype: str = "float32", density: float = 0.4, **pool: object
    ) -> None:
        self.size, kernel, stride, margin = case
        generator = torch.Generator().manual_seed(planes[1])
        maps = torch.randn(*planes, *self.size, generator=generator)
        packed = ops.to_spectral(maps, density=density, value_dtype=value_dtype)
        packed.values[torch.rand(packed.values.shape[0], generator=generator) < 0.01] = (
            torch.nan if packed.values.is_floating_point() else 3
        )
        self.packed: PackedSpectrum = packed
        self.fields = (packed.values, packed.scales, packed.bitmap, packed.offsets)
        self.grid: FrequencyGrid = frequency_grid(*self.size)
        self.index: TileIndex = reference.TileIndex(packed.bitmap, packed.offsets)
        self.outputs = _output_size([n - 2 * margin for n in self.size], list(kernel), list(stride))
        self.count = planes[0] * planes[1]
        self.tile = tile_size(*planes, *self.size)
        self.windows = Windows(list(kernel), list(stride), _code_bits(list(kernel)), self.tile, margin)
        self.pool = pool
        self.tiles = packed.bitmap.shape[1]

    def bits(self, planes: int, bits: int) -> Tensor:
        room = Room(-(-planes * self.outputs[0] * self.outputs[1] * bits // 8), dtype=torch.uint8)
        room.tensor.guard = room
        return room.tensor

    def asked(self, planes: int, signs: bool) -> Pool:
        codes = None if self.pool.get("plain") else self.bits(planes, self.windows.bits)
        affine = self.pool.get("affine")
        if affine is not None:
            affine = tuple(t[self.count - planes :] for t in affine)
        return Pool(self.windows, codes, self.bits(planes, 1) if signs else None, affine, signs)

    def maps(self, t0: int, t1: int) -> Tensor:
        maps = empty_across(torch.empty(0), min(t1 * self.tile, self.count) - t0 * self.tile, list(self.size))
        NativeBackend().unpack_maps(*self.fields, self.grid, t0, t1, True, maps, self.index)
        return maps


def check(given: Case, signs: bool) -> None:
    native, size = NativeBackend(), given.size
    for t0 in {0, given.tiles - 1}:
        planes = min(given.tiles * given.tile, given.count) - t0 * given.tile
        expected = torch.empty(planes, *given.outputs)
        pool, ours = given.asked(planes, signs), given.asked(planes, signs)
        Backend().pool_across(given.maps(t0, given.tiles), pool.windows, expected, *pool[1:])
        for room, out in (
            (made := Room(planes, *given.outputs), made.tensor),
            (made := Room(*given.outputs, planes), made.tensor.permute(2, 0, 1)),
        ):
            assert native.unpack_pooled(*given.fields, given.grid, t0, given.tiles, ours, out, given.index)
            assert room.guarded
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
            for bits, others in zip(ours[1:3], pool[1:3], strict=True):
                assert bits is None or (torch.equal(bits, others) and bits.guard.guarded)
        again, pooled, padded = given.asked(planes, signs), frequency_grid(*given.outputs), planes + 5
        rows = native.rows_of_pooled(
            *given.fields, given.grid, t0, given.tiles, again, pooled, planes, padded, torch.float32, given.index
        )
        assert rows is not None
        torch.testing.assert_close(rows, native.rows_of_maps(expected, pooled, padded), rtol=0, atol=0, equal_nan=True)
        assert again.codes is None or torch.equal(again.codes, pool.codes)

    pool = ours  # of the last chunk; below of all
    if given.tiles > 1:
        pool = given.asked(given.count, signs)
        native.unpack_pooled(
            *given.fields, given.grid, 0, given.tiles, pool, torch.empty(given.count, *given.outputs), given.index
        )
    grad = torch.randn(given.count, *given.outputs, generator=torch.Generator().manual_seed(1))
    across = empty_across(grad, given.count, given.outputs).copy_(grad)
    spread = Backend().spread_across(across.clone(), pool.windows, list(size), pool.codes, pool.signs)
    expected = torch.full((given.packed.kept, 2), torch.nan)
    native.gather_maps(spread, *given.fields[2:], given.grid, 0, given.tiles, expected, given.index)
    for gradient in (grad, across):
        got = native.gather_pooled(gradient, pool, *given.fields[2:], given.grid, given.packed.kept, given.index)
        torch.testing.assert_close(got, 2 * expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("planes", "case"),
    [*((planes, case) for planes in PLANES for case in WINDOWS), (MANY, WINDOWS[1]), (MANY, WINDOWS[2])],
)
def test_equals_the_reference(planes: tuple[int, int], case: tuple) -> None:
    given = Case(planes, case)
    check(given, signs=False)
    check(given, signs=True)


@pytest.mark.parametrize("value_dtype", ["float16", "bfloat16", "int8", "int4"])
def test_value_formats(value_dtype: str) -> None:
    check(Case((11, 7), WINDOWS[1], value_dtype), signs=False)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_a_single_frequency_and_all(density: float) -> None:
    """Of the mean alone all elements of a window are equal, and the first of them is taken."""
    given = Case((11, 7), ((7, 8), (2, 2), (2, 2), 0), density=density)
    check(given, signs=True)
    if density == 0:
        pool = given.asked(77, False)
        NativeBackend().unpack_pooled(
            *given.fields, given.grid, 0, given.tiles, pool, torch.empty(77, 3, 4), given.index
        )
        assert pool.codes is not None and not pool.codes.any()


@pytest.mark.parametrize("case", [*WINDOWS[:3], WINDOWS[8]])
def test_scaled_first(case: tuple) -> None:
    """By powers of two, which leaves equals equal however the sum is rounded."""
    affine = torch.tensor([2.0, -0.5, 0.0]).repeat(26)[:77], torch.zeros(77)
    check(Case((11, 7), case, affine=affine), signs=True)
    if case[1] == (1, 1):
        check(Case((11, 7), case, affine=affine, plain=True), signs=True)


@pytest.mark.parametrize(
    "case", [((8, 8), (2, 2), (2, 2), 0), ((8, 8), (3, 3), (2, 2), 1), ((8, 8), (1, 1), (1, 1), 0)]
)
def test_what_is_not_a_number_wins_amid_numbers(case: tuple) -> None:
    """Zeros times infinity, among infinities of both signs."""
    given = Case((11, 7), case, affine=(torch.full((77,), torch.inf), torch.zeros(77)))
    quarter = int(torch.nonzero((given.grid.ky == 0) & (given.grid.kx == 2)))
    counts = torch.from_numpy(given.index.counts)[quarter]
    first = int(torch.from_numpy(given.index.starts)[quarter, 0])
    given.packed.values.zero_()
    given.packed.values[first : first + int(counts.sum()), 0] = 1.0
    maps = given.maps(0, given.tiles) * torch.inf
    assert maps.isnan().any() and (maps == torch.inf).any() and (maps == -torch.inf).any()
    check(given, signs=True)


@pytest.mark.parametrize("planes", [(1, 1), (11, 7), MANY])
@pytest.mark.parametrize("case", [WINDOWS[0], WINDOWS[2], WINDOWS[5], ((5, 5), (1, 1), (1, 1), 0)])
def test_packed_gradients(planes: tuple[int, int], case: tuple) -> None:
    native, given = NativeBackend(), Case(planes, case)
    pool, y = given.asked(given.count, True), torch.empty(*planes, *given.outputs)
    native.unpack_pooled(*given.fields, given.grid, 0, given.tiles, pool, y.flatten(0, 1), given.index)
    packed, pooled = ops.to_spectral(y.nan_to_num(), density=0.5), frequency_grid(*given.outputs)
    grad = torch.randn(packed.kept, 2, generator=torch.Generator().manual_seed(2))
    pattern, index = (packed.bitmap, packed.offsets), native.tile_index(packed.bitmap, packed.offsets)
    maps = torch.empty(given.count, *given.outputs)
    none = torch.empty(0)
    native.unpack_maps(grad, none, *pattern, pooled, 0, packed.bitmap.shape[1], False, maps, index)
    of_maps = (*given.fields[2:], given.grid, given.packed.kept, given.index)
    expected = native.gather_pooled(maps, pool, *of_maps)
    got = native.gather_repacked(grad, *pattern, pooled, pool, given.count, *of_maps)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("offset", ["far", "negative"])
def test_offsets_beyond_the_values_are_reported(offset: str) -> None:
    native, given = NativeBackend(), Case(MANY, WINDOWS[0])
    pool, pooled = given.asked(given.count, False), frequency_grid(*given.outputs)
    y = torch.empty(given.count, *given.outputs)
    tiles = (given.grid, 0, given.tiles)
    native.unpack_pooled(*given.fields, *tiles, pool, y, given.index)
    small = ops.to_spectral(y.nan_to_num()[None], density=0.5)
    pattern, of_small = (given.packed.bitmap, given.packed.offsets), (small.bitmap, small.offsets.clone())
    grad, rest = torch.randn(small.kept, 2), (given.grid, given.packed.kept, given.index)
    bad = {"far": 2**31 - 1, "negative": -1}[offset]
    of_small[1][1, 0] = bad
    with pytest.raises(ValueError, match="offsets beyond its values"):
        native.gather_repacked(grad, *of_small, pooled, pool, given.count, *pattern, *rest)
    given.packed.offsets[1, 0] = bad
    for run in (
        lambda: native.unpack_pooled(*given.fields, *tiles, pool, y, given.index),
        lambda: native.rows_of_pooled(
            *given.fields, *tiles, pool, pooled, given.count, given.count, torch.float32, given.index
        ),
        lambda: native.gather_pooled(y, pool, *pattern, *rest),
        lambda: native.gather_repacked(grad, small.bitmap, small.offsets, pooled, pool, given.count, *pattern, *rest),
    ):
        with pytest.raises(ValueError, match="offsets beyond its values"):
            run()


def test_double_precision_goes_to_the_reference() -> None:
    native, given = NativeBackend(), Case((11, 7), WINDOWS[0])
    pool, grid = given.asked(77, False), frequency_grid(*given.outputs)
    y, kept = torch.empty(77, *given.outputs).double(), given.packed.kept
    tiles, pattern = (given.grid, 0, given.tiles), (given.packed.bitmap, given.packed.offsets)
    rest = (*pattern, given.grid, kept, given.index)
    assert not native.unpack_pooled(*given.fields, *tiles, pool, y, given.index)
    assert native.rows_of_pooled(*given.fields, *tiles, pool, grid, 77, 80, torch.float64, given.index) is None
    assert native.gather_pooled(y, pool, *rest) is None
    assert native.gather_repacked(torch.empty(kept, 2).double(), *pattern, given.grid, pool, 77, *rest) is None
