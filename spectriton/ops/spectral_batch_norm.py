"""Batch norm of spectra, exact.

The mean of a map is its zero frequency over ``sqrt(H W)``, and by Parseval's theorem its variance is the energy of the
rest of its ortho spectrum over ``H W``. So the statistics of ``nn.BatchNorm2d`` are sums over the coefficients, and its
affine map is a factor per channel and a shift of the zero frequency. A packed spectrum keeps its pattern.

Forward and backward walk over chunks of frequencies that fit a bounded workspace, twice each: once for the sums over
the batch, once to apply them. Frequencies at which nothing is kept are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spectriton import reference
from spectriton._backend import backend
from spectriton._check import check_complex, fail
from spectriton.frequencies import frequency_grid
from spectriton.ops._arguments import check_half_spectrum, check_workspace
from spectriton.ops._define import PACKED_FIELDS, define_op
from spectriton.ops._planes import resolve_workspace
from spectriton.ops._rows import row_bytes, store_rows
from spectriton.packed import PackedSpectrum, layout, make_edge
from spectriton.reference import RowPattern


def _numbers(chunk: Tensor) -> Tensor:
    """Pairs ``(Fc, P, 2)`` as ``(Fc, 2 P)``, a view."""
    return chunk.view(chunk.shape[0], -1)


class _Walk:
    """Chunks of the frequencies kept, and the dense buffers they are read into.

    The first chunk begins with the zero frequency.
    """

    def __init__(
        self, bitmap: Tensor, offsets: Tensor, shape: list[int], dtype: torch.dtype, kept: int, buffers: int,
        workspace: int,
    ) -> None:  # fmt: skip
        self.bitmap, self.offsets, self.dtype = bitmap, offsets, dtype
        self.sizes = sizes = layout(shape)
        self.primitives = backend(bitmap.device)
        self.weight = frequency_grid(sizes.height, sizes.width, bitmap.device).weight.to(dtype)
        rows = torch.nonzero(bitmap.flatten(1).any(1)).flatten()
        at_once = max(1, resolve_workspace(workspace, bitmap.device) // max(1, row_bytes(sizes, dtype, kept, buffers)))
        self.parts = rows.split(at_once) if rows.numel() else ()
        longest = self.parts[0].numel() if self.parts else 0
        self.buffers = torch.empty(buffers, longest, sizes.padded_row, 2, dtype=dtype, device=bitmap.device)

    def __iter__(self) -> Iterator[tuple[bool, Tensor, RowPattern | None]]:
        """Yields (whether it begins with the zero frequency, its rows, their pattern) of each chunk."""
        for number, rows in enumerate(self.parts):
            yield number == 0, rows, self.primitives.row_pattern(self.bitmap, self.offsets, rows, 0, self.sizes.tiles)

    def read(self, values: Tensor, scales: Tensor, rows: Tensor, pattern: RowPattern | None, buffer: int = 0) -> Tensor:
        """The chunk as pairs ``(Fc, P, 2)``, zero where nothing is kept."""
        out = self.buffers[buffer, : rows.numel()]
        return self.primitives.unpack_rows(
            values, scales, self.bitmap, self.offsets, rows, 0, self.sizes.tiles, out, pattern
        )

    def zero_frequency(self, chunk: Tensor) -> Tensor:
        """Real parts ``(B, C)`` of the zero frequency of the first chunk, a view."""
        return chunk[0, : self.sizes.row, 0].unflatten(0, (self.sizes.batch, self.sizes.channels))

    def per_number(self, per_channel: Tensor) -> Tensor:
        """``(C,)`` to the numbers ``(2 P,)`` of a row."""
        row = per_channel.to(self.dtype).repeat(self.sizes.batch)
        padded = functional.pad(row, (0, self.sizes.padded_row - self.sizes.row))
        return padded.unsqueeze(1).expand(-1, 2).flatten()

    def per_channel(self, numbers: Tensor) -> Tensor:
        """Sums ``(C,)`` in float64 over the numbers ``(2 P,)`` of a row."""
        by_channel = numbers[: 2 * self.sizes.row].view(self.sizes.batch, self.sizes.channels, 2)
        return by_channel.sum((0, 2), dtype=torch.float64)

    @property
    def root(self) -> float:
        """``sqrt(H W)``: a constant is its mean times this at the zero frequency."""
        return float((self.sizes.height * self.sizes.width) ** 0.5)

    @property
    def count(self) -> int:
        """Numbers of a channel over which statistics are taken, ``B H W``."""
        return max(1, self.sizes.batch * self.sizes.height * self.sizes.width)


def _statistics(walk: _Walk, values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(C,)`` of the maps, float64."""
    zero_mean = values.new_zeros(walk.sizes.channels, dtype=torch.float64)
    power = torch.zeros_like(zero_mean)
    for first, rows, pattern in walk:
        y = walk.read(values, scales, rows, pattern)
        if first:
            # The zero frequency enters by its deviation from the mean of the batch: no small difference of large sums.
            zero = walk.zero_frequency(y)
            zero_mean = zero.mean(0, dtype=torch.float64)
            zero -= zero_mean
        power += walk.per_channel(torch.mv(_numbers(y.square_()).T, walk.weight[rows]))
    return zero_mean / walk.root, power / walk.count


