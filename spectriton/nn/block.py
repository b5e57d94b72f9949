"""The packed block: convolution, threshold and activation on packed spectra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectriton import ops
from spectriton._check import check_choice, describe, fail
from spectriton.nn.activation import SpatialReLU, scale_parameter
from spectriton.nn.conv import conv_padding_mode, conv_parameters, describe_taps
from spectriton.nn.norm import SpectralBatchNorm2d, computed_again
from spectriton.nn.transform import PackedOutput, checked_format, describe_rule
from spectriton.packed import PackedSize, PackedSpectrum


class SpecBlock(PackedOutput):
    """Algorithm 1 of arXiv 1905.10915 on packed spectra: circular convolution, bias, threshold, activation.

    Parameters have the names and shapes of ``nn.Conv2d``. What goes further than the paper is a keyword and off by
    default.

    Args:
        in_channels, out_channels, kernel_size, groups, bias: as for ``nn.Conv2d(padding="same")``.
        threshold: coefficients of the convolution's ortho spectrum whose modulus is below it are dropped; 0.5 where
            no density is given.
        density: instead of a threshold, the fraction of coefficients to keep; costs a second pass of the mixing.
        activation: tanh (the paper's), softsign, asinh, atan or identity; or relu, taken in space as
            :class:`SpatialReLU` takes it, by the same thresholding rule, as ``.relu``.
        activation_scale: None for the plain ``h(x)``; a number for ``s h(x / s)`` with ``s`` learnt per channel from
            this value on (in units of the ortho spectrum).
        norm: an exact batch norm (:class:`SpectralBatchNorm2d`) between convolution and activation, as ``.norm``. The
            threshold is meant for its output then; its statistics are those of the kept coefficients. Backward keeps
            the convolution; what comes of it is made again for the block behind.
        pool, pool_stride: windows whose maximum follows the relu in the same pass, as of :class:`MaxPool2d`.
        stride: as for ``nn.Conv2d``; height and width must be multiples of it.
        dilation: as for ``nn.Conv2d``.
        value_dtype: format of the kept values, by default that of the input.
        workspace: bound on temporaries in bytes.

    Attributes:
        last_density: fraction of the convolution kept by the last forward pass, None before the first.
        last_packed: its size, a :class:`spectriton.packed.PackedSize`; None likewise, and where backward does not keep
            it: before a relu without norm.

    Shapes: packed ``(B, I, H, W)``, or several whose channels add up to ``I``, to packed
    ``(B, O, H / stride, W / stride)``, or the maxima of that.
    """

    weight: Tensor
    bias: Tensor | None
    activation_scale: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        threshold: float | None = None,
        activation: str = "tanh",
        *,
        density: float | None = None,
        activation_scale: float | None = None,
        norm: bool = False,
        pool: int | tuple[int, int] | None = None,
        pool_stride: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        value_dtype: torch.dtype | str | None = None,
        workspace: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.threshold, self.density = ops.thresholding_rule("SpecBlock", threshold, density, default=0.5)
        self.activation = check_choice("SpecBlock", "activation", activation, (*ops.ACTIVATIONS, "relu"))
        self.stride = ops.check_stride("SpecBlock", stride)
        self.dilation = ops.check_stride("SpecBlock", dilation, "dilation")
        self.value_dtype = checked_format("SpecBlock", value_dtype)
        self.workspace = workspace
        self.weight, self.bias = conv_parameters(
            "SpecBlock", in_channels, out_channels, kernel_size, groups, bias, device, dtype
        )
        self.groups = int(groups)
        self.register_parameter("activation_scale", None)
        if activation_scale is not None:
            argument = ("SpecBlock", "activation_scale")
            self.activation_scale = scale_parameter(*argument, out_channels, activation_scale, device, dtype)
        if not isinstance(norm, bool):
            fail("SpecBlock", "norm", describe(norm), "True or False", "pass a bool", TypeError)
        self.norm = SpectralBatchNorm2d(out_channels, device=device, dtype=dtype, workspace=workspace) if norm else None
        if pool is None and pool_stride is not None:
            fail("SpecBlock", "pool_stride", describe(pool_stride), "none without pool", "pass the window as pool")
        self.relu: SpatialReLU | None = None
        if activation == "relu":
            if activation_scale is not None:
                fail("SpecBlock", "activation_scale", activation_scale, "none for relu", "leave activation_scale out")
            windows: dict[str, Any] = {} if pool is None else {"kernel_size": pool, "stride": pool_stride}
            self.relu = SpatialReLU(self.threshold, density, value_dtype, workspace, **windows)
        elif pool is not None:
            fail("SpecBlock", "pool", describe(pool), "none without relu", "put a MaxPool2d behind the block")
        self._var: Tensor | None = None  # the running variance that the last threshold was taken from

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        threshold: float | None = None,
        activation: str = "tanh",
        *,
        density: float | None = None,
        activation_scale: float | None = None,
        value_dtype: torch.dtype | str | None = None,
        workspace: int | None = None,
    ) -> SpecBlock:
        """A block around the parameters of a convolution, which it shares.

        The block wraps around at the edges whatever the padding mode of the convolution.

        Raises:
            TypeError, ValueError: as :meth:`SpectralConv2d.from_conv2d`.
        """
        conv_padding_mode("SpecBlock.from_conv2d", conv)
        block = cls(
            conv.in_channels,
            conv.out_channels,
            (conv.kernel_size[0], conv.kernel_size[1]),
            threshold,
            activation,
            density=density,
            activation_scale=activation_scale,
            stride=(conv.stride[0], conv.stride[1]),
            dilation=(conv.dilation[0], conv.dilation[1]),
            groups=conv.groups,
            bias=conv.bias is not None,
            value_dtype=value_dtype,
            workspace=workspace,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        block.weight, block.bias = conv.weight, conv.bias
        return block

    def forward(self, packed: PackedSpectrum | Sequence[PackedSpectrum]) -> PackedSpectrum:
        out = ops.with_room(
            self._room,
            ops.spec_block,
            packed,
            self.weight,
            self.bias,
            stride=self.stride,
            dilation=self.dilation,
            threshold=self.threshold,
            density=self.density,
            activation="identity" if self.norm is not None or self.relu is not None else self.activation,
            activation_scale=self.activation_scale if self.norm is None else None,
            threshold_scale=self._threshold_scale(),
            groups=self.groups,
            value_dtype=self.value_dtype,
            workspace=self.workspace,
        )
        self._remember(out)
        if self.relu is not None:
            return self.relu(out, self.norm)
        if self.norm is not None:
            out = self.norm(out, activation=self.activation, activation_scale=self.activation_scale)
        return out

    @property
    def last_packed(self) -> PackedSize | None:
        # A ReLU without a norm keeps nothing of the convolution's output for backward.
        return None if self.relu is not None and self.norm is None else self._last_size()

    def _threshold_scale(self) -> Tensor | None:
        """The threshold is meant for what comes out of the batch norm: back to what goes in.

        By the running deviation, so that one pass over the frequencies does. A channel whose weight is next to nothing
        is dropped but for its zero frequency.
        """
        norm = self.norm
        if norm is None or norm.running_var is None or self.density is not None:
            return None
        var = norm.running_var
        if self.training and not torch.compiler.is_compiling():
            # This batch will move the statistics. Checkpointing, which comes again, has to find the same threshold.
            self._var = var = self._var if computed_again() and self._var is not None else var.clone()
        gain = torch.ones_like(var) if norm.weight is None else norm.weight.detach().abs()
        return (var + norm.eps).sqrt() / gain.clamp(min=torch.finfo(gain.dtype).tiny ** 0.5)

    def extra_repr(self) -> str:
        rule = describe_rule(self.threshold, self.density, self.value_dtype)
        scale = "" if self.activation_scale is None else " with learnt scale"
        pairs = {"stride": self.stride, "dilation": self.dilation}
        further = "".join(f", {name}={pair}" for name, pair in pairs.items() if pair != (1, 1))
        return f"{describe_taps(self.weight, self.groups)}{further}, {rule}, activation={self.activation}{scale}"
