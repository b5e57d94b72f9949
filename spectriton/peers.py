"""What is used today to train with less memory, beside packed spectra and together with them.

==============  ========================================================================================================
``checkpoint``  ``torch.utils.checkpoint``: feature maps between segments are kept, those inside are computed again
``offload``     ``torch.autograd.graph.save_on_cpu``: what is saved for backward waits in (pinned) host memory
``bf16``        ``torch.autocast`` in bfloat16
``inplace-bn``  in-place activated batch norm (Rota Bulò et al. 2018, arXiv 1712.02616), of the package ``inplace_abn``
==============  ========================================================================================================

Each is applied to a network and to what it is compared with alike, and measured as both are without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from spectriton import _check
from spectriton.images import Images
from spectriton.measure import gradient, measure_step, relative_difference, release_memory
from spectriton.models._describe import DenseMaps, DensePacked, NormConv2d
from spectriton.packed import PackedSpectrum
from spectriton.train import TrainConfig

#: What a row calls the network by itself.
ALONE = "none"
_TIMED_STEPS = 5
_SLOPE = 0.01


@dataclass(frozen=True)
class Peer:
    """A way to train with less memory.

    Attributes:
        prepare: changes a network on the CPU; gives the one to train, with the same parameters in the same order.
        around: gives the context that a step on the device runs in.
        recipe: changes the recipe.
        obstacle: why it cannot be measured for a network under a recipe; ``None`` where it can.
        note: what to know when reading its figures.
    """

    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    around: Callable[[torch.device], AbstractContextManager[Any]] = lambda device: nullcontext()
    recipe: Callable[[TrainConfig], TrainConfig] = lambda config: config
    obstacle: Callable[[nn.Module, TrainConfig], str | None] = lambda model, config: None
    note: str | None = None


def chosen(names: Sequence[str]) -> list[str]:
    """Names of peers, each once; ``"all"`` stands for all of them.

    Raises:
        ValueError: an unknown name.
    """
    for name in names:
        _check.check_choice("compare", "peers", name, (*PEERS, "all"))
    return list(PEERS) if "all" in names else list(dict.fromkeys(names))


def measure_peers(
    build: Callable[[], nn.Module], data: Images, config: TrainConfig, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Memory and time of a training step of a network alone and with each peer.

    Args:
        build: makes the network anew, on the CPU, with the same weights each time.
        data, config: as in :func:`spectriton.train.train`.
        names: of :data:`PEERS`.

    Returns:
        A row for the network alone (``peer`` is ``"none"``) and one for each peer: ``peer``, ``note``, and the figures
        of :func:`spectriton.measure.measure_step` with ``seconds_per_step`` and ``gradient_difference`` (the largest of
        an entry to the network alone on the same batch, over its largest entry; in the row of the network alone, to
        itself when run again). A peer that cannot be measured has a ``note`` that says why, and no figures.
    """
    device = config.resolve_device()
    expected = gradient(build(), data, config)
    rows: list[dict[str, Any]] = []
    for name in (ALONE, *names):
        peer = PEERS.get(name, Peer())
        obstacle = peer.obstacle(build(), config)
        if obstacle is not None:
            rows.append({"peer": name, "note": obstacle})
            continue
        recipe, around = peer.recipe(config), partial(peer.around, device)
        found = gradient(peer.prepare(build()), data, recipe, around=around)
        release_memory()
        figures = measure_step(peer.prepare(build()), data, recipe, around=around, timed_steps=_TIMED_STEPS)
        release_memory()
        difference = relative_difference(found, expected)
        rows.append({"peer": name, "note": peer.note, **figures, "gradient_difference": difference})
    return rows


def recomputed(network: nn.Module) -> nn.Sequential:
    """A network of :mod:`spectriton.models` in about ``sqrt(n)`` segments of its ``n`` layers (arXiv 1604.06174).

    Each but the last is computed again in backward; the last would be at once. Layers of dense connections, which are
    networks themselves, have a segment for each of their branches.
    """
    layers = list(network.children())
    length = math.ceil(math.sqrt(len(layers)))
    segments: list[nn.Module] = []
    segment: list[nn.Module] = []

    def close() -> None:
        if segment:
            segments.append(Recomputed(nn.Sequential(*segment)))
            segment.clear()

    for layer in layers:
        if isinstance(layer, (DenseMaps, DensePacked)):
            close()
            segments.append(_RecomputedMaps(layer) if isinstance(layer, DenseMaps) else _recomputed_branches(layer))
            continue
        # What an in-place layer would overwrite must not be what is kept.
        if len(segment) >= length and not getattr(layer, "inplace", False):
            close()
        segment.append(layer)
    return nn.Sequential(*segments, *segment)


