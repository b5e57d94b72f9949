"""Modules of ``torch.nn`` with the same parameters and results, which keep compressed maps for backward.

They are made from existing modules by :func:`spectriton.compress`, which sets their ``codec``. What is no batch of maps
``(B, C, H, W)``, and what no gradient is asked for, takes the way of the original.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectriton.nn.compressed import _functions as functions
from spectriton.nn.compressed._recipes import SMALLEST_MAP, Derived, known_recipe, leave_note, recipe_of
from spectriton.ops._maps import Window, is_channels_last

if TYPE_CHECKING:
    from spectriton.codec import Codec

aten = torch.ops.aten


def _differentiable(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether ``x`` is maps ``(B, C, H, W)`` and something will be wanted of them in backward."""
    if x.dim() != 4 or not x.is_floating_point() or not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(p is not None and p.requires_grad for p in parameters)


def _constant(y: Tensor) -> Tensor:
    """Marks what frozen modules have computed as no input of the network."""
    if torch.is_grad_enabled() and not y.requires_grad:
        leave_note(y, None)
    return y


def _note_pooled(x: Tensor, y: Tensor, step: Callable[..., Tensor], *own: Tensor) -> None:
    """Note that ``y`` can be made of what is kept of ``x``; else ``y``, being smaller, is better encoded itself."""
    recipe = known_recipe(x)
    if recipe is not None and recipe.held and y.shape[-2] * y.shape[-1] >= SMALLEST_MAP:
        leave_note(y, Derived(recipe, step, own))


class CompressedConv2d(nn.Conv2d):
    """``nn.Conv2d`` that keeps its input encoded."""

    codec: Codec

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _differentiable(input, weight, bias):
            return _constant(super()._conv_forward(input, weight, bias))
        recipe = recipe_of(input, self.codec, self) if weight.requires_grad else None
        y: Tensor = functions.Convolution.apply(input, weight, bias, recipe, self)
        return y


class CompressedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that keeps its input encoded, once for itself and for who needs its output."""

    codec: Codec

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        # One value in a channel has no deviation; the original says so.
        if not _differentiable(input, weight, bias) or input.numel() <= self.num_features:
            return _constant(super().forward(input))
        self._check_input_dim(input)
        of_batch = self.training or self.running_mean is None
        updates = self.training and self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        if updates and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        running = (self.running_mean, self.running_var) if updates or not of_batch else (None, None)
        weight_needed = weight is not None and weight.requires_grad
        needed = weight_needed or (of_batch and input.requires_grad)
        recipe = recipe_of(input, self.codec, self) if needed else known_recipe(input)
        y, mean, invstd = functions.BatchNorm.apply(
            input, weight, bias, recipe if needed else None, running, of_batch, momentum, self.eps
        )
        if recipe is not None:
            statistics = (mean, invstd) if of_batch else (self.running_mean, self.running_var)
            step = functions.Rebuild(
                normed=True,
                weighted=weight is not None,
                biased=bias is not None,
                eps=None if of_batch else self.eps,
                channels_last=is_channels_last(y),
            )
            leave_note(y, Derived(recipe, step, [t for t in (*statistics, weight, bias) if t is not None]))
        result: Tensor = y
        return result


class _Rectifier(nn.Module):
    """Common to what keeps one bit a value, and its input encoded where nobody has done so and the output needs it."""

    codec: Codec
    inplace: bool

    def _rectifier(self) -> functions.Rectifier:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if not _differentiable(input):
            return _constant(super().forward(input))
        rectifier = self._rectifier()
        recipe = recipe_of(input, self.codec, self, overwritten=self.inplace)
        channels_last = is_channels_last(input)
        y, outside = functions.Rectify.apply(input, rectifier, self.inplace)
        leave_note(y, functions.rectified(recipe, rectifier, outside, channels_last))
        result: Tensor = y
        return result


class CompressedReLU(_Rectifier, nn.ReLU):
    """``nn.ReLU`` that keeps one bit a value."""

    def _rectifier(self) -> functions.Rectifier:
        return functions.Rectifier()


class CompressedReLU6(_Rectifier, nn.ReLU6):
    """``nn.ReLU6`` that keeps one bit a value."""

    def _rectifier(self) -> functions.Rectifier:
        return functions.Rectifier(limit=6.0)


class CompressedLeakyReLU(_Rectifier, nn.LeakyReLU):
    """``nn.LeakyReLU`` that keeps one bit a value."""

    def _rectifier(self) -> functions.Rectifier:
        return functions.Rectifier(slope=self.negative_slope)


class _Activation(nn.Module):
    """Common to elementwise functions whose derivative is taken at the decoded input."""

    codec: Codec

    def _function(self) -> tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]:
        """The function of (maps, ``inplace``), and its backward of (gradient, maps)."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if not _differentiable(input):
            return _constant(super().forward(input))
        function, derivative = self._function()
        inplace = bool(getattr(self, "inplace", False))
        recipe = recipe_of(input, self.codec, self, overwritten=inplace)
        y: Tensor = functions.Activate.apply(input, recipe, function, derivative, inplace)
        leave_note(y, Derived(recipe, partial(_apply, function)))
        return y


def _apply(function: Callable[..., Tensor], x: Tensor, own: tuple[Tensor, ...], inplace: bool) -> Tensor:
    """Step of a recipe: an elementwise function."""
    return function(x, inplace=inplace)


