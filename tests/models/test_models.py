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


@pytest.mark.parametrize(
    ("name", "size", "classes", "published"),
    [
        ("alexnet", 224, 1000, 61_100_840),
        ("vgg16", 224, 1000, 138_357_544),
        ("vgg16_bn", 224, 1000, 138_365_992),
        ("vgg16_bn", 32, 10, 14_728_266),
        ("resnet18", 224, 1000, 11_689_512),
        ("resnet18", 32, 10, 11_173_962),
        ("resnet50", 224, 1000, 25_557_032),
        ("densenet", 32, 10, 769_162),
        ("densenet40", 32, 10, 176_122),
        ("densenet121", 224, 1000, 7_978_856),
        ("densenet169", 224, 1000, 14_149_480),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, size: int, classes: int, published: int):
    with torch.device("meta"):
        network = models.build(name, "spatial", classes, 3, size)
    assert parameters(network) == published


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("name", [name for name in models.NETWORKS if name != "lenet"])
def test_originals_take_small_and_large_images(name: str, size: int):
    with torch.device("meta"):
        network = models.build(name, "spatial", 7, 3, size)
        assert network(torch.empty(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "size", "sizes"),
    [
        ("alexnet", 32, {"conv1": 16, "pool1": 8, "conv2": 8, "pool2": 4, "conv5": 4, "pool5": 2}),
        ("alexnet", 224, {"conv1": 55, "pool1": 27, "conv2": 27, "pool2": 13, "conv5": 13, "pool5": 6}),
        ("vgg16_bn", 32, {"conv1_1": 32, "conv2_1": 16, "conv5_3": 2, "pool5": 1}),
        ("vgg16", 224, {"conv1_1": 224, "conv3_3": 56, "conv5_3": 14, "pool5": 7}),
        ("resnet18", 64, {"conv1": 64, "layer1_2": 64, "layer2_1": 32, "layer4_2": 8}),
        ("resnet18", 224, {"conv1": 112, "pool1": 56, "layer1_1": 56, "layer4_2": 7}),
        ("resnet50", 224, {"pool1": 56, "layer1_3": 56, "layer2_1.branch.conv1": 56, "layer2_4": 28, "layer4_3": 7}),
        ("densenet", 32, {"conv0": 32, "block1": 32, "block2": 16, "block3": 8}),
        ("densenet121", 32, {"conv0": 32, "block1": 32, "block4": 4}),
        ("densenet121", 224, {"conv0": 112, "pool0": 56, "block1": 56, "transition1_pool": 28, "block4": 7}),
    ],
)
def test_maps_have_the_published_sizes(name: str, size: int, sizes: dict[str, int]):
    seen = {}
    with torch.device("meta"):
        network = models.build(name, "spatial", 10, 3, size)
        for layer in sizes:
            network.get_submodule(layer).register_forward_hook(
                lambda module, args, out, layer=layer: seen.update({layer: out.shape[-1]})
            )
        network(torch.empty(1, 3, size, size))
    assert seen == sizes


def test_dense_connections_reach_every_layer():
    """DenseNet-BC by its definition: 1x1 to 4k maps, 3x3 to k maps, norm and ReLU in front, everything concatenated."""
    torch.manual_seed(0)
    network = models.build("densenet40", "spatial", 10, 3, 8).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight)
    x = torch.randn(2, 24, 8, 8)
    maps = [x]
    for layer in network.block1:
        h = layer.norm(torch.cat(maps, 1)).relu()
        h = nn.functional.conv2d(h, layer.conv1.weight)
        h = layer.conv1.norm(h).relu()
        maps.append(nn.functional.conv2d(h, layer.conv2.weight, padding=1))
    assert [m.shape[1] for m in maps] == [24] + [12] * 6
    torch.testing.assert_close(network.block1(x), torch.cat(maps, 1))


@pytest.mark.parametrize("name", list(models.NETWORKS))
def test_width_scales_channels(name: str):
    """Weights between hidden layers shrink with the square of the width."""
    counts = []
    for width in (1.0, 0.25):
        with torch.device("meta"):
            counts.append(parameters(models.build(name, "spatial", 10, 1, 32, width=width)))
    assert counts[0] / 20 < counts[1] < counts[0] / 8


