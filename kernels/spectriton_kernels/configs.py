"""What can be tuned of each kernel: block sizes and warps, a small space of them, and the fixed choice.

A planner asks the `Tunable` of its kernel for a configuration. Without a lookup (`set_lookup`), and where that knows
nothing, the answer is the heuristic: a function of shapes and dtypes alone, for which no GPU is asked. Answers are
remembered by exact sizes, so that a launch costs one look into a dictionary.

Every configuration of a space works for every shape and dtype of its kernel, builds without spills for all targets
(`spectriton_kernels.build --all`), and gives results of the same accuracy. None has `num_stages`: no kernel has a loop
that Triton pipelines. A space goes from small blocks to large ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeAlias, TypeVar

import torch
import triton

Dtypes: TypeAlias = tuple[torch.dtype, ...]
Sizes: TypeAlias = tuple[int, ...]
# (device, kernel, dtypes, exact sizes) to a configuration of the kernel's space, or None
Lookup: TypeAlias = Callable[[torch.device, str, Dtypes, Sizes], Any]
C = TypeVar("C")

TRITON_VERSION: str = triton.__version__

# Programs that keep any GPU busy: before there are fewer, blocks are made smaller or work is split further.
ENOUGH_PROGRAMS = 1024

# Elementwise kernels over rows: shorter rows than this are gathered into longer ones where a kernel can, and the real
# columns it then takes at a time.
ROW_MIN_COLUMNS = 64
COLUMN_SUM_BLOCK = 128
# and the least bytes of a row at a time.
ROW_BYTES = 512

# Maths in float64 fill registers.
_MOST_DOUBLE_BYTES = 64

# kernel_spectrum_adjoint: the fewest frequencies worth a program.
ADJOINT_MIN_FREQUENCIES = 32


@dataclass(frozen=True)
class Stream:
    """Elementwise kernels.

    Attributes:
        block_bytes: bytes of one operand that a program handles.
        num_warps: its warps.
    """

    block_bytes: int
    num_warps: int

    def row_block(self, columns: int, itemsize: int, most_columns: int | None = None) -> tuple[int, int]:
        """(rows, columns) of a two-dimensional block of reals of `itemsize` bytes over rows of length `columns`.

        Blocks are as wide as they can be without leaving more than an eighth of the work beyond the end of the rows,
        and not narrower than `ROW_BYTES`.
        """
        total = self.block_bytes // itemsize
        block = min(next_power_of_2(columns), most_columns or total)
        while block * itemsize > ROW_BYTES and 8 * block * ceil_div(columns, block) > 9 * columns:
            block //= 2
        return total // block, block


@dataclass(frozen=True)
class Tiles:
    """Kernels over the tiles of a packed spectrum.

    Attributes:
        block_bytes: bytes of dense data that a program handles, if that is a tile or more.
        thread_bytes: bytes of it that a thread handles, if that is not more than `_MOST_DOUBLE_BYTES` of 64-bit data.

    Data of 16 bits count as 32, which they are in registers.
    """

    block_bytes: int
    thread_bytes: int

    def shape(self, tile: int, itemsize: int) -> tuple[int, int]:
        """(tiles, warps) of a program for tiles of `tile` complex numbers of two `itemsize` bytes."""
        tile_bytes = 2 * tile * max(itemsize, 4)
        tiles = max(1, self.block_bytes // tile_bytes)
        thread_bytes = min(self.thread_bytes, _MOST_DOUBLE_BYTES) if itemsize == 8 else self.thread_bytes
        return tiles, max(1, min(16, tiles * tile_bytes // (32 * thread_bytes)))

    def shape_in_row(self, tile: int, itemsize: int, row_tiles: int) -> tuple[int, int]:
        """The same for programs that stay within rows of so many tiles: a wider block would be of no use."""
        tiles, warps = self.shape(tile, itemsize)
        while tiles > 1 and tiles // 2 >= row_tiles:
            tiles, warps = tiles // 2, max(1, warps // 2)
        return tiles, warps


@dataclass(frozen=True)
class Planes:
    """`unpack_planes`, `rows_of_half` and `gather_planes`.

    Attributes:
        planes, positions: planes and positions of the half spectrum that a program transposes at once.
        num_warps: its warps.
    """

    planes: int
    positions: int
    num_warps: int


@dataclass(frozen=True)
class Spectrum:
    """`kernel_spectrum`.

    Attributes:
        block_bytes: bytes of the real parts of the complex weights that a program accumulates.
        inputs, outputs: most input and output channels of a block; frequencies take the rest.
        num_warps: warps of a program.
    """

    block_bytes: int
    inputs: int
    outputs: int
    num_warps: int

    def shape(self, frequencies: int, inputs: int, outputs: int, itemsize: int) -> tuple[int, int, int]:
        """(frequencies, inputs, outputs) of a block that accumulates in `itemsize` bytes."""
        block_outputs = min(next_power_of_2(outputs), self.outputs)
        block_inputs = min(next_power_of_2(inputs), self.inputs)
        rest = self.block_bytes // itemsize // (block_outputs * block_inputs)
        return min(next_power_of_2(frequencies), max(rest, 1), 128), block_inputs, block_outputs


@dataclass(frozen=True)
class Adjoint:
    """`kernel_spectrum_adjoint`.

    Attributes:
        block_bytes: bytes of a program's accumulators.
        taps, outputs: most taps and output channels of a block; input channels take the rest.
        num_warps: warps of a program.
    """

    block_bytes: int
    taps: int
    outputs: int
    num_warps: int

    def shape(self, taps: int, inputs: int, outputs: int, itemsize: int) -> tuple[int, int, int]:
        """(taps, inputs, outputs) of a block that accumulates in `itemsize` bytes."""
        block_taps = min(next_power_of_2(taps), self.taps)
        block_outputs = min(next_power_of_2(outputs), self.outputs)
        rest = self.block_bytes // itemsize // (block_taps * block_outputs)
        return block_taps, min(next_power_of_2(inputs), max(rest, 1)), block_outputs


@dataclass(frozen=True)
class Blocks:
    """The kernels of the block codec.

    Attributes:
        values: numbers of the blocks that a program handles, those that fill up its matrices included, if that is a
            block of a slice or more.
        thread_values: numbers that a thread handles.
    """

    values: int
    thread_values: int

    def shape(self, block_values: int, blocks: int) -> tuple[int, int]:
        """(blocks, warps) of a program, for `blocks` of `block_values` numbers, a power of two."""
        count = min(next_power_of_2(blocks), max(1, self.values // block_values))
        return count, max(1, min(8, count * block_values // (32 * self.thread_values)))


@dataclass(frozen=True, eq=False)
class Tunable(Generic[C]):
    """A kernel with its configurations.

    Attributes:
        kernel: its name, that of the jitted function without `_kernel`.
        sizes: what the numbers of a shape mean.
        space: its configurations.
        heuristic: the fixed choice for dtypes and sizes, one of the space.
    """

    kernel: str
    sizes: tuple[str, ...]
    space: tuple[C, ...]
    heuristic: Callable[[Dtypes, Sizes], C]

    def choose(self, device: torch.device, dtypes: Dtypes, sizes: Sizes) -> C:
        """The configuration for a launch."""
        return _choose(self, device, dtypes, sizes)


_lookup: Lookup | None = None


def set_lookup(lookup: Lookup | None) -> None:
    """Sets what knows better than the heuristics (None: nothing does), and forgets earlier answers."""
    global _lookup
    _lookup = lookup
    _choose.cache_clear()


@lru_cache(maxsize=4096)
def _choose(tunable: Tunable[Any], device: torch.device, dtypes: Dtypes, sizes: Sizes) -> Any:
    found = None if _lookup is None else _lookup(device, tunable.kernel, dtypes, sizes)
    return tunable.heuristic(dtypes, sizes) if found is None else found


def bucket(sizes: Sizes) -> Sizes:
    """Sizes rounded up to powers of two (0 stays): shapes of a bucket share a tuned configuration."""
    return tuple(next_power_of_2(size) if size else 0 for size in sizes)


def ceil_div(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below `n` (1 for `n <= 1`)."""
    return 1 << max(n - 1, 0).bit_length()


