"""ReLU with one bit a value: which values it changed (`rectify`), and zeros where that is so (`clear_outside`).

Values are walked as flat memory in 128-bit accesses; eight of them have their bits in a byte, lowest first. Bytes that
have to be moved a value: twice its own and an eighth, either way. A value lies outside if it is at most 0, or at least
the limit; NaN lies inside, as PyTorch has it.
"""

import torch
import triton
import triton.language as tl

from ._launch import Launch
from .configs import CLEAR_OUTSIDE, RECTIFY, Stream, ceil_div


@triton.jit
def rectify_kernel(
    x_ptr,  # (length,)
    out_ptr,  # (length,)
    bits_ptr,  # (ceil(length / 8),)
    length,
    limit,
    LIMITED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Values between 0 and a limit, and which of them lie outside.

    Args:
        x_ptr: values.
        out_ptr: results; may be `x_ptr`.
        bits_ptr: uint8, a bit each; those beyond the last are 0.
        length: how many.
        limit: upper bound (used with LIMITED).
        LIMITED: whether there is one.
        BLOCK: values a program handles.
    """
    i_block = tl.program_id(0).to(tl.int64)
    o_value = i_block * BLOCK + tl.arange(0, BLOCK)
    m_value = o_value < length
    b_x = tl.load(x_ptr + o_value, mask=m_value, other=1.0)
    b_wide = b_x if b_x.dtype == tl.float64 else b_x.to(tl.float32)
    m_below = b_wide <= 0.0
    b_out = tl.where(m_below, 0.0, b_wide)
    if LIMITED:
        m_above = b_wide >= limit
        b_out = tl.where(m_above, limit, b_out)
        m_below = m_below | m_above
    tl.store(out_ptr + o_value, b_out.to(b_x.dtype), mask=m_value)
    b_bit = tl.reshape(m_below.to(tl.int32), [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :]
    o_byte = i_block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    tl.store(bits_ptr + o_byte, tl.sum(b_bit, axis=1).to(tl.uint8), mask=o_byte * 8 < length)


@triton.jit
def clear_outside_kernel(
    x_ptr,  # (length,)
    bits_ptr,  # (ceil(length / 8),)
    out_ptr,  # (length,)
    length,
    BLOCK: tl.constexpr,
):
    """Zeros where a bit is set, whatever stands there, else the values.

    Args:
        x_ptr: values.
        bits_ptr: uint8, a bit each.
        out_ptr: results; may be `x_ptr`.
        length: how many.
        BLOCK: values a program handles.
    """
    i_block = tl.program_id(0).to(tl.int64)
    o_value = i_block * BLOCK + tl.arange(0, BLOCK)
    m_value = o_value < length
    o_byte = i_block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    b_byte = tl.load(bits_ptr + o_byte, mask=o_byte * 8 < length, other=0).to(tl.int32)
    b_bit = tl.reshape(b_byte[:, None] & (1 << tl.arange(0, 8))[None, :], [BLOCK])
    b_x = tl.load(x_ptr + o_value, mask=m_value, other=0.0)
    b_zero = tl.zeros([BLOCK], dtype=b_x.dtype)
    tl.store(out_ptr + o_value, tl.where(b_bit == 0, b_x, b_zero), mask=m_value)


def plan_rectify(
    x: torch.Tensor, limit: float, out: torch.Tensor, bits: torch.Tensor, config: Stream | None = None
) -> Launch:
    """The launch behind `rectify`, by default in the configuration chosen for it."""
    assert x.dim() == 1 and x.is_contiguous() and out.is_contiguous() and out.shape == x.shape and out.dtype == x.dtype
    assert bits.shape == (ceil_div(x.numel(), 8),) and bits.is_contiguous()
    if config is None:
        config = RECTIFY.choose(x.device, (x.dtype,), (x.numel(),))
    limited = limit != float("inf")
    block = config.block_bytes // x.element_size()
    meta = {"LIMITED": limited, "BLOCK": block, "num_warps": config.num_warps}
    args = (x, out, bits, x.numel(), float(limit) if limited else 0.0)
    return Launch(rectify_kernel, (ceil_div(x.numel(), block),), args, meta)


def rectify(x: torch.Tensor, limit: float, out: torch.Tensor) -> torch.Tensor:
    """Writes values between 0 and a limit, and tells which lie outside.

    Args:
        x: `(n,)` contiguous, any float dtype.
        limit: upper bound, which the dtype of `x` knows exactly; infinite for none.
        out: as `x`, and may be `x`.

    Returns:
        `(ceil(n / 8),)` uint8, a bit each.
    """
    bits = torch.empty(ceil_div(x.numel(), 8), dtype=torch.uint8, device=x.device)
    plan_rectify(x, limit, out, bits).run()
    return bits


def plan_clear_outside(x: torch.Tensor, bits: torch.Tensor, out: torch.Tensor, config: Stream | None = None) -> Launch:
    """The launch behind `clear_outside`, by default in the configuration chosen for it."""
    assert x.dim() == 1 and x.is_contiguous() and out.is_contiguous() and out.shape == x.shape and out.dtype == x.dtype
    assert bits.shape == (ceil_div(x.numel(), 8),) and bits.is_contiguous()
    if config is None:
        config = CLEAR_OUTSIDE.choose(x.device, (x.dtype,), (x.numel(),))
    block = config.block_bytes // x.element_size()
    meta = {"BLOCK": block, "num_warps": config.num_warps}
    return Launch(clear_outside_kernel, (ceil_div(x.numel(), block),), (x, bits, out, x.numel()), meta)


def clear_outside(x: torch.Tensor, bits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Writes `x` with zeros where a bit is set, and returns it.

    Args:
        x: `(n,)` contiguous, any float dtype.
        bits: as `rectify` gives them.
        out: as `x`, and may be `x`.
    """
    plan_clear_outside(x, bits, out).run()
    return out
