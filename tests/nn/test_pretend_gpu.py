"""What the host does for a GPU, without one: the device's branches, and tensors left on the host."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import spectriton
from spectriton import nn as snn
from spectriton import ops
from spectriton.train import training_step
from tests import pretend_gpu

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the other tests use it"),
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.delenv("SPECTRITON_BACKEND", raising=False)
    with pretend_gpu.pretend(monkeypatch) as device:
        yield device


def test_it_is_as_strict_as_a_gpu(gpu: torch.device):
    """Otherwise the tests below would find nothing."""
    x = torch.ones(3, device=gpu)
    assert x.is_cuda and x.device == gpu and (x + 1).device == gpu and not x.cpu().is_cuda
    with pytest.raises(RuntimeError, match="two devices"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="numpy"):
        x.numpy()
    mixed = torch.ones(4, 4, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="two devices"):
        ops.complex_product(mixed.to(gpu), mixed)


def step(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Loss, gradients and buffers of a training step."""
    net.zero_grad(set_to_none=True)
    loss = functional.cross_entropy(net(images), labels)
    loss.backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return {"loss": loss.detach()} | {name: g for name, g in gradients.items() if g is not None}


def compare(net: nn.Module, gpu: torch.device, tolerance: float, run: Callable[..., dict[str, Tensor]] = step) -> None:
    """A step there against a step of the reference on the CPU."""
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    there = copy.deepcopy(net).to(gpu)
    for _ in range(2):
        expected = step(net, images, labels)
        got = run(there, images.to(gpu), labels.to(gpu))
        assert got.keys() == expected.keys()
        for name, value in got.items():
            assert value.is_cuda, name
            error = (value.cpu() - expected[name]).norm() / expected[name].norm().clamp(min=1e-3)
            assert error <= tolerance, (name, float(error))