def _gelu(x: Tensor, inplace: bool, approximate: str) -> Tensor:
    return functional.gelu(x, approximate=approximate)


def _elu_backward(grad: Tensor, x: Tensor, alpha: float) -> Tensor:
    gradient: Tensor = aten.elu_backward(grad, alpha, 1, 1, False, x)
    return gradient


class CompressedGELU(_Activation, nn.GELU):
    """``nn.GELU`` that keeps its input encoded."""

    def _function(self) -> tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]:
        settings: dict[str, Any] = {"approximate": self.approximate}
        return partial(_gelu, **settings), partial(aten.gelu_backward, **settings)


class CompressedSiLU(_Activation, nn.SiLU):
    """``nn.SiLU`` that keeps its input encoded."""

    def _function(self) -> tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]:
        return functional.silu, aten.silu_backward


class CompressedHardswish(_Activation, nn.Hardswish):
    """``nn.Hardswish`` that keeps its input encoded."""

    def _function(self) -> tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]:
        return functional.hardswish, aten.hardswish_backward


class CompressedMish(_Activation, nn.Mish):
    """``nn.Mish`` that keeps its input encoded."""

    def _function(self) -> tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]:
        return functional.mish, aten.mish_backward


class CompressedELU(_Activation, nn.ELU):
    """``nn.ELU`` that keeps its input encoded."""

    def _function(self) -> tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]:
        return partial(functional.elu, alpha=self.alpha), partial(_elu_backward, alpha=self.alpha)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class CompressedMaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` that keeps where the maxima were, in 2 to 8 bits each."""

    codec: Codec

    def forward(self, input: Tensor) -> Any:
        window = Window(
            _pair(self.kernel_size), _pair(self.stride), _pair(self.padding), _pair(self.dilation), self.ceil_mode
        )
        if self.return_indices or window.positions > 256 or not _differentiable(input) or not input.numel():
            y = super().forward(input)
            return y if self.return_indices else _constant(y)
        y, codes = functions.MaxPool.apply(input, window)
        step = partial(functions.pool_again, window=window, outputs=y.shape, channels_last=is_channels_last(y))
        _note_pooled(input, y, step, codes)
        return y


def _apply_average(function: Callable[[Tensor], Tensor], x: Tensor, own: tuple[Tensor, ...], inplace: bool) -> Tensor:
    """Step of a recipe: a mean over windows."""
    return function(x)


class CompressedAvgPool2d(nn.AvgPool2d):
    """``nn.AvgPool2d`` that keeps nothing."""

    codec: Codec

    def forward(self, input: Tensor) -> Tensor:
        if not _differentiable(input):
            return _constant(super().forward(input))
        settings = (
            _pair(self.kernel_size),
            _pair(self.stride),
            _pair(self.padding),
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )
        function = partial(_averages, settings=settings)
        y: Tensor = functions.Average.apply(input, function, partial(_averages_backward, settings=settings))
        _note_pooled(input, y, partial(_apply_average, function))
        return y


def _averages(x: Tensor, settings: tuple[Any, ...]) -> Tensor:
    return functional.avg_pool2d(x, *settings)


def _averages_backward(grad: Tensor, like: Tensor, settings: tuple[Any, ...]) -> Tensor:
    gradient: Tensor = aten.avg_pool2d_backward(grad, like, *settings)
    return gradient


class CompressedAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d`` that keeps nothing."""

    codec: Codec

    def forward(self, input: Tensor) -> Tensor:
        # The mean of whole maps keeps nothing in PyTorch either.
        if not _differentiable(input) or self.output_size in (1, (1, 1)):
            return _constant(super().forward(input))
        function = partial(functional.adaptive_avg_pool2d, output_size=self.output_size)
        y: Tensor = functions.Average.apply(input, function, aten._adaptive_avg_pool2d_backward)
        _note_pooled(input, y, partial(_apply_average, function))
        return y


class CompressedDropout(nn.Dropout):
    """``nn.Dropout`` that keeps one bit a value."""

    codec: Codec

    def forward(self, input: Tensor) -> Tensor:
        applies = self.training and self.p > 0 and input.is_floating_point() and input.numel()
        if not (applies and torch.is_grad_enabled() and input.requires_grad):
            # Not marked as computed: in evaluation this is the input itself.
            return super().forward(input)
        recipe = known_recipe(input)
        y, dropped = functions.Drop.apply(input, self.p, self.inplace)
        if recipe is not None:
            leave_note(y, Derived(recipe, partial(functions.drop_again, p=self.p), [dropped]))
        result: Tensor = y
        return result


#: What :func:`spectriton.compress` makes of modules of exactly these types.
COMPRESSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: CompressedConv2d,
    nn.BatchNorm2d: CompressedBatchNorm2d,
    nn.ReLU: CompressedReLU,
    nn.ReLU6: CompressedReLU6,
    nn.LeakyReLU: CompressedLeakyReLU,
    nn.GELU: CompressedGELU,
    nn.SiLU: CompressedSiLU,
    nn.Hardswish: CompressedHardswish,
    nn.Mish: CompressedMish,
    nn.ELU: CompressedELU,
    nn.MaxPool2d: CompressedMaxPool2d,
    nn.AvgPool2d: CompressedAvgPool2d,
    nn.AdaptiveAvgPool2d: CompressedAdaptiveAvgPool2d,
    nn.Dropout: CompressedDropout,
}
