"""Device functions that several kernels share: bitmaps and conversions."""

import triton
import triton.language as tl


@triton.jit
def load_kept(bitmap_ptr, i_tile, TILE: tl.constexpr):
    """1 where a coefficient of a tile is kept, else 0: (TILE,) int32.

    Args:
        bitmap_ptr: (F * T, TILE // 8) uint8.
        i_tile: int64 number of the tile, row * T + tile.
        TILE: coefficients of a tile.
    """
    b_byte = tl.load(bitmap_ptr + i_tile * (TILE // 8) + tl.arange(0, TILE // 8)).to(tl.int32)
    return tl.reshape((b_byte[:, None] >> tl.arange(0, 8)[None, :]) & 1, [TILE])


@triton.jit
def store_kept(bitmap_ptr, i_tile, b_kept, TILE: tl.constexpr):
    """Writes a tile's bitmap from 1 and 0 (TILE,) int32, least significant bit first; arguments as `load_kept`."""
    b_bits = tl.reshape(b_kept, [TILE // 8, 8]) << tl.arange(0, 8)[None, :]
    b_byte = tl.sum(b_bits, axis=1).to(tl.uint8)
    tl.store(bitmap_ptr + i_tile * (TILE // 8) + tl.arange(0, TILE // 8), b_byte)


@triton.jit
def convert(b_x, ptr):
    """`b_x` in the dtype behind `ptr`."""
    if b_x.dtype == tl.float64:
        # by way of float32: not every target (nor the interpreter) narrows float64 to sixteen bits in one step
        if ptr.dtype.element_ty.primitive_bitwidth < 32:
            b_x = b_x.to(tl.float32)
    return b_x.to(ptr.dtype.element_ty)
