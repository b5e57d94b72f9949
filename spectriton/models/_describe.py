"""One description of a network, and the two networks made from it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from spectriton import nn as snn
from spectriton import ops
from spectriton._check import check_choice, check_threshold, describe, fail
from spectriton.packed import PackedSpectrum

#: Activations of spectral networks: of coefficients, and ReLU in space.
ACTIVATIONS = (*ops.ACTIVATIONS, "relu")


@dataclass(frozen=True)
class Conv:
    """Convolution, batch norm where asked for, and activation.

    Attributes:
        name: of the module that holds the parameters, in both networks.
        in_channels, out_channels, kernel_size, groups, bias: as for ``nn.Conv2d``; the kernel is odd and square.
        stride: step. The twin takes its first sample at the first pixel whatever the padding, the original where
            ``padding`` puts it.
        padding: pixels on each side, "same" for ``(kernel_size - 1) // 2``, or "valid" for none.
        norm: batch norm follows.
        activation: an activation ends it.
        deferred: in the original, which is a pre-activation network, norm and activation come at each consumer
            (:class:`NormActivation`) and not here. The twin, which stores each map once, has them here: a norm for each
            consumer would need a copy of the maps for each consumer.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    padding: int | str = "same"
    groups: int = 1
    bias: bool = True
    norm: bool = False
    activation: bool = True
    deferred: bool = False

    @property
    def pad(self) -> int:
        """Pixels of padding on each side."""
        if isinstance(self.padding, int):
            return self.padding
        return (self.kernel_size - 1) // 2 if self.padding == "same" else 0


@dataclass(frozen=True)
class NormActivation:
    """Batch norm and activation in front of a convolution, in the original only: see :attr:`Conv.deferred`."""

    name: str
    channels: int


@dataclass(frozen=True)
class Dense:
    """Dense connections: each branch works on the concatenation of the input and of all branches before it."""

    name: str
    branches: tuple[tuple[Conv | NormActivation, ...], ...]


@dataclass(frozen=True)
class Residual:
    """The sum of a branch and of the input (or of ``shortcut`` of it), and ReLU; in the original only."""

    name: str
    branch: tuple[Conv, ...]
    shortcut: Conv | None = None


@dataclass(frozen=True)
class Pool:
    """Maximum ("max") or mean ("avg") of windows; the step is the window where it is left out.

    The twin takes the maximum of packed maps where the original takes the mean. Convolution, norm and activation of
    spectra work on each frequency by itself, and so does a mean; only what is done in space lets frequencies meet, and
    a network without it is a function of each of them alone.
    """

    name: str
    kernel_size: int
    kind: str = "max"
    stride: int | None = None
    padding: int = 0


@dataclass(frozen=True)
class GlobalAvgPool:
    """Mean of each map: ``(B, C, H, W)`` to ``(B, C)``; in the twin the maximum, see :class:`Pool`."""

    name: str = "pool"


@dataclass(frozen=True)
class Flatten:
    """Maps to vectors."""

    name: str = "flatten"


@dataclass(frozen=True)
class Dropout:
    """Zeroes entries of vectors with probability ``p``."""

    name: str
    p: float = 0.5


@dataclass(frozen=True)
class Linear:
    """Fully connected layer, with ReLU unless it is the last."""

    name: str
    in_features: int
    out_features: int
    last: bool = False


Layer = Conv | NormActivation | Dense | Residual | Pool | GlobalAvgPool | Flatten | Dropout | Linear


