"""AlexNet for one GPU (Krizhevsky 2014, arXiv 1404.5997).

Images of 64 pixels and more go through the published stem: 11x11 with stride 4, pooling windows of 3 with stride 2.
Smaller ones get the stem that is usual for CIFAR: 3x3 with stride 2 and pooling windows of 2, so that 32 pixels become
16, 8, 4 and 2.
"""

from __future__ import annotations

from spectriton._check import fail
from spectriton.models._describe import Conv, Dropout, Flatten, Layer, Linear, Pool, scaled

_CHANNELS = (64, 192, 384, 256, 256)
_HIDDEN = 4096


def describe(num_classes: int, in_channels: int, image_size: int, width: float) -> list[Layer]:
    """61,100,840 parameters for 1000 classes and three channels at 224x224.

    Raises:
        ValueError: images whose edge is no multiple of 8, or below 32 pixels.
    """
    if image_size < 32 or image_size % 8:
        fail("models.build", "image_size", image_size, "a multiple of 8 from 32 on for alexnet", "resize the images")
    one, two, three, four, five = (scaled(channels, width) for channels in _CHANNELS)
    hidden = scaled(_HIDDEN, width)
    if image_size < 64:
        stem, window = Conv("conv1", in_channels, one, 3, stride=2), 2
        side = image_size // 16
    else:
        stem, window = Conv("conv1", in_channels, one, 11, stride=4, padding=2), 3
        side = image_size // 4 - 1
        for _ in range(3):
            side = (side - window) // 2 + 1
    return [
        stem,
        Pool("pool1", window, stride=2),
        Conv("conv2", one, two, 5),
        Pool("pool2", window, stride=2),
        Conv("conv3", two, three, 3),
        Conv("conv4", three, four, 3),
        Conv("conv5", four, five, 3),
        Pool("pool5", window, stride=2),
        Flatten(),
        Dropout("dropout6"),
        Linear("fc6", five * side * side, hidden),
        Dropout("dropout7"),
        Linear("fc7", hidden, hidden),
        Linear("fc8", hidden, num_classes, last=True),
    ]
