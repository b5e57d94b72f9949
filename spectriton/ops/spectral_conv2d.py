"""Convolution by Fourier transform, maps in and maps out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spectriton._backend import backend
from spectriton._check import check_real_maps, fail
from spectriton._mixing import Mixing
from spectriton.frequencies import FrequencyGrid, frequency_grid, tap_basis
from spectriton.ops._arguments import check_convolution, check_padding_mode, check_stride, check_workspace
from spectriton.ops._define import define_op
from spectriton.ops._planes import resolve_workspace, row_chunks
from spectriton.reference import spread_rows


def _fast_size(size: int) -> int:
    """The next size that Fourier transforms like: even, with no prime factor above 7."""

    def smooth(number: int) -> bool:
        for prime in (2, 3, 5, 7):
            while number % prime == 0:
                number //= prime
        return number == 1

    while size > 1 and (size % 2 or not smooth(size)):
        size += 1
    return size


def _grid(x: Tensor, weight: Tensor, dilation: Sequence[int], padding_mode: str) -> FrequencyGrid:
    """Frequencies of the transform: of the maps, or with room for the zeros that taps reach beyond them."""
    height, width = x.shape[2:]
    if padding_mode == "zeros":
        reach = [(d * (k - 1) + 1) // 2 for k, d in zip(weight.shape[2:], dilation, strict=True)]
        height, width = _fast_size(height + reach[0]), _fast_size(width + reach[1])
    return frequency_grid(height, width, x.device)


def _output_size(size: int, stride: int) -> int:
    return (size - 1) // stride + 1


def _rows(x: Tensor, grid: FrequencyGrid, dtype: torch.dtype) -> Tensor:
    """Maps ``(B, C, h, w)``, zero-padded to the size of the grid, as pairs ``(F, B, C, 2)``."""
    if x.numel() == 0:  # torch has no transform of nothing
        return x.new_zeros(grid.count, *x.shape[:2], 2, dtype=dtype)
    half = torch.fft.rfft2(x.to(dtype), s=(grid.height, grid.width), norm="ortho")
    return torch.view_as_real(half.flatten(2).permute(2, 0, 1)[grid.index])


def _maps(rows: Tensor, grid: FrequencyGrid, size: tuple[int, int]) -> Tensor:
    """Pairs ``(F, B, C, 2)`` to maps ``(B, C, *size)``, cropped from the size of the grid."""
    batch, channels = rows.shape[1:3]
    if rows.numel() == 0:
        return rows.new_zeros(batch, channels, *size)
    half = torch.view_as_complex(rows.new_empty(batch * channels, grid.height, grid.half_width, 2))
    spread_rows(torch.view_as_complex(rows).flatten(1), grid, half)
    maps = torch.fft.irfft2(half, s=(grid.height, grid.width), norm="ortho")
    return maps[:, : size[0], : size[1]].unflatten(0, (batch, channels))


def _chunks(
    mixing: Mixing, x: Tensor, grid: FrequencyGrid, dilation: Sequence[int], dtype: torch.dtype, workspace: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields ``(rows, basis, mixing weights)``: no whole kernel spectrum is ever held."""
    outputs, inputs, height, width = mixing.shape
    bytes_per_row = 8 * dtype.itemsize * outputs * inputs
    for rows in row_chunks(grid.count, bytes_per_row, resolve_workspace(workspace, x.device)):
        basis = tap_basis(grid, (height, width), rows, dtype, (dilation[0], dilation[1]))
        yield rows, basis, mixing.weights(basis)


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@define_op(
    "(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] dilation, str padding_mode, int groups, "
    "int workspace) -> Tensor"
)
def _spectral_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    dilation: list[int],
    padding_mode: str,
    groups: int,
    workspace: int,
) -> Tensor:
    batch, _, height, width = x.shape
    dtype = _precision(x)
    grid = _grid(x, weight, dilation, padding_mode)
    spectrum = _rows(x, grid, dtype)
    mixed = spectrum.new_empty(grid.count, batch, weight.shape[0], 2)
    mixing = backend(x.device).mixing(weight.to(dtype), groups)
    for rows, _, weights in _chunks(mixing, x, grid, dilation, dtype, workspace):
        mixing.mix(spectrum[rows], weights, mixed[rows])
    del spectrum
    y = _maps(mixed, grid, (height, width))[:, :, :: stride[0], :: stride[1]]
    if bias is not None:
        y = y + bias.to(dtype)[:, None, None]
    return y.to(x.dtype, memory_format=torch.contiguous_format, copy=True)


