"""Hold a network to a budget while it trains: bytes of its packed maps, or the error of its gradient.

.. code-block:: python

    controller = BudgetController(model, saved_bytes=64 << 20)  # or saved_ratio=0.15
    for images, labels in batches:
        ...                                                     # forward, backward, update
        controller.step()

:class:`BudgetController` is for networks with packed layers: it moves their thresholds. :class:`GradientTarget` is for
networks compressed by :func:`spectriton.compress`: it chooses the bits of their codecs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from spectriton import compression, distributed
from spectriton._check import check_threshold, fail
from spectriton.codec import BlockCodec, Codec, QuantiseCodec, SpectrumCodec
from spectriton.compression import GradientReport
from spectriton.packed import PackedSize

__all__ = ["BudgetController", "GradientTarget", "packed_bytes", "parse_budget", "set_thresholds", "thresholds"]

# The share of an error that a step makes up for, were the kept coefficients inversely proportional to the threshold.
# Where they depend on it less the error keeps its sign, and the share grows; where noise or too large steps turn it
# around, the share shrinks.
_GAIN, _LEAST_GAIN, _MOST_GAIN = 0.4, 0.05, 2.0
_GROWTH, _SHRINKAGE = 1.2, 0.5
# No step changes the thresholds by more than this factor, and all of them together by no more than that.
_LARGEST_STEP = math.log(1.5)
_LARGEST_CHANGE = math.log(1e4)

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30}


def parse_budget(text: str | float) -> float | int:
    """A budget as users write it: a ratio above 0 up to 1 (a float), or bytes (an int) where there is a unit.

    Args:
        text: ``0.2``, ``"0.2"``, ``"500000B"``, ``"512KiB"``, ``"64MiB"`` or ``"1.5GiB"``.

    Raises:
        ValueError: something else.
    """
    size = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)\s*(?:([KMG])iB|B)", str(text).strip())
    if size is not None:
        count = int(float(size[1]) * (1 << _UNITS[size[2] or ""]))
        if count > 0:
            return count
    else:
        try:
            ratio = float(text)
        except ValueError:
            ratio = math.nan
        if 0 < ratio <= 1:
            return ratio
    expected = "a ratio above 0 up to 1, or a size in B, KiB, MiB or GiB"
    fail("parse_budget", "budget", repr(text), expected, "give 0.2 or 64MiB")


def _packed_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that pack, by qualified name."""
    found = model.named_modules()
    return {name: layer for name, layer in found if hasattr(layer, "threshold") and hasattr(layer, "last_packed")}


def thresholds(model: nn.Module) -> dict[str, float]:
    """The thresholds of the layers that have one, by qualified module name; moduli of the ortho spectrum."""
    layers = _packed_layers(model)
    return {name: float(layer.threshold) for name, layer in layers.items() if layer.threshold is not None}


def set_thresholds(model: nn.Module, values: Mapping[str, float]) -> None:
    """Give layers the thresholds that :func:`thresholds` found, in another copy of the network, say.

    Raises:
        ValueError: a layer of another name, or without a threshold; or what is no threshold.
    """
    known = thresholds(model)
    layers = _packed_layers(model)
    for name, value in values.items():
        if name not in known:
            expected = f"one of {', '.join(map(repr, known))}" if known else "no layer: none has a threshold"
            fail("set_thresholds", "layer", repr(name), expected, "pass the thresholds of the same network")
        layers[name].threshold = check_threshold("set_thresholds", value, name)


def packed_bytes(model: nn.Module) -> int:
    """Bytes of what the packed layers made in their last forward pass, in this process; nothing is waited for."""
    return sum(size.nbytes for _, size in _last_sizes(_packed_layers(model)))


def _last_sizes(layers: Mapping[str, Any]) -> list[tuple[str, PackedSize]]:
    return [(name, layer.last_packed) for name, layer in layers.items() if layer.last_packed is not None]


