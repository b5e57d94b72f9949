"""Activation of spectra."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, overload

import torch
from torch import Tensor

from spectriton import reference
from spectriton._backend import backend
from spectriton._check import check_choice, check_complex, check_rank
from spectriton.ops._arguments import check_per_channel, check_workspace
from spectriton.ops._define import PACKED_FIELDS, define_op
from spectriton.ops._planes import resolve_workspace, row_chunks
from spectriton.ops._rows import row_bytes
from spectriton.packed import PackedSpectrum, layout, make_edge
from spectriton.reference import ACTIVATIONS, RowPattern
from spectriton.reference.pattern import channel_of
from spectriton.reference.spectral_activation import activate, activate_backward
from spectriton.reference.unpack import read_values


@define_op("(Tensor x, str kind, Tensor? scale) -> Tensor")
def _spectral_activation(x: Tensor, kind: str, scale: Tensor | None) -> Tensor:
    return backend(x.device).spectral_activation(x.resolve_conj().contiguous(), kind, scale)


@_spectral_activation.register_fake
def _(x: Tensor, kind: str, scale: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@define_op("(Tensor grad, Tensor z, str kind, Tensor? scale) -> (Tensor, Tensor)")
def _spectral_activation_backward(grad: Tensor, z: Tensor, kind: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    grad = grad.resolve_conj().contiguous()
    grad_x, grad_scale = backend(grad.device).spectral_activation_backward(grad, z.contiguous(), kind, scale)
    return grad_x, z.real.new_empty(0) if grad_scale is None else grad_scale


@_spectral_activation_backward.register_fake
def _(grad: Tensor, z: Tensor, kind: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), z.real.new_empty(0 if scale is None else scale.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.kind, scale = inputs
    ctx.save_for_backward(output, scale)  # the output alone gives the derivative


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
    z, scale = ctx.saved_tensors
    grad_x, grad_scale = _spectral_activation_backward(grad, z, ctx.kind, scale)
    return grad_x, None, None if scale is None else grad_scale.to(scale.dtype)


_spectral_activation.register_autograd(_autograd, setup_context=_setup)


# -- of packed spectra: what is kept, chunk by chunk; the pattern stays ------------------------------------------------


def _chunks(
    bitmap: Tensor, offsets: Tensor, shape: list[int], kept: int, dtype: torch.dtype, workspace: int
) -> Iterator[tuple[slice, RowPattern]]:
    """Ranges of frequencies that fit the workspace, with their patterns."""
    sizes = layout(shape)
    index = reference.TileIndex(bitmap, offsets)
    bound = resolve_workspace(workspace, bitmap.device, sizes)
    # Beside positions, slots and channels there are about as many values on their way as in a dense chunk.
    for rows in row_chunks(sizes.frequencies, 2 * row_bytes(sizes, dtype, kept), bound):
        yield rows, reference.row_pattern(bitmap, offsets, rows, 0, sizes.tiles, index)


def _per_value(scale: Tensor | None, pattern: RowPattern, shape: list[int]) -> tuple[Tensor | None, Tensor | None]:
    """The channel ``(n,)`` and the scale ``(n, 1)`` of each kept coefficient."""
    if scale is None:
        return None, None
    channel = channel_of(pattern.positions, layout(shape).padded_row, 0, shape[1])
    return channel, scale.index_select(0, channel)[:, None]


@define_op(
    f"(Tensor edge, {PACKED_FIELDS}, str kind, Tensor? scale, SymInt[] shape, int workspace) "
    "-> (Tensor, Tensor, Tensor)"
)
def _packed_activation(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    kind: str,
    scale: Tensor | None,
    shape: list[int],
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Edge, values and scales of the result, which has the input's pattern."""
    out_values, out_scales = torch.empty_like(values), torch.zeros_like(scales)
    for rows, pattern in _chunks(bitmap, offsets, shape, values.shape[0], edge.dtype, workspace):
        tile_scales = scales[rows] if scales.numel() else scales
        kept = read_values(values, scales, pattern, tile_scales, edge.dtype)
        kept = activate(kept, kind, _per_value(scale, pattern, shape)[1])
        if scales.numel():
            kept, out_scales[rows] = reference.quantise(kept, pattern.counts, values.dtype)
        out_values[pattern.slots] = kept.to(values.dtype)
    return make_edge(values.shape[0], edge.dtype, edge.device), out_values, out_scales


