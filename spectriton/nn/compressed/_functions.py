"""The differentiable functions behind the modules: forward is PyTorch's own, backward works on what was kept.

Every function keeps its tensors with ``save_for_backward`` (through :func:`keep`), so that saved-tensor hooks see them
and they are gone after backward. Dense maps are made right before they are used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from spectriton._check import fail
from spectriton.codec import without_autocast
from spectriton.nn.compressed._recipes import Derived, Recipe, keep, kept
from spectriton.ops import _maps as maps

aten = torch.ops.aten


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that cannot be differentiated and does not care for autocast."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            fix = "call spectriton.decompress(model) first where second derivatives are needed"
            fail("spectriton.compress", "backward", "create_graph=True", "create_graph=False", fix, RuntimeError)
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(grads[0].device):
            return backward(ctx, *grads)

    return run


def _stand_in(grad: Tensor, shape: Any) -> Tensor:
    """A tensor of a shape that takes no memory, for operators that look only at the shape of their input."""
    return grad.new_zeros(1).expand(shape)


@dataclass(frozen=True)
class Padding:
    """The padding of a convolution that the operator itself cannot do.

    Attributes:
        pads: left, right, top, bottom.
        mode: as in ``torch.nn.functional.pad``.
    """

    pads: tuple[int, ...]
    mode: str

    def __call__(self, x: Tensor) -> Tensor:
        return functional.pad(x, self.pads, self.mode)

    def adjoint(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of a shape from that of the padded input."""
        if self.mode == "constant":
            return functional.pad(grad, tuple(-n for n in self.pads))
        with torch.enable_grad():
            # Padding is linear: only the shape matters.
            x = grad.new_zeros(shape).requires_grad_()
            return torch.autograd.grad(self(x), x, grad)[0]


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks over its input; ``pad`` comes before, ``padding`` is the operator's own."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    pad: Padding | None

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        pad = None
        padding: tuple[int, ...] = (0, 0)
        same = tuple(conv._reversed_padding_repeated_twice)
        if conv.padding_mode != "zeros":
            pad = Padding(same, conv.padding_mode)
        elif conv.padding == "same":
            if same[::2] == same[1::2]:
                padding = (same[2], same[0])
            else:
                pad = Padding(same, "constant")
        elif not isinstance(conv.padding, str):
            padding = tuple(conv.padding)
        return cls(tuple(conv.stride), padding, tuple(conv.dilation), conv.groups, pad)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
        """Gradients of (padded) input, weight and bias, as far as the mask asks for them."""
        bias = [weight.shape[0]] if mask[2] else None
        geometry = (self.stride, self.padding, self.dilation, False, (0, 0), self.groups)
        gradients: tuple[Tensor | None, ...] = aten.convolution_backward(grad, x, weight, bias, *geometry, mask)
        return gradients

    def input_gradient(self, grad: Tensor, weight: Tensor, shape: list[int]) -> Tensor:
        """Gradient of the (padded) input, of a shape."""
        if grad.is_cuda:
            gradient, _, _ = self.backward(grad, _stand_in(grad, shape), weight, [True, False, False])
            assert gradient is not None
            return gradient
        # On a CPU the backward operator would make a dense input, though it does not look at it.
        if self._turns_round(grad, weight):
            beyond = [kernel - 1 - n for kernel, n in zip(weight.shape[-2:], self.padding, strict=True)]
            turned: Tensor = aten.convolution(
                grad, weight.transpose(0, 1).flip(2, 3), None, (1, 1), beyond, (1, 1), False, (0, 0), 1
            )
            return turned
        left_over = [
            size - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
            for size, out, stride, padding, dilation, kernel in zip(
                shape[-2:], grad.shape[-2:], self.stride, self.padding, self.dilation, weight.shape[-2:], strict=True
            )
        ]
        transposed: Tensor = aten.convolution(
            grad, weight, None, self.stride, self.padding, self.dilation, True, left_over, self.groups
        )
        return transposed

    def _turns_round(self, grad: Tensor, weight: Tensor) -> bool:
        """Whether the gradient of the input is better made by a convolution with the kernels turned round."""
        # oneDNN's transposed convolutions work on blocks of sixteen channels of the gradient, and take twice the time
        # with fewer of them.
        return (
            weight.shape[0] < 16
            and grad.dtype == torch.float32
            and self.groups == 1
            and self.stride == self.dilation == (1, 1)
            and all(1 < kernel > n for kernel, n in zip(weight.shape[-2:], self.padding, strict=True))
        )