def _factor(weight: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """``gamma / sigma`` ``(C,)``, float64."""
    inverse = (var.double() + eps).rsqrt()
    return inverse if weight is None else inverse * weight


@define_op(
    f"(Tensor edge, {PACKED_FIELDS}, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, SymInt[] shape, "
    "float eps, int workspace) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _spectral_batch_norm(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    shape: list[int],
    eps: float,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Edge, values and scales of the result, which has the input's pattern; then mean and biased variance ``(C,)``.

    Where ``mean`` and ``var`` are given, they are taken; else those of the batch.
    """
    walk = _Walk(bitmap, offsets, shape, edge.dtype, values.shape[0], 1, workspace)
    if mean is None or var is None:
        mean, var = _statistics(walk, values, scales)
    factor = walk.per_number(_factor(weight, var, eps))
    out_values, out_scales = torch.empty_like(values), torch.zeros_like(scales)
    for first, rows, pattern in walk:
        y = walk.read(values, scales, rows, pattern)
        if first:
            walk.zero_frequency(y).sub_(mean * walk.root)
        _numbers(y).mul_(factor)
        if first and bias is not None:
            walk.zero_frequency(y).add_(bias * walk.root)
        store_rows(y, bitmap, offsets, rows, out_values, out_scales, pattern)
    mean, var = mean.to(edge.dtype, copy=True), var.to(edge.dtype, copy=True)
    return make_edge(values.shape[0], edge.dtype, edge.device), out_values, out_scales, mean, var


@_spectral_batch_norm.register_fake
def _(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    shape: list[int],
    eps: float,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out_edge = make_edge(values.shape[0], edge.dtype, edge.device)
    mean, var = edge.new_empty(shape[1]), edge.new_empty(shape[1])
    return out_edge, torch.empty_like(values), torch.empty_like(scales), mean, var


@define_op(
    "(Tensor grad, Tensor values, Tensor scales, Tensor bitmap, Tensor offsets, Tensor? weight, Tensor mean, "
    "Tensor var, SymInt[] shape, bool batch_statistics, float eps, int workspace, bool need_input) "
    "-> (Tensor, Tensor, Tensor)"
)
def _spectral_batch_norm_backward(
    grad: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    shape: list[int],
    batch_statistics: bool,
    eps: float,
    workspace: int,
    need_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for the packed input (in its own pattern), weight and bias.

    With ``x`` the input less its mean, ``a = gamma / sigma``, ``n = B H W`` and ``w`` how many coefficients of the full
    spectrum a stored one stands for, the gradient of a coefficient is ``a g - a w x sum(<g, x>) / (n sigma^2)``, less
    the mean of ``a g`` over the batch at the zero frequency. The last two terms are those of the batch's statistics.
    """
    walk = _Walk(bitmap, offsets, shape, grad.dtype, values.shape[0], 2, workspace)
    grad, no_scales = grad.contiguous(), grad.new_empty(0)
    zero_mean = mean.double() * walk.root
    inner = torch.zeros_like(mean, dtype=torch.float64)  # sum of <g, x> per channel
    grad_zero = torch.zeros_like(inner)
    for first, rows, pattern in walk:
        x, g = walk.read(values, scales, rows, pattern), walk.read(grad, no_scales, rows, pattern, 1)
        if first:
            walk.zero_frequency(x).sub_(zero_mean)
            grad_zero = walk.zero_frequency(g).sum(0, dtype=torch.float64)
        inner += walk.per_channel(_numbers(x.mul_(g)).sum(0))
    grad_weight, grad_bias = inner * _factor(None, var, eps), grad_zero * walk.root

    grad_input = grad.new_zeros(values.shape[0] if need_input else 0, 2)
    if need_input:
        factor = _factor(weight, var, eps)
        gain, pull = walk.per_number(factor), walk.per_number(factor / (var + eps) * inner / walk.count)
        zero_pull = factor * grad_zero / max(1, walk.sizes.batch)
        for first, rows, pattern in walk:
            g = walk.read(grad, no_scales, rows, pattern, 1)
            _numbers(g).mul_(gain)
            if batch_statistics:
                x = walk.read(values, scales, rows, pattern)
                if first:
                    walk.zero_frequency(x).sub_(zero_mean)
                    walk.zero_frequency(g).sub_(zero_pull)
                x *= walk.weight[rows, None, None]
                _numbers(g).addcmul_(_numbers(x), pull, value=-1)
            walk.primitives.gather_rows(g, bitmap, offsets, rows, 0, grad_input, pattern)
    return grad_input, grad_weight.to(grad.dtype), grad_bias.to(grad.dtype)


@_spectral_batch_norm_backward.register_fake
def _(
    grad: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    shape: list[int],
    batch_statistics: bool,
    eps: float,
    workspace: int,
    need_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = mean.shape[0]
    return (
        grad.new_empty(values.shape[0] if need_input else 0, 2),
        grad.new_empty(channels),
        grad.new_empty(channels),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, values, scales, bitmap, offsets, weight, bias, mean, _, shape, eps, workspace = inputs
    ctx.shape, ctx.eps, ctx.workspace = shape, eps, workspace
    ctx.batch_statistics, ctx.bias_dtype = mean is None, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])  # gradients travel along the edge
    ctx.set_materialize_grads(False)  # no zeros of the size of the values
    # The input rather than the output, from which it could not be had back where a weight is zero. It is what the op
    # that made it has kept as well, so with a block before and a block behind nothing is held for this op alone.
    ctx.save_for_backward(values, scales, bitmap, offsets, weight, *output[3:])


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 12
    need_input = ctx.needs_input_grad[0]
    saved = ctx.saved_tensors  # once: checkpointing hands them out a single time
    weight = saved[4]
    grad_input, grad_weight, grad_bias = _spectral_batch_norm_backward(
        grad, *saved, ctx.shape, ctx.batch_statistics, ctx.eps, ctx.workspace, need_input
    )
    return (
        grad_input if need_input else None,
        *(None,) * 4,
        None if weight is None else grad_weight.to(weight.dtype),
        None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
        *(None,) * 5,
    )


_spectral_batch_norm.register_autograd(_autograd, setup_context=_setup)


def spectral_batch_norm(
    x: PackedSpectrum | Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    size: tuple[int, int] | None = None,
    workspace: int | None = None,
) -> tuple[PackedSpectrum | Tensor, Tensor | None, Tensor | None]:
    """Batch norm of the maps behind a spectrum, as ``torch.nn.functional.batch_norm`` computes it of the maps.

    Exact: of the zero frequency and, by Parseval's theorem, of the energy of the others. Backward of a packed spectrum
    keeps the packed input and two numbers a channel.

    Args:
        x: packed maps ``(B, C, H, W)``, or dense ortho half spectra ``(B, C, H, W // 2 + 1)`` as of
            ``torch.fft.rfft2(norm="ortho")``.
        weight, bias: ``(C,)`` affine parameters, or None.
        running_mean, running_var: ``(C,)`` statistics that are used where not ``training`` and updated where
            ``training``, or None for neither.
        training: normalise by the statistics of this batch.
        momentum: share of this batch in the new running statistics; a tensor of one element, too.
        eps: added to the variance.
        size: ``(H, W)`` of the maps behind half spectra, by default ``(H, 2 (Wh - 1))``.
        workspace: bound on temporaries in bytes, for packed spectra.

    Returns:
        The spectrum, packed in the pattern and value format of the input or dense; and the running statistics after
        this batch, the variance unbiased (as they were where not ``training``, or for an empty batch). Nothing is
        changed in place.

    Raises:
        TypeError, ValueError: ``x`` is neither, a shape does not fit, training with a single value per channel, or
            neither training nor statistics to use.
    """
    op = "spectral_batch_norm"
    if isinstance(x, PackedSpectrum):
        shape = tuple(x.shape)
        if size is not None and tuple(size) != shape[2:]:
            fail(op, "size", tuple(size), f"{shape[2:]}, that of the packed maps", "leave size out")
    else:
        check_complex(op, "x", x)
        shape = (*x.shape[:2], *check_half_spectrum(op, "x", x, size))
    batch, channels, height, width = shape
    for name, given in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if given is not None and tuple(given.shape) != (channels,):
            fail(op, name, given, f"shape ({channels},)", "match the channels of this layer to those of its input")
    if (running_mean is None) != (running_var is None) or not (training or running_mean is not None):
        fail(
            op,
            "running_mean and running_var",
            "neither" if running_mean is running_var else "one of them",
            "both" if not training else "both or neither",
            "pass both, or training=True to use the statistics of the batch",
        )
    count = batch * height * width
    if training and count == 1:
        fail(op, "x", f"maps {shape}", "more than one value per channel in training", "use a larger batch, or eval()")

    used = (None, None) if training else (running_mean, running_var)
    out: PackedSpectrum | Tensor
    if isinstance(x, PackedSpectrum):
        fields = (x.edge, x.values, x.scales, x.bitmap, x.offsets)
        edge, values, scales, mean, var = _spectral_batch_norm(
            *fields, weight, bias, *used, list(shape), eps, check_workspace(op, workspace)
        )
        out = PackedSpectrum(edge, values, scales, x.bitmap, x.offsets, x.shape, x.value_dtype)
    else:
        out, mean, var = reference.spectral_batch_norm(x, (height, width), weight, bias, *used, eps)
    if training and running_mean is not None and running_var is not None and count:
        unbiased = var.detach() * (count / (count - 1))
        running_mean = (1 - momentum) * running_mean + momentum * mean.detach().to(running_mean.dtype)
        running_var = (1 - momentum) * running_var + momentum * unbiased.to(running_var.dtype)
    return out, running_mean, running_var