def adjoint_splits(programs: int, frequencies: int) -> int:
    """How many programs share the frequencies of one block of taps (1: they add straight to the result)."""
    wanted = ceil_div(ENOUGH_PROGRAMS, programs)
    return max(1, min(wanted, frequencies // ADJOINT_MIN_FREQUENCIES))


def rows_in_turn(rows: int, blocks: int, most: int) -> int:
    """How many rows of so many blocks a program takes one after the other: a power of two."""
    in_turn = 1
    while in_turn < most and ceil_div(rows, 2 * in_turn) * blocks >= ENOUGH_PROGRAMS:
        in_turn *= 2
    return in_turn


def _stream(dtypes: Dtypes, sizes: Sizes) -> Stream:
    # four 128-bit loads a thread; maths in float64 fill registers, so half of that
    return Stream(8192, 8 if dtypes[0] == torch.float64 else 4)


def _tiles(most_bytes: int, thread_bytes: int) -> Callable[[Dtypes, Sizes], Tiles]:
    def heuristic(dtypes: Dtypes, sizes: Sizes) -> Tiles:
        # dtypes are that of the dense side, which decides, and that of the values
        tiles, tile = sizes
        block_bytes = most_bytes
        while block_bytes > 2048 and tiles * 2 * tile * max(dtypes[0].itemsize, 4) < ENOUGH_PROGRAMS * block_bytes:
            block_bytes //= 2
        return Tiles(block_bytes, thread_bytes if block_bytes > 2048 else min(thread_bytes, 64))

    return heuristic


_STREAMS = tuple(
    Stream(*numbers) for numbers in ((2048, 2), (4096, 2), (4096, 4), (8192, 4), (8192, 8), (16384, 4), (16384, 8))
)
_ROW_STREAMS = tuple(config for config in _STREAMS if config != Stream(16384, 4))  # that one spills
# Prefix sums cost the fewer instructions a coefficient the more of them a thread has.
_TILES = tuple(
    Tiles(*numbers) for numbers in ((2048, 64), (4096, 64), (4096, 128), (8192, 64), (8192, 128), (16384, 128))
)

COMPLEX_PRODUCT = Tunable("complex_product", ("reals",), _STREAMS, _stream)
# how a column steps: 0 broadcast, 1 contiguous, 2 strided
COMPLEX_PRODUCT_BROADCAST = Tunable(
    "complex_product_broadcast", ("rows", "columns", "x step", "w step"), _ROW_STREAMS, _stream
)
# reals of a channel: 0 without a scale
SPECTRAL_ACTIVATION = Tunable("spectral_activation", ("reals", "reals of a channel"), _STREAMS, _stream)
SPECTRAL_ACTIVATION_BACKWARD = Tunable("spectral_activation_backward", ("reals",), _STREAMS, _stream)
SPECTRAL_ACTIVATION_SCALE_BACKWARD = Tunable(
    "spectral_activation_scale_backward",
    ("batch", "channels", "reals of a channel"),
    _ROW_STREAMS,
    _stream,
)
# packing has more to compute, and each program takes its room by an atomic add to one number
PACK_ROWS = Tunable("pack_rows", ("tiles", "tile"), _TILES, _tiles(8192, 128))
GATHER_ROWS = Tunable("gather_rows", ("tiles", "tile"), _TILES, _tiles(4096, 64))
UNPACK_ROWS = Tunable("unpack_rows", ("tiles", "tile"), _TILES, _tiles(4096, 64))
# The derivative for a scale takes many registers.
UNPACK_GRADIENT_ROWS = Tunable(
    "unpack_gradient_rows",
    ("tiles", "tile"),
    tuple(Tiles(*numbers) for numbers in ((1024, 32), (2048, 32), (4096, 32), (8192, 32))),
    _tiles(4096, 32),
)
SUM_KEPT = Tunable("sum_kept", ("tiles", "tile"), _TILES, _tiles(8192, 128))
COMBINE_KEPT = Tunable(
    "combine_kept",
    ("tiles", "tile"),
    tuple(Tiles(*numbers) for numbers in ((2048, 32), (4096, 32), (2048, 64), (4096, 64))),  # larger ones spill
    _tiles(4096, 64),
)
UNPACK_PLANES = Tunable(
    "unpack_planes",
    ("planes", "positions", "tile"),
    tuple(
        Planes(*numbers) for numbers in ((32, 16, 2), (32, 16, 4), (32, 32, 4), (32, 32, 8), (64, 32, 4), (32, 64, 8))
    ),
    lambda dtypes, sizes: Planes(32, 32, 4),
)
_FROM_HALF = tuple(
    Planes(*numbers) for numbers in ((32, 16, 2), (32, 16, 4), (32, 32, 4), (32, 32, 8), (64, 32, 8), (32, 64, 8))
)
ROWS_OF_HALF = Tunable("rows_of_half", ("planes", "positions"), _FROM_HALF, lambda dtypes, sizes: Planes(32, 32, 4))
GATHER_PLANES = Tunable(
    "gather_planes", ("planes", "positions", "tile"), _FROM_HALF, lambda dtypes, sizes: Planes(32, 32, 4)
)
_SPECTRUM_SIZES = ("frequencies", "groups", "inputs", "outputs", "taps")
KERNEL_SPECTRUM = Tunable(
    "kernel_spectrum",
    _SPECTRUM_SIZES,
    tuple(
        Spectrum(*numbers)
        for numbers in (
            (4096, 4, 32, 4),
            (8192, 4, 32, 4),
            (8192, 8, 32, 4),
            (8192, 8, 32, 8),
            (8192, 4, 64, 4),
        )
    ),
    lambda dtypes, sizes: Spectrum(8192, 8, 32, 4),
)
KERNEL_SPECTRUM_ADJOINT = Tunable(
    "kernel_spectrum_adjoint",
    _SPECTRUM_SIZES,
    tuple(
        Adjoint(*numbers)
        for numbers in (
            (8192, 4, 64, 4),
            (8192, 8, 64, 4),
            (8192, 16, 32, 4),
            (16384, 4, 64, 4),
            (16384, 8, 32, 4),
            (16384, 8, 64, 8),
            (16384, 16, 32, 4),
            (16384, 16, 32, 8),
        )
    ),
    lambda dtypes, sizes: Adjoint(16384, 16, 32, 4),
)

_BLOCK_SIZES = ("blocks", "components", "frequencies", "mix")
# With fewer values to a thread triton 3.7 spills registers when it encodes for sm_100.
_DECODED = tuple(Blocks(*numbers) for numbers in ((1024, 16), (2048, 16), (2048, 32), (4096, 16), (4096, 32)))
_ENCODED = tuple(Blocks(*numbers) for numbers in ((512, 32), (1024, 32), (2048, 32), (4096, 32)))
DECODE_BLOCKS = Tunable("decode_blocks", _BLOCK_SIZES, _DECODED, lambda dtypes, sizes: Blocks(4096, 32))
ENCODE_BLOCKS = Tunable("encode_blocks", _BLOCK_SIZES, _ENCODED, lambda dtypes, sizes: Blocks(4096, 32))

RECTIFY = Tunable("rectify", ("values",), _STREAMS, _stream)
# 32 values of 16 bits to a thread, and their bits, spill
CLEAR_OUTSIDE = Tunable("clear_outside", ("values",), tuple(c for c in _STREAMS if c != Stream(4096, 2)), _stream)
REBUILD = Tunable("rebuild", ("rows", "columns"), _STREAMS, _stream)
# Of the maxima, or of the maps for their gradient: rows and columns of memory, then the window.
_POOLED_SIZES = ("rows", "columns", "window rows", "window columns")
_POOLS = tuple(Stream(*numbers) for numbers in ((2048, 2), (2048, 4), (4096, 4), (4096, 8), (8192, 8)))
# Its loads do not wait for one another: the more values a thread has, the more registers they take at once.
POOL_MAXIMA = Tunable(
    "pool_maxima",
    _POOLED_SIZES,
    tuple(Stream(*numbers) for numbers in ((1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8))),
    lambda dtypes, sizes: Stream(2048, 4),
)
SPREAD_MAXIMA = Tunable("spread_maxima", _POOLED_SIZES, _POOLS, lambda dtypes, sizes: Stream(4096, 4))
# Of the results, or of the maps for their gradient: how many, then the window.
_PLANE_SIZES = ("values", "window rows", "window columns")
POOL_PLANES = Tunable("pool_planes", _PLANE_SIZES, _POOLS, lambda dtypes, sizes: Stream(4096, 4))
SPREAD_PLANES = Tunable("spread_planes", _PLANE_SIZES, _POOLS, lambda dtypes, sizes: Stream(4096, 4))

TUNABLES: dict[str, Tunable[Any]] = {
    tunable.kernel: tunable
    for tunable in (
        COMPLEX_PRODUCT,
        COMPLEX_PRODUCT_BROADCAST,
        SPECTRAL_ACTIVATION,
        SPECTRAL_ACTIVATION_BACKWARD,
        SPECTRAL_ACTIVATION_SCALE_BACKWARD,
        PACK_ROWS,
        GATHER_ROWS,
        UNPACK_ROWS,
        UNPACK_GRADIENT_ROWS,
        SUM_KEPT,
        COMBINE_KEPT,
        UNPACK_PLANES,
        ROWS_OF_HALF,
        GATHER_PLANES,
        KERNEL_SPECTRUM,
        KERNEL_SPECTRUM_ADJOINT,
        DECODE_BLOCKS,
        ENCODE_BLOCKS,
        RECTIFY,
        CLEAR_OUTSIDE,
        REBUILD,
        POOL_MAXIMA,
        SPREAD_MAXIMA,
        POOL_PLANES,
        SPREAD_PLANES,
    )
}
