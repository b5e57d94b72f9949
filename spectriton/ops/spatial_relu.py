"""ReLU of the maps behind packed spectra, packed again; a batch norm may come before it and a maximum behind it.

Not an activation of coefficients: it works on the maps, which are made, rectified, transformed and forgotten a chunk at
a time, and lets all frequencies of a map meet. The affine map of the batch norm is applied to the maps on the way, so
that what lies between the two is neither packed nor rounded.

Backward keeps one bit an output, 2 to 8 more where a maximum was taken, and for a batch norm the packed input. Where
the result has the shape of the input it is made again from that (see :class:`~spectriton.packed.Origin`): between a
convolution and the next one copy of the maps is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectriton._backend import backend
from spectriton.ops._arguments import check_packed, check_rule, check_workspace
from spectriton.ops._define import PACKED_FIELDS, PACKED_RESULT, define_op
from spectriton.ops._planes import (
    RowsOf,
    fake_packed,
    pack_planes,
    plane_chunks,
    resolve_workspace,
)
from spectriton.ops._rows import store_rows
from spectriton.ops.pool2d import _code_bytes, _output_size, check_max_pool, pooled_gradients, pooled_rows
from spectriton.ops.spectral_batch_norm import check_norm, moved, norm_gradients, statistics_of
from spectriton.packed import Origin, PackedSpectrum, layout, make_edge, value_dtype_name

_NORM = "Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var"


def _sign_bytes(planes: int, outputs: int) -> int:
    return -(-planes * outputs // 8)


def _plain(kernel: list[int], stride: list[int]) -> bool:
    """Whether there is nothing to take the maximum of."""
    return kernel == [1, 1] == stride


#: What a batch norm is, as ops take it: weight, bias, mean and variance ``(C,)``; without a mean there is none.
_Norm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _activated_rows(
    packed: tuple[Tensor, Tensor, Tensor, Tensor],
    norm: _Norm,
    shape: list[int],
    eps: float,
    kernel: list[int],
    stride: list[int],
    dtype: torch.dtype,
    workspace: int,
    codes: Tensor | None,
    signs: Tensor | None,
) -> RowsOf:
    """:data:`RowsOf` the spectra of the activated maps; writes where maxima and positive values stand, if asked to.

    ``packed`` are values, scales, bitmap and offsets of maps ``shape``.
    """
    weight, bias, mean, var = norm
    affine = None
    if mean is not None and var is not None:
        affine = backend(mean.device).norm_planes(weight, bias, mean, var, shape[0], eps, dtype)
    return pooled_rows(packed, shape, kernel, stride, dtype, workspace, codes, signs, affine, rectify=True)


def _code_sizes(shape: Sequence[int], kernel: list[int], stride: list[int]) -> tuple[int, int]:
    """Bytes of the codes of maxima, and of the signs."""
    size = _output_size(list(shape[2:]), kernel, stride)
    planes, outputs = shape[0] * shape[1], size[0] * size[1]
    return 0 if _plain(kernel, stride) else _code_bytes(planes, outputs, kernel), _sign_bytes(planes, outputs)


@define_op(
    f"(Tensor edge, {PACKED_FIELDS}, {_NORM}, SymInt[] shape, bool batch_statistics, float eps, SymInt[] kernel, "
    "SymInt[] stride, int workspace, float threshold, float density, str value_dtype) "
    f"-> {PACKED_RESULT[:-1]}, Tensor, Tensor)"
)
def _spatial_relu(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    shape: list[int],
    batch_statistics: bool,
    eps: float,
    kernel: list[int],
    stride: list[int],
    workspace: int,
    threshold: float,
    density: float,
    value_dtype: str,
) -> tuple[Tensor, ...]:
    """The packed result, codes of the maxima and signs.

    ``batch_statistics`` says for backward that mean and variance are those of the input.
    """
    sizes = layout([*shape[:2], *_output_size(shape[2:], kernel, stride)])
    codes, signs = (
        torch.empty(count, dtype=torch.uint8, device=values.device) for count in _code_sizes(shape, kernel, stride)
    )
    bound = resolve_workspace(workspace, values.device, layout(shape))
    packed, norm = (values, scales, bitmap, offsets), (weight, bias, mean, var)
    of_maxima = None if _plain(kernel, stride) else codes
    rows_of = _activated_rows(packed, norm, shape, eps, kernel, stride, edge.dtype, bound, of_maxima, signs)
    rule = (threshold, density, value_dtype)
    out = pack_planes(rows_of, sizes, *rule, edge.dtype, values.device, bound, repacked=True)
    return (*out, codes, signs)


@_spatial_relu.register_fake
def _(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    shape: list[int],
    batch_statistics: bool,
    eps: float,
    kernel: list[int],
    stride: list[int],
    workspace: int,
    threshold: float,
    density: float,
    value_dtype: str,
) -> tuple[Tensor, ...]:
    size = _output_size(shape[2:], kernel, stride)
    codes = (bitmap.new_empty(count) for count in _code_sizes(shape, kernel, stride))
    return (*fake_packed(values, edge.dtype, [*shape[:2], *size], value_dtype), *codes)


@define_op(
    f"(Tensor edge, {PACKED_FIELDS}, {_NORM}, SymInt[] shape, float eps, int workspace, Tensor out_bitmap, "
    "Tensor out_offsets) -> (Tensor, Tensor)"
)
def _spatial_relu_again(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    shape: list[int],
    eps: float,
    workspace: int,
    out_bitmap: Tensor,
    out_offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Values and scales of the result once more, whose pattern is known; the edge is the result's."""
    sizes, device = layout(shape), values.device
    bound = resolve_workspace(workspace, device, sizes)  # the same chunks as before, and so the same to the bit
    packed, norm = (values, scales, bitmap, offsets), (weight, bias, mean, var)
    rows_of = _activated_rows(packed, norm, shape, eps, [1, 1], [1, 1], edge.dtype, bound, None, None)
    out_values = values.new_empty(edge.shape[0], *values.shape[1:])
    out_scales = torch.zeros_like(scales)
    primitives, every = backend(device), slice(0, sizes.frequencies)
    index = primitives.tile_index(out_bitmap, out_offsets)
    for t0, t1, first, last in plane_chunks(sizes, edge.dtype, bound, device, repacked=True):
        rows = rows_of(first, last, (t1 - t0) * sizes.tile)
        pattern = primitives.row_pattern(out_bitmap, out_offsets, every, t0, t1, index)
        store_rows(rows, out_bitmap, out_offsets, every, out_values, out_scales, pattern, t0)
        del rows, pattern  # before the next are made
    return out_values, out_scales


