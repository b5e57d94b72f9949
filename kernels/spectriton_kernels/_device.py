"""Device functions that several kernels share: bitmaps, divisions, conversions."""

import triton
import triton.language as tl


@triton.jit
def divide(b_i, n):
    """`b_i // n` for int32 from 0 to 2**20 and a positive `n`, several times cheaper than integers are divided.

    The quotient lies at least half of `1 / n` from any integer, which float32 resolves up to there.
    """
    return ((b_i.to(tl.float32) + 0.5) * (1.0 / n)).to(tl.int32)


@triton.jit
def load_kept(bitmap_ptr, i_tile, m_tile, TILE: tl.constexpr):
    """1 where a coefficient of some tiles is kept, else 0: (TILES, TILE) int32.

    Args:
        bitmap_ptr: (F * T, TILE // 8) uint8.
        i_tile: (TILES,) int64 number of each tile, row * T + tile.
        m_tile: (TILES,) which of them exist.
        TILE: coefficients of a tile.
    """
    p_byte = bitmap_ptr + i_tile[:, None] * (TILE // 8) + tl.arange(0, TILE // 8)[None, :]
    b_byte = tl.load(p_byte, mask=m_tile[:, None] & (tl.arange(0, TILE // 8) < TILE)[None, :], other=0).to(tl.int32)
    return tl.reshape((b_byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, [i_tile.shape[0], TILE])


@triton.jit
def store_kept(bitmap_ptr, i_tile, m_tile, b_kept, TILE: tl.constexpr):
    """Writes bitmaps from 1 and 0 (TILES, TILE) int32, least significant bit first; arguments as `load_kept`."""
    b_bits = tl.reshape(b_kept, [i_tile.shape[0], TILE // 8, 8]) << tl.arange(0, 8)[None, None, :]
    b_byte = tl.sum(b_bits, axis=2).to(tl.uint8)
    p_byte = bitmap_ptr + i_tile[:, None] * (TILE // 8) + tl.arange(0, TILE // 8)[None, :]
    tl.store(p_byte, b_byte, mask=m_tile[:, None] & (tl.arange(0, TILE // 8) < TILE)[None, :])


@triton.jit
def convert(b_x, ptr):
    """`b_x` in the dtype behind `ptr`."""
    if b_x.dtype == tl.float64:
        # by way of float32: not every target (nor the interpreter) narrows float64 to sixteen bits in one step
        if ptr.dtype.element_ty.primitive_bitwidth < 32:
            b_x = b_x.to(tl.float32)
    return b_x.to(ptr.dtype.element_ty)
