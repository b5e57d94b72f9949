"""Rounding to a grid, to nearest or at random without bias, by noise that is a function of a seed and a position.

The noise is a hash, so it needs no generator: torch's own state does not move, any part of it can be made anywhere,
and a kernel that hashes the same way rounds the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: How values are brought onto a grid.
ROUNDINGS = ("nearest", "stochastic")

_GOLDEN = 0x9E3779B9
# Rounds of xor-shift and multiplication of a 32-bit hash with little bias (Mueller; Wellons, "Prospecting for hash
# functions", 2018): shift, then multiplier.
_ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B))
_LAST_SHIFT = 16


def _signed(word: int) -> int:
    """The 32-bit pattern of ``word`` as a signed number, which is how torch holds it."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def _shifted(word: Tensor, shift: int) -> Tensor:
    # On signed words the shift drags the sign along; the mask takes it off again.
    return (word >> shift).bitwise_and_((1 << (32 - shift)) - 1)


def _hash(word: Tensor) -> Tensor:
    """Hashes int32 words in place; products wrap."""
    for shift, factor in _ROUNDS:
        word.bitwise_xor_(_shifted(word, shift)).mul_(_signed(factor))
    return word.bitwise_xor_(_shifted(word, _LAST_SHIFT))


def _low_word(number: Tensor) -> Tensor:
    """The low 32 bits of int64 numbers as int32."""
    return ((number << 32) >> 32).to(torch.int32)


def make_seed(seed: int | Tensor, device: torch.device) -> Tensor:
    """A seed as a 0-dimensional int64 tensor on ``device``."""
    if isinstance(seed, Tensor):
        return seed.to(device)
    wrapped = seed & 0xFFFFFFFFFFFFFFFF
    return torch.full((), wrapped - (1 << 64) if wrapped >> 63 else wrapped, dtype=torch.int64, device=device)


def seed_of(x: Tensor) -> Tensor:
    """A seed from the bits of ``x``, any shape and dtype; 0-dimensional int64, made without waiting for the device."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.contiguous().view(-1).view(width).to(torch.int64)
    # Odd factors, so that the same values in another order give another seed.
    places = torch.arange(bits.numel(), device=x.device).mul_(2 * _GOLDEN).add_(1)
    return (bits * places).sum()


def noise_key(seed: Tensor) -> Tensor:
    """What of a seed goes into the noise: 0-dimensional int32."""
    return _hash(_low_word(seed) ^ _hash(_low_word(seed >> 32) + _signed(_GOLDEN)))


def uniform(seed: Tensor, positions: Tensor) -> Tensor:
    """Noise in [0, 1), float32, in steps of 2^-24.

    Args:
        seed: 0-dimensional int64.
        positions: int32 or int64, any shape; only their low 32 bits count.
    """
    key = noise_key(seed)
    words = positions.clone() if positions.dtype == torch.int32 else _low_word(positions)
    words = _hash(words.mul_(_signed(_GOLDEN)).add_(key))
    return _shifted(words, 8).to(torch.float32).mul_(2.0**-24)


def stochastic_cast(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """``x`` (float32 or float64) in a narrower floating format: one of the two neighbours, without bias.

    Finite values stay finite, those that are not pass as they are.

    Args:
        x: any shape.
        dtype: ``float16``, ``bfloat16`` or ``float32``.
        noise: uniform in [0, 1), of the shape of ``x``.
    """
    info = torch.finfo(dtype)
    exponent = torch.frexp(x).exponent - 1
    smallest = torch.frexp(torch.tensor(info.smallest_normal, dtype=torch.float64)).exponent - 1
    # Spacing of the format at x: below its normal range it no longer shrinks.
    spacing = torch.ldexp(torch.full_like(x, info.eps), exponent.clamp_(min=int(smallest)))
    rounded = (x / spacing).add_(noise).floor_().mul_(spacing).clamp_(-info.max, info.max)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def copy_in_range(out: Tensor, values: Tensor) -> None:
    """``out[...] = values``; what is finite stays so in float16, too."""
    if out.dtype == torch.float16 and values.dtype != torch.float16:
        info = torch.finfo(out.dtype)
        # In bfloat16 the bound itself would be rounded beyond it.
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        values = torch.where(values.isfinite(), values.clamp(info.min, info.max), values)
    out.copy_(values)
