"""Checks of the arguments that several ops and layers share; they look at shapes and numbers, never at tensor data."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from spectriton._check import check_choice, check_rank, check_threshold, describe, fail
from spectriton.packed import PackedSpectrum
from spectriton.reference import ACTIVATIONS, ROUNDINGS, make_seed, seed_of

PADDING_MODES = ("circular", "zeros")


def check_rule(op: str, threshold: float | None, density: float | None) -> tuple[float, float]:
    """The thresholding rule as two numbers, ``density`` being -1 where the threshold decides.

    Raises:
        TypeError, ValueError: neither or both are given, or one is out of range.
    """
    if (threshold is None) == (density is None):
        got = "neither" if threshold is None else "both"
        fail(op, "threshold and density", got, "one of them", "pass threshold=0.0 to keep every coefficient")
    if density is None:
        return check_threshold(op, threshold), -1.0
    quarter = "pass 0.25 to keep a quarter of the coefficients"
    value = check_threshold(op, density, "density", quarter)
    if value > 1:
        fail(op, "density", value, "a fraction from 0 to 1", quarter)
    return 0.0, value


def check_workspace(op: str, workspace: int | None) -> int:
    """The workspace as the ops take it: bytes, 0 for the default.

    Raises:
        TypeError, ValueError: not a positive whole number.
    """
    if workspace is None:
        return 0
    if isinstance(workspace, bool) or not isinstance(workspace, int):
        fail(op, "workspace", workspace, "a number of bytes", "pass an int such as 4 << 20", TypeError)
    if workspace <= 0:
        fail(op, "workspace", workspace, "a positive number of bytes", "pass an int such as 4 << 20")
    return workspace


def check_seed(op: str, seed: int | Tensor | None) -> None:
    """Check a seed.

    Raises:
        TypeError: not None, an int, or an int64 tensor without dimensions.
    """
    if seed is None or (isinstance(seed, int) and not isinstance(seed, bool)):
        return
    if not (isinstance(seed, Tensor) and seed.dim() == 0 and seed.dtype == torch.int64):
        fail(op, "seed", seed, "an int or an int64 tensor without dimensions", "pass 0", TypeError)


def check_rounding(op: str, rounding: str, seed: int | Tensor | None, data: Tensor) -> Tensor | None:
    """The seed of stochastic rounding, made from one line of each map of ``data`` where left out; None for nearest.

    Raises:
        TypeError, ValueError: no such rounding, or no such seed.
    """
    check_choice(op, "rounding", rounding, ROUNDINGS)
    check_seed(op, seed)
    if rounding == "nearest":
        return None
    if seed is not None:
        return make_seed(seed, data.device)
    line = data.detach()[:, :, data.shape[2] // 2]
    return seed_of(torch.view_as_real(line.resolve_conj()) if line.is_complex() else line)


def check_packed(op: str, name: str, packed: Any) -> PackedSpectrum:
    """Check that an argument is a packed spectrum.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(packed, PackedSpectrum):
        fix = "put spectriton.nn.ToSpectral() before this layer, or use ops.to_spectral"
        fail(op, name, packed, "a PackedSpectrum", fix, TypeError)
    return packed


