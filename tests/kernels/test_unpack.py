"""unpack_rows and unpack_planes against the packed format written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from packed_by_hand import grid_by_hand, pack_by_hand, padded

from spectriton_kernels import pack_rows, unpack, unpack_gradient_rows, unpack_planes, unpack_rows
from spectriton_kernels.spectral_activation import KINDS

pytestmark = pytest.mark.triton
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def random_mask(rows: int, length: int, device: torch.device) -> torch.Tensor:
    """Row 0 full, row 1 (if any) empty, the others kept at random."""
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[0] = True
    mask[1:2] = False
    return mask.to(device)


@pytest.mark.parametrize(
    ("tile", "length", "t0", "t1", "rows"),
    [
        (32, 75, 0, 3, [0, 1, 2, 3, 4]),
        (32, 75, 1, 3, [1, 3]),
        (32, 75, 2, 3, [4]),
        (32, 1, 0, 1, [0, 2]),
        (64, 128, 0, 2, [2, 4]),
        (1024, 1500, 0, 2, [0, 3]),
        (32, 75, 0, 3, []),
    ],
)
@pytest.mark.parametrize("has_scales", [False, True])
def test_unpack_rows(has_scales, tile, length, t0, t1, rows, device):
    dense = random(5, length, 2, dtype=torch.float32, device=device)
    mask = random_mask(5, length, device)
    packed = pack_by_hand(dense, mask, tile, torch.float32, np.random.default_rng(2))
    out = torch.full((len(rows), (t1 - t0) * tile, 2), float("nan"), device=device)
    # float values come without scales or with an empty tensor for them
    scales = torch.empty(0, device=device) if has_scales else None
    chosen = torch.tensor(rows, dtype=torch.int64, device=device)
    result = unpack_rows(packed.values, scales, packed.bitmap, packed.offsets, chosen, t0, t1, out)
    assert result is out
    assert torch.equal(out, padded(dense * mask[..., None], tile)[rows, t0 * tile : t1 * tile])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value_dtype", FLOATS)
def test_unpack_rows_dtypes(value_dtype, dtype, device):
    # eight bits are exact in every dtype, so that no conversion may change anything
    dense = (random(3, 40, 2, dtype=torch.float64, device=device) * 8).round() / 16
    mask = random_mask(3, 40, device)
    packed = pack_by_hand(dense, mask, 32, value_dtype)
    out = torch.full((3, 64, 2), float("nan"), dtype=dtype, device=device)
    unpack_rows(packed.values, None, packed.bitmap, packed.offsets, torch.arange(3, device=device), 0, 2, out)
    assert torch.equal(out, padded(dense * mask[..., None], 32).to(dtype))


def test_unpack_rows_not_finite(device):
    dense = torch.zeros(2, 32, 2, device=device)
    dense[0, 3], dense[1, 31] = torch.tensor([float("nan"), 1.0]), torch.tensor([float("-inf"), float("nan")])
    packed = pack_by_hand(dense, dense.isnan().any(-1), 32, torch.float32)
    out = torch.full((2, 32, 2), 7.0, device=device)
    unpack_rows(packed.values, None, packed.bitmap, packed.offsets, torch.arange(2, device=device), 0, 1, out)
    assert torch.equal(out.isnan(), dense.isnan())
    assert torch.equal(out.nan_to_num(), dense.nan_to_num())


def test_round_trip(device):
    """What pack_rows writes chunk by chunk, unpack_rows reads."""
    rows, length, tile = 4, 100, 32
    dense = random(rows, length, 2, dtype=torch.float32, device=device)
    y = padded(dense, tile)
    bitmap = torch.full((rows, 4, tile // 8), 0xA5, dtype=torch.uint8, device=device)
    offsets = torch.full((rows, 4), -7, dtype=torch.int32, device=device)
    values = torch.full((rows * length, 2), float("nan"), device=device)
    cursor = torch.zeros(1, dtype=torch.int64, device=device)
    for chosen, t0, t1 in (([1, 3], 0, 4), ([0, 2], 2, 4), ([0, 2], 0, 2)):
        chunk = y[chosen, t0 * tile : t1 * tile]
        pack_rows(chunk, length, 1.2, torch.tensor(chosen, device=device), t0, bitmap, offsets, values, cursor)
    out = torch.full_like(y, float("nan"))
    unpack_rows(values, None, bitmap, offsets, torch.arange(rows, device=device), 0, 4, out)
    keep = dense.norm(dim=-1) >= 1.2
    keep[0] = True
    assert torch.equal(out, padded(dense * keep[..., None], tile))


def by_hand(kind: str, z: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dz/dx, dz/ds) of z = s h(x / s), from x."""
    h = {"tanh": torch.tanh, "softsign": torch.nn.functional.softsign, "asinh": torch.asinh, "atan": torch.atan}[kind]
    inverse = {
        "tanh": torch.atanh,
        "softsign": lambda q: q / (1 - q.abs()),
        "asinh": torch.sinh,
        "atan": torch.tan,
    }[kind]
    x, s = (scale * inverse(z / scale)).requires_grad_(), scale.expand_as(z).clone().requires_grad_()
    return torch.autograd.grad((s * h(x / s)).sum(), [x, s])