@dataclass(frozen=True)
class Options:
    """What can be chosen for a spectral twin.

    Attributes:
        threshold: modulus of the ortho spectrum below which coefficients are dropped.
        density: instead of the threshold, the fraction of coefficients to keep.
        paper: keep to arXiv 1905.10915: one threshold throughout, plain tanh, no batch norm, values in the precision of
            the network. Of the settings below only ``workspace`` is looked at then.
        input_threshold: the threshold for the images themselves; few channels cost little, so all is kept by default.
        activation: see :class:`spectriton.nn.SpecBlock`. With "relu" all frequencies meet in each block; maximum
            pooling behind it is taken in the same pass. None for relu behind a batch norm, whose pass makes the maps
            that it works on, and tanh elsewhere.
        activation_scale: initial value of the learnt scale of the activation, in units of the ortho spectrum; None for
            no scale.
        normed_activation_scale: the same behind a batch norm, which brings maps to unit deviation, for activations
            other than relu.
        value_dtype: format of the kept values; None for the precision of the network.
        workspace: bound on temporaries in bytes.
    """

    threshold: float = 0.5
    density: float | None = None
    paper: bool = False
    input_threshold: float = 0.0
    activation: str | None = None
    activation_scale: float | None = 10.0
    normed_activation_scale: float | None = 3.0
    value_dtype: torch.dtype | str | None = "float16"
    workspace: int | None = None

    @classmethod
    def of(cls, op: str, **options: Any) -> Options:
        """Options from keywords.

        Raises:
            TypeError: an unknown keyword.
            TypeError, ValueError: two rules, or a rule, activation or ``paper`` that is none.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                fail(op, "option", repr(name), f"one of {', '.join(known)}", "check the spelling", TypeError)
        settings = cls(**options)
        if settings.density is None:
            check_threshold(op, settings.threshold)
        else:
            ops.thresholding_rule(op, options.get("threshold"), settings.density, default=None)
        if not isinstance(settings.paper, bool):
            fail(op, "paper", describe(settings.paper), "True or False", "pass a bool", TypeError)
        if settings.activation is not None:
            check_choice(op, "activation", settings.activation, ACTIVATIONS)
        if settings.paper:
            return cls(
                threshold=settings.threshold,
                density=settings.density,
                paper=True,
                input_threshold=settings.threshold,
                activation_scale=None,
                normed_activation_scale=None,
                value_dtype=None,
                workspace=settings.workspace,
            )
        return settings

    def normed(self, layer: Conv) -> bool:
        """Whether the block of a convolution has a batch norm."""
        return (layer.norm or layer.deferred) and not self.paper

    def activation_of(self, layer: Conv) -> str:
        """What follows a convolution."""
        if not (layer.activation or layer.deferred):
            return "identity"
        return self.activation or ("relu" if self.normed(layer) else "tanh")

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


class NormConv2d(nn.Conv2d):
    """``nn.Conv2d`` and the ``nn.BatchNorm2d`` that follows it, as one module.

    Its parameters are then called as those of the twin's block: ``weight``, ``norm.weight``, ``norm.running_mean``, ...
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **options)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class DenseMaps(nn.Sequential):
    """Dense connections of maps: ``(B, C, H, W)`` to ``(B, C + channels of all branches, H, W)``."""

    def forward(self, x: Tensor) -> Tensor:
        for branch in self:
            x = torch.cat((x, branch(x)), 1)
        return x


class ResidualMaps(nn.Module):
    """``relu(branch(x) + shortcut(x))`` of maps ``(B, C, H, W)``."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x)
        # By a name of its own it is alive when the activation asks what the sum is made of: see spectriton.compress.
        shortcut = self.shortcut(x)
        y += shortcut
        maps: Tensor = self.activation(y)
        return maps


class DensePacked(nn.Sequential):
    """Dense connections of packed spectra: each is stored once, and the concatenation is a list of them."""

    def forward(self, packed: PackedSpectrum) -> list[PackedSpectrum]:
        maps = [packed]
        for branch in self:
            # A new list each time: whoever kept the last one (checkpointing, hooks) must not see it grow.
            maps = [*maps, branch(maps)]
        return maps


def scaled(channels: int, width: float) -> int:
    """A number of channels times the width of the network, at least one."""
    return max(1, round(channels * width))


def spatial_network(layers: Sequence[Layer]) -> nn.Sequential:
    """The original: ``nn.Conv2d``, ``nn.BatchNorm2d``, ReLU in place, pooling of ``torch.nn``."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for layer in layers:
        if isinstance(layer, Conv):
            normed = layer.norm and not layer.deferred
            modules[layer.name] = (NormConv2d if normed else nn.Conv2d)(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                stride=layer.stride,
                padding=layer.pad,
                groups=layer.groups,
                bias=layer.bias,
            )
            if layer.activation and not layer.deferred:
                modules[f"{layer.name}_activation"] = nn.ReLU(inplace=True)
        elif isinstance(layer, NormActivation):
            modules[layer.name] = nn.BatchNorm2d(layer.channels)
            modules[f"{layer.name}_activation"] = nn.ReLU(inplace=True)
        elif isinstance(layer, Dense):
            modules[layer.name] = DenseMaps(_numbered(layer, spatial_network))
        elif isinstance(layer, Residual):
            shortcut = nn.Identity() if layer.shortcut is None else spatial_network([layer.shortcut])
            modules[layer.name] = ResidualMaps(spatial_network(layer.branch), shortcut)
        elif isinstance(layer, Pool):
            pool = nn.MaxPool2d if layer.kind == "max" else nn.AvgPool2d
            modules[layer.name] = pool(layer.kernel_size, layer.stride, layer.padding)
        elif isinstance(layer, GlobalAvgPool):
            modules[layer.name] = nn.AdaptiveAvgPool2d(1)
            modules[f"{layer.name}_flatten"] = nn.Flatten()
        else:
            _add_head(modules, layer)
    return nn.Sequential(modules)


