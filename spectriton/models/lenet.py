"""LeNet-5 (LeCun et al. 1998) as it is run today: ReLU, maximum pooling, every map connected."""

from __future__ import annotations

from spectriton._check import fail
from spectriton.models._describe import Conv, Flatten, Layer, Linear, Pool


def describe(num_classes: int, in_channels: int, image_size: int) -> list[Layer]:
    """61,706 parameters for ten classes and one channel at 28x28 (the first convolution is padded, the second not).

    Raises:
        ValueError: images smaller than 12 pixels.
    """
    if image_size < 12:
        fail("models.build", "image_size", image_size, "at least 12 for lenet", "enlarge the images")
    side = (image_size // 2 - 4) // 2
    return [
        Conv("conv1", in_channels, 6, 5),
        Pool("pool1", 2),
        Conv("conv2", 6, 16, 5, padding="valid"),
        Pool("pool2", 2),
        Flatten(),
        Linear("fc1", 16 * side * side, 120),
        Linear("fc2", 120, 84),
        Linear("fc3", 84, num_classes, last=True),
    ]
