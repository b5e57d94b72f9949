"""Pooling and ReLU of maps whose planes stand innermost in memory, ``(H, W, n)``: runs of planes go through each step.

Codes are bit planes, tile by tile of planes, so that chunks of other sizes may read them: of each tile the lowest bit
of all outputs ``(Ho, Wo, tile)``, then the next. Full tiles take whole bytes.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Windows(NamedTuple):
    """Windows of maps, and how codes of their elements are stored.

    Attributes:
        kernel, stride: down and across.
        bits: of a code, one for each window.
        tile: planes whose codes stand together, a multiple of 8.
        margin: rows and columns of the maps, at every side, that no window reaches.
    """

    kernel: list[int]
    stride: list[int]
    bits: int
    tile: int
    margin: int = 0

    @property
    def apart(self) -> bool:
        """Whether no two share an element."""
        return self.stride[0] >= self.kernel[0] and self.stride[1] >= self.kernel[1]

    def cover(self, size: list[int], outputs: list[int]) -> bool:
        """Whether every element of maps ``size`` is in one, of which there are ``outputs``."""
        sides = zip(size, outputs, self.kernel, self.stride, strict=True)
        return not self.margin and all(s <= k and (n - 1) * s + k == whole for whole, n, k, s in sides)


class Pool(NamedTuple):
    """What is done to maps, see :func:`pool_across`.

    Attributes:
        windows: theirs.
        codes, signs: bytes for where maxima stand and for where gradients pass a ReLU, or None.
        affine: gain and shift ``(n,)`` of the maps, or None.
        rectify: negative maxima become zero.
    """

    windows: Windows
    codes: Tensor | None = None
    signs: Tensor | None = None
    affine: tuple[Tensor, Tensor] | None = None
    rectify: bool = False


def empty_across(like: Tensor, planes: int, size: list[int]) -> Tensor:
    """Maps ``(n, H, W)`` in memory ``(H, W, n)``, of the precision of ``like``."""
    return like.new_empty(*size, planes).permute(2, 0, 1)


def _elements(size: list[int], windows: Windows) -> list[tuple[slice, slice]]:
    """The place of each element of the windows in maps ``(H, W, n)``, in the order of the codes."""
    margin = windows.margin
    rows, columns = (
        [slice(first, first + (n - 2 * margin - k) // s * s + 1, s) for first in range(margin, margin + k)]
        for n, k, s in zip(size, windows.kernel, windows.stride, strict=True)
    )
    return list(product(rows, columns))


def pool_across(
    maps: Tensor,
    windows: Windows,
    out: Tensor,
    codes: Tensor | None = None,
    signs: Tensor | None = None,
    affine: tuple[Tensor, Tensor] | None = None,
    rectify: bool = False,
) -> None:
    """The maxima of windows of maps, which may be scaled before and rectified after.

    Args:
        maps: ``(n, H, W)``; may be written over.
        windows: theirs.
        out: ``(n, Ho, Wo)``; may be ``maps`` where windows are single elements.
        codes: bytes for where in their windows the maxima stand, the first of equals; None for windows of one element.
        signs: bytes for one bit an output, whether a gradient passes its ReLU, as where it is not a number.
        affine: gain and shift ``(n,)`` of the maps.
        rectify: negative maxima become zero.
    """
    if affine is not None:
        gain, shift = (t[:, None, None] for t in affine)
        torch.addcmul(shift, maps, gain, out=maps)
    values, best = maps.permute(1, 2, 0).numpy(), out.permute(1, 2, 0).numpy()
    first, *others = _elements(list(maps.shape[1:]), windows)
    if out is not maps:
        np.copyto(best, values[first])
    if codes is not None:
        code = np.zeros(best.shape, dtype=np.uint8)
        larger = np.empty(best.shape, dtype=np.uint8)
        for number, place in enumerate(others, 1):
            candidates = values[place]
            np.greater(candidates, best, out=larger.view(np.bool_))
            np.maximum(best, candidates, out=best)
            larger *= np.uint8(number)
            np.maximum(code, larger, out=code)  # numbers ascend: the last that was larger
        _store(np.stack([code & np.uint8(1 << bit) for bit in range(windows.bits)]), windows.tile, codes)
    if signs is not None:
        _store(np.logical_not(best <= 0)[None], windows.tile, signs)
    if rectify:
        out.clamp_min_(0)


def spread_across(
    grad: Tensor, windows: Windows, size: list[int], codes: Tensor | None = None, signs: Tensor | None = None
) -> Tensor:
    """The adjoint of :func:`pool_across`: gradients ``(n, Ho, Wo)`` at the maxima of maps ``(n, H, W)``.

    Args:
        grad: of the outputs; where there are no ``codes``, written over and given back.
        windows: theirs.
        size: ``[H, W]``.
        codes, signs: what :func:`pool_across` wrote; None for windows of one element, and without a ReLU.
    """
    grads = grad.permute(1, 2, 0).numpy()
    if signs is not None:
        (positive,) = _load(signs, 1, grads.shape, windows.tile)
        grads = _masked(grads, positive, grads if codes is None else np.empty_like(grads))
    if codes is None:
        return grad
    code = np.zeros(grads.shape, dtype=np.uint8)
    for bit, plane in enumerate(_load(codes, windows.bits, grads.shape, windows.tile)):
        code |= plane.view(np.uint8) << np.uint8(bit)
    out = torch.zeros(*size, grads.shape[2], dtype=grad.dtype)
    target = out.numpy()
    for number, place in enumerate(_elements(size, windows)):
        if windows.apart:
            _masked(grads, code == number, target[place])
        else:
            target[place] += _masked(grads, code == number, np.empty_like(grads))
    return out.permute(2, 0, 1)


def _masked(grads: NDArray[Any], mask: NDArray[np.bool_], out: NDArray[Any]) -> NDArray[Any]:
    """Writes ``grads`` where ``mask`` is set, else zero: by bits, which leaves what is not a number where it is."""
    word = np.int64 if grads.dtype.itemsize == 8 else np.int32
    np.bitwise_and(grads.view(word), np.negative(mask.view(np.int8), dtype=word), out=out.view(word))
    return out


def _store(planes: NDArray[Any], tile: int, out: Tensor) -> None:
    """Bit planes ``(bits, Ho, Wo, n)``, set where not zero, packed tile by tile; the last tile may be a part of one."""
    count = planes.shape[-1]
    flat = planes.reshape(-1, count)
    whole = count // tile * tile
    stored, full = out.numpy(), flat.shape[0] * whole // 8
    if whole:
        packed = np.packbits(flat[:, :whole].reshape(-1), bitorder="little")
        stored[:full] = packed.reshape(flat.shape[0], -1, tile // 8).swapaxes(0, 1).reshape(-1)
    if whole < count:
        stored[full:] = np.packbits(flat[:, whole:].reshape(-1), bitorder="little")


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
