"""Codecs: feature maps to small buffers and back, with loss.

A codec is a transform, a rule for what is kept of it, and a format of what is kept. Nothing here is differentiable:
codecs are for what is saved between forward and backward.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from spectriton import reference
from spectriton._backend import backend, workspace_bytes
from spectriton._check import check_choice, check_real_maps, check_threshold, fail
from spectriton._plans import KeptPlan, Place, Plans, in_backward
from spectriton.ops import to_spatial, to_spectral
from spectriton.ops._arguments import check_rounding, check_rule, check_seed, check_workspace
from spectriton.packed import PackedSpectrum, make_edge
from spectriton.reference import block_codec

__all__ = ["Allotment", "BlockCodec", "CastCodec", "Codec", "Encoded", "QuantiseCodec", "SpectrumCodec", "make_codec"]


# What takes its place needs no object of its own.
_AS_IT_IS = nullcontext()


class Encoded:
    """Feature maps as a codec stored them.

    Attributes:
        codec: the codec that made it and can read it.
        tensors: everything that is stored, plain tensors without views into larger storage.
        shape: ``(B, C, H, W)`` of the maps.
        dtype: of the maps.
        channels_last: whether the maps stood channels last in memory, as they will again.
    """

    __slots__ = ("channels_last", "codec", "dtype", "shape", "tensors")

    def __init__(
        self,
        codec: Codec,
        tensors: tuple[Tensor, ...],
        shape: tuple[int, ...] | torch.Size,
        dtype: torch.dtype,
        channels_last: bool = False,
    ) -> None:
        self.codec = codec
        self.tensors = tensors
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.channels_last = channels_last

    @property
    def nbytes(self) -> int:
        """Bytes stored, scales and whatever else decoding needs included."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def bits_per_value(self) -> float:
        """Stored bits over the number of values of the maps."""
        return 8 * self.nbytes / max(1, self.shape.numel())

    def with_tensors(self, tensors: tuple[Tensor, ...] | list[Tensor]) -> Encoded:
        """The same maps in other tensors of the same content, as they come back from autograd or another device."""
        if len(tensors) != len(self.tensors):
            fail("Encoded.with_tensors", "tensors", f"{len(tensors)} of them", str(len(self.tensors)), "pass them all")
        return Encoded(self.codec, tuple(tensors), self.shape, self.dtype, self.channels_last)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """The maps ``(B, C, H, W)``, dense, in the memory format they came in.

        Args:
            dtype: floating-point; that of the maps where left out. Values beyond its range saturate.
        """
        out = torch.empty(
            self.shape,
            dtype=dtype or self.dtype,
            device=self.tensors[0].device,
            memory_format=torch.channels_last if self.channels_last else torch.contiguous_format,
        )
        with plainly(out.device):
            self.codec._decode(self.tensors, out)
        return out

    def __repr__(self) -> str:
        return (
            f"Encoded({self.codec!r}, shape={tuple(self.shape)}, dtype={self.dtype}, {self.nbytes} bytes, "
            f"{self.bits_per_value:.2f} bits per value)"
        )


@dataclass(frozen=True)
class Codec:
    """What all codecs have in common. Settings are fixed: a codec can be hashed, compared, pickled and shared."""

    def encode(self, x: Tensor, seed: int | Tensor | None = None) -> Encoded:
        """Store feature maps. No gradient flows through this, and no random generator is touched.

        Args:
            x: ``(B, C, H, W)`` real floating-point, any strides. Values that are not finite stay visible: what shares
                a scale with them decodes to NaN.
            seed: of stochastic rounding, an int or an int64 tensor without dimensions. By default it is made from the
                data, so that the same maps are always stored the same way.

        Raises:
            TypeError, ValueError: ``x`` is not four-dimensional and real, or the seed is not a whole number.
        """
        name = f"{type(self).__name__}.encode"
        check_real_maps(name, "x", x)
        check_seed(name, seed)
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        with plainly(x.device):
            codec = self.for_maps(x)
            return Encoded(codec, codec._encode(x.detach(), seed), x.shape, x.dtype, channels_last)

    def for_small_maps(self) -> Codec:
        """What takes the place of this codec for maps with too few values for it; itself where none are too few."""
        return self

    def for_network(self) -> Codec:
        """What the modules of one network share in place of this codec; itself where it treats all maps alike."""
        return self

    def for_module(self, module: nn.Module) -> Codec:
        """What encodes the next maps that a module of the network keeps."""
        return self

    def for_maps(self, x: Tensor) -> Codec:
        """What encodes and decodes maps ``x``."""
        return self

    def _encode(self, x: Tensor, seed: int | Tensor | None) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _decode(self, tensors: tuple[Tensor, ...], out: Tensor) -> None:
        """Writes all of ``out``."""
        raise NotImplementedError


