"""Example launches of every kernel, for ahead-of-time builds.

Each example plans a launch on meta tensors, at a size and dtype that users have: dtypes, constexprs, block sizes and
what Triton specialises on (alignment, ones, None) are those of the real call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from ._launch import Launch
from .block_codec import plan_decode_blocks, plan_encode_blocks
from .complex_product import plan_complex_product
from .kept import plan_combine_kept, plan_sum_kept
from .kernel_spectrum import plan_kernel_spectrum, plan_kernel_spectrum_adjoint
from .max_pool import plan_pool_maxima, plan_spread_maxima
from .pack import LOW_BIT_VALUES, plan_gather_rows, plan_pack_rows
from .planes import plan_gather_planes, plan_rows_of_half
from .pool_planes import plan_pool_planes, plan_spread_planes
from .rebuild import plan_rebuild
from .sign_bits import plan_clear_outside, plan_rectify
from .spectral_activation import KINDS, plan_spectral_activation, plan_spectral_activation_backward
from .unpack import plan_unpack_gradient_rows, plan_unpack_planes, plan_unpack_rows

COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
SHORT_NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "int8",
    torch.uint8: "int4",
}

# A layer of 64 channels on 32 x 32 maps, 128 samples.
BATCH, CHANNELS, HEIGHT, WIDTH, HALF_WIDTH = 128, 64, 32, 32, 17
FREQUENCIES = 514
ROW = BATCH * CHANNELS
CHUNK = 256


@dataclass(frozen=True)
class Example:
    """A launch to build.

    Attributes:
        name: launcher and what is special about the call.
        plan: makes the launch (nothing is allocated, nothing runs) in a configuration of the kernel's space, or, given
            None, in the one chosen for it.
        wide_loads, wide_stores: 128-bit accesses to global memory are required.
        core: one of the few that stand for their kernel where building all would take too long.
    """

    name: str
    plan: Callable[[Any], Launch]
    wide_loads: bool = False
    wide_stores: bool = False
    core: bool = False


def _arrow(dtypes: tuple[torch.dtype, torch.dtype], word: str = "to") -> str:
    return f" {word} ".join(SHORT_NAMES[dtype] for dtype in dtypes)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _feature_map(dtype: torch.dtype) -> torch.Tensor:
    return _meta(BATCH, CHANNELS, HEIGHT, HALF_WIDTH, dtype=COMPLEX[dtype])


def _pattern(tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(bitmap, offsets)."""
    tiles = ROW // tile
    return (
        _meta(FREQUENCIES, tiles, tile // 8, dtype=torch.uint8),
        _meta(FREQUENCIES, tiles, dtype=torch.int32),
    )


def _values(dtype: torch.dtype, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(values, scales) of a quarter of the coefficients."""
    scales = _meta(*offsets.shape) if dtype in LOW_BIT_VALUES else None
    return _meta(FREQUENCIES * ROW // 4, *LOW_BIT_VALUES.get(dtype, (2,)), dtype=dtype), scales


def _rows() -> torch.Tensor:
    return _meta(CHUNK, dtype=torch.int64)


def _product(x: torch.Tensor, w: torch.Tensor, config: Any = None) -> Launch:
    return plan_complex_product(x, w, config=config)[0]


def _pack(
    dtype: torch.dtype = torch.float32,
    value_dtype: torch.dtype = torch.float32,
    kind: str = "tanh",
    tile: int = 1024,
    per_channel: bool = False,
    stochastic: bool = False,
    config: Any = None,
) -> Launch:
    bitmap, offsets = _pattern(tile)
    values, scales = _values(value_dtype, offsets)
    return plan_pack_rows(
        _meta(CHUNK, ROW, 2, dtype=dtype),
        ROW,
        _meta(CHANNELS) if per_channel else 0.5,
        _rows(),
        0,
        bitmap,
        offsets,
        values,
        _meta(1, dtype=torch.int64),
        kind,
        _meta(CHANNELS) if per_channel else None,
        CHANNELS,
        scales,
        _meta(dtype=torch.int32) if stochastic else None,
        config,
    )


def _gather(dtype: torch.dtype, value_dtype: torch.dtype, tile: int = 1024, config: Any = None) -> Launch:
    bitmap, offsets = _pattern(tile)
    out, scales = _values(value_dtype, offsets)
    return plan_gather_rows(_meta(CHUNK, ROW, 2, dtype=dtype), bitmap, offsets, _rows(), 0, out, scales, config)


def _unpack_rows(value_dtype: torch.dtype, dtype: torch.dtype, tile: int = 1024, config: Any = None) -> Launch:
    bitmap, offsets = _pattern(tile)
    values, scales = _values(value_dtype, offsets)
    out = _meta(CHUNK, ROW, 2, dtype=dtype)
    return plan_unpack_rows(values, scales, bitmap, offsets, _rows(), 0, ROW // tile, out, config)


def _unpack_gradient_rows(
    value_dtype: torch.dtype, dtype: torch.dtype, kind: str, scaled: bool, tile: int = 1024, config: Any = None
) -> Launch:
    bitmap, offsets = _pattern(tile)
    values, scales = _values(value_dtype, offsets)
    grad, out = _meta(FREQUENCIES * ROW // 4, 2, dtype=dtype), _meta(CHUNK, ROW, 2, dtype=dtype)
    scale = _meta(CHANNELS, dtype=dtype) if scaled else None
    return plan_unpack_gradient_rows(
        grad, values, scales, bitmap, offsets, _rows(), kind, scale, CHANNELS, out, config
    )[0]


def _sum_kept(
    value_dtype: torch.dtype, dtype: torch.dtype, of_gradients: bool, tile: int = 1024, config: Any = None
) -> Launch:
    bitmap, offsets = _pattern(tile)
    values, scales = _values(value_dtype, offsets)
    grad = _meta(FREQUENCIES * ROW // 4, 2, dtype=dtype) if of_gradients else None
    weight = None if of_gradients else _meta(FREQUENCIES, dtype=torch.float64)
    return plan_sum_kept(values, scales, bitmap, offsets, weight, grad, dtype, 1 << 25, config)[0]


def _combine_kept(value_dtype: torch.dtype, dtype: torch.dtype, tile: int = 1024, config: Any = None) -> Launch:
    bitmap, offsets = _pattern(tile)
    values, scales = _values(value_dtype, offsets)
    grad, weight = _meta(FREQUENCIES * ROW // 4, 2, dtype=dtype), _meta(FREQUENCIES, dtype=torch.float64)
    table = _meta(ROW, dtype=torch.float64)
    return plan_combine_kept(values, scales, grad, bitmap, offsets, weight, table, table, table, grad, config)


def _unpack_planes(value_dtype: torch.dtype, dtype: torch.dtype, row_scale: bool = False, config: Any = None) -> Launch:
    bitmap, offsets = _pattern(1024)
    values, scales = _values(value_dtype, offsets)
    out = _meta(2048, HEIGHT, HALF_WIDTH, 2, dtype=dtype)
    factors = _meta(FREQUENCIES) if row_scale else None
    grid = SimpleNamespace(source=_meta(HEIGHT * HALF_WIDTH, dtype=torch.int32))
    return plan_unpack_planes(values, scales, bitmap, offsets, grid, 0, 2, 2048, factors, out, config)


def _rows_of_half(dtype: torch.dtype, row_scale: bool = False, config: Any = None) -> Launch:
    half, out = _meta(2048, HEIGHT, HALF_WIDTH, 2, dtype=dtype), _meta(FREQUENCIES, 2048, 2, dtype=dtype)
    source = _meta(HEIGHT * HALF_WIDTH, dtype=torch.int32)
    grid = SimpleNamespace(height=HEIGHT, width=WIDTH, count=FREQUENCIES, source=source)
    return plan_rows_of_half(half, grid, _meta(FREQUENCIES, dtype=dtype) if row_scale else None, out, config)


def _gather_planes(dtype: torch.dtype, out_dtype: torch.dtype, tile: int = 1024, config: Any = None) -> Launch:
    bitmap, offsets = _pattern(tile)
    out, _ = _values(out_dtype, offsets)
    source = _meta(HEIGHT * HALF_WIDTH, dtype=torch.int32)
    grid = SimpleNamespace(height=HEIGHT, width=WIDTH, count=FREQUENCIES, source=source)
    half = _meta(2048, HEIGHT, HALF_WIDTH, 2, dtype=dtype)
    return plan_gather_planes(half, bitmap, offsets, grid, 0, _meta(FREQUENCIES, dtype=dtype), out, config)


def _spectrum(
    dtype: torch.dtype, out_dtype: torch.dtype, kernel: int, inputs: int, outputs: int, groups: int, config: Any = None
) -> Launch:
    weight = _meta(outputs, inputs // groups, kernel, kernel, dtype=dtype)
    basis = _meta(FREQUENCIES, kernel * kernel, 2, dtype=dtype)
    out = _meta(FREQUENCIES, groups, 2 * inputs // groups, 2 * outputs // groups, dtype=out_dtype)
    return plan_kernel_spectrum(weight, basis, groups, out, config)


def _adjoint(
    dtype: torch.dtype, grad_dtype: torch.dtype, kernel: int, inputs: int, outputs: int, groups: int, config: Any = None
) -> Launch:
    out = _meta(outputs, inputs // groups, kernel, kernel, dtype=dtype)
    basis = _meta(FREQUENCIES, kernel * kernel, 2, dtype=dtype)
    grad = _meta(FREQUENCIES, groups, 2 * inputs // groups, 2 * outputs // groups, dtype=grad_dtype)
    return plan_kernel_spectrum_adjoint(grad, basis, groups, out, config)[0]


def _layout(shape: tuple[int, ...], edge: int, mix: int) -> SimpleNamespace:
    """Of maps at one bit a value, whose size is a multiple of the edge of blocks."""
    batch, channels, height, width = shape
    grid = height // edge, width // edge
    return SimpleNamespace(
        shape=shape,
        edges=(edge, edge),
        grid=grid,
        mix=mix,
        record=channels * edge * edge // 8,
        blocks=batch * grid[0] * grid[1],
        components=channels,
    )


def _block_plan(layout: SimpleNamespace) -> SimpleNamespace:
    channels, frequencies = layout.components, layout.edges[0] * layout.edges[1]
    rows = _meta(channels * frequencies, dtype=torch.int64)
    change = SimpleNamespace(
        mean=_meta(channels),
        inverse=_meta(channels),
        scale=_meta(channels),
        basis=None if layout.mix == 1 else _meta(channels // layout.mix, layout.mix, layout.mix),
        dct=_meta(frequencies, frequencies),
    )
    deviation = _meta(channels * frequencies)
    return SimpleNamespace(change=change, width=rows, start=rows, deviation=deviation, encoding=None, decoding=None)


def _maps(dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool) -> torch.Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return _meta(*shape, dtype=dtype).to(memory_format=layout)


def _records(layout: SimpleNamespace) -> torch.Tensor:
    return _meta(layout.blocks, layout.record, dtype=torch.uint8)


def _decode_blocks(
    dtype: torch.dtype, shape: tuple[int, ...], edge: int, mix: int, channels_last: bool = False, config: Any = None
) -> Launch:
    layout = _layout(shape, edge, mix)
    out = _maps(dtype, shape, channels_last)
    return plan_decode_blocks(_records(layout), layout, _block_plan(layout), _meta(512), out, config)


def _encode_blocks(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    edge: int,
    mix: int,
    channels_last: bool = False,
    stochastic: bool = False,
    config: Any = None,
) -> Launch:
    layout = _layout(shape, edge, mix)
    x, key = _maps(dtype, shape, channels_last), _meta(dtype=torch.int32) if stochastic else None
    return plan_encode_blocks(x, layout, _block_plan(layout), _meta(512), _meta(9), 0.5, key, _records(layout), config)[
        0
    ]


def _bits_of(x: torch.Tensor) -> torch.Tensor:
    return _meta(x.numel() // 8, dtype=torch.uint8)


def _rectify(dtype: torch.dtype, limit: float, config: Any = None) -> Launch:
    x = _meta(BATCH * CHANNELS * HEIGHT * WIDTH, dtype=dtype)
    return plan_rectify(x, limit, x, _bits_of(x), config)


def _clear_outside(dtype: torch.dtype, config: Any = None) -> Launch:
    x = _meta(BATCH * CHANNELS * HEIGHT * WIDTH, dtype=dtype)
    return plan_clear_outside(x, _bits_of(x), x, config)


def _rebuild(dtype: torch.dtype, norm: bool, channels_last: bool, config: Any = None) -> Launch:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = _meta(BATCH, CHANNELS, HEIGHT, WIDTH, dtype=dtype).to(memory_format=layout)
    statistics = tuple(_meta(CHANNELS) if norm else None for _ in range(4))
    return plan_rebuild(x, statistics, None, _bits_of(x), channels_last, x, config)


def _pool(name: str, dtype: torch.dtype, edge: int, channels_last: bool, config: Any = None) -> Launch:
    """Windows of 2x2, or of 3x3 that overlap."""
    padding = edge - 2
    window = SimpleNamespace(
        kernel=(edge, edge), stride=(2, 2), padding=(padding, padding), dilation=(1, 1), bits=2 if edge == 2 else 4
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = _meta(BATCH, CHANNELS, HEIGHT, WIDTH, dtype=dtype).to(memory_format=layout)
    y = _meta(BATCH, CHANNELS, HEIGHT // 2, WIDTH // 2, dtype=dtype).to(memory_format=layout)
    codes = _meta(y.numel() * window.bits // 8, dtype=torch.uint8)
    if name == "spread_maxima":
        return plan_spread_maxima(y, window, channels_last, codes, x, config)
    return plan_pool_maxima(x, window, channels_last, y, codes, name == "pool_maxima again", config)


def _planes(name: str, dtype: torch.dtype, edge: int, stride: int, norm: bool = True, config: Any = None) -> Launch:
    """With ReLU, and for `norm` a batch norm before it."""
    bits = 1 if edge == 1 else 2 if edge == 2 else 4
    windows = SimpleNamespace(kernel=[edge, edge], stride=[stride, stride], bits=bits, margin=0)
    maps = _meta(2048, HEIGHT, WIDTH, dtype=dtype)
    results = _meta(2048, *((n - edge) // stride + 1 for n in (HEIGHT, WIDTH)), dtype=dtype)
    codes = None if edge == 1 else _meta(results.numel() * bits // 8, dtype=torch.uint8)
    signs = _bits_of(results)
    if name == "spread_planes":
        return plan_spread_planes(results, windows, codes, signs, maps, config)
    affine = (_meta(2048, dtype=dtype), _meta(2048, dtype=dtype)) if norm else None
    return plan_pool_planes(maps, windows, results, codes, signs, affine, True, config)


# The few examples that stand for their kernels where building all of them for every target would take too long.
CORE = frozenset(
    {
        "complex_product fp32",
        "complex_product fp32 (C, 1, 1)",
        "spectral_activation fp32 asinh scale maps",
        "spectral_activation_backward fp32 tanh",
        "spectral_activation_backward fp64 tanh scale rows",
        "pack_rows fp64 to fp64 tanh",
        "pack_rows bf16 to bf16 tanh",
        "pack_rows fp32 to int8 tanh stochastic",
        "gather_rows fp32",
        "unpack_rows fp32 to fp32",
        "unpack_gradient_rows fp32 to fp32 tanh scale tile 32",
        "sum_kept fp32 to fp32 gradients",
        "combine_kept fp32 to fp32",
        "unpack_planes fp32 to fp32",
        "unpack_planes int4 to fp32",
        "rows_of_half fp32 row_scale",
        "gather_planes fp32 to fp32",
        "kernel_spectrum fp32 to bf16 3x3",
        "kernel_spectrum_adjoint fp32 from fp32 3x3",
        "decode_blocks fp32 64 channels 8x8",
        "encode_blocks fp32 64 channels 8x8",
        "rectify bf16",
        "clear_outside bf16",
        "rebuild bf16",
        "pool_maxima bf16 3x3",
        "spread_maxima bf16 3x3",
        "pool_planes fp32 2x2",
        "spread_planes fp32 2x2",
        "decode_blocks bf16 16 channels 4x4",
        "encode_blocks bf16 16 channels 4x4",
    }
)


def examples() -> list[Example]:
    """Every kernel in the configurations that matter."""
    single, double, half, brain = torch.float32, torch.float64, torch.float16, torch.bfloat16
    bytes_, nibbles = torch.int8, torch.uint8
    found: list[Example] = []

    def add(name: str, plan: Callable[..., Launch], *args: object, loads: bool = False, stores: bool = False) -> None:
        found.append(Example(name, lambda config: plan(*args, config=config), loads, stores, name in CORE))

    def add_stream(name: str, plan: Callable[..., tuple[Any, ...]], *args: object) -> None:
        # these planners return (launch, what it fills, ..), and read and write everything in wide accesses
        add(name, lambda *args, config: plan(*args, config=config)[0], *args, loads=True, stores=True)

    for dtype in (single, double):
        short = SHORT_NAMES[dtype]
        x, scale = _feature_map(dtype), _meta(CHANNELS, dtype=dtype)
        rows = _meta(CHUNK * BATCH, CHANNELS, dtype=COMPLEX[dtype])
        add_stream(f"complex_product {short}", plan_complex_product, x, x, False)
        add_stream(f"complex_product {short} conj", plan_complex_product, x, x, True)
        for name, w in (("(C, 1, 1)", x[0, :, :1, :1]), ("(C, H, Wh)", x[0]), ("transposed", x.mT.contiguous().mT)):
            add(f"complex_product {short} {name}", _product, x, w)
        for kind in KINDS:
            add_stream(f"spectral_activation {short} {kind}", plan_spectral_activation, x, kind)
            add_stream(f"spectral_activation_backward {short} {kind}", plan_spectral_activation_backward, x, x, kind)
        for name, z, kind in (("maps", x, "asinh"), ("maps", x, "atan"), ("maps", x, "tanh"), ("rows", rows, "tanh")):
            suffix = f"{short} {kind} scale {name}"
            add_stream(f"spectral_activation {suffix}", plan_spectral_activation, z, kind, scale)
            add_stream(f"spectral_activation_backward {suffix}", plan_spectral_activation_backward, z, z, kind, scale)
    large = _meta(2**31, dtype=torch.complex64)  # lengths that need 64 bits
    add_stream("complex_product fp32 large", plan_complex_product, large, large)
    add_stream("spectral_activation fp32 tanh large", plan_spectral_activation, large, "tanh")

    for pair in ((single, single), (single, half), (single, brain), (brain, brain), (double, double)):
        add(f"pack_rows {_arrow(pair)} tanh", _pack, *pair, loads=True)
    add("pack_rows fp32 to fp32 identity", _pack, single, single, "identity", loads=True)
    add("pack_rows fp32 to fp32 atan", _pack, single, single, "atan", loads=True)
    for tile in (32, 64, 256):
        add(f"pack_rows fp32 to fp32 tanh tile {tile}", _pack, single, single, "tanh", tile, loads=True)
    add("pack_rows fp32 to fp32 tanh per channel", _pack, single, single, "tanh", 1024, True, loads=True)
    for pair in ((single, bytes_), (single, nibbles), (double, bytes_)):
        add(f"pack_rows {_arrow(pair)} tanh", _pack, *pair, loads=True)
    add("pack_rows fp32 to int8 tanh tile 32", _pack, single, bytes_, "tanh", 32, loads=True)
    for pair in ((single, bytes_), (single, nibbles), (single, half), (double, brain)):
        add(f"pack_rows {_arrow(pair)} tanh stochastic", _pack, *pair, "tanh", 1024, False, True, loads=True)
    for dtype in (single, double, half, brain):
        add(f"gather_rows {SHORT_NAMES[dtype]}", _gather, dtype, dtype, loads=True)
    add("gather_rows fp32 tile 32", _gather, single, single, 32, loads=True)
    for pair in ((single, bytes_), (single, nibbles), (double, bytes_)):
        add(f"gather_rows {_arrow(pair)}", _gather, *pair, loads=True)
    for pair in (
        *((single, single), (double, double), (brain, brain), (half, single), (single, brain)),
        *((bytes_, single), (nibbles, single), (bytes_, double)),
    ):
        add(f"unpack_rows {_arrow(pair)}", _unpack_rows, *pair, stores=True)
    for tile in (32, 64, 256):
        add(f"unpack_rows fp32 to fp32 tile {tile}", _unpack_rows, single, single, tile, stores=True)
    add("unpack_rows int8 to fp32 tile 32", _unpack_rows, bytes_, single, 32, stores=True)
    for kind in KINDS[1:]:
        for scaled in (False, True):
            name = f"unpack_gradient_rows fp32 to fp32 {kind}{' scale' if scaled else ''}"
            add(name, _unpack_gradient_rows, single, single, kind, scaled, stores=True)
    for pair in ((double, double), (half, single), (bytes_, single), (nibbles, single), (bytes_, double)):
        name = f"unpack_gradient_rows {_arrow(pair)} tanh scale"
        add(name, _unpack_gradient_rows, *pair, "tanh", True, stores=True)
    add(
        "unpack_gradient_rows fp32 to fp32 tanh scale tile 32",
        _unpack_gradient_rows,
        single,
        single,
        "tanh",
        True,
        32,
        stores=True,
    )
    for pair in ((single, single), (double, double), (half, single), (bytes_, single), (nibbles, single)):
        add(f"sum_kept {_arrow(pair)}", _sum_kept, *pair, False)
        add(f"sum_kept {_arrow(pair)} gradients", _sum_kept, *pair, True)
        add(f"combine_kept {_arrow(pair)}", _combine_kept, *pair)
    add("sum_kept fp32 to fp32 tile 32", _sum_kept, single, single, False, 32)
    add("combine_kept fp32 to fp32 tile 32", _combine_kept, single, single, 32)
    for pair in ((single, single), (double, double), (brain, single), (bytes_, single), (nibbles, single)):
        add(f"unpack_planes {_arrow(pair)}", _unpack_planes, *pair)
    add("unpack_planes fp32 to fp32 row_scale", _unpack_planes, single, single, True)
    for dtype in (single, double):
        add(f"rows_of_half {SHORT_NAMES[dtype]}", _rows_of_half, dtype, loads=True, stores=True)
        add(f"rows_of_half {SHORT_NAMES[dtype]} row_scale", _rows_of_half, dtype, True, loads=True, stores=True)
        add(f"gather_planes {_arrow((dtype, dtype))}", _gather_planes, dtype, dtype, loads=True)
    add("gather_planes fp32 to fp32 tile 32", _gather_planes, single, single, 32, loads=True)

    dense, narrow, depthwise = (CHANNELS, CHANNELS, 1), (3, 96, 1), (CHANNELS, CHANNELS, CHANNELS)
    for pair in ((single, single), (single, brain), (single, half), (double, double)):
        add(f"kernel_spectrum {_arrow(pair)} 3x3", _spectrum, *pair, 3, *dense)
    add("kernel_spectrum fp32 to fp32 11x11 3 inputs", _spectrum, single, single, 11, *narrow)
    add("kernel_spectrum fp32 to fp32 3x3 depthwise", _spectrum, single, single, 3, *depthwise)
    for pair in ((single, single), (single, brain), (double, double)):
        add(f"kernel_spectrum_adjoint {_arrow(pair, 'from')} 3x3", _adjoint, *pair, 3, *dense)
    add("kernel_spectrum_adjoint fp32 from fp32 3x3 512 channels", _adjoint, single, single, 3, 512, 512, 1)
    add("kernel_spectrum_adjoint fp32 from fp32 11x11 3 inputs", _adjoint, single, single, 11, *narrow)
    add("kernel_spectrum_adjoint fp32 from fp32 3x3 depthwise", _adjoint, single, single, 3, *depthwise)

    maps, small = (BATCH, CHANNELS, HEIGHT, WIDTH), (BATCH, 512, 7, 7)
    for name, coder in (("decode_blocks", _decode_blocks), ("encode_blocks", _encode_blocks)):
        add(f"{name} bf16 64 channels 8x8", coder, brain, maps, 8, 64)
        add(f"{name} bf16 64 channels 8x8 channels last", coder, brain, maps, 8, 64, True)
        add(f"{name} bf16 64 channels 7x7 channels last", coder, brain, small, 7, 64, True)
        add(f"{name} fp32 64 channels 8x8", coder, single, maps, 8, 64)
        add(f"{name} bf16 16 channels 4x4", coder, brain, maps, 4, 16)
        add(f"{name} fp32 one block", coder, single, (1, 1, 8, 8), 8, 1)  # sizes of 1 become constants
    add("decode_blocks fp16 1 channel 7x7", _decode_blocks, half, small, 7, 1)
    add("encode_blocks bf16 64 channels 8x8 stochastic", _encode_blocks, brain, maps, 8, 64, False, True)
    add("encode_blocks bf16 64 channels 7x7 stochastic", _encode_blocks, brain, small, 7, 64, False, True)

    for dtype in (single, double, half, brain):
        short = SHORT_NAMES[dtype]
        add(f"rectify {short}", _rectify, dtype, float("inf"), loads=True, stores=True)
        add(f"clear_outside {short}", _clear_outside, dtype, loads=True, stores=True)
    add("rectify bf16 limited", _rectify, brain, 6.0, loads=True, stores=True)
    add("rebuild bf16", _rebuild, brain, True, True, loads=True, stores=True)
    add("rebuild bf16 without norm", _rebuild, brain, False, True, loads=True, stores=True)
    add("rebuild fp32 contiguous", _rebuild, single, True, False, loads=True, stores=True)
    for name in ("pool_maxima", "pool_maxima again", "spread_maxima"):
        for edge in (2, 3):
            add(f"{name} bf16 {edge}x{edge}", _pool, name, brain, edge, True)
        add(f"{name} fp32 3x3 contiguous", _pool, name, single, 3, False)
    for name in ("pool_planes", "spread_planes"):
        for dtype in (single, double):
            add(f"{name} {SHORT_NAMES[dtype]} 1x1", _planes, name, dtype, 1, 1, loads=True, stores=True)
            add(f"{name} {SHORT_NAMES[dtype]} 2x2", _planes, name, dtype, 2, 2, stores=True)
        add(f"{name} fp32 3x3", _planes, name, single, 3, 2, stores=True)
    add("pool_planes fp32 1x1 without norm", _planes, "pool_planes", single, 1, 1, False, loads=True, stores=True)
    return found
