"""Values of 8 and 4 bits, and stochastic rounding: the kernels against `spectriton.reference`, to the bit."""

from __future__ import annotations

import pytest
import torch
from packed_by_hand import grid_by_hand, padded
from torch import Tensor

from spectriton import reference
from spectriton.reference.rounding import make_seed, noise_key
from spectriton_kernels import gather_rows, pack_rows, unpack_planes, unpack_rows

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

NAN, INF = float("nan"), float("inf")
LOW_BIT = [torch.int8, torch.uint8]
LEVELS = {torch.int8: 127, torch.uint8: 7}
ROWS, LENGTH, TILE, TILES = 5, 75, 32, 3
POISON = 77


def spectra(dtype: torch.dtype, device: torch.device, length: int = LENGTH, tile: int = TILE) -> Tensor:
    """`(4, T * tile, 2)` of many magnitudes, with what is special; padding is poisoned."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(4, length, 2, dtype=torch.float64, generator=generator)
    y *= torch.logspace(-2, 2, 4 * length, dtype=torch.float64).view(4, length, 1)
    y[1, :tile] = 0.001  # an empty tile
    y[2, 3], y[2, -1] = torch.tensor([NAN, 1.0]), torch.tensor([-INF, 2.0])
    y[0, 5], y[0, 6] = torch.tensor([-0.0, 1e-42]), torch.tensor([1e30, -3e29])
    y[0, tile : 2 * tile] *= 1e-42  # of the zero frequency, which is kept; below what has an inverse
    return padded(y.to(dtype).to(device), tile, fill=NAN)


class Storage:
    """Poisoned storage of `ROWS` rows; `values` are the front of a longer buffer."""

    def __init__(self, value_dtype: torch.dtype, device: torch.device, room: int, tile: int = TILE, tiles: int = TILES):
        pairs = () if value_dtype == torch.uint8 else (2,)
        self.buffer = torch.full((room + 64, *pairs), POISON, dtype=value_dtype, device=device)
        self.values = self.buffer[:room]
        self.bitmap = torch.full((ROWS, tiles, tile // 8), 0xA5, dtype=torch.uint8, device=device)
        self.offsets = torch.full((ROWS, tiles), -7, dtype=torch.int32, device=device)
        low_bit = value_dtype in LOW_BIT
        self.scales = torch.full((ROWS, tiles) if low_bit else (0,), POISON, dtype=torch.float32, device=device)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def fields(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.values, self.scales, self.bitmap, self.offsets

    def of_tile(self, row: int, tile: int) -> Tensor:
        """What is stored of a tile, as numbers."""
        count = int(reference.pattern.tile_counts(self.bitmap[row, tile, None].cpu()))
        first = int(self.offsets[row, tile])
        return self.values[first : first + count].double()


def assert_same(got: Tensor, wanted: Tensor) -> None:
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(5), wanted.nan_to_num(5))


def packed_both_ways(
    y: Tensor, value_dtype: torch.dtype, rows: list[int], t0: int, seed: int | None, room: int, length: int, tile: int
) -> tuple[Storage, Storage]:
    """By the kernel and by the reference."""
    numbers = torch.tensor(rows, device=y.device)
    noise = None if seed is None else make_seed(seed, y.device)
    key = None if noise is None else noise_key(noise)
    found = []
    for implementation, rounding in ((pack_rows, {"key": key}), (reference.pack_rows, {"seed": noise})):
        storage = Storage(value_dtype, y.device, room, tile, -(-length // tile))
        target = (storage.bitmap, storage.offsets, storage.values, storage.cursor)
        implementation(y, length, 0.75, numbers, t0, *target, scales=storage.scales, **rounding)
        found.append(storage)
    return found[0], found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("value_dtype", "seed"),
    [
        *((value_dtype, seed) for value_dtype in LOW_BIT for seed in (None, 3)),
        *((value_dtype, -5) for value_dtype in (torch.float16, torch.bfloat16, torch.float32)),
    ],
)
@pytest.mark.parametrize(
    ("tile", "length", "t0", "rows"), [(32, 75, 0, [0, 1, 2, 4]), (32, 75, 1, [0, 3]), (128, 200, 0, [1, 2, 3, 4])]
)
def test_pack_rows(tile, length, t0, rows, value_dtype, seed, dtype, device):
    y = spectra(dtype, device, length, tile)[: len(rows), t0 * tile :].contiguous()
    kernel, wanted = packed_both_ways(y, value_dtype, rows, t0, seed, 4 * length, length, tile)
    assert torch.equal(kernel.bitmap, wanted.bitmap) and torch.equal(kernel.cursor, wanted.cursor)
    assert_same(kernel.scales, wanted.scales)
    places = [(row, tile) for row in rows for tile in range(t0, kernel.offsets.shape[1])]
    for row, number in places:
        assert_same(kernel.of_tile(row, number), wanted.of_tile(row, number))
    spans = sorted((int(kernel.offsets[place]), len(kernel.of_tile(*place))) for place in places)
    used = 0
    for first, count in (span for span in spans if span[1]):
        assert first == used
        used += count
    assert used == int(kernel.cursor) < 4 * length
    assert (kernel.buffer[used:] == POISON).all()


@pytest.mark.parametrize("value_dtype", LOW_BIT)
def test_ties_go_to_the_even_integer(value_dtype, device):
    levels = LEVELS[value_dtype]
    y = torch.zeros(1, TILE, 2, device=device)
    y[0, :7, 0] = torch.tensor([levels, 0.5, 1.5, 2.5, -0.5, -1.5, -levels])
    storage = Storage(value_dtype, device, TILE)
    target = (storage.bitmap[:, :1], storage.offsets[:, :1], storage.values, storage.cursor)
    pack_rows(y, TILE, 0.0, torch.tensor([1], device=device), 0, *target, scales=storage.scales[:, :1].contiguous())
    out = torch.full_like(y, NAN)
    scales = torch.ones(ROWS, 1, device=device)
    unpack_rows(storage.values, scales, *target[:2], torch.tensor([1], device=device), 0, 1, out)
    assert out[0, :7, 0].tolist() == [levels, 0, 2, 2, 0, -2, -levels]
    assert not out[0, 7:].any() and not out[..., 1].any()


@pytest.mark.parametrize("value_dtype", LOW_BIT)
@pytest.mark.parametrize("kind", ["tanh", "asinh"])
@pytest.mark.parametrize("has_scale", [False, True])
def test_what_is_activated_is_quantised(has_scale, kind, value_dtype, device):
    """Activations may differ from torch's in the last bits, so at ties integers may, too: by one step, no more."""
    channels, rows = 5, [0, 2]
    y = padded(torch.randn(2, LENGTH, 2, generator=torch.Generator().manual_seed(1)).to(device), TILE)
    scale = torch.linspace(0.5, 2, channels, device=device) if has_scale else None
    storage = Storage(value_dtype, device, 2 * LENGTH)
    target = (storage.bitmap, storage.offsets, storage.values, storage.cursor)
    numbers = torch.tensor(rows, device=device)
    pack_rows(y, LENGTH, 0.75, numbers, 0, *target, kind, scale, channels, storage.scales)
    out = torch.full_like(y, NAN)
    unpack_rows(*storage.fields, numbers, 0, TILES, out)
    exact = torch.zeros_like(y)
    s = torch.ones(LENGTH, device=device) if scale is None else scale[torch.arange(LENGTH, device=device) % channels]
    exact[:, :LENGTH] = s[:, None] * getattr(torch, kind)(y[:, :LENGTH] / s[:, None])
    kept = y.norm(dim=-1) >= 0.75
    kept[0, :LENGTH] = True
    exact *= kept[..., None]
    peak = exact.abs().view(2, TILES, -1).amax(-1)
    torch.testing.assert_close(storage.scales[rows], peak / LEVELS[value_dtype])
    assert ((out - exact).abs().view(2, TILES, -1).amax(-1) <= 0.5001 * storage.scales[rows]).all()