class BudgetController:
    """Moves the thresholds of a network's packed layers so that what they store holds a budget.

    All thresholds are multiplied by one common factor, adapted after each step: the bytes that can be saved at all
    (kept coefficients beyond the zero frequency; not bitmaps, offsets and scales) are compared with what the budget
    leaves for them, and the logarithm of the factor moves by a share of the logarithm of their ratio. Thresholds of 0
    (maps kept whole) and layers with a density stay as they are; their bytes count.

    It is deterministic, reads sizes only (which the host knows from the forward pass), and of several processes all
    take the same thresholds, by the mean of their bytes.

    Args:
        model: a network with layers of :mod:`spectriton.nn`.
        saved_bytes: budget of the packed maps of a training step, in each process. Smaller batches than the largest
            seen so far are given their share of it.
        saved_ratio: instead, the budget over the bytes of the same maps, dense in float32; above 0, at most 1.

    Attributes:
        factor: what the initial thresholds are multiplied with now.
        saved_bytes, saved_ratio: the budget; one of them is None.

    Raises:
        TypeError, ValueError: not one budget, a budget out of range, or a network without a threshold to move.
    """

    def __init__(self, model: nn.Module, *, saved_bytes: float | None = None, saved_ratio: float | None = None) -> None:
        op = type(self).__name__
        if not isinstance(model, nn.Module):
            fail(op, "model", model, "a torch.nn.Module", "pass the network", TypeError)
        if (saved_bytes is None) == (saved_ratio is None):
            got = "neither" if saved_bytes is None else "both"
            fail(op, "saved_bytes and saved_ratio", got, "one of them", "pass saved_ratio=0.2, or a number of bytes")
        if saved_bytes is not None and not check_threshold(op, saved_bytes, "saved_bytes") > 0:
            fail(op, "saved_bytes", saved_bytes, "a positive number of bytes", "pass 64 << 20 for 64 MiB")
        if saved_ratio is not None and not 0 < check_threshold(op, saved_ratio, "saved_ratio") <= 1:
            fail(op, "saved_ratio", saved_ratio, "a fraction above 0, at most 1", "pass 0.2")
        self.saved_bytes, self.saved_ratio = saved_bytes, saved_ratio
        self._model = model
        self._layers = _packed_layers(model)
        self._initial = {name: value for name, value in thresholds(model).items() if 0 < value < math.inf}
        if not self._initial:
            expected = "a packed layer with a threshold above 0"
            fail(op, "model", f"{len(self._layers)} packed layers, none with one", expected, "pass threshold=0.5 to it")
        self._change = 0.0  # logarithm of the factor
        self._gain = _GAIN
        self._last_error = 0.0
        self._full_batch = 0.0  # the largest mean over processes of the maps' bytes, dense

    @property
    def factor(self) -> float:
        """What the initial thresholds are multiplied with now."""
        return math.exp(self._change)

    def step(self) -> None:
        """Adapt the thresholds to the last forward pass; call it after each training step, in every process.

        Raises:
            RuntimeError: no layer has packed anything yet.
            ValueError: the budget is below what an infinite threshold would take.
        """
        op = f"{type(self).__name__}.step"
        sizes = [(name in self._initial, size) for name, size in _last_sizes(self._layers)]
        if not sizes:
            fail(op, "model", "no forward pass yet", "one", "call step() after a training step", RuntimeError)
        total = distributed.total(
            [
                sum(size.nbytes for _, size in sizes),
                sum(size.least_nbytes if moves else size.nbytes for moves, size in sizes),
                sum(size.dense_nbytes for _, size in sizes),
            ]
        )
        used, least, dense = (value / distributed.world_size() for value in total)
        self._full_batch = max(self._full_batch, dense)
        if self.saved_bytes is not None:
            budget = self.saved_bytes * dense / max(1.0, self._full_batch)
        else:
            budget = (self.saved_ratio or 0.0) * dense
        if dense == 0 or (budget <= least and dense < self._full_batch):
            return  # of the rest of a batch, padded tiles alone may take more than its share
        if budget <= least:
            fail(
                op,
                "budget",
                f"{budget:.0f} bytes",
                f"more than the {least:.0f} bytes of bitmaps, offsets, zero frequencies and layers that do not move",
                "raise the budget, or take a narrower value_dtype or fewer layers without a threshold",
            )
        # A thousandth: where nothing is left, the logarithm should still be a number.
        error = math.log(max((used - least) / (budget - least), 1e-3))
        if error * self._last_error > 0:
            self._gain = min(self._gain * _GROWTH, _MOST_GAIN)
        elif error * self._last_error < 0:
            self._gain = max(self._gain * _SHRINKAGE, _LEAST_GAIN)
        self._last_error = error
        move = max(-_LARGEST_STEP, min(self._gain * error, _LARGEST_STEP))
        self._change = max(-_LARGEST_CHANGE, min(self._change + move, _LARGEST_CHANGE))
        self._apply()

    def _apply(self) -> None:
        for name, initial in self._initial.items():
            self._layers[name].threshold = initial * self.factor

    def thresholds(self) -> dict[str, float]:
        """The thresholds of now, by qualified module name, those that stay among them."""
        return thresholds(self._model)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how a run goes on, of plain values."""
        return {
            "saved_bytes": self.saved_bytes,
            "saved_ratio": self.saved_ratio,
            "initial": dict(self._initial),
            "change": self._change,
            "gain": self._gain,
            "last_error": self._last_error,
            "full_batch": self._full_batch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; sets the thresholds of the network, and the budget.

        Raises:
            ValueError: it is that of another network.
        """
        if set(state["initial"]) != set(self._initial):
            got = f"thresholds of {', '.join(map(repr, state['initial']))}"
            expected = f"those of {', '.join(map(repr, self._initial))}"
            fail(f"{type(self).__name__}.load_state_dict", "state", got, expected, "pass the state of the same network")
        self.saved_bytes, self.saved_ratio = state["saved_bytes"], state["saved_ratio"]
        self._initial = dict(state["initial"])
        self._change, self._gain = state["change"], state["gain"]
        self._last_error, self._full_batch = state["last_error"], state["full_batch"]
        self._apply()


