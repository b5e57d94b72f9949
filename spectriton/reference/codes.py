"""Small whole numbers of 1, 2, 4 or 8 bits, several to a byte."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes below ``2^bits``, ``(..., n)``, as bytes ``(..., n * bits / 8)``, the first in the lowest bits.

    ``bits`` divides 8, and ``n`` is a multiple of the ``8 / bits`` codes of a byte.
    """
    if bits == 8:
        return codes
    fields = codes.unflatten(-1, (-1, 8 // bits))
    packed = fields[..., 0].clone()
    for place in range(1, 8 // bits):
        packed |= fields[..., place] << (place * bits)
    return packed


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack_codes`."""
    if bits == 8:
        return packed
    codes = torch.empty(*packed.shape, 8 // bits, dtype=torch.uint8, device=packed.device)
    for place in range(8 // bits):
        torch.bitwise_and(packed >> (place * bits), (1 << bits) - 1, out=codes[..., place])
    return codes.flatten(-2)
