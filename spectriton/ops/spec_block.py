"""A block, packed in and packed out: convolution, threshold, activation, packing (Algorithm 1 of arXiv 1905.10915).

Every frequency is independent, so forward and backward walk over chunks of frequencies that fit a bounded workspace:
unpack, mix channels, threshold, pack. No dense feature map, no dense gradient and no whole kernel spectrum is made.
Frequencies at which nothing is kept are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectriton._backend import backend
from spectriton._check import fail
from spectriton._counts import counts_of
from spectriton.frequencies import aliases, frequency_grid, tap_basis
from spectriton.ops._arguments import (
    check_activation,
    check_convolution,
    check_packed,
    check_per_channel,
    check_rule,
    check_stride,
    check_workspace,
)
from spectriton.ops._define import PACKED_RESULT, define_op
from spectriton.ops._planes import (
    Histogram,
    Packed,
    Packer,
    fake_packed,
    pack_chunks,
    resolve_workspace,
    row_chunks,
)
from spectriton.ops._remade import made_once, will_ask
from spectriton.ops.spatial_relu import remake_relu
from spectriton.ops.spectral_batch_norm import remake
from spectriton.packed import Layout, PackedSpectrum, layout, most_kept, value_dtype_name
from spectriton.reference import RowPattern, TileIndex


class _Settings(NamedTuple):
    """A convolution as the ops take it: ``shape`` is ``[B, H, W]``, ``channels`` are those of each packed input."""

    shape: list[int]
    channels: list[int]
    stride: list[int]
    dilation: tuple[int, int]
    groups: int
    workspace: int


#: Values, scales, bitmaps and offsets of the packed inputs.
_Inputs = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class _Source:
    """One packed input: its tensors, and which input channels of the convolution it holds."""

    def __init__(
        self, fields: tuple[Tensor, Tensor, Tensor, Tensor], shape: list[int], channels: int, first: int
    ) -> None:
        self.fields = fields
        self.sizes = layout((shape[0], channels, *shape[1:]))
        self.channels = slice(first, first + channels)
        self.index = backend(fields[0].device).tile_index(fields[2], fields[3])

    @property
    def kept(self) -> int:
        """Coefficients kept."""
        return self.fields[0].shape[0]

    def filled_rows(self) -> int:
        """How many frequencies come before the tail at which nothing is kept."""
        return _filled_rows(self.fields[2], self.index)


class _FoldsOnHost(NamedTuple):
    """What the host has to know of :class:`spectriton.frequencies.Aliases`, without asking a GPU.

    Attributes:
        real: frequencies of the output that are their own conjugate.
        owned: ``(A, F_out)`` bool: there is such an alias.
    """

    real: list[int]
    owned: NDArray[np.bool_]


@lru_cache(maxsize=64)
def _folds_on_host(height: int, width: int, stride: tuple[int, int]) -> _FoldsOnHost:
    folds = aliases(frequency_grid(height, width), stride)
    return _FoldsOnHost(folds.real.tolist(), (folds.factor != 0).numpy())


class _Walk:
    """What forward and backward share: sizes, grids, products, and how many frequencies fit the workspace.

    Chunks are ranges of the frequencies of the output. With a stride, ``A`` frequencies of the input fold onto each.

    Args:
        settings: of the convolution.
        weight: taps.
        inputs: the fields of the packed inputs, see :data:`_Inputs`.
        dtype: real precision of the computation.
        kind: of the activation.
        kept_out: coefficients kept in the output, where it is there already.
    """

    def __init__(
        self,
        settings: _Settings,
        weight: Tensor,
        inputs: _Inputs,
        dtype: torch.dtype,
        kind: str,
        kept_out: int | None = None,
    ) -> None:
        batch, height, width = settings.shape
        device = weight.device
        first = [sum(settings.channels[:n]) for n in range(len(settings.channels))]
        self.sources = [
            _Source(fields, settings.shape, channels, start)
            for fields, channels, start in zip(zip(*inputs, strict=True), settings.channels, first, strict=True)
        ]
        self.stride, self.dilation = (settings.stride[0], settings.stride[1]), settings.dilation
        size = (height // self.stride[0], width // self.stride[1])
        self.outputs = outputs = layout((batch, weight.shape[0], *size))
        self.primitives = backend(device)
        self.grid = frequency_grid(height, width, device)
        self.folds = None if self.stride == (1, 1) else aliases(self.grid, self.stride)
        self._folds_on_host = None if self.folds is None else _folds_on_host(height, width, self.stride)
        self.dtype = dtype
        self.mixing = self.primitives.mixing(weight.to(dtype), settings.groups)
        self._kernel_size = (weight.shape[2], weight.shape[3])
        maps = (outputs, *(source.sizes for source in self.sources))
        self._workspace = resolve_workspace(settings.workspace, device, *maps)
        item, fold = 2 * dtype.itemsize, self.stride[0] * self.stride[1]
        # Each coefficient of a chunk stands there once; one that is kept takes its position (8 bytes) and a few values
        # on its way: read from the input; activated and stored in forward; derived and scaled in backward. Bit by bit
        # it goes from one place to the other, and in forward it is stored.
        by_bits = self.primitives.by_bits(dtype) and self.folds is None
        fused = by_bits and self.primitives.by_bits(dtype, kind)
        conjugated = 0 if kept_out is None else item  # a copy, for the gradient of the taps
        share, of_inputs = 0.0, 0.0
        for source in self.sources:
            sizes = source.sizes
            share = max(share, source.kept / max(1, sizes.frequencies * sizes.row))
            of_inputs += fold * (item + (conjugated if by_bits else share * (8 + 2 * item))) * sizes.padded_row
        if kept_out is None:
            # About as many kept as in the input, at a guess; but no fewer than a quarter.
            per_output = item + 1 + max(share, 0.25) * (item if fused else 8 + 3 * item)
        elif fused:
            per_output = item
        else:
            per_output = item + kept_out / max(1, outputs.frequencies * outputs.row) * (16 + 6 * item)
        taps = fold * self.mixing.temporaries[kept_out is not None] * item * weight[:, :, 0, 0].numel()
        self._bytes_per_row = int(of_inputs + per_output * outputs.padded_row) + taps

    def filled_rows(self) -> int:
        """How many frequencies of the output come before the tail onto which nothing of the input falls."""
        if self.folds is not None:
            return self.outputs.frequencies
        return max((source.filled_rows() for source in self.sources), default=0)

    def chunks(self, rows: int) -> list[slice]:
        """The frequencies ``0:rows`` in chunks that fit the workspace."""
        return list(row_chunks(rows, self._bytes_per_row, self._workspace))

    def buffers(self, chunks: list[slice]) -> tuple[list[Tensor], Tensor]:
        """Pairs ``(A * rows, P, 2)`` for each source, and ``(rows, P, 2)``, of the largest chunk; padding is zero."""
        rows = chunks[0].stop if chunks else 0
        fold = self.stride[0] * self.stride[1]
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.grid.index.device}

        def buffer(rows: int, sizes: Layout) -> Tensor:
            made = torch.empty(rows, sizes.padded_row, 2, **options)
            if sizes.padded_row > sizes.row:
                made[:, sizes.row :].zero_()
            return made

        return [buffer(fold * rows, source.sizes) for source in self.sources], buffer(rows, self.outputs)

    def basis(self, part: slice) -> Tensor:
        """``(A, Fc, kh * kw, 2)``."""
        if self.folds is None:
            return tap_basis(self.grid, self._kernel_size, part, self.dtype, self.dilation)[None]
        rows, conjugate, factor = (t[:, part] for t in self.folds[:3])
        basis = tap_basis(self.grid, self._kernel_size, rows.flatten(), self.dtype, self.dilation).clone()
        basis = basis.unflatten(0, rows.shape)
        basis[..., 1] *= (1 - 2 * conjugate.to(self.dtype))[..., None]
        return basis.mul_(factor.to(self.dtype)[..., None, None])

    def weights(self, basis: Tensor) -> Tensor:
        """The kernel spectrum of a chunk, ``(A, Fc, ...)``, for the products."""
        weights = self.mixing.weights(basis.flatten(0, 1))
        return weights.view(*basis.shape[:2], *weights.shape[1:])

    def read(self, source: _Source, part: slice, buffer: Tensor) -> tuple[Tensor, Tensor | slice, RowPattern | None]:
        """What folds onto a chunk: pairs ``(A, Fc, P, 2)``, their frequencies ``(A * Fc,)`` and their pattern."""
        rows: Tensor | slice = part if self.folds is None else self.folds.rows[:, part].flatten()
        count, tiles = part.stop - part.start, source.sizes.tiles
        x = buffer[: self.stride[0] * self.stride[1] * count]
        pattern = self.primitives.row_pattern(*source.fields[2:], rows, 0, tiles, source.index)
        self.primitives.unpack_rows(*source.fields, rows, 0, tiles, x, pattern)
        self.conjugate(x, part)
        return x.view(-1, count, *x.shape[1:]), rows, pattern

    def conjugate(self, x: Tensor, part: slice) -> None:
        """Conjugates, in place, what folds as its conjugate: pairs ``(A * Fc, P, 2)``."""
        if self.folds is not None:
            x[..., 1] *= 1 - 2 * self.folds.conjugate[:, part].reshape(-1, 1).to(x.dtype)

    def make_real(self, y: Tensor, part: slice) -> None:
        """Takes the real part, in place, where a frequency of the folded output is its own conjugate."""
        if self._folds_on_host is not None:
            for row in self._folds_on_host.real:
                if part.start <= row < part.stop:
                    y[row - part.start, :, 1].zero_()

    def gather(
        self, source: _Source, x: Tensor, part: slice, rows: Tensor | slice, pattern: RowPattern | None, out: Tensor
    ) -> None:
        """The gradient ``x`` ``(A, Fc, P, 2)`` of what :meth:`read` gave, to the pattern of the source."""
        _, _, bitmap, offsets = source.fields
        flat = x.flatten(0, 1)
        self.conjugate(flat, part)
        if self.folds is not None and self._folds_on_host is not None:
            # A place without an alias names a row that another one owns.
            there = int(self._folds_on_host.owned[:, part].sum())
            if there < flat.shape[0]:
                owned = (self.folds.factor[:, part] != 0).flatten().to(torch.int8)
                places = owned.argsort(descending=True, stable=True)[:there]
                flat, rows, pattern = flat[places], self.folds.rows[:, part].flatten()[places], None
        self.primitives.gather_rows(flat, bitmap, offsets, rows, 0, out, pattern)

    @property
    def dc_gain(self) -> float:
        """A constant is its mean at frequency zero, times this in the ortho spectrum of the output."""
        return float((self.outputs.height * self.outputs.width) ** 0.5)


def _channels(buffer: Tensor, sizes: Layout) -> Tensor:
    """Pairs ``(Fc, P, 2)`` as ``(Fc, B, C, 2)``, padding left out."""
    # A view by hand: unflatten() is written in Python, and takes several times as long.
    return buffer[:, : sizes.row].view(buffer.shape[0], sizes.batch, sizes.channels, 2)


def _filled_rows(bitmap: Tensor, index: TileIndex | None) -> int:
    """How many frequencies come before the tail at which nothing is kept."""
    if index is not None:
        return index.filled
    counts = counts_of(bitmap)
    if counts is not None:
        return counts.rows
    rows = torch.nonzero(bitmap.flatten(1).any(1))
    return int(rows[-1]) + 1 if rows.numel() else 0


def _mixed(walk: _Walk, bias: Tensor | None, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields ``(rows, y)`` chunk by chunk: the convolution's spectra as pairs ``(Fc, P, 2)``, in one reused buffer."""
    chunks = walk.chunks(rows)
    x_buffers, y_buffer = walk.buffers(chunks)
    for part in chunks:
        y = y_buffer[: part.stop - part.start]
        target = _channels(y, walk.outputs)
        weights = walk.weights(walk.basis(part))
        begun = False
        for source, buffer in zip(walk.sources, x_buffers, strict=True):
            x = walk.read(source, part, buffer)[0]
            for folded, mixing_weights in zip(x, weights, strict=True):
                chosen = walk.mixing.of_inputs(mixing_weights, source.channels)
                walk.mixing.mix(_channels(folded, source.sizes), chosen, target, add=begun)
                begun = True
        walk.make_real(y, part)
        if bias is not None and part.start == 0:
            target[0, :, :, 0] += bias.to(walk.dtype) * walk.dc_gain
        yield part, y


