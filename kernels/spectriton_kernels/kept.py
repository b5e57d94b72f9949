"""What is kept of a packed spectrum, without the dense side: `sum_kept` adds it up, `combine_kept` makes gradients.

For batch norm, whose statistics and gradients are sums over all frequencies. The format is the one of
docs/packed-format.md. A program walks down a column of tiles: a position of the row is one channel of one sample, so
that sums need no atomics and tables are read once.
"""

import torch
import triton
import triton.language as tl

from ._device import load_kept
from ._launch import Launch
from .configs import COMBINE_KEPT, SUM_KEPT, Tiles, ceil_div, rows_in_turn
from .pack import check_values
from .unpack import load_pairs

# Rows that a program takes one after the other; more would save nothing but room for their sums.
_MOST_ROWS = 32


@triton.jit
def sum_kept_kernel(
    values_ptr,  # (N, 2), or (N,) for 4 bits
    scales_ptr,  # (F, T)
    grad_ptr,  # (N, 2)
    bitmap_ptr,  # (F, T, TILE // 8)
    offsets_ptr,  # (F, T)
    weight_ptr,  # (F,)
    partial_ptr,  # (row blocks, T, TILE)
    rows,
    row_tiles,
    HAS_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Adds up squares times weights, or products with gradients, over all rows but the first.

    Args:
        values_ptr: kept coefficients.
        scales_ptr: float32 scales of low-bit values (else unused).
        grad_ptr: gradients in the order of the values (unused without HAS_GRAD).
        bitmap_ptr: uint8 bitmap.
        offsets_ptr: int32 offsets.
        weight_ptr: weights of the rows (unused with HAS_GRAD).
        partial_ptr: what a block of rows adds up to at each position.
        rows: F.
        row_tiles: tiles of a row, T.
        HAS_GRAD: whether gradients take the place of the second factor, and ones that of the weights.
        ROWS: rows a program handles one after the other.
        TILE: coefficients of a tile.
        TILES: tiles of a row that a program handles at once.
    """
    i_program = tl.program_id(0)
    n_column_blocks = tl.cdiv(row_tiles, TILES)
    i_row_block = i_program // n_column_blocks
    i_column = i_program % n_column_blocks * TILES + tl.arange(0, TILES)
    m_column = i_column < row_tiles
    DTYPE: tl.constexpr = partial_ptr.dtype.element_ty
    b_sum = tl.zeros([TILES, TILE], DTYPE)
    for i in range(ROWS):
        i_row = 1 + (i_row_block * ROWS + i).to(tl.int64)
        m_tile = m_column & (i_row < rows)
        i_tile = i_row * row_tiles + i_column
        b_kept = load_kept(bitmap_ptr, i_tile, m_tile, TILE)
        start = tl.load(offsets_ptr + i_tile, mask=m_tile, other=0).to(tl.int64)
        b_rank = tl.cumsum(b_kept, axis=1) - b_kept
        b_pair = load_pairs(values_ptr, scales_ptr, i_tile, m_tile, start, b_rank, b_kept, DTYPE).to(DTYPE)
        if HAS_GRAD:
            b_other = load_pairs(grad_ptr, scales_ptr, i_tile, m_tile, start, b_rank, b_kept, DTYPE).to(DTYPE)
            b_sum += tl.sum(b_pair * b_other, axis=2)
        else:
            weight = tl.load(weight_ptr + i_row, mask=i_row < rows, other=0.0).to(DTYPE)
            b_sum += weight * tl.sum(b_pair * b_pair, axis=2)
    o_coefficient = tl.arange(0, TILE)[None, :]
    p_partial = partial_ptr + (i_row_block.to(tl.int64) * row_tiles + i_column)[:, None] * TILE + o_coefficient
    tl.store(p_partial, b_sum, mask=m_column[:, None] & (o_coefficient < TILE))


@triton.jit
def combine_kept_kernel(
    values_ptr,  # (N, 2), or (N,) for 4 bits
    scales_ptr,  # (F, T)
    grad_ptr,  # (N, 2)
    bitmap_ptr,  # (F, T, TILE // 8)
    offsets_ptr,  # (F, T)
    weight_ptr,  # (F,)
    factor_ptr,  # (T, TILE)
    gain_ptr,  # (T, TILE)
    zero_ptr,  # (T, TILE)
    out_ptr,  # (N, 2)
    rows,
    row_tiles,
    HAS_GAIN: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Writes gradients times a table, and what the values add to them.

    Args:
        values_ptr: kept coefficients (unused without HAS_GAIN, as all up to the weights).
        scales_ptr: float32 scales of low-bit values (else unused).
        grad_ptr: gradients in the order of the values.
        bitmap_ptr: uint8 bitmap.
        offsets_ptr: int32 offsets.
        weight_ptr: weights of the rows.
        factor_ptr: by what the gradients of a position are multiplied.
        gain_ptr: by what the values of a position are, beside the weight of their row; not in the first row.
        zero_ptr: what is added to the real parts of the first row.
        out_ptr: result; may be the gradients.
        rows: F.
        row_tiles: tiles of a row, T.
        HAS_GAIN: whether the values, and in the first row the zeros, are added.
        ROWS: rows a program handles one after the other.
        TILE: coefficients of a tile.
        TILES: tiles of a row that a program handles at once.
    """
    i_program = tl.program_id(0)
    n_column_blocks = tl.cdiv(row_tiles, TILES)
    i_row_block = i_program // n_column_blocks
    i_column = i_program % n_column_blocks * TILES + tl.arange(0, TILES)
    m_column = i_column < row_tiles
    o_part = tl.arange(0, 2)[None, None, :]
    o_place = i_column[:, None] * TILE + tl.arange(0, TILE)[None, :]
    m_place = o_place < row_tiles * TILE
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    b_factor = tl.load(factor_ptr + o_place, mask=m_place, other=0.0).to(DTYPE)
    if HAS_GAIN:
        b_gain = tl.load(gain_ptr + o_place, mask=m_place, other=0.0).to(DTYPE)
    for i in range(ROWS):
        i_row = (i_row_block * ROWS + i).to(tl.int64)
        m_tile = m_column & (i_row < rows)
        i_tile = i_row * row_tiles + i_column
        b_kept = load_kept(bitmap_ptr, i_tile, m_tile, TILE)
        start = tl.load(offsets_ptr + i_tile, mask=m_tile, other=0).to(tl.int64)
        b_rank = tl.cumsum(b_kept, axis=1) - b_kept
        b_out = load_pairs(grad_ptr, scales_ptr, i_tile, m_tile, start, b_rank, b_kept, DTYPE).to(DTYPE)
        b_out = b_out * b_factor[:, :, None]
        if HAS_GAIN:
            b_pair = load_pairs(values_ptr, scales_ptr, i_tile, m_tile, start, b_rank, b_kept, DTYPE).to(DTYPE)
            weight = tl.load(weight_ptr + i_row, mask=(i_row > 0) & (i_row < rows), other=0.0).to(DTYPE)
            b_zero = tl.load(zero_ptr + o_place, mask=m_place & (i_row == 0), other=0.0).to(DTYPE)
            b_out += b_pair * (weight * b_gain)[:, :, None] + tl.where(o_part == 0, b_zero[:, :, None], 0.0)
        p_pair = out_ptr + (start * 2)[:, None, None] + (b_rank[:, :, None] * 2 + o_part)
        tl.store(p_pair, b_out, mask=(b_kept != 0)[:, :, None] & (o_part < 2))


def plan_sum_kept(
    values: torch.Tensor,
    scales: torch.Tensor | None,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor | None,
    grad: torch.Tensor | None,
    dtype: torch.dtype,
    room: int,
    config: Tiles | None = None,
) -> tuple[Launch, torch.Tensor]:
    """The launch behind `sum_kept`, by default in the configuration chosen for it, and the sums it fills."""
    scales = check_values(values, scales, offsets)
    assert (weight is None) != (grad is None), "weights, or gradients"
    assert grad is None or (grad.is_contiguous() and grad.shape == (values.shape[0], 2)), "a pair for each value"
    rows, row_tiles = offsets.shape
    tile, summed = bitmap.shape[2] * 8, max(0, rows - 1)
    if config is None:
        config = SUM_KEPT.choose(bitmap.device, (dtype, values.dtype), (rows * row_tiles, tile))
    block_tiles, num_warps = config.shape_in_row(tile, dtype.itemsize, row_tiles)
    column_blocks, of_row = ceil_div(row_tiles, block_tiles), row_tiles * tile * dtype.itemsize
    in_turn = rows_in_turn(summed, column_blocks, _MOST_ROWS)
    while ceil_div(summed, in_turn) * of_row > room and in_turn < summed:
        in_turn *= 2
    row_blocks = ceil_div(summed, in_turn)
    partial = torch.empty(row_blocks, row_tiles * tile, dtype=dtype, device=bitmap.device)
    args = (values, scales, grad, bitmap, offsets, weight, partial, rows, row_tiles)
    meta = {
        "HAS_GRAD": grad is not None,
        "ROWS": in_turn,
        "TILE": tile,
        "TILES": block_tiles,
        "num_warps": num_warps,
    }
    return Launch(sum_kept_kernel, (row_blocks * column_blocks,), args, meta), partial


def sum_kept(
    values: torch.Tensor,
    scales: torch.Tensor | None,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor | None,
    grad: torch.Tensor | None,
    dtype: torch.dtype,
    room: int,
) -> torch.Tensor:
    """Sums over all rows but the first: of `weight |z|^2`, or of `<grad, z>`.

    Args:
        values: `(N, 2)` float32, float64, float16, bfloat16 or int8, or `(N,)` uint8 for 4 bits.
        scales: `(F, T)` float32 of low-bit values; else None or empty.
        bitmap: `(F, T, tile // 8)` uint8.
        offsets: `(F, T)` int32.
        weight: `(F,)` float, or None where there are gradients.
        grad: `(N, 2)` contiguous, in the order of the values, or None.
        dtype: float32 or float64, in which is multiplied.
        room: bytes that sums of blocks of rows may take; those of one block always do.

    Returns:
        `(T * tile,)` float64, one sum a position of the row; the same bits from run to run in one configuration.
    """
    launch, partial = plan_sum_kept(values, scales, bitmap, offsets, weight, grad, dtype, room)
    launch.run()
    return partial.sum(0, dtype=torch.float64)


def plan_combine_kept(
    values: torch.Tensor,
    scales: torch.Tensor | None,
    grad: torch.Tensor,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    factor: torch.Tensor,
    gain: torch.Tensor | None,
    zero: torch.Tensor | None,
    out: torch.Tensor,
    config: Tiles | None = None,
) -> Launch:
    """The launch behind `combine_kept`, by default in the configuration chosen for it."""
    scales = check_values(values, scales, offsets)
    assert (gain is None) == (zero is None), "both or none"
    assert grad.is_contiguous() and out.is_contiguous() and grad.shape == out.shape, "pairs"
    rows, row_tiles = offsets.shape
    tile = bitmap.shape[2] * 8
    if config is None:
        config = COMBINE_KEPT.choose(bitmap.device, (out.dtype, values.dtype), (rows * row_tiles, tile))
    block_tiles, num_warps = config.shape_in_row(tile, out.element_size(), row_tiles)
    column_blocks = ceil_div(row_tiles, block_tiles)
    in_turn = rows_in_turn(rows, column_blocks, _MOST_ROWS)
    args = (values, scales, grad, bitmap, offsets, weight, factor, gain, zero, out, rows, row_tiles)
    meta = {
        "HAS_GAIN": gain is not None,
        "ROWS": in_turn,
        "TILE": tile,
        "TILES": block_tiles,
        "num_warps": num_warps,
    }
    return Launch(combine_kept_kernel, (ceil_div(rows, in_turn) * column_blocks,), args, meta)


def combine_kept(
    values: torch.Tensor,
    scales: torch.Tensor | None,
    grad: torch.Tensor,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    factor: torch.Tensor,
    gain: torch.Tensor | None,
    zero: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """`factor grad + gain weight z`, in the first row `factor grad + zero`.

    Args:
        values, scales, bitmap, offsets: as of `sum_kept`.
        grad: `(N, 2)` contiguous, in the order of the values.
        weight: `(F,)` float, of the rows.
        factor, gain, zero: `(T * tile,)` float, of the positions of a row; the last two may both be None, for zeros.
        out: `(N, 2)` contiguous float32 or float64; may be `grad`.

    Returns:
        `out`.
    """
    plan_combine_kept(values, scales, grad, bitmap, offsets, weight, factor, gain, zero, out).run()
    return out
