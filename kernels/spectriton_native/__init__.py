"""The primitives in C for CPUs: what moves kept coefficients, one pass over the memory each.

Sources are in ``csrc/``; :mod:`spectriton_native.library` compiles them on first use. Functions take float32 tensors
(stored values in any format) on the CPU, contiguous, and check nothing but that values are where offsets say.
"""

from spectriton_native.across import pool_across, spread_across
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
from spectriton_native.kept import combine_kept, sum_kept
from spectriton_native.library import Unavailable, why_unavailable
from spectriton_native.maps import expand_parts, expand_planes, gather_parts, rows_of_parts
from spectriton_native.rows import (
    Part,
    count_moduli,
    expand_rows,
    gather_channels,
    gather_rows,
    index_tiles,
    move_runs,
    place_values,
    quantise,
    read_rows,
    sum_rows,
    threshold_rows,
    tile_starts,
)
from spectriton_native.transform import LARGEST_SIDE, maps_of_parts, parts_of_maps

__all__ = [
    "LARGEST_SIDE",
    "Classes",
    "Coding",
    "Part",
    "Pooling",
    "Unavailable",
    "channel_means",
    "clear_outside",
    "combine_kept",
    "count_moduli",
    "decode_blocks",
    "encode_blocks",
    "expand_parts",
    "expand_planes",
    "expand_rows",
    "fit_blocks",
    "gather_channels",
    "gather_parts",
    "gather_rows",
    "index_tiles",
    "maps_of_parts",
    "move_runs",
    "parts_of_maps",
    "place_values",
    "plan_blocks",
    "pool_across",
    "pool_maxima",
    "pool_maxima_again",
    "quantise",
    "read_rows",
    "rebuild",
    "rectify",
    "rectify_again",
    "rows_of_parts",
    "spread_across",
    "spread_maxima",
    "sum_kept",
    "sum_rows",
    "threshold_rows",
    "tile_starts",
    "why_unavailable",
]
