"""Triton kernels of spectriton and the plain functions that launch them.

One module a kernel family. Nothing here knows of autograd or validates what a user passes (`spectriton.ops` does), asks
for a GPU at import, or imports `spectriton`.
"""

from .block_codec import block_tables, can_code, decode_blocks, encode_blocks
from .complex_product import complex_product
from .kept import combine_kept, sum_kept
from .kernel_spectrum import kernel_spectrum, kernel_spectrum_adjoint, kernel_spectrum_adjoint_sums
from .max_pool import can_pool, pool_maxima, pool_maxima_again, spread_maxima
from .pack import gather_rows, pack_rows
from .planes import gather_planes, rows_of_half
from .pool_planes import can_pool_planes, pool_planes, spread_planes
from .rebuild import rebuild
from .sign_bits import clear_outside, rectify
from .spectral_activation import spectral_activation, spectral_activation_backward
from .unpack import unpack_gradient_rows, unpack_planes, unpack_rows

__all__ = [
    "block_tables",
    "can_code",
    "can_pool",
    "can_pool_planes",
    "clear_outside",
    "combine_kept",
    "complex_product",
    "decode_blocks",
    "encode_blocks",
    "gather_planes",
    "gather_rows",
    "kernel_spectrum",
    "kernel_spectrum_adjoint",
    "kernel_spectrum_adjoint_sums",
    "pack_rows",
    "pool_maxima",
    "pool_maxima_again",
    "pool_planes",
    "rebuild",
    "rectify",
    "rows_of_half",
    "spectral_activation",
    "spectral_activation_backward",
    "spread_maxima",
    "spread_planes",
    "sum_kept",
    "unpack_gradient_rows",
    "unpack_planes",
    "unpack_rows",
]
