"""Triton kernels of spectriton and the plain functions that launch them.

One module a kernel family. Nothing here knows of autograd or validates what a user passes (`spectriton.ops` does), asks
for a GPU at import, or imports `spectriton`.
"""

from .block_codec import can_code, decode_blocks, encode_blocks
from .complex_product import complex_product
from .kernel_spectrum import kernel_spectrum, kernel_spectrum_adjoint
from .pack import gather_rows, pack_rows
from .spectral_activation import spectral_activation, spectral_activation_backward
from .unpack import unpack_planes, unpack_rows

__all__ = [
    "can_code",
    "complex_product",
    "decode_blocks",
    "encode_blocks",
    "gather_rows",
    "kernel_spectrum",
    "kernel_spectrum_adjoint",
    "pack_rows",
    "spectral_activation",
    "spectral_activation_backward",
    "unpack_planes",
    "unpack_rows",
]
