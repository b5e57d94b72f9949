"""VGG-16 (Simonyan and Zisserman 2014, arXiv 1409.1556), with or without batch norm.

Images of 64 pixels and more end in the published head of three fully connected layers. Smaller ones end in the one that
is usual for CIFAR: 512 features to the classes.
"""

from __future__ import annotations

from torch import nn

from spectriton._check import fail
from spectriton.models._describe import Conv, Dropout, Flatten, Layer, Linear, Pool, scaled

_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
_HIDDEN = 4096


def describe(num_classes: int, in_channels: int, image_size: int, width: float, *, norm: bool = False) -> list[Layer]:
    """138,357,544 parameters for 1000 classes and three channels at 224x224, 138,365,992 with batch norm.

    At 32x32 with batch norm and ten classes there are 14,728,266.

    Raises:
        ValueError: images smaller than 32 pixels.
    """
    if image_size < 32:
        fail("models.build", "image_size", image_size, "at least 32 for vgg16", "enlarge the images")
    layers: list[Layer] = []
    channels = in_channels
    for stage, (full, convolutions) in enumerate(_STAGES, 1):
        for number in range(1, convolutions + 1):
            layers.append(Conv(f"conv{stage}_{number}", channels, scaled(full, width), 3, norm=norm))
            channels = scaled(full, width)
        layers.append(Pool(f"pool{stage}", 2))
    side = image_size // 32
    layers.append(Flatten())
    if image_size < 64:
        return [*layers, Linear("fc", channels, num_classes, last=True)]
    hidden = scaled(_HIDDEN, width)
    return [
        *layers,
        Linear("fc6", channels * side * side, hidden),
        Dropout("dropout6"),
        Linear("fc7", hidden, hidden),
        Dropout("dropout7"),
        Linear("fc8", hidden, num_classes, last=True),
    ]


def initialise(network: nn.Module) -> None:
    """He's initialisation by outputs for convolutions, normal with deviation 0.01 for fully connected layers."""
    for name, parameter in network.named_parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, 0, 0.01)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
