"""Batch norm of spectra, exact.

The mean of a map is its zero frequency over ``sqrt(H W)``, and by Parseval's theorem its variance is the energy of the
rest of its ortho spectrum over ``H W``. So the statistics of ``nn.BatchNorm2d`` are sums over the coefficients, and its
affine map is a factor per channel and a shift of the zero frequency. A packed spectrum keeps its pattern.

Forward and backward walk over chunks of frequencies that fit a bounded workspace, twice each: once for the sums over
the batch, once to apply them. Frequencies at which nothing is kept are skipped, and the reference looks at nothing but
what is kept. An activation may follow in the same walk.

Backward starts from the input, and so do the ops that read the output: they keep its :class:`Origin`, the arguments by
which it is made again, rather than its values. Between a convolution and the next one copy of the maps is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from spectriton import reference
from spectriton._backend import backend
from spectriton._check import check_complex, fail
from spectriton.frequencies import frequency_grid
from spectriton.ops._arguments import (
    check_activation,
    check_half_spectrum,
    check_per_channel,
    check_size,
    check_workspace,
)
from spectriton.ops._define import PACKED_FIELDS, define_op
from spectriton.ops._planes import resolve_workspace
from spectriton.ops._rows import row_bytes, rows_to_visit, store_rows
from spectriton.ops.spectral_activation import spectral_activation
from spectriton.packed import Origin, PackedSpectrum, layout, make_edge
from spectriton.reference.kept import KeptRows
from spectriton.reference.spectral_activation import activate, activate_backward_input
from spectriton.reference.spectral_batch_norm import norm_factor, per_plane
from spectriton.reference.unpack import put_values, take_values


class _Chunk:
    """Some of the frequencies kept, dense: numbers are ``(Fc, P, 2)``, zero where nothing is kept.

    Tables are ``(P,)``, one number a place of a row; weights are ``(Fc,)``.
    """

    def __init__(self, walk: _Walk, rows: Tensor, first: bool) -> None:
        self._walk, self.rows, self.first = walk, rows, first

    def _read(self, values: Tensor, scales: Tensor) -> Tensor:
        walk = self._walk
        out = torch.empty(self.rows.numel(), walk.sizes.padded_row, 2, dtype=walk.dtype, device=values.device)
        packed = (values, scales, walk.bitmap, walk.offsets, self.rows, 0, walk.sizes.tiles)
        return walk.primitives.unpack_rows(*packed, out)

    def scaled(self, values: Tensor, scales: Tensor, gain: Tensor) -> Tensor:
        """The numbers of a packed spectrum of this pattern, times a table."""
        return self._read(values, scales).mul_(gain[:, None])

    def read_gradient(self, grad: Tensor) -> Tensor:
        """The numbers of a gradient, which are not to be changed."""
        return self._read(grad, grad.new_empty(0))

    def spread(self, table: Tensor) -> Tensor:
        """A table to broadcast against numbers."""
        return table[:, None]

    def _by_place(self, numbers: Tensor) -> Tensor:
        return numbers[..., 0] + numbers[..., 1]  # several times as fast as a sum over two

    def total(self, numbers: Tensor) -> Tensor:
        """``(P,)``: numbers added up over frequencies and parts."""
        return self._by_place(numbers).sum(0)

    def sums(self, values: Tensor, scales: Tensor, weight: Tensor, numbers: Tensor | None = None) -> Tensor:
        """``(P,)``: a packed spectrum times numbers, or its squares, added up over frequencies by weight."""
        stored = self._read(values, scales)
        stored = stored.square_() if numbers is None else stored.mul_(numbers)
        return torch.mv(self._by_place(stored).T, weight)

    def zero_frequency(self, numbers: Tensor) -> Tensor:
        """Real parts ``(B, C)`` of the zero frequency, a view; of the first chunk only."""
        sizes = self._walk.sizes
        return numbers[0, : sizes.row, 0].unflatten(0, (sizes.batch, sizes.channels))

    def store(self, numbers: Tensor, values: Tensor, scales: Tensor) -> None:
        """Rounds to the format of ``values``."""
        store_rows(numbers, self._walk.bitmap, self._walk.offsets, self.rows, values, scales)

    def put(self, numbers: Tensor, grad: Tensor) -> None:
        """Writes to a gradient."""
        walk = self._walk
        walk.primitives.gather_rows(numbers, walk.bitmap, walk.offsets, self.rows, 0, grad)

    def put_combined(
        self,
        numbers: Tensor,
        factors: Tensor,
        values: Tensor,
        scales: Tensor,
        gain: Tensor | None,
        weight: Tensor,
        zero: Tensor | None,
        grad: Tensor,
    ) -> None:
        """Writes to a gradient: numbers times a table, plus a packed spectrum times a table and a weight.

        The spectrum is left out without a ``gain``. ``zero`` ``(B, C)`` is added at the zero frequency.
        """
        made = numbers * self.spread(factors)
        if gain is not None:
            made.addcmul_(self._read(values, scales), (weight[:, None] * gain)[..., None])
        if zero is not None:
            self.zero_frequency(made).add_(zero)
        self.put(made, grad)


class _KeptChunk(_Chunk):
    """Only what is kept, numbers are ``(n, 2)``."""

    def __init__(self, walk: _Walk, rows: Tensor, first: bool) -> None:
        super().__init__(walk, rows, first)
        self._primitives, self._kept = walk.primitives, walk.kept_rows(rows)

    def scaled(self, values: Tensor, scales: Tensor, gain: Tensor) -> Tensor:
        return self._primitives.scale_kept(self._kept, values, scales, gain)

    def read_gradient(self, grad: Tensor) -> Tensor:
        return take_values(grad, self._kept.slots)

    def spread(self, table: Tensor) -> Tensor:
        return self._primitives.spread_kept(self._kept, table)

    def total(self, numbers: Tensor) -> Tensor:
        return self._primitives.sum_places(self._kept, numbers)

    def sums(self, values: Tensor, scales: Tensor, weight: Tensor, numbers: Tensor | None = None) -> Tensor:
        return self._primitives.sum_kept(self._kept, values, scales, weight, numbers)

    def zero_frequency(self, numbers: Tensor) -> Tensor:
        sizes = self._walk.sizes  # of which everything is kept
        return numbers[: sizes.row, 0].unflatten(0, (sizes.batch, sizes.channels))

    def store(self, numbers: Tensor, values: Tensor, scales: Tensor) -> None:
        self._primitives.store_kept(self._kept, numbers, values, scales)

    def put(self, numbers: Tensor, grad: Tensor) -> None:
        put_values(grad, self._kept.slots, numbers)

    def put_combined(
        self,
        numbers: Tensor,
        factors: Tensor,
        values: Tensor,
        scales: Tensor,
        gain: Tensor | None,
        weight: Tensor,
        zero: Tensor | None,
        grad: Tensor,
    ) -> None:
        slots = self._kept.slots
        out = grad[slots] if isinstance(slots, slice) else torch.empty_like(numbers)
        self._primitives.combine_kept(self._kept, numbers, factors, values, scales, gain, weight, out)
        if zero is not None:
            self.zero_frequency(out).add_(zero)
        if not isinstance(slots, slice):
            self.put(out, grad)


class _Walk:
    """The frequencies at which something is kept, in chunks that fit the workspace; the zero frequency comes first.

    Args:
        bitmap, offsets: the pattern.
        shape: ``[B, C, H, W]``.
        dtype: real precision of the numbers.
        kept: coefficients kept.
        arrays: how many arrays of the numbers of a chunk there are at a time; and where a backend reads stored values
            and gradients where they are.
        workspace: in bytes, 0 for the default.
    """

    def __init__(
        self, bitmap: Tensor, offsets: Tensor, shape: list[int], dtype: torch.dtype, kept: int,
        arrays: tuple[int, int], workspace: int,
    ) -> None:  # fmt: skip
        self.bitmap, self.offsets, self.dtype = bitmap, offsets, dtype
        self.sizes = sizes = layout(shape)
        self.primitives = backend(bitmap.device)
        self.weight = frequency_grid(sizes.height, sizes.width, bitmap.device).weight.to(dtype)
        self.index = self.primitives.tile_index(bitmap, offsets)
        self._chunk: type[_Chunk] = _Chunk if self.index is None else _KeptChunk
        if self.index is None:
            rows = rows_to_visit(bitmap)
            per_row = row_bytes(sizes, dtype, kept, arrays[0])
        else:
            rows = torch.from_numpy(np.flatnonzero(self.index.counts.any(1))).to(bitmap.device)
            # Mask and tables are dense; beside the numbers stand their places.
            share = kept / max(1, rows.numel() * sizes.padded_row)
            per_row = int(sizes.padded_row * (1 + 2 * dtype.itemsize + share * (16 + 2 * arrays[0] * dtype.itemsize)))
            if self.primitives.by_bits(dtype) and self.index.ordered:
                per_row = int(sizes.padded_row * share * 2 * arrays[1] * dtype.itemsize)
        at_once = max(1, resolve_workspace(workspace, bitmap.device, sizes) // max(1, per_row))
        self._parts: Sequence[Tensor] = rows.split(at_once) if rows.numel() else ()
        self._kept: KeptRows | None = None

    def __iter__(self) -> Iterator[_Chunk]:
        """Chunks; whoever takes one lets go of it, and of what was read from it, before the next is made."""
        for number, rows in enumerate(self._parts):
            yield self.chunk(rows, number == 0)

    def chunk(self, rows: Tensor, first: bool) -> _Chunk:
        """That of frequencies of which the first is the zero frequency, or is not."""
        return self._chunk(self, rows, first)

    def kept_rows(self, rows: Tensor) -> KeptRows:
        """What is kept of a chunk; that of a single one serves the next walk, too."""
        if self._kept is not None and rows is self._parts[0]:
            return self._kept
        kept = self.primitives.kept_rows(self.bitmap, self.offsets, rows, self.index, self.dtype)
        if len(self._parts) == 1 and rows is self._parts[0]:
            self._kept = kept
        return kept

    def zero_frequency(self, values: Tensor, scales: Tensor) -> Tensor:
        """Real parts ``(B, C)`` of the zero frequency, float64."""
        chunk = self.chunk(self._parts[0][:1], True)
        ones = torch.ones(self.sizes.padded_row, dtype=self.dtype, device=values.device)
        return chunk.zero_frequency(chunk.scaled(values, scales, ones)).double()

    def per_place(self, per_channel: Tensor) -> Tensor:
        """``(C,)`` to the places ``(P,)`` of a row."""
        row = per_plane(per_channel.to(self.dtype), self.sizes.batch)
        return functional.pad(row, (0, self.sizes.padded_row - self.sizes.row))

    def per_channel(self, row: Tensor) -> Tensor:
        """Sums ``(C,)`` in float64 over the places ``(P,)`` of a row."""
        by_channel = row[: self.sizes.row].view(self.sizes.batch, self.sizes.channels)
        return by_channel.sum(0, dtype=torch.float64)

    @property
    def root(self) -> float:
        """``sqrt(H W)``: a constant is its mean times this at the zero frequency."""
        return float((self.sizes.height * self.sizes.width) ** 0.5)

    @property
    def count(self) -> int:
        """Numbers of a channel over which statistics are taken, ``B H W``."""
        return max(1, self.sizes.batch * self.sizes.height * self.sizes.width)


@define_op(f"(Tensor edge, {PACKED_FIELDS}, SymInt[] shape, int workspace) -> (Tensor, Tensor)")
def _map_statistics(
    edge: Tensor, values: Tensor, scales: Tensor, bitmap: Tensor, offsets: Tensor, shape: list[int], workspace: int
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(C,)`` of the maps."""
    bound = resolve_workspace(workspace, bitmap.device)
    made = backend(bitmap.device).norm_statistics(values, scales, bitmap, offsets, shape, edge.dtype, bound)
    if made is not None:
        return made
    walk = _Walk(bitmap, offsets, shape, edge.dtype, values.shape[0], (2, 0), workspace)
    zero_mean = values.new_zeros(walk.sizes.channels, dtype=torch.float64)
    power = torch.zeros_like(zero_mean)
    for chunk in walk:
        weight = walk.weight[chunk.rows]
        if chunk.first:
            # The zero frequency enters by its deviation from the mean of the batch: no small difference of large sums.
            zero = walk.zero_frequency(values, scales)
            zero_mean = zero.mean(0)
            power += (zero - zero_mean).square_().sum(0)
            weight[0] = 0
        power += walk.per_channel(chunk.sums(values, scales, weight))
        del chunk
    return (zero_mean / walk.root).to(edge.dtype), (power / walk.count).to(edge.dtype)