def spectral_network(layers: Sequence[Layer], options: Options) -> nn.Sequential:
    """The twin: runs of convolutions become packed blocks between a :class:`ToSpectral` and a :class:`ToSpatial`."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    packed = False

    def enter(name: str) -> None:
        nonlocal packed
        if not packed:
            rule = options.rule() if modules else {"threshold": options.input_threshold}
            modules[f"{name}_to_spectral"] = snn.ToSpectral(
                **rule, value_dtype=options.value_dtype, workspace=options.workspace
            )
            packed = True

    def leave(name: str) -> None:
        nonlocal packed
        if packed:
            modules[f"{name}_to_spatial"] = snn.ToSpatial(options.workspace)
            packed = False

    cropped = 0
    taken = rectified = False  # whether the pooling that comes next is part of its block, and ReLU follows it
    for number, layer in enumerate(layers):
        following, after = [*layers[number + 1 : number + 3], None, None][:2]
        if isinstance(layer, Conv):
            enter(layer.name)
            margin = (layer.kernel_size - 1) // 2 - layer.pad
            pool, kind = None, options.activation_of(layer)
            if kind == "relu" and isinstance(following, Pool) and following.kind == "max":
                # Maximum and ReLU commute: both are taken of the same maps, or the smaller maps are rectified.
                taken = isinstance(after, (Conv, Dense)) and not following.padding and margin <= 0
                rectified = not isinstance(after, (Conv, Dense)) or (margin > 0 and not following.padding)
                pool = following if taken else None
                kind = "identity" if rectified else kind
            modules[layer.name] = _block(layer, options, kind, pool)
            if margin > 0 and layer.stride == 1:
                # Away from the edges a circular convolution is the same, so cropping gives the one with less padding.
                if isinstance(following, Pool) and following.kind == "max" and not following.padding:
                    cropped = margin  # by the pooling, of chunks of maps
                else:
                    leave(layer.name)
                    modules[f"{layer.name}_crop"] = Crop2d(margin)
        elif isinstance(layer, Dense):
            enter(layer.name)
            modules[layer.name] = DensePacked(
                _numbered(
                    layer,
                    lambda branch: nn.Sequential(
                        OrderedDict(
                            (conv.name, _block(conv, options, options.activation_of(conv)))
                            for conv in branch
                            if isinstance(conv, Conv)
                        )
                    ),
                )
            )
        elif isinstance(layer, Residual):
            fix = "build the spatial variant, and let spectriton.compress reduce its memory"
            fail("models.build", "variant", "'spectral'", "'spatial' for a network with residual sums", fix)
        elif isinstance(layer, Pool) and taken:
            taken = False
        elif isinstance(layer, Pool):
            if layer.padding:
                leave(layer.name)
                fill = -inf if layer.kind == "max" else 0.0
                modules[f"{layer.name}_pad"] = nn.ConstantPad2d(layer.padding, fill)
            if layer.kind == "max" or packed:
                stays = packed and isinstance(following, (Conv, Dense)) and not cropped
                modules[layer.name] = snn.MaxPool2d(
                    layer.kernel_size,
                    layer.stride,
                    margin=cropped,
                    **(options.rule() if stays else {}),
                    value_dtype=options.value_dtype,
                    workspace=options.workspace,
                )
                packed, cropped = stays, 0
            else:
                modules[layer.name] = snn.AvgPool2d(layer.kernel_size, layer.stride)
                packed = False
            if rectified:
                modules[f"{layer.name}_activation"] = nn.ReLU()
                rectified = False
        elif isinstance(layer, GlobalAvgPool):
            enter(layer.name)
            modules[layer.name] = snn.GlobalMaxPool(options.workspace)
            packed = False
        elif not isinstance(layer, NormActivation):
            leave(layer.name)
            _add_head(modules, layer)
    return nn.Sequential(modules)


def _numbered(
    layer: Dense, build: Callable[[tuple[Conv | NormActivation, ...]], nn.Module]
) -> OrderedDict[str, nn.Module]:
    """The branches of dense connections, each built, by name."""
    return OrderedDict((f"layer{number}", build(branch)) for number, branch in enumerate(layer.branches, 1))


def _block(layer: Conv, options: Options, activation: str, pool: Pool | None = None) -> snn.SpecBlock:
    """The packed block of a convolution; ``pool`` is the maximum pooling that it takes in."""
    normed = options.normed(layer)
    scale = options.normed_activation_scale if normed else options.activation_scale
    return snn.SpecBlock(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        activation=activation,
        activation_scale=None if activation in ("identity", "relu") else scale,
        groups=layer.groups,
        bias=layer.bias,
        value_dtype=options.value_dtype,
        workspace=options.workspace,
        stride=layer.stride,
        norm=normed,
        pool=None if pool is None else pool.kernel_size,
        pool_stride=None if pool is None else pool.stride,
        **options.rule(),
    )


def _add_head(modules: OrderedDict[str, nn.Module], layer: Flatten | Dropout | Linear) -> None:
    """Layers that both networks have."""
    if isinstance(layer, Flatten):
        modules[layer.name] = nn.Flatten()
    elif isinstance(layer, Dropout):
        modules[layer.name] = nn.Dropout(layer.p)
    else:
        modules[layer.name] = nn.Linear(layer.in_features, layer.out_features)
        if not layer.last:
            modules[f"{layer.name}_activation"] = nn.ReLU(inplace=True)
