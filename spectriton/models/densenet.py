"""DenseNet-BC (Huang et al. 2017, arXiv 1608.06993): for small images, and DenseNet-121 and 169.

The original is a pre-activation network: batch norm and ReLU stand in front of each convolution, so every layer norms
the concatenation of all maps before it anew and keeps a copy of it for backward. The twin runs the same convolutions in
the order convolution, norm, activation: a 1x1 block on the list of packed maps, a 3x3 block on its result. Each map is
normed once, where it is made, and stored once. The norms are therefore other ones: the twin norms the outputs of
the 3x3 convolutions, of the transitions and of the stem, the original the inputs of the 1x1 convolutions, of the
transitions and of the pooling at the end. Where the original pools by the mean the twin pools by the maximum: that is
where frequencies meet.

DenseNet-121 and 169 take images of 64 pixels and more through the published stem: 7x7 with stride 2, and maximum
pooling. Smaller ones get the stem of the networks for CIFAR: 3x3 with stride 1, no pooling.
"""

from __future__ import annotations

from torch import nn

from spectriton._check import fail
from spectriton.models._describe import Conv, Dense, GlobalAvgPool, Layer, Linear, NormActivation, Pool, scaled

_BOTTLENECK = 4


def describe(
    num_classes: int,
    in_channels: int,
    image_size: int,
    width: float,
    *,
    blocks: tuple[int, ...],
    growth: int,
    imagenet: bool = False,
) -> list[Layer]:
    """Layers of a DenseNet-BC; ``width`` multiplies the growth rate.

    Published parameter counts: 769,162 for blocks (16, 16, 16), growth 12 and ten classes; 7,978,856 for DenseNet-121
    and 14,149,480 for DenseNet-169 with 1000 classes at 224x224.

    Args:
        num_classes, in_channels, image_size, width: as for :func:`spectriton.models.build`.
        blocks: layers in each dense block.
        growth: maps that a layer adds.
        imagenet: the stem for large images is there, and taken from 64 pixels on.

    Raises:
        ValueError: images that vanish when they are halved as often as the network does.
    """
    growth = scaled(growth, width)
    large = imagenet and image_size >= 64
    halvings = len(blocks) - 1 + (2 if large else 0)
    if image_size < 2**halvings:
        expected = f"at least {2**halvings} for a network that halves them {halvings} times"
        fail("models.build", "image_size", image_size, expected, "enlarge the images")
    channels = 2 * growth
    layers: list[Layer]
    if large:
        stem = Conv("conv0", in_channels, channels, 7, stride=2, bias=False, norm=True)
        layers = [stem, Pool("pool0", 3, stride=2, padding=1)]
    else:
        layers = [Conv("conv0", in_channels, channels, 3, bias=False, deferred=True)]
    for number, count in enumerate(blocks, 1):
        layers.append(Dense(f"block{number}", tuple(_layer(channels + i * growth, growth) for i in range(count))))
        channels += count * growth
        if number < len(blocks):
            layers += [
                NormActivation(f"transition{number}_norm", channels),
                Conv(f"transition{number}", channels, channels // 2, 1, bias=False, deferred=True),
                Pool(f"transition{number}_pool", 2, kind="avg"),
            ]
            channels //= 2
    return [*layers, NormActivation("norm", channels), GlobalAvgPool(), Linear("fc", channels, num_classes, last=True)]


def _layer(channels: int, growth: int) -> tuple[Conv | NormActivation, ...]:
    """A layer of a dense block: ``channels`` maps to ``growth`` new ones."""
    return (
        NormActivation("norm", channels),
        Conv("conv1", channels, _BOTTLENECK * growth, 1, bias=False, norm=True),
        Conv("conv2", _BOTTLENECK * growth, growth, 3, bias=False, deferred=True),
    )


def initialise(network: nn.Module) -> None:
    """He's initialisation by inputs for convolutions; the fully connected layer starts without bias."""
    for name, parameter in network.named_parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
