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
from .rebuild import rebuild
from .sign_bits import clear_outside, rectify
from .spectral_activation import spectral_activation, spectral_activation_backward
from .unpack import unpack_gradient_rows, unpack_planes, unpack_rows

__all__ = [
    "block_tables",
    "can_code",
    "can_pool",
    "clear_outside",
    "combine_kept",
    "complex_product",
    "decode_blocks",
    "encode_blocks",
    "gather_rows",
    "kernel_spectrum",
    "kernel_spectrum_adjoint",
    "kernel_spectrum_adjoint_sums",
    "pack_rows",
    "pool_maxima",
    "pool_maxima_again",
    "rebuild",
    "rectify",
    "spectral_activation",
    "spectral_activation_backward",
    "spread_maxima",
    "sum_kept",
    "unpack_gradient_rows",
    "unpack_planes",
    "unpack_rows",
]
