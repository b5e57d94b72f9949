"""LeNet-5 (LeCun et al. 1998) as it is run today: ReLU, maximum pooling, every map connected."""

from __future__ import annotations

from spectriton._check import fail
from spectriton.models._describe import Conv, Flatten, Layer, Linear, Pool, scaled


def describe(num_classes: int, in_channels: int, image_size: int, width: float) -> list[Layer]:
    """61,706 parameters for ten classes and one channel at 28x28 (the first convolution is padded, the second not).

    Raises:
        ValueError: images smaller than 12 pixels.
    """
    if image_size < 12:
        fail("models.build", "image_size", image_size, "at least 12 for lenet", "enlarge the images")
    side = (image_size // 2 - 4) // 2
    first, second, third, fourth = (scaled(channels, width) for channels in (6, 16, 120, 84))
    return [
        Conv("conv1", in_channels, first, 5),
        Pool("pool1", 2),
        Conv("conv2", first, second, 5, padding="valid"),
        Pool("pool2", 2),
        Flatten(),
        Linear("fc1", second * side * side, third),
        Linear("fc2", third, fourth),
        Linear("fc3", fourth, num_classes, last=True),
    ]