@dataclass(frozen=True)
class CastCodec(Codec):
    """Maps in another floating-point format.

    Args:
        dtype: ``torch.bfloat16``, ``torch.float16``, ``torch.float32`` or ``torch.float64``.
        rounding: ``"nearest"`` or ``"stochastic"``.
    """

    dtype: torch.dtype = torch.bfloat16
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        formats = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        check_choice("CastCodec", "dtype", self.dtype, formats)
        check_choice("CastCodec", "rounding", self.rounding, reference.ROUNDINGS)

    def _encode(self, x: Tensor, seed: int | Tensor | None) -> tuple[Tensor, ...]:
        out = torch.empty(x.shape, dtype=self.dtype, device=x.device)
        number = check_rounding("CastCodec.encode", self.rounding, seed, x)
        if number is None or torch.promote_types(x.dtype, self.dtype) == self.dtype:
            _cast(out, x)
            return (out,)
        for first, last in _chunks(x.shape[0], 8 * x[:1].numel() * x.element_size(), x.device):
            values = x[first:last]
            noise = _noise(number, first * x[0].numel(), values.numel()).view(values.shape)
            values = values.float() if values.dtype != torch.float64 else values
            out[first:last] = reference.stochastic_cast(values, self.dtype, noise)
        return (out,)

    def _decode(self, tensors: tuple[Tensor, ...], out: Tensor) -> None:
        _cast(out, tensors[0])


