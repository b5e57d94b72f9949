"""Every primitive in plain PyTorch: the CPU path, and what the Triton kernels are held against.

On the CPU a few inner steps go through NumPy, which shares the memory and is several times faster at scanning bits and
at moduli. The same code runs on a GPU with torch alone.
"""

from spectriton.reference.channel_mix import channel_mix
from spectriton.reference.codes import pack_codes, unpack_codes
from spectriton.reference.complex_product import complex_product
from spectriton.reference.kernel_spectrum import (
    complex_kernel_spectrum,
    complex_kernel_spectrum_adjoint,
    kernel_spectrum,
    kernel_spectrum_adjoint,
    taps_matrix,
    taps_of_matrix,
)
from spectriton.reference.pack import (
    bins_of_moduli,
    compact_rows,
    count_moduli,
    gather_rows,
    modulus,
    pack_rows,
    quantise,
    reorder,
    to_format,
)
from spectriton.reference.pattern import RowPattern, TileIndex, row_pattern, tile_starts
from spectriton.reference.rounding import ROUNDINGS, copy_in_range, make_seed, seed_of, stochastic_cast, uniform
from spectriton.reference.spectral_activation import (
    ACTIVATIONS,
    activate,
    activate_backward,
    spectral_activation,
    spectral_activation_backward,
)
from spectriton.reference.spectral_batch_norm import spectral_batch_norm
from spectriton.reference.spectral_pool2d import spectral_pool2d
from spectriton.reference.store_rows import store_rows
from spectriton.reference.transform import (
    by_products,
    maps_of_half,
    planes_innermost,
    rows_of_half,
    rows_of_maps,
    spread_rows,
)
from spectriton.reference.unpack import gather_maps, unpack_maps, unpack_planes, unpack_rows

__all__ = [
    "ACTIVATIONS",
    "ROUNDINGS",
    "RowPattern",
    "TileIndex",
    "activate",
    "activate_backward",
    "bins_of_moduli",
    "by_products",
    "channel_mix",
    "compact_rows",
    "complex_kernel_spectrum",
    "complex_kernel_spectrum_adjoint",
    "complex_product",
    "copy_in_range",
    "count_moduli",
    "gather_maps",
    "gather_rows",
    "kernel_spectrum",
    "kernel_spectrum_adjoint",
    "make_seed",
    "maps_of_half",
    "modulus",
    "pack_codes",
    "pack_rows",
    "planes_innermost",
    "quantise",
    "reorder",
    "row_pattern",
    "rows_of_half",
    "rows_of_maps",
    "seed_of",
    "spectral_activation",
    "spectral_activation_backward",
    "spectral_batch_norm",
    "spectral_pool2d",
    "spread_rows",
    "stochastic_cast",
    "store_rows",
    "taps_matrix",
    "taps_of_matrix",
    "tile_starts",
    "to_format",
    "uniform",
    "unpack_codes",
    "unpack_maps",
    "unpack_planes",
    "unpack_rows",
]
