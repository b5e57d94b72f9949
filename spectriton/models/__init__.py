"""The paper's networks: a spatial one and its spectral twin from one description."""

from __future__ import annotations

from typing import Any

from torch import nn

from spectriton._check import check_choice, fail
from spectriton.models import lenet
from spectriton.models._describe import Options, spatial_network, spectral_network

#: Networks by name: functions of (num_classes, in_channels, image_size) that give a description.
NETWORKS = {"lenet": lenet.describe}

VARIANTS = ("spatial", "spectral")


def build(
    name: str,
    variant: str = "spectral",
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    **options: Any,
) -> nn.Sequential:
    """Build a network or its spectral twin.

    Parameters that both have carry the same names, and under the same seed get the same initial values.

    Args:
        name: ``"lenet"``.
        variant: ``"spatial"`` is the original as users run it, ``"spectral"`` the twin with packed feature maps.
        num_classes, in_channels, image_size: of the data; images are square.
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
    settings = Options.of("models.build", **options)
    description = NETWORKS[name](num_classes, in_channels, image_size)
    return spatial_network(description) if variant == "spatial" else spectral_network(description, settings)


__all__ = ["NETWORKS", "VARIANTS", "Options", "build"]
