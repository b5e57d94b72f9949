"""Device functions by themselves."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from spectriton_kernels._device import divide

pytestmark = pytest.mark.triton


@triton.jit
def divide_kernel(i_ptr, out_ptr, n, length, BLOCK: tl.constexpr):
    """Whole quotients of `length` integers."""
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_i = tl.load(i_ptr + o_i, mask=o_i < length, other=0)
    tl.store(out_ptr + o_i, divide(b_i, n), mask=o_i < length)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 49, 1000, 1023, 4099, 65537, 349525, 2**19 - 1])
def test_quotients_at_every_multiple(n, device):
    """Where a float32 quotient is nearest to an integer: at multiples and one below them."""
    limit = 2**20
    multiples = torch.arange(0, limit, n)[-20000:]
    i = torch.cat([multiples, multiples - 1, torch.tensor([limit - 1])]).clamp(min=0).to(torch.int32).to(device)
    out = torch.full_like(i, -1)
    divide_kernel[(triton.cdiv(len(i), 8192),)](i, out, n, len(i), BLOCK=8192)
    assert torch.equal(out, i // n)
