"""Train an ordinary network with compressed feature maps: same parameters, same forward, less memory for backward.

.. code-block:: python

    import spectriton

    model = spectriton.compress(torchvision.models.resnet18(), density=0.25, bits=4)
    ...                                # train as ever
    spectriton.decompress(model)

Convolutions, batch norms, activations, pooling and dropout are replaced in place by the modules of
:mod:`spectriton.nn.compressed`. Each output of a convolution is kept for backward once, encoded by a
:mod:`spectriton.codec`; the batch norm, the activation and the convolution behind it rebuild what they need from that
copy and from one bit a value where a sign decides. Results of the network are those of the original, bit for bit;
gradients are those of the decoded maps, and :func:`gradient_report` says how close they come.

What is replaced depends on the exact type of a module: subclasses have a forward of their own, and stay. So does what a
network does by functions instead of modules (``torch.nn.functional.relu``). :func:`describe` lists which modules are
compressed and which are not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectriton._check import fail
from spectriton.codec import Codec, make_codec
from spectriton.models._describe import NormConv2d
from spectriton.nn.compressed import COMPRESSED, CompressedConv2d

__all__ = ["GradientReport", "LayerGradient", "compress", "decompress", "describe", "gradient_report"]

Model = TypeVar("Model", bound=nn.Module)


class CompressedNormConv2d(CompressedConv2d, NormConv2d):
    """The convolution with batch norm of :mod:`spectriton.models`; its batch norm is a module of its own."""


_COMPRESSED: dict[type[nn.Module], type[nn.Module]] = {**COMPRESSED, NormConv2d: CompressedNormConv2d}
_ORIGINAL = {new: old for old, new in _COMPRESSED.items()}


def compress(
    model: Model,
    density: float | None = None,
    bits: float | None = None,
    *,
    transform: str = "dct",
    rounding: str | None = None,
    refresh: int | None = None,
    codec: Codec | None = None,
) -> Model:
    """Let a network keep compressed feature maps for backward, in place.

    Parameters, buffers, hooks and the state dict stay what and where they are. Called again, it changes the settings.
    To treat parts of a network differently, call it on the parts.

    Args:
        model: any module.
        density: fraction of the values that the budget provides for; 0.25 with a transform where left out.
        bits: of a kept value; 4 with a transform where left out, 2 without.
        transform, rounding: as for :func:`spectriton.codec.make_codec`: ``"dct"`` of blocks, ``"fft"`` of whole maps,
            ``"none"``, ``"cast"``; the transform's own rounding where left out.
        refresh: with ``"dct"``, statistics of maps are taken in every so many forward passes (16 where left out), at
            first more often; 1: in each.
        codec: a codec of :mod:`spectriton.codec` instead of all these settings.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: no module, one without anything to replace, or settings that no codec takes.
    """
    _check_model("compress", model)
    if codec is None:
        codec = make_codec(transform, density=density, bits=bits, rounding=rounding, refresh=refresh)
    elif not isinstance(codec, Codec):
        fail("compress", "codec", codec, "a codec of spectriton.codec, or None", "leave it out", TypeError)
    chosen = [module for module in model.modules() if type(module) in _COMPRESSED or type(module) in _ORIGINAL]
    if not chosen:
        kinds = ", ".join(sorted({type(module).__name__ for module in model.modules()})[:8])
        expected = "a network with modules of exactly the types in spectriton.nn.compressed.COMPRESSED"
        fail("compress", "model", f"modules of types {kinds}", expected, "pass a network with nn.Conv2d modules")
    codec = codec.for_network()
    for module in chosen:
        _replace(module, codec)
    return model


def _replace(module: nn.Module, codec: Codec) -> None:
    """Make a module a compressed one, or change its settings."""
    module.__class__ = _COMPRESSED.get(type(module), type(module))
    module.codec = codec  # type: ignore[assignment]


def decompress(model: Model) -> Model:
    """Undo :func:`compress`, in place.

    Returns:
        The model, of the types it had before.

    Raises:
        TypeError: no module.
    """
    _check_model("decompress", model)
    for module in model.modules():
        original = _ORIGINAL.get(type(module))
        if original is not None:
            module.__class__ = original
            del module.codec
    return model


def describe(model: nn.Module) -> str:
    """Which modules of a network are compressed and which are not, counted by type; a table as text.

    Containers are left out, what they do by functions cannot be seen.
    """
    _check_model("describe", model)
    rows: Counter[tuple[str, str]] = Counter()
    for module in model.modules():
        kind = type(module)
        if kind in _ORIGINAL:
            rows[_ORIGINAL[kind].__name__, repr(module.codec)] += 1
        elif not any(True for _ in module.children()):
            rows[kind.__name__, "not compressed"] += 1
    width = max((len(name) for name, _ in rows), default=0)
    # What is compressed comes first.
    ordered = sorted(rows.items(), key=lambda row: (row[0][1] == "not compressed", row[0]))
    return "\n".join(f"{count:5d} x {name:<{width}}  {how}" for (name, how), count in ordered)


def _check_model(op: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        fail(op, "model", model, "a torch.nn.Module", "pass the network", TypeError)


@dataclass(frozen=True)
class LayerGradient:
    """How a parameter's gradient from compressed maps compares with the exact one, over several batches.

    Attributes:
        name: of the parameter; "all" for all of them as one vector.
        size: number of its values.
        cosine: mean cosine of the angle between the two.
        worst_cosine: smallest of them.
        norm_ratio: mean of the norm over the exact norm.
        relative_error: root of the mean squared norm of the difference over that of the exact one.
        bias: the same for the mean over the batches of the difference; noise that averages out leaves it small.
    """

    name: str
    size: int
    cosine: float
    worst_cosine: float
    norm_ratio: float
    relative_error: float
    bias: float


@dataclass(frozen=True)
class GradientReport:
    """What :func:`gradient_report` found; prints as a table.

    Attributes:
        layers: one entry a parameter, in the order of the network, without those whose exact gradient is nothing but
            rounding (a convolution's bias in front of batch norm).
        total: all parameters as one vector.
        batches: how many were compared.
        codec: the settings, as text.
    """

    layers: list[LayerGradient]
    total: LayerGradient
    batches: int
    codec: str

    def to_dict(self) -> dict[str, Any]:
        """All of it, of plain values."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("parameter", "values", "cosine", "worst", "norm ratio", "error", "bias")
        rows = [
            (
                row.name,
                str(row.size),
                *(f"{x:.4f}" for x in (row.cosine, row.worst_cosine, row.norm_ratio, row.relative_error, row.bias)),
            )
            for row in (*self.layers, self.total)
        ]
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[n].rjust(widths[n]) for n in range(1, len(head)))])
            for row in (head, *rows)
        ]
        return "\n".join([f"{self.codec}, {self.batches} batches", *lines])


