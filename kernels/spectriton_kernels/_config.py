"""Fixed block sizes and warp counts, as functions of shapes and dtypes only (no GPU is asked)."""

import torch

# Elementwise kernels: bytes of one operand a program reads. 8 KiB are four 128-bit loads for each of 128 threads.
STREAM_BYTES = 8192

# Row kernels: bytes of one operand's two-dimensional block.
ROW_BYTES = 8192
# Shorter rows are gathered into longer ones where a kernel can, and the columns it then takes at a time.
ROW_MIN_COLUMNS = 64
COLUMN_SUM_BLOCK = 128

# unpack_planes: planes and half-spectrum positions a program transposes at once.
PLANES_BLOCK = 32
POSITIONS_BLOCK = 32
PLANES_WARPS = 4

# kernel_spectrum: complex weights of one (frequencies, inputs, outputs) block.
SPECTRUM_BLOCK = 2048
SPECTRUM_WARPS = 4

# kernel_spectrum_adjoint: real accumulators of one (taps, inputs, outputs) block, the number of
# programs wanted before the frequencies are no longer split, and the fewest frequencies worth a program.
ADJOINT_BLOCK = 4096
ADJOINT_PROGRAMS = 1024
ADJOINT_MIN_FREQUENCIES = 32


def ceil_div(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below `n` (1 for `n <= 1`)."""
    return 1 << max(n - 1, 0).bit_length()


def stream_block(dtype: torch.dtype) -> int:
    """Real elements a program of an elementwise kernel handles."""
    return STREAM_BYTES // dtype.itemsize


def stream_warps(dtype: torch.dtype) -> int:
    """Warps of a program that handles `STREAM_BYTES` or a row block: more for float64, whose maths fill registers."""
    return 8 if dtype == torch.float64 else 4


def row_block(columns: int, itemsize: int, most_columns: int | None = None) -> tuple[int, int]:
    """(rows, columns) of a two-dimensional block of real elements of `itemsize` bytes over rows of length `columns`."""
    total = ROW_BYTES // itemsize
    block_columns = min(next_power_of_2(columns), most_columns or total)
    return total // block_columns, block_columns


def tile_warps(tile: int, itemsize: int) -> int:
    """Warps for a program that handles one tile of dense data: 64 bytes a thread (128 or less in small tiles)."""
    return max(1, min(8, tile * 2 * itemsize // 2048))


def spectrum_block(frequencies: int, inputs: int, outputs: int, itemsize: int) -> tuple[int, int, int]:
    """(frequencies, inputs, outputs) of a block of `kernel_spectrum` that accumulates in `itemsize` bytes."""
    total = SPECTRUM_BLOCK * 4 // itemsize
    block_outputs = min(next_power_of_2(outputs), 32)
    block_inputs = min(next_power_of_2(inputs), 8)
    block_frequencies = min(next_power_of_2(frequencies), total // (block_outputs * block_inputs), 128)
    return block_frequencies, block_inputs, block_outputs


def adjoint_block(taps: int, inputs: int, outputs: int, itemsize: int) -> tuple[int, int, int]:
    """(taps, inputs, outputs) of a block of `kernel_spectrum_adjoint` that accumulates in `itemsize` bytes."""
    total = ADJOINT_BLOCK * 4 // itemsize
    block_taps = min(next_power_of_2(taps), 16)
    block_outputs = min(next_power_of_2(outputs), 32)
    block_inputs = min(next_power_of_2(inputs), max(total // (block_taps * block_outputs), 1))
    return block_taps, block_inputs, block_outputs


def adjoint_splits(programs: int, frequencies: int) -> int:
    """How many programs share the frequencies of one block of taps (1: they add straight to the result)."""
    wanted = ceil_div(ADJOINT_PROGRAMS, programs)
    return max(1, min(wanted, frequencies // ADJOINT_MIN_FREQUENCIES))