def small(**settings: object) -> nn.Sequential:
    """Every layer, with ``settings`` for the blocks; images of 8x8."""
    torch.manual_seed(0)
    room = {"workspace": 16 << 10}  # several chunks to an op
    return nn.Sequential(
        snn.ToSpectral(0.05, **room),
        snn.SpecBlock(3, 4, 3, 0.05, **settings, **room),
        snn.MaxPool2d(2, threshold=0.05, **room),
        snn.SpecBlock(4, 4, (1, 3), 0.05, **settings, **room),
        snn.SpectralActivation("asinh", scale=2.0, channels=4),
        snn.SpecBlock(4, 4, 3, activation="identity", density=0.6, stride=2, **room),
        snn.SpectralBatchNorm2d(4, **room),
        snn.ToSpatial(**room),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


BLOCKS = {
    "paper": {},
    "norm": {"norm": True, "activation_scale": 3.0},
    "relu": {"norm": True, "activation": "relu"},
    "int8": {"norm": True, "activation": "relu", "value_dtype": torch.int8},
    "bfloat16": {"value_dtype": torch.bfloat16},
}


KINDS = [("reference", case) for case in BLOCKS] + [("triton", "paper"), ("triton", "int8")]


@pytest.mark.parametrize(("kind", "case"), KINDS)
def test_blocks(kind: str, case: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPECTRITON_BACKEND", kind)
    # A coefficient more or less that is nearly at the threshold, or rounded the other way.
    compare(small(**BLOCKS[case]), gpu, 0.02 if "value_dtype" in BLOCKS[case] else 2e-3)


def test_host_that_does_not_wait(gpu: torch.device):
    net = small(**BLOCKS["relu"])

    def run(there: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return ops.run_ahead(lambda: step(there, images, labels), there)

    compare(net, gpu, 2e-3, run)


def test_training_runs_ahead(gpu: torch.device, monkeypatch: pytest.MonkeyPatch):
    """Where there is something to be packed."""
    run_ahead, ahead = ops.run_ahead, []

    def noted(step: Callable[[], object], *modules: nn.Module) -> object:
        ahead.append(modules)
        return run_ahead(step, *modules)

    monkeypatch.setattr(ops, "run_ahead", noted)
    monkeypatch.setenv("SPECTRITON_BACKEND", "reference")
    images, labels = torch.randn(2, 3, 8, 8, device=gpu), torch.tensor([0, 3], device=gpu)
    packs, plain = small().to(gpu), nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).to(gpu)
    for net in (packs, plain):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        first, _ = training_step(net, optimizer, images, labels)
        later = [training_step(net, optimizer, images, labels)[0] for _ in range(3)][-1]
        assert later < first
    assert ahead == [(packs,)] * 4


@pytest.mark.parametrize("kind", ["reference", "triton"])
@pytest.mark.parametrize("transform", ["dct", "fft", "none", "cast"])
def test_compressed_networks(transform: str, kind: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch):
    """The forward pass is exact there, too, and the gradients are those of the same codec."""
    monkeypatch.setenv("SPECTRITON_BACKEND", kind)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 4, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Dropout(0.0),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    compare(spectriton.compress(net, transform=transform, rounding="nearest"), gpu, 0.02)
    compare(spectriton.decompress(net), gpu, 1e-5)


def test_ops(gpu: torch.device):
    """Ops by themselves, with the arguments that the layers above leave out."""
    torch.manual_seed(0)
    x, w = torch.randn(2, 4, 5, 6, requires_grad=True), torch.randn(6, 2, 3, 3)
    spectrum = torch.fft.rfft2(torch.randn(2, 4, 5, 6), norm="ortho")
    kernels = torch.randn(3, 4, 5, 4, dtype=torch.complex64)
    calls: dict[str, Callable[..., Tensor]] = {
        "zeros": lambda x, w, s, k: ops.spectral_conv2d(x, w, padding_mode="zeros", groups=2),
        "channel_mix": lambda x, w, s, k: ops.channel_mix(s, k).abs(),
        "complex_product": lambda x, w, s, k: ops.complex_product(s, s, conj_w=True).real,
        "spectral_activation": lambda x, w, s, k: ops.spectral_activation(
            s, "softsign", torch.ones_like(w[:4, 0, 0, 0])
        ).abs(),
        "kernel_spectrum": lambda x, w, s, k: ops.kernel_spectrum(w, (5, 6), groups=2),
        "density": lambda x, w, s, k: ops.pack(s, size=(5, 6), density=0.3).to_dense().abs(),
        "int4": lambda x, w, s, k: ops.pack(s, size=(5, 6), threshold=0.3, value_dtype="int4").to_dense().abs(),
        "spectral_pool2d": lambda x, w, s, k: snn.SpectralPool2d(2)(x),
        "global": lambda x, w, s, k: snn.GlobalMaxPool()(ops.to_spectral(x, threshold=0.1)),
        "max_pool2d": lambda x, w, s, k: snn.MaxPool2d(3, 2)(x),
        "avg_pool2d": lambda x, w, s, k: snn.AvgPool2d(2)(x),
    }
    there = [t.to(gpu) for t in (x, w, spectrum, kernels)]
    for name, call in calls.items():
        expected, got = call(x, w, spectrum, kernels), call(*there)
        assert got.is_cuda, name
        torch.testing.assert_close(got.cpu(), expected, msg=lambda m, name=name: f"{name}: {m}")
        if expected.requires_grad:
            (mine,) = torch.autograd.grad(got.square().sum(), there[0])
            (reference,) = torch.autograd.grad(expected.square().sum(), x)
            torch.testing.assert_close(
                mine.cpu(), reference, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}, backward: {m}"
            )


def test_packed_spectra_travel(gpu: torch.device):
    x = torch.randn(2, 3, 6, 5)
    there = ops.to_spectral(x.to(gpu), threshold=0.2, value_dtype="int8")
    assert there.device == gpu and "cuda" in repr(there)
    here = there.to("cpu")
    assert here.device.type == "cpu"
    torch.testing.assert_close(here.to_dense(), there.to_dense().cpu())
    torch.testing.assert_close(here.to(gpu).to_dense().cpu(), here.to_dense())