@_packed_activation.register_fake
def _(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    kind: str,
    scale: Tensor | None,
    shape: list[int],
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return make_edge(values.shape[0], edge.dtype, edge.device), torch.empty_like(values), torch.empty_like(scales)


@define_op(
    f"(Tensor grad, {PACKED_FIELDS}, str kind, Tensor? scale, SymInt[] shape, int workspace) -> (Tensor, Tensor)"
)
def _packed_activation_backward(
    grad: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    kind: str,
    scale: Tensor | None,
    shape: list[int],
    workspace: int,
) -> tuple[Tensor, Tensor]:
    """Gradients for the packed input and the scale, from the output."""
    grad_input = torch.empty_like(grad, memory_format=torch.contiguous_format)
    grad_scale = grad.new_zeros(0 if scale is None else shape[1])
    for rows, pattern in _chunks(bitmap, offsets, shape, values.shape[0], grad.dtype, workspace):
        tile_scales = scales[rows] if scales.numel() else scales
        kept = read_values(values, scales, pattern, tile_scales, grad.dtype)
        channel, of_kept = _per_value(scale, pattern, shape)
        grad_input[pattern.slots], terms = activate_backward(grad[pattern.slots], kept, kind, of_kept)
        if channel is not None and terms is not None:
            grad_scale += torch.bincount(channel, terms.sum(-1), minlength=shape[1]).to(grad.dtype)
    return grad_input, grad_scale


@_packed_activation_backward.register_fake
def _(
    grad: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    kind: str,
    scale: Tensor | None,
    shape: list[int],
    workspace: int,
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty(0 if scale is None else shape[1])


def _packed_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, bitmap, offsets, ctx.kind, scale, ctx.shape, ctx.workspace = inputs
    ctx.mark_non_differentiable(*output[1:])  # gradients travel along the edge
    ctx.set_materialize_grads(False)  # no zeros of the size of the values
    ctx.save_for_backward(*output[1:], bitmap, offsets, scale)  # the output alone gives the derivative


def _packed_autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 9
    *packed, scale = ctx.saved_tensors
    grad_input, grad_scale = _packed_activation_backward(grad, *packed, ctx.kind, scale, ctx.shape, ctx.workspace)
    return grad_input, *(None,) * 5, None if scale is None else grad_scale.to(scale.dtype), None, None


_packed_activation.register_autograd(_packed_autograd, setup_context=_packed_setup)


@overload
def spectral_activation(
    x: PackedSpectrum, kind: str = "tanh", scale: Tensor | None = None, *, workspace: int | None = None
) -> PackedSpectrum: ...
@overload
def spectral_activation(
    x: Tensor, kind: str = "tanh", scale: Tensor | None = None, *, workspace: int | None = None
) -> Tensor: ...
def spectral_activation(
    x: Tensor | PackedSpectrum, kind: str = "tanh", scale: Tensor | None = None, *, workspace: int | None = None
) -> Tensor | PackedSpectrum:
    """``h(re) + i h(im)`` with an odd monotone ``h``; Eq. of the spectral activation in arXiv 1905.10915.

    Odd functions keep the conjugate symmetry of spectra of real maps.

    Args:
        x: complex spectra, ``(B, C, *F)`` where a scale is given, any shape otherwise; or a packed spectrum.
        kind: tanh (the paper's), softsign, asinh, atan or identity.
        scale: ``(C,)`` real; ``s h(x / s)``. Differentiable. Units are those of the ortho spectrum.
        workspace: bound on temporaries in bytes, for a packed spectrum.

    Returns:
        The shape of ``x``, packed in its pattern and value format if it is packed; backward keeps only this output.

    Raises:
        TypeError: ``x`` is not complex.
        ValueError: no such activation, or the scale does not fit the channels.
    """
    op = "spectral_activation"
    if not isinstance(x, PackedSpectrum):
        check_complex(op, "x", x)
    check_choice(op, "kind", kind, ACTIVATIONS)
    if scale is not None:
        if not isinstance(x, PackedSpectrum):
            check_rank(op, "x", x, 2, at_least=True)
        check_per_channel(op, "scale", scale, x.shape[1], "pass one real scale per channel (dimension 1 of x)")
        scale = scale.to(torch.float64 if x.dtype == torch.complex128 else torch.float32)
    if isinstance(x, PackedSpectrum):
        fields = (x.edge, x.values, x.scales, x.bitmap, x.offsets)
        out = _packed_activation(*fields, kind, scale, list(x.shape), check_workspace(op, workspace))
        return PackedSpectrum.of((*out, x.bitmap, x.offsets), x.shape, x.value_dtype)
    return _spectral_activation(x, kind, scale)