class Convolution(Function):
    """``nn.Conv2d`` that keeps a recipe of its input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe | None, conv: nn.Conv2d
    ) -> Tensor:
        ctx.geometry = Geometry.of(conv)
        ctx.shape, ctx.weight_shape = x.shape, weight.shape
        keep(ctx, recipe, weight if ctx.needs_input_grad[0] else None)
        # Detached, because autocast would cache its copy of a parameter, made here without a graph, for others.
        return nn.Conv2d._conv_forward(conv, x, weight.detach(), None if bias is None else bias.detach())

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), recipe = kept(ctx, 1)
        geometry: Geometry = ctx.geometry
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        # For the gradient of the weights they only have to stand in memory as weights do: on a CPU the operator takes
        # some without strides for channels last, and rearranges the maps.
        weight = grad.new_empty(ctx.weight_shape) if weight is None else weight.to(grad.dtype)
        if needs_weight:
            assert recipe is not None
            x = recipe.decode(grad.dtype)
            if geometry.pad is not None:
                x = geometry.pad(x)
            _, grad_weight, grad_bias = geometry.backward(grad, x, weight, [False, True, needs_bias])
            # The decoded input is gone before its gradient is made.
            del x
        elif needs_bias:
            grad_bias = grad.sum((0, 2, 3))
        if needs_x:
            shape = list(ctx.shape)
            if geometry.pad is not None:
                left, right, top, bottom = geometry.pad.pads
                shape[-1] += left + right
                shape[-2] += top + bottom
            grad_x = geometry.input_gradient(grad, weight, shape)
            if geometry.pad is not None:
                grad_x = geometry.pad.adjoint(grad_x, ctx.shape)
        return grad_x, grad_weight, grad_bias, None, None


class BatchNorm(Function):
    """Batch norm that keeps a recipe of its input; gives the result, and the statistics it took from the batch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        recipe: Recipe | None,
        running: tuple[Tensor | None, Tensor | None],
        of_batch: bool,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        enabled = torch.backends.cudnn.enabled
        settings = (*running, of_batch, momentum, eps, enabled)
        y, mean, invstd, reserve, ctx.kind = torch._batch_norm_impl_index(x, weight, bias, *settings)
        ctx.of_batch, ctx.eps = of_batch, eps
        # The running statistics of a network in training mode change with the next batch.
        statistics = (None, None, mean, invstd) if of_batch else (*running, mean, invstd)
        keep(ctx, recipe, weight, *statistics, reserve)
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)
        return y, mean, invstd

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (weight, mean, var, batch_mean, invstd, reserve), recipe = kept(ctx, 6)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        if needs_weight or (needs_x and ctx.of_batch):
            assert recipe is not None
            x = recipe.decode(grad.dtype)
            statistics = (mean, var, batch_mean, invstd, ctx.of_batch, ctx.eps)
            mask = [needs_x, needs_weight, needs_bias]
            grad_x, grad_weight, grad_bias = aten._batch_norm_impl_index_backward(
                ctx.kind, x, grad, weight, *statistics, mask, reserve
            )
        else:
            if needs_x:
                factor = torch.rsqrt(var + ctx.eps)
                factor = factor if weight is None else factor * weight
                grad_x = (grad * factor.view(-1, 1, 1)).to(grad.dtype)
            if needs_bias:
                grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, *(None,) * 5


@dataclass(frozen=True)
class Rebuild:
    """Step of a recipe: batch norm with known statistics, ReLU, or one after the other.

    Its tensors are the statistics that there are, then the bits of ReLU.

    Attributes:
        normed, weighted, biased: whether there is a batch norm, its weight and its bias.
        eps: added to the variance; None where the inverse deviation is kept.
        rectified: whether there is a ReLU.
        channels_last: how the maps stand in memory.
    """

    normed: bool = False
    weighted: bool = False
    biased: bool = False
    eps: float | None = None
    rectified: bool = False
    channels_last: bool = False

    def __call__(self, x: Tensor, own: tuple[Tensor, ...], inplace: bool) -> Tensor:
        left = list(own)
        outside = left.pop() if self.rectified else None
        given = (self.normed, self.normed, self.weighted, self.biased)
        statistics = maps.Statistics(*(left.pop(0) if there else None for there in given))
        return maps.rebuild(x, statistics, self.eps, outside, self.channels_last, inplace)


