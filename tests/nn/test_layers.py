"""Layers: drop-ins for torch.nn where they have a counterpart, and good citizens of the ecosystem everywhere."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from spectriton import PackedSpectrum, ops
from spectriton import nn as snn
from tests import oracles


def blocks(seed: int = 0, **options: object) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        snn.ToSpectral(0.2),
        snn.SpecBlock(3, 6, 3, 0.4, **options),
        snn.SpecBlock(6, 4, (5, 3), 0.4, **options),
        snn.ToSpatial(),
    )


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    model(x).square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("padding_mode", ["circular", "zeros"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_spectral_conv2d_shares_state_with_conv2d(padding_mode: str, groups: int, bias: bool):
    conv = nn.Conv2d(3, 6, 3, padding="same", padding_mode=padding_mode, groups=groups, bias=bias).double()
    layer = snn.SpectralConv2d(3, 6, 3, padding_mode=padding_mode, groups=groups, bias=bias, dtype=torch.float64)
    layer.load_state_dict(conv.state_dict())
    conv.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-10)
    twin = snn.SpectralConv2d.from_conv2d(conv)
    assert twin.weight is conv.weight and twin.bias is conv.bias
    torch.testing.assert_close(twin(x), conv(x), rtol=0, atol=1e-10)


def test_twins_of_dilated_convolutions():
    conv = nn.Conv2d(3, 6, 3, padding=2, dilation=2, padding_mode="circular").double()
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(snn.SpectralConv2d.from_conv2d(conv)(x), conv(x), rtol=0, atol=1e-10)
    block = snn.SpecBlock.from_conv2d(conv, threshold=0.0, activation="identity")
    torch.testing.assert_close(ops.to_spatial(block(snn.ToSpectral()(x))), conv(x), rtol=0, atol=1e-10)


def test_initial_values_are_those_of_conv2d():
    made = []
    for layer in (nn.Conv2d, snn.SpectralConv2d, snn.SpecBlock):
        torch.manual_seed(3)
        made.append(layer(4, 5, 3).state_dict())
    for name in ("weight", "bias"):
        assert torch.equal(made[0][name], made[1][name]) and torch.equal(made[0][name], made[2][name])


def test_spec_block_is_the_paper_by_default():
    block = snn.SpecBlock(3, 6, 3, threshold=0.5, activation="tanh")
    assert set(dict(block.named_parameters())) == {"weight", "bias"}
    assert all(p.dtype == torch.float32 for p in block.parameters())
    x = torch.randn(2, 3, 8, 8)
    packed = ops.to_spectral(x, threshold=0.0)
    out = block(packed)
    expected = oracles.block(torch.fft.rfft2(x, norm="ortho"), (8, 8), block.weight, block.bias, 0.5, "tanh")
    torch.testing.assert_close(out.to_dense(), expected.detach(), rtol=0, atol=1e-5)
    assert block.last_density == out.density
    block_of_conv = snn.SpecBlock.from_conv2d(nn.Conv2d(3, 6, 3, padding=1), threshold=0.5)
    assert block_of_conv(packed).shape == (2, 6, 8, 8)


def test_learnt_scale_learns():
    model = blocks(activation_scale=2.0)
    scales = [p for name, p in model.named_parameters() if name.endswith("activation_scale")]
    assert [p.shape for p in scales] == [(6,), (4,)]
    gradients(model, torch.randn(2, 3, 8, 8) * 3)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scales)


@pytest.mark.parametrize("options", [{}, {"activation_scale": 2.0, "value_dtype": "int8"}])
def test_checkpointing_gives_the_same_gradients(options: dict[str, object]):
    model, x = blocks(**options), torch.randn(2, 3, 8, 8)
    expected = gradients(model, x)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            packed = checkpoint(self.inner[1], self.inner[0](x), use_reentrant=False)
            assert isinstance(packed, PackedSpectrum)
            return self.inner[3](checkpoint(self.inner[2], packed, use_reentrant=False))

    for a, b in zip(gradients(Checkpointed(), x), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_offloading_what_is_saved():
    model, x = blocks(), torch.randn(2, 3, 8, 8)
    expected = gradients(model, x)
    with torch.autograd.graph.save_on_cpu():
        got = gradients(model, x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_copies_and_state(tmp_path):
    model, x = blocks(), torch.randn(2, 3, 8, 8)
    seen: list[object] = []
    model[1].register_forward_hook(lambda module, args, out: seen.extend([args[0], out]))
    expected = model(x)
    assert [type(s) for s in seen] == [PackedSpectrum, PackedSpectrum]
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = blocks(seed=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x), expected)


def test_gradient_of_two_consumers_is_summed():
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    packed = ops.to_spectral(x, threshold=0.3)
    first, second = ops.to_spatial(packed), packed.to_dense()
    (both,) = torch.autograd.grad(first.square().sum() + second.abs().square().sum(), x, retain_graph=True)
    (a,) = torch.autograd.grad(first.square().sum(), x, retain_graph=True)
    (b,) = torch.autograd.grad(second.abs().square().sum(), x)
    torch.testing.assert_close(both, a + b)


def test_double_precision_network_and_moving():
    model = blocks().double()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert model(torch.randn(1, 3, 5, 5, dtype=torch.float64)).dtype == torch.float64
    assert "threshold=0.4" in repr(model) and "activation=tanh" in repr(model)


def test_no_gradient_asked_for():
    model = blocks()
    with torch.no_grad():
        assert not model(torch.randn(1, 3, 6, 6)).requires_grad
    frozen = blocks().requires_grad_(False)
    x = torch.randn(1, 3, 6, 6, requires_grad=True)
    frozen(x).sum().backward()
    assert x.grad is not None
    with torch.inference_mode():
        model(torch.randn(1, 3, 6, 6))


@pytest.mark.parametrize("options", [{}, {"value_dtype": "float16", "workspace": 1}])
def test_autocast_leaves_spectra_as_they_are(options: dict[str, object]):
    """Many chunks: their float16 values are put together, which autocast to bfloat16 would refuse."""
    model, x = blocks(**options), torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    torch.testing.assert_close(y, model(x))


def test_spectral_activation_module():
    layer = snn.SpectralActivation("tanh", channels=3, scale=2.0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.complex64)
    torch.testing.assert_close(layer(x), ops.spectral_activation(x, "tanh", torch.full((3,), 2.0)))
    assert snn.SpectralActivation("asinh").scale is None


@pytest.mark.parametrize("name", ["MaxPool2d", "AvgPool2d"])
def test_pooling_modules(name: str):
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(getattr(snn, name)(3, 2)(x), getattr(nn, name)(3, 2)(x))
    torch.testing.assert_close(getattr(snn, name)(2)(x), getattr(nn, name)(2)(x))


BAD = [
    (lambda: snn.SpecBlock(3, 4, 3, threshold=-1.0), ValueError, "SpecBlock: threshold got -1.0"),
    (lambda: snn.SpecBlock(3, 4, 3, threshold=0.5, density=0.5), ValueError, "got both"),
    (lambda: snn.SpecBlock(3, 4, 3, activation="gelu"), ValueError, "activation got 'gelu'"),
    (lambda: snn.SpecBlock(3, 4, 3, activation_scale=0.0), ValueError, "positive number"),
    (lambda: snn.ToSpectral(float("nan")), ValueError, "ToSpectral: threshold got nan"),
    (lambda: snn.SpectralConv2d(3, 4, 3, padding_mode="reflect"), ValueError, "padding_mode got 'reflect'"),
    (lambda: snn.SpectralConv2d(3, 4, 3, stride=0), ValueError, "stride got 0"),
    (lambda: snn.SpectralConv2d.from_conv2d(nn.Linear(3, 4)), TypeError, "expected an nn.Conv2d"),
    (lambda: snn.SpectralConv2d.from_conv2d(nn.Conv2d(3, 4, 3)), ValueError, "padding got"),
    (lambda: snn.SpectralConv2d.from_conv2d(nn.Conv2d(3, 4, 3, padding=1, dilation=2)), ValueError, "padding"),
    (lambda: snn.SpectralConv2d(3, 4, 3, dilation=0), ValueError, "dilation"),
    (lambda: snn.SpecBlock(3, 4, 3, stride=0), ValueError, "stride got 0"),
    (lambda: snn.SpecBlock(3, 4, 3)(torch.zeros(1, 3, 4, 4)), TypeError, "ToSpectral"),
    (lambda: snn.SpecBlock(3, 4, 3)(ops.to_spectral(torch.zeros(1, 2, 4, 4), threshold=0)), ValueError, "2 channels"),
    (lambda: snn.ToSpatial()(torch.zeros(1, 3, 4, 4)), TypeError, "PackedSpectrum"),
    (lambda: snn.MaxPool2d(0), ValueError, "kernel_size got 0"),
    (lambda: snn.MaxPool2d(1.5), ValueError, "kernel_size got 1.5"),
    (lambda: snn.MaxPool2d(2, threshold=0.5, value_dtype="int2"), ValueError, "MaxPool2d: value_dtype got 'int2'"),
    (lambda: snn.ToSpectral(value_dtype="int2"), ValueError, "ToSpectral: value_dtype got 'int2'"),
    (lambda: snn.SpecBlock(3, 4, 3, value_dtype=torch.int32), ValueError, "SpecBlock: value_dtype got 'int32'"),
    (lambda: snn.SpecBlock(3, 4, 3, activation_scale=float("inf")), ValueError, "SpecBlock: activation_scale got inf"),
    (lambda: snn.SpecBlock(3, 4, 3, activation_scale="a"), TypeError, "SpecBlock: activation_scale got 'a'"),
    (lambda: snn.SpecBlock(3, 4, 3, norm="batch"), TypeError, "norm got 'batch'"),
    (lambda: snn.SpecBlock(3, 4, 3, activation="relu", pool_stride=2), ValueError, "pool_stride got 2"),
    (lambda: snn.SpecBlock(3, 4, 3, groups=2), ValueError, "SpecBlock: groups got 2, expected a divisor of 3"),
    (lambda: snn.SpecBlock(3, 4, 3, stride=1.5), ValueError, "SpecBlock: stride got 1.5"),
    (lambda: snn.SpectralConv2d(3, 0, 3), ValueError, "SpectralConv2d: out_channels got 0"),
    (lambda: snn.SpectralConv2d(3, 4, -1), ValueError, "SpectralConv2d: kernel_size got -1"),
    (lambda: snn.SpectralConv2d(3, 4, "3"), ValueError, "SpectralConv2d: kernel_size got '3'"),
    (lambda: snn.SpectralConv2d(3, 4, 3, dtype=torch.complex64), ValueError, "dtype got torch.complex64"),
    (lambda: snn.SpectralConv2d(3, 4, 3)(snn.ToSpectral()(torch.zeros(1, 3, 4, 4))), TypeError, "to_spatial"),
    (lambda: snn.GlobalMaxPool()([]), ValueError, "GlobalMaxPool: packed got an empty list"),
]


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_bad_input(call, kind: type[Exception], text: str):
    with pytest.raises(kind, match=text):
        call()


def test_sizes_may_be_numbers_of_numpy():
    two, three = np.int64(2), np.int64(3)
    layer = snn.SpectralConv2d(two, two, three, stride=two, groups=two)
    assert layer(torch.zeros(1, 2, 4, 4)).shape == (1, 2, 2, 2)
    assert snn.MaxPool2d(two)(torch.zeros(1, 2, 4, 4)).shape == (1, 2, 2, 2)


def test_forward_mode_is_refused():
    # PyTorch knows no rule for custom ops and would go on with tangents of zero.
    x = torch.randn(1, 3, 4, 4)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        snn.SpectralConv2d(3, 4, 3).requires_grad_(False)(forward_ad.make_dual(x, x))


def test_compiles_without_graph_breaks():
    model, x = blocks(activation_scale=2.0), torch.randn(2, 3, 8, 8)
    expected = gradients(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_distributed_data_parallel(tmp_path):
    """One process: what matters here is that the wrapper sees every parameter's gradient."""
    model, x = blocks(activation_scale=2.0), torch.randn(2, 3, 8, 8)
    expected = gradients(model, x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for a, b in zip(gradients(wrapped, x), expected, strict=True):
            torch.testing.assert_close(a, b)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("training", [True, False])
def test_block_with_norm_is_convolution_batch_norm_activation(training: bool):
    """Everything kept: against nn.Conv2d and nn.BatchNorm2d in space, statistics included."""
    torch.manual_seed(0)
    block = snn.SpecBlock(3, 4, 3, 0.0, "identity", norm=True, stride=2, dtype=torch.float64).train(training)
    conv = torch.nn.Conv2d(3, 4, 3, 2, 1, padding_mode="circular", dtype=torch.float64)
    norm = torch.nn.BatchNorm2d(4, dtype=torch.float64).train(training)
    with torch.no_grad():
        block.norm.weight.uniform_(0.5, 2)
        block.norm.bias.normal_()
    conv.load_state_dict({"weight": block.weight, "bias": block.bias})
    norm.load_state_dict(block.norm.state_dict())
    x = torch.randn(5, 3, 6, 8, dtype=torch.float64)
    got = snn.ToSpatial()(block(snn.ToSpectral()(x)))
    expected = norm(conv(x))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(block.norm.state_dict(), norm.state_dict(), rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(got)
    mine = torch.autograd.grad(got, (block.weight, block.norm.weight, block.norm.bias), grad)
    theirs = torch.autograd.grad(expected, (conv.weight, norm.weight, norm.bias), grad)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_threshold_of_a_block_with_norm_is_meant_for_its_output():
    """Channels of any loudness keep the same fraction once the running statistics know it."""
    torch.manual_seed(0)
    block = snn.SpecBlock(2, 2, 1, 1.0, norm=True, activation_scale=3.0, bias=False)
    with torch.no_grad():
        block.weight[0] *= 100
    packed = snn.ToSpectral()(torch.randn(16, 2, 8, 8))
    for _ in range(60):
        out = block(packed)
    kept = (out.to_dense().abs() > 0).flatten(2).float().mean((0, 2))
    assert 0.1 < kept[0] < 0.9 and abs(kept[0] - kept[1]) < 0.1, kept