@pytest.mark.parametrize("value_dtype", LOW_BIT)
@pytest.mark.parametrize("room", [0, 1, 40, 100])
def test_overflow(room, value_dtype, device):
    """Too little room: the cursor tells how much is needed, nothing is written past the end, a second run is right."""
    rows = [0, 1, 2, 4]
    y = spectra(torch.float32, device)
    kernel, _ = packed_both_ways(y, value_dtype, rows, 0, 1, room, LENGTH, TILE)
    needed = int(kernel.cursor)
    assert needed > room and (kernel.buffer[room:] == POISON).all()
    ends = kernel.offsets[rows].cpu() + reference.pattern.tile_counts(kernel.bitmap[rows].cpu())
    assert int(ends.max()) <= room
    kernel, wanted = packed_both_ways(y, value_dtype, rows, 0, 1, needed, LENGTH, TILE)
    assert torch.equal(kernel.bitmap, wanted.bitmap)
    assert_same(kernel.scales, wanted.scales)
    for row in rows:
        for tile in range(TILES):
            assert_same(kernel.of_tile(row, tile), wanted.of_tile(row, tile))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value_dtype", LOW_BIT)
def test_gather_rows(value_dtype, dtype, device):
    """An existing pattern, with its tiles in any order, is filled as `reference.store_rows` fills it."""
    rows = torch.tensor([0, 1, 2, 4], device=device)
    y = spectra(dtype, device).nan_to_num(posinf=3.0, neginf=-3.0)
    y[2, 40, 1] = NAN
    pattern, _ = packed_both_ways(y, value_dtype, rows.tolist(), 0, None, 4 * LENGTH, LENGTH, TILE)
    pattern.bitmap[3], pattern.offsets[3] = 0, 0
    other = y.flip(1).roll(LENGTH - TILES * TILE, 1).contiguous()
    stored = []
    for kernel in (True, False):
        values, scales = torch.full_like(pattern.values, POISON), torch.full_like(pattern.scales, POISON)
        if kernel:
            assert gather_rows(other, pattern.bitmap, pattern.offsets, rows, 0, values, scales) is values
        else:
            reference.store_rows(other, pattern.bitmap, pattern.offsets, rows, values, scales)
        stored.append((values, scales))
    assert torch.equal(stored[0][0], stored[1][0])
    assert_same(stored[0][1], stored[1][1])
    assert (stored[0][1][3] == POISON).all() and stored[0][1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value_dtype", LOW_BIT)
def test_unpacking(value_dtype, dtype, device):
    """Every integer, and tiles whose scale is NaN: what is dropped there stays zero."""
    grid = grid_by_hand(3, 4, device)
    count, planes = grid.index.numel(), 70
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(count, TILES * TILE, generator=generator) < 0.6
    mask[1, :TILE] = False
    mask[:, planes:] = False
    bitmap = reference.pattern.to_bits(mask).view(count, TILES, TILE // 8).to(device)
    kept = reference.pattern.tile_counts(bitmap.cpu())
    offsets = (kept.flatten().cumsum(0) - kept.flatten()).view_as(kept).to(torch.int32).to(device)
    levels = LEVELS[value_dtype]
    if value_dtype == torch.int8:
        values = torch.randint(-levels, levels + 1, (int(kept.sum()), 2), generator=generator).to(torch.int8)
        values[:, 0] = torch.arange(len(values)) % 255 - 127
    else:
        values = (torch.arange(int(kept.sum())) % 256).to(torch.uint8)
    scales = torch.rand(count, TILES, generator=generator).to(device)
    scales[2, 1] = NAN
    packed = (values.to(device), scales, bitmap, offsets)

    rows = torch.tensor([0, 1, 2, 5], device=device)
    found = [torch.full((4, 2 * TILE, 2), fill, dtype=dtype, device=device) for fill in (NAN, 7.0)]
    assert unpack_rows(*packed, rows, 1, 3, found[0]) is found[0]
    reference.unpack_rows(*packed, rows, 1, 3, found[1])
    assert_same(*found)
    assert found[0][2].isnan().any() and not found[0][~mask[rows.cpu(), TILE:].to(device)].any()

    row_scale = torch.linspace(0.5, 2, count, dtype=dtype, device=device)
    for factors in (None, row_scale):
        halves = [torch.full((planes, 3, 3, 2), fill, dtype=dtype, device=device) for fill in (NAN, 7.0)]
        assert unpack_planes(*packed, grid, 0, TILES, planes, factors, halves[0]) is halves[0]
        grid.count = count
        reference.unpack_planes(*packed, grid, 0, TILES, planes, factors, halves[1])
        assert_same(*halves)


def test_values_must_fit_their_format(device):
    storage, rows = Storage(torch.int8, device, TILE), torch.tensor([1], device=device)
    y = torch.zeros(1, TILES * TILE, 2, device=device)
    with pytest.raises(AssertionError, match="a scale a tile"):
        gather_rows(y, storage.bitmap, storage.offsets, rows, 0, storage.values)
    with pytest.raises(AssertionError, match="pairs of int8"):
        gather_rows(y, storage.bitmap, storage.offsets, rows, 0, storage.values[:, 0], storage.scales)
    with pytest.raises(AssertionError, match="no scales"):
        unpack_rows(storage.values.float(), storage.scales, storage.bitmap, storage.offsets, rows, 0, TILES, y)
