"""Pooling of maps whose planes stand innermost in memory, ``(H, W, n)``: whole runs of planes go through each step.

Codes are bit planes, tile by tile of planes, so that chunks of other sizes may read them: of each tile the lowest bit
of all outputs ``(Ho, Wo, tile)``, then the next. Full tiles take whole bytes.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def empty_across(like: Tensor, planes: int, size: list[int]) -> Tensor:
    """Maps ``(n, H, W)`` in memory ``(H, W, n)``, of the precision of ``like``."""
    return like.new_empty(*size, planes).permute(2, 0, 1)


def _windows(size: list[int], kernel: list[int], stride: list[int], margin: int = 0) -> list[tuple[slice, slice]]:
    """The place of each element of the windows in maps ``(H, W, n)``, margins left out, in the order of the codes."""
    rows, columns = (
        [slice(first, first + (n - 2 * margin - k) // s * s + 1, s) for first in range(margin, margin + k)]
        for n, k, s in zip(size, kernel, stride, strict=True)
    )
    return list(product(rows, columns))


def maxima_across(maps: Tensor, kernel: list[int], stride: list[int], bits: int, tile: int, out: Tensor) -> Tensor:
    """Writes the maxima ``out`` ``(n, Ho, Wo)`` of maps ``(n, H, W)``; returns where in their windows they stand.

    The first of equals is taken. Codes are of ``bits`` bits, packed.
    """
    values, best = maps.permute(1, 2, 0).numpy(), out.permute(1, 2, 0).numpy()
    first, *others = _windows(list(maps.shape[1:]), kernel, stride)
    np.copyto(best, values[first])
    code = np.zeros(best.shape, dtype=np.uint8)
    larger = np.empty(best.shape, dtype=np.uint8)
    for number, place in enumerate(others, 1):
        candidates = values[place]
        np.greater(candidates, best, out=larger.view(np.bool_))
        np.maximum(best, candidates, out=best)
        larger *= np.uint8(number)
        np.maximum(code, larger, out=code)  # numbers ascend: the last that was larger
    return _store(np.stack([code & np.uint8(1 << bit) for bit in range(bits)]), tile)


def spread_across(
    grad: Tensor,
    codes: Tensor,
    size: list[int],
    kernel: list[int],
    stride: list[int],
    bits: int,
    tile: int,
    margin: int = 0,
) -> Tensor:
    """The adjoint of :func:`maxima_across`: gradients ``(n, Ho, Wo)`` at the maxima of maps ``(n, H, W)``.

    The maxima are those of the maps without their margins.
    """
    grads = grad.permute(1, 2, 0).numpy()
    code = np.zeros(grads.shape, dtype=np.uint8)
    for bit, plane in enumerate(_load(codes, bits, grads.shape, tile)):
        code |= plane.view(np.uint8) << np.uint8(bit)
    out = torch.zeros(*size, grads.shape[2], dtype=grad.dtype)
    target = out.numpy()
    apart = stride[0] >= kernel[0] and stride[1] >= kernel[1]  # no two windows share an element
    for number, place in enumerate(_windows(size, kernel, stride, margin)):
        if apart:
            _masked(grads, code == number, target[place])
        else:
            target[place] += _masked(grads, code == number, np.empty_like(grads))
    return out.permute(2, 0, 1)


def signs_across(maps: Tensor, tile: int) -> Tensor:
    """One bit a value of maps ``(n, H, W)``: whether a gradient passes its ReLU, as where it is not a number."""
    return _store(np.logical_not(maps.permute(1, 2, 0).numpy() <= 0)[None], tile)


def masked_across(grad: Tensor, codes: Tensor, tile: int) -> Tensor:
    """``grad`` where the bits that :func:`signs_across` gave are set, else zero."""
    grads = grad.permute(1, 2, 0).numpy()
    (positive,) = _load(codes, 1, grads.shape, tile)
    return torch.from_numpy(_masked(grads, positive, np.empty_like(grads))).permute(2, 0, 1)


def _masked(grads: NDArray[Any], mask: NDArray[np.bool_], out: NDArray[Any]) -> NDArray[Any]:
    """Writes ``grads`` where ``mask`` is set, else zero: by bits, which leaves what is not a number where it is."""
    word = np.int64 if grads.dtype.itemsize == 8 else np.int32
    np.bitwise_and(grads.view(word), np.negative(mask.view(np.int8), dtype=word), out=out.view(word))
    return out


def _store(planes: NDArray[Any], tile: int) -> Tensor:
    """Bit planes ``(bits, Ho, Wo, n)``, set where not zero, packed tile by tile; the last tile may be a part of one."""
    count = planes.shape[-1]
    flat = planes.reshape(-1, count)
    whole = count // tile * tile
    pieces = []
    if whole:
        packed = np.packbits(flat[:, :whole].reshape(-1), bitorder="little")
        pieces.append(packed.reshape(flat.shape[0], -1, tile // 8).swapaxes(0, 1).reshape(-1))
    if whole < count:
        pieces.append(np.packbits(flat[:, whole:].reshape(-1), bitorder="little"))
    return torch.from_numpy(np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint8))


def _load(codes: Tensor, bits: int, shape: tuple[int, ...], tile: int) -> NDArray[np.bool_]:
    """Bit planes ``(bits, Ho, Wo, n)`` for ``shape`` ``(Ho, Wo, n)``: the inverse of :func:`_store`."""
    rows, count = bits * shape[0] * shape[1], shape[2]
    whole = count // tile * tile
    stored = codes.numpy()
    full = rows * whole // 8
    packed = stored[:full].reshape(-1, rows, tile // 8).swapaxes(0, 1)
    planes = np.unpackbits(packed.reshape(-1), bitorder="little").reshape(rows, whole)
    if whole < count:
        rest = np.unpackbits(stored[full:], count=rows * (count - whole), bitorder="little")
        planes = np.concatenate([planes, rest.reshape(rows, -1)], axis=1)
    return planes.view(np.bool_).reshape(bits, *shape)
