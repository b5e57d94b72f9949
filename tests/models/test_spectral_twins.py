"""The spectral twins of the networks that need norm, stride and concatenation in the spectrum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spectriton import memory, models
from spectriton import nn as snn

NAMES = ["alexnet", "vgg16", "vgg16_bn", "densenet40", "densenet", "densenet121", "densenet169"]
QUICK = ["alexnet", "vgg16_bn", "densenet40", "densenet121"]


def natural_images(batch: int, channels: int, size: int) -> Tensor:
    """Random images whose amplitudes fall off as 1 / f, as those of photographs do; zero mean, unit variance."""
    rows, columns = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)
    radius = (rows.square() + columns.square()).sqrt().clamp(min=1 / size)
    x = torch.fft.irfft2(torch.fft.rfft2(torch.randn(batch, channels, size, size)) / radius, s=(size, size))
    return (x - x.mean()) / x.std()


def twin(name: str, variant: str, size: int = 32, width: float = 0.1, **options: object) -> nn.Sequential:
    torch.manual_seed(5)
    return models.build(name, variant, 7, 3, size, width=width, **options)


@pytest.mark.parametrize("name", QUICK)
def test_every_parameter_gets_a_gradient(name: str):
    network = twin(name, "spectral", threshold=0.1)
    logits = network(natural_images(4, 3, 32))
    assert logits.shape == (4, 7)
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), parameter_name
        # A bias that a batch norm follows has none, in either network.
        base, _, last = parameter_name.rpartition(".")
        if last != "bias" or getattr(network.get_submodule(base), "norm", None) is None:
            assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize(("name", "width"), [("alexnet", 0.1), ("vgg16_bn", 0.05), ("densenet121", 0.1)])
def test_large_images(name: str, width: float):
    network = twin(name, "spectral", 224, width).eval()
    with torch.no_grad():
        assert network(natural_images(1, 3, 224)).shape == (1, 7)


@pytest.mark.parametrize("name", NAMES)
def test_twins_start_alike(name: str):
    """What both have carries the same names and values; what differs is what the original has at other places."""
    states = {variant: twin(name, variant).state_dict() for variant in models.VARIANTS}
    spatial, spectral = states["spatial"], states["spectral"]
    shared = spatial.keys() & spectral.keys()
    assert all(torch.equal(spatial[key], spectral[key]) for key in shared)
    assert {key for key in spectral if spectral[key].ndim > 1} == {key for key in spatial if spatial[key].ndim > 1}
    extra = {key.rpartition(".")[2] for key in spectral.keys() - shared if ".norm." not in key}
    assert extra == (set() if ".norm." in " ".join(spectral) else {"activation_scale"})
    if not name.startswith("densenet"):
        assert shared == spatial.keys()


@pytest.mark.parametrize("name", ["vgg16_bn", "densenet40"])
def test_the_original_loads_into_the_twin(name: str):
    spectral = twin(name, "spectral")
    missing, unexpected = spectral.load_state_dict(twin(name, "spatial").state_dict(), strict=False)
    if name == "vgg16_bn":
        assert not missing and not unexpected
    assert all(".norm." in key for key in missing) and all("norm." in key for key in unexpected)


@pytest.mark.parametrize(("name", "activation"), [*((name, "tanh") for name in QUICK), ("vgg16_bn", "relu")])
def test_twin_saves_less(name: str, activation: str):
    saved = {}
    for variant in models.VARIANTS:
        options = {"activation": activation} if variant == "spectral" else {}
        network = twin(name, variant, width=0.25, threshold=0.5, **options)
        x, labels = natural_images(32, 3, 32), torch.zeros(32, dtype=torch.long)
        with memory.track("cpu", model=network) as usage:
            nn.functional.cross_entropy(network(x), labels).backward()
        saved[variant] = usage.saved_bytes
    assert saved["spectral"] < 0.5 * saved["spatial"]


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_dense_connections_store_each_map_once(activation: str):
    """However many layers read it: the convolution that its batch norm normalised, and what makes the map of it."""
    network = twin("densenet40", "spectral", activation=activation)
    given = network.conv0(network.conv0_to_spectral(natural_images(8, 3, 32)))
    made, convolved = [], []
    for block in [m for m in network.block1.modules() if isinstance(m, snn.SpecBlock)]:
        block.register_forward_hook(lambda module, args, out: made.append(out))
        block.norm.register_forward_hook(lambda module, args, out: convolved.append(args[0]))
    with memory.track("cpu", model=network) as usage:
        maps = network.block1(given)
    assert maps[0] is given and [m.shape[1] for m in maps] == [2, *[1] * 6]
    assert len(made) == len(convolved) == 12
    stored = given.nbytes + sum(packed.nbytes for packed in convolved)
    if activation == "tanh":  # in the pattern of the convolution
        stored += sum(packed.values.nbytes for packed in made)
    else:  # a pattern of its own, and one bit a value
        stored += sum(packed.nbytes - packed.values.nbytes + packed.shape.numel() // 8 for packed in made)
    assert usage.saved_bytes <= 1.1 * stored


def test_one_image_in_evaluation():
    for name in ("vgg16_bn", "densenet40"):
        # Nothing is dropped or rounded: which coefficients pass a threshold may hang on the last bit.
        network = twin(name, "spectral", threshold=0.0, value_dtype=None)
        network(natural_images(8, 3, 32))
        x = natural_images(3, 3, 32)
        network.eval()
        with torch.no_grad():
            torch.testing.assert_close(torch.cat([network(image[None]) for image in x]), network(x))


@pytest.mark.parametrize("name", ["vgg16_bn", "densenet40"])
def test_paper_keeps_to_the_paper(name: str):
    network = twin(name, "spectral", threshold=0.7, paper=True, activation_scale=3.0)
    blocks = [m for m in network.modules() if isinstance(m, snn.SpecBlock)]
    assert not [key for key in network.state_dict() if ".norm." in key or "activation_scale" in key]
    assert all(b.activation == "tanh" and b.value_dtype is None and b.threshold == 0.7 for b in blocks)


@pytest.mark.parametrize("name", ["vgg16_bn", "densenet40"])
def test_learns(name: str):
    """Two kinds of images, told apart by how fast they vary."""
    network = twin(name, "spectral", width=0.25, threshold=0.3)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    labels = torch.arange(16) % 2
    x = natural_images(16, 3, 32)
    x[labels == 1] = torch.randn_like(x[labels == 1])
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("name", ["vgg16_bn", "densenet22"])
def test_frequencies_meet(name: str):
    """What a twin says of an image depends on more than its mean: something in it lets frequencies mix."""
    torch.manual_seed(0)
    network = models.build(name, "spectral", 10, 1, 32, width=0.25, threshold=0.0, value_dtype=None).eval()
    flat = torch.full((1, 1, 32, 32), 0.3)
    textured = flat + torch.randn(1, 1, 32, 32)
    textured += 0.3 - textured.mean()
    assert not torch.allclose(network(flat), network(textured), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["lenet", "vgg16_bn", "densenet22"])
def test_twins_with_relu_in_space(name: str):
    """The parameters of the original and no others; every activation of the original is there, and gradients are."""
    torch.manual_seed(0)
    options = {"threshold": 0.1, "activation": "relu", "width": 0.1}
    spectral = models.build(name, "spectral", 10, 1, 32, **options)
    spatial = models.build(name, "spatial", 10, 1, 32, width=0.1)
    assert not [key for key, _ in spectral.named_parameters() if key.endswith("activation_scale")]
    convolutions = [m for m in spatial.modules() if isinstance(m, nn.Conv2d)]
    # That of the last convolution, before the head, comes behind its pooling.
    deferred = [key for key, m in spectral.named_children() if isinstance(m, nn.ReLU) and key.startswith("pool")]
    assert len([m for m in spectral.modules() if isinstance(m, snn.SpatialReLU)]) + len(deferred) == len(convolutions)
    assert len(deferred) == (name != "densenet22")
    spectral(torch.randn(2, 1, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in spectral.parameters())
