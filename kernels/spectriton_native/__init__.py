"""The primitives in C for CPUs: what moves kept coefficients, one pass over the memory each.

Sources are in ``csrc/``; :mod:`spectriton_native.library` compiles them on first use. Functions take float32 tensors
(stored values in any format) on the CPU, contiguous, and check nothing but that values are where offsets say.
"""

from spectriton_native._call import FORMATS
from spectriton_native.blocks import Coding, decode_blocks, encode_blocks
from spectriton_native.dense import (
    Pooling,
    channel_means,
    clear_outside,
    pool_maxima,
    pool_maxima_again,
    rebuild,
    rectify,
    rectify_again,
    spread_maxima,
)
from spectriton_native.fit import Classes, fit_blocks, plan_blocks
from spectriton_native.kept import Norm, combine_kept, norm_gradients, norm_planes, norm_statistics, sum_kept
from spectriton_native.library import Unavailable, why_unavailable
from spectriton_native.maps import expand_planes
from spectriton_native.mix import kernel_spectrum, kernel_spectrum_adjoint, mix, mix_grad_weights, most_channels
from spectriton_native.rows import (
    Part,
    count_moduli,
    expand_rows,
    filled_rows,
    gather_channels,
    index_tiles,
    move_runs,
    quantise,
    store_rows,
    sum_rows,
    threshold_rows,
    tile_starts,
    unpack_gradient_rows,
)
from spectriton_native.transform import (
    LARGEST_SIDE,
    BlockPooling,
    Packed,
    Plan,
    gather_maps,
    gather_packed_maps,
    rows_of_maps,
    unpack_maps,
    unpack_rows_of_maps,
)

__all__ = [
    "FORMATS",
    "LARGEST_SIDE",
    "BlockPooling",
    "Classes",
    "Coding",
    "Norm",
    "Packed",
    "Part",
    "Plan",
    "Pooling",
    "Unavailable",
    "channel_means",
    "clear_outside",
    "combine_kept",
    "count_moduli",
    "decode_blocks",
    "encode_blocks",
    "expand_planes",
    "expand_rows",
    "filled_rows",
    "fit_blocks",
    "gather_channels",
    "gather_maps",
    "gather_packed_maps",
    "index_tiles",
    "kernel_spectrum",
    "kernel_spectrum_adjoint",
    "mix",
    "mix_grad_weights",
    "most_channels",
    "move_runs",
    "norm_gradients",
    "norm_planes",
    "norm_statistics",
    "plan_blocks",
    "pool_maxima",
    "pool_maxima_again",
    "quantise",
    "rebuild",
    "rectify",
    "rectify_again",
    "rows_of_maps",
    "spread_maxima",
    "store_rows",
    "sum_kept",
    "sum_rows",
    "threshold_rows",
    "tile_starts",
    "unpack_gradient_rows",
    "unpack_maps",
    "unpack_rows_of_maps",
    "why_unavailable",
]
