"""Pooling that keeps no maps for backward: argmax codes of 2, 4 or 8 bits for the maximum, nothing for the mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spectriton._check import check_real_maps, fail
from spectriton.ops._arguments import check_window
from spectriton.ops._define import define_op


def _code_bits(kernel: list[int]) -> int:
    """Bits an argmax within a window takes: a power of two, so that codes do not straddle bytes."""
    for bits in (1, 2, 4, 8):
        if kernel[0] * kernel[1] <= 1 << bits:
            return bits
    raise AssertionError("checked by max_pool2d")


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes to bytes holding ``8 / bits`` of them each."""
    per_byte = 8 // bits
    if per_byte == 1:
        return codes.flatten()
    flat = functional.pad(codes.flatten(), (0, -codes.numel() % per_byte)).view(-1, per_byte)
    packed = flat[:, 0].clone()
    for place in range(1, per_byte):
        packed |= flat[:, place] << (place * bits)
    return packed


def _unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`_pack_codes`."""
    if bits == 8:
        return packed
    codes = torch.stack([(packed >> place) & ((1 << bits) - 1) for place in range(0, 8, bits)], dim=1)
    return codes.flatten()[:count]


def _windows(size: list[int], kernel: list[int], stride: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """First row and first column of each window, ``(Ho, 1)`` and ``(1, Wo)``."""
    rows, columns = (
        torch.arange((n - k) // s + 1, device=device) * s for n, k, s in zip(size, kernel, stride, strict=True)
    )
    return rows[:, None], columns[None, :]




@define_op("(Tensor x, SymInt[] kernel, SymInt[] stride) -> (Tensor, Tensor)")
def _max_pool2d(x: Tensor, kernel: list[int], stride: list[int]) -> tuple[Tensor, Tensor]:
    """The maxima, and where in their windows they stand, packed."""
    size = x.shape[2:]
    y, index = functional.max_pool2d(x, kernel, stride, return_indices=True)
    rows, columns = _windows(list(size), kernel, stride, x.device)
    codes = (index // size[1] - rows) * kernel[1] + (index % size[1] - columns)
    return y, _pack_codes(codes.to(torch.uint8), _code_bits(kernel))


@_max_pool2d.register_fake
def _(x: Tensor, kernel: list[int], stride: list[int]) -> tuple[Tensor, Tensor]:
    size = [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    y = x.new_empty(*x.shape[:2], *size)
    per_byte = 8 // _code_bits(kernel)
    return y, y.new_empty((y.numel() + per_byte - 1) // per_byte, dtype=torch.uint8)


@define_op("(Tensor grad, Tensor codes, SymInt[] shape, SymInt[] kernel, SymInt[] stride) -> Tensor")
def _max_pool2d_backward(
    grad: Tensor, codes: Tensor, shape: list[int], kernel: list[int], stride: list[int]
) -> Tensor:
    code = _unpack_codes(codes, _code_bits(kernel), grad.numel()).view(grad.shape).to(torch.int64)
    rows, columns = _windows(shape[2:], kernel, stride, grad.device)
    index = (rows + code // kernel[1]) * shape[3] + columns + code % kernel[1]
    out = grad.new_zeros(shape[0], shape[1], shape[2] * shape[3])
    return out.scatter_add_(2, index.flatten(2), grad.flatten(2)).view(shape)


@_max_pool2d_backward.register_fake
def _(grad: Tensor, codes: Tensor, shape: list[int], kernel: list[int], stride: list[int]) -> Tensor:
    return grad.new_empty(shape)


def _max_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.kernel, ctx.stride = inputs
    ctx.shape = list(x.shape)
    ctx.save_for_backward(output[1])


def _max_autograd(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
    (codes,) = ctx.saved_tensors
    return _max_pool2d_backward(grad, codes, ctx.shape, ctx.kernel, ctx.stride), None, None


_max_pool2d.register_autograd(_max_autograd, setup_context=_max_setup)


@define_op("(Tensor x, SymInt[] kernel, SymInt[] stride) -> Tensor")
def _avg_pool2d(x: Tensor, kernel: list[int], stride: list[int]) -> Tensor:
    return functional.avg_pool2d(x, kernel, stride)


@_avg_pool2d.register_fake
def _(x: Tensor, kernel: list[int], stride: list[int]) -> Tensor:
    size = [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    return x.new_empty(*x.shape[:2], *size)


@define_op("(Tensor grad, SymInt[] shape, SymInt[] kernel, SymInt[] stride) -> Tensor")
def _avg_pool2d_backward(grad: Tensor, shape: list[int], kernel: list[int], stride: list[int]) -> Tensor:
    # Only the shape of the input is looked at, so one element stands for it.
    like = grad.new_zeros(1).expand(shape)
    return torch.ops.aten.avg_pool2d_backward(grad.contiguous(), like, kernel, stride, [0, 0], False, True, None)


@_avg_pool2d_backward.register_fake
def _(grad: Tensor, shape: list[int], kernel: list[int], stride: list[int]) -> Tensor:
    return grad.new_empty(shape)


def _avg_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.kernel, ctx.stride = inputs
    ctx.shape = list(x.shape)


def _avg_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _avg_pool2d_backward(grad, ctx.shape, ctx.kernel, ctx.stride), None, None


_avg_pool2d.register_autograd(_avg_autograd, setup_context=_avg_setup)


def _check_pool(op: str, x: Tensor, kernel_size: Any, stride: Any) -> tuple[list[int], list[int]]:
    check_real_maps(op, "x", x)
    kernel, steps = check_window(op, kernel_size, stride)
    if kernel[0] > x.shape[2] or kernel[1] > x.shape[3]:
        fail(op, "kernel_size", tuple(kernel), f"at most the {x.shape[2]}x{x.shape[3]} maps", "use a smaller window")
    return kernel, steps


def max_pool2d(
    x: Tensor, kernel_size: int | tuple[int, int] = 2, stride: int | tuple[int, int] | None = None
) -> Tensor:
    """Maximum of windows, as ``torch.nn.functional.max_pool2d`` without padding.

    Backward keeps where the maximum stood in its window, 2 bits for 2x2 and 4 bits for 3x3 and 4x4, instead of the
    maps and their int64 indices.

    Args:
        x: ``(B, C, H, W)`` real maps.
        kernel_size: window, at most 256 positions.
        stride: step, by default the window.

    Raises:
        TypeError, ValueError: ``x`` is not real maps, or the window does not fit.
    """
    kernel, steps = _check_pool("max_pool2d", x, kernel_size, stride)
    if kernel[0] * kernel[1] > 256:
        fail("max_pool2d", "kernel_size", tuple(kernel), "a window of at most 256 positions", "use a smaller window")
    return _max_pool2d(x, kernel, steps)[0]


def avg_pool2d(
    x: Tensor, kernel_size: int | tuple[int, int] = 2, stride: int | tuple[int, int] | None = None
) -> Tensor:
    """Mean of windows, as ``torch.nn.functional.avg_pool2d`` without padding; backward keeps nothing.

    Args, errors: as for :func:`max_pool2d`.
    """
    return _avg_pool2d(x, *_check_pool("avg_pool2d", x, kernel_size, stride))