#: Tensors of the origin of a packed spectrum, see :class:`spectriton.packed.Origin`.
_ORIGIN = 9
_INPUTS = "Tensor[] edges, Tensor[] values, Tensor[] scales, Tensor[] bitmaps, Tensor[] offsets"
_CONVOLUTION = (
    "SymInt[] shape, SymInt[] channels, SymInt[] stride, SymInt[] dilation, int groups, str kind, int workspace"
)


@define_op(
    f"({_INPUTS}, Tensor weight, Tensor? bias, Tensor? activation_scale, {_CONVOLUTION}, float threshold, "
    f"float density, str value_dtype, Tensor? threshold_scale, Tensor[] origins, str[] origin_kinds, "
    f"float[] origin_eps) -> {PACKED_RESULT}"
)
def _spec_block(
    edges: list[Tensor],
    values: list[Tensor],
    scales: list[Tensor],
    bitmaps: list[Tensor],
    offsets: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    activation_scale: Tensor | None,
    shape: list[int],
    channels: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    kind: str,
    workspace: int,
    threshold: float,
    density: float,
    value_dtype: str,
    threshold_scale: Tensor | None,
    origins: list[Tensor],
    origin_kinds: list[str],
    origin_eps: list[float],
) -> Packed:
    """``shape`` is ``[B, H, W]`` of the inputs, ``channels`` those of each.

    Origins, :data:`_ORIGIN` tensors for each input, are for backward: they take the place of the values of an input
    whose kind is not empty. Empty ones stand for those that are not there: a list of tensors may not hold None. Where
    no input has an origin the list is empty.
    """
    dtype = edges[0].dtype
    settings = _Settings(shape, channels, stride, (dilation[0], dilation[1]), groups, workspace)
    walk = _Walk(settings, weight, (values, scales, bitmaps, offsets), dtype, kind)
    rows = walk.outputs.frequencies
    if threshold > 0 or density >= 0:
        # Where nothing comes in nothing goes out, and zero is below any threshold; the bias needs frequency zero.
        rows = min(rows, max(1, walk.filled_rows()))
    level: float | Tensor = threshold if threshold_scale is None else threshold * threshold_scale.to(dtype)
    if density >= 0:
        histogram = Histogram(weight.device)
        for part, y in _mixed(walk, bias, rows):
            histogram.add(y[part.start == 0 :, : walk.outputs.row])
        level = histogram.threshold(density, walk.outputs)
    scale = None if activation_scale is None else activation_scale.to(dtype)

    def fill(making: Packer) -> None:
        for part, y in _mixed(walk, bias, rows):
            making.append(y, part, level, kind, scale)

    most = most_kept(density, walk.outputs) if density >= 0 else None
    return pack_chunks(fill, walk.outputs, value_dtype, dtype, weight.device, most=most)


