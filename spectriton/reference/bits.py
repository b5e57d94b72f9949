"""Small integers, several to a byte; and ReLU, which keeps such a one for each value."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

# The bytes of a byte's worth of values, read as one integer: with it and a multiplication they move together.
_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}

# Values whose masks are spelt out at a time, a multiple of 8: on a CPU they stay in its cache.
_CHUNK = 1 << 24
_CHUNK_OF_CPU = 1 << 17


def bits_for(count: int) -> int:
    """The width, a power of two, that tells ``count`` (at most 256) values apart."""
    return next(bits for bits in (1, 2, 4, 8) if count <= 1 << bits)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack ``(n,)`` bool or uint8 values below ``2**bits`` to ``(ceil(n * bits / 8),)`` bytes; bits is 1, 2, 4 or 8."""
    if bits == 8:
        return values.view(torch.uint8)
    per_byte = 8 // bits
    missing = -values.numel() % per_byte
    if missing:
        values = torch.cat((values, values.new_zeros(missing)))
    # With v = sum_i c_i 256^i, the product with sum_j 2^(8 (m - 1) - j (8 - b)), m values to a byte, has c_i at bit
    # 8 (m - 1) + i b; no other term reaches these bits, and what is beyond the word is lost.
    top = 8 * (per_byte - 1)
    multiplier = sum(1 << (top - place * (8 - bits)) for place in range(per_byte))
    words = values.view(torch.uint8).view(_WORDS[bits]) * multiplier
    return (words >> top).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``(count,)`` uint8 values that :func:`pack` was given."""
    if bits == 8:
        return packed
    rows = _values_of_bytes(bits, torch.uint8, packed.device).view(_WORDS[bits]).flatten()
    return rows.index_select(0, packed.int()).view(torch.uint8)[:count]


def is_channels_last(x: Tensor) -> bool:
    """Whether maps ``(B, C, H, W)`` stand so in memory, and not in the usual order."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def in_memory_order(x: Tensor) -> Tensor:
    """Maps, or a view of them that is contiguous where they stand channels last."""
    return x.permute(0, 2, 3, 1) if is_channels_last(x) else x


def outside(x: Tensor, limit: float = float("inf")) -> Tensor:
    """Which values of maps ``(B, C, H, W)`` are at most 0 or at least a limit, in the order of memory, packed."""
    flat = in_memory_order(x).reshape(-1)
    # NaN lies inside, as PyTorch has it.
    found = flat <= 0
    if limit != float("inf"):
        found |= flat >= limit
    return pack(found, 1)


def rectify(x: Tensor, limit: float, inplace: bool) -> tuple[Tensor, Tensor]:
    """ReLU, or ReLU6 with a limit of 6, of maps ``(B, C, H, W)``; and the bits of :func:`outside`."""
    bits = outside(x, limit)
    return (functional.relu if limit == float("inf") else functional.relu6)(x, inplace), bits


def clear_outside(x: Tensor, bits: Tensor, channels_last: bool, inplace: bool) -> Tensor:
    """Maps ``(B, C, H, W)`` with zeros where bits in the order of memory say so.

    Args:
        x: maps; they may be written over with ``inplace``.
        bits: as :func:`outside` gives them.
        channels_last: their order, in which the result stands, too.
        inplace: whether to spare a copy.
    """
    dense = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if dense is x and not inplace:
        dense = x.clone()
    clear((dense.permute(0, 2, 3, 1) if channels_last else dense).view(-1), bits)
    return dense


def clear(x: Tensor, packed: Tensor) -> None:
    """Set ``x`` ``(n,)``, real and contiguous, to zero in place wherever a bit is set; bits as packed by :func:`pack`.

    What was NaN becomes zero as well.
    """
    # An "and" with zeros or ones runs at the speed of memory; masked_fill_ branches at every value on a CPU.
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    masks = _values_of_bytes(1, words, x.device) - 1
    values = x.view(words)
    step = _CHUNK if x.is_cuda else _CHUNK_OF_CPU
    for first in range(0, len(x), step):
        part = values[first : first + step]
        part &= masks.index_select(0, packed[first // 8 : (first + step) // 8].int()).flatten()[: len(part)]


@lru_cache(maxsize=32)
def _values_of_bytes(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(256, 8 / bits)``: the values that each byte holds."""
    places = torch.arange(0, 8, bits, device=device)
    return ((torch.arange(256, device=device)[:, None] >> places) & ((1 << bits) - 1)).to(dtype)
