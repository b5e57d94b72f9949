"""A block, packed in and packed out: convolution, threshold, activation, packing (Algorithm 1 of arXiv 1905.10915).

Every frequency is independent, so forward and backward walk over chunks of frequencies that fit a bounded workspace:
unpack, mix channels, threshold, pack. No dense feature map, no dense gradient and no whole kernel spectrum is made.
Frequencies at which nothing is kept are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectriton._backend import backend
from spectriton._check import fail
from spectriton.frequencies import frequency_grid, tap_basis
from spectriton.ops._arguments import check_activation, check_convolution, check_packed, check_rule, check_workspace
from spectriton.ops._define import PACKED_FIELDS, PACKED_RESULT, define_op
from spectriton.ops._planes import (
    Histogram,
    Packed,
    fake_packed,
    keep_from_density,
    packer,
    resolve_workspace,
    row_chunks,
)
from spectriton.packed import Layout, PackedSpectrum, layout, value_dtype_name
from spectriton.reference import TileIndex


class _Walk:
    """What forward and backward share: sizes, grid, products, and how many frequencies fit the workspace.

    Args:
        weight, shape, groups, dtype, workspace: as the ops take them.
        kept: coefficients kept in the input.
        kept_out: coefficients kept in the output, where it is there already.
    """

    def __init__(
        self,
        weight: Tensor,
        shape: list[int],
        groups: int,
        dtype: torch.dtype,
        workspace: int,
        kept: int,
        kept_out: int | None = None,
    ) -> None:
        self.primitives = backend(weight.device)
        self.inputs = inputs = layout(shape)
        self.outputs = outputs = layout((shape[0], weight.shape[0], *shape[2:]))
        self.grid = frequency_grid(shape[2], shape[3], weight.device)
        self.dtype = dtype
        self.mixing = self.primitives.mixing(weight.to(dtype), groups)
        self._kernel_size = (weight.shape[2], weight.shape[3])
        self._workspace = resolve_workspace(workspace, weight.device)
        item = 2 * dtype.itemsize
        # Each coefficient of a chunk stands there once; one that is kept takes its position (8 bytes) and a few values
        # on its way: read from the input; activated and stored in forward; derived and scaled in backward.
        share = kept / max(1, inputs.frequencies * inputs.row)
        per_input = item + share * (8 + 2 * item)
        if kept_out is None:
            # About as many kept as in the input, at a guess; but no fewer than a quarter.
            per_output = item + 1 + max(share, 0.25) * (8 + 3 * item)
        else:
            per_output = item + kept_out / max(1, outputs.frequencies * outputs.row) * (16 + 6 * item)
        taps = 3 * item * weight[:, :, 0, 0].numel()  # weights, their gradient or embedding
        self._bytes_per_row = int(per_input * inputs.padded_row + per_output * outputs.padded_row) + taps

    def chunks(self, rows: int) -> Iterator[slice]:
        """The frequencies ``0:rows`` in chunks that fit the workspace."""
        return row_chunks(rows, self._bytes_per_row, self._workspace)

    def buffer(self, chunks: list[slice], sizes: Layout) -> Tensor:
        """Zeroed pairs ``(rows of the largest chunk, P, 2)``; padding stays zero."""
        rows = chunks[0].stop if chunks else 0
        return torch.zeros(rows, sizes.padded_row, 2, dtype=self.dtype, device=self.grid.index.device)

    def basis(self, rows: slice) -> Tensor:
        """``(Fc, kh * kw, 2)``."""
        return tap_basis(self.grid, self._kernel_size, rows, self.dtype)


def _channels(buffer: Tensor, sizes: Layout) -> Tensor:
    """Pairs ``(Fc, P, 2)`` as ``(Fc, B, C, 2)``, padding left out."""
    return buffer[:, : sizes.row].unflatten(1, (sizes.batch, sizes.channels))


def _filled_rows(bitmap: Tensor, index: TileIndex | None) -> int:
    """How many frequencies come before the tail at which nothing is kept."""
    if index is not None:
        filled = np.flatnonzero(index.counts.any(1))
    else:
        filled = torch.nonzero(bitmap.flatten(1).any(1)).flatten().cpu().numpy()
    return int(filled[-1]) + 1 if filled.size else 0


def _mixed(
    walk: _Walk, packed: tuple[Tensor, Tensor, Tensor, Tensor], index: TileIndex | None, bias: Tensor | None, rows: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yields ``(rows, y)`` chunk by chunk: the convolution's spectra as pairs ``(Fc, P, 2)``, in one reused buffer."""
    _, _, bitmap, offsets = packed
    tiles = walk.inputs.tiles
    chunks = list(walk.chunks(rows))
    x_buffer, y_buffer = walk.buffer(chunks, walk.inputs), walk.buffer(chunks, walk.outputs)
    for part in chunks:
        x, y = x_buffer[: part.stop - part.start], y_buffer[: part.stop - part.start]
        pattern = walk.primitives.row_pattern(bitmap, offsets, part, 0, tiles, index)
        walk.primitives.unpack_rows(*packed, part, 0, tiles, x, pattern)
        del pattern
        walk.mixing.mix(_channels(x, walk.inputs), walk.mixing.weights(walk.basis(part)), _channels(y, walk.outputs))
        if bias is not None and part.start == 0:
            # A constant is its mean at frequency zero, times sqrt(H W) in the ortho spectrum.
            _channels(y, walk.outputs)[0, :, :, 0] += bias.to(walk.dtype) * _dc_gain(walk.inputs)
        yield part, y


