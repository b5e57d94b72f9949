"""ResNet-18 (He et al. 2015, arXiv 1512.03385).

Images above 64 pixels go through the published stem: 7x7 with stride 2, and maximum pooling. Smaller ones get the stem
that is usual for CIFAR: 3x3 with stride 1, no pooling.
"""

from __future__ import annotations

from torch import nn

from spectriton.models._describe import Conv, GlobalAvgPool, Layer, Linear, Pool, Residual, scaled

_STAGES = (64, 128, 256, 512)
_BLOCKS = 2


def describe(num_classes: int, in_channels: int, image_size: int, width: float) -> list[Layer]:
    """11,689,512 parameters for 1000 classes and three channels at 224x224; 11,173,962 for ten classes at 32x32."""
    channels = scaled(_STAGES[0], width)
    if image_size > 64:
        stem = Conv("conv1", in_channels, channels, 7, stride=2, bias=False, norm=True)
        layers: list[Layer] = [stem, Pool("pool1", 3, stride=2, padding=1)]
    else:
        layers = [Conv("conv1", in_channels, channels, 3, bias=False, norm=True)]
    for stage, full in enumerate(_STAGES, 1):
        outputs = scaled(full, width)
        for number in range(1, _BLOCKS + 1):
            stride = 2 if stage > 1 and number == 1 else 1
            layers.append(_block(f"layer{stage}_{number}", channels, outputs, stride))
            channels = outputs
    return [*layers, GlobalAvgPool(), Linear("fc", channels, num_classes, last=True)]


def _block(name: str, inputs: int, outputs: int, stride: int) -> Residual:
    """Two convolutions; the shortcut has one of its own where the size of the maps changes."""
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = Conv("shortcut", inputs, outputs, 1, stride=stride, bias=False, norm=True, activation=False)
    return Residual(
        name,
        (
            Conv("conv1", inputs, outputs, 3, stride=stride, bias=False, norm=True),
            Conv("conv2", outputs, outputs, 3, bias=False, norm=True, activation=False),
        ),
        shortcut,
    )


def initialise(network: nn.Module) -> None:
    """He's initialisation by outputs for convolutions."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
