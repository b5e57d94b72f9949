"""Convolution through the Fourier domain, a drop-in for ``nn.Conv2d(padding="same")``."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor, nn

from spectriton import ops
from spectriton._check import describe, fail


class SpectralConv2d(nn.Module):
    """``nn.Conv2d(padding="same")`` computed on spectra; same parameters, same ``state_dict``.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, bias, dilation: as for ``nn.Conv2d``. The output is
            that of ``padding="same"``, taken at every ``stride``-th position.
        padding_mode: ``"circular"`` (the default: no padding is needed at all) or ``"zeros"``.
        workspace: bound on the kernel spectrum held at a time, in bytes.

    Shapes: ``(B, I, H, W)`` to ``(B, O, ceil(H / stride), ceil(W / stride))``.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding_mode: str = "circular",
        groups: int = 1,
        bias: bool = True,
        workspace: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dilation: int | tuple[int, int] = 1,
    ) -> None:
        super().__init__()
        ops.check_padding_mode("SpectralConv2d", padding_mode)
        self.stride = ops.check_stride("SpectralConv2d", stride)
        self.dilation = ops.check_stride("SpectralConv2d", dilation, "dilation")
        self.padding_mode = padding_mode
        self.workspace = workspace
        self.weight, self.bias = conv_parameters(
            "SpectralConv2d", in_channels, out_channels, kernel_size, groups, bias, device, dtype
        )
        self.groups = int(groups)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, workspace: int | None = None) -> SpectralConv2d:
        """The spectral twin of a convolution, sharing its parameters.

        Raises:
            TypeError: not an ``nn.Conv2d``.
            ValueError: a padding other than "same", or a padding mode without a spectral counterpart.
        """
        mode = conv_padding_mode("SpectralConv2d.from_conv2d", conv)
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            (conv.kernel_size[0], conv.kernel_size[1]),
            (conv.stride[0], conv.stride[1]),
            mode,
            conv.groups,
            conv.bias is not None,
            workspace,
            device="meta",
            dilation=(conv.dilation[0], conv.dilation[1]),
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return ops.spectral_conv2d(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding_mode,
            self.groups,
            dilation=self.dilation,
            workspace=self.workspace,
        )

    def extra_repr(self) -> str:
        dilation = "" if self.dilation == (1, 1) else f", dilation={self.dilation}"
        taps = describe_taps(self.weight, self.groups)
        return f"{taps}, stride={self.stride}{dilation}, padding_mode={self.padding_mode!r}"


def conv_parameters(
    op: str,
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    groups: int,
    bias: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Parameters, taps ``(O, I / groups, kh, kw)`` and bias ``(O,)``, drawn exactly as ``nn.Conv2d`` draws them.

    Raises:
        ValueError: numbers that make no convolution.
    """
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            fail(op, name, describe(value), "a positive int", "pass a number of channels, or of groups")
    if in_channels % groups or out_channels % groups:
        expected = f"a divisor of {in_channels} and of {out_channels} channels"
        fail(op, "groups", groups, expected, "change groups or channels")
    kernel = ops.check_pair(op, "kernel_size", kernel_size, "pass 3 or (3, 3)")
    if dtype is not None and not dtype.is_floating_point:
        fail(op, "dtype", dtype, "a real floating-point dtype", "pass torch.float32: taps are real")
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, padding="same", groups=groups, bias=bias, device=device, dtype=dtype
    )
    return conv.weight, conv.bias


def conv_padding_mode(op: str, conv: Any) -> str:
    """The padding mode of a convolution that has a spectral twin.

    Raises:
        TypeError: not an ``nn.Conv2d``.
        ValueError: a padding other than "same", or another padding mode.
    """
    if not isinstance(conv, nn.Conv2d):
        fail(op, "conv", conv, "an nn.Conv2d", "pass the convolution itself", TypeError)
    if conv.padding_mode not in ("zeros", "circular"):
        fail(op, "padding_mode", repr(conv.padding_mode), "'zeros' or 'circular'", "keep this layer as it is")
    extra = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    same = tuple(e // 2 for e in extra)
    even = all(e % 2 == 0 for e in extra)
    if conv.padding != "same" and not (even and tuple(conv.padding) == same):
        fail(op, "padding", f"{conv.padding!r}", f"'same' (that is {same})", "keep this layer, or pad its input apart")
    return conv.padding_mode


def describe_taps(weight: Tensor, groups: int) -> str:
    """Channels and kernel size for a module's repr."""
    outputs, inputs, height, width = weight.shape
    text = f"{inputs * groups}, {outputs}, kernel_size=({height}, {width})"
    return text if groups == 1 else f"{text}, groups={groups}"