@pytest.mark.parametrize(
    ("name", "layer", "deviation"),
    [
        ("vgg16_bn", "conv2_1", (2 / (128 * 9)) ** 0.5),  # by outputs
        ("resnet18", "layer2_1.shortcut.shortcut", (2 / 128) ** 0.5),  # by outputs
        ("densenet121", "block1.layer1.conv2", (2 / (128 * 9)) ** 0.5),  # by inputs
        ("alexnet", "conv2", (1 / (3 * 64 * 25)) ** 0.5),  # uniform, as PyTorch does
    ],
)
def test_initial_values_are_as_published(name: str, layer: str, deviation: float):
    torch.manual_seed(0)
    weight = models.build(name, "spatial", 10, 3, 32).get_submodule(layer).weight.detach()
    assert abs(float(weight.mean())) < 0.02 * deviation
    assert float(weight.std()) == pytest.approx(deviation, rel=0.02)
    if name == "vgg16_bn":
        network = models.build(name, "spatial", 10, 3, 32)
        assert float(network.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
        assert not network.conv1_1.bias.any() and not network.fc.bias.any()


def test_residual_sums():
    torch.manual_seed(0)
    network = models.build("resnet18", "spatial", 10, 1, 28, width=0.0625).eval()
    block = network.layer2_1
    x = torch.randn(2, 4, 9, 9)
    y = block.branch.conv1(x).relu()
    assert y.shape == (2, 8, 5, 5)
    expected = (block.branch.conv2(y) + block.shortcut.shortcut(x)).relu()
    torch.testing.assert_close(block(x), expected)
    assert isinstance(network.layer2_2.shortcut, nn.Identity)


def test_bottlenecks():
    torch.manual_seed(0)
    block = models.build("resnet50", "spatial", 10, 1, 28, width=0.0625).eval().layer2_1
    assert [block.branch[name].kernel_size[0] for name in (0, 2, 4)] == [1, 3, 1]
    x = torch.randn(2, 16, 9, 9)
    y = block.branch.conv2(block.branch.conv1(x).relu()).relu()
    assert y.shape == (2, 8, 5, 5)
    torch.testing.assert_close(block(x), (block.branch.conv3(y) + block.shortcut.shortcut(x)).relu())


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
    expected = spatial.pool2(spatial.conv2(x))
    got = spectral.pool2(spectral.conv2(snn.ToSpectral()(x)))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_paper_keeps_to_the_paper():
    options = {"threshold": 0.7, "activation": "asinh", "activation_scale": 3.0, "value_dtype": "int8"}
    network = models.build("lenet", "spectral", 10, 1, 28, paper=True, **options)
    found = [m for m in network.modules() if isinstance(m, snn.SpecBlock)]
    assert [b.activation for b in found] == ["tanh", "tanh"]
    assert all(b.activation_scale is None and b.value_dtype is None and b.threshold == 0.7 for b in found)
    entries = [m.threshold for m in network.modules() if isinstance(m, (snn.ToSpectral, snn.MaxPool2d))]
    assert entries == [0.7, 0.7, None]  # the last pool gives maps to the fully connected layers


def test_images_are_kept_whole_by_default():
    network = models.build("lenet", "spectral", 10, 1, 28, threshold=0.7)
    assert [m.threshold for m in network.modules() if isinstance(m, (snn.ToSpectral, snn.MaxPool2d))] == [
        0.0,
        0.7,
        None,
    ]


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
        ("alexnet", {"image_size": 36}, ValueError, "multiple of 8"),
        ("vgg16", {"image_size": 28}, ValueError, "at least 32"),
        ("densenet", {"image_size": 3}, ValueError, "at least 4"),
        ("resnet18", {}, ValueError, "residual sums.*spectriton.compress"),
        ("resnet50", {}, ValueError, "residual sums.*spectriton.compress"),
        ("lenet", {"width": 0.0}, ValueError, "width got 0"),
        ("lenet", {"width": "half"}, ValueError, "width got 'half'"),
        ("lenet", {"treshold": 0.5}, TypeError, "option got 'treshold'"),
        ("lenet", {"threshold": -1.0}, ValueError, "not negative"),
        ("lenet", {"threshold": None}, TypeError, "models.build: threshold got None"),
        ("lenet", {"threshold": 0.5, "density": 0.25}, ValueError, "threshold and density got both"),
        ("lenet", {"density": 1.5}, ValueError, "density got 1.5"),
        ("lenet", {"paper": "no"}, TypeError, "paper got 'no'"),
        ("lenet", {"activation": "gelu"}, ValueError, "activation got 'gelu'.*relu"),
    ],
)
def test_bad_input(name: str, options: dict[str, object], kind: type[Exception], text: str):
    with pytest.raises(kind, match=text):
        models.build(name, **options)