def _recomputed_branches(dense: DensePacked) -> DensePacked:
    """Dense connections of packed spectra, each branch computed again in backward."""
    return DensePacked(OrderedDict((name, Recomputed(branch)) for name, branch in dense.named_children()))


class Recomputed(nn.Module):
    """A module whose feature maps are computed again in backward; only its input is kept.

    The input is a tensor, a packed spectrum or a list of these. Buffers (running statistics) are then what they were in
    forward, so that they count each batch once and thresholds that follow from them are the same again.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Any:
        many = isinstance(x, list)
        parts = x if many else [x]
        # Tensors by themselves: only those go through saved-tensor hooks, to be counted and offloaded.
        kinds = [(tuple(part.shape), part.value_dtype) if isinstance(part, PackedSpectrum) else None for part in parts]
        tensors = [
            tensor
            for part in parts
            for tensor in (
                (part.edge, part.values, part.scales, part.bitmap, part.offsets)
                if isinstance(part, PackedSpectrum)
                else (part,)
            )
        ]

        def run(*given: Tensor) -> Any:
            left = iter(given)
            inputs = [
                next(left) if kind is None else PackedSpectrum.of([next(left) for _ in range(5)], *kind)
                for kind in kinds
            ]
            return self.inner(inputs if many else inputs[0])

        before = {
            module: {name: None if b is None else b.clone() for name, b in module._buffers.items()}
            for module in self.inner.modules()
        }
        return checkpoint(run, *tensors, use_reentrant=False, context_fn=lambda: (nullcontext(), _with_buffers(before)))


class _RecomputedMaps(nn.Module):
    """Dense connections of maps, each branch computed again in backward together with the concatenation it takes."""

    def __init__(self, dense: DenseMaps) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Recomputed(nn.Sequential(_Concatenation(), branch)) for branch in dense)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for branch in self.branches:
            maps = [*maps, branch(maps)]
        return torch.cat(maps, 1)


class _Concatenation(nn.Module):
    def forward(self, maps: list[Tensor]) -> Tensor:
        return torch.cat(maps, 1)


@contextmanager
def _with_buffers(values: Mapping[nn.Module, dict[str, Tensor | None]]) -> Iterator[None]:
    """Have modules work on these buffers, and give them their own back."""
    own = {module: dict(module._buffers) for module in values}
    for module, buffers in values.items():
        module._buffers.update(buffers)
    try:
        yield
    finally:
        for module, buffers in own.items():
            module._buffers.update(buffers)


def _in_place(network: nn.Module) -> nn.Module:
    """Batch norms behind convolutions, each with the ReLU that follows, as in-place activated ones."""
    kind = importlib.import_module("inplace_abn").InPlaceABN
    for conv, container, activation in _normed_and_activated(network):
        norm = conv.norm
        settings = {"eps": norm.eps, "momentum": norm.momentum}
        conv.norm = kind(norm.num_features, activation="leaky_relu", activation_param=_SLOPE, **settings)
        conv.norm.load_state_dict(norm.state_dict(), strict=False)
        setattr(container, activation, nn.Identity())
    return network


def _normed_and_activated(network: nn.Module) -> list[tuple[NormConv2d, nn.Sequential, str]]:
    """Convolutions with batch norm that a ReLU follows, with the container and the name of that ReLU."""
    return [
        (conv, container, name)
        for container in network.modules()
        if isinstance(container, nn.Sequential)
        for (_, conv), (name, activation) in pairwise(container.named_children())
        if isinstance(conv, NormConv2d) and isinstance(activation, nn.ReLU)
    ]


def _offload_obstacle(model: nn.Module, config: TrainConfig) -> str | None:
    return "the memory of a CPU is the host's" if config.resolve_device().type == "cpu" else None


def _bf16_obstacle(model: nn.Module, config: TrainConfig) -> str | None:
    return "on already (--amp bf16)" if config.amp == "bf16" else None


def _in_place_obstacle(model: nn.Module, config: TrainConfig) -> str | None:
    if not _normed_and_activated(model):
        return "no batch norm of maps behind a convolution"
    if importlib.util.find_spec("inplace_abn") is None:
        return "the package inplace_abn is not installed"
    return None


#: Peers by name.
PEERS: dict[str, Peer] = {
    "checkpoint": Peer(prepare=recomputed),
    "offload": Peer(
        around=lambda device: save_on_cpu(pin_memory=device.type == "cuda"),
        obstacle=_offload_obstacle,
    ),
    "bf16": Peer(recipe=lambda config: replace(config, amp="bf16"), obstacle=_bf16_obstacle),
    "inplace-bn": Peer(
        prepare=_in_place,
        obstacle=_in_place_obstacle,
        note=f"leaky ReLU of slope {_SLOPE} instead of ReLU, which cannot be inverted",
    ),
}
