"""A block, packed in and packed out: convolution, threshold, activation, packing (Algorithm 1 of arXiv 1905.10915).

Every frequency is independent, so forward and backward walk over chunks of frequencies that fit a bounded workspace:
unpack, mix channels, threshold, pack. No dense feature map, no dense gradient and no whole kernel spectrum is made.
Frequencies at which nothing is kept are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectriton._backend import Backend, backend
from spectriton._check import fail
from spectriton.frequencies import FrequencyGrid, frequency_grid, tap_basis
from spectriton.ops._arguments import check_activation, check_convolution, check_packed, check_rule, check_workspace
from spectriton.ops._define import PACKED_FIELDS, PACKED_RESULT, define_op
from spectriton.ops._planes import (
    Histogram,
    Packed,
    Packer,
    fake_packed,
    keep_from_density,
    resolve_workspace,
    row_chunks,
)
from spectriton.packed import Layout, PackedSpectrum, layout, value_dtype_name


class _Walk(NamedTuple):
    """What forward and backward share: sizes, grid, and how many frequencies fit the workspace."""

    primitives: Backend
    inputs: Layout
    outputs: Layout
    grid: FrequencyGrid
    dtype: torch.dtype
    groups: int
    kernel_size: tuple[int, int]
    workspace: int
    bytes_per_row: int

    def chunks(self, rows: Tensor) -> Iterator[Tensor]:
        """``rows`` in chunks that fit the workspace."""
        return row_chunks(rows, self.bytes_per_row, self.workspace)

    def buffer(self, rows: int, sizes: Layout) -> Tensor:
        """Zeroed pairs ``(rows, P, 2)``; padding stays zero."""
        return torch.zeros(rows, sizes.padded_row, 2, dtype=self.dtype, device=self.grid.index.device)

    def basis(self, rows: Tensor) -> Tensor:
        """``(Fc, kh * kw, 2)``."""
        return tap_basis(self.grid, self.kernel_size, rows, self.dtype)


def _walk(
    weight: Tensor, shape: list[int], groups: int, dtype: torch.dtype, workspace: int, kept: int, kept_out: int | None
) -> _Walk:
    """``kept`` and ``kept_out``: coefficients kept in the input and, where it is there already, in the output."""
    inputs = layout(shape)
    outputs = layout((shape[0], weight.shape[0], *shape[2:]))
    item = 2 * dtype.itemsize
    # Each coefficient of a chunk stands there once; one that is kept takes its position (8 bytes) and a few values on
    # its way: read from the input; thresholded, activated and stored in forward; derived and scaled in backward.
    share = kept / max(1, inputs.frequencies * inputs.row)
    per_input = item + share * (8 + 2 * item)
    if kept_out is None:
        per_output = item + item / 2 + 1 + 0.5 * (8 + 3 * item)  # moduli and mask; half of them kept, at a guess
    else:
        per_output = item + kept_out / max(1, outputs.frequencies * outputs.row) * (16 + 6 * item)
    taps = 3 * item * weight[:, :, 0, 0].numel()  # weights, their gradient or embedding
    bytes_per_row = int(per_input * inputs.padded_row + per_output * outputs.padded_row) + taps
    return _Walk(
        backend(weight.device),
        inputs,
        outputs,
        frequency_grid(shape[2], shape[3], weight.device),
        dtype,
        groups,
        (weight.shape[2], weight.shape[3]),
        resolve_workspace(workspace, weight.device),
        bytes_per_row,
    )


def _channels(buffer: Tensor, sizes: Layout) -> Tensor:
    """Pairs ``(Fc, P, 2)`` as ``(Fc, B, C, 2)``, padding left out."""
    return buffer[:, : sizes.row].unflatten(1, (sizes.batch, sizes.channels))


def kept_rows(bitmap: Tensor) -> Tensor:
    """``(F,)`` bool: the frequencies at which anything is kept."""
    return bitmap.flatten(1).any(1).to(torch.bool)  # any() of bytes is a byte


def _mixed(
    walk: _Walk, values: Tensor, scales: Tensor, bitmap: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None,
    rows: Tensor,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yields ``(rows, y)`` chunk by chunk: the convolution's spectra as pairs ``(Fc, P, 2)``, in one reused buffer."""
    x_buffer = y_buffer = None
    taps = weight.to(walk.dtype)
    for part in walk.chunks(rows):
        if x_buffer is None or y_buffer is None:
            x_buffer = walk.buffer(part.numel(), walk.inputs)
            y_buffer = walk.buffer(part.numel(), walk.outputs)
        x, y = x_buffer[: part.numel()], y_buffer[: part.numel()]
        walk.primitives.unpack_rows(values, scales, bitmap, offsets, part, 0, walk.inputs.tiles, x)
        weights = walk.primitives.mixing_weights(taps, walk.basis(part), walk.groups)
        walk.primitives.mix(_channels(x, walk.inputs), weights, _channels(y, walk.outputs))
        if bias is not None and int(part[0]) == 0:
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
    walk = _walk(weight, shape, groups, edge.dtype, workspace, values.shape[0], None)
    rows = torch.arange(walk.grid.count, device=weight.device)
    if threshold > 0 or density >= 0:
        # Where nothing comes in nothing goes out, and zero is below any threshold.
        active = kept_rows(bitmap)
        active[0] = True
        rows = rows[active]
    convolved = (values, scales, bitmap, offsets, weight, bias, rows)
    if density >= 0:
        histogram = Histogram(weight.device)
        for part, y in _mixed(walk, *convolved):
            histogram.add(y[int(part[0]) == 0 :, : walk.outputs.row])
        threshold = histogram.threshold(keep_from_density(density, walk.outputs))
    packer = Packer(walk.outputs, value_dtype, edge.dtype, weight.device)
    scale = None if activation_scale is None else activation_scale.to(edge.dtype)
    for part, y in _mixed(walk, *convolved):
        packer.append_rows(y, part, threshold, kind, scale)
    return packer.finish()


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
    walk = _walk(weight, shape, groups, dtype, workspace, values.shape[0], out_values.shape[0])
    grad = grad.contiguous()
    grad_input = grad.new_zeros(values.shape[0] if need_input else 0, 2)
    taps = weight.to(dtype)
    grad_taps = torch.zeros_like(taps, memory_format=torch.contiguous_format)
    grad_bias = grad.new_zeros(weight.shape[0])
    grad_scale = grad.new_zeros(0 if activation_scale is None else weight.shape[0])
    scale = None if activation_scale is None else activation_scale.to(dtype)

    # The gradient of a frequency needs both sides there; bias and scale also see the rest of the output.
    incoming = kept_rows(bitmap)
    rows = torch.nonzero(kept_rows(out_bitmap) & (incoming | (scale is not None))).flatten()
    if not bool(incoming[0]) and rows.numel() and int(rows[0]) != 0:
        rows = torch.cat([rows.new_zeros(1), rows])
    x_buffer = g_buffer = None
    for part in walk.chunks(rows):
        if x_buffer is None or g_buffer is None:
            x_buffer = walk.buffer(part.numel(), walk.inputs)
            g_buffer = walk.buffer(part.numel(), walk.outputs)
        x, g = x_buffer[: part.numel()], g_buffer[: part.numel()]
        scale_terms = walk.primitives.unpack_gradient_rows(
            grad, out_values, out_scales, out_bitmap, out_offsets, part, kind, scale, walk.outputs.channels, g
        )
        if scale_terms is not None:
            grad_scale += scale_terms
        grads = _channels(g, walk.outputs)
        if int(part[0]) == 0:
            grad_bias += grads[0, :, :, 0].sum(0) * _dc_gain(walk.inputs)
        basis = walk.basis(part)
        pattern = walk.primitives.row_pattern(bitmap, offsets, part, 0, walk.inputs.tiles)
        walk.primitives.unpack_rows(values, scales, bitmap, offsets, part, 0, walk.inputs.tiles, x, pattern)
        walk.primitives.mixing_taps(
            walk.primitives.mix_grad_weights(_channels(x, walk.inputs), grads, groups), basis, grad_taps
        )
        if need_input:
            weights = walk.primitives.mixing_weights(taps, basis, groups)
            walk.primitives.mix_grad_input(grads, weights, _channels(x, walk.inputs))
            walk.primitives.gather_rows(x, bitmap, offsets, part, 0, grad_input, pattern)
    return grad_input, grad_taps, grad_bias, grad_scale


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
