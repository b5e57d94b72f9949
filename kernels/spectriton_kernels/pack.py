"""From dense chunks to the packed spectrum: `pack_rows` decides what is kept, `gather_rows` follows a pattern.

The format is the one of docs/packed-format.md. One program handles some tiles that follow one another in the chunk, in
one pass: it reads them once, finds the rank of each kept coefficient by a prefix sum, and (in `pack_rows`) reserves
room for all of them with a single atomic add on the cursor. Tiles therefore stand in `values` in the order the programs
happened to run; the contents of each tile do not depend on it.
"""

import torch
import triton
import triton.language as tl

from ._device import convert, divide, load_kept, store_kept
from ._launch import Launch
from .configs import GATHER_ROWS, PACK_ROWS, Tiles, ceil_div
from .spectral_activation import KINDS, activate

VALUE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@triton.jit
def load_tiles(y_ptr, i_first, tiles, TILES: tl.constexpr, TILE: tl.constexpr):
    """(re, im) of dense tiles `i_first` .., (TILES, TILE) in float64 for float64 data and in float32 otherwise."""
    # flat offsets give 128-bit loads
    o_real = tl.arange(0, TILES * 2 * TILE)
    m_real = o_real < tl.minimum(tiles - i_first, TILES) * (2 * TILE)
    b_y = tl.load(y_ptr + i_first.to(tl.int64) * (2 * TILE) + o_real, mask=m_real, other=0.0)
    if b_y.dtype != tl.float64:
        b_y = b_y.to(tl.float32)
    return tl.split(tl.reshape(b_y, [TILES, TILE, 2]))


@triton.jit
def store_pairs(ptr, start, b_rank, m_pair, b_re, b_im):
    """Scatters (TILES, TILE) pairs (re, im), in the dtype behind the pointer, to `start` (TILES,) plus rank."""
    o_part = tl.arange(0, 2)[None, None, :]
    b_pair = convert(tl.join(b_re, b_im), ptr)
    p_pair = ptr + (start * 2)[:, None, None] + (b_rank[:, :, None] * 2 + o_part)
    tl.store(p_pair, b_pair, mask=m_pair[:, :, None] & (o_part < 2))