def _dc_gain(sizes: Layout) -> float:
    return float((sizes.height * sizes.width) ** 0.5)


@define_op(
    f"(Tensor edge, {PACKED_FIELDS}, Tensor weight, Tensor? bias, Tensor? activation_scale, SymInt[] shape, "
    f"int groups, float threshold, float density, str kind, str value_dtype, int workspace) -> {PACKED_RESULT}"
)
def _spec_block(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation_scale: Tensor | None,
    shape: list[int],
    groups: int,
    threshold: float,
    density: float,
    kind: str,
    value_dtype: str,
    workspace: int,
) -> Packed:
    walk = _Walk(weight, shape, groups, edge.dtype, workspace, values.shape[0])
    packed = (values, scales, bitmap, offsets)
    index = walk.primitives.tile_index(bitmap, offsets)
    rows = walk.grid.count
    if threshold > 0 or density >= 0:
        # Where nothing comes in nothing goes out, and zero is below any threshold; the bias needs frequency zero.
        rows = min(rows, max(1, _filled_rows(bitmap, index)))
    if density >= 0:
        histogram = Histogram(weight.device)
        for part, y in _mixed(walk, packed, index, bias, rows):
            histogram.add(y[part.start == 0 :, : walk.outputs.row])
        threshold = histogram.threshold(keep_from_density(density, walk.outputs))
    making = packer(walk.outputs, value_dtype, edge.dtype, weight.device)
    scale = None if activation_scale is None else activation_scale.to(edge.dtype)
    for part, y in _mixed(walk, packed, index, bias, rows):
        making.append(y, part, threshold, kind, scale)
    return making.finish()


@_spec_block.register_fake
def _(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation_scale: Tensor | None,
    shape: list[int],
    groups: int,
    threshold: float,
    density: float,
    kind: str,
    value_dtype: str,
    workspace: int,
) -> Packed:
    return fake_packed(edge, edge.dtype, (shape[0], weight.shape[0], *shape[2:]), value_dtype)