@_spec_block.register_fake
def _(
    edges: list[Tensor],
    values: list[Tensor],
    scales: list[Tensor],
    bitmaps: list[Tensor],
    offsets: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    activation_scale: Tensor | None,
    shape: list[int],
    channels: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    kind: str,
    workspace: int,
    threshold: float,
    density: float,
    value_dtype: str,
    threshold_scale: Tensor | None,
    origins: list[Tensor],
    origin_kinds: list[str],
    origin_eps: list[float],
) -> Packed:
    size = (shape[0], weight.shape[0], shape[1] // stride[0], shape[2] // stride[1])
    return fake_packed(edges[0], edges[0].dtype, size, value_dtype)


@define_op(
    "(Tensor grad, Tensor[] values, Tensor[] scales, Tensor[] bitmaps, Tensor[] offsets, Tensor out_values, "
    "Tensor out_scales, Tensor out_bitmap, Tensor out_offsets, Tensor weight, Tensor? activation_scale, "
    f"{_CONVOLUTION}, bool[] need_inputs) -> (Tensor[], Tensor, Tensor, Tensor)"
)
def _spec_block_backward(
    grad: Tensor,
    values: list[Tensor],
    scales: list[Tensor],
    bitmaps: list[Tensor],
    offsets: list[Tensor],
    out_values: Tensor,
    out_scales: Tensor,
    out_bitmap: Tensor,
    out_offsets: Tensor,
    weight: Tensor,
    activation_scale: Tensor | None,
    shape: list[int],
    channels: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    kind: str,
    workspace: int,
    need_inputs: list[bool],
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Gradients for the packed inputs (in their own patterns), the taps, the bias and the scale of the activation."""
    dtype = grad.dtype
    settings = _Settings(shape, channels, stride, (dilation[0], dilation[1]), groups, workspace)
    inputs = (values, scales, bitmaps, offsets)
    walk = _Walk(settings, weight, inputs, dtype, kind, out_values.shape[0])
    primitives, mixing = walk.primitives, walk.mixing
    out_packed = (out_values, out_scales, out_bitmap, out_offsets)
    out_index = primitives.tile_index(out_bitmap, out_offsets)
    grad = grad.contiguous()
    grad_inputs = [grad.new_zeros(v.shape[0] if need else 0, 2) for v, need in zip(values, need_inputs, strict=True)]
    grad_bias = grad.new_zeros(weight.shape[0])
    of_scale: list[Tensor] = []
    scale = None if activation_scale is None else activation_scale.to(dtype)

    # The gradient of a frequency needs both sides there; bias and scale see the rest of the output, too.
    rows, shared = _filled_rows(out_bitmap, out_index), walk.filled_rows()
    chunks = walk.chunks(rows if scale is not None else min(rows, max(1, shared)))
    x_buffers, g_buffer = walk.buffers(chunks)
    for part in chunks:
        g = g_buffer[: part.stop - part.start]
        terms = primitives.unpack_gradient_rows(
            grad, *out_packed, part, kind, scale, walk.outputs.channels, g, out_index
        )
        if terms is not None:
            of_scale.append(terms)
        walk.make_real(g, part)
        grads = _channels(g, walk.outputs)
        if part.start == 0:
            grad_bias += grads[0, :, :, 0].sum(0) * walk.dc_gain
        if part.start >= shared:
            continue
        basis = walk.basis(part)
        weights = walk.weights(basis) if any(need_inputs) else basis
        for source, buffer, grad_input, need in zip(walk.sources, x_buffers, grad_inputs, need_inputs, strict=True):
            x, source_rows, pattern = walk.read(source, part, buffer)
            for fold in range(x.shape[0]):
                folded = _channels(x[fold], source.sizes)
                mixing.add_grad_taps(folded, grads, basis[fold], source.channels)
                if need:
                    mixing.mix_grad_input(grads, mixing.of_inputs(weights[fold], source.channels), folded)
            if need:
                walk.gather(source, x, part, source_rows, pattern, grad_input)
            del pattern
    if of_scale:
        grad_scale = torch.stack(of_scale).sum(0)
    else:
        grad_scale = grad.new_zeros(0 if activation_scale is None else weight.shape[0])
    return grad_inputs, mixing.grad_taps(), grad_bias, grad_scale


@_spec_block_backward.register_fake
def _(
    grad: Tensor,
    values: list[Tensor],
    scales: list[Tensor],
    bitmaps: list[Tensor],
    offsets: list[Tensor],
    out_values: Tensor,
    out_scales: Tensor,
    out_bitmap: Tensor,
    out_offsets: Tensor,
    weight: Tensor,
    activation_scale: Tensor | None,
    shape: list[int],
    channels: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    kind: str,
    workspace: int,
    need_inputs: list[bool],
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    return (
        [grad.new_empty(v.shape[0] if need else 0, 2) for v, need in zip(values, need_inputs, strict=True)],
        grad.new_empty(weight.shape),
        grad.new_empty(weight.shape[0]),
        grad.new_empty(0 if activation_scale is None else weight.shape[0]),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Packed) -> None:
    _, values, scales, bitmaps, offsets, weight, bias, activation_scale = inputs[:8]
    ctx.convolution = inputs[8:15]
    *_, origins, ctx.origin_kinds, ctx.origin_eps = inputs
    ctx.kept, ctx.bias_dtype = [v.shape[0] for v in values], None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1], output[2])  # gradients travel along the edge
    ctx.set_materialize_grads(False)  # no zeros of the size of the values
    # The output is the next block's input: both save the same tensors, so one packed copy a block is held. Where a
    # batch norm stands between them it has kept its own input, and that is it.
    made = [kind != "" for kind in ctx.origin_kinds]
    kept = ([None if again else t for t, again in zip(field, made, strict=True)] for field in (values, scales))
    fields = [*kept, bitmaps, offsets]
    for kind, bitmap in zip(ctx.origin_kinds, bitmaps, strict=True):
        if kind == "relu":
            will_ask(bitmap)
    # Without an activation backward looks at the pattern of the output only.
    made_values = (None, None) if inputs[13] == "identity" else output[1:3]
    out_packed = (*made_values, *output[3:])
    ctx.save_for_backward(*(t for field in fields for t in field), *out_packed, weight, activation_scale, *origins)


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 22
    saved, n = ctx.saved_tensors, len(ctx.kept)
    values, scales, bitmaps, offsets = (list(saved[first : first + n]) for first in range(0, 4 * n, n))
    out_values, out_scales, *out_pattern, weight, activation_scale = saved[4 * n : 4 * n + 6]
    # The gradient stands for values that nobody reads: there are as many.
    out_packed = (
        (grad, grad.new_empty(0), *out_pattern) if out_values is None else (out_values, out_scales, *out_pattern)
    )
    origins = saved[4 * n + 6 :]
    (batch, *size), channels, workspace = ctx.convolution[0], ctx.convolution[1], ctx.convolution[-1]
    for i, (kind, eps) in enumerate(zip(ctx.origin_kinds, ctx.origin_eps, strict=True)):
        if kind:
            tensors, shape = origins[_ORIGIN * i : _ORIGIN * (i + 1)], [batch, channels[i], *size]
            settings = (kind, eps, workspace)
            pattern = (bitmaps[i], offsets[i])
            if kind == "relu":
                made = partial(remake_relu, tensors, *pattern, settings, shape, ctx.kept[i], grad.dtype)
                room = resolve_workspace(workspace, grad.device) // 2
                values[i], scales[i] = made_once(bitmaps[i], made, room)
            else:
                values[i], scales[i] = remake(tensors, *pattern, settings, shape, grad.dtype)
    need = ctx.needs_input_grad[0]
    need_inputs = list(need) if isinstance(need, (list, tuple)) else [bool(need)] * n
    grad_inputs, grad_weight, grad_bias, grad_scale = _spec_block_backward(
        grad, values, scales, bitmaps, offsets, *out_packed, weight, activation_scale, *ctx.convolution, need_inputs
    )
    return (
        [given if needed else None for given, needed in zip(grad_inputs, need_inputs, strict=True)],
        *([None] * n for _ in range(4)),
        grad_weight.to(weight.dtype),
        None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
        None if activation_scale is None else grad_scale.to(activation_scale.dtype),
        *(None,) * 11,
        [None] * len(origins),
        None,
        None,
    )


_spec_block.register_autograd(_autograd, setup_context=_setup)


def spec_block(
    packed: PackedSpectrum | Sequence[PackedSpectrum],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    threshold: float | None = None,
    density: float | None = None,
    activation: str = "tanh",
    activation_scale: Tensor | None = None,
    threshold_scale: Tensor | None = None,
    groups: int = 1,
    value_dtype: torch.dtype | str | None = None,
    workspace: int | None = None,
) -> PackedSpectrum:
    """Convolve, threshold and activate a packed spectrum; Algorithm 1 of arXiv 1905.10915.

    Args:
        packed: maps ``(B, I, H, W)``; or several of them, whose channels stand one after the other: they are unpacked
            side by side, and no copy is made.
        weight: taps ``(O, I / groups, kh, kw)``, applied as by ``nn.Conv2d(padding="same", padding_mode="circular")``.
        bias: ``(O,)``, or None.
        stride: the output is taken at every ``stride``-th position; ``H`` and ``W`` must be multiples of it. The
            frequencies that alias onto one another are mixed as further input channels.
        dilation: distance between the taps.
        threshold: coefficients of the convolution whose modulus (ortho spectrum) is below it are dropped.
        density: instead of a threshold, the fraction of coefficients to keep; costs a second pass of the mixing.
        activation: ``h`` in ``h(re) + i h(im)``: tanh (the paper's), softsign, asinh, atan or identity.
        activation_scale: ``(O,)``; per channel ``s h(x / s)``.
        threshold_scale: ``(O,)``; the threshold of a channel is ``threshold`` times this. Not differentiated.
        groups: as for ``nn.Conv2d``; 1 for several inputs.
        value_dtype: format of the kept values, by default that of the (first) input.
        workspace: bound on temporaries in bytes.

    Returns:
        Packed maps ``(B, O, H / stride, W / stride)``; differentiable in all tensors.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range.
    """
    op = "spec_block"
    inputs: list[Any] = list(packed) if isinstance(packed, (list, tuple)) else [packed]
    if not inputs:
        fail(op, "packed", "an empty list", "at least one packed spectrum", "pass what the layers before it gave")
    first = check_packed(op, "packed", inputs[0])
    batch, _, height, width = first.shape
    for other in inputs[1:]:
        if check_packed(op, "packed", other).shape[:1] + other.shape[2:] != first.shape[:1] + first.shape[2:]:
            expected = f"batch {batch} and maps of {height}x{width}, as the first"
            fail(op, "packed", tuple(other.shape), expected, "concatenate maps of one size only")
        if other.edge.dtype != first.edge.dtype:
            fail(op, "packed", other.dtype, f"{first.dtype}, as the first", "pack all inputs in one precision")
    channels = [p.shape[1] for p in inputs]
    check_convolution(op, sum(channels), weight, bias, groups)
    if groups != 1 and len(inputs) > 1:
        fail(op, "groups", groups, "1 for several inputs", "pass one packed spectrum, or groups=1")
    steps = check_stride(op, stride)
    if height % steps[0] or width % steps[1]:
        expected = f"a divisor of the {height}x{width} maps"
        fail(op, "stride", steps, expected, "pad the images, or use stride 1 and a pooling layer")
    spread = check_stride(op, dilation, "dilation")
    check_activation(op, activation)
    outputs = weight.shape[0]
    for given, argument in ((activation_scale, "activation_scale"), (threshold_scale, "threshold_scale")):
        if given is not None:
            check_per_channel(op, argument, given, outputs, "pass one scale per output channel")
    level, fraction = check_rule(op, threshold, density)
    if density is not None and threshold_scale is not None:
        fail(op, "threshold_scale", threshold_scale, "none together with a density", "pass a threshold, or no scale")
    name = first.value_dtype if value_dtype is None else value_dtype_name(op, value_dtype, first.edge.dtype)
    origins, none = [p.origin for p in inputs], first.values.new_empty(0)
    remade = any(origin is not None for origin in origins)
    fields = _spec_block(
        *([getattr(p, field) for p in inputs] for field in ("edge", "values", "scales", "bitmap", "offsets")),
        weight,
        bias,
        activation_scale,
        [batch, height, width],
        channels,
        list(steps),
        list(spread),
        groups,
        activation,
        check_workspace(op, workspace),
        level,
        fraction,
        name,
        threshold_scale,
        [none if t is None else t for o in origins if remade for t in ((None,) * _ORIGIN if o is None else o.tensors)],
        ["" if origin is None else origin.settings[0] for origin in origins],
        [0.0 if origin is None else origin.settings[1] for origin in origins],
    )
    return PackedSpectrum.of(fields, (batch, outputs, height // steps[0], width // steps[1]), name)
