"""ResNet-18 and ResNet-50 (He et al. 2015, arXiv 1512.03385).

Images above 64 pixels go through the published stem: 7x7 with stride 2, and maximum pooling. Smaller ones get the stem
that is usual for CIFAR: 3x3 with stride 1, no pooling.
"""

from __future__ import annotations

from torch import nn

from spectriton.models._describe import Conv, GlobalAvgPool, Layer, Linear, Pool, Residual, scaled

_STAGES = (64, 128, 256, 512)
_EXPANSION = 4


def describe(
    num_classes: int,
    in_channels: int,
    image_size: int,
    width: float,
    *,
    blocks: tuple[int, ...] = (2, 2, 2, 2),
    bottleneck: bool = False,
) -> list[Layer]:
    """11,689,512 parameters for 1000 classes and three channels at 224x224; 11,173,962 for ten classes at 32x32.

    ``blocks`` (3, 4, 6, 3) with ``bottleneck`` are ResNet-50: 25,557,032 parameters at 224x224.
    """
    channels = scaled(_STAGES[0], width)
    if image_size > 64:
        stem = Conv("conv1", in_channels, channels, 7, stride=2, bias=False, norm=True)
        layers: list[Layer] = [stem, Pool("pool1", 3, stride=2, padding=1)]
    else:
        layers = [Conv("conv1", in_channels, channels, 3, bias=False, norm=True)]
    for stage, (full, count) in enumerate(zip(_STAGES, blocks, strict=True), 1):
        for number in range(1, count + 1):
            stride = 2 if stage > 1 and number == 1 else 1
            layers.append(_block(f"layer{stage}_{number}", channels, scaled(full, width), stride, bottleneck))
            channels = scaled(full, width) * (_EXPANSION if bottleneck else 1)
    return [*layers, GlobalAvgPool(), Linear("fc", channels, num_classes, last=True)]


def _block(name: str, inputs: int, features: int, stride: int, bottleneck: bool) -> Residual:
    """Two convolutions, or three that go through few channels; the shortcut has one of its own where sizes change.

    The 3x3 convolution of a bottleneck has the stride, as is usual since; the paper's first one would pass over three
    quarters of the maps.
    """
    outputs = features * (_EXPANSION if bottleneck else 1)
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = Conv("shortcut", inputs, outputs, 1, stride=stride, bias=False, norm=True, activation=False)
    branch: tuple[Conv, ...] = (
        Conv("conv1", inputs, features, 3, stride=stride, bias=False, norm=True),
        Conv("conv2", features, features, 3, bias=False, norm=True, activation=False),
    )
    if bottleneck:
        branch = (
            Conv("conv1", inputs, features, 1, bias=False, norm=True),
            Conv("conv2", features, features, 3, stride=stride, bias=False, norm=True),
            Conv("conv3", features, outputs, 1, bias=False, norm=True, activation=False),
        )
    return Residual(name, branch, shortcut)


def initialise(network: nn.Module) -> None:
    """He's initialisation by outputs for convolutions."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