@define_op(
    "(Tensor grad, Tensor values, Tensor scales, Tensor bitmap, Tensor offsets, Tensor out_values, Tensor out_scales, "
    "Tensor out_bitmap, Tensor out_offsets, Tensor weight, Tensor? activation_scale, SymInt[] shape, int groups, "
    "str kind, int workspace, bool need_input) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _spec_block_backward(
    grad: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    out_values: Tensor,
    out_scales: Tensor,
    out_bitmap: Tensor,
    out_offsets: Tensor,
    weight: Tensor,
    activation_scale: Tensor | None,
    shape: list[int],
    groups: int,
    kind: str,
    workspace: int,
    need_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for the packed input (in its own pattern), the taps, the bias and the scale of the activation."""
    dtype = grad.dtype
    walk = _Walk(weight, shape, groups, dtype, workspace, values.shape[0], out_values.shape[0])
    primitives, mixing, tiles = walk.primitives, walk.mixing, walk.inputs.tiles
    packed, out_packed = (values, scales, bitmap, offsets), (out_values, out_scales, out_bitmap, out_offsets)
    index, out_index = primitives.tile_index(bitmap, offsets), primitives.tile_index(out_bitmap, out_offsets)
    grad = grad.contiguous()
    grad_input = grad.new_zeros(values.shape[0] if need_input else 0, 2)
    grad_bias = grad.new_zeros(weight.shape[0])
    grad_scale = grad.new_zeros(0 if activation_scale is None else weight.shape[0])
    scale = None if activation_scale is None else activation_scale.to(dtype)

    # The gradient of a frequency needs both sides there; bias and scale see the rest of the output, too.
    rows, shared = _filled_rows(out_bitmap, out_index), _filled_rows(bitmap, index)
    chunks = list(walk.chunks(rows if scale is not None else min(rows, max(1, shared))))
    x_buffer, g_buffer = walk.buffer(chunks, walk.inputs), walk.buffer(chunks, walk.outputs)
    for part in chunks:
        x, g = x_buffer[: part.stop - part.start], g_buffer[: part.stop - part.start]
        scale_terms = primitives.unpack_gradient_rows(
            grad, *out_packed, part, kind, scale, walk.outputs.channels, g, out_index
        )
        if scale_terms is not None:
            grad_scale += scale_terms
        grads, inputs = _channels(g, walk.outputs), _channels(x, walk.inputs)
        if part.start == 0:
            grad_bias += grads[0, :, :, 0].sum(0) * _dc_gain(walk.inputs)
        if part.start >= shared:
            continue
        basis = walk.basis(part)
        pattern = primitives.row_pattern(bitmap, offsets, part, 0, tiles, index)
        primitives.unpack_rows(*packed, part, 0, tiles, x, pattern)
        mixing.add_grad_taps(inputs, grads, basis)
        if need_input:
            mixing.mix_grad_input(grads, mixing.weights(basis), inputs)
            primitives.gather_rows(x, bitmap, offsets, part, 0, grad_input, pattern)
        del pattern
    return grad_input, mixing.grad_taps(), grad_bias, grad_scale


@_spec_block_backward.register_fake
def _(
    grad: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    out_values: Tensor,
    out_scales: Tensor,
    out_bitmap: Tensor,
    out_offsets: Tensor,
    weight: Tensor,
    activation_scale: Tensor | None,
    shape: list[int],
    groups: int,
    kind: str,
    workspace: int,
    need_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        grad.new_empty(values.shape[0] if need_input else 0, 2),
        grad.new_empty(weight.shape),
        grad.new_empty(weight.shape[0]),
        grad.new_empty(0 if activation_scale is None else weight.shape[0]),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Packed) -> None:
    _, values, scales, bitmap, offsets, weight, bias, activation_scale, shape, groups, _, _, kind, _, workspace = inputs
    ctx.shape, ctx.groups, ctx.kind, ctx.workspace = shape, groups, kind, workspace
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1], output[2])  # gradients travel along the edge
    # The output is the next block's input: both save the same tensors, so one packed copy a block is held.
    ctx.save_for_backward(values, scales, bitmap, offsets, *output[1:], weight, activation_scale)


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    *packed, weight, activation_scale = ctx.saved_tensors
    need_input = ctx.needs_input_grad[0]
    grad_input, grad_weight, grad_bias, grad_scale = _spec_block_backward(
        grad, *packed, weight, activation_scale, ctx.shape, ctx.groups, ctx.kind, ctx.workspace, need_input
    )
    return (
        grad_input if need_input else None,
        *(None,) * 4,
        grad_weight.to(weight.dtype),
        None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
        None if activation_scale is None else grad_scale.to(activation_scale.dtype),
        *(None,) * 7,
    )


_spec_block.register_autograd(_autograd, setup_context=_setup)


def spec_block(
    packed: PackedSpectrum,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    threshold: float | None = None,
    density: float | None = None,
    activation: str = "tanh",
    activation_scale: Tensor | None = None,
    groups: int = 1,
    value_dtype: torch.dtype | str | None = None,
    workspace: int | None = None,
) -> PackedSpectrum:
    """Convolve, threshold and activate a packed spectrum; Algorithm 1 of arXiv 1905.10915.

    Args:
        packed: maps ``(B, I, H, W)``.
        weight: taps ``(O, I / groups, kh, kw)``, applied as by ``nn.Conv2d(padding="same", padding_mode="circular")``.
        bias: ``(O,)``, or None.
        threshold: coefficients of the convolution whose modulus (ortho spectrum) is below it are dropped.
        density: instead of a threshold, the fraction of coefficients to keep; costs a second pass of the mixing.
        activation: ``h`` in ``h(re) + i h(im)``: tanh (the paper's), softsign, asinh, atan or identity.
        activation_scale: ``(O,)``; per channel ``s h(x / s)``.
        groups: as for ``nn.Conv2d``.
        value_dtype: format of the kept values, by default that of ``packed``.
        workspace: bound on temporaries in bytes.

    Returns:
        Packed maps ``(B, O, H, W)``; differentiable in all tensors.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range.
    """
    op = "spec_block"
    check_packed(op, "packed", packed)
    check_convolution(op, packed.shape[1], weight, bias, groups)
    check_activation(op, activation)
    outputs = weight.shape[0]
    if activation_scale is not None and tuple(activation_scale.shape) != (outputs,):
        fail(op, "activation_scale", activation_scale, f"shape ({outputs},)", "pass one scale per output channel")
    level, fraction = check_rule(op, threshold, density)
    name = packed.value_dtype if value_dtype is None else value_dtype_name(op, value_dtype, packed.edge.dtype)
    fields = _spec_block(
        packed.edge,
        packed.values,
        packed.scales,
        packed.bitmap,
        packed.offsets,
        weight,
        bias,
        activation_scale,
        list(packed.shape),
        groups,
        level,
        fraction,
        activation,
        name,
        check_workspace(op, workspace),
    )
    return PackedSpectrum.of(fields, (packed.shape[0], outputs, *packed.shape[2:]), name)
