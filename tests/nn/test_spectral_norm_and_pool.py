"""Batch norm and pooling layers in packed networks, beside their spatial counterparts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spectriton import PackedSpectrum, ops
from spectriton import nn as snn
from tests import oracles

DOUBLE = torch.float64


def twins(**options: object) -> tuple[nn.BatchNorm2d, snn.SpectralBatchNorm2d]:
    """The same layer for maps and for spectra, parameters at random."""
    spatial, spectral = nn.BatchNorm2d(3, dtype=DOUBLE, **options), snn.SpectralBatchNorm2d(3, dtype=DOUBLE, **options)
    with torch.no_grad():
        for parameter in spatial.parameters():
            parameter.normal_()
    spectral.load_state_dict(spatial.state_dict())
    return spatial, spectral


def through(layer: nn.Module, x: Tensor) -> Tensor:
    return ops.to_spatial(layer(ops.to_spectral(x, threshold=0.0)))


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 0.9, "eps": 0.1}, {"affine": False}, {"track_running_stats": False}],
)
@pytest.mark.parametrize("dense", [False, True])
def test_batch_norm_follows_its_twin_through_training(options: dict[str, object], dense: bool):
    spatial, spectral = twins(**options)
    for step in range(6):
        training = step not in (3, 5)
        spatial.train(training), spectral.train(training)
        x = (2 * torch.randn(2, 3, 5, 4, dtype=DOUBLE) + step).requires_grad_()
        expected = spatial(x)
        if dense:
            got = torch.fft.irfft2(spectral(torch.fft.rfft2(x, norm="ortho")), s=(5, 4), norm="ortho")
        else:
            got = through(spectral, x)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
        grad = torch.randn_like(x)
        leaves = [[x, *layer.parameters()] for layer in (spectral, spatial)]
        for a, b in zip(
            torch.autograd.grad(got, leaves[0], grad), torch.autograd.grad(expected, leaves[1], grad), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        theirs, ours = spatial.state_dict(), spectral.state_dict()
        assert list(ours) == list(theirs)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-10)


def test_batch_norm_state_and_repr():
    spatial, spectral = twins()
    through(spectral, torch.randn(2, 3, 4, 4, dtype=DOUBLE))
    spatial.load_state_dict(spectral.state_dict())
    assert spatial.num_batches_tracked == 1
    assert repr(spectral) == repr(spatial).replace("BatchNorm2d", "SpectralBatchNorm2d")
    assert copy.deepcopy(spectral).float().running_mean.dtype == torch.float32
    spectral.reset_running_stats()
    assert spectral.num_batches_tracked == 0 and torch.equal(spectral.running_var, torch.ones(3, dtype=DOUBLE))


def test_batch_norm_refuses_what_its_twin_refuses():
    layer = snn.SpectralBatchNorm2d(3)
    with pytest.raises(ValueError, match="more than one value per channel in training"):
        layer(ops.to_spectral(torch.ones(1, 3, 1, 1), threshold=0.0))
    assert layer.eval()(ops.to_spectral(torch.ones(1, 3, 1, 1), threshold=0.0)).shape == (1, 3, 1, 1)
    with pytest.raises(ValueError, match=r"weight got .* of shape \(3,\), expected shape \(4,\)"):
        layer(ops.to_spectral(torch.ones(1, 4, 2, 2), threshold=0.0))


def test_stochastic_weight_averaging_updates_the_statistics():
    """`update_bn` looks for batch norm by its class."""
    batches = [torch.randn(4, 3, 6, 6, dtype=DOUBLE) for _ in range(3)]
    spatial, spectral = twins()
    network = nn.Sequential(snn.ToSpectral(0.0), spectral)
    torch.optim.swa_utils.update_bn(batches, nn.Sequential(spatial))
    torch.optim.swa_utils.update_bn(batches, network)
    torch.testing.assert_close(spectral.running_mean, spatial.running_mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(spectral.running_var, spatial.running_var, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "size"), [({}, (4, 3)), ({"kernel_size": (1, 3)}, (9, 2)), ({"output_size": 5}, (5, 5))]
)
def test_pooling_of_packed_maps_and_half_spectra(options: dict[str, object], size: tuple[int, int]):
    layer = snn.SpectralPool2d(**options)
    x = torch.randn(2, 3, 9, 7, dtype=DOUBLE)
    pooled = layer(x)
    assert pooled.shape == (2, 3, *size)
    torch.testing.assert_close(through(layer, x), pooled)
    half = layer(torch.fft.rfft2(x, norm="ortho"), size=(9, 7))
    torch.testing.assert_close(half, torch.fft.rfft2(pooled, norm="ortho"))


def test_pooling_settings():
    assert repr(snn.SpectralPool2d()) == "SpectralPool2d(kernel_size=(2, 2))"
    assert repr(snn.SpectralPool2d(output_size=(4, 5))) == "SpectralPool2d(output_size=(4, 5))"
    with pytest.raises(ValueError, match="SpectralPool2d: kernel_size got 0"):
        snn.SpectralPool2d(0)
    with pytest.raises(ValueError, match="SpectralPool2d: output_size got"):
        snn.SpectralPool2d(output_size=(4, 0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        snn.ToSpectral(0.2),
        snn.SpecBlock(3, 6, 3, 0.4, "identity"),
        snn.SpectralBatchNorm2d(6),
        snn.SpectralPool2d(2),
        snn.SpecBlock(6, 4, 3, 0.4),
        snn.ToSpatial(),
    )


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    model(x).square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_in_a_packed_network():
    model, x = network(), torch.randn(2, 3, 8, 8)
    seen: list[object] = []
    for layer in model[2:4]:
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
    expected = gradients(model, x)
    assert len(expected) == 1 + len(list(model.parameters()))
    assert [type(s) for s in seen] == [PackedSpectrum, PackedSpectrum]
    with torch.autograd.graph.save_on_cpu():
        for a, b in zip(gradients(model, x), expected, strict=True):
            torch.testing.assert_close(a, b)
    with torch.inference_mode():
        assert model.eval()(x).shape == (2, 4, 4, 4)


def test_checkpointing():
    model, x = network(), torch.randn(2, 3, 8, 8)
    expected = gradients(model, x)

    class Checkpointed(nn.Sequential):
        def forward(self, packed: PackedSpectrum) -> PackedSpectrum:
            return checkpoint(super().forward, packed, use_reentrant=False)  # type: ignore[no-any-return]

    parts = nn.Sequential(model[:2], Checkpointed(*model[2:5]), model[5])
    for a, b in zip(gradients(parts, x), expected, strict=True):
        torch.testing.assert_close(a, b)


ACTIVATIONS = [{"activation_scale": 3.0}, {"activation": "relu"}, {"activation": "relu", "pool": 2}]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", ACTIVATIONS)
def test_checkpointing_of_blocks_with_norm(use_reentrant: bool, options: dict[str, object]):
    """Thresholds that follow running statistics are the same the second time, and each batch counts once."""
    torch.manual_seed(0)
    plain = nn.Sequential(*(snn.SpecBlock(4, 4, 3, threshold=0.5, norm=True, **options) for _ in range(2)))
    again = copy.deepcopy(plain)
    x = torch.randn(3, 4, 8, 8, requires_grad=True)
    enter, leave = snn.ToSpectral(threshold=0.3), snn.ToSpatial()

    def whole(x: Tensor) -> Tensor:
        return leave(again(enter(x)))

    for _ in range(2):  # the second time the statistics have moved
        expected = torch.autograd.grad(leave(plain(enter(x))).square().sum(), (x, *plain.parameters()))
        again.zero_grad()
        x.grad = None
        checkpoint(whole, x, use_reentrant=use_reentrant).square().sum().backward()
        for a, b in zip((x.grad, *(p.grad for p in again.parameters())), expected, strict=True):
            torch.testing.assert_close(a, b)
    for a, b in zip(again.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_without_graph_breaks():
    model, x = network(), torch.randn(2, 3, 8, 8)
    model[2].momentum = None  # the cumulative mean, of which the share depends on a buffer
    other = copy.deepcopy(model)
    expected = gradients(model, x)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(other[2].running_var, model[2].running_var)
    assert other[2].num_batches_tracked == 1


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("pool", [None, 2])
def test_blocks_with_relu_equal_dense_layers(norm: bool, pool: int | None):
    """Two blocks and their gradients, thresholds being masks on the way."""
    torch.manual_seed(0)
    options = {"activation": "relu", "norm": norm, "pool": pool, "dtype": torch.float64}
    blocks = nn.Sequential(snn.SpecBlock(3, 4, 3, 0.4, **options), snn.SpecBlock(4, 3, 3, 0.4, **options))
    x = torch.randn(4, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    got = snn.ToSpatial()(blocks(snn.ToSpectral()(x)))

    def masked(maps: Tensor, threshold: float | Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(maps, norm="ortho")
        keep = ~(spectrum.abs() < threshold)
        keep[..., 0, 0] = True
        return torch.fft.irfft2(spectrum * keep, s=maps.shape[2:], norm="ortho")

    maps = x
    for block in blocks:
        # The running deviation of a norm that has seen no batch is one: the threshold is that of the convolution.
        deviation = 1.0 if block.norm is None else (1 + block.norm.eps) ** 0.5
        maps = oracles.same_conv2d(maps, block.weight, block.bias, 1)
        maps = masked(maps, 0.4 * deviation)
        if block.norm is not None:
            maps = nn.functional.batch_norm(maps, None, None, block.norm.weight, block.norm.bias, training=True)
        maps = maps.relu() if pool is None else nn.functional.max_pool2d(maps.relu(), pool)
        maps = masked(maps, 0.4)
    torch.testing.assert_close(got, maps, rtol=0, atol=1e-10)
    grad = torch.randn_like(got)
    leaves = [x, *blocks.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, leaves, grad) for y in (got, maps)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_what_blocks_with_relu_say_of_themselves():
    """Sizes are of what backward holds: with a norm the convolution, otherwise what comes after the relu."""
    packed = snn.ToSpectral()(torch.randn(2, 4, 8, 8)).requires_grad_()
    for options, held in (({"norm": True}, 1), ({"norm": True, "pool": 2}, 2), ({}, 1), ({"pool": 2}, 1)):
        block = snn.SpecBlock(4, 4, 3, 0.2, "relu", **options)
        out = block(packed)
        assert block.relu.last_density == out.density and 0 < block.last_density <= 1
        sizes = [size for size in (block.last_packed, block.relu.last_packed) if size is not None]
        assert len(sizes) == held
        if not options.get("norm") or "pool" in options:
            assert sizes[-1] == out.packed_size
    assert "kernel_size=(2, 2), stride=(2, 2), threshold=0.2" in repr(block)
    with pytest.raises(ValueError, match="SpecBlock: pool got 2, expected none without relu"):
        snn.SpecBlock(4, 4, 3, pool=2)
    with pytest.raises(ValueError, match="SpecBlock: activation_scale got"):
        snn.SpecBlock(4, 4, 3, activation="relu", activation_scale=1.0)


@pytest.mark.parametrize("options", ACTIVATIONS[:2])
def test_blocks_with_norm_keep_one_packed_copy_each(options: dict[str, object]):
    """What the convolution gave, and of the norm and the activation behind it a few numbers a channel.

    For a relu also its pattern and a bit a value.
    """
    torch.manual_seed(0)
    packed = snn.ToSpectral(threshold=0.5)(torch.randn(16, 8, 16, 16))
    blocks = [snn.SpecBlock(8, 8, 3, threshold=0.5, norm=True, **options) for _ in range(3)]
    given: list[PackedSpectrum] = []
    for block in blocks:
        block.norm.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    saved: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        made = [packed]
        for block in blocks:
            made.append(block(made[-1]))
    parameters = {p.data_ptr() for block in blocks for p in block.parameters()}
    total = sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in parameters)
    numbers = len(blocks) * 2 * 8 * 4  # mean and variance
    if "activation" in options:
        numbers += sum(p.bitmap.nbytes + p.offsets.nbytes + p.shape.numel() // 8 for p in made[1:])
    assert total <= sum(p.nbytes for p in (packed, *given)) + numbers
    assert not {p.values.data_ptr() for p in made[1:]} & set(saved)  # beside it lies what these are made from


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (20, 17), (1, 3)])
def test_global_maximum(size: tuple[int, int]):
    """Of one packed spectrum and of several side by side; gradients too."""
    parts = [ops.to_spectral(torch.randn(2, c, *size, dtype=DOUBLE), threshold=0.5).requires_grad_() for c in (3, 2)]
    pool = snn.GlobalMaxPool()
    got, expected = pool(parts), torch.cat([ops.to_spatial(part).amax((2, 3)) for part in parts], 1)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(got)
    edges = [part.edge for part in parts]
    for a, b in zip(torch.autograd.grad(got, edges, grad), torch.autograd.grad(expected, edges, grad), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(pool(parts[0]), got[:, :3])