@pytest.mark.parametrize("has_scale", [False, True])
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize(
    ("tile", "batch", "channels", "rows"),
    [(32, 5, 15, [0, 1, 2, 3, 4]), (32, 1, 1, [0, 2]), (64, 64, 2, [2, 4]), (1024, 3, 500, [0, 3]), (32, 5, 15, [])],
)
def test_unpack_gradient_rows(tile, batch, channels, rows, kind, has_scale, device):
    double, length = torch.float64, batch * channels
    z = random(5, length, 2, dtype=double, device=device).tanh() * 0.9
    grad = random(5, length, 2, dtype=double, device=device, seed=5)
    scale = torch.linspace(1, 3, channels, dtype=double, device=device)
    of_row = scale.repeat(batch)[None, :, None] if has_scale else torch.ones(1, 1, 1, dtype=double, device=device)
    mask = random_mask(5, length, device)
    packed, grads = (pack_by_hand(t, mask, tile, double, np.random.default_rng(2)) for t in (z, grad))
    out = torch.full((len(rows), packed.bitmap.shape[1] * tile, 2), float("nan"), dtype=double, device=device)
    chosen = torch.tensor(rows, dtype=torch.int64, device=device)
    given = scale if has_scale else None
    grad_scale = unpack_gradient_rows(
        grads.values, packed.values, None, packed.bitmap, packed.offsets, chosen, kind, given, channels, out
    )
    to_x, to_scale = by_hand(kind, z, of_row)
    torch.testing.assert_close(out, padded(grad * to_x * mask[..., None], tile)[rows], rtol=1e-9, atol=1e-12)
    if not has_scale:
        assert grad_scale is None
        return
    terms = (grad * to_scale * mask[..., None])[rows].sum((0, 2)).view(batch, channels).sum(0)
    torch.testing.assert_close(grad_scale, terms, rtol=1e-9, atol=1e-12)


