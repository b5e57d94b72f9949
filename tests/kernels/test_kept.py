"""sum_kept and combine_kept against sums written out on the dense side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from packed_by_hand import pack_by_hand, padded

from spectriton_kernels import combine_kept, kept, sum_kept

pytestmark = pytest.mark.triton
ROOM = 1 << 20


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def random_mask(rows: int, length: int, device: torch.device) -> torch.Tensor:
    """Row 0 full, row 1 (if any) empty, the others kept at random."""
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[0] = True
    mask[1:2] = False
    return mask.to(device)


SHAPES = [(32, 1, 1), (32, 5, 75), (32, 9, 40), (64, 3, 128), (1024, 4, 1500)]  # tile, rows, length


def packed(tile: int, rows: int, length: int, dtype: torch.dtype, device: torch.device):
    """(z, g) dense and zero where nothing is kept, and both packed."""
    mask = random_mask(rows, length, device)
    dense = [random(rows, length, 2, dtype=dtype, device=device, seed=seed) for seed in (0, 1)]
    stored = [pack_by_hand(t, mask, tile, dtype, np.random.default_rng(2)) for t in dense]
    return *(t * mask[..., None] for t in dense), *stored, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tile", "rows", "length"), SHAPES)
def test_sum_kept(tile, rows, length, dtype, device):
    z, g, values, grads, _ = packed(tile, rows, length, dtype, device)
    weight = torch.arange(1, rows + 1, dtype=torch.float64, device=device)
    pattern = (values.values, None, values.bitmap, values.offsets)
    power = sum_kept(*pattern, weight, None, dtype, ROOM)
    product = sum_kept(*pattern, None, grads.values, dtype, ROOM)
    for found, terms in ((power, z.double().square() * weight[:, None, None]), (product, z.double() * g.double())):
        expected = padded(terms, tile)[1:].sum((0, 2))
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5)


def test_sums_take_no_more_room_than_given(device, monkeypatch):
    """Rows that one program takes one after the other give the sums that each gives by itself."""
    _, _, values, grads, _ = packed(32, 23, 75, torch.float64, device)
    monkeypatch.setattr(kept, "rows_in_turn", lambda rows, blocks, most: 1)
    found, rooms = [], []
    for room in (ROOM, 3 * 96 * 8):
        args = (values.values, None, values.bitmap, values.offsets, None, grads.values, torch.float64, room)
        rooms.append(kept.plan_sum_kept(*args)[1].shape[0])
        found.append(sum_kept(*args))
    assert rooms == [22, 3]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_turn", [1, 4])
@pytest.mark.parametrize("has_gain", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tile", "rows", "length"), SHAPES)
def test_combine_kept(tile, rows, length, dtype, has_gain, in_turn, device, monkeypatch):
    monkeypatch.setattr(kept, "rows_in_turn", lambda rows, blocks, most: in_turn)
    z, g, values, grads, mask = packed(tile, rows, length, dtype, device)
    weight = torch.arange(1, rows + 1, dtype=torch.float64, device=device)
    places = values.bitmap.shape[1] * tile
    factor, gain, zero = (random(places, dtype=torch.float64, device=device, seed=seed) for seed in (3, 4, 5))
    out = torch.full_like(grads.values, float("nan"))
    given = (gain, zero) if has_gain else (None, None)
    pattern = (values.values, None, grads.values, values.bitmap, values.offsets, weight, factor)
    assert combine_kept(*pattern, *given, out) is out

    expected = g.double() * factor[:length, None]
    if has_gain:
        of_values = z.double() * gain[:length, None] * weight[:, None, None]
        of_values[0] = 0
        of_values[0, :, 0] = zero[:length]
        expected += of_values
    stored = pack_by_hand(expected, mask, tile, torch.float64, np.random.default_rng(2)).values
    torch.testing.assert_close(out.double(), stored, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5)
    combine_kept(*pattern[:2], grads.values, *pattern[3:], *given, grads.values)  # over the gradients
    assert torch.equal(grads.values, out)


def test_values_that_are_not_finite_are_seen(device):
    z, _, values, grads, _ = packed(32, 3, 40, torch.float32, device)
    values.values[values.offsets[2, 0]] = float("nan")
    power = sum_kept(
        values.values, None, values.bitmap, values.offsets, torch.ones(3, device=device), None, z.dtype, ROOM
    )
    assert int(power.isnan().sum()) == 1
    product = sum_kept(
        values.values, None, values.bitmap, values.offsets, None, torch.zeros_like(grads.values), z.dtype, ROOM
    )
    assert int(product.isnan().sum()) == 1
