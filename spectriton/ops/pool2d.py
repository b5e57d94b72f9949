"""Pooling that keeps no maps for backward: argmax codes of 2, 4 or 8 bits for the maximum, nothing for the mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from spectriton._backend import backend
from spectriton._check import check_real_maps, fail
from spectriton.frequencies import frequency_grid
from spectriton.ops._arguments import check_rule, check_window, check_workspace
from spectriton.ops._define import PACKED_FIELDS, PACKED_RESULT, define_op
from spectriton.ops._planes import (
    RowsOf,
    fake_packed,
    gather_maps,
    pack_planes,
    plane_chunks,
    plane_slices,
    resolve_workspace,
    tiles_at_a_time,
)
from spectriton.packed import Layout, PackedSpectrum, layout, value_dtype_name
from spectriton.reference import TileIndex
from spectriton.reference.across import Pool, Windows, empty_across

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


def _code_bytes(planes: int, outputs: int, kernel: list[int]) -> int:
    return -(-planes * outputs * _code_bits(kernel) // 8)


def _maxima(maps: Tensor, kernel: list[int], stride: list[int]) -> tuple[Tensor, Tensor]:
    """Maxima ``(n, Ho, Wo)`` of maps ``(n, H, W)``, and where in their windows they stand, packed to bytes."""
    if kernel == [2, 2] == stride and maps.device.type == "cpu" and maps.dtype in (torch.float32, torch.float64):
        return _maxima_of_pairs(maps.numpy())
    size = list(maps.shape[1:])
    y, index = functional.max_pool2d(maps[:, None], kernel, stride, return_indices=True)
    window = _window(size[1], kernel, maps.device)
    code_of = torch.zeros((kernel[0] - 1) * size[1] + kernel[1], dtype=torch.uint8, device=maps.device)
    code_of[window] = torch.arange(window.numel(), device=maps.device).to(torch.uint8)
    code = code_of.index_select(0, index.sub_(_corners(size, kernel, stride, maps.device)).flatten())
    return y[:, 0], _packed_codes(code, _code_bits(kernel))


def _packed_codes(code: Tensor, bits: int) -> Tensor:
    """Codes ``(n,)`` uint8, ``8 / bits`` to a byte, the first in the lowest bits."""
    per_byte = 8 // bits
    code = functional.pad(code, (0, -code.numel() % per_byte)).view(-1, per_byte)
    packed = code[:, 0].clone()
    for place in range(1, per_byte):
        packed |= code[:, place] << (place * bits)
    return packed


def _maxima_of_pairs(maps: NDArray[Any]) -> tuple[Tensor, Tensor]:
    """:func:`_maxima` of 2x2 windows: of rows first, then of columns, several times as fast on a CPU."""
    height, width = (n // 2 * 2 for n in maps.shape[1:])
    upper, lower = maps[:, 0:height:2, :width], maps[:, 1:height:2, :width]
    rows, is_lower = np.maximum(upper, lower), lower > upper
    left, right = rows[..., 0::2], rows[..., 1::2]
    is_right = right > left
    codes = np.stack([is_right, np.where(is_right, is_lower[..., 1::2], is_lower[..., 0::2])], axis=-1)
    packed = np.packbits(codes.reshape(-1), bitorder="little")
    return torch.from_numpy(np.maximum(left, right)), torch.from_numpy(packed)


def _spread(grad: Tensor, codes: Tensor, size: list[int], kernel: list[int], stride: list[int]) -> Tensor:
    """The adjoint of :func:`_maxima`: gradients ``(n, Ho, Wo)`` at the maxima of maps ``(n, H, W)``."""
    bits = _code_bits(kernel)
    corners, window = _corners(size, kernel, stride, grad.device), _window(size[1], kernel, grad.device)
    # Every byte spelt out as the distances it stands for.
    places = torch.arange(256, device=grad.device)[:, None] >> torch.arange(0, 8, bits, device=grad.device)
    distances = window[(places & ((1 << bits) - 1)).clamp_(max=window.numel() - 1)]
    index = distances.index_select(0, codes.to(torch.int32)).view(-1)[: grad.numel()].view(-1, *corners.shape)
    index = (index + corners).flatten(1)
    out = grad.new_zeros(grad.shape[0], size[0] * size[1])
    if stride[0] >= kernel[0] and stride[1] >= kernel[1]:  # no two windows share an element
        out.scatter_(1, index, grad.flatten(1))
    else:
        out.scatter_add_(1, index, grad.flatten(1))
    return out.unflatten(1, size)


@define_op("(Tensor x, SymInt[] kernel, SymInt[] stride) -> (Tensor, Tensor)")
def _max_pool2d(x: Tensor, kernel: list[int], stride: list[int]) -> tuple[Tensor, Tensor]:
    """The maxima, and where in their windows they stand, packed."""
    planes = plane_slices(x)
    count = x.shape[0] * x.shape[1]
    y = x.new_empty(count, *_output_size(list(x.shape[2:]), kernel, stride))
    outputs = y.shape[1] * y.shape[2]
    codes = torch.empty(_code_bytes(count, outputs, kernel), dtype=torch.uint8, device=x.device)
    pool = Pool(Windows(kernel, stride, _code_bits(kernel), tile=8), codes)
    if backend(x.device).pool_planes(planes(0, count), pool, y):
        return y.unflatten(0, x.shape[:2]), codes
    steps = _plane_steps(count, outputs)
    for first in steps:
        last, at = min(first + steps.step, count), _code_bytes(first, outputs, kernel)
        y[first:last], code = _maxima(planes(first, last), kernel, stride)
        codes[at : at + code.numel()] = code
    return y.unflatten(0, x.shape[:2]), codes


@_max_pool2d.register_fake
def _(x: Tensor, kernel: list[int], stride: list[int]) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:2], *_output_size(list(x.shape[2:]), kernel, stride))
    per_byte = 8 // _code_bits(kernel)
    return y, y.new_empty((y.numel() + per_byte - 1) // per_byte, dtype=torch.uint8)


@define_op("(Tensor grad, Tensor codes, SymInt[] shape, SymInt[] kernel, SymInt[] stride) -> Tensor")
def _max_pool2d_backward(grad: Tensor, codes: Tensor, shape: list[int], kernel: list[int], stride: list[int]) -> Tensor:
    grads = grad.flatten(0, 1)
    pool = Pool(Windows(kernel, stride, _code_bits(kernel), tile=8), codes)
    spread = backend(grad.device).spread_planes(grads, pool, shape[2:])
    if spread is not None:
        return spread.view(shape)
    out = grad.new_empty(grads.shape[0], *shape[2:])
    outputs = grads.shape[1] * grads.shape[2]
    steps = _plane_steps(grads.shape[0], outputs)
    for first in steps:
        last = min(first + steps.step, grads.shape[0])
        code = codes[_code_bytes(first, outputs, kernel) : _code_bytes(last, outputs, kernel)]
        out[first:last] = _spread(grads[first:last], code, shape[2:], kernel, stride)
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


class _Pooling:
    """Maximum of windows of chunks of the planes of packed maps; maps may be scaled before, and rectified after it.

    Chunks begin at tiles of planes, which hold whole bytes of codes. Nothing is taken of the ``margin`` of the maps.
    Windows of one element, with ``codes`` None, give the maps themselves.
    """

    def __init__(
        self,
        sizes: Layout,
        kernel: list[int],
        stride: list[int],
        device: torch.device,
        margin: int = 0,
    ) -> None:
        self._size, self._primitives = [sizes.height, sizes.width], backend(device)
        self._windows = Windows(kernel, stride, _code_bits(kernel), sizes.tile, margin)
        self.across = self._primitives.planes_innermost(frequency_grid(sizes.height, sizes.width, device))
        self.size = _output_size([n - 2 * margin for n in self._size], kernel, stride)
        self.outputs = self.size[0] * self.size[1]

    def empty(self, like: Tensor, planes: int, size: list[int]) -> Tensor:
        """Maps ``(n, *size)`` in the memory order of the transforms."""
        return empty_across(like, planes, size) if self.across else like.new_empty(planes, *size)

    def _part(self, stored: Tensor | None, bits: int, first: int, last: int) -> Tensor | None:
        """The bytes for planes ``first:last`` of codes of ``bits``."""
        if stored is None:
            return None
        start, stop = (-(-planes * self.outputs * bits // 8) for planes in (first, last))
        return stored[start:stop]

    def of_planes(
        self,
        first: int,
        last: int,
        codes: Tensor | None,
        signs: Tensor | None = None,
        affine: tuple[Tensor, Tensor] | None = None,
        rectify: bool = False,
    ) -> Pool:
        """What is done to the planes ``first:last``, from what is done to all of them."""
        gain_and_shift = None if affine is None else (affine[0][first:last], affine[1][first:last])
        codes, signs = self._part(codes, self._windows.bits, first, last), self._part(signs, 1, first, last)
        return Pool(self._windows, codes, signs, gain_and_shift, rectify)

    def pool(
        self,
        maps: Tensor,
        out: Tensor,
        codes: Tensor | None,
        first: int,
        signs: Tensor | None = None,
        affine: tuple[Tensor, Tensor] | None = None,
        rectify: bool = False,
    ) -> None:
        """Writes what maps ``(n, H, W)`` give to ``out``, and their codes, those of the planes from ``first`` on.

        See :func:`spectriton.reference.across.pool_across`; the tensors are those of all planes.
        """
        pool = self.of_planes(first, first + maps.shape[0], codes, signs, affine, rectify)
        if self.across:
            self._primitives.pool_across(maps, pool.windows, out, *pool[1:])
            return
        if self._primitives.pool_planes(maps, pool, out):
            return
        windows, codes, signs, affine, _ = pool
        if affine is not None:
            gain, shift = (t[:, None, None] for t in affine)
            torch.addcmul(shift, maps, gain, out=maps)
        if codes is not None:
            rows, columns = (slice(windows.margin, n - windows.margin) for n in self._size)
            y, code = _maxima(maps[:, rows, columns], windows.kernel, windows.stride)
            out.copy_(y)
            codes.copy_(code)
        if signs is not None:
            signs.copy_(_signs(out))
        if rectify:
            out.clamp_min_(0)

    def spread(self, grad: Tensor, codes: Tensor | None, first: int, signs: Tensor | None = None) -> Tensor:
        """The adjoint of :meth:`pool`: gradients ``(n, Ho, Wo)`` of the planes from ``first`` on to those of maps.

        They may be written over where there are ``signs``.
        """
        pool = self.of_planes(first, first + grad.shape[0], codes, signs)
        windows, codes, signs = pool[:3]
        if self.across:
            return self._primitives.spread_across(grad, windows, self._size, codes, signs)
        if codes is None and signs is None:
            return grad
        spread = self._primitives.spread_planes(grad, pool, self._size)
        if spread is not None:
            return spread
        if signs is not None:
            grad = grad.masked_fill_(_from_signs(signs, grad.shape) == 0, 0)
        if codes is None:
            return grad
        margin = windows.margin
        maps = _spread(grad, codes, [n - 2 * margin for n in self._size], windows.kernel, windows.stride)
        return functional.pad(maps, (margin,) * 4) if margin else maps


def _signs(maps: Tensor) -> Tensor:
    """One bit a value, packed to bytes: whether a gradient passes its ReLU, as it does where it is not a number."""
    passes = (maps <= 0).logical_not_().view(-1)
    if maps.device.type == "cpu":
        return torch.from_numpy(np.packbits(passes.numpy(), bitorder="little"))
    bits = functional.pad(passes.view(torch.uint8), (0, -passes.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=maps.device)).sum(1, dtype=torch.uint8)


def _from_signs(signs: Tensor, shape: torch.Size) -> Tensor:
    """uint8 of ``shape``: the bits that :func:`_signs` gave."""
    if signs.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(signs.numpy(), count=shape.numel(), bitorder="little")).view(shape)
    bits = signs[:, None] >> torch.arange(8, dtype=torch.uint8, device=signs.device) & 1
    return bits.view(-1)[: shape.numel()].view(shape)


# -- from packed maps: they are made, pooled and forgotten a chunk of planes at a time ------------------------------


@define_op(
    f"(Tensor edge, {PACKED_FIELDS}, SymInt[] shape, SymInt[] kernel, SymInt[] stride, int margin, "
    "int workspace) -> (Tensor, Tensor)"
)
def _packed_max_pool2d(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    shape: list[int],
    kernel: list[int],
    stride: list[int],
    margin: int,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    """:func:`_max_pool2d` of the maps of a packed spectrum, ``margin`` rows and columns taken off every side."""
    sizes, device = layout(shape), values.device
    pooling = _Pooling(sizes, kernel, stride, device, margin=margin)
    y = edge.new_empty(*shape[:2], *pooling.size)
    planes = y.view(sizes.row, *pooling.size)
    codes = torch.empty(_code_bytes(sizes.row, pooling.outputs, kernel), dtype=torch.uint8, device=device)
    packed = (values, scales, bitmap, offsets)
    primitives, grid = backend(device), frequency_grid(sizes.height, sizes.width, device)
    pool, index = pooling.of_planes(0, sizes.row, codes), primitives.tile_index(bitmap, offsets)
    if primitives.unpack_pooled(*packed, grid, 0, sizes.tiles, pool, planes, index):
        return y, codes
    maps_of = _map_reader(*packed, sizes, True, edge.dtype, pooling.across, index)
    bound = resolve_workspace(workspace, device, sizes)
    for t0, t1, first, last in plane_chunks(sizes, edge.dtype, bound, device):
        pooling.pool(maps_of(t0, t1), planes[first:last], codes, first)
    return y, codes


@_packed_max_pool2d.register_fake
def _(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    shape: list[int],
    kernel: list[int],
    stride: list[int],
    margin: int,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    y = edge.new_empty(*shape[:2], *_output_size([n - 2 * margin for n in shape[2:]], kernel, stride))
    return y, y.new_empty(_code_bytes(1, y.numel(), kernel), dtype=torch.uint8)


@define_op(
    "(Tensor grad, Tensor codes, Tensor bitmap, Tensor offsets, SymInt kept, SymInt[] shape, SymInt[] kernel, "
    "SymInt[] stride, int margin, int workspace) -> Tensor"
)
def _packed_max_pool2d_backward(
    grad: Tensor,
    codes: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    kept: int,
    shape: list[int],
    kernel: list[int],
    stride: list[int],
    margin: int,
    workspace: int,
) -> Tensor:
    grads, sizes = grad.flatten(0, 1), layout(shape)
    pooling = _Pooling(sizes, kernel, stride, grad.device, margin=margin)
    primitives, grid = backend(grad.device), frequency_grid(sizes.height, sizes.width, grad.device)
    pool, index = pooling.of_planes(0, sizes.row, codes), primitives.tile_index(bitmap, offsets)
    out = primitives.gather_pooled(grads, pool, bitmap, offsets, grid, kept, index)
    if out is not None:
        return out

    def planes(first: int, last: int) -> Tensor:
        return pooling.spread(grads[first:last], codes, first)

    bound = resolve_workspace(workspace, grad.device, sizes)
    return gather_maps(planes, bitmap, offsets, kept, sizes, grad.dtype, bound)


@_packed_max_pool2d_backward.register_fake
def _(
    grad: Tensor,
    codes: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    kept: int,
    shape: list[int],
    kernel: list[int],
    stride: list[int],
    margin: int,
    workspace: int,
) -> Tensor:
    return grad.new_empty(kept, 2)


def _packed_max_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    edge, _, _, bitmap, offsets, *ctx.settings = inputs
    ctx.kept = edge.shape[0]
    ctx.save_for_backward(output[1], bitmap, offsets)


def _packed_max_autograd(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    arguments = (*ctx.saved_tensors, ctx.kept, *ctx.settings)
    return _packed_max_pool2d_backward(grad, *arguments), *(None,) * 9


_packed_max_pool2d.register_autograd(_packed_max_autograd, setup_context=_packed_max_setup)


# -- from packed maps to the packed maps of the maxima --------------------------------------------------------------


@define_op(
    f"(Tensor edge, {PACKED_FIELDS}, SymInt[] shape, SymInt[] kernel, SymInt[] stride, float threshold, "
    f"float density, str value_dtype, int workspace) -> {PACKED_RESULT[:-1]}, Tensor)"
)
def _repacked_pool2d(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    shape: list[int],
    kernel: list[int],
    stride: list[int],
    threshold: float,
    density: float,
    value_dtype: str,
    workspace: int,
) -> tuple[Tensor, ...]:
    """:func:`_packed_max_pool2d` and the packed spectrum of its result, without that result."""
    pooled = layout([*shape[:2], *_output_size(shape[2:], kernel, stride)])
    count = _code_bytes(pooled.row, pooled.height * pooled.width, kernel)
    codes = torch.empty(count, dtype=torch.uint8, device=values.device)
    bound = resolve_workspace(workspace, values.device, layout(shape))
    rows_of = pooled_rows((values, scales, bitmap, offsets), shape, kernel, stride, edge.dtype, bound, codes)
    rule = (threshold, density, value_dtype)
    packed = pack_planes(rows_of, pooled, *rule, edge.dtype, values.device, bound, repacked=True)
    return (*packed, codes)


@_repacked_pool2d.register_fake
def _(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    shape: list[int],
    kernel: list[int],
    stride: list[int],
    threshold: float,
    density: float,
    value_dtype: str,
    workspace: int,
) -> tuple[Tensor, ...]:
    size = _output_size(shape[2:], kernel, stride)
    codes = bitmap.new_empty(_code_bytes(shape[0] * shape[1], size[0] * size[1], kernel))
    return (*fake_packed(values, edge.dtype, [*shape[:2], *size], value_dtype), codes)


@define_op(
    "(Tensor grad, Tensor pooled_bitmap, Tensor pooled_offsets, Tensor codes, Tensor bitmap, Tensor offsets, "
    "SymInt kept, SymInt[] shape, SymInt[] kernel, SymInt[] stride, int workspace) -> Tensor"
)
def _repacked_pool2d_backward(
    grad: Tensor,
    pooled_bitmap: Tensor,
    pooled_offsets: Tensor,
    codes: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    kept: int,
    shape: list[int],
    kernel: list[int],
    stride: list[int],
    workspace: int,
) -> Tensor:
    bound = resolve_workspace(workspace, grad.device, layout(shape))
    return pooled_gradients(
        grad, pooled_bitmap, pooled_offsets, codes, None, bitmap, offsets, kept, shape, kernel, stride, bound
    )


@_repacked_pool2d_backward.register_fake
def _(
    grad: Tensor,
    pooled_bitmap: Tensor,
    pooled_offsets: Tensor,
    codes: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    kept: int,
    shape: list[int],
    kernel: list[int],
    stride: list[int],
    workspace: int,
) -> Tensor:
    return grad.new_empty(kept, 2)


def _map_reader(
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    sizes: Layout,
    weighted: bool,
    dtype: torch.dtype,
    across: bool,
    index: TileIndex | None,
) -> Callable[[int, int], Tensor]:
    """Gives the maps ``(n, H, W)`` of the tiles ``t0:t1`` of planes of a packed spectrum, ``across``: innermost."""
    primitives = backend(values.device)
    grid = frequency_grid(sizes.height, sizes.width, values.device)

    def maps_of(t0: int, t1: int) -> Tensor:
        planes = min(t1 * sizes.tile, sizes.row) - t0 * sizes.tile
        return primitives.make_maps(
            values, scales, bitmap, offsets, grid, t0, t1, planes, weighted, across, dtype, index
        )

    return maps_of


def pooled_rows(
    packed: tuple[Tensor, Tensor, Tensor, Tensor],
    shape: list[int],
    kernel: list[int],
    stride: list[int],
    dtype: torch.dtype,
    workspace: int,
    codes: Tensor | None,
    signs: Tensor | None = None,
    affine: tuple[Tensor, Tensor] | None = None,
    rectify: bool = False,
) -> RowsOf:
    """:data:`RowsOf` the spectra of what pooling gives of packed maps; writes codes and signs, if asked to.

    Args:
        packed: values, scales, bitmap and offsets of maps ``shape``.
        shape, kernel, stride: of the maps, and of the windows; without ``codes`` these are single elements.
        dtype: real precision of the computation.
        workspace: bytes of temporaries.
        codes, signs, affine, rectify: see :func:`spectriton.reference.across.pool_across`; of all planes.
    """
    sizes, device = layout(shape), packed[0].device
    pooling = _Pooling(sizes, kernel, stride, device)
    primitives, index = backend(device), backend(device).tile_index(*packed[2:])
    grids = [frequency_grid(height, width, device) for height, width in ((sizes.height, sizes.width), pooling.size)]
    maps_of = _map_reader(*packed, sizes, True, dtype, pooling.across, index)
    step = tiles_at_a_time(sizes, dtype, workspace, device, repacked=True)
    given = (codes, signs, affine, rectify)

    def planes(first: int, last: int) -> Tensor:
        # Smaller maps have tiles of as many planes or more: these are whole tiles of the large ones, too.
        out = None
        for t0 in range(first // sizes.tile, -(-last // sizes.tile), step):
            start, stop = t0 * sizes.tile, min((t0 + step) * sizes.tile, last)
            maps = maps_of(t0, min(t0 + step, -(-last // sizes.tile)))
            if codes is None:  # of the size of the maps: a chunk is all of them
                pooling.pool(maps, maps, codes, start, signs, affine, rectify)
                return maps
            if out is None:
                out = pooling.empty(maps, last - first, pooling.size)
            pooling.pool(maps, out[start - first : stop - first], codes, start, signs, affine, rectify)
            del maps  # before the next are made
        assert out is not None
        return out

    def rows_of(first: int, last: int, padded: int) -> Tensor:
        tiles, pool = (first // sizes.tile, -(-last // sizes.tile)), pooling.of_planes(first, last, *given)
        rows = primitives.rows_of_pooled(*packed, grids[0], *tiles, pool, grids[1], last - first, padded, dtype, index)
        return primitives.rows_of_maps(planes(first, last), grids[1], padded) if rows is None else rows

    return rows_of


def pooled_gradients(
    grad: Tensor,
    pooled_bitmap: Tensor,
    pooled_offsets: Tensor,
    codes: Tensor | None,
    signs: Tensor | None,
    bitmap: Tensor,
    offsets: Tensor,
    kept: int,
    shape: list[int],
    kernel: list[int],
    stride: list[int],
    workspace: int,
) -> Tensor:
    """The adjoint of :func:`pooled_rows` between the packed coefficients of the maxima and those of the maps."""
    sizes, device = layout(shape), grad.device
    pooling = _Pooling(sizes, kernel, stride, device)
    pooled = layout([*shape[:2], *pooling.size])
    grad, primitives = grad.contiguous(), backend(device)
    grids = [frequency_grid(n.height, n.width, device) for n in (pooled, sizes)]
    pool, index = pooling.of_planes(0, sizes.row, codes, signs), primitives.tile_index(bitmap, offsets)
    of_maps, of_maxima = (bitmap, offsets), (pooled_bitmap, pooled_offsets)
    out = primitives.gather_repacked(grad, *of_maxima, grids[0], pool, sizes.row, *of_maps, grids[1], kept, index)
    if out is not None:
        return out
    packed, of_grad = (grad, grad.new_empty(0), *of_maxima), primitives.tile_index(*of_maxima)
    # A tile of small maps serves several chunks of large ones: the last one read is kept.
    grads_of = lru_cache(maxsize=1)(_map_reader(*packed, pooled, False, grad.dtype, pooling.across, of_grad))

    def planes(first: int, last: int) -> Tensor:
        t0 = first // pooled.tile
        grads = grads_of(t0, -(-last // pooled.tile))[first - t0 * pooled.tile : last - t0 * pooled.tile]
        # It may be written over: no chunk of planes is asked for twice.
        return pooling.spread(grads, codes, first, signs)

    return gather_maps(planes, *of_maps, kept, sizes, grad.dtype, workspace, repacked=True)


def _repacked_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    edge, _, _, bitmap, offsets, *ctx.pooling, _, _, _, workspace = inputs
    ctx.kept, ctx.workspace = edge.shape[0], workspace
    ctx.mark_non_differentiable(output[1], output[2])  # gradients travel along the edge
    ctx.set_materialize_grads(False)  # no zeros of the size of the values
    ctx.save_for_backward(output[3], output[4], output[5], bitmap, offsets)


def _repacked_autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 12
    grad_input = _repacked_pool2d_backward(grad, *ctx.saved_tensors, ctx.kept, *ctx.pooling, ctx.workspace)
    return grad_input, *(None,) * 11


_repacked_pool2d.register_autograd(_repacked_autograd, setup_context=_repacked_setup)


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


def _check_pool(op: str, size: Sequence[int], kernel_size: Any, stride: Any) -> tuple[list[int], list[int]]:
    kernel, steps = check_window(op, kernel_size, stride)
    if kernel[0] > size[0] or kernel[1] > size[1]:
        fail(op, "kernel_size", tuple(kernel), f"at most the {size[0]}x{size[1]} maps", "use a smaller window")
    return kernel, steps


def check_max_pool(op: str, size: Sequence[int], kernel_size: Any, stride: Any) -> tuple[list[int], list[int]]:
    """Kernel size and stride of windows in which a byte says where the maximum stood.

    Raises:
        ValueError: no positive numbers, or windows that do not fit the maps ``size``, or have more than 256 positions.
    """
    kernel, steps = _check_pool(op, size, kernel_size, stride)
    if kernel[0] * kernel[1] > 256:
        fail(op, "kernel_size", tuple(kernel), "a window of at most 256 positions", "use a smaller window")
    return kernel, steps


def max_pool2d(
    x: Tensor | PackedSpectrum,
    kernel_size: int | tuple[int, int] = 2,
    stride: int | tuple[int, int] | None = None,
    *,
    margin: int = 0,
    threshold: float | None = None,
    density: float | None = None,
    value_dtype: torch.dtype | str | None = None,
    workspace: int | None = None,
) -> Tensor | PackedSpectrum:
    """Maximum of windows, as ``torch.nn.functional.max_pool2d`` without padding.

    Backward keeps where the maximum stood in its window, 2 bits for 2x2 and 4 bits for 3x3 and 4x4, instead of the
    maps and their int64 indices. Of a packed spectrum the maps are made and pooled a chunk at a time, so they never
    exist as a whole, neither forward nor backward; with a thresholding rule, neither do the maps of the maxima.

    Args:
        x: ``(B, C, H, W)`` real maps, or their packed spectrum.
        kernel_size: window, at most 256 positions.
        stride: step, by default the window.
        margin: rows and columns at every side that are left out; none where the result is packed.
        threshold, density: give one of them to have the packed spectrum of the maxima instead of their maps; ``x`` is
            packed too then. See :func:`pack`.
        value_dtype: format of the kept values, by default that of ``x``.
        workspace: bound on temporaries in bytes, for a packed spectrum.

    Returns:
        ``(B, C, (H - k) // s + 1, (W - k) // s + 1)`` real maps, or their packed spectrum; ``H`` and ``W`` without the
        margins.

    Raises:
        TypeError, ValueError: ``x`` is neither real maps nor packed, the window does not fit, or a rule is given for
            maps.
    """
    op = "max_pool2d"
    repack = threshold is not None or density is not None
    if not isinstance(x, PackedSpectrum):
        check_real_maps(op, "x", x)
        if repack:
            fail(
                op,
                "x",
                x,
                "a PackedSpectrum where a threshold or density is given",
                "use ops.to_spectral on the result",
            )
    if isinstance(margin, bool) or not isinstance(margin, int) or margin < 0 or (margin and repack):
        expected = "0 where the result is packed" if repack else "a whole number of pixels, 0 or more"
        fail(op, "margin", margin, expected, "pass margin=0")
    kernel, steps = check_max_pool(op, [n - 2 * margin for n in x.shape[2:]], kernel_size, stride)
    bound = check_workspace(op, workspace)
    if not isinstance(x, PackedSpectrum):
        height, width = x.shape[2:]
        return _max_pool2d(x[..., margin : height - margin, margin : width - margin], kernel, steps)[0]
    maps = (x.edge, x.values, x.scales, x.bitmap, x.offsets, list(x.shape), kernel, steps)
    if not repack:
        return _packed_max_pool2d(*maps, margin, bound)[0]
    name = x.value_dtype if value_dtype is None else value_dtype_name(op, value_dtype, x.edge.dtype)
    *fields, _ = _repacked_pool2d(*maps, *check_rule(op, threshold, density), name, bound)
    return PackedSpectrum.of(fields, (*x.shape[:2], *_output_size(list(x.shape[2:]), kernel, steps)), name)


def avg_pool2d(
    x: Tensor, kernel_size: int | tuple[int, int] = 2, stride: int | tuple[int, int] | None = None
) -> Tensor:
    """Mean of windows, as ``torch.nn.functional.avg_pool2d`` without padding; backward keeps nothing.

    Args, errors: as for :func:`max_pool2d`, for real maps.
    """
    check_real_maps("avg_pool2d", "x", x)
    return _avg_pool2d(x, *_check_pool("avg_pool2d", x.shape[2:], kernel_size, stride))
