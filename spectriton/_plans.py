"""Plans of the block codec that stay over several forward passes of a network.

Statistics of feature maps change slowly in training, and taking them and making tables of them is most of what encoding
costs beside the passes over the maps. So a network keeps, for each use of a module in a forward pass, the plan of the
maps that were encoded there. Only the means of channels are taken anew every time: that costs a single pass, and what
is not finite shows in them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spectriton._backend import backend
from spectriton.reference.block_codec import BlockLayout, Plan, Transform

__all__ = ["KeptPlan", "Place", "Plans", "in_backward"]

#: Uses of a module between two backward passes that have a place of their own; later ones take statistics of their own.
MOST_USES = 8


def is_due(use: int, refresh: int) -> bool:
    """Whether statistics are taken at the ``use``-th time, from 1.

    At first weights change fast, and with them the maps: each time up to the 16th, then every second time, from the
    32nd on every fourth, and so on up to every ``refresh``-th. No statistics are older than an eighth of all uses.
    """
    return use % min(refresh, 1 << max(0, use.bit_length() - 4)) == 0


class KeptPlan:
    """The plan of some maps, with all tables, for later maps like them.

    Args:
        x: the maps ``(B, C, H, W)``.
        layout: theirs.
        workspace: bound on temporaries in bytes.
        before: the plan so far; it stays where ``x`` has values that are not finite.
    """

    __slots__ = ("_basis", "_plan", "_runs", "_scales", "_spectrum", "layout")

    def __init__(self, x: Tensor, layout: BlockLayout, workspace: int, before: KeptPlan | None) -> None:
        self.layout = layout
        self._runs = backend(x.device)
        scales, basis, spectrum = self._runs.fit_blocks(x, layout, workspace)
        if before is not None:
            finite = torch.isfinite(scales.sum())
            scales = torch.where(finite, scales, before._scales)
            basis = torch.where(finite, basis, before._basis)
            spectrum = torch.where(finite, spectrum, before._spectrum)
        self._scales: Tensor = scales
        self._basis: Tensor = basis
        self._spectrum: Tensor = spectrum
        self._plan = self._runs.ready_plan(self._runs.block_plan((scales, basis, spectrum), layout), layout)

    def fits(self, x: Tensor, layout: BlockLayout) -> bool:
        """Whether it is one for maps ``x``."""
        return self.layout == layout and self._scales.device == x.device and self._runs is backend(x.device)

    def of_maps(self, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Plan]:
        """What to store beside the records of maps ``x``, and how to encode them."""
        mean = self._runs.channel_means(x, self.layout)
        scales = torch.cat([mean, self._scales[mean.numel() :]])
        return (scales, self._basis, self._spectrum), self._with_means(scales)

    def of_stored(self, stored: tuple[Tensor, Tensor, Tensor]) -> Plan | None:
        """How to decode records with this beside them; None where it is not by this plan that they were made."""
        scales, _, spectrum = stored
        own = self._spectrum.untyped_storage()._cdata == spectrum.untyped_storage()._cdata
        return self._with_means(scales) if own and self._runs is backend(scales.device) else None

    def _with_means(self, scales: Tensor) -> Plan:
        mean = scales[: self.layout.shape[1]]
        return Plan(Transform(mean, *self._plan.change[1:]), *self._plan[1:])

    def tensors(self) -> Iterator[Tensor]:
        """All that it holds, but for constants that others hold too."""
        yield from (self._scales, self._basis, self._spectrum)
        shared = self._plan.change.dct.untyped_storage()._cdata
        yield from (t for t in _tensors_in(self._plan) if t.untyped_storage()._cdata != shared)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickled networks begin without plans.
        return (type(None), ())


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors_in(item)


class Place:
    """One use of a module in a forward pass: the first, the second, .. one.

    One plan is kept. Maps of another layout, as the last batch of an epoch has them, take statistics of their own; they
    replace it only if maps of that layout come twice in a row, or if it has been used but once.
    """

    def __init__(self, plans: Plans) -> None:
        self.plans = plans
        self.kept: KeptPlan | None = None
        self._uses = 0
        self._last: BlockLayout | None = None

    def plan(self, x: Tensor, layout: BlockLayout, workspace: int) -> KeptPlan | None:
        """The plan for maps ``x``, which are to be encoded; None: they take statistics of their own."""
        fits = self.kept is not None and self.kept.fits(x, layout)
        if in_backward():
            # Checkpointing computes again: what came of it before changes nothing here, and comes of it once more.
            return self.kept if fits else None
        last, self._last = self._last, layout
        if not fits:
            if self._uses > 1 and last != layout:
                return None
            self._uses = 0
        self._uses += 1
        if is_due(self._uses, self.plans.refresh):
            self.kept = KeptPlan(x, layout, workspace, self.kept if fits else None)
        return self.kept

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())


class Plans:
    """All plans of a network. Copies and pickled ones are empty.

    Args:
        refresh: statistics are taken every so many forward passes, and more often at first, see :func:`is_due`.

    Attributes:
        forward: number of the present forward pass.
    """

    def __init__(self, refresh: int) -> None:
        self.refresh = refresh
        self._places: weakref.WeakKeyDictionary[nn.Module, _Uses] = weakref.WeakKeyDictionary()
        self.forward = 0
        self._decoded = False

    def place(self, module: nn.Module) -> Place | None:
        """Where the maps that ``module`` has encoded now have their plan; None: nowhere."""
        uses = self._places.get(module)
        if in_backward():
            # Of several uses nothing tells which one is computed again.
            return uses.places[0] if uses is not None and uses.count == 1 else None
        if self._decoded:
            self.forward, self._decoded = self.forward + 1, False
        if uses is None:
            uses = self._places[module] = _Uses(self.forward)
        return uses.next(self)

    def note_decoding(self) -> None:
        """What is encoded after a backward pass belongs to a new forward pass."""
        self._decoded = self._decoded or in_backward()

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept between forward passes."""
        places = [place for uses in self._places.values() for place in uses.places]
        found = [tensor for place in places if place.kept is not None for tensor in place.kept.tensors()]
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found}.values())

    def __reduce__(self) -> tuple[Any, ...]:
        return (Plans, (self.refresh,))


class _Uses:
    """The places of one module, and how often it has been used in the present forward pass."""

    def __init__(self, forward: int) -> None:
        self.places: list[Place] = []
        self.count = 0
        self._forward = forward

    def next(self, plans: Plans) -> Place | None:
        """The place of the next use."""
        if self._forward != plans.forward:
            # What the last forward pass did not use goes.
            del self.places[self.count :]
            self.count, self._forward = 0, plans.forward
        self.count += 1
        if self.count > MOST_USES:
            return None
        if self.count > len(self.places):
            self.places.append(Place(plans))
        return self.places[self.count - 1]


def in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return torch._C._current_graph_task_id() >= 0