@_map_statistics.register_fake
def _(
    edge: Tensor, values: Tensor, scales: Tensor, bitmap: Tensor, offsets: Tensor, shape: list[int], workspace: int
) -> tuple[Tensor, Tensor]:
    return edge.new_empty(shape[1]), edge.new_empty(shape[1])


class _Affine:
    """The affine map of a batch norm: coefficients less the mean, times ``gamma / sigma``, plus ``beta``."""

    def __init__(
        self, walk: _Walk, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
    ) -> None:
        self._walk = walk
        self._mean = mean.double() * walk.root
        self._factor = norm_factor(weight, var, eps)
        self._bias = 0 if bias is None else bias.double() * walk.root
        self._row = walk.per_place(self._factor)

    def centred(self, values: Tensor, scales: Tensor) -> Tensor:
        """Real parts ``(B, C)`` of the zero frequency less the mean, float64."""
        return self._walk.zero_frequency(values, scales) - self._mean

    def __call__(self, chunk: _Chunk, values: Tensor, scales: Tensor, centred: Tensor | None) -> Tensor:
        """The map of the numbers of a chunk; ``centred`` is the zero frequency, for the first one."""
        out = chunk.scaled(values, scales, self._row)
        if centred is not None:
            chunk.zero_frequency(out).copy_(centred * self._factor + self._bias)
        return out


