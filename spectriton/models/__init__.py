"""The paper's networks: a spatial one and its spectral twin from one description."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from spectriton._check import check_choice, describe, fail
from spectriton.models import alexnet, densenet, lenet, resnet, vgg
from spectriton.models._describe import ACTIVATIONS, Layer, Options, spatial_network, spectral_network


class Network(NamedTuple):
    """A network by its description.

    Attributes:
        describe: function of (num_classes, in_channels, image_size, width) that gives the layers.
        initialise: draws the initial values as published; PyTorch's own stay where it is None.
    """

    describe: Callable[[int, int, int, float], list[Layer]]
    initialise: Callable[[nn.Module], None] | None = None


def _densenet(blocks: tuple[int, ...], growth: int, imagenet: bool = False) -> Network:
    return Network(partial(densenet.describe, blocks=blocks, growth=growth, imagenet=imagenet), densenet.initialise)


#: Networks by name.
NETWORKS = {
    "lenet": Network(lenet.describe),
    "alexnet": Network(alexnet.describe),
    "vgg16": Network(vgg.describe, vgg.initialise),
    "vgg16_bn": Network(partial(vgg.describe, norm=True), vgg.initialise),
    "resnet18": Network(resnet.describe, resnet.initialise),
    "resnet50": Network(partial(resnet.describe, blocks=(3, 4, 6, 3), bottleneck=True), resnet.initialise),
    "densenet": _densenet((16, 16, 16), 12),
    "densenet40": _densenet((6, 6, 6), 12),
    "densenet22": _densenet((3, 3, 3), 12),
    "densenet121": _densenet((6, 12, 24, 16), 32, imagenet=True),
    "densenet169": _densenet((6, 12, 32, 32), 32, imagenet=True),
}

VARIANTS = ("spatial", "spectral")


def build(
    name: str,
    variant: str = "spectral",
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    *,
    width: float = 1.0,
    **options: Any,
) -> nn.Sequential:
    """Build a network or its spectral twin.

    Parameters that both have carry the same names, and under the same seed get the same initial values. A batch norm
    that follows a convolution is called ``<convolution>.norm`` in both.

    Args:
        name: ``"lenet"``, ``"alexnet"``, ``"vgg16"``, ``"vgg16_bn"`` (with batch norm), ``"densenet"`` (BC, 100 layers,
            growth 12, for small images), ``"densenet40"`` or ``"densenet22"`` (the same with fewer layers),
            ``"densenet121"`` or ``"densenet169"``, ``"resnet18"`` or ``"resnet50"`` (spatial only). Images below 64
            pixels (for ResNets, up to 64) get the small-image form of the networks for ImageNet.
        variant: ``"spatial"`` is the original as users run it, ``"spectral"`` the twin with packed feature maps.
        num_classes, in_channels, image_size: of the data; images are square.
        width: multiplies the numbers of channels (the growth rate of a DenseNet) and of hidden features.
        **options: for the spectral variant, the fields of :class:`spectriton.models.Options` (``threshold=0.5``,
            ``paper=True``, ``value_dtype``, ...). Ignored by the spatial one, so that twins are built by one call.

    Returns:
        A module from images ``(B, in_channels, image_size, image_size)`` to logits ``(B, num_classes)``.

    Raises:
        TypeError, ValueError: no such network, variant or option, or a size the network cannot take.
    """
    check_choice("models.build", "name", name, NETWORKS)
    check_choice("models.build", "variant", variant, VARIANTS)
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels), ("image_size", image_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            fail("models.build", argument, value, "a positive int", "pass the number that the data have")
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not (math.isfinite(width) and width > 0):
        fail("models.build", "width", describe(width), "a number above 0", "pass 0.5 for half the channels")
    settings = Options.of("models.build", **options)
    chosen = NETWORKS[name]
    description = chosen.describe(num_classes, in_channels, image_size, width)
    network = spatial_network(description) if variant == "spatial" else spectral_network(description, settings)
    if chosen.initialise is not None:
        chosen.initialise(network)
    return network


__all__ = ["ACTIVATIONS", "NETWORKS", "VARIANTS", "Network", "Options", "build"]