@_spectral_conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    dilation: list[int],
    padding_mode: str,
    groups: int,
    workspace: int,
) -> Tensor:
    size = (_output_size(n, s) for n, s in zip(x.shape[2:], stride, strict=True))
    return x.new_empty(x.shape[0], weight.shape[0], *size)


@define_op(
    "(Tensor grad, Tensor x, Tensor weight, SymInt[] stride, SymInt[] dilation, str padding_mode, int groups, "
    "int workspace, bool need_input) -> (Tensor, Tensor)"
)
def _spectral_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    dilation: list[int],
    padding_mode: str,
    groups: int,
    workspace: int,
    need_input: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients for the maps and the taps. The spectrum of the maps is made again rather than kept."""
    height, width = x.shape[2:]
    dtype = _precision(x)
    grid = _grid(x, weight, dilation, padding_mode)
    full = grad
    if tuple(stride) != (1, 1):
        full = grad.new_zeros(*grad.shape[:2], height, width)
        full[:, :, :: stride[0], :: stride[1]] = grad
    grad_rows = _rows(full, grid, dtype)
    spectrum = _rows(x, grid, dtype)
    mixing = backend(x.device).mixing(weight.to(dtype), groups)
    for rows, basis, weights in _chunks(mixing, x, grid, dilation, dtype, workspace):
        # By Parseval a stored frequency counts as often as the full spectrum holds it.
        weighted = grad_rows[rows] * grid.weight[rows].to(dtype)[:, None, None, None]
        mixing.add_grad_taps(spectrum[rows], weighted, basis)
        if need_input:
            mixing.mix_grad_input(grad_rows[rows], weights, spectrum[rows])
    grad_input = _maps(spectrum, grid, (height, width)).to(x.dtype, memory_format=torch.contiguous_format, copy=True)
    return grad_input if need_input else x.new_empty(0), mixing.grad_taps().to(weight.dtype)


@_spectral_conv2d_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    dilation: list[int],
    padding_mode: str,
    groups: int,
    workspace: int,
    need_input: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_input else (0,)), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.stride, ctx.dilation, ctx.padding_mode, ctx.groups, ctx.workspace = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_input = grad_weight = None
    if need_input or need_weight:
        grad_input, grad_weight = _spectral_conv2d_backward(
            grad, x, weight, ctx.stride, ctx.dilation, ctx.padding_mode, ctx.groups, ctx.workspace, need_input
        )
    return (
        grad_input if need_input else None,
        grad_weight if need_weight else None,
        grad.sum((0, 2, 3)).to(ctx.bias_dtype) if need_bias else None,
        *(None,) * 5,
    )


_spectral_conv2d.register_autograd(_autograd, setup_context=_setup)


def spectral_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding_mode: str = "circular",
    groups: int = 1,
    *,
    dilation: int | tuple[int, int] = 1,
    workspace: int | None = None,
) -> Tensor:
    """Convolution of maps through the Fourier domain; ``nn.Conv2d(padding="same")`` by another road.

    Equals ``nn.Conv2d(padding="same", padding_mode=padding_mode)``, its output taken at every ``stride``-th position;
    for odd kernels that is ``nn.Conv2d(padding=dilation * (k // 2), stride=stride)``. Backward
    keeps ``x`` and ``weight`` only.

    Args:
        x: ``(B, I, H, W)`` real maps.
        weight: ``(O, I / groups, kh, kw)``.
        bias: ``(O,)``, or None.
        stride: one number, or one for each dimension.
        padding_mode: ``"circular"``, or ``"zeros"`` (padded before the transform, cropped after).
        groups, dilation: as for ``nn.Conv2d``.
        workspace: bound on the kernel spectrum held at a time, in bytes.

    Returns:
        ``(B, O, ceil(H / stride), ceil(W / stride))`` in the dtype of ``x``; differentiable.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range.
    """
    op = "spectral_conv2d"
    check_real_maps(op, "x", x)
    check_convolution(op, x.shape[1], weight, bias, groups)
    check_padding_mode(op, padding_mode)
    steps, spread = check_stride(op, stride), check_stride(op, dilation, "dilation")
    extent = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], spread, strict=True)]
    if padding_mode == "circular" and (extent[0] > x.shape[2] or extent[1] > x.shape[3]):
        expected = f"a kernel no larger than the {x.shape[2]}x{x.shape[3]} maps it wraps around"
        fail(op, "weight", weight, expected, "use padding_mode='zeros' or a smaller kernel")
    bound = check_workspace(op, workspace)
    return _spectral_conv2d(x, weight, bias, list(steps), list(spread), padding_mode, groups, bound)