def test_unpack_gradient_rows_in_turn(device, monkeypatch):
    """Rows that one program takes one after the other, the last ones fewer, give what each gives by itself."""
    z, grad = (random(11, 50, 2, dtype=torch.float32, device=device, seed=seed).tanh() for seed in (0, 1))
    mask, scale = random_mask(11, 50, device), torch.linspace(1, 3, 10, device=device)
    packed, grads = (pack_by_hand(t, mask, 32, torch.float32) for t in (z, grad))
    found = []
    for in_turn in (1, 4):
        monkeypatch.setattr(unpack, "rows_in_turn", lambda rows, blocks, most, n=in_turn: n)
        out = torch.full((11, 64, 2), float("nan"), device=device)
        pattern = (packed.bitmap, packed.offsets, torch.arange(11, device=device))
        found.append((out, unpack_gradient_rows(grads.values, packed.values, None, *pattern, "tanh", scale, 10, out)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_unpack_gradient_rows_not_finite(device):
    """Gradients that are not finite stay where they are, and what is not kept is zero."""
    z, grad = torch.zeros(2, 32, 2, device=device), torch.zeros(2, 32, 2, device=device)
    z[1, 4, 0], grad[0, 3], grad[1, 31, 0] = float("nan"), torch.tensor([float("nan"), 1.0]), float("-inf")
    mask = (z + grad).isnan().any(-1) | grad.isinf().any(-1)
    packed, grads = (pack_by_hand(t, mask, 32, torch.float32) for t in (z, grad))
    out = torch.full((2, 32, 2), 7.0, device=device)
    rows = torch.arange(2, device=device)
    unpack_gradient_rows(grads.values, packed.values, None, packed.bitmap, packed.offsets, rows, "tanh", None, 1, out)
    expected = grad.clone()
    expected[1, 4, 0] = float("nan")
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1), (4, 4), (5, 7), (3, 8), (6, 5), (12, 13)])
@pytest.mark.parametrize(
    ("tile", "length", "t0", "t1", "count"),
    [(32, 70, 0, 3, 70), (32, 70, 1, 3, 38), (32, 70, 1, 2, 5), (64, 6, 0, 1, 6), (128, 300, 1, 3, 172)],
)
def test_unpack_planes(tile, length, t0, t1, count, size, device):
    height, width = size
    half = width // 2 + 1
    grid = grid_by_hand(height, width, device)
    stored = grid.index.numel()
    assert stored + grid.mirror_index.numel() == height * half
    dense = random(stored, length, 2, dtype=torch.float32, device=device)
    mask = random_mask(stored, length, device)
    packed = pack_by_hand(dense, mask, tile, torch.float32, np.random.default_rng(2))
    out = torch.full((count, height, half, 2), float("nan"), device=device)
    result = unpack_planes(packed.values, None, packed.bitmap, packed.offsets, grid, t0, t1, count, None, out)
    assert result is out

    chunk = torch.view_as_complex(dense * mask[..., None])[:, t0 * tile : t0 * tile + count]
    expected = torch.full((height * half, count), float("nan"), dtype=torch.complex64, device=device)
    expected[grid.index] = chunk
    expected[grid.mirror_index] = chunk[grid.mirror_row].conj()
    assert torch.equal(torch.view_as_complex(out), expected.T.reshape(count, height, half))


def test_unpack_planes_gives_real_maps(device):
    """Planes of a real map's spectrum come back whole, so that irfft2 returns the map."""
    height, width, planes = 6, 8, 40
    x = random(planes, height, width, dtype=torch.float64, device=device)
    grid = grid_by_hand(height, width, device)
    rows = torch.view_as_real(torch.fft.rfft2(x, norm="ortho").flatten(1)[:, grid.index].T.contiguous())
    packed = pack_by_hand(rows, torch.ones(rows.shape[:2], dtype=torch.bool), 32, torch.float64)
    out = torch.full((planes, height, width // 2 + 1, 2), float("nan"), dtype=torch.float64, device=device)
    unpack_planes(packed.values, None, packed.bitmap, packed.offsets, grid, 0, 2, planes, None, out)
    torch.testing.assert_close(torch.view_as_complex(out), torch.fft.rfft2(x, norm="ortho"), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value_dtype", FLOATS)
def test_unpack_planes_row_scale(value_dtype, dtype, device):
    grid = grid_by_hand(5, 6, device)
    stored = grid.index.numel()
    dense = (random(stored, 40, 2, dtype=torch.float64, device=device) * 4).round() / 8
    mask = random_mask(stored, 40, device)
    packed = pack_by_hand(dense, mask, 32, value_dtype)
    # powers of two keep every dtype exact
    row_scale = 2.0 ** (torch.arange(stored, dtype=torch.float64, device=device) % 5 - 2)
    out = torch.full((40, 5, 4, 2), float("nan"), dtype=dtype, device=device)
    unpack_planes(packed.values, None, packed.bitmap, packed.offsets, grid, 0, 2, 40, row_scale, out)
    chunk = torch.view_as_complex(dense * mask[..., None] * row_scale[:, None, None])
    expected = torch.full((20, 40), float("nan"), dtype=torch.complex128, device=device)
    expected[grid.index] = chunk
    expected[grid.mirror_index] = chunk[grid.mirror_row].conj()
    assert torch.equal(out.double(), torch.view_as_real(expected.T.contiguous()).view(40, 5, 4, 2))
