"""Networks and their twins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectriton import memory, models
from spectriton import nn as snn


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_lenet_is_the_published_one():
    """LeNet-5 on 28x28 images of one channel: 61,706 parameters."""
    network = models.build("lenet", "spatial", num_classes=10, in_channels=1, image_size=28)
    assert parameters(network) == 61_706
    paper = models.build("lenet", "spectral", num_classes=10, in_channels=1, image_size=28, paper=True)
    assert parameters(paper) == 61_706


@pytest.mark.parametrize("size", [12, 28, 29, 32])
@pytest.mark.parametrize("variant", ["spatial", "spectral"])
def test_shapes_and_gradients(size: int, variant: str):
    network = models.build("lenet", variant, num_classes=7, in_channels=3, image_size=size, threshold=0.1)
    logits = network(torch.randn(4, 3, size, size))
    assert logits.shape == (4, 7)
    logits.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_twins_start_alike():
    """What both networks have is called and initialised the same under one seed."""
    states = []
    for variant in models.VARIANTS:
        torch.manual_seed(5)
        states.append(models.build("lenet", variant, 10, 1, 28).state_dict())
    shared = states[0].keys() & states[1].keys()
    assert shared == states[0].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in shared)


def test_convolutions_of_the_twin_equal_the_original():
    """Without thresholds, activation and edges, the twin's convolutions are the original's: cropping takes care."""
    torch.manual_seed(0)
    spatial = models.build("lenet", "spatial", 10, 1, 28)
    torch.manual_seed(0)
    spectral = models.build(
        "lenet", "spectral", 10, 1, 28, threshold=0.0, activation="identity", activation_scale=None, value_dtype=None
    )
    x = torch.randn(2, 6, 14, 14)
    expected = spatial.conv2(x)
    got = spectral.conv2_crop(spectral.conv2_to_spatial(spectral.conv2(spectral.conv2_to_spectral(x))))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_paper_keeps_to_the_paper():
    options = {"threshold": 0.7, "activation": "asinh", "activation_scale": 3.0, "value_dtype": "int8"}
    network = models.build("lenet", "spectral", 10, 1, 28, paper=True, **options)
    found = [m for m in network.modules() if isinstance(m, snn.SpecBlock)]
    assert [b.activation for b in found] == ["tanh", "tanh"]
    assert all(b.activation_scale is None and b.value_dtype is None and b.threshold == 0.7 for b in found)
    entries = [m.threshold for m in network.modules() if isinstance(m, snn.ToSpectral)]
    assert entries == [0.7, 0.7]


def test_images_are_kept_whole_by_default():
    network = models.build("lenet", "spectral", 10, 1, 28, threshold=0.7)
    assert [m.threshold for m in network.modules() if isinstance(m, snn.ToSpectral)] == [0.0, 0.7]


def test_twin_saves_less():
    saved = {}
    for variant in models.VARIANTS:
        network = models.build("lenet", variant, 10, 1, 28)
        x, labels = torch.rand(64, 1, 28, 28), torch.zeros(64, dtype=torch.long)
        with memory.track("cpu", model=network) as usage:
            nn.functional.cross_entropy(network(x), labels).backward()
        saved[variant] = usage.saved_bytes
    assert saved["spectral"] < 0.25 * saved["spatial"]


@pytest.mark.parametrize(
    ("name", "options", "kind", "text"),
    [
        ("lenett", {}, ValueError, "did you mean 'lenet'"),
        ("lenet", {"variant": "spektral"}, ValueError, "did you mean 'spectral'"),
        ("lenet", {"num_classes": 0}, ValueError, "num_classes got 0"),
        ("lenet", {"image_size": 8}, ValueError, "at least 12"),
        ("lenet", {"treshold": 0.5}, TypeError, "option got 'treshold'"),
        ("lenet", {"threshold": -1.0}, ValueError, "not negative"),
        ("lenet", {"activation": "relu"}, ValueError, "activation got 'relu'"),
    ],
)
def test_bad_input(name: str, options: dict[str, object], kind: type[Exception], text: str):
    with pytest.raises(kind, match=text):
        models.build(name, **options)
