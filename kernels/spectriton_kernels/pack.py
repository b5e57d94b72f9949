"""From dense chunks to the packed spectrum: `pack_rows` decides what is kept, `gather_rows` follows a pattern.

The format is the one of docs/packed-format.md. One program handles some tiles that follow one another in the chunk, in
one pass: it reads them once, finds the rank of each kept coefficient by a prefix sum, and (in `pack_rows`) reserves
room for all of them with a single atomic add on the cursor. Tiles therefore stand in `values` in the order the programs
happened to run; the contents of each tile do not depend on it. As a program handles whole tiles, it finds the scales of
low-bit values, too, and rounds to them in the same pass.
"""

import torch
import triton
import triton.language as tl

from ._device import convert, divide, load_kept, store_kept
from ._launch import Launch
from ._rounding import convert_stochastic, quantise, scale_of, words
from .configs import GATHER_ROWS, PACK_ROWS, Tiles, ceil_div
from .spectral_activation import KINDS, activate

FLOAT_VALUES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Two integers of 8 bits a coefficient, or of 4 bits in a byte; tiles have scales.
LOW_BIT_VALUES = {torch.int8: (2,), torch.uint8: ()}


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
def store_pairs(
    values_ptr,
    scales_ptr,
    key_ptr,
    i_tile,
    m_tile,
    start,
    b_rank,
    m_kept,
    m_pair,
    b_re,
    b_im,
    STOCHASTIC: tl.constexpr,
):
    """Scatters kept coefficients in the format behind the pointer, and writes the scales of tiles where it has them.

    Args:
        values_ptr: values.
        scales_ptr: (F, T) float32 scales (unused for floats).
        key_ptr: int32, key of the noise (used with STOCHASTIC).
        i_tile, m_tile: (TILES,) number of each tile, row * T + tile, and which of them exist.
        start: (TILES,) where the values of each tile begin.
        b_rank: (TILES, TILE) places of its coefficients after that.
        m_kept: which of them are kept.
        m_pair: which of these are stored.
        b_re, b_im: their parts, float32 or float64.
        STOCHASTIC: whether noise decides between the neighbours of a value in its format.
    """
    FORMAT: tl.constexpr = values_ptr.dtype.element_ty
    TILE: tl.constexpr = b_re.shape[1]
    key = 0
    b_position = b_rank
    if STOCHASTIC:
        key = tl.load(key_ptr).to(tl.uint32, bitcast=True)
        b_position = (i_tile * (2 * TILE)).to(tl.uint32)[:, None] + 2 * tl.arange(0, TILE).to(tl.uint32)[None, :]
    if FORMAT.is_floating():
        if STOCHASTIC:
            b_re = convert_stochastic(b_re, values_ptr, b_position, key)
            b_im = convert_stochastic(b_im, values_ptr, b_position + 1, key)
        o_part = tl.arange(0, 2)[None, None, :]
        b_pair = convert(tl.join(b_re, b_im), values_ptr)
        p_pair = values_ptr + (start * 2)[:, None, None] + (b_rank[:, :, None] * 2 + o_part)
        tl.store(p_pair, b_pair, mask=m_pair[:, :, None] & (o_part < 2))
    else:
        LEVELS: tl.constexpr = 127 if FORMAT == tl.int8 else 7
        scale = scale_of(b_re, b_im, m_kept, LEVELS)
        tl.store(scales_ptr + i_tile, scale, mask=m_tile)
        b_word = quantise(b_re, b_im, scale, b_position, key, LEVELS, STOCHASTIC)
        tl.store(words(values_ptr) + start[:, None] + b_rank, b_word, mask=m_pair)


