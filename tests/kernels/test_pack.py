"""pack_rows and gather_rows against the packed format written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from packed_by_hand import Packed, bits_of, pack_by_hand, padded
from tolerances import TOLERANCES

from spectriton_kernels import gather_rows, pack_rows

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
POISON_BYTE = 0xA5
POISON_OFFSET = -7


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def empty_packed(
    rows: int, length: int, tile: int, capacity: int, dtype: torch.dtype, device: torch.device, start: int = 0
) -> tuple[Packed, torch.Tensor]:
    """Poisoned storage, and its cursor at `start`; `values` are the front of a longer buffer, `guard` its end."""
    tiles = -(-length // tile)
    buffer = torch.full((capacity + 256, 2), float("nan"), dtype=dtype, device=device)
    packed = Packed(
        bitmap=torch.full((rows, tiles, tile // 8), POISON_BYTE, dtype=torch.uint8, device=device),
        offsets=torch.full((rows, tiles), POISON_OFFSET, dtype=torch.int32, device=device),
        values=buffer[:capacity],
        guard=buffer[capacity:],
        tile=tile,
    )
    return packed, torch.tensor([start], dtype=torch.int64, device=device)


def expected_mask(dense: torch.Tensor, rows: list[int], threshold: np.ndarray | float) -> np.ndarray:
    """What is kept of `dense` `(Fc, R, 2)`, coefficient by coefficient."""
    pairs = dense.double().cpu().numpy()
    modulus = np.hypot(pairs[..., 0], pairs[..., 1])
    mask = ~(modulus < threshold)
    mask[[number for number, row in enumerate(rows) if row == 0]] = True
    return mask


def check_chunk(
    packed: Packed, cursor: torch.Tensor, kept: np.ndarray, expected: torch.Tensor, rows: list[int], t0: int, start: int
) -> None:
    """The tiles of the chunk hold `expected` `(Fc, Rc, 2)` at `kept`, everything else is still poisoned."""
    tile = packed.tile
    bits = bits_of(kept, tile)
    tiles = bits.shape[1]
    bitmap = np.full(packed.bitmap.shape, POISON_BYTE, dtype=np.uint8)
    bitmap[rows, t0 : t0 + tiles] = bits
    assert np.array_equal(packed.bitmap.cpu().numpy(), bitmap)

    offsets = packed.offsets.cpu().numpy().copy()
    chunk_offsets = offsets[rows, t0 : t0 + tiles].copy()
    offsets[rows, t0 : t0 + tiles] = POISON_OFFSET
    assert (offsets == POISON_OFFSET).all()

    values = packed.values.cpu()
    tolerance = TOLERANCES[values.dtype]
    spans = []
    for number in range(len(rows)):
        for tile_number in range(tiles):
            span = slice(tile_number * tile, (tile_number + 1) * tile)
            mask = torch.from_numpy(kept[number, span])
            wanted = expected[number, span].cpu()[mask]
            offset = int(chunk_offsets[number, tile_number])
            torch.testing.assert_close(
                values[offset : offset + len(wanted)], wanted.to(values.dtype), equal_nan=True, **tolerance
            )
            spans += [(offset, len(wanted))] if len(wanted) else []
    # the tiles fill what was allocated without gap or overlap
    used = start
    for offset, count in sorted(spans):
        assert offset == used
        used += count
    assert cursor.item() == used == start + int(kept.sum())
    assert values[:start].isnan().all() and values[used:].isnan().all()
    assert packed.guard.isnan().all()


@pytest.mark.parametrize(
    ("tile", "length", "t0", "rows"),
    [
        (32, 32, 0, [0, 1, 2]),
        (32, 1, 0, [0, 1]),
        (32, 75, 0, [0, 3]),
        (32, 75, 1, [1, 2, 4]),
        (64, 75, 1, [0, 4]),
        (128, 300, 0, [2]),
        (1024, 1500, 0, [0, 2]),
    ],
)
@pytest.mark.parametrize("start", [0, 5])
def test_pack_rows(start, tile, length, t0, rows, device):
    dense = random(len(rows), length, 2, dtype=torch.float32, device=device)
    dense[-1, -1] = torch.tensor([0.3, -0.4])
    packed, cursor = empty_packed(5, length, tile, start + len(rows) * length, torch.float32, device, start)
    # poisoned padding must stay out
    y = padded(dense, tile, fill=float("nan"))[:, t0 * tile :]
    pack_rows(
        y, length, 1.0, torch.tensor(rows, device=device), t0, packed.bitmap, packed.offsets, packed.values, cursor
    )
    chunk = dense[:, t0 * tile :]
    kept = expected_mask(chunk, rows, 1.0)
    assert rows[-1] == 0 or not kept[-1, -1]
    check_chunk(packed, cursor, kept, chunk, rows, t0, start)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value_dtype", FLOATS)
def test_dtypes(value_dtype, dtype, device):
    rows, length = [1, 2], 40
    dense = random(2, length, 2, dtype=dtype, device=device)
    # moduli far enough from the threshold for float32 squares to decide alike
    packed, cursor = empty_packed(3, length, 32, 2 * length, value_dtype, device)
    pack_rows(
        padded(dense, 32),
        length,
        1.0,
        torch.tensor(rows, device=device),
        0,
        packed.bitmap,
        packed.offsets,
        packed.values,
        cursor,
    )
    check_chunk(packed, cursor, expected_mask(dense, rows, 1.0), dense, rows, 0, 0)


def test_equality_keeps(device):
    dense = torch.zeros(1, 32, 2, device=device)
    dense[0, :6] = torch.tensor([[0.1, 0], [0, -0.1], [0.5, 0], [3, 4], [-4, 3], [0.5, 0.0001]])
    for threshold, count in ((0.1, 6), (0.5, 4), (5.0, 2), (float("inf"), 0)):
        packed, cursor = empty_packed(2, 32, 32, 32, torch.float32, device)
        pack_rows(
            dense,
            32,
            threshold,
            torch.tensor([1], device=device),
            0,
            packed.bitmap,
            packed.offsets,
            packed.values,
            cursor,
        )
        assert cursor.item() == count


def test_threshold_zero_keeps_everything(device):
    packed, cursor = empty_packed(2, 40, 32, 80, torch.float32, device)
    dense = torch.zeros(1, 40, 2, device=device)
    pack_rows(
        padded(dense, 32),
        40,
        0.0,
        torch.tensor([1], device=device),
        0,
        packed.bitmap,
        packed.offsets,
        packed.values,
        cursor,
    )
    check_chunk(packed, cursor, np.ones((1, 40), bool), dense, [1], 0, 0)


def test_threshold_is_not_rounded_for_float64(device):
    """float32(0.1) is above 0.1: moduli between the two, and below 0.1 but near it, tell whether it was rounded."""
    dense = torch.zeros(1, 32, 2, dtype=torch.float64, device=device)
    dense[0, 0, 0], dense[0, 1, 1], dense[0, 2, 0] = 0.1 + 5e-10, 0.1 + 1e-14, 0.1 - 1e-14
    packed, cursor = empty_packed(2, 32, 32, 32, torch.float64, device)
    pack_rows(dense, 32, 0.1, torch.tensor([1], device=device), 0, packed.bitmap, packed.offsets, packed.values, cursor)
    check_chunk(packed, cursor, expected_mask(dense, [1], 0.1), dense, [1], 0, 0)
    assert cursor.item() == 2


def test_not_finite_is_kept(device):
    nan, inf = float("nan"), float("inf")
    dense = torch.zeros(2, 33, 2, device=device)
    dense[:, 3] = torch.tensor([nan, 0.0])
    dense[:, 7] = torch.tensor([0.0, nan])
    dense[:, 31] = torch.tensor([inf, 1.0])
    dense[:, 32] = torch.tensor([-inf, nan])
    packed, cursor = empty_packed(3, 33, 32, 66, torch.float32, device)
    rows = [1, 2]
    pack_rows(
        padded(dense, 32),
        33,
        1e30,
        torch.tensor(rows, device=device),
        0,
        packed.bitmap,
        packed.offsets,
        packed.values,
        cursor,
    )
    kept = expected_mask(dense, rows, 1e30)
    assert kept.sum() == 8
    # not check_chunk: its poison is NaN as well
    assert cursor.item() == 8
    assert np.array_equal(packed.bitmap[1:].cpu().numpy(), bits_of(kept, 32))
    for row in rows:
        first, second = packed.offsets[row].tolist()
        assert torch.equal(packed.values[first : first + 3].isnan(), dense[0, [3, 7, 31]].isnan())
        assert packed.values[first + 2].tolist() == [inf, 1.0]
        assert packed.values[second, 0] == -inf and packed.values[second, 1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["identity", "tanh", "softsign", "asinh", "atan"])
@pytest.mark.parametrize("has_scale", [False, True])
@pytest.mark.parametrize("has_thresholds", [False, True])
def test_channels(has_thresholds, has_scale, kind, dtype, device):
    """Thresholds and scales belong to the channel of the position in the whole row, not in the chunk."""
    activation = {
        "identity": lambda v: v,
        "tanh": torch.tanh,
        "softsign": torch.nn.functional.softsign,
        "asinh": torch.asinh,
        "atan": torch.atan,
    }[kind]
    channels, length, tile, t0, rows = 5, 75, 32, 1, [0, 2]
    dense = random(2, length, 2, dtype=dtype, device=device)[:, t0 * tile :]
    channel = torch.arange(t0 * tile, length, device=device) % channels
    thresholds = torch.tensor([0.0, 0.5, 1.0, 2.0, 9.0], dtype=dtype, device=device)
    scale = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0], dtype=dtype, device=device)
    packed, cursor = empty_packed(3, length, tile, 2 * length, dtype, device)
    pack_rows(
        padded(dense, tile),
        length,
        thresholds if has_thresholds else 0.75,
        torch.tensor(rows, device=device),
        t0,
        packed.bitmap,
        packed.offsets,
        packed.values,
        cursor,
        kind,
        scale if has_scale else None,
        channels,
    )
    kept = expected_mask(dense, rows, thresholds[channel].cpu().numpy() if has_thresholds else 0.75)
    s = scale[channel][None, :, None] if has_scale else torch.ones((), dtype=dtype, device=device)
    check_chunk(packed, cursor, kept, s * activation(dense / s), rows, t0, 0)


@pytest.mark.parametrize("capacity", [1, 40, 69, 0])
def test_overflow(capacity, device):
    """Too little room: the cursor tells how much is needed, nothing is written past the end, a second run is right."""
    rows, length, tile = [1, 3], 75, 32
    dense = random(2, length, 2, dtype=torch.float32, device=device) + 5.0
    dense[:, ::15] = 0.0
    kept = expected_mask(dense, rows, 1.0)
    assert kept.sum() == 140
    packed, cursor = empty_packed(4, length, tile, capacity, torch.float32, device)
    row_tensor = torch.tensor(rows, device=device)
    y = padded(dense, tile)
    pack_rows(y, length, 1.0, row_tensor, 0, packed.bitmap, packed.offsets, packed.values, cursor)
    assert cursor.item() == 140
    assert packed.guard.isnan().all()
    # What does not fit is left empty: the pattern stays within the values.
    counts = np.bitwise_count(packed.bitmap[rows].cpu().numpy()).sum(-1)
    assert (counts + packed.offsets[rows].cpu().numpy() <= capacity).all() and counts.sum() <= capacity
    packed, cursor = empty_packed(4, length, tile, int(cursor), torch.float32, device)
    pack_rows(y, length, 1.0, row_tensor, 0, packed.bitmap, packed.offsets, packed.values, cursor)
    check_chunk(packed, cursor, kept, dense, rows, 0, 0)


def test_no_rows(device):
    packed, cursor = empty_packed(2, 40, 32, 4, torch.float32, device, start=2)
    y = torch.zeros(0, 64, 2, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    pack_rows(y, 40, 1.0, none, 0, packed.bitmap, packed.offsets, packed.values, cursor)
    assert cursor.item() == 2
    assert (packed.bitmap == POISON_BYTE).all() and packed.values.isnan().all()


def test_not_contiguous(device):
    dense = random(64, 2, 2, dtype=torch.float32, device=device).transpose(0, 1)
    packed, cursor = empty_packed(3, 64, 32, 128, torch.float32, device)
    pack_rows(
        dense, 64, 1.0, torch.tensor([1, 2], device=device), 0, packed.bitmap, packed.offsets, packed.values, cursor
    )
    check_chunk(packed, cursor, expected_mask(dense, [1, 2], 1.0), dense, [1, 2], 0, 0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("tile", "length", "t0", "t1", "rows"),
    [(32, 75, 0, 3, [0, 1, 2, 3]), (32, 75, 1, 2, [1, 3]), (32, 1, 0, 1, [2]), (256, 300, 1, 2, [0, 3])],
)
def test_gather_rows(tile, length, t0, t1, rows, dtype, device):
    pattern = torch.rand(4, length, generator=torch.Generator().manual_seed(1)) < 0.4
    pattern[1] = False
    pattern[2] = True
    source = torch.arange(4 * length * 2, dtype=torch.float64).view(4, length, 2)
    packed = pack_by_hand(source, pattern, tile, torch.float64, np.random.default_rng(2))
    gradient = random(len(rows), length, 2, dtype=dtype, device=device)
    y = padded(gradient, tile, fill=float("nan"))[:, t0 * tile : t1 * tile]
    out = torch.full((len(packed.values), 2), float("nan"), dtype=dtype, device=device)
    result = gather_rows(
        y, packed.bitmap.to(device), packed.offsets.to(device), torch.tensor(rows, device=device), t0, out
    )
    assert result is out

    # the hand-packed values say which coefficient (row, position) belongs at each place
    number = packed.values[:, 0].long() // 2
    expected = torch.full((len(packed.values), 2), float("nan"), dtype=dtype)
    for place, (row, position) in enumerate(zip((number // length).tolist(), (number % length).tolist(), strict=True)):
        if row in rows and t0 * tile <= position < t1 * tile:
            expected[place] = gradient[rows.index(row), position].cpu()
    assert torch.equal(out.cpu().isnan(), expected.isnan())
    assert torch.equal(out.cpu().nan_to_num(), expected.nan_to_num())


def test_gather_rows_keeps_not_finite(device):
    y = torch.zeros(1, 32, 2, device=device)
    y[0, 5], y[0, 9] = torch.tensor([float("nan"), float("inf")]), torch.tensor([float("-inf"), 1.0])
    pattern = torch.zeros(1, 32, dtype=torch.bool)
    pattern[0, [5, 9, 10]] = True
    packed = pack_by_hand(y.cpu(), pattern, 32, torch.float32)
    out = torch.full((3, 2), 7.0, device=device)
    gather_rows(y, packed.bitmap.to(device), packed.offsets.to(device), torch.tensor([0], device=device), 0, out)
    assert torch.equal(out.isnan(), torch.tensor([[True, False], [False, False], [False, False]], device=device))
    assert out[0, 1] == float("inf") and out[1].tolist() == [float("-inf"), 1.0] and out[2].tolist() == [0.0, 0.0]