@dataclass(frozen=True)
class Rectifier:
    """``x`` between 0 and ``limit``, ``slope * x`` below, ``limit`` above: ReLU, leaky ReLU, ReLU6.

    Backward needs one bit a value: whether ``x`` lies outside.
    """

    slope: float = 0.0
    limit: float = float("inf")

    def __call__(self, x: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
        """The result, and the bits in the order of memory, packed."""
        if not self.slope:
            return maps.rectify(x, self.limit, inplace)
        bits = maps.outside(x)
        return functional.leaky_relu(x, self.slope, inplace), bits

    def again(self, x: Tensor, own: tuple[Tensor, ...], inplace: bool, *, channels_last: bool) -> Tensor:
        """Step of a recipe: the result from decoded maps and the exact bits; for ReLU there is :class:`Rebuild`."""
        outside = _as_mask(own[0], x.shape, channels_last)
        if self.limit != float("inf"):
            ends = torch.where(x > self.limit / 2, self.limit, 0.0).to(x.dtype)
            return torch.where(outside, ends, x.clamp(0, self.limit))
        return torch.where(outside, x.clamp(max=0) * self.slope, x.clamp(min=0))


def rectified(recipe: Recipe, rectifier: Rectifier, outside: Tensor, channels_last: bool) -> Derived:
    """The recipe of what a rectifier makes of a tensor with a recipe; a batch norm before it is made up with it."""
    if rectifier != Rectifier():
        return Derived(recipe, functools.partial(rectifier.again, channels_last=channels_last), [outside])
    if isinstance(recipe, Derived) and isinstance(recipe.step, Rebuild) and not recipe.step.rectified:
        step = replace(recipe.step, rectified=True, channels_last=channels_last)
        return Derived(recipe.source, step, [*recipe.own, outside])
    return Derived(recipe, Rebuild(rectified=True, channels_last=channels_last), [outside])


def _as_mask(packed: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """The bits of :class:`Rectify` as a bool tensor ``(B, C, H, W)``."""
    flat = maps.unpack(packed, 1, shape.numel()).view(torch.bool)
    if not channels_last:
        return flat.view(shape)
    batch, channels, height, width = shape
    return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)


class Rectify(Function):
    """A :class:`Rectifier`, of which only the bits are kept; gives the result and the bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rectifier: Rectifier, inplace: bool) -> tuple[Tensor, Tensor]:
        ctx.slope, ctx.channels_last = rectifier.slope, maps.is_channels_last(x)
        y, outside = rectifier(x, inplace)
        ctx.save_for_backward(outside)
        ctx.mark_non_differentiable(outside)
        ctx.set_materialize_grads(False)
        if inplace:
            ctx.mark_dirty(x)
        return y, outside

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        if ctx.slope:
            outside = _as_mask(packed, grad.shape, ctx.channels_last)
            return torch.where(outside, grad * ctx.slope, grad), None, None
        return maps.clear_outside(grad, packed, ctx.channels_last, inplace=False), None, None


class Activate(Function):
    """An elementwise function that keeps a recipe of its input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        recipe: Recipe,
        function: Callable[..., Tensor],
        derivative: Callable[[Tensor, Tensor], Tensor],
        inplace: bool,
    ) -> Tensor:
        ctx.derivative = derivative
        keep(ctx, recipe)
        if inplace:
            ctx.mark_dirty(x)
        return function(x, inplace=inplace)

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, recipe = kept(ctx, 0)
        assert recipe is not None
        return ctx.derivative(grad, recipe.decode(grad.dtype)), None, None, None, None


class MaxPool(Function):
    """Maximum pooling that keeps codes; gives the maxima and the codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: maps.Window) -> tuple[Tensor, Tensor]:
        y, codes = maps.pool_maxima(x, window)
        ctx.window, ctx.shape, ctx.channels_last = window, x.shape, maps.is_channels_last(y)
        ctx.save_for_backward(codes)
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)
        return y, codes

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        return maps.spread_maxima(grad, ctx.window, codes, ctx.shape, ctx.channels_last), None


def pool_again(
    x: Tensor, own: tuple[Tensor, ...], inplace: bool, *, window: maps.Window, outputs: torch.Size, channels_last: bool
) -> Tensor:
    """Step of a recipe: the values of decoded maps where the maxima were."""
    return maps.pool_maxima_again(x, window, own[0], outputs, channels_last)


class Average(Function):
    """A mean over windows, which keeps nothing.

    ``function`` gives the means of ``x``; ``derivative`` the gradient, of that of the result and of a tensor of the
    shape of ``x``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], derivative: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        ctx.shape, ctx.derivative = x.shape, derivative
        return function(x)

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.derivative(grad.contiguous(), _stand_in(grad, ctx.shape)), None, None


class Drop(Function):
    """Dropout that keeps one bit a value; gives the result and the packed bits of what was dropped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, inplace: bool) -> tuple[Tensor, Tensor]:
        if x.is_cuda:
            y, stays = torch.native_dropout(x, p, True)
            if inplace:
                y = x.copy_(y)
        else:
            # PyTorch multiplies by noise; of ones, it gives the noise.
            noise = functional.dropout(torch.ones_like(x), p)
            stays = noise != 0
            y = x.mul_(noise) if inplace else x * noise
        if inplace:
            ctx.mark_dirty(x)
        dropped = maps.pack(stays.logical_not().reshape(-1), 1)
        ctx.p = p
        ctx.save_for_backward(dropped)
        ctx.mark_non_differentiable(dropped)
        ctx.set_materialize_grads(False)
        return y, dropped

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return drop_again(grad, ctx.saved_tensors, False, p=ctx.p), None, None


def drop_again(x: Tensor, own: tuple[Tensor, ...], inplace: bool, *, p: float) -> Tensor:
    """Step of a recipe, and the derivative: what was dropped becomes zero, the rest is scaled.

    Args:
        x: written over with ``inplace``.
        own: the packed bits.
        p: the probability.
    """
    factor = x.new_ones(()).div_(1 - p)
    x = (x.mul_(factor) if inplace else x * factor).contiguous()
    maps.clear(x.view(-1), own[0])
    return x