def gradient_report(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    seed: int = 0,
) -> GradientReport:
    """Compare the gradients of a compressed network with the exact ones, on the same batches.

    Both see the same weights, buffers and random numbers. The network is left as it was: weights, gradients, running
    statistics, random generators and what the codec knows of maps do not change. The comparison begins without any such
    knowledge, so it always finds the same.

    Args:
        model: a network that was compressed by :func:`compress`, on the device of the batches, in the mode (training or
            evaluation) that is of interest.
        batches: pairs of inputs and labels; several give the bias as well as the noise.
        loss: scalar of (output, labels).
        seed: of dropout and its like.

    Raises:
        TypeError, ValueError: the model is not compressed, has nothing to train, or there are no batches.
    """
    op = "gradient_report"
    _check_model(op, model)
    compressed: dict[nn.Module, Any] = {m: m.codec for m in model.modules() if type(m) in _ORIGINAL}
    if not compressed:
        fail(op, "model", "a network that is not compressed", "a compressed one", "call spectriton.compress(model)")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        fail(op, "model", "a network without trainable parameters", "one with some", "call model.requires_grad_()")
    fresh = {id(codec): codec.for_network() for codec in compressed.values()}
    tallies: dict[str, _Tally] = {name: _Tally() for name in (*parameters, "all")}
    count = 0
    try:
        for number, (inputs, labels) in enumerate(batches):

            def gradients(inputs: Tensor = inputs, labels: Tensor = labels, number: int = number) -> list[Tensor]:
                with _unchanged(model, inputs.device), torch.enable_grad():
                    torch.manual_seed(seed + number)
                    value = loss(model(inputs), labels)
                    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
                return [
                    torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters.values(), strict=True)
                ]

            for module, codec in compressed.items():
                _replace(module, fresh[id(codec)])
            if not count:
                # The codec knows the sizes of all maps, and what it makes of them, after the first backward.
                gradients()
            ours = gradients()
            decompress(model)
            exact = gradients()
            for name, g, e in zip(parameters, ours, exact, strict=True):
                tallies[name].add(g.double().flatten(), e.double().flatten())
            tallies["all"].add(*(torch.cat([g.double().flatten() for g in side]) for side in (ours, exact)))
            count += 1
    finally:
        for module, codec in compressed.items():
            _replace(module, codec)
    if not count:
        fail(op, "batches", "none", "at least one pair of inputs and labels", "pass a list of batches")
    total = tallies.pop("all")
    rounding = (100 * torch.finfo(next(iter(parameters.values())).dtype).eps) ** 2 * total.exact_square
    layers = [tally.result(name) for name, tally in tallies.items() if tally.exact_square > rounding]
    settings = ", ".join(dict.fromkeys(repr(codec) for codec in compressed.values()))
    return GradientReport(layers, total.result("all"), count, settings)


class _Tally:
    """Sums over batches for one vector."""

    def __init__(self) -> None:
        self.cosines: list[float] = []
        self.ratios: list[float] = []
        self.difference = torch.zeros(())
        self.difference_square = self.exact_square = 0.0
        self.count = 0

    def add(self, ours: Tensor, exact: Tensor) -> None:
        difference = ours - exact
        norms = float(ours.norm()), float(exact.norm())
        if norms[1] > 0:
            self.cosines.append(float(ours @ exact) / (norms[0] * norms[1]) if norms[0] else 0.0)
            self.ratios.append(norms[0] / norms[1])
        self.difference_square += float(difference.square().sum())
        self.exact_square += norms[1] ** 2
        self.difference = self.difference.to(difference) + difference
        self.count += 1

    def result(self, name: str) -> LayerGradient:
        exact = self.exact_square or math.nan
        bias = float(self.difference.square().sum()) / self.count
        return LayerGradient(
            name=name,
            size=self.difference.numel(),
            cosine=fmean(self.cosines) if self.cosines else math.nan,
            worst_cosine=min(self.cosines, default=math.nan),
            norm_ratio=fmean(self.ratios) if self.ratios else math.nan,
            relative_error=math.sqrt(self.difference_square / exact),
            bias=math.sqrt(bias / exact),
        )


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restores buffers and random generators at the end."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
