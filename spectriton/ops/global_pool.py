"""Mean of each map of a packed spectrum, read off the zero frequency."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spectriton.ops._arguments import check_packed
from spectriton.ops._define import PACKED_FIELDS, define_op
from spectriton.packed import PackedSpectrum, layout


def _dc_slots(offsets: Tensor, shape: list[int]) -> Tensor:
    """``(B * C,)`` int64: where the coefficients of the zero frequency stand in ``values``.

    All of them are kept, so within a tile they stand at its offset and on, without gaps.
    """
    sizes = layout(shape)
    starts = offsets[0].to(torch.int64)
    slots = starts[:, None] + torch.arange(sizes.tile, device=offsets.device)
    return slots.flatten()[: sizes.row]


def _real_parts(values: Tensor, slots: Tensor) -> Tensor:
    """The real parts at ``slots``, integers where the values are: the low nibble of a byte holds 4-bit ones."""
    if values.ndim == 2:
        return values[:, 0].index_select(0, slots)
    nibble = (values.index_select(0, slots) & 15).to(torch.int8)
    return torch.where(nibble > 7, nibble - 16, nibble)


@define_op(f"(Tensor edge, {PACKED_FIELDS}, SymInt[] shape) -> Tensor")
def _global_avg_pool(
    edge: Tensor, values: Tensor, scales: Tensor, bitmap: Tensor, offsets: Tensor, shape: list[int]
) -> Tensor:
    mean = _real_parts(values, _dc_slots(offsets, shape)).to(edge.dtype)
    if scales.numel():
        sizes = layout(shape)
        mean = mean * scales[0].repeat_interleave(sizes.tile)[: sizes.row]
    return mean.view(shape[0], shape[1]) / math.sqrt(shape[2] * shape[3])


@_global_avg_pool.register_fake
def _(edge: Tensor, values: Tensor, scales: Tensor, bitmap: Tensor, offsets: Tensor, shape: list[int]) -> Tensor:
    return edge.new_empty(shape[0], shape[1])


@define_op("(Tensor grad, Tensor offsets, SymInt kept, SymInt[] shape) -> Tensor")
def _global_avg_pool_backward(grad: Tensor, offsets: Tensor, kept: int, shape: list[int]) -> Tensor:
    out = grad.new_zeros(kept, 2)
    out[:, 0].index_copy_(0, _dc_slots(offsets, shape), grad.flatten() / math.sqrt(shape[2] * shape[3]))
    return out


@_global_avg_pool_backward.register_fake
def _(grad: Tensor, offsets: Tensor, kept: int, shape: list[int]) -> Tensor:
    return grad.new_empty(kept, 2)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    edge, _, _, _, offsets, shape = inputs
    ctx.kept, ctx.shape = edge.shape[0], shape
    ctx.save_for_backward(offsets)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _global_avg_pool_backward(grad, *ctx.saved_tensors, ctx.kept, ctx.shape), None, None, None, None, None


_global_avg_pool.register_autograd(_autograd, setup_context=_setup)


def global_avg_pool(packed: PackedSpectrum) -> Tensor:
    """The mean of each map ``(B, C)``, in the precision of the spectrum: ``DC / sqrt(H W)``.

    Reads the row of the zero frequency only, and saves nothing but the pattern that the spectrum has anyway.

    Raises:
        TypeError: not a packed spectrum.
    """
    check_packed("global_avg_pool", "packed", packed)
    return _global_avg_pool(
        packed.edge, packed.values, packed.scales, packed.bitmap, packed.offsets, list(packed.shape)
    )