class GradientTarget:
    """Chooses the bits of a compressed network's codecs: as few as let the gradient reach a cosine to the exact one.

    All codecs that have bits get the same number, by bisection over a short list: every trial is one
    :func:`spectriton.compression.gradient_report` (two backward passes a batch), three or four for a list of eight.
    Of several processes all take the same bits, by the mean of their cosines.

    Args:
        model: a network compressed by :func:`spectriton.compress`; not wrapped in ``DistributedDataParallel``.
        cosine: to reach, of all parameters' gradient as one vector; above 0, below 1.
        bits: ascending; all that the codec takes, from 1 to 16, where left out.
        every: :meth:`step` measures on its first call, and once in so many calls after it.

    Attributes:
        bits: of the codecs now; None before the first measurement.
        cosine: that was reached with them, mean over the batches; None likewise. Below the target where the last entry
            of the list does not reach it either.

    Raises:
        TypeError, ValueError: the network is not compressed, its codecs have no bits or do not take these, or a number
            is out of range.
    """

    def __init__(
        self, model: nn.Module, cosine: float = 0.98, bits: Sequence[int] | None = None, *, every: int = 100
    ) -> None:
        op = type(self).__name__
        if not isinstance(model, nn.Module):
            fail(op, "model", model, "a torch.nn.Module", "pass the network", TypeError)
        if not 0 < check_threshold(op, cosine, "cosine") < 1:
            fail(op, "cosine", cosine, "a number above 0, below 1", "pass 0.98")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            fail(op, "every", every, "a whole number from 1", "pass 100")
        self._model = model
        self._modules: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "codec", None), _WITH_BITS)]
        if not self._modules:
            expected = "a network compressed with a codec that has bits"
            fail(op, "model", "a network without such a codec", expected, "call spectriton.compress(model) before")
        self._choices = tuple(_usual_bits(self._modules) if bits is None else bits)
        if not self._choices or list(self._choices) != sorted(set(self._choices)):
            fail(op, "bits", self._choices, "ascending numbers", "pass (2, 4, 8)")
        for number in self._choices:
            for module in self._modules:
                replace(module.codec, bits=number)  # says what is wrong with it
        self.target, self.every = cosine, every
        self.bits: int | None = None
        self.cosine: float | None = None
        self._calls = 0

    def measure(self, batches: Iterable[tuple[Tensor, Tensor]], **options: Any) -> GradientReport:
        """Choose the bits anew.

        Args:
            batches: pairs of inputs and labels, a few of them.
            options: ``loss`` and ``seed`` of :func:`spectriton.compression.gradient_report`.

        Returns:
            The report with the bits that were chosen.
        """
        batches = list(batches)
        reports: dict[int, tuple[float, GradientReport]] = {}

        def reached(number: int) -> bool:
            self._set(number)
            report = compression.gradient_report(self._model, batches, **options)
            cosines = distributed.gather(report.total.cosine)
            reports[number] = sum(cosines) / len(cosines), report
            return reports[number][0] >= self.target

        low, high = 0, len(self._choices) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(self._choices[middle]) else (middle + 1, high)
        chosen = self._choices[low]
        if chosen not in reports:
            reached(chosen)
        self._set(chosen)
        self.bits, (self.cosine, report) = chosen, reports[chosen]
        return report

    def step(self, batches: Iterable[tuple[Tensor, Tensor]], **options: Any) -> GradientReport | None:
        """:meth:`measure`, on the first call and every ``every``-th after it; call it once a training step.

        Returns:
            The report where something was measured.
        """
        self._calls += 1
        return self.measure(batches, **options) if (self._calls - 1) % self.every == 0 else None

    def _set(self, number: int) -> None:
        for module in self._modules:
            module.codec = replace(module.codec, bits=number)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how a run goes on, of plain values."""
        return {"bits": self.bits, "cosine": self.cosine, "calls": self._calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; sets the bits of the codecs.

        Raises:
            ValueError: bits that are not on the list.
        """
        if state["bits"] is not None:
            if state["bits"] not in self._choices:
                expected = f"one of {self._choices}"
                op = f"{type(self).__name__}.load_state_dict"
                fail(op, "bits", state["bits"], expected, "pass the state of a target with the same list")
            self._set(state["bits"])
        self.bits, self.cosine, self._calls = state["bits"], state["cosine"], state["calls"]


_WITH_BITS = (BlockCodec, SpectrumCodec, QuantiseCodec)


def _usual_bits(modules: Iterable[Any]) -> list[int]:
    """The bits from 1 to 16 that the codecs of all modules take."""
    codecs = {module.codec for module in modules}
    return [number for number in (1, 2, 3, 4, 6, 8, 12, 16) if all(_takes(codec, number) for codec in codecs)]


def _takes(codec: Codec, number: int) -> bool:
    try:
        replace(codec, bits=number)  # type: ignore[call-arg]
    except ValueError:
        return False
    return True
