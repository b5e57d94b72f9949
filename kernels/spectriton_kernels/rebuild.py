"""Batch norm with known statistics, then ReLU by its bits, of decoded maps in one pass: `rebuild`.

Maps are walked in rows of neighbours in memory: of channels where they stand last, else of the positions of a channel.
Bytes that have to be moved a value: twice its own, and an eighth for the bits.
"""

import torch
import triton
import triton.language as tl

from ._device import convert
from ._launch import Launch
from .configs import REBUILD, Stream, ceil_div


@triton.jit
def rebuild_kernel(
    x_ptr,  # (rows, columns)
    mean_ptr,  # (C,)
    scale_ptr,  # (C,)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    outside_ptr,  # (ceil(rows * columns / 8),)
    out_ptr,  # (rows, columns)
    rows,
    columns,
    channels,
    eps,
    CHANNELS_LAST: tl.constexpr,
    VARIANCE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Maps as a batch norm, a ReLU or both made them.

    Args:
        x_ptr: what they made them of.
        mean_ptr: of the channels; None without batch norm.
        scale_ptr: inverse deviation, or with VARIANCE the variance.
        weight_ptr, bias_ptr: of the batch norm, or None.
        outside_ptr: uint8, a bit each in the order of memory, set where ReLU gave zero; None without ReLU.
        out_ptr: results; may be `x_ptr`.
        rows, columns: of the maps in memory: positions of all images and their channels where these are last, else
            the channels of all images and their positions.
        channels: C.
        eps: added to the variance.
        CHANNELS_LAST: how maps stand.
        VARIANCE: what `scale_ptr` is.
        BLOCK_R, BLOCK_C: rows and columns a program handles.
    """
    n_across = tl.cdiv(columns, BLOCK_C)
    i_row = (tl.program_id(0) // n_across * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    i_column = (tl.program_id(0) % n_across * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_row, m_column = i_row < rows, i_column < columns
    m_out = m_row & m_column
    o_out = i_row.to(tl.int64) * columns + i_column
    WIDE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    b_x = tl.load(x_ptr + o_out, mask=m_out, other=0.0).to(WIDE)
    if mean_ptr is not None:
        if CHANNELS_LAST:
            i_channel, m_channel = i_column, m_column
        else:
            i_channel, m_channel = i_row % channels, m_row
        b_scale = tl.load(scale_ptr + i_channel, mask=m_channel, other=0.0).to(WIDE)
        if VARIANCE:
            b_scale = 1.0 / tl.sqrt(b_scale + eps)
        if weight_ptr is not None:
            b_scale *= tl.load(weight_ptr + i_channel, mask=m_channel, other=0.0).to(WIDE)
        b_shift = -tl.load(mean_ptr + i_channel, mask=m_channel, other=0.0).to(WIDE) * b_scale
        if bias_ptr is not None:
            b_shift += tl.load(bias_ptr + i_channel, mask=m_channel, other=0.0).to(WIDE)
        b_x = b_x * b_scale + b_shift
    if outside_ptr is not None:
        b_byte = tl.load(outside_ptr + (o_out >> 3), mask=m_out, other=0).to(tl.int32)
        m_clear = ((b_byte >> (o_out & 7).to(tl.int32)) & 1) != 0
        b_x = tl.where(m_clear | (b_x < 0.0), 0.0, b_x)
    tl.store(out_ptr + o_out, convert(b_x, out_ptr), mask=m_out)


def plan_rebuild(
    x: torch.Tensor,
    statistics: tuple[torch.Tensor | None, ...],
    eps: float | None,
    outside: torch.Tensor | None,
    channels_last: bool,
    out: torch.Tensor,
    config: Stream | None = None,
) -> Launch:
    """The launch behind `rebuild`, by default in the configuration chosen for it."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert x.is_contiguous(memory_format=layout) and out.is_contiguous(memory_format=layout) and out.shape == x.shape
    batch, channels, height, width = x.shape
    rows, columns = batch * channels, height * width
    if channels_last:
        rows, columns = batch * height * width, channels
    if config is None:
        config = REBUILD.choose(x.device, (x.dtype,), (rows, columns))
    block_r, block_c = config.row_block(columns, x.element_size())
    mean, scale, weight, bias = statistics
    meta = {
        "CHANNELS_LAST": channels_last,
        "VARIANCE": eps is not None,
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
        "num_warps": config.num_warps,
    }
    args = (x, mean, scale, weight, bias, outside, out, rows, columns, channels, float(eps or 0.0))
    return Launch(rebuild_kernel, (ceil_div(rows, block_r) * ceil_div(columns, block_c),), args, meta)


def rebuild(
    x: torch.Tensor,
    statistics: tuple[torch.Tensor | None, ...],
    eps: float | None,
    outside: torch.Tensor | None,
    channels_last: bool,
    out: torch.Tensor,
) -> torch.Tensor:
    """Writes, and returns, maps as a batch norm, a ReLU or both made them.

    Args:
        x: `(B, C, H, W)`, channels last or contiguous.
        statistics: mean, inverse deviation (with `eps` the variance), weight and bias of the channels, each `(C,)`; the
            last two may be None, and all of them without batch norm.
        eps: added to the variance, or None.
        outside: `(ceil(n / 8),)` uint8, the bits of ReLU in the order of memory; None without.
        channels_last: how all maps stand.
        out: as `x`, and may be `x`.
    """
    plan_rebuild(x, statistics, eps, outside, channels_last, out).run()
    return out