@define_op(
    f"(Tensor edge, {PACKED_FIELDS}, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    "Tensor? activation_scale, str kind, SymInt[] shape, bool batch_statistics, float eps, int workspace) "
    "-> (Tensor, Tensor, Tensor)"
)
def _spectral_batch_norm(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    activation_scale: Tensor | None,
    kind: str,
    shape: list[int],
    batch_statistics: bool,
    eps: float,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Edge, values and scales of the result, which has the input's pattern.

    ``batch_statistics`` says for backward that mean and variance ``(C,)`` are those of the input.
    """
    arrays = (3, 2) if kind == "identity" else (6, 6)
    walk = _Walk(bitmap, offsets, shape, edge.dtype, values.shape[0], arrays, workspace)
    affine = _Affine(walk, weight, bias, mean, var, eps)
    scale = None if activation_scale is None else walk.per_place(activation_scale)
    out_values, out_scales = torch.empty_like(values), torch.zeros_like(scales)
    for chunk in walk:
        y = affine(chunk, values, scales, affine.centred(values, scales) if chunk.first else None)
        if kind != "identity":
            y = activate(y, kind, None if scale is None else chunk.spread(scale))
        chunk.store(y, out_values, out_scales)
        del y, chunk
    return make_edge(values.shape[0], edge.dtype, edge.device), out_values, out_scales


@_spectral_batch_norm.register_fake
def _(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    activation_scale: Tensor | None,
    kind: str,
    shape: list[int],
    batch_statistics: bool,
    eps: float,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return make_edge(values.shape[0], edge.dtype, edge.device), torch.empty_like(values), torch.empty_like(scales)


def norm_gradients(
    grad: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    activation_scale: Tensor | None,
    kind: str,
    shape: list[int],
    batch_statistics: bool,
    eps: float,
    workspace: int,
    need_input: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for the packed input (in its own pattern), weight, bias and scale of the activation.

    With ``x`` the input less its mean, ``g`` the gradient before the activation, ``a = gamma / sigma``, ``n = B H W``
    and ``w`` how many coefficients of the full spectrum a stored one stands for, the gradient of a coefficient is
    ``a g - a w x sum(<g, x>) / (n sigma^2)``, less the mean of ``a g`` over the batch at the zero frequency. The last
    two terms are those of the batch's statistics. To ``overwrite`` is to write the first gradient over ``grad``.
    """
    active = kind != "identity"
    grad = grad.contiguous()
    grad_input = grad if overwrite else grad.new_zeros(values.shape[0] if need_input else 0, 2)
    if not active:
        fields, out = (values, scales, bitmap, offsets), grad_input if need_input else None
        bound = resolve_workspace(workspace, bitmap.device)
        made = backend(bitmap.device).norm_gradients(
            grad, *fields, weight, mean, var, shape, batch_statistics, eps, out, bound
        )
        if made is not None:
            return grad_input, *made, torch.zeros_like(mean)
    walk = _Walk(bitmap, offsets, shape, grad.dtype, values.shape[0], (9, 9) if active else (5, 0), workspace)
    affine = _Affine(walk, weight, bias, mean, var, eps)
    scale = None if activation_scale is None else walk.per_place(activation_scale)
    inner = torch.zeros_like(mean, dtype=torch.float64)  # sum of <g, x> per channel
    grad_zero, grad_scale = torch.zeros_like(inner), torch.zeros_like(inner)
    for chunk in walk:
        g = chunk.read_gradient(grad)
        centred = affine.centred(values, scales) if chunk.first else None
        if active:
            of_kept = None if scale is None else chunk.spread(scale)
            g, of_scale = activate_backward_input(g, affine(chunk, values, scales, centred), kind, of_kept)
            if of_scale is not None:
                grad_scale += walk.per_channel(chunk.total(of_scale))
            del of_kept, of_scale
            if need_input:  # where the second walk finds it
                chunk.put(g, grad_input)
        weight_of = torch.ones_like(walk.weight[chunk.rows])
        if centred is not None:
            zero = chunk.zero_frequency(g)
            grad_zero = zero.sum(0, dtype=torch.float64)
            inner += (zero * centred).sum(0)
            weight_of[0] = 0
        inner += walk.per_channel(chunk.sums(values, scales, weight_of, g))
        del g, chunk
    grad_weight, grad_bias = inner * norm_factor(None, var, eps), grad_zero * walk.root

    if need_input:
        factor = norm_factor(weight, var, eps)
        pull = factor / (var + eps) * inner / walk.count
        gain, pulls = walk.per_place(factor), walk.per_place(-pull) if batch_statistics else None
        for chunk in walk:
            g, weight_of, shift = chunk.read_gradient(grad_input if active else grad), walk.weight[chunk.rows], None
            if chunk.first and batch_statistics:
                weight_of[0] = 0
                shift = -factor * grad_zero / max(1, walk.sizes.batch) - pull * affine.centred(values, scales)
            chunk.put_combined(g, gain, values, scales, pulls, weight_of, shift, grad_input)
            del g, chunk
    return grad_input, grad_weight.to(grad.dtype), grad_bias.to(grad.dtype), grad_scale.to(grad.dtype)


@define_op(
    f"(Tensor grad, {PACKED_FIELDS}, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    "Tensor? activation_scale, str kind, SymInt[] shape, bool batch_statistics, float eps, int workspace, "
    "bool need_input) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _spectral_batch_norm_backward(
    grad: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    activation_scale: Tensor | None,
    kind: str,
    shape: list[int],
    batch_statistics: bool,
    eps: float,
    workspace: int,
    need_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return norm_gradients(
        grad, values, scales, bitmap, offsets, weight, bias, mean, var, activation_scale, kind, shape,
        batch_statistics, eps, workspace, need_input,
    )  # fmt: skip


@_spectral_batch_norm_backward.register_fake
def _(
    grad: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    activation_scale: Tensor | None,
    kind: str,
    shape: list[int],
    batch_statistics: bool,
    eps: float,
    workspace: int,
    need_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = mean.shape[0]
    grad_input = grad.new_empty(values.shape[0] if need_input else 0, 2)
    return grad_input, grad.new_empty(channels), grad.new_empty(channels), grad.new_empty(channels)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *saved, ctx.kind, shape, ctx.batch_statistics, eps, workspace = inputs
    ctx.sizes = shape, eps, workspace
    ctx.mark_non_differentiable(*output[1:])  # gradients travel along the edge
    ctx.set_materialize_grads(False)  # no zeros of the size of the values
    # The input rather than the output, from which it could not be had back where a weight is zero. It is what the op
    # that made it has kept as well, so with a block before and a block behind nothing is held for this op alone.
    ctx.save_for_backward(*saved)


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 15
    need_input = ctx.needs_input_grad[0]
    saved = ctx.saved_tensors  # once: checkpointing hands them out a single time
    shape, eps, workspace = ctx.sizes
    grad_input, *of_parameters = _spectral_batch_norm_backward(
        grad, *saved, ctx.kind, shape, ctx.batch_statistics, eps, workspace, need_input
    )
    parameters = (saved[4], saved[5], saved[8])
    grad_weight, grad_bias, grad_scale = (
        None if parameter is None else gradient.to(parameter.dtype)
        for parameter, gradient in zip(parameters, of_parameters, strict=True)
    )
    return (
        grad_input if need_input else None,
        *(None,) * 4,
        grad_weight,
        grad_bias,
        None,
        None,
        grad_scale,
        *(None,) * 5,
    )


_spectral_batch_norm.register_autograd(_autograd, setup_context=_setup)


def remake(
    tensors: Sequence[Tensor],
    bitmap: Tensor,
    offsets: Tensor,
    settings: tuple[str, float, int],
    shape: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Values and scales of a packed spectrum once more, from its :class:`~spectriton.packed.Origin`.

    Args:
        tensors, settings: of the origin; an empty tensor for None.
        bitmap, offsets: the pattern.
        shape: ``[B, C, H, W]`` of the maps.
        dtype: real precision of the computation.
    """
    values, scales, *others, _, _ = tensors
    kind, eps, workspace = settings
    edge = make_edge(values.shape[0], dtype, values.device)
    parameters = (t if t.numel() else None for t in others)
    made = _spectral_batch_norm(edge, values, scales, bitmap, offsets, *parameters, kind, shape, False, eps, workspace)
    return made[1], made[2]


def spectral_batch_norm(
    x: PackedSpectrum | Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    activation: str = "identity",
    activation_scale: Tensor | None = None,
    size: tuple[int, int] | None = None,
    workspace: int | None = None,
) -> tuple[PackedSpectrum | Tensor, Tensor | None, Tensor | None]:
    """Batch norm of the maps behind a spectrum, as ``torch.nn.functional.batch_norm`` computes it of the maps.

    Exact: of the zero frequency and, by Parseval's theorem, of the energy of the others. Backward of a packed spectrum
    keeps the packed input and two numbers a channel, with or without an activation; a block that takes the result keeps
    the same and makes the result again when it needs it.

    Args:
        x: packed maps ``(B, C, H, W)``, or dense ortho half spectra ``(B, C, H, W // 2 + 1)`` as of
            ``torch.fft.rfft2(norm="ortho")``.
        weight, bias: ``(C,)`` affine parameters, or None.
        running_mean, running_var: ``(C,)`` statistics that are used where not ``training`` and updated where
            ``training``, or None for neither.
        training: normalise by the statistics of this batch.
        momentum: share of this batch in the new running statistics; a tensor of one element, too.
        eps: added to the variance.
        activation, activation_scale: an activation that follows, as of :func:`spectral_activation`.
        size: ``(H, W)`` of the maps behind half spectra, by default ``(H, 2 (Wh - 1))``.
        workspace: bound on temporaries in bytes, for packed spectra.

    Returns:
        The spectrum, packed in the pattern and value format of the input or dense; and the running statistics after
        this batch, the variance unbiased (as they were where not ``training``, or for an empty batch). Nothing is
        changed in place.

    Raises:
        TypeError, ValueError: ``x`` is neither, a shape does not fit, training with a single value per channel, or
            neither training nor statistics to use.
    """
    op = "spectral_batch_norm"
    shape = check_norm(op, x, weight, bias, running_mean, running_var, training, size)
    if activation_scale is not None and tuple(activation_scale.shape) != (shape[1],):
        fail(op, "activation_scale", activation_scale, f"shape ({shape[1]},)", "pass one scale per channel")
    check_activation(op, activation)
    out: PackedSpectrum | Tensor
    if isinstance(x, PackedSpectrum):
        bound = check_workspace(op, workspace)
        mean, var = statistics_of(x, running_mean, running_var, training, bound)
        fields = (x.values, x.scales, x.bitmap, x.offsets)
        edge, values, scales = _spectral_batch_norm(
            x.edge, *fields, weight, bias, mean, var, activation_scale, activation, shape, training, eps, bound
        )
        out = PackedSpectrum(edge, values, scales, x.bitmap, x.offsets, x.shape, x.value_dtype)
        if edge.requires_grad:
            parameters = (None if t is None else t.detach() for t in (weight, bias, mean, var, activation_scale))
            out.origin = Origin((x.values, x.scales, *parameters, None, None), (activation, eps, bound))
    else:
        used = (None, None) if training else (running_mean, running_var)
        out, mean, var = reference.spectral_batch_norm(x, (shape[2], shape[3]), weight, bias, *used, eps)
        if activation != "identity":
            out = spectral_activation(out, activation, activation_scale)
    if training:
        running_mean, running_var = moved(running_mean, running_var, mean, var, momentum, shape)
    return out, running_mean, running_var


def check_norm(
    op: str,
    x: PackedSpectrum | Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    size: tuple[int, int] | None = None,
) -> list[int]:
    """Check the arguments of a batch norm; returns ``[B, C, H, W]`` of the maps.

    Raises:
        TypeError, ValueError: as :func:`spectral_batch_norm`.
    """
    if isinstance(x, PackedSpectrum):
        shape = list(x.shape)
        if size is not None and check_size(op, size) != x.shape[2:]:
            fail(op, "size", size, f"{tuple(shape[2:])}, that of the packed maps", "leave size out")
    else:
        check_complex(op, "x", x)
        shape = [*x.shape[:2], *check_half_spectrum(op, "x", x, size)]
    channels = shape[1]
    for name, given in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if given is not None:
            check_per_channel(op, name, given, channels, "match the channels of this layer to those of its input")
    if (running_mean is None) != (running_var is None) or not (training or running_mean is not None):
        fail(
            op,
            "running_mean and running_var",
            "neither" if running_mean is running_var else "one of them",
            "both" if not training else "both or neither",
            "pass both, or training=True to use the statistics of the batch",
        )
    if training and shape[0] * shape[2] * shape[3] == 1:
        fail(
            op,
            "x",
            f"maps {tuple(shape)}",
            "more than one value per channel in training",
            "use a larger batch, or eval()",
        )
    return shape


def statistics_of(
    x: PackedSpectrum, running_mean: Tensor | None, running_var: Tensor | None, training: bool, workspace: int
) -> tuple[Tensor, Tensor]:
    """Mean and variance ``(C,)`` to normalise by: those of the batch in training, else copies of the running ones."""
    dtype = x.edge.dtype
    if not training and running_mean is not None and running_var is not None:
        return running_mean.to(dtype, copy=True), running_var.to(dtype, copy=True)
    fields = (x.values, x.scales, x.bitmap, x.offsets)
    mean, var = _map_statistics(x.edge.detach(), *fields, list(x.shape), workspace)
    return mean, var


def moved(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | Tensor,
    shape: list[int],
) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics after a batch with this mean and biased variance, of maps ``shape``."""
    count = shape[0] * shape[2] * shape[3]
    if running_mean is None or running_var is None or not count:
        return running_mean, running_var
    unbiased = var.detach() * (count / (count - 1))
    running_mean = (1 - momentum) * running_mean + momentum * mean.detach().to(running_mean.dtype)
    running_var = (1 - momentum) * running_var + momentum * unbiased.to(running_var.dtype)
    return running_mean, running_var