@_spatial_relu_again.register_fake
def _(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    shape: list[int],
    eps: float,
    workspace: int,
    out_bitmap: Tensor,
    out_offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    return values.new_empty(edge.shape[0], *values.shape[1:]), torch.empty_like(scales)


@define_op(
    "(Tensor grad, Tensor out_bitmap, Tensor out_offsets, Tensor codes, Tensor signs, Tensor? values, Tensor? scales, "
    f"Tensor bitmap, Tensor offsets, {_NORM}, SymInt kept, SymInt[] shape, bool batch_statistics, float eps, "
    "SymInt[] kernel, SymInt[] stride, int workspace, bool need_input) -> (Tensor, Tensor, Tensor)"
)
def _spatial_relu_backward(
    grad: Tensor,
    out_bitmap: Tensor,
    out_offsets: Tensor,
    codes: Tensor,
    signs: Tensor,
    values: Tensor | None,
    scales: Tensor | None,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    kept: int,
    shape: list[int],
    batch_statistics: bool,
    eps: float,
    kernel: list[int],
    stride: list[int],
    workspace: int,
    need_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for the packed input (in its own pattern), and for weight and bias of the norm.

    Without ``need_input`` the first is not brought through the norm.
    """
    bound = resolve_workspace(workspace, grad.device, layout(shape))
    of_maxima = None if _plain(kernel, stride) else codes
    grad_maps = pooled_gradients(
        grad, out_bitmap, out_offsets, of_maxima, signs, bitmap, offsets, kept, shape, kernel, stride, bound
    )
    if values is None or scales is None or mean is None or var is None:
        return grad_maps, grad.new_empty(0), grad.new_empty(0)
    norm = (weight, bias, mean, var, None)
    settings = ("identity", shape, batch_statistics, eps, workspace)
    grad_input, grad_weight, grad_bias, _ = norm_gradients(
        grad_maps, values, scales, bitmap, offsets, *norm, *settings, need_input, overwrite=True
    )
    return grad_input, grad_weight, grad_bias


@_spatial_relu_backward.register_fake
def _(
    grad: Tensor,
    out_bitmap: Tensor,
    out_offsets: Tensor,
    codes: Tensor,
    signs: Tensor,
    values: Tensor | None,
    scales: Tensor | None,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    kept: int,
    shape: list[int],
    batch_statistics: bool,
    eps: float,
    kernel: list[int],
    stride: list[int],
    workspace: int,
    need_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = 0 if mean is None else shape[1]
    return grad.new_empty(kept, 2), grad.new_empty(channels), grad.new_empty(channels)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    edge, values, scales, bitmap, offsets, *norm = inputs[:9]
    ctx.kept, ctx.settings = edge.shape[0], inputs[9:15]
    ctx.mark_non_differentiable(output[1], output[2])  # gradients travel along the edge
    ctx.set_materialize_grads(False)  # no zeros of the size of the values
    kept = (None, None) if norm[2] is None else (values, scales)  # ReLU alone needs but the patterns
    ctx.save_for_backward(*output[3:], *kept, bitmap, offsets, *norm)


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 18
    need_input = ctx.needs_input_grad[0]
    saved = ctx.saved_tensors  # once: checkpointing hands them out a single time
    grad_input, *of_norm = _spatial_relu_backward(grad, *saved, ctx.kept, *ctx.settings, need_input)
    grad_weight, grad_bias = (
        None if parameter is None else gradient.to(parameter.dtype)
        for parameter, gradient in zip(saved[8:10], of_norm, strict=True)
    )
    return grad_input if need_input else None, *(None,) * 4, grad_weight, grad_bias, *(None,) * 11


_spatial_relu.register_autograd(_autograd, setup_context=_setup)


def remake_relu(
    tensors: Sequence[Tensor],
    bitmap: Tensor,
    offsets: Tensor,
    settings: tuple[str, float, int],
    shape: list[int],
    kept: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Values and scales of a packed spectrum once more, from its :class:`~spectriton.packed.Origin`.

    Args:
        tensors, settings: of the origin; an empty tensor for None.
        bitmap, offsets: the pattern.
        shape: ``[B, C, H, W]`` of the maps.
        kept: coefficients kept.
        dtype: real precision of the computation.
    """
    values, scales, weight, bias, mean, var, _, of_bitmap, of_offsets = tensors
    _, eps, workspace = settings
    edge = make_edge(kept, dtype, values.device)
    norm = (weight if weight.numel() else None, bias if bias.numel() else None, mean, var)
    made = _spatial_relu_again(
        edge, values, scales, of_bitmap, of_offsets, *norm, shape, eps, workspace, bitmap, offsets
    )
    return made[0], made[1]


def _rectify(
    op: str,
    packed: PackedSpectrum,
    norm: _Norm,
    training: bool,
    eps: float,
    threshold: float | None,
    density: float | None,
    value_dtype: torch.dtype | str | None,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None,
    workspace: int,
) -> PackedSpectrum:
    name = packed.value_dtype if value_dtype is None else value_dtype_name(op, value_dtype, packed.edge.dtype)
    shape, rule = list(packed.shape), check_rule(op, threshold, density)
    kernel, steps = check_max_pool(op, shape[2:], kernel_size, stride)
    fields = (packed.values, packed.scales, packed.bitmap, packed.offsets)
    *out, _, _ = _spatial_relu(packed.edge, *fields, *norm, shape, training, eps, kernel, steps, workspace, *rule, name)
    made = PackedSpectrum.of(out, (*shape[:2], *_output_size(shape[2:], kernel, steps)), name)
    # After a maximum the result is smaller, and making it again would take longer than it is worth.
    remade = norm[2] is not None and _plain(kernel, steps) and name == packed.value_dtype
    if remade and made.edge.requires_grad:
        parameters = (None if t is None else t.detach() for t in norm)
        tensors = (packed.values, packed.scales, *parameters, None, packed.bitmap, packed.offsets)
        made.origin = Origin(tensors, ("relu", eps, workspace))
    return made


def spatial_relu(
    packed: PackedSpectrum,
    *,
    threshold: float | None = None,
    density: float | None = None,
    value_dtype: torch.dtype | str | None = None,
    kernel_size: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] | None = None,
    workspace: int | None = None,
) -> PackedSpectrum:
    """ReLU of the maps behind a packed spectrum, and the maximum over windows where asked for, packed again.

    Backward keeps one bit an output, and those of :func:`max_pool2d` where there are windows.

    Args:
        packed: maps ``(B, C, H, W)``.
        threshold, density, value_dtype: as for :func:`pack`; the format is that of ``packed`` by default.
        kernel_size, stride: of the windows, as for :func:`max_pool2d`; none by default.
        workspace: bound on temporaries in bytes.

    Returns:
        Packed ``(B, C, H, W)``, or ``(B, C, (H - k) // s + 1, (W - k) // s + 1)``; differentiable.

    Raises:
        TypeError, ValueError: not a packed spectrum, the rule is missing or out of range, or the window does not fit.
    """
    op = "spatial_relu"
    check_packed(op, "packed", packed)
    bound = check_workspace(op, workspace)
    norm = (None, None, None, None)
    return _rectify(op, packed, norm, False, 0.0, threshold, density, value_dtype, kernel_size, stride, bound)


def batch_norm_relu(
    packed: PackedSpectrum,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    threshold: float | None = None,
    density: float | None = None,
    value_dtype: torch.dtype | str | None = None,
    kernel_size: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] | None = None,
    workspace: int | None = None,
) -> tuple[PackedSpectrum, Tensor | None, Tensor | None]:
    """:func:`spectral_batch_norm` of packed maps and :func:`spatial_relu` of what it gives, which is never packed.

    Backward keeps the packed input, two numbers a channel, and what :func:`spatial_relu` keeps. A block that takes the
    result keeps that rather than its values and makes these again when it needs them; not so behind windows, or in
    another value format.

    Args:
        packed: maps ``(B, C, H, W)``.
        weight, bias, running_mean, running_var, training, momentum, eps: as for :func:`spectral_batch_norm`.
        threshold, density, value_dtype, kernel_size, stride, workspace: as for :func:`spatial_relu`.

    Returns:
        Packed maps as of :func:`spatial_relu`, and the running statistics as of :func:`spectral_batch_norm`.

    Raises:
        TypeError, ValueError: as of the two.
    """
    op = "batch_norm_relu"
    check_packed(op, "packed", packed)
    shape = check_norm(op, packed, weight, bias, running_mean, running_var, training)
    bound = check_workspace(op, workspace)
    mean, var = statistics_of(packed, running_mean, running_var, training, bound)
    norm = (weight, bias, mean, var)
    out = _rectify(op, packed, norm, training, eps, threshold, density, value_dtype, kernel_size, stride, bound)
    if training:
        running_mean, running_var = moved(running_mean, running_var, mean, var, momentum, shape)
    return out, running_mean, running_var
