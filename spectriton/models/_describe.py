"""One description of a network, and the two networks made from it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from spectriton import nn as snn
from spectriton._check import fail


@dataclass(frozen=True)
class Conv:
    """Convolution with its activation. ``padding`` is "same", or "valid" for none."""

    name: str
    in_channels: int
    out_channels: int
    kernel_size: int
    padding: str = "same"


@dataclass(frozen=True)
class Pool:
    """Maximum of windows."""

    name: str
    kernel_size: int


@dataclass(frozen=True)
class Flatten:
    """Maps to vectors."""

    name: str = "flatten"


@dataclass(frozen=True)
class Linear:
    """Fully connected layer, with ReLU unless it is the last."""

    name: str
    in_features: int
    out_features: int
    last: bool = False


Layer = Conv | Pool | Flatten | Linear


@dataclass(frozen=True)
class Options:
    """What can be chosen for a spectral twin.

    Attributes:
        threshold: modulus of the ortho spectrum below which coefficients are dropped.
        density: instead of the threshold, the fraction of coefficients to keep.
        paper: keep to arXiv 1905.10915: one threshold throughout, plain tanh, values in the precision of the network.
            Of the settings below only ``workspace`` is looked at then.
        input_threshold: the threshold for the images themselves; few channels cost little, so all is kept by default.
        activation: see :class:`spectriton.nn.SpecBlock`.
        activation_scale: initial value of the learnt scale of the activation, in units of the ortho spectrum; None for
            no scale.
        value_dtype: format of the kept values; None for the precision of the network.
        workspace: bound on temporaries in bytes.
    """

    threshold: float = 0.5
    density: float | None = None
    paper: bool = False
    input_threshold: float = 0.0
    activation: str = "tanh"
    activation_scale: float | None = 10.0
    value_dtype: torch.dtype | str | None = "float16"
    workspace: int | None = None

    @classmethod
    def of(cls, op: str, **options: Any) -> Options:
        """Options from keywords.

        Raises:
            TypeError: an unknown keyword.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                fail(op, "option", repr(name), f"one of {', '.join(known)}", "check the spelling", TypeError)
        settings = cls(**options)
        if settings.paper:
            return cls(
                threshold=settings.threshold,
                density=settings.density,
                paper=True,
                input_threshold=settings.threshold,
                activation_scale=None,
                value_dtype=None,
                workspace=settings.workspace,
            )
        return settings

    def rule(self) -> dict[str, Any]:
        """Keywords of the thresholding rule for layers."""
        return {"density": self.density} if self.density is not None else {"threshold": self.threshold}


class Crop2d(nn.Module):
    """Takes ``margin`` rows and columns off every side of ``(B, C, H, W)``."""

    def __init__(self, margin: int) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.margin : x.shape[-2] - self.margin, self.margin : x.shape[-1] - self.margin]

    def extra_repr(self) -> str:
        return f"margin={self.margin}"


def spatial_network(layers: Sequence[Layer]) -> nn.Sequential:
    """The original: ``nn.Conv2d``, ReLU in place, ``nn.MaxPool2d``."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for layer in layers:
        if isinstance(layer, Conv):
            modules[layer.name] = nn.Conv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                padding="same" if layer.padding == "same" else 0,
            )
            modules[f"{layer.name}_activation"] = nn.ReLU(inplace=True)
        elif isinstance(layer, Pool):
            modules[layer.name] = nn.MaxPool2d(layer.kernel_size)
        else:
            _add_head(modules, layer)
    return nn.Sequential(modules)


def spectral_network(layers: Sequence[Layer], options: Options) -> nn.Sequential:
    """The twin: runs of convolutions become packed blocks between a :class:`ToSpectral` and a :class:`ToSpatial`."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    packed = False

    def leave(name: str) -> None:
        nonlocal packed
        if packed:
            modules[f"{name}_to_spatial"] = snn.ToSpatial(options.workspace)
            packed = False

    for layer in layers:
        if isinstance(layer, Conv):
            if not packed:
                rule = options.rule() if modules else {"threshold": options.input_threshold}
                modules[f"{layer.name}_to_spectral"] = snn.ToSpectral(
                    **rule, value_dtype=options.value_dtype, workspace=options.workspace
                )
                packed = True
            modules[layer.name] = snn.SpecBlock(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                activation=options.activation,
                activation_scale=options.activation_scale,
                value_dtype=options.value_dtype,
                workspace=options.workspace,
                **options.rule(),
            )
            if layer.padding == "valid":
                # Away from the edges a circular convolution is the same, so cropping gives the "valid" one.
                leave(layer.name)
                modules[f"{layer.name}_crop"] = Crop2d((layer.kernel_size - 1) // 2)
        elif isinstance(layer, Pool):
            # Packed or not: the pool gives maps.
            modules[layer.name] = snn.MaxPool2d(layer.kernel_size, workspace=options.workspace)
            packed = False
        else:
            leave(layer.name)
            _add_head(modules, layer)
    return nn.Sequential(modules)


def _add_head(modules: OrderedDict[str, nn.Module], layer: Flatten | Linear) -> None:
    """Layers that both networks have."""
    if isinstance(layer, Flatten):
        modules[layer.name] = nn.Flatten()
        return
    modules[layer.name] = nn.Linear(layer.in_features, layer.out_features)
    if not layer.last:
        modules[f"{layer.name}_activation"] = nn.ReLU(inplace=True)