def check_convolution(op: str, channels: int, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    """Check taps, bias and groups against the number of input channels.

    Raises:
        TypeError, ValueError: naming what does not fit.
    """
    check_rank(op, "weight", weight, 4)
    if not weight.is_floating_point():
        fail(op, "weight", weight, "real taps (O, I / groups, kh, kw)", "pass the spatial kernel", TypeError)
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        fail(
            op,
            "groups",
            describe(groups),
            f"a divisor of the {weight.shape[0]} output channels",
            "change groups or channels",
        )
    if channels != weight.shape[1] * groups:
        fail(
            op,
            "input",
            f"{channels} channels",
            f"{weight.shape[1] * groups} (weight of shape {tuple(weight.shape)}, groups={groups})",
            "match the input channels of this layer to the layer before it",
        )
    if min(weight.shape) < 1:
        fail(op, "weight", weight, "channels, and a kernel of at least 1x1", "pass taps (O, I / groups, kh, kw)")
    if bias is not None:
        check_per_channel(op, "bias", bias, weight.shape[0], "pass one value per output channel")


def check_pair(op: str, name: str, value: Any, fix: str) -> tuple[int, int]:
    """One positive whole number, or two of them, as two.

    Raises:
        ValueError: it is something else.
    """
    pair = (value, value) if isinstance(value, numbers.Integral) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(_is_size(n) for n in pair):
        fail(op, name, describe(value), "a positive int or two of them", fix)
    return int(pair[0]), int(pair[1])


def _is_size(value: Any) -> bool:
    whole = isinstance(value, (numbers.Integral, torch.SymInt)) and not isinstance(value, bool)
    return whole and int(value) >= 1


def check_size(op: str, size: Any) -> tuple[int, int]:
    """The size ``(H, W)`` of maps.

    Raises:
        ValueError: not two positive whole numbers.
    """
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(_is_size(n) for n in size):
        expected = "(H, W) of the maps, both at least 1"
        fail(op, "size", describe(size), expected, "pass x.shape[-2:] of the maps x")
    return int(size[0]), int(size[1])


def check_per_channel(op: str, name: str, tensor: Any, channels: int, fix: str) -> None:
    """Check a real tensor of one value per channel, ``(channels,)``.

    Raises:
        TypeError: not a tensor, or not of a real floating-point dtype.
        ValueError: of another shape.
    """
    expected = f"shape ({channels},)"
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        fail(op, name, describe(tensor), f"a real floating-point tensor of {expected}", fix, TypeError)
    if tuple(tensor.shape) != (channels,):
        fail(op, name, tensor, expected, fix)


def check_stride(op: str, stride: Any, name: str = "stride") -> tuple[int, int]:
    """A stride (or dilation, as ``name`` says) as two positive whole numbers.

    Raises:
        ValueError: it is something else.
    """
    return check_pair(op, name, stride, f"pass {name}=1 or {name}=(1, 2)")


def check_half_spectrum(op: str, name: str, spectrum: Tensor, size: Any) -> tuple[int, int]:
    """The size ``(H, W)`` of the maps behind half spectra ``(B, C, H, W // 2 + 1)``; by default an even width.

    Raises:
        ValueError: the spectrum has another shape than ``size`` implies.
    """
    check_rank(op, name, spectrum, 4)
    height, half_width = spectrum.shape[2:]
    if height < 1 or half_width < 1:
        fail(op, name, spectrum, "a height and a width of at least 1", "pass torch.fft.rfft2(x, norm='ortho')")
    if size is None:
        return height, max(1, 2 * (half_width - 1))
    whole = check_size(op, size)
    if whole not in ((height, 2 * half_width - 2), (height, 2 * half_width - 1)):
        fail(op, "size", whole, f"(H, W) of the maps behind {name}, {describe(spectrum)}", "pass x.shape[-2:]")
    return whole


def check_window(op: str, kernel_size: Any, stride: Any) -> tuple[list[int], list[int]]:
    """Kernel size and stride as two positive numbers each; the stride defaults to the kernel size.

    Raises:
        ValueError: something else was passed.
    """
    kernel = check_pair(op, "kernel_size", kernel_size, "pass 2 or (2, 2)")
    return list(kernel), list(kernel if stride is None else check_pair(op, "stride", stride, "pass 2 or (2, 2)"))


def check_output_size(op: str, output_size: Any) -> tuple[int, int]:
    """An output size as two positive whole numbers.

    Raises:
        ValueError: it is something else.
    """
    return check_pair(op, "output_size", output_size, "pass 8 or (8, 8)")


def thresholding_rule(
    op: str, threshold: float | None, density: float | None, default: float | None
) -> tuple[float | None, float | None]:
    """The rule of a layer, checked: ``default`` is its threshold where neither is given, None for no rule at all.

    Raises:
        TypeError, ValueError: both are given, or one is out of range.
    """
    if threshold is None and density is None:
        threshold = default
        if default is None:
            return None, None
    check_rule(op, threshold, density)
    return threshold, density


def check_activation(op: str, kind: str) -> str:
    """Check the name of an activation.

    Raises:
        ValueError: no such activation.
    """
    return check_choice(op, "activation", kind, ACTIVATIONS)


def check_padding_mode(op: str, mode: str) -> str:
    """Check a padding mode.

    Raises:
        ValueError: no such mode.
    """
    return check_choice(op, "padding_mode", mode, PADDING_MODES)