@triton.jit
def pack_rows_kernel(
    y_ptr,  # (Fc, Tc, TILE, 2)
    rows_ptr,  # (Fc,)
    threshold_ptr,  # (channels,)
    scale_ptr,  # (channels,)
    bitmap_ptr,  # (F, T, TILE // 8)
    offsets_ptr,  # (F, T)
    values_ptr,  # (capacity, 2), or (capacity,) for 4 bits
    scales_ptr,  # (F, T)
    cursor_ptr,  # (1,)
    key_ptr,  # ()
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
    STOCHASTIC: tl.constexpr,
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
        scales_ptr: float32 scales; for low-bit values the tiles of the chunk are written (else unused).
        cursor_ptr: int64 number of coefficients appended so far.
        key_ptr: int32, key of the noise (used with STOCHASTIC).
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
        STOCHASTIC: whether noise decides between the neighbours of a value in its format.
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

    # ranks before activation, whose results would wait for them in registers
    b_rank = tl.cumsum(b_kept, axis=1) - b_kept
    n_room = tl.minimum(tl.maximum(capacity - start, 0), TILE).to(tl.int32)
    m_pair = m_kept & (b_rank < n_room[:, None])

    if HAS_SCALE:
        b_re = b_scale * activate(b_re / b_scale, KIND)
        b_im = b_scale * activate(b_im / b_scale, KIND)
    else:
        b_re = activate(b_re, KIND)
        b_im = activate(b_im, KIND)
    store_pairs(values_ptr, scales_ptr, key_ptr, i_tile, m_tile, start, b_rank, m_kept, m_pair, b_re, b_im, STOCHASTIC)

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
    out_ptr,  # (N, 2), or (N,) for 4 bits
    scales_ptr,  # (F, T)
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
        scales_ptr: float32 scales; for low-bit values the tiles of the chunk are written (else unused).
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
    b_rank = tl.cumsum(b_kept, axis=1) - b_kept
    m_kept = b_kept != 0
    store_pairs(out_ptr, scales_ptr, None, i_tile, m_tile, start, b_rank, m_kept, m_kept, b_re, b_im, False)


def tile_geometry(bitmap: torch.Tensor, chunk: torch.Tensor) -> tuple[int, int, int]:
    """(tile, tiles of a row, tiles of a chunk row) of a bitmap and a dense chunk `(Fc, Tc * tile, 2)`."""
    tile = bitmap.shape[2] * 8
    assert chunk.shape[1] % tile == 0, "a chunk holds whole tiles"
    return tile, bitmap.shape[1], chunk.shape[1] // tile


def check_values(values: torch.Tensor, scales: torch.Tensor | None, offsets: torch.Tensor) -> torch.Tensor | None:
    """The scales that low-bit values have; None for floats, which come without, or with an empty tensor for them."""
    if values.dtype in FLOAT_VALUES:
        assert scales is None or not scales.numel(), "float values have no scales"
        return None
    assert values.shape[1:] == LOW_BIT_VALUES[values.dtype], "pairs of int8, or bytes of two 4-bit parts"
    assert scales is not None and scales.shape == offsets.shape, "low-bit values have a scale a tile"
    assert scales.dtype == torch.float32 and scales.is_contiguous(), "scales are float32 and contiguous"
    return scales


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
    scales: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    config: Tiles | None = None,
) -> Launch:
    """The launch behind `pack_rows`, by default in the configuration chosen for it."""
    scales = check_values(values, scales, offsets)
    if values.dtype.itemsize >= max(y.element_size(), 4):
        key = None  # every value is its own neighbour
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
        "STOCHASTIC": key is not None,
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
        scales,
        cursor,
        key,
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
    scales: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
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
        values: `(N, 2)` float32, float64, float16, bfloat16 or int8, or `(N,)` uint8 for 4 bits, written from
            `cursor[0]` on.
        cursor: `(1,)` int64, advanced by the number of kept coefficients.
        kind: activation applied to what is kept, one of `spectral_activation.KINDS`.
        scale: `(channels,)` scale of the activation, or None.
        channels: C; the channel of a position of the row is its remainder by it.
        scales: `(F, T)` float32, for low-bit values written at `[rows, t0:t0 + Tc]`: the largest part of what a tile
            keeps is 127, or 7 for 4 bits. NaN where a part is not finite. Else None or empty.
        key: 0-dimensional int32, key of the noise that rounds to either neighbour in the format; None rounds to the
            nearest, of two to the even one.
    """
    plan_pack_rows(
        y, length, threshold, rows, t0, bitmap, offsets, values, cursor, kind, scale, channels, scales, key
    ).run()


def plan_gather_rows(
    y: torch.Tensor,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    t0: int,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
    config: Tiles | None = None,
) -> Launch:
    """The launch behind `gather_rows`, by default in the configuration chosen for it."""
    scales = check_values(out, scales, offsets)
    tile, row_tiles, chunk_tiles = tile_geometry(bitmap, y)
    tiles = rows.shape[0] * chunk_tiles
    if config is None:
        config = GATHER_ROWS.choose(y.device, (y.dtype, out.dtype), (tiles, tile))
    block_tiles, num_warps = config.shape(tile, y.element_size())
    args = (y.contiguous(), rows, bitmap, offsets, out, scales, t0, chunk_tiles, row_tiles, tiles)
    meta = {"TILE": tile, "TILES": block_tiles, "num_warps": num_warps}
    return Launch(gather_rows_kernel, (ceil_div(tiles, block_tiles),), args, meta)


def gather_rows(
    y: torch.Tensor,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    t0: int,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Applies an existing pattern to a dense chunk: `out[offset + rank] = y` at the kept positions, rounded to nearest.

    Args:
        y: `(Fc, Tc * tile, 2)` real, dense chunk.
        bitmap: `(F, T, tile // 8)` uint8 pattern.
        offsets: `(F, T)` int32 pattern.
        rows: `(Fc,)` int64, distinct frequency rows.
        t0: tile of the row with which the chunk begins.
        out: `(N, 2)` float32, float64, float16, bfloat16 or int8, or `(N,)` uint8 for 4 bits, laid out as the
            pattern's values.
        scales: `(F, T)` float32, for low-bit values written at `[rows, t0:t0 + Tc]`; else None or empty.

    Returns:
        `out`.
    """
    plan_gather_rows(y, bitmap, offsets, rows, t0, out, scales).run()
    return out
