"""Elementwise product of complex tensors, with broadcasting and an optional conjugate.

`out = x * w` or `out = x * conj(w)`, each complex number an interleaved (re, im) pair. Tensors of one shape without
gaps are walked as flat memory in 128-bit accesses. Otherwise dimensions are merged as far as the strides allow, the
last one is a column and the others are decomposed from the row number; a column stride of 0 (broadcast) or 1 keeps its
fast path. Non-finite numbers follow the textbook formula (`inf * i` has a NaN part), as everywhere on a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import Launch
from .configs import COMPLEX_PRODUCT, COMPLEX_PRODUCT_BROADCAST, Stream, ceil_div

ROW_DIMS = 4  # dimensions a row number is decomposed into, the column dimension comes on top


@triton.jit
def multiply(x_re, x_im, w_re, w_im, CONJ_X: tl.constexpr, CONJ_W: tl.constexpr):
    """Product of two complex numbers given by parts, either of them conjugated first."""
    if CONJ_X:
        x_im = -x_im
    if CONJ_W:
        w_im = -w_im
    return x_re * w_re - x_im * w_im, x_re * w_im + x_im * w_re


@triton.jit
def complex_product_kernel(
    x_ptr,  # (length,) = (N, 2)
    w_ptr,  # (length,) = (N, 2)
    out_ptr,  # (length,) = (N, 2)
    length,
    CONJ_X: tl.constexpr,
    CONJ_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Flat elementwise product.

    Args:
        x_ptr, w_ptr: factors, N interleaved pairs.
        out_ptr: product, N interleaved pairs.
        length: real elements, 2 N.
        CONJ_X, CONJ_W: conjugate the factor first.
        BLOCK: real elements a program handles.
    """
    i_block = tl.program_id(0).to(tl.int64)
    # one-dimensional real offsets: a (BLOCK / 2, 2) block of pointers would be loaded 64 bits at a time
    o_real = i_block * BLOCK + tl.arange(0, BLOCK)
    m_real = o_real < length
    b_x = tl.load(x_ptr + o_real, mask=m_real, other=0.0)
    b_w = tl.load(w_ptr + o_real, mask=m_real, other=0.0)
    x_re, x_im = tl.split(tl.reshape(b_x, [BLOCK // 2, 2]))
    w_re, w_im = tl.split(tl.reshape(b_w, [BLOCK // 2, 2]))
    re, im = multiply(x_re, x_im, w_re, w_im, CONJ_X, CONJ_W)
    tl.store(out_ptr + o_real, tl.reshape(tl.join(re, im), [BLOCK]), mask=m_real)


@triton.jit
def row_offsets(i_row, size_1, size_2, size_3, stride_0, stride_1, stride_2, stride_3):
    """Offset of each row, its number decomposed into four indices (the first needs no size)."""
    i_3 = i_row % size_3
    i_row = i_row // size_3
    i_2 = i_row % size_2
    i_row = i_row // size_2
    i_1 = i_row % size_1
    i_0 = (i_row // size_1).to(tl.int64)
    return i_0 * stride_0 + i_1.to(tl.int64) * stride_1 + i_2.to(tl.int64) * stride_2 + i_3.to(tl.int64) * stride_3


@triton.jit
def load_pairs(
    ptr, o_row, m_row, i_block, columns, stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, MODE: tl.constexpr
):
    """Loads (BLOCK_R, BLOCK_C) complex numbers as two parts; a broadcast column gives (BLOCK_R, 1)."""
    if MODE == "broadcast":
        re = tl.load(ptr + o_row * 2, mask=m_row, other=0.0)[:, None]
        im = tl.load(ptr + o_row * 2 + 1, mask=m_row, other=0.0)[:, None]
    elif MODE == "contiguous":
        o_real = i_block * (2 * BLOCK_C) + tl.arange(0, 2 * BLOCK_C)
        m_real = m_row[:, None] & (o_real[None, :] < 2 * columns)
        b_real = tl.load(ptr + o_row[:, None] * 2 + o_real[None, :], mask=m_real, other=0.0)
        re, im = tl.split(tl.reshape(b_real, [BLOCK_R, BLOCK_C, 2]))
    else:
        o_column = i_block * BLOCK_C + tl.arange(0, BLOCK_C)
        m_column = m_row[:, None] & (o_column[None, :] < columns)
        p_re = ptr + (o_row[:, None] + o_column[None, :] * stride) * 2
        re = tl.load(p_re, mask=m_column, other=0.0)
        im = tl.load(p_re + 1, mask=m_column, other=0.0)
    return re, im


@triton.jit
def complex_product_broadcast_kernel(
    x_ptr,  # strided (.., 2)
    w_ptr,  # strided (.., 2)
    out_ptr,  # (rows, columns, 2)
    rows,
    columns,
    size_1,
    size_2,
    size_3,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    x_stride_3,
    x_stride_c,
    w_stride_0,
    w_stride_1,
    w_stride_2,
    w_stride_3,
    w_stride_c,
    CONJ_X: tl.constexpr,
    CONJ_W: tl.constexpr,
    X_MODE: tl.constexpr,
    W_MODE: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Elementwise product of two strided operands.

    Args:
        x_ptr, w_ptr: factors; strides count complex numbers and are 0 where a dimension is broadcast.
        out_ptr: product, contiguous.
        rows: product of the four row dimensions; size_1 .. size_3 are the last three of them.
        columns: size of the column dimension.
        x_stride_0 .. x_stride_3, x_stride_c: strides of x along the row dimensions and the column; w likewise.
        CONJ_X, CONJ_W: conjugate the factor first.
        X_MODE, W_MODE: "broadcast", "contiguous" or "strided" columns.
        NARROW: row numbers fit 32 bits, in which divisions are several times cheaper.
        BLOCK_R, BLOCK_C: rows and columns (complex) a program handles.
    """
    i_program = tl.program_id(0).to(tl.int64)
    n_column_blocks = tl.cdiv(columns, BLOCK_C)
    i_block = i_program % n_column_blocks
    i_row = i_program // n_column_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = i_row < rows

    i_number = i_row.to(tl.int32) if NARROW else i_row
    o_x = row_offsets(i_number, size_1, size_2, size_3, x_stride_0, x_stride_1, x_stride_2, x_stride_3)
    o_w = row_offsets(i_number, size_1, size_2, size_3, w_stride_0, w_stride_1, w_stride_2, w_stride_3)
    x_re, x_im = load_pairs(x_ptr, o_x, m_row, i_block, columns, x_stride_c, BLOCK_R, BLOCK_C, X_MODE)
    w_re, w_im = load_pairs(w_ptr, o_w, m_row, i_block, columns, w_stride_c, BLOCK_R, BLOCK_C, W_MODE)
    re, im = multiply(x_re, x_im, w_re, w_im, CONJ_X, CONJ_W)
    re = tl.broadcast_to(re, [BLOCK_R, BLOCK_C])
    im = tl.broadcast_to(im, [BLOCK_R, BLOCK_C])

    o_real = i_block * (2 * BLOCK_C) + tl.arange(0, 2 * BLOCK_C)
    m_real = m_row[:, None] & (o_real[None, :] < 2 * columns)
    p_out = out_ptr + i_row[:, None] * (2 * columns) + o_real[None, :]
    tl.store(p_out, tl.reshape(tl.join(re, im), [BLOCK_R, 2 * BLOCK_C]), mask=m_real)


def merge_dimensions(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Drops dimensions of size one and merges neighbours that every operand walks evenly.

    Args:
        shape: common shape of the operands.
        strides: one sequence of strides an operand.

    Returns:
        The merged shape and, for each operand, the merged strides.
    """
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for i_dim, size in enumerate(shape):
        if size == 1:
            continue
        inner = [stride[i_dim] for stride in strides]
        if sizes and all(m[-1] == step * size for m, step in zip(merged, inner, strict=True)):
            sizes[-1] *= size
            for m, step in zip(merged, inner, strict=True):
                m[-1] = step
        else:
            sizes.append(size)
            for m, step in zip(merged, inner, strict=True):
                m.append(step)
    return sizes, merged


def _physical(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The tensor as it lies in memory, and whether it stands for its conjugate (torch conjugates lazily)."""
    x = x.resolve_neg()
    return (x.conj(), True) if x.is_conj() else (x, False)


def _mode(stride: int) -> str:
    return {0: "broadcast", 1: "contiguous"}.get(stride, "strided")


def plan_complex_product(
    x: torch.Tensor, w: torch.Tensor, conj_w: bool = False, config: Stream | None = None
) -> tuple[Launch, torch.Tensor]:
    """The launch behind `complex_product`, by default in the configuration chosen for it, and the tensor it fills."""
    assert x.is_complex() and x.dtype == w.dtype, "operands must be complex and of one dtype"
    x, conj_x = _physical(x)
    w, lazily_conj_w = _physical(w)
    flags: dict[str, Any] = {"CONJ_X": conj_x, "CONJ_W": conj_w != lazily_conj_w}
    shape = torch.broadcast_shapes(x.shape, w.shape)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)

    x, w = x.expand(shape), w.expand(shape)
    sizes, (x_strides, w_strides) = merge_dimensions(shape, (x.stride(), w.stride()))
    if len(sizes) > ROW_DIMS + 1:
        # too many separate dimensions to decompose in the kernel: a copy makes the operands walk evenly
        x, w = x.contiguous(), w.contiguous()
        sizes, (x_strides, w_strides) = merge_dimensions(shape, (x.stride(), w.stride()))
    x_real, w_real, out_real = torch.view_as_real(x), torch.view_as_real(w), torch.view_as_real(out)

    if not sizes or (len(sizes) == 1 and x_strides == w_strides == [1]):
        length = out_real.numel()
        if config is None:
            config = COMPLEX_PRODUCT.choose(out.device, (out_real.dtype,), (length,))
        block = config.block_bytes // out_real.element_size()
        meta = {**flags, "BLOCK": block, "num_warps": config.num_warps}
        return Launch(complex_product_kernel, (ceil_div(length, block),), (x_real, w_real, out_real, length), meta), out

    padding = ROW_DIMS + 1 - len(sizes)
    sizes = [1] * padding + sizes
    x_strides, w_strides = [0] * padding + x_strides, [0] * padding + w_strides
    columns = sizes[-1]
    rows = out.numel() // max(columns, 1)
    if config is None:
        steps = (min(x_strides[-1], 2), min(w_strides[-1], 2))
        config = COMPLEX_PRODUCT_BROADCAST.choose(out.device, (out_real.dtype,), (rows, columns, *steps))
    block_rows, block_reals = config.row_block(2 * columns, out_real.element_size())
    block_columns = block_reals // 2
    meta = {
        **flags,
        "X_MODE": _mode(x_strides[-1]),
        "W_MODE": _mode(w_strides[-1]),
        "NARROW": rows < 2**30,
        "BLOCK_R": block_rows,
        "BLOCK_C": block_columns,
        "num_warps": config.num_warps,
    }
    grid = (ceil_div(rows, block_rows) * ceil_div(columns, block_columns),)
    args = (x_real, w_real, out_real, rows, columns, *sizes[1:-1], *x_strides, *w_strides)
    return Launch(complex_product_broadcast_kernel, grid, args, meta), out


def complex_product(x: torch.Tensor, w: torch.Tensor, conj_w: bool = False) -> torch.Tensor:
    """Elementwise `x * w`, or `x * conj(w)`, of complex tensors of one dtype and broadcastable shapes.

    Args:
        x: complex64 or complex128, any strides.
        w: of the same dtype, any strides.
        conj_w: conjugate `w` first.

    Returns:
        A new contiguous tensor of the broadcast shape.
    """
    launch, out = plan_complex_product(x, w, conj_w)
    launch.run()
    return out
