"""ReLU in space, with batch norm before and windows behind it, against torch's own; what it saves and makes again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectriton import PackedSpectrum, memory, ops
from spectriton.ops.spatial_relu import remake_relu
from tests import oracles

DOUBLE = torch.float64
SLOW = "too slow in the interpreter; it runs on a GPU"
WINDOWS = [(1, None), (2, None), ((3, 2), (2, 1))]


def norm_parameters(channels: int, device: torch.device, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    """Weight (of both signs), bias, running mean and variance."""
    weight, bias, mean = (torch.randn(channels, dtype=dtype, device=device) for _ in range(3))
    var = torch.rand(channels, dtype=dtype, device=device) + 0.5
    return [weight.requires_grad_(), bias.requires_grad_(), mean, var]


def windows_of(maps: Tensor, kernel: int | tuple[int, int], stride: int | tuple[int, int] | None) -> Tensor:
    return maps if kernel == 1 else F.max_pool2d(maps, kernel, stride)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 5)])
@pytest.mark.parametrize(("batch", "workspace"), [(0, None), (1, None), (5, 1)])
@pytest.mark.parametrize(("kernel", "stride"), WINDOWS)
def test_relu_alone(
    backend: str,
    device: torch.device,
    size: tuple[int, int],
    batch: int,
    workspace: int | None,
    kernel: int | tuple[int, int],
    stride: tuple[int, int] | None,
):
    if backend == "triton" and device.type == "cpu" and (size, batch) != ((3, 5), 5):
        pytest.skip(SLOW)
    x = torch.randn(batch, 7, *size, dtype=DOUBLE, device=device)
    packed = ops.to_spectral(x, threshold=0.7).requires_grad_()
    got = ops.spatial_relu(packed, threshold=0.2, kernel_size=kernel, stride=stride, workspace=workspace)
    maps = ops.to_spatial(packed).relu()
    expected = ops.to_spectral(windows_of(maps, kernel, stride) if batch else maps[..., : got.shape[2], : got.shape[3]],
                               threshold=0.2)  # fmt: skip
    assert torch.equal(got.bitmap, expected.bitmap) and got.shape == expected.shape
    torch.testing.assert_close(got.to_dense(), expected.to_dense())
    grad = torch.randn_like(expected.to_dense())
    torch.testing.assert_close(*(torch.autograd.grad(y.to_dense(), packed.edge, grad) for y in (got, expected)))


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (3, 2, 7, 5), (40, 2, 4, 6)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kernel", "stride"), WINDOWS)
@pytest.mark.parametrize("workspace", [None, 1])
def test_behind_a_norm(
    backend: str,
    device: torch.device,
    shape: tuple[int, int, int, int],
    training: bool,
    kernel: int | tuple[int, int],
    stride: tuple[int, int] | None,
    workspace: int | None,
):
    """Values, running statistics and every gradient are those of torch's layers with the threshold as a mask."""
    if backend == "triton" and device.type == "cpu" and (shape != (3, 2, 7, 5) or workspace):
        pytest.skip(SLOW)
    x = (2 * torch.randn(shape, dtype=DOUBLE, device=device) + 1).requires_grad_()
    weight, bias, mean, var = norm_parameters(shape[1], device)
    packed = ops.to_spectral(x, threshold=2.0)
    got, *statistics = ops.batch_norm_relu(
        packed, weight, bias, mean, var, training, 0.3,
        threshold=0.3, kernel_size=kernel, stride=stride, workspace=workspace,
    )  # fmt: skip

    wanted = [mean.clone(), var.clone()]
    size = shape[2:]
    read = torch.fft.irfft2(oracles.masked(torch.fft.rfft2(x, norm="ortho"), 2.0), s=size, norm="ortho")
    normed = F.batch_norm(read, *wanted, weight, bias, training, 0.3)
    expected = oracles.masked(torch.fft.rfft2(windows_of(normed.relu(), kernel, stride), norm="ortho"), 0.3)
    torch.testing.assert_close(got.to_dense(), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(statistics, wanted, rtol=0, atol=1e-10)
    grad = torch.randn_like(expected)
    # Of a dense gradient what packing does not read is not handed on; both sides get it through the maps.
    leaves = [x, weight, bias]
    back = [torch.fft.irfft2(y, s=got.shape[2:], norm="ortho") for y in (got.to_dense(), expected)]
    of_maps = torch.fft.irfft2(grad, s=got.shape[2:], norm="ortho")
    for a, b in zip(*(torch.autograd.grad(y, leaves, of_maps) for y in back), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_blocks_read_what_is_made_again(backend: str, device: torch.device, training: bool, affine: bool):
    """A block behind it has the gradients that it has behind an equal spectrum whose values were kept."""
    if backend == "triton" and device.type == "cpu" and not (training and affine):
        pytest.skip(SLOW)
    x = torch.randn(3, 4, 6, 5, dtype=DOUBLE, device=device, requires_grad=True)
    weight, bias, mean, var = norm_parameters(4, device)
    if not affine:
        weight = bias = None
    packed = ops.to_spectral(x, threshold=0.8)
    made, _, _ = ops.batch_norm_relu(packed, weight, bias, mean, var, training, threshold=0.3, workspace=1 << 12)
    kept = PackedSpectrum.of((made.edge, made.values, made.scales, made.bitmap, made.offsets), made.shape, "float64")
    assert made.origin is not None and kept.origin is None
    taps = torch.randn(2, 4, 3, 3, dtype=DOUBLE, device=device, requires_grad=True)
    blocks = [ops.spec_block(p, taps, threshold=0.3) for p in (made, kept)]
    grad = torch.randn_like(blocks[0].edge)
    leaves = [x, taps, *(t for t in (weight, bias) if t is not None)]
    gradients = (torch.autograd.grad(p.edge, leaves, grad, retain_graph=True) for p in blocks)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("value_dtype", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("workspace", [None, 1])
def test_is_made_again_to_the_bit(value_dtype: str, workspace: int | None):
    x = torch.randn(5, 16, 8, 8)
    weight, bias, _, _ = norm_parameters(16, x.device, torch.float32)
    packed = ops.to_spectral(x, threshold=0.5, value_dtype=value_dtype)
    rule = {"threshold": 0.4, "workspace": workspace}
    made, _, _ = ops.batch_norm_relu(packed, weight, bias, training=True, **rule)
    assert made.origin is not None and made.layout.tiles > 1
    tensors = [x.new_empty(0) if t is None else t for t in made.origin.tensors]
    again = remake_relu(
        tensors, made.bitmap, made.offsets, made.origin.settings, list(made.shape), made.kept, torch.float32
    )
    assert torch.equal(again[0], made.values) and torch.equal(again[1], made.scales)
    other = "float32" if value_dtype != "float32" else "float16"
    for options in ({"kernel_size": 2}, {"value_dtype": other}):
        assert ops.batch_norm_relu(packed, weight, bias, training=True, **rule, **options)[0].origin is None
    with torch.no_grad():
        assert ops.batch_norm_relu(packed, weight, bias, training=True, **rule)[0].origin is None


def test_what_is_no_number_stays_one():
    """As behind torch's layers: NaN goes on in its channel (of its map, without a norm), and gradients pass there."""
    x = torch.randn(2, 3, 4, 4, dtype=DOUBLE)
    x[0, 1] = torch.nan
    packed = ops.to_spectral(x, threshold=0.1).requires_grad_()
    relu = ops.to_spatial(ops.spatial_relu(packed, threshold=0.1))
    assert relu.isnan().flatten(2).all(2).tolist() == [[False, True, False], [False] * 3]
    assert not relu[0, 0].isnan().any()
    (gradient,) = torch.autograd.grad(relu.nansum(), packed.edge)
    assert gradient.isfinite().all()
    normed = ops.to_spatial(ops.batch_norm_relu(packed, training=True, threshold=0.1)[0])
    assert normed.isnan().flatten(2).all(2).tolist() == [[False, True, False]] * 2
    assert normed[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("kernel", [1, 2])
def test_saves_one_packed_copy_and_bits(kernel: int):
    """Without a norm not even that copy: of what goes in, the pattern."""
    x = torch.randn(4, 8, 16, 16)
    weight, bias, _, _ = norm_parameters(8, x.device, torch.float32)
    packed = ops.to_spectral(x, threshold=0.7, value_dtype="int8").requires_grad_()
    outputs = 4 * 8 * (16 // kernel) ** 2
    bits = outputs // 8 + (0 if kernel == 1 else outputs * 2 // 8)
    for normed in (True, False):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            if normed:
                got, _, _ = ops.batch_norm_relu(packed, weight, bias, training=True, density=0.5, kernel_size=kernel)
            else:
                got = ops.spatial_relu(packed, density=0.5, kernel_size=kernel)
        assert got.value_dtype == "int8" and abs(got.density - 0.5) < 0.02
        patterns = sum(t.nbytes for p in (packed, got) for t in (p.bitmap, p.offsets))
        total = sum(t.untyped_storage().nbytes() for t in saved)
        numbers = 4 * 8 * 4 if normed else 0  # weight, bias, mean, variance
        copy = packed.values.nbytes + packed.scales.nbytes if normed else 0
        assert total == copy + patterns + bits + numbers


@pytest.mark.parametrize("kernel", [1, 2])
def test_holds_nothing_dense(kernel: int):
    bound = 4 << 20
    packed = ops.to_spectral(torch.randn(128, 32, 32, 32), density=0.1).requires_grad_()
    weight, bias, _, _ = norm_parameters(32, packed.device, torch.float32)
    with memory.track("cpu") as usage:
        got, _, _ = ops.batch_norm_relu(
            packed, weight, bias, training=True, density=0.1, kernel_size=kernel, workspace=bound
        )
        block = ops.spec_block(got, torch.randn(1, 32, 1, 1), threshold=1.0, workspace=bound)
        torch.autograd.grad(block.edge, packed.edge, torch.ones(block.edge.shape))
    ends = sum(p.nbytes + 8 * p.kept for p in (packed, got, block)) + 8 * packed.kept  # and their gradients
    assert usage.peak_bytes < ends + 2 * bound
    assert 2 * bound <= packed.shape.numel() * 4 // 2  # half of the maps


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("kernel", [[1, 1], [2, 2]])
def test_as_an_op(normed: bool, kernel: list[int]):
    packed = ops.to_spectral(torch.randn(2, 3, 5, 6, dtype=DOUBLE), threshold=0.5)
    fields = (packed.edge.clone().requires_grad_(), packed.values, packed.scales, packed.bitmap, packed.offsets)
    norm = norm_parameters(3, packed.device) if normed else (None,) * 4
    settings = ([2, 3, 5, 6], normed, 1e-5, kernel, kernel, 0, 0.3, -1.0, "float64")
    torch.library.opcheck(torch.ops.spectriton.spatial_relu.default, (*fields, *norm, *settings))


def test_bad_input():
    packed = ops.to_spectral(torch.randn(1, 3, 4, 4), threshold=0.5)
    with pytest.raises(TypeError, match="spatial_relu"):
        ops.spatial_relu(torch.zeros(1, 1, 4, 4), threshold=0.5)
    with pytest.raises(ValueError, match="threshold and density"):
        ops.spatial_relu(packed)
    with pytest.raises(ValueError, match="spatial_relu: kernel_size got"):
        ops.spatial_relu(packed, threshold=0.5, kernel_size=5)
    with pytest.raises(ValueError, match="spatial_relu: kernel_size got .*256 positions"):
        ops.spatial_relu(ops.to_spectral(torch.zeros(1, 1, 17, 17), threshold=0.5), threshold=0.5, kernel_size=17)
    with pytest.raises(TypeError, match="batch_norm_relu: packed got"):
        ops.batch_norm_relu(torch.zeros(1, 1, 4, 4), threshold=0.5, training=True)
    with pytest.raises(ValueError, match=r"batch_norm_relu: weight got .*shape \(3,\)"):
        ops.batch_norm_relu(packed, torch.ones(2), threshold=0.5, training=True)
    with pytest.raises(ValueError, match="batch_norm_relu: running_mean"):
        ops.batch_norm_relu(packed, threshold=0.5)
