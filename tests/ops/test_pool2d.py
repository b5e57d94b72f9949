"""Pooling against torch's own, and what it saves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from spectriton import memory, ops
from spectriton.ops import pool2d

CASES = [
    ((8, 8), 2, None),
    ((7, 9), 2, None),
    ((9, 9), 3, 2),
    ((10, 12), (2, 3), (3, 2)),
    ((5, 5), 5, None),
    ((6, 6), 1, 2),
]


@pytest.mark.parametrize(("size", "kernel", "stride"), CASES)
@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
def test_equals_torch(size: tuple[int, int], kernel: int, stride: int | None, batch: int, name: str):
    x = torch.randn(batch, 7, *size, dtype=torch.float64, requires_grad=True)
    got, expected = getattr(ops, name)(x, kernel, stride), getattr(F, name)(x, kernel, stride)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad(got, x, grad), torch.autograd.grad(expected, x, grad))


def test_many_chunks_equal_one(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(30, 3, 6, 6, requires_grad=True)
    grad = torch.randn(30, 3, 3, 3)
    whole = ops.max_pool2d(x)
    (expected,) = torch.autograd.grad(whole, x, grad)
    monkeypatch.setattr("spectriton.ops.pool2d._CHUNK", 1)
    pieces = ops.max_pool2d(x)
    assert torch.equal(pieces, whole)
    assert torch.equal(torch.autograd.grad(pieces, x, grad)[0], expected)


@pytest.mark.parametrize(("kernel", "bits"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (16, 8)])
def test_maximum_saves_codes_only(kernel: int, bits: int):
    saved: list[torch.Tensor] = []
    x = torch.randn(8, 4, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.max_pool2d(x, kernel)
    assert sum(t.untyped_storage().nbytes() for t in saved) == y.numel() * bits // 8


def test_mean_saves_nothing():
    saved: list[torch.Tensor] = []
    x = torch.randn(8, 4, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.avg_pool2d(x, 2)
    assert not saved


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
def test_strides_nan_and_checks(name: str):
    pool, torchs = getattr(ops, name), getattr(F, name)
    x = torch.randn(2, 4, 6, 8).to(memory_format=torch.channels_last)
    torch.testing.assert_close(pool(x), torchs(x, 2))
    torch.testing.assert_close(pool(x[:, ::2, 1:]), torchs(x[:, ::2, 1:], 2))
    x[0, 0, 0, 0] = float("nan")
    assert pool(x)[0, 0, 0, 0].isnan()
    assert pool(torch.zeros(0, 4, 6, 6)).shape == (0, 4, 3, 3)
    y = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: pool(t, 2, 1), (y,))
    torch.library.opcheck(getattr(torch.ops.spectriton, name).default, (y, [2, 2], [1, 1]))


@pytest.mark.parametrize(
    ("x", "kernel", "kind", "text"),
    [
        (torch.zeros(4, 4), 2, ValueError, "4 dimensions"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.cfloat), 2, TypeError, "real"),
        (torch.zeros(1, 1, 4, 4), 5, ValueError, "at most the 4x4 maps"),
        (torch.zeros(1, 1, 40, 40), 17, ValueError, "at most 256 positions"),
        (torch.zeros(1, 1, 4, 4), 0, ValueError, "kernel_size got 0"),
    ],
)
def test_bad_input(x: torch.Tensor, kernel: int, kind: type[Exception], text: str):
    with pytest.raises(kind, match=text):
        ops.max_pool2d(x, kernel)


@pytest.mark.parametrize(("size", "kernel", "stride"), CASES)
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_maximum_of_packed_maps(backend: str, size: tuple[int, int], kernel: int, stride: int | None, batch: int):
    packed = ops.to_spectral(torch.randn(batch, 7, *size, dtype=torch.float64), threshold=0.7).requires_grad_()
    got, expected = (ops.max_pool2d(x, kernel, stride) for x in (packed, ops.to_spatial(packed)))
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(y, packed.edge, grad) for y in (got, expected)))


def test_maximum_of_packed_maps_in_chunks():
    """Whatever the workspace; nothing but codes is added to what is saved."""
    packed = ops.to_spectral(torch.randn(40, 16, 6, 6), threshold=0.7).requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        small = ops.max_pool2d(packed, workspace=1)
    expected = ops.max_pool2d(ops.to_spatial(packed))
    torch.testing.assert_close(small, expected)
    grad = torch.randn_like(small)
    torch.testing.assert_close(*(torch.autograd.grad(y, packed.edge, grad) for y in (small, expected)))
    own = packed.bitmap.nbytes + packed.offsets.nbytes
    assert sum(t.untyped_storage().nbytes() for t in saved) == own + small.numel() * 2 // 8


def test_maximum_of_packed_maps_as_an_op():
    packed = ops.to_spectral(torch.randn(2, 3, 5, 6, dtype=torch.float64), threshold=0.5)
    fields = (packed.values, packed.scales, packed.bitmap, packed.offsets)
    arguments = (packed.edge.clone().requires_grad_(), *fields, [2, 3, 5, 6], [2, 2], [2, 2], 1, 0)
    torch.library.opcheck(torch.ops.spectriton.packed_max_pool2d.default, arguments)
    with pytest.raises(ValueError, match="at most the 5x6 maps"):
        ops.max_pool2d(packed, 7)


@pytest.mark.parametrize(("size", "kernel", "stride"), [((9, 12), 2, None), ((9, 9), 3, 2), ((40, 34), 2, None)])
@pytest.mark.parametrize("batch", [0, 5])
def test_margins_are_left_out(backend: str, size: tuple[int, int], kernel: int, stride: int | None, batch: int):
    packed = ops.to_spectral(torch.randn(batch, 7, *size, dtype=torch.float64), threshold=0.7).requires_grad_()
    maps = ops.to_spatial(packed)
    expected = ops.max_pool2d(maps[..., 2:-2, 2:-2], kernel, stride)
    got = ops.max_pool2d(packed, kernel, stride, margin=2)
    torch.testing.assert_close(got, expected)
    assert torch.equal(ops.max_pool2d(maps, kernel, stride, margin=2), expected)
    grad = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(y, packed.edge, grad) for y in (got, expected)))


def test_bad_margins():
    packed = ops.to_spectral(torch.zeros(1, 1, 6, 6), threshold=0.5)
    for arguments, text in (
        ({"margin": -1}, "margin got -1"),
        ({"margin": 3}, "at most the 0x0 maps"),
        ({"margin": 1, "threshold": 0.5}, "expected 0 where the result is packed"),
    ):
        with pytest.raises(ValueError, match=text):
            ops.max_pool2d(packed, 2, **arguments)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 9, 40])  # a part of a tile of planes, several with one, whole tiles
def test_codes_of_any_chunk_of_tiles(kernel: int, stride: int, batch: int):
    """Planes innermost: written in chunks of some tiles and read in chunks of others, equal to plane by plane."""
    maps = torch.randn(batch, 8, 7, 6, dtype=torch.float64).round(decimals=1)
    maps[0, 0, 0, 0] = float("inf")
    packed = ops.to_spectral(maps, threshold=0.0)
    sizes = packed.layout
    kernels, strides = [kernel] * 2, [stride] * 2
    planes = maps.flatten(0, 1)
    pooling = pool2d._Pooling(sizes, kernels, strides, maps.device)
    assert pooling.across
    size = pool2d._output_size([7, 6], kernels, strides)
    y = pooling.empty(maps, sizes.row, size)
    codes = torch.empty(pool2d._code_bytes(sizes.row, pooling.outputs, kernels), dtype=torch.uint8)
    starts = [t * sizes.tile for t in range(sizes.tiles)]
    for first, last in zip(starts, [*starts[1:], sizes.row], strict=True):
        pooling.pool(planes[first:last], y[first:last], codes, first)
    x = planes[None].requires_grad_()
    expected = F.max_pool2d(x, kernel, stride)
    assert torch.equal(y, expected[0])
    grad = torch.randn_like(expected)
    grad[0, 0, 0, 0] = float("nan")
    got = pooling.spread(grad[0], codes, 0)
    torch.testing.assert_close(got[None], torch.autograd.grad(expected, x, grad)[0], equal_nan=True)


@pytest.mark.parametrize(("size", "kernel", "stride"), CASES)
@pytest.mark.parametrize(("batch", "workspace"), [(0, None), (1, None), (5, 1)])
def test_maximum_packed_again(
    backend: str, size: tuple[int, int], kernel: int, stride: int | None, batch: int, workspace: int | None
):
    """Equal to pooling the maps and packing the result, gradients too, whatever the workspace."""
    packed = ops.to_spectral(torch.randn(batch, 7, *size, dtype=torch.float64), threshold=0.7).requires_grad_()
    got = ops.max_pool2d(packed, kernel, stride, threshold=0.4, workspace=workspace)
    expected = ops.to_spectral(F.max_pool2d(ops.to_spatial(packed), kernel, stride), threshold=0.4)
    assert got.shape == expected.shape
    assert torch.equal(got.bitmap, expected.bitmap)
    torch.testing.assert_close(got.to_dense(), expected.to_dense())
    grad = torch.randn_like(expected.to_dense())
    torch.testing.assert_close(*(torch.autograd.grad(y.to_dense(), packed.edge, grad) for y in (got, expected)))


@pytest.mark.parametrize("value_dtype", [None, "float32", "int8"])
def test_maximum_packed_again_by_density(value_dtype: str | None):
    packed = ops.to_spectral(torch.randn(6, 16, 12, 12), threshold=0.5, value_dtype=torch.float16)
    got = ops.max_pool2d(packed, density=0.25, value_dtype=value_dtype)
    expected = ops.to_spectral(
        F.max_pool2d(ops.to_spatial(packed), 2), density=0.25, value_dtype=value_dtype or torch.float16
    )
    assert got.value_dtype == expected.value_dtype
    assert torch.equal(got.bitmap, expected.bitmap)
    torch.testing.assert_close(got.to_dense(), expected.to_dense(), rtol=1e-3, atol=1e-4)


def test_maximum_packed_again_holds_nothing_dense():
    """Codes and the two patterns are saved, and no tensor is larger than the workspace."""
    bound, saved = 4 << 20, []
    packed = ops.to_spectral(torch.randn(128, 32, 32, 32), density=0.1).requires_grad_()
    with memory.track("cpu") as usage:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            pooled = ops.max_pool2d(packed, density=0.1, workspace=bound)
        torch.autograd.grad(pooled.edge, packed.edge, torch.ones(pooled.edge.shape))
    patterns = sum(t.nbytes for x in (packed, pooled) for t in (x.bitmap, x.offsets))
    assert sum(t.untyped_storage().nbytes() for t in saved) == patterns + 128 * 32 * 16 * 16 * 2 // 8
    ends = sum(x.nbytes + 8 * x.kept for x in (packed, pooled))  # and their gradients
    assert usage.peak_bytes < ends + 2 * bound
    assert 2 * bound <= packed.shape.numel() * 4 // 2  # half of the maps


def test_maximum_packed_again_as_an_op():
    packed = ops.to_spectral(torch.randn(2, 3, 5, 6, dtype=torch.float64), threshold=0.5)
    fields = (packed.values, packed.scales, packed.bitmap, packed.offsets)
    for window, rectify in (([2, 2], False), ([1, 1], True)):
        pooling = ([2, 3, 5, 6], window, window, rectify)
        arguments = (packed.edge.clone().requires_grad_(), *fields, *pooling, 0.3, -1.0, "float64", 0)
        torch.library.opcheck(torch.ops.spectriton.repacked_pool2d.default, arguments)
    with pytest.raises(ValueError, match="use ops.to_spectral on the result"):
        ops.max_pool2d(torch.zeros(1, 1, 4, 4), threshold=0.5)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 5)])
@pytest.mark.parametrize(("batch", "workspace"), [(0, None), (1, None), (5, 1)])
def test_spatial_relu(backend: str, size: tuple[int, int], batch: int, workspace: int | None):
    packed = ops.to_spectral(torch.randn(batch, 7, *size, dtype=torch.float64), threshold=0.7).requires_grad_()
    got = ops.spatial_relu(packed, threshold=0.2, workspace=workspace)
    expected = ops.to_spectral(ops.to_spatial(packed).relu(), threshold=0.2)
    assert torch.equal(got.bitmap, expected.bitmap)
    torch.testing.assert_close(got.to_dense(), expected.to_dense())
    grad = torch.randn_like(expected.to_dense())
    torch.testing.assert_close(*(torch.autograd.grad(y.to_dense(), packed.edge, grad) for y in (got, expected)))


def test_spatial_relu_saves_a_bit_a_value():
    saved: list[torch.Tensor] = []
    packed = ops.to_spectral(torch.randn(4, 8, 16, 16), threshold=0.7, value_dtype="int8").requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        got = ops.spatial_relu(packed, density=0.5)
    assert got.value_dtype == "int8" and abs(got.density - 0.5) < 0.02
    patterns = sum(t.nbytes for x in (packed, got) for t in (x.bitmap, x.offsets))
    assert sum(t.untyped_storage().nbytes() for t in saved) == patterns + 4 * 8 * 16 * 16 // 8
    with pytest.raises(TypeError, match="spatial_relu"):
        ops.spatial_relu(torch.zeros(1, 1, 4, 4), threshold=0.5)
    with pytest.raises(ValueError, match="threshold and density"):
        ops.spatial_relu(packed)
