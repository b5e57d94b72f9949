"""Packed spectra with everything in them that C functions could trip over, and outputs with a guard around them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FORMATS = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8]
# (frequencies, planes, tile): one plane, less than a byte of bits, a tail, whole tiles, several tiles.
SIZES = [(1, 1, 32), (3, 7, 32), (5, 100, 32), (4, 128, 64), (2, 1500, 1024)]
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


class Spectrum(NamedTuple):
    """A packed spectrum with tiles in a random order and gaps between them; see ``docs/packed-format.md``."""

    bitmap: Tensor
    offsets: Tensor
    values: Tensor
    scales: Tensor
    planes: int

    @property
    def tile(self) -> int:
        return self.bitmap.shape[2] * 8

    @property
    def frequencies(self) -> int:
        return self.bitmap.shape[0]

    @property
    def tiles(self) -> int:
        return self.bitmap.shape[1]


def stored(count: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Values of any bit pattern, NaN, infinities, zeros of both signs and subnormal numbers among them."""
    shape = (count,) if dtype == torch.uint8 else (count, 2)
    if dtype not in _BITS:
        return torch.randint(*((0, 256) if dtype == torch.uint8 else (-128, 128)), shape, generator=generator).to(dtype)
    bits = _BITS[dtype]
    limits = torch.iinfo(bits)
    values = torch.randint(limits.min, limits.max, shape, generator=generator).to(bits).view(dtype)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan]).to(dtype)
    chosen = torch.randint(0, 25, shape, generator=generator)
    return torch.where(chosen < 5, special[chosen.clamp(max=4)], values)


def spectrum(
    frequencies: int, planes: int, tile: int, dtype: torch.dtype = torch.float32, density: float = 0.4, seed: int = 0
) -> Spectrum:
    """At random, some tiles empty; of the tiles of integers one has a scale that is not a number."""
    generator = torch.Generator().manual_seed(seed)
    tiles = -(-planes // tile)
    mask = torch.rand(frequencies, tiles * tile, generator=generator) < density
    mask[:, planes:] = False
    mask = mask.view(frequencies, tiles, tile)
    mask[-1, 0] &= frequencies == 1
    bitmap = torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    offsets = torch.zeros(frequencies * tiles, dtype=torch.int32)
    used = 0
    for place in torch.randperm(offsets.numel(), generator=generator).tolist():
        used += int(torch.randint(0, 3, (), generator=generator))
        offsets[place] = used
        used += int(mask.view(-1, tile)[place].sum())
    scales = torch.empty(0)
    if not dtype.is_floating_point:
        scales = torch.rand(frequencies, tiles, generator=generator)
        scales.view(-1)[frequencies * tiles // 2] = torch.nan
    return Spectrum(bitmap, offsets.view(frequencies, tiles), stored(used, dtype, generator), scales, planes)


def parts_of(given: Spectrum) -> list[tuple[slice | Tensor, int, int]]:
    """Ranges of rows and tiles: all, a part as a range and as numbers in any order, none."""
    middle = slice(given.frequencies // 3, given.frequencies)
    t0, t1 = given.tiles // 3, max(1, given.tiles - 1)
    backwards = torch.arange(given.frequencies).flip(0)[: max(1, given.frequencies - 1)]
    every = slice(0, given.frequencies)
    return [(every, 0, given.tiles), (middle, t0, t1), (backwards, t0, t1), (slice(0, 0), 0, 1), (every, t0, t0)]


class Room:
    """A tensor of one bits (NaN, for floats) amid more of them, and not where vectors would like it to begin."""

    GUARD = 34

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        count = int(np.prod(shape))
        self._all = torch.empty(count + 2 * self.GUARD, dtype=dtype)
        self._all.view(torch.uint8).fill_(255)
        self.tensor = self._all[self.GUARD : self.GUARD + count].view(shape)

    @property
    def guarded(self) -> bool:
        """Whether nothing was written around the tensor."""
        around = torch.cat([self._all[: self.GUARD], self._all[-self.GUARD :]])
        return bool((around.view(torch.uint8) == 255).all())


def identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, but that one NaN is as good as another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    nan = a.isnan()
    bits = _BITS[a.dtype]
    return torch.equal(nan, b.isnan()) and torch.equal(a.contiguous().view(bits)[~nan], b.contiguous().view(bits)[~nan])
