"""What happens to maps between two spectra in one pass: batch norm, maximum pooling, ReLU (`pool_planes`); and back.

Of each maximum the position in its window is kept, as a code of 1, 2, 4 or 8 bits, and of ReLU one bit a value. Both
are packed in the order of the results, lowest bits first, whatever the sizes of planes: results are walked as flat
memory. Which position counts is PyTorch's choice: the first maximum, or the last NaN. `spread_planes` walks the maps,
and asks of each window that a value lies in whether it was the maximum; it adds in the same order every time.

Bytes that have to be moved: maps once, results once, codes and bits once.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from ._device import divide
from ._launch import Launch
from .configs import POOL_PLANES, SPREAD_PLANES, Stream, ceil_div

# More positions than this would be spelt out too often.
_MOST_POSITIONS = 64
# What `divide` takes.
_MOST_DIVIDED = 1 << 20


class Windows(Protocol):
    """What is needed of windows; `spectriton.reference.across.Windows` tells what these are."""

    @property
    def kernel(self) -> Sequence[int]: ...
    @property
    def stride(self) -> Sequence[int]: ...
    @property
    def bits(self) -> int: ...
    @property
    def margin(self) -> int: ...


@triton.jit
def quotient(b_i, n, SMALL: tl.constexpr):
    """`b_i // n` for numbers that are not negative; with SMALL up to 2**20."""
    return divide(b_i, n) if SMALL else b_i // n


@triton.jit
def locate(first, size, BLOCK: tl.constexpr, SMALL: tl.constexpr):
    """Where BLOCK values from number `first`, int64, on stand in planes of `size` values.

    Returns:
        plane of the first value, int64; how many planes behind that each value is, and its place there, int32.
    """
    first_plane = first // size
    o_value = (first - first_plane * size).to(tl.int32) + tl.arange(0, BLOCK)
    b_plane = quotient(o_value, size, SMALL)
    return first_plane, b_plane, o_value - b_plane * size


@triton.jit
def store_bits(ptr, first, total, b_code, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes codes (BLOCK,) int32 of the values from `first`, int64, on; 0 beyond the `total`."""
    PER_BYTE: tl.constexpr = 8 // BITS
    b_code = tl.reshape(b_code, [BLOCK // PER_BYTE, PER_BYTE]) << (tl.arange(0, PER_BYTE) * BITS)[None, :]
    o_byte = first // PER_BYTE + tl.arange(0, BLOCK // PER_BYTE)
    tl.store(ptr + o_byte, tl.sum(b_code, axis=1).to(tl.uint8), mask=o_byte * PER_BYTE < total)


@triton.jit
def load_bits(ptr, o_value, m_value, BITS: tl.constexpr):
    """Codes by the numbers of their values."""
    PER_BYTE: tl.constexpr = 8 // BITS
    b_byte = tl.load(ptr + o_value // PER_BYTE, mask=m_value, other=0).to(tl.int32)
    return (b_byte >> (o_value % PER_BYTE * BITS).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit
def pool_planes_kernel(
    maps_ptr,  # (n, height, width)
    gain_ptr,  # (n,)
    shift_ptr,  # (n,)
    out_ptr,  # (n, down, across)
    codes_ptr,  # (ceil(total * BITS / 8),)
    signs_ptr,  # (ceil(total / 8),)
    total,
    height,
    width,
    down,
    across,
    margin,
    RECTIFY: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
):
    """Maxima of windows of maps that are scaled before and rectified after.

    Args:
        maps_ptr: maps.
        gain_ptr, shift_ptr: what each plane is multiplied by, and what is added; or None.
        out_ptr: results; may be `maps_ptr` for windows of one element.
        codes_ptr: uint8, where the maxima stood; None for windows of one element.
        signs_ptr: uint8, a bit each: whether a result is not at most zero. Or None.
        total: results, n * down * across.
        height, width: of the maps.
        down, across: results of a plane.
        margin: rows and columns, at every side, that no window reaches.
        RECTIFY: whether negative results become zero.
        KERNEL_H .. STRIDE_W: of the windows.
        BITS: of a code.
        BLOCK: results a program handles.
        SMALL: whether a plane's results and a block are less than 2**20.
    """
    i_first = tl.program_id(0).to(tl.int64) * BLOCK
    o_out = i_first + tl.arange(0, BLOCK)
    m_out = o_out < total
    if codes_ptr is None:
        if gain_ptr is not None:
            first_plane, b_plane, _ = locate(i_first, down * across, BLOCK, SMALL)
        p_first = maps_ptr + o_out
    else:
        first_plane, b_plane, o_place = locate(i_first, down * across, BLOCK, SMALL)
        y = quotient(o_place, across, SMALL)
        x = o_place - y * across
        y = b_plane * height + y * STRIDE_H + margin
        p_first = maps_ptr + first_plane * (height * width) + (y * width + x * STRIDE_W + margin)
    if gain_ptr is not None:
        b_gain = tl.load(gain_ptr + first_plane + b_plane, mask=m_out, other=0.0)
        b_shift = tl.load(shift_ptr + first_plane + b_plane, mask=m_out, other=0.0)
    b_code = tl.zeros([BLOCK], dtype=tl.int32)
    for position in tl.static_range(KERNEL_H * KERNEL_W):
        p_here = p_first + (position // KERNEL_W * width + position % KERNEL_W)
        b_x = tl.load(p_here, mask=m_out, other=0.0)
        if gain_ptr is not None:
            b_x = b_x * b_gain + b_shift
        if position == 0:
            b_best = b_x
        else:
            m_take = (b_x > b_best) | (b_x != b_x)
            b_best = tl.where(m_take, b_x, b_best)
            b_code = tl.where(m_take, position, b_code)
    m_below = b_best <= 0.0
    if codes_ptr is not None:
        store_bits(codes_ptr, i_first, total, tl.where(m_out, b_code, 0), BITS, BLOCK)
    if signs_ptr is not None:
        store_bits(signs_ptr, i_first, total, tl.where(m_out & (m_below == 0), 1, 0), 1, BLOCK)
    if RECTIFY:
        b_best = tl.where(m_below, 0.0, b_best)
    tl.store(out_ptr + o_out, b_best, mask=m_out)


@triton.jit
def spread_planes_kernel(
    grad_ptr,  # (n, down, across)
    codes_ptr,  # (ceil(n * down * across * BITS / 8),)
    signs_ptr,  # (ceil(n * down * across / 8),)
    out_ptr,  # (n, height, width)
    total,
    height,
    width,
    down,
    across,
    margin,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
):
    """The adjoint of `pool_planes` but for the factors: gradients where maxima stood, zero elsewhere.

    Args:
        grad_ptr: of the results.
        codes_ptr: uint8, where the maxima stood; None for windows of one element.
        signs_ptr: uint8, a bit each: whether a gradient passes. Or None.
        out_ptr: of the maps; may be `grad_ptr` for windows of one element.
        total: values of the maps, n * height * width; with PAIRS half as many.
        height, width, down, across, margin, KERNEL_H .. BITS: as of `pool_planes`.
        PAIRS: whether windows are two columns wide, side by side, and fill rows of an even width, which go in pairs.
        BLOCK: values of the maps, or pairs of them, that a program handles.
        SMALL: whether a plane of those and a block are less than 2**20.
    """
    i_first = tl.program_id(0).to(tl.int64) * BLOCK
    o_out = i_first + tl.arange(0, BLOCK)
    m_out = o_out < total
    if codes_ptr is None:
        b_sum = tl.load(grad_ptr + o_out, mask=m_out, other=0.0)
        if signs_ptr is not None:
            o_byte = i_first // 8 + tl.arange(0, BLOCK // 8)
            b_byte = tl.load(signs_ptr + o_byte, mask=o_byte * 8 < total, other=0).to(tl.int32)
            b_sign = tl.reshape((b_byte[:, None] >> tl.arange(0, 8)[None, :]) & 1, [BLOCK])
            b_sum = tl.where(b_sign != 0, b_sum, 0.0)
        tl.store(out_ptr + o_out, b_sum, mask=m_out)
    else:
        columns = width // 2 if PAIRS else width
        first_plane, b_plane, o_place = locate(i_first, height * columns, BLOCK, SMALL)
        y = quotient(o_place, columns, SMALL)
        x = o_place - y * columns - margin
        y -= margin
        m_reached = m_out & (y >= 0) & (x >= 0)
        y, x = tl.maximum(y, 0), tl.maximum(x, 0)
        # from a whole byte on, 32 bits are enough
        first_result = first_plane * (down * across)
        first_byte = first_result // 8
        o_results = (first_result - first_byte * 8).to(tl.int32) + b_plane * (down * across)
        p_grad, p_codes = grad_ptr + first_byte * 8, codes_ptr + first_byte * BITS
        b_sum = tl.zeros([BLOCK], dtype=grad_ptr.dtype.element_ty)
        b_right = b_sum
        # the last window that begins at or before a value, and those before that reach it
        for back_y in tl.static_range((KERNEL_H + STRIDE_H - 1) // STRIDE_H):
            window_y = y // STRIDE_H - back_y
            in_y = y - window_y * STRIDE_H
            m_y = m_reached & (window_y >= 0) & (window_y < down) & (in_y < KERNEL_H)
            for back_x in tl.static_range(1 if PAIRS else (KERNEL_W + STRIDE_W - 1) // STRIDE_W):
                window_x = x if PAIRS else x // STRIDE_W - back_x
                in_x = 0 if PAIRS else x - window_x * STRIDE_W
                m_in = m_y & (window_x >= 0) & (window_x < across) & (in_x < KERNEL_W)
                o_grad = o_results + window_y * across + window_x
                b_code = load_bits(p_codes, o_grad, m_in, BITS) - (in_y * KERNEL_W + in_x)
                if signs_ptr is not None:
                    m_in = m_in & (load_bits(signs_ptr + first_byte, o_grad, m_in, 1) != 0)
                b_grad = tl.load(p_grad + o_grad, mask=m_in, other=0.0)
                b_sum += tl.where(b_code == 0, b_grad, 0.0)
                if PAIRS:
                    b_right += tl.where(b_code == 1, b_grad, 0.0)
        if PAIRS:
            o_pair = i_first * 2 + tl.arange(0, 2 * BLOCK)
            tl.store(out_ptr + o_pair, tl.reshape(tl.join(b_sum, b_right), [2 * BLOCK]), mask=o_pair < 2 * total)
        else:
            tl.store(out_ptr + o_out, b_sum, mask=m_out)


def can_pool_planes(windows: Windows, dtype: torch.dtype) -> bool:
    """Whether `pool_planes` and `spread_planes` take such windows of maps of a dtype."""
    return windows.kernel[0] * windows.kernel[1] <= _MOST_POSITIONS and dtype in (torch.float32, torch.float64)


def _meta(windows: Windows, plane: int, itemsize: int, config: Stream) -> dict[str, Any]:
    block = config.block_bytes // itemsize
    return {
        "KERNEL_H": windows.kernel[0],
        "KERNEL_W": windows.kernel[1],
        "STRIDE_H": windows.stride[0],
        "STRIDE_W": windows.stride[1],
        "BITS": windows.bits,
        "BLOCK": block,
        "SMALL": plane + block <= _MOST_DIVIDED,
        "num_warps": config.num_warps,
    }


def _check(
    maps: torch.Tensor, windows: Windows, results: torch.Tensor, codes: torch.Tensor | None, signs: torch.Tensor | None
) -> None:
    single = list(windows.kernel) == [1, 1] == list(windows.stride) and not windows.margin
    assert codes is not None or single, "without codes windows are single elements"
    assert maps.is_contiguous() and results.is_contiguous() and maps.dtype == results.dtype
    for stored, bits in ((codes, windows.bits), (signs, 1)):
        assert stored is None or (stored.is_contiguous() and stored.numel() == ceil_div(results.numel() * bits, 8))


def plan_pool_planes(
    maps: torch.Tensor,
    windows: Windows,
    out: torch.Tensor,
    codes: torch.Tensor | None,
    signs: torch.Tensor | None,
    affine: tuple[torch.Tensor, torch.Tensor] | None,
    rectify: bool,
    config: Stream | None = None,
) -> Launch:
    """The launch behind `pool_planes`, by default in the configuration chosen for it."""
    _check(maps, windows, out, codes, signs)
    plane, total = out.shape[1] * out.shape[2], out.numel()
    if config is None:
        config = POOL_PLANES.choose(out.device, (out.dtype,), (total, *windows.kernel))
    meta = _meta(windows, plane, out.element_size(), config) | {"RECTIFY": rectify}
    gain, shift = affine or (None, None)
    args = (maps, gain, shift, out, codes, signs, total, *maps.shape[1:], *out.shape[1:], windows.margin)
    return Launch(pool_planes_kernel, (ceil_div(total, meta["BLOCK"]),), args, meta)


def pool_planes(
    maps: torch.Tensor,
    windows: Windows,
    out: torch.Tensor,
    codes: torch.Tensor | None,
    signs: torch.Tensor | None,
    affine: tuple[torch.Tensor, torch.Tensor] | None,
    rectify: bool,
) -> torch.Tensor:
    """Writes what batch norm, maximum pooling and ReLU give of maps.

    Args:
        maps: `(n, H, W)` contiguous, float32 or float64.
        windows: those that `can_pool_planes` takes.
        out: `(n, Ho, Wo)` contiguous; may be `maps` where windows are single elements.
        codes: `(ceil(n * Ho * Wo * bits / 8),)` uint8 for where maxima stand; None where windows are single elements.
        signs: `(ceil(n * Ho * Wo / 8),)` uint8 for whether a result is not at most zero, or None.
        affine: factor and shift of each plane, `(n,)` contiguous each, or None.
        rectify: whether negative results become zero.

    Returns:
        `out`.
    """
    plan_pool_planes(maps, windows, out, codes, signs, affine, rectify).run()
    return out


def plan_spread_planes(
    grad: torch.Tensor,
    windows: Windows,
    codes: torch.Tensor | None,
    signs: torch.Tensor | None,
    out: torch.Tensor,
    config: Stream | None = None,
) -> Launch:
    """The launch behind `spread_planes`, by default in the configuration chosen for it."""
    _check(out, windows, grad, codes, signs)
    plane, total = out.shape[1] * out.shape[2], out.numel()
    if config is None:
        config = SPREAD_PLANES.choose(out.device, (out.dtype,), (total, *windows.kernel))
    pairs = windows.kernel[1] == 2 == windows.stride[1] and out.shape[2] % 2 == 0 and not windows.margin
    unit = 2 if pairs else 1
    plane, total = plane // unit, total // unit
    meta = _meta(windows, plane, unit * out.element_size(), config) | {"PAIRS": pairs}
    args = (grad, codes, signs, out, total, *out.shape[1:], *grad.shape[1:], windows.margin)
    return Launch(spread_planes_kernel, (ceil_div(total, meta["BLOCK"]),), args, meta)


def spread_planes(
    grad: torch.Tensor,
    windows: Windows,
    codes: torch.Tensor | None,
    signs: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Writes the gradient of maps from that of what `pool_planes` made of them, where it was not scaled.

    Args:
        grad: `(n, Ho, Wo)` contiguous.
        windows, codes, signs: as of `pool_planes`, which wrote the bytes.
        out: `(n, H, W)` contiguous; may be `grad` where windows are single elements.

    Returns:
        `out`.
    """
    plan_spread_planes(grad, windows, codes, signs, out).run()
    return out
