"""Pooling that keeps no maps for backward: argmax codes of 2, 4 or 8 bits for the maximum, nothing for the mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spectriton._check import check_real_maps, fail
from spectriton.ops._arguments import check_window
from spectriton.ops._define import define_op

# Argmax positions are int64 on their way to a code; this many of them at a time stay in the cache.
_CHUNK = 1 << 16


def _code_bits(kernel: list[int]) -> int:
    """Bits an argmax within a window takes: a power of two, so that codes do not straddle bytes."""
    positions = kernel[0] * kernel[1]
    return next(bits for bits in (1, 2, 4, 8) if positions <= 1 << bits)


def _output_size(size: list[int], kernel: list[int], stride: list[int]) -> list[int]:
    return [(n - k) // s + 1 for n, k, s in zip(size, kernel, stride, strict=True)]


def _corners(size: list[int], kernel: list[int], stride: list[int], device: torch.device) -> Tensor:
    """``(Ho, Wo)`` int64: position of the first element of each window in a flattened map."""
    rows, columns = (
        torch.arange(n, device=device) * s for n, s in zip(_output_size(size, kernel, stride), stride, strict=True)
    )
    return rows[:, None] * size[1] + columns


def _window(width: int, kernel: list[int], device: torch.device) -> Tensor:
    """``(kh * kw,)`` int64: distance of each element of a window from its first, in a flattened map."""
    rows, columns = (torch.arange(k, device=device) for k in kernel)
    return (rows[:, None] * width + columns).flatten()


def _plane_steps(planes: int, outputs: int) -> range:
    """First planes of chunks of about :data:`_CHUNK` outputs; whole bytes of codes whatever their width."""
    return range(0, planes, max(8, _CHUNK // max(1, outputs) // 8 * 8))


@define_op("(Tensor x, SymInt[] kernel, SymInt[] stride) -> (Tensor, Tensor)")
def _max_pool2d(x: Tensor, kernel: list[int], stride: list[int]) -> tuple[Tensor, Tensor]:
    """The maxima, and where in their windows they stand, packed."""
    size = list(x.shape[2:])
    planes = x.flatten(0, 1)
    y = x.new_empty(planes.shape[0], *_output_size(size, kernel, stride))
    per_byte = 8 // _code_bits(kernel)
    codes = torch.zeros(-(-y.numel() // per_byte), dtype=torch.uint8, device=x.device)
    corners, window = _corners(size, kernel, stride, x.device), _window(size[1], kernel, x.device)
    reach = (kernel[0] - 1) * size[1] + kernel[1]
    code_of = torch.zeros(reach, dtype=torch.uint8, device=x.device)
    code_of[window] = torch.arange(window.numel(), device=x.device).to(torch.uint8)
    steps = _plane_steps(planes.shape[0], corners.numel())
    for first in steps:
        part = slice(first, first + steps.step)
        y[part], index = functional.max_pool2d(planes[part], kernel, stride, return_indices=True)
        code = code_of.index_select(0, index.sub_(corners).flatten())
        at = first * corners.numel() // per_byte
        if per_byte > 1:
            code = functional.pad(code, (0, -code.numel() % per_byte)).view(-1, per_byte)
            packed = codes[at : at + code.shape[0]]
            for place in range(per_byte):
                packed |= code[:, place] << (place * 8 // per_byte)
        else:
            codes[at : at + code.numel()] = code
    return y.unflatten(0, x.shape[:2]), codes


@_max_pool2d.register_fake
def _(x: Tensor, kernel: list[int], stride: list[int]) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:2], *_output_size(list(x.shape[2:]), kernel, stride))
    per_byte = 8 // _code_bits(kernel)
    return y, y.new_empty((y.numel() + per_byte - 1) // per_byte, dtype=torch.uint8)


@define_op("(Tensor grad, Tensor codes, SymInt[] shape, SymInt[] kernel, SymInt[] stride) -> Tensor")
def _max_pool2d_backward(grad: Tensor, codes: Tensor, shape: list[int], kernel: list[int], stride: list[int]) -> Tensor:
    bits = _code_bits(kernel)
    per_byte = 8 // bits
    corners, window = _corners(shape[2:], kernel, stride, grad.device), _window(shape[3], kernel, grad.device)
    # Every byte spelt out as the distances it stands for.
    places = torch.arange(256, device=grad.device)[:, None] >> torch.arange(0, 8, bits, device=grad.device)
    distances = window[(places & ((1 << bits) - 1)).clamp_(max=window.numel() - 1)]
    grads = grad.flatten(0, 1).flatten(1)
    out = grad.new_zeros(grads.shape[0], shape[2] * shape[3])
    disjoint = stride[0] >= kernel[0] and stride[1] >= kernel[1]
    steps = _plane_steps(grads.shape[0], corners.numel())
    for first in steps:
        part = grads[first : first + steps.step]
        at = first * corners.numel() // per_byte
        code = codes[at : at - (-part.numel() // per_byte)].to(torch.int32)
        index = distances.index_select(0, code).view(-1)[: part.numel()].view(part.shape[0], *corners.shape) + corners
        target = out[first : first + steps.step]
        if disjoint:
            target.scatter_(1, index.flatten(1), part)
        else:
            target.scatter_add_(1, index.flatten(1), part)
    return out.view(shape)


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
    return x.new_empty(*x.shape[:2], *_output_size(list(x.shape[2:]), kernel, stride))


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
