"""Maximum pooling that keeps where in its window each maximum stood: `pool_maxima` and its adjoint `spread_maxima`.

The position in a window is a code of 2, 4 or 8 bits (as few as its positions need), packed in the order in which the
maxima stand in memory, lowest bits first. Which position counts is PyTorch's choice: the first maximum, or
the last NaN.

Maps are walked in rows of neighbours in memory: of channels where they stand last, else of columns. A row must fill
whole bytes with its codes. Bytes that have to be moved: the maps once, the maxima once, the codes once.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from ._device import convert
from ._launch import Launch
from .configs import POOL_MAXIMA, SPREAD_MAXIMA, Stream, ceil_div

# More positions than this would be spelt out too often.
_MOST_POSITIONS = 64


class Window(Protocol):
    """What is needed of a window; `spectriton.reference.max_pool.Window` tells what these are."""

    @property
    def kernel(self) -> tuple[int, int]: ...
    @property
    def stride(self) -> tuple[int, int]: ...
    @property
    def padding(self) -> tuple[int, int]: ...
    @property
    def dilation(self) -> tuple[int, int]: ...
    @property
    def bits(self) -> int: ...


@triton.jit
def place(i_row, i_column, down, across, channels, CHANNELS_LAST: tl.constexpr):
    """(image, channel, y, x) of what stands in rows and columns of memory, each (R, 1) or (1, C)."""
    if CHANNELS_LAST:
        x = i_row % across
        i_row = i_row // across
        channel = i_column
        y = i_row % down
        image = i_row // down
    else:
        x = i_column
        y = i_row % down
        i_row = i_row // down
        channel = i_row % channels
        image = i_row // channels
    return image, channel, y, x


@triton.jit
def load_codes(codes_ptr, o_code, m_code, BITS: tl.constexpr):
    """Codes by their numbers."""
    PER_BYTE: tl.constexpr = 8 // BITS
    b_byte = tl.load(codes_ptr + o_code // PER_BYTE, mask=m_code, other=0).to(tl.int32)
    return (b_byte >> (o_code % PER_BYTE * BITS).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit
def pool_maxima_kernel(
    x_ptr,  # (B, C, height, width)
    out_ptr,  # (rows, columns)
    codes_ptr,  # (rows * columns * BITS / 8,)
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    rows,
    columns,
    channels,
    height,
    width,
    down,
    across,
    CHANNELS_LAST: tl.constexpr,
    AGAIN: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Maxima of windows and where they stood; or, where that is known, the values that stand there.

    Args:
        x_ptr: maps, of any strides.
        out_ptr: maxima, channels last or contiguous.
        codes_ptr: uint8, packed codes; written, or read with AGAIN.
        stride_b, stride_c, stride_y, stride_x: of the maps.
        rows, columns: of the maxima in memory: all positions of all images and their channels where these are last,
            else all rows of all channels and their columns.
        channels, height, width: of the maps.
        down, across: maxima of a map.
        CHANNELS_LAST: how the maxima stand.
        AGAIN: whether the codes are given.
        KERNEL_H .. DILATION_W: of the window.
        BITS: of a code.
        BLOCK_R, BLOCK_C: rows and columns a program handles.
    """
    n_across = tl.cdiv(columns, BLOCK_C)
    i_first = tl.program_id(0) // n_across
    i_row = i_first * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    i_first = tl.program_id(0) % n_across * BLOCK_C
    i_column = i_first + tl.arange(0, BLOCK_C)[None, :]
    m_out = (i_row < rows) & (i_column < columns)
    image, channel, y, x = place(i_row, i_column, down, across, channels, CHANNELS_LAST)
    y = y * STRIDE_H - PAD_H
    x = x * STRIDE_W - PAD_W
    p_x = x_ptr + image.to(tl.int64) * stride_b + channel.to(tl.int64) * stride_c
    o_out = i_row.to(tl.int64) * columns + i_column
    WIDE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    if AGAIN:
        b_code = load_codes(codes_ptr, o_out, m_out, BITS)
    else:
        # the first position within the maps counts even if nothing is above minus infinity
        first = tl.cdiv(tl.maximum(-y, 0), DILATION_H) * KERNEL_W + tl.cdiv(tl.maximum(-x, 0), DILATION_W)
        b_code = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.int32) + first
    b_best = tl.full(
        [BLOCK_R, BLOCK_C], float("-inf"), tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    for position in tl.static_range(KERNEL_H * KERNEL_W):
        at_y = y + position // KERNEL_W * DILATION_H
        at_x = x + position % KERNEL_W * DILATION_W
        m_in = (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width) & m_out
        p_here = p_x + at_y.to(tl.int64) * stride_y + at_x.to(tl.int64) * stride_x
        b_x = tl.load(p_here, mask=m_in, other=float("-inf")).to(WIDE)
        if AGAIN:
            b_best = tl.where(b_code == position, b_x, b_best)
        else:
            # what is outside was read as minus infinity, which is above nothing
            m_take = (b_x > b_best) | (b_x != b_x)
            b_best = tl.where(m_take, b_x, b_best)
            b_code = tl.where(m_take, position, b_code)
    tl.store(out_ptr + o_out, convert(b_best, out_ptr), mask=m_out)
    if not AGAIN:
        PER_BYTE: tl.constexpr = 8 // BITS
        b_code = tl.reshape(b_code, [BLOCK_R, BLOCK_C // PER_BYTE, PER_BYTE])
        b_byte = tl.sum(b_code << (tl.arange(0, PER_BYTE) * BITS)[None, None, :], axis=2)
        i_byte = i_first // PER_BYTE + tl.arange(0, BLOCK_C // PER_BYTE)[None, :]
        o_byte = i_row.to(tl.int64) * (columns // PER_BYTE) + i_byte
        tl.store(codes_ptr + o_byte, b_byte.to(tl.uint8), mask=(i_row < rows) & (i_byte * PER_BYTE < columns))


@triton.jit
def spread_maxima_kernel(
    grad_ptr,  # (B, C, down, across)
    codes_ptr,  # (B * C * down * across * BITS / 8,)
    out_ptr,  # (rows, columns)
    rows,
    columns,
    channels,
    height,
    width,
    down,
    across,
    CHANNELS_LAST: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """For each position of the maps, the sum of the gradients of those maxima that stood there.

    Sums are made in float32 (float64 of such), windows in order.

    Args:
        grad_ptr: gradient of the maxima, channels last or contiguous.
        codes_ptr: uint8, packed codes.
        out_ptr: gradient of the maps, as that of the maxima stands.
        rows, columns: of the gradient of the maps, as in `pool_maxima_kernel`.
        others: as in `pool_maxima_kernel`.
    """
    ROWS: tl.constexpr = ((KERNEL_H - 1) * DILATION_H + STRIDE_H) // STRIDE_H
    COLUMNS: tl.constexpr = ((KERNEL_W - 1) * DILATION_W + STRIDE_W) // STRIDE_W
    n_across = tl.cdiv(columns, BLOCK_C)
    i_row = tl.program_id(0) // n_across * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    i_column = tl.program_id(0) % n_across * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    m_out = (i_row < rows) & (i_column < columns)
    image, channel, y, x = place(i_row, i_column, height, width, channels, CHANNELS_LAST)
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for window in tl.static_range(ROWS * COLUMNS):
        i_y = (y + PAD_H) // STRIDE_H - (ROWS - 1 - window // COLUMNS)
        i_x = (x + PAD_W) // STRIDE_W - (COLUMNS - 1 - window % COLUMNS)
        at_y = y + PAD_H - i_y * STRIDE_H
        at_x = x + PAD_W - i_x * STRIDE_W
        m_in = (i_y >= 0) & (i_y < down) & (at_y % DILATION_H == 0) & (at_y < KERNEL_H * DILATION_H)
        m_in &= (i_x >= 0) & (i_x < across) & (at_x % DILATION_W == 0) & (at_x < KERNEL_W * DILATION_W)
        if CHANNELS_LAST:
            o_grad = ((image.to(tl.int64) * down + i_y) * across + i_x) * channels + channel
        else:
            o_grad = ((image.to(tl.int64) * channels + channel) * down + i_y) * across + i_x
        b_grad = tl.load(grad_ptr + o_grad, mask=m_in & m_out, other=0.0).to(b_sum.dtype)
        b_code = load_codes(codes_ptr, o_grad, m_in & m_out, BITS)
        here = at_y // DILATION_H * KERNEL_W + at_x // DILATION_W
        b_sum += tl.where(b_code == here, b_grad, 0.0)
    tl.store(out_ptr + i_row.to(tl.int64) * columns + i_column, convert(b_sum, out_ptr), mask=m_out)


def can_pool(window: Window, shape: Sequence[int], channels_last: bool) -> bool:
    """Whether the kernels take windows with maxima `(B, C, Ho, Wo)` that stand so in memory."""
    columns = shape[1] if channels_last else shape[3]
    return window.kernel[0] * window.kernel[1] <= _MOST_POSITIONS and columns * window.bits % 8 == 0


def _memory(shape: Sequence[int], channels_last: bool) -> tuple[int, int]:
    """Rows and columns of maps in memory."""
    batch, channels, height, width = shape
    return (batch * height * width, channels) if channels_last else (batch * channels * height, width)


def _meta(window: Window, channels_last: bool, columns: int, itemsize: int, config: Stream) -> dict[str, Any]:
    block_r, block_c = config.row_block(columns, itemsize)
    # at least a byte of codes
    block_c = max(block_c, 8)
    meta: dict[str, Any] = {"CHANNELS_LAST": channels_last}
    for name, values in (
        ("KERNEL", window.kernel),
        ("STRIDE", window.stride),
        ("PAD", window.padding),
        ("DILATION", window.dilation),
    ):
        meta |= {f"{name}_H": values[0], f"{name}_W": values[1]}
    return meta | {"BITS": window.bits, "BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": config.num_warps}


def _dense(maps: torch.Tensor, channels_last: bool) -> bool:
    return maps.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def plan_pool_maxima(
    x: torch.Tensor,
    window: Window,
    channels_last: bool,
    out: torch.Tensor,
    codes: torch.Tensor,
    again: bool,
    config: Stream | None = None,
) -> Launch:
    """The launch behind `pool_maxima` and `pool_maxima_again`, by default in the configuration chosen for it."""
    assert can_pool(window, out.shape, channels_last), "rows of maxima do not fill bytes with their codes"
    assert _dense(out, channels_last) and codes.is_contiguous() and codes.numel() * 8 == out.numel() * window.bits
    rows, columns = _memory(out.shape, channels_last)
    if config is None:
        config = POOL_MAXIMA.choose(x.device, (x.dtype,), (rows, columns, *window.kernel))
    meta = _meta(window, channels_last, columns, out.element_size(), config)
    args = (x, out, codes, *x.stride(), rows, columns, *x.shape[1:], *out.shape[2:])
    grid = ceil_div(rows, meta["BLOCK_R"]) * ceil_div(columns, meta["BLOCK_C"])
    return Launch(pool_maxima_kernel, (grid,), args, meta | {"AGAIN": again})


def pool_maxima(x: torch.Tensor, window: Window, out: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Writes the maxima of windows.

    Args:
        x: `(B, C, H, W)` of any strides, any float dtype.
        window: one that `can_pool` takes.
        out: `(B, C, Ho, Wo)`, channels last or contiguous.
        channels_last: which of the two.

    Returns:
        `(B * C * Ho * Wo * bits / 8,)` uint8, the codes.
    """
    codes = torch.empty(out.numel() * window.bits // 8, dtype=torch.uint8, device=x.device)
    plan_pool_maxima(x, window, channels_last, out, codes, False).run()
    return codes


def pool_maxima_again(
    x: torch.Tensor, window: Window, codes: torch.Tensor, out: torch.Tensor, channels_last: bool
) -> torch.Tensor:
    """Writes, and returns, the values of maps where maxima stood; arguments as of `pool_maxima`, with its codes."""
    plan_pool_maxima(x, window, channels_last, out, codes, True).run()
    return out


def plan_spread_maxima(
    grad: torch.Tensor,
    window: Window,
    channels_last: bool,
    codes: torch.Tensor,
    out: torch.Tensor,
    config: Stream | None = None,
) -> Launch:
    """The launch behind `spread_maxima`, by default in the configuration chosen for it."""
    assert can_pool(window, grad.shape, channels_last), "rows of maxima do not fill bytes with their codes"
    assert _dense(grad, channels_last) and _dense(out, channels_last) and codes.is_contiguous()
    rows, columns = _memory(out.shape, channels_last)
    if config is None:
        config = SPREAD_MAXIMA.choose(out.device, (out.dtype,), (rows, columns, *window.kernel))
    meta = _meta(window, channels_last, columns, out.element_size(), config)
    args = (grad, codes, out, rows, columns, *out.shape[1:], *grad.shape[2:])
    grid = ceil_div(rows, meta["BLOCK_R"]) * ceil_div(columns, meta["BLOCK_C"])
    return Launch(spread_maxima_kernel, (grid,), args, meta)


def spread_maxima(
    grad: torch.Tensor, window: Window, codes: torch.Tensor, out: torch.Tensor, channels_last: bool
) -> torch.Tensor:
    """Writes, and returns, the gradient of maps from that of their maxima.

    Args:
        grad: `(B, C, Ho, Wo)`, channels last or contiguous.
        window: one that `can_pool` takes.
        codes: as `pool_maxima` gives them.
        out: `(B, C, H, W)`, as `grad` stands.
        channels_last: which of the two.
    """
    plan_spread_maxima(grad, window, channels_last, codes, out).run()
    return out