@triton.jit
def pack_rows_kernel(
    y_ptr,  # (Fc, Tc, TILE, 2)
    rows_ptr,  # (Fc,)
    threshold_ptr,  # (channels,)
    scale_ptr,  # (channels,)
    bitmap_ptr,  # (F, T, TILE // 8)
    offsets_ptr,  # (F, T)
    values_ptr,  # (capacity, 2)
    cursor_ptr,  # (1,)
    threshold: tl.float64,
    length,
    first_tile,
    chunk_tiles,
    row_tiles,
    tiles,
    capacity,
    channels,
    KIND: tl.constexpr,
    HAS_THRESHOLDS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Thresholds, activates and appends the kept coefficients of a chunk.

    Args:
        y_ptr: dense chunk.
        rows_ptr: int64 frequency row of each chunk row.
        threshold_ptr: thresholds of the channels (unused without HAS_THRESHOLDS).
        scale_ptr: scales of the activation (unused without HAS_SCALE).
        bitmap_ptr: uint8 bitmap; the tiles of the chunk are written.
        offsets_ptr: int32 offsets; the tiles of the chunk are written.
        values_ptr: kept coefficients.
        cursor_ptr: int64 number of coefficients appended so far.
        threshold: threshold of every channel (float64: a float32 argument would move it for float64 data).
        length: coefficients of a row, B * C; the rest of its last tile is padding.
        first_tile: tile t0 of the row with which the chunk begins.
        chunk_tiles: tiles of a chunk row, Tc.
        row_tiles: tiles of a row, T.
        tiles: tiles of the chunk, Fc * Tc.
        capacity: coefficients `values` has room for.
        channels: C.
        KIND: name of the activation.
        HAS_THRESHOLDS, HAS_SCALE: whether the tensors are there.
        TILE: coefficients of a tile.
        TILES: tiles a program handles.
    """
    i_first = tl.program_id(0) * TILES
    i_dense = i_first + tl.arange(0, TILES)
    m_tile = i_dense < tiles
    row = tl.load(rows_ptr + i_dense // chunk_tiles, mask=m_tile, other=0)
    i_row_tile = first_tile + i_dense % chunk_tiles
    i_tile = row * row_tiles + i_row_tile

    # what is left of the row, and the channel, in 32 bits: there are many coefficients to a tile
    n_left = tl.where(m_tile, tl.minimum(length - i_row_tile.to(tl.int64) * TILE, TILE), 0).to(tl.int32)
    o_coefficient = tl.arange(0, TILE)[None, :]
    m_coefficient = o_coefficient < n_left[:, None]
    i_channel = (i_row_tile % channels * TILE % channels)[:, None] + o_coefficient
    i_channel -= divide(i_channel, channels) * channels
    b_re, b_im = load_tiles(y_ptr, i_first, tiles, TILES, TILE)

    if HAS_THRESHOLDS:
        b_threshold = tl.load(threshold_ptr + i_channel, mask=m_coefficient, other=0.0).to(b_re.dtype)
    else:
        b_threshold = tl.full([1, 1], threshold, tl.float64).to(b_re.dtype)
    if HAS_SCALE:
        b_scale = tl.load(scale_ptr + i_channel, mask=m_coefficient, other=1.0).to(b_re.dtype)
    # nothing is below a square of -1, which keeps row 0; "not below" instead of "above or equal" keeps NaN
    b_square = tl.where((row == 0)[:, None], -1.0, b_threshold * b_threshold)
    m_kept = m_coefficient & ((b_re * b_re + b_im * b_im < b_square) == 0)
    b_kept = m_kept.to(tl.int32)

    store_kept(bitmap_ptr, i_tile, m_tile, b_kept, TILE)
    n_kept = tl.sum(b_kept, axis=1)
    n_all = tl.sum(n_kept, axis=0).to(tl.int64)
    first = tl.atomic_add(cursor_ptr, n_all, sem="relaxed")
    start = first + tl.cumsum(n_kept, axis=0) - n_kept
    tl.store(offsets_ptr + i_tile, start.to(tl.int32), mask=m_tile)

    if HAS_SCALE:
        b_re = b_scale * activate(b_re / b_scale, KIND)
        b_im = b_scale * activate(b_im / b_scale, KIND)
    else:
        b_re = activate(b_re, KIND)
        b_im = activate(b_im, KIND)
    b_rank = tl.cumsum(b_kept, axis=1) - b_kept
    n_room = tl.minimum(tl.maximum(capacity - start, 0), TILE).to(tl.int32)
    store_pairs(values_ptr, start, b_rank, m_kept & (b_rank < n_room[:, None]), b_re, b_im)

    if first + n_all > capacity:
        # what does not fit is left empty: who reads the pattern before the cursor stays within `values`
        tl.debug_barrier()
        store_kept(bitmap_ptr, i_tile, m_tile, b_kept * 0, TILE)
        tl.store(offsets_ptr + i_tile, tl.zeros_like(i_tile).to(tl.int32), mask=m_tile)


@triton.jit
def gather_rows_kernel(
    y_ptr,  # (Fc, Tc, TILE, 2)
    rows_ptr,  # (Fc,)
    bitmap_ptr,  # (F, T, TILE // 8)
    offsets_ptr,  # (F, T)
    out_ptr,  # (N, 2)
    first_tile,
    chunk_tiles,
    row_tiles,
    tiles,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Writes the coefficients of a chunk that an existing pattern keeps to their places.

    Args:
        y_ptr: dense chunk.
        rows_ptr: int64 frequency row of each chunk row.
        bitmap_ptr: uint8 bitmap of the pattern.
        offsets_ptr: int32 offsets of the pattern.
        out_ptr: values; the places of the chunk's tiles are written.
        first_tile: tile t0 of the row with which the chunk begins.
        chunk_tiles: tiles of a chunk row, Tc.
        row_tiles: tiles of a row, T.
        tiles: tiles of the chunk, Fc * Tc.
        TILE: coefficients of a tile.
        TILES: tiles a program handles.
    """
    i_first = tl.program_id(0) * TILES
    i_dense = i_first + tl.arange(0, TILES)
    m_tile = i_dense < tiles
    row = tl.load(rows_ptr + i_dense // chunk_tiles, mask=m_tile, other=0)
    i_tile = row * row_tiles + first_tile + i_dense % chunk_tiles
    b_kept = load_kept(bitmap_ptr, i_tile, m_tile, TILE)
    start = tl.load(offsets_ptr + i_tile, mask=m_tile, other=0).to(tl.int64)
    b_re, b_im = load_tiles(y_ptr, i_first, tiles, TILES, TILE)
    store_pairs(out_ptr, start, tl.cumsum(b_kept, axis=1) - b_kept, b_kept != 0, b_re, b_im)


def tile_geometry(bitmap: torch.Tensor, chunk: torch.Tensor) -> tuple[int, int, int]:
    """(tile, tiles of a row, tiles of a chunk row) of a bitmap and a dense chunk `(Fc, Tc * tile, 2)`."""
    tile = bitmap.shape[2] * 8
    assert chunk.shape[1] % tile == 0, "a chunk holds whole tiles"
    return tile, bitmap.shape[1], chunk.shape[1] // tile


def require_float_values(values: torch.Tensor) -> None:
    """Refuses int8 and 4-bit values, which only the reference backend reads and writes so far."""
    if values.dtype not in VALUE_DTYPES:
        raise NotImplementedError(
            f"values of dtype {values.dtype} are not supported by the Triton kernels yet "
            "(float32, float64, float16 and bfloat16 are): use the reference backend, spectriton.reference"
        )


def plan_pack_rows(
    y: torch.Tensor,
    length: int,
    threshold: float | torch.Tensor,
    rows: torch.Tensor,
    t0: int,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    values: torch.Tensor,
    cursor: torch.Tensor,
    kind: str,
    scale: torch.Tensor | None,
    channels: int,
    config: Tiles | None = None,
) -> Launch:
    """The launch behind `pack_rows`, by default in the configuration chosen for it."""
    require_float_values(values)
    assert kind in KINDS, kind
    tile, row_tiles, chunk_tiles = tile_geometry(bitmap, y)
    thresholds = threshold if isinstance(threshold, torch.Tensor) else None
    by_channel = thresholds is not None or scale is not None
    assert channels < 2**19 or not by_channel, "the kernel divides by way of float32"
    tiles = rows.shape[0] * chunk_tiles
    if config is None:
        config = PACK_ROWS.choose(y.device, (y.dtype, values.dtype), (tiles, tile))
    block_tiles, num_warps = config.shape(tile, y.element_size())
    meta = {
        "KIND": kind,
        "HAS_THRESHOLDS": thresholds is not None,
        "HAS_SCALE": scale is not None,
        "TILE": tile,
        "TILES": block_tiles,
        "num_warps": num_warps,
    }
    args = (
        y.contiguous(),
        rows,
        None if thresholds is None else thresholds.contiguous(),
        None if scale is None else scale.contiguous(),
        bitmap,
        offsets,
        values,
        cursor,
        0.0 if isinstance(threshold, torch.Tensor) else float(threshold),
        length,
        t0,
        chunk_tiles,
        row_tiles,
        tiles,
        values.shape[0],
        channels,
    )
    return Launch(pack_rows_kernel, (ceil_div(tiles, block_tiles),), args, meta)


def pack_rows(
    y: torch.Tensor,
    length: int,
    threshold: float | torch.Tensor,
    rows: torch.Tensor,
    t0: int,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    values: torch.Tensor,
    cursor: torch.Tensor,
    kind: str = "identity",
    scale: torch.Tensor | None = None,
    channels: int = 1,
) -> None:
    """Decides what of a dense chunk is kept, activates it and appends it.

    A coefficient is kept where its modulus is not below the threshold (squares are compared, in float64 for float64
    data and float32 otherwise), where it is NaN, and always in row 0. Tiles that do not fit `values` any more are
    left empty, bitmap and all, and the cursor still advances by what was needed.

    Args:
        y: `(Fc, Tc * tile, 2)` real, dense chunk.
        length: coefficients of a whole row, B * C; positions of the row at or beyond it are padding.
        threshold: a number, or one threshold a channel `(channels,)`.
        rows: `(Fc,)` int64, distinct frequency rows.
        t0: tile of the row with which the chunk begins.
        bitmap: `(F, T, tile // 8)` uint8, written at `[rows, t0:t0 + Tc]`.
        offsets: `(F, T)` int32, written at `[rows, t0:t0 + Tc]`.
        values: `(N, 2)` float32, float64, float16 or bfloat16, written from `cursor[0]` on.
        cursor: `(1,)` int64, advanced by the number of kept coefficients.
        kind: activation applied to what is kept, one of `spectral_activation.KINDS`.
        scale: `(channels,)` scale of the activation, or None.
        channels: C; the channel of a position of the row is its remainder by it.
    """
    plan_pack_rows(y, length, threshold, rows, t0, bitmap, offsets, values, cursor, kind, scale, channels).run()


def plan_gather_rows(
    y: torch.Tensor,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    t0: int,
    out: torch.Tensor,
    config: Tiles | None = None,
) -> Launch:
    """The launch behind `gather_rows`, by default in the configuration chosen for it."""
    require_float_values(out)
    tile, row_tiles, chunk_tiles = tile_geometry(bitmap, y)
    tiles = rows.shape[0] * chunk_tiles
    if config is None:
        config = GATHER_ROWS.choose(y.device, (y.dtype, out.dtype), (tiles, tile))
    block_tiles, num_warps = config.shape(tile, y.element_size())
    args = (y.contiguous(), rows, bitmap, offsets, out, t0, chunk_tiles, row_tiles, tiles)
    meta = {"TILE": tile, "TILES": block_tiles, "num_warps": num_warps}
    return Launch(gather_rows_kernel, (ceil_div(tiles, block_tiles),), args, meta)


def gather_rows(
    y: torch.Tensor, bitmap: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor, t0: int, out: torch.Tensor
) -> torch.Tensor:
    """Applies an existing pattern to a dense chunk: `out[offset + rank] = y` at the kept positions.

    Args:
        y: `(Fc, Tc * tile, 2)` real, dense chunk.
        bitmap: `(F, T, tile // 8)` uint8 pattern.
        offsets: `(F, T)` int32 pattern.
        rows: `(Fc,)` int64, distinct frequency rows.
        t0: tile of the row with which the chunk begins.
        out: `(N, 2)` float32, float64, float16 or bfloat16, laid out as the pattern's values.

    Returns:
        `out`.
    """
    plan_gather_rows(y, bitmap, offsets, rows, t0, out).run()
    return out