@dataclass(frozen=True)
class QuantiseCodec(Codec):
    """Groups of values on equally spaced levels between their minimum and maximum, without a transform.

    What ActNN (Chen et al., 2021) and its successors do to activations: unbiased with stochastic rounding. Each group
    adds 64 bits.

    Args:
        bits: of a value: 1, 2, 4 or 8.
        group: values in a group, neighbours in memory; a multiple of 8.
        rounding: ``"stochastic"`` or ``"nearest"``.
        workspace: bound on temporaries in bytes; the ops' default where left out.
    """

    bits: int = 2
    group: int = 256
    rounding: str = "stochastic"
    workspace: int | None = None

    def __post_init__(self) -> None:
        check_choice("QuantiseCodec", "bits", self.bits, (1, 2, 4, 8))
        if not isinstance(self.group, int) or self.group < 8 or self.group % 8:
            fail("QuantiseCodec", "group", self.group, "a positive multiple of 8", "pass 256")
        check_choice("QuantiseCodec", "rounding", self.rounding, reference.ROUNDINGS)
        check_workspace("QuantiseCodec", self.workspace)

    def _groups(self, count: int, device: torch.device) -> Iterator[tuple[int, int]]:
        """Ranges of groups whose temporaries (about ten arrays of four bytes a value) fit the workspace."""
        yield from _chunks(-(-count // self.group), 40 * self.group, device, self.workspace)

    def _encode(self, x: Tensor, seed: int | Tensor | None) -> tuple[Tensor, ...]:
        flat = _flat(x)
        groups, levels = -(-flat.numel() // self.group), (1 << self.bits) - 1
        packed = torch.empty(groups, self.group * self.bits // 8, dtype=torch.uint8, device=x.device)
        scales = torch.empty(groups, 2, dtype=torch.float32, device=x.device)

        def padded(first: int, last: int) -> Tensor:
            """Groups in float32; the last is filled up with the last value, which leaves its range alone."""
            part = flat[first * self.group : last * self.group].float()
            missing = (last - first) * self.group - part.numel()
            return (torch.cat([part, part[-1:].expand(missing)]) if missing else part).view(-1, self.group)

        for first, last in self._groups(flat.numel(), x.device):
            values = padded(first, last)
            low, high = values.amin(1), values.amax(1)
            scales[first:last, 0] = low
            scales[first:last, 1] = (high - low) / levels
        number = _seed(seed, scales) if self.rounding == "stochastic" else None
        for first, last in self._groups(flat.numel(), x.device):
            low, step = scales[first:last, :1], scales[first:last, 1:]
            steps = (padded(first, last) - low).div_(torch.where(step > 0, step, 1))
            if number is None:
                steps.add_(0.5)
            else:
                steps.add_(_noise(number, first * self.group, steps.numel()).view_as(steps))
            # A group with NaN or an infinite range has a minimum or a step that is not finite, so its codes, whatever
            # the device makes of NaN, decode to NaN.
            # A CPU has no fast way from float to uint8.
            signed = torch.int8 if self.bits < 8 else torch.int16
            codes = steps.clamp_(0, levels).to(signed).to(torch.uint8)
            packed[first:last] = reference.pack_codes(codes, self.bits)
        return packed, scales

    def _decode(self, tensors: tuple[Tensor, ...], out: Tensor) -> None:
        packed, scales = tensors
        flat = _flat(out)
        for first, last in self._groups(flat.numel(), out.device):
            codes = reference.unpack_codes(packed[first:last], self.bits).to(torch.float32)
            values = codes.mul_(scales[first:last, 1:]).add_(scales[first:last, :1]).view(-1)
            target = flat[first * self.group : last * self.group]
            _cast(target, values[: target.numel()])


#: Bits of a value, at most.
_MOST_BITS = 8

#: Value formats of packed spectra by their bits.
_SPECTRUM_VALUES = {4: "int4", 8: "int8", 16: "bfloat16", 32: "float32"}


@dataclass(frozen=True)
class SpectrumCodec(Codec):
    """The largest Fourier coefficients of whole maps, as a packed spectrum.

    Costs ``density * bits`` bits per value, half a bit for the pattern, and the scales of integer values.

    Args:
        density: fraction of the coefficients to keep, the largest of all maps.
        bits: of a real or imaginary part: 4 or 8 (integers), 16 (bfloat16) or 32.
        rounding: ``"nearest"`` or ``"stochastic"``.
        workspace: bound on temporaries in bytes; the ops' default where left out.
    """

    density: float = 0.25
    bits: int = 4
    rounding: str = "nearest"
    workspace: int | None = None

    def __post_init__(self) -> None:
        check_rule("SpectrumCodec", None, self.density)
        check_choice("SpectrumCodec", "bits", self.bits, _SPECTRUM_VALUES)
        check_choice("SpectrumCodec", "rounding", self.rounding, reference.ROUNDINGS)
        check_workspace("SpectrumCodec", self.workspace)

    def for_small_maps(self) -> Codec:
        return QuantiseCodec(8, rounding=self.rounding, workspace=self.workspace)

    def _encode(self, x: Tensor, seed: int | Tensor | None) -> tuple[Tensor, ...]:
        packed = to_spectral(
            x,
            density=self.density,
            value_dtype=_SPECTRUM_VALUES[self.bits],
            rounding=self.rounding,
            seed=seed,
            workspace=self.workspace,
        )
        return packed.values, packed.scales, packed.bitmap, packed.offsets

    def _decode(self, tensors: tuple[Tensor, ...], out: Tensor) -> None:
        edge = make_edge(tensors[0].shape[0], torch.float32, out.device)
        packed = PackedSpectrum.of((edge, *tensors), out.shape, _SPECTRUM_VALUES[self.bits])
        _cast(out, to_spatial(packed, workspace=self.workspace))


class Allotment:
    """How the maps of one network share a budget: those with fewer values get more bits a value.

    The mean squared error of blocks falls as ``2^(-3/2 r)`` with ``r`` bits a value (at one to three bits), and with it
    the relative error of a convolution's weight gradient. At the same bytes for all maps, the sum over layers of these
    errors is least where maps with half the values get 2/3 bits more each.

    Sizes are those that the first forward has met: until a backward has begun, all maps get the same.
    """

    _BITS_PER_OCTAVE = 2 / 3

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all sizes."""
        self.counts: Counter[int] = Counter()
        self.complete = self.settled = False
        self._rates: dict[float, dict[int, float]] = {}

    def rate(self, size: int, budget: float) -> float:
        """Bits per value for maps of ``size`` values an image, ``budget`` on average."""
        # What checkpointing computes again in backward must get what it got the first time.
        if not in_backward():
            self.settled = self.complete
            if self.settled and size not in self.counts:
                # Images of another size than before.
                self.reset()
            if not self.settled:
                self.counts[size] += 1
        return self.rates(budget).get(size, budget) if self.settled else budget

    def note_decoding(self) -> None:
        """Backward begins: all sizes are known."""
        self.complete = self.complete or in_backward()

    def rates(self, budget: float) -> dict[int, float]:
        """Bits per value by size, for all sizes met so far."""
        if budget not in self._rates:
            self._rates[budget] = self._shared(budget)
        return self._rates[budget]

    def _shared(self, budget: float) -> dict[int, float]:
        values = {size: count * size for size, count in self.counts.items()}

        def rates(level: float) -> dict[int, float]:
            wanted = {size: level - self._BITS_PER_OCTAVE * math.log2(size) for size in values}
            return {size: min(max(bits, budget / 2), _MOST_BITS) for size, bits in wanted.items()}

        low, high = 0.0, _MOST_BITS + self._BITS_PER_OCTAVE * math.log2(max(values))
        for _ in range(50):
            middle = (low + high) / 2
            spent = sum(values[size] * bits for size, bits in rates(middle).items())
            low, high = (middle, high) if spent <= budget * sum(values.values()) else (low, middle)
        return rates(low)


@dataclass(frozen=True)
class BlockCodec(Codec):
    """Blocks of 4 to 8 positions an edge, transformed over channels and positions, with bits where the energy is.

    Channels are rotated into the principal components of their group (of at most ``mix``), blocks of each component go
    through an orthonormal DCT-II, and each (component, frequency) gets bits by its variance (reverse water-filling).
    Statistics come from the maps themselves and are stored along. The size is ``density * bits`` bits per value, all
    included, and known in advance; see :mod:`spectriton.reference.block_codec` for what is stored.

    Values are taken relative to the deviation of their channel. What lies far beyond the scale of its row saturates. A
    value that is not finite turns its whole group of channels to NaN.

    In a network that :func:`spectriton.compress` has changed, statistics stay over several forward passes, but for the
    means of channels. Maps that :meth:`encode` is called for directly have their own.

    Args:
        density, bits: their product is the budget in bits per value, from above 0 to 8.
        mix: channels in a group; 1 leaves channels alone.
        rounding: ``"nearest"``, or ``"stochastic"``: without bias in what has bits, but with more error.
        workspace: bound on temporaries in bytes; the ops' default where left out.
        refresh: in a network, statistics are taken in every so many forward passes, in the first ones more often.
            1: in each.
        allotment: what the codecs of a network share, so that the budget holds for all their maps together; None: it
            holds for each.
        plans: where a network keeps plans; None: nowhere.
        place, kept: of the plans, where that of the maps is, and this itself.
    """

    density: float = 0.25
    bits: float = 4
    mix: int = 64
    rounding: str = "nearest"
    workspace: int | None = None
    refresh: int = 16
    allotment: Allotment | None = field(default=None, compare=False, repr=False)
    plans: Plans | None = field(default=None, compare=False, repr=False)
    place: Place | None = field(default=None, compare=False, repr=False)
    kept: KeptPlan | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        density = check_threshold("BlockCodec", self.density, "density", "pass 0.25")
        bits = check_threshold("BlockCodec", self.bits, "bits", "pass 4")
        if not 0 < density <= 1:
            fail("BlockCodec", "density", density, "a fraction above 0, at most 1", "pass 0.25")
        if not 0 < bits * density <= _MOST_BITS:
            fail("BlockCodec", "bits", bits, "a positive number, at most 8 / density", "pass 4")
        if not isinstance(self.mix, int) or self.mix < 1:
            fail("BlockCodec", "mix", self.mix, "a positive number of channels", "pass 64, or 1 to leave them alone")
        check_choice("BlockCodec", "rounding", self.rounding, reference.ROUNDINGS)
        check_workspace("BlockCodec", self.workspace)
        if not isinstance(self.refresh, int) or self.refresh < 1:
            fail("BlockCodec", "refresh", self.refresh, "a positive number of forward passes", "pass 16")

    def for_small_maps(self) -> Codec:
        return QuantiseCodec(8, rounding=self.rounding, workspace=self.workspace)

    def for_network(self) -> Codec:
        return replace(self, allotment=Allotment(), plans=Plans(self.refresh) if self.refresh > 1 else None)

    def for_module(self, module: nn.Module) -> Codec:
        return self if self.plans is None else self._with(place=self.plans.place(module))

    def for_maps(self, x: Tensor) -> Codec:
        changed: dict[str, Any] = {}
        bits = self.bits
        if self.allotment is not None:
            rate = self.allotment.rate(x.shape[1:].numel(), self.density * self.bits)
            # Rounding must not carry it beyond the most.
            bits = changed["bits"] = min(rate, _MOST_BITS - 1e-6) / self.density
        if self.place is not None and x.numel():
            layout = block_codec.block_layout(tuple(x.shape), self.density * bits, self.mix)
            kept = self.place.plan(x, layout, workspace_bytes(self.workspace, x.device))
            changed |= {"place": None, "kept": kept}
        return self._with(**changed) if changed else self

    def _with(self, **changed: Any) -> BlockCodec:
        """A copy with other settings, which need no check: there is one for all maps of every step."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, **changed)
        return copy

    def _layout(self, maps: Tensor) -> block_codec.BlockLayout:
        return block_codec.block_layout(tuple(maps.shape), self.density * self.bits, self.mix)

    def _encode(self, x: Tensor, seed: int | Tensor | None) -> tuple[Tensor, ...]:
        if x.numel() == 0:
            return (x.new_empty(0, dtype=torch.uint8),)
        layout, workspace = self._layout(x), workspace_bytes(self.workspace, x.device)
        runs = backend(x.device)
        if self.kept is None:
            stored = runs.fit_blocks(x, layout, workspace)
            plan = runs.block_plan(stored, layout)
        else:
            stored, plan = self.kept.of_maps(x)
        number = _seed(seed, stored[0]) if self.rounding == "stochastic" else None
        records = runs.encode_blocks(x, layout, plan, number, workspace)
        return (records, *stored)

    def _decode(self, tensors: tuple[Tensor, ...], out: Tensor) -> None:
        if out.numel() == 0:
            return
        if self.allotment is not None:
            self.allotment.note_decoding()
        if self.plans is not None:
            self.plans.note_decoding()
        layout, runs = self._layout(out), backend(out.device)
        records, scales, basis, spectrum = tensors
        stored = scales, basis, spectrum
        plan = None if self.kept is None else self.kept.of_stored(stored)
        if plan is None:
            plan = runs.block_plan(stored, layout)
        runs.decode_blocks(records, layout, plan, out, workspace_bytes(self.workspace, out.device))


def make_codec(
    transform: str = "dct",
    *,
    density: float | None = None,
    bits: float | None = None,
    rounding: str | None = None,
    workspace: int | None = None,
    refresh: int | None = None,
) -> Codec:
    """A codec by its transform.

    ======== ====================== ==================================================== =============================
    transform codec                 bits per value                                       defaults
    ======== ====================== ==================================================== =============================
    dct      :class:`BlockCodec`    ``density * bits``, all included                     0.25, 4, nearest
    fft      :class:`SpectrumCodec` ``density * bits`` + 0.5 and scales                  0.25, 4, nearest
    none     :class:`QuantiseCodec` ``bits`` + 0.25; all values are kept                 2, stochastic
    cast     :class:`CastCodec`     ``bits`` (16 is bfloat16)                            16, nearest
    ======== ====================== ==================================================== =============================

    Args:
        transform: ``"dct"``, ``"fft"``, ``"none"`` or ``"cast"``.
        density: fraction of the values that the budget provides for; without a transform it can only be 1.
        bits: of a value that is kept.
        rounding: ``"nearest"`` or ``"stochastic"``.
        workspace: bound on temporaries in bytes; the ops' default where left out.
        refresh: with ``"dct"``, see :class:`BlockCodec`.

    Raises:
        TypeError, ValueError: no such transform, or a setting that it does not have.
    """
    check_choice("make_codec", "transform", transform, _CODECS)
    given: dict[str, Any] = {"density": density, "bits": bits, "rounding": rounding, "workspace": workspace}
    settings = {name: value for name, value in given.items() if value is not None}
    if transform in ("none", "cast") and settings.pop("density", 1) != 1:
        fail("make_codec", "density", density, f"1 for transform={transform!r}", "leave it out, or choose a transform")
    if refresh is not None:
        if transform != "dct":
            fail("make_codec", "refresh", refresh, f"none for transform={transform!r}", "leave it out")
        settings["refresh"] = refresh
    if transform == "cast":
        settings.pop("workspace", None)
        formats = {16: torch.bfloat16, 32: torch.float32}
        settings["dtype"] = formats[check_choice("make_codec", "bits", settings.pop("bits", 16), formats)]
    return _CODECS[transform](**settings)


#: The codecs by the names of their transforms.
_CODECS: dict[str, type[Codec]] = {
    "dct": BlockCodec,
    "fft": SpectrumCodec,
    "none": QuantiseCodec,
    "cast": CastCodec,
}


def _chunks(
    count: int, bytes_each: int, device: torch.device, workspace: int | None = None
) -> Iterator[tuple[int, int]]:
    """``0:count`` in ranges whose temporaries fit the workspace."""
    step = max(1, workspace_bytes(workspace, device) // max(1, bytes_each))
    for first in range(0, count, step):
        yield first, min(first + step, count)


def _seed(seed: int | Tensor | None, data: Tensor) -> Tensor:
    return reference.seed_of(data) if seed is None else reference.make_seed(seed, data.device)


def _noise(seed: Tensor, first: int, count: int) -> Tensor:
    """``(count,)`` noise of the positions from ``first`` on."""
    narrow = torch.int32 if first + count < 1 << 31 else torch.int64
    return reference.uniform(seed, torch.arange(first, first + count, dtype=narrow, device=seed.device))


def _flat(x: Tensor) -> Tensor:
    """The values of ``x`` ``(B, C, H, W)`` in the order of memory, a view where strides allow."""
    if x.is_contiguous():
        return x.view(-1)
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(-1)
    return x.contiguous().view(-1)


def _cast(out: Tensor, values: Tensor) -> None:
    """``out[...] = values``; what is finite stays so in float16, too."""
    if out.dtype != torch.float16:
        out.copy_(values)
        return
    for first, last in _chunks(values.shape[0], 12 * values[:1].numel(), out.device):
        reference.copy_in_range(out[first:last], values[first:last])


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off on a device: codecs choose their own precision."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _AS_IT_IS


@contextmanager
def _both_off(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def plainly(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off on a device, and no graph is made."""
    if not torch.is_grad_enabled():
        return without_autocast(device)
    return _both_off(device) if torch.is_autocast_enabled(device.type) else torch.no_grad()
