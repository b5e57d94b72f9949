"""Spectral activation `z = s h(re / s) + i s h(im / s)` and its derivative taken from the output.

`h` is odd and monotone: tanh, softsign, asinh, atan or the identity. Re and im are treated alike, so that the kernels
walk flat real memory. Backward needs only the output: with `q = z / s = h(v)`, `v = x / s`, both `h'(v)` and `v h'(v)`
are functions of `q`, and `dz/ds = q - v h'(v)`. Everything is built from exp, log, sqrt and polynomials, keeps NaN and
carries infinities to their limits.
"""

import math

import torch
import triton
import triton.language as tl

from ._device import divide
from ._launch import Launch
from .configs import (
    COLUMN_SUM_BLOCK,
    ROW_MIN_COLUMNS,
    SPECTRAL_ACTIVATION,
    SPECTRAL_ACTIVATION_BACKWARD,
    SPECTRAL_ACTIVATION_SCALE_BACKWARD,
    Stream,
    ceil_div,
)

KINDS = ("identity", "tanh", "softsign", "asinh", "atan")


@triton.jit
def polynomial_tanh(x):
    """tanh for |x| <= 1/2 in float32: odd minimax polynomial, relative error 1.2e-9."""
    z = x * x
    p = 2.147068303e-2 + z * -6.94294175e-3
    p = -5.393346915e-2 + z * p
    p = 1.333322578e-1 + z * p
    p = -3.33333328e-1 + z * p
    return x + x * z * p


@triton.jit
def tanh(x):
    """tanh by exponentials, and without their cancellation for small |x|."""
    a = tl.abs(x)
    if x.dtype == tl.float64:
        e = tl.exp(-2.0 * a)
        # (e - 1) * y / log(e) is expm1(y) to the last digits, the rounding of e cancels
        inside = (e < 1.0) & (a < 0.5)
        safe = tl.where(inside, e, 0.5)
        below_one = tl.where(inside, (1.0 - safe) * (-2.0 * a) / tl.log(safe), 1.0 - e)
        t = below_one / (1.0 + e)
        # e rounds to 1 for the tiniest |x| only, where tanh(x) = x
        return tl.where(e == 1.0, x, tl.where(x < 0, -t, t))
    else:
        # exp(2 |x|) may overflow, to the right limit
        t = 1.0 - 2.0 / (1.0 + tl.exp2(a * 2.8853900817779268))
        return tl.where(a < 0.5, polynomial_tanh(x), tl.where(x < 0, -t, t))


@triton.jit
def softsign(x):
    """x / (1 + |x|), as 1 - 1 / (1 + |x|) for large |x| so that infinity gives 1."""
    a = tl.abs(x)
    r = 1.0 / (1.0 + a)
    large = 1.0 - r
    return tl.where(a > 1.0, tl.where(x < 0, -large, large), x * r)


@triton.jit
def log1p(t):
    """log(1 + t), t >= 0 finite: the rounding of 1 + t cancels in log(u) / (u - 1)."""
    u = 1.0 + t
    d = tl.where(u == 1.0, 1.0, u - 1.0)
    return tl.where(u == 1.0, t, tl.log(u) * (t / d))


@triton.jit
def asinh(x):
    """sign(x) log(|x| + sqrt(x^2 + 1)), by log1p for ordinary |x| and log(2 |x|) beyond the range of x^2."""
    a = tl.abs(x)
    big = a > 1e9
    b = tl.where(big, 1.0, a)
    ordinary = log1p(b + b * b / (1.0 + tl.sqrt(b * b + 1.0)))
    beyond = tl.log(tl.where(big, a, 1.0)) + 0.6931471805599453
    r = tl.where(big, beyond, ordinary)
    return tl.where(x < 0, -r, r)


@triton.jit
def atan(x):
    """Arc tangent: |x| is folded to [0, tan(pi/8)] about pi/4 and pi/2, then an odd minimax polynomial."""
    a = tl.abs(x)
    high = a > 2.414213562373095
    middle = (a > 0.41421356237309503) & (a <= 2.414213562373095)
    numerator = tl.where(high, -1.0, tl.where(middle, a - 1.0, a))
    t = numerator / tl.where(high, a, tl.where(middle, a + 1.0, 1.0))
    z = t * t
    quarters = middle.to(x.dtype) + 2.0 * high.to(x.dtype)
    if x.dtype == tl.float64:
        p = 4.551593220626549169e-2 + z * (-3.457056198142774688e-2 + z * 1.628575685522102829e-2)
        p = 5.878928997834775133e-2 + z * (-5.230454270650244518e-2 + z * p)
        p = 7.692296375032142399e-2 + z * (-6.666424885738255333e-2 + z * p)
        p = 1.111111110515544657e-1 + z * (-9.090908753500876844e-2 + z * p)
        p = 1.999999999999980453e-1 + z * (-1.428571428565982761e-1 + z * p)
        p = -3.333333333333333322e-1 + z * p
        # pi / 4 in two pieces: the second one is what the first one lost
        r = quarters * 7.853981633974483e-1 + (t + t * z * p + quarters * 3.061616997868383e-17)
    else:
        p = 1.074373149e-1 + z * -6.451928208e-2
        p = -1.42639556e-1 + z * p
        p = 1.999954048e-1 + z * p
        p = -3.333333176e-1 + z * p
        r = quarters * 7.85398185e-1 + (t + t * z * p + quarters * -2.18556941e-8)
    return tl.where(x < 0, -r, r)


@triton.jit
def sine_cosine(a):
    """(sin a, cos a) for 0 <= a <= pi/2 (and the rounding beyond): minimax polynomials on half of the range.

    tl.sin and tl.cos would bring the reduction of huge arguments along, which needs local memory.
    """
    swap = a > 0.7853981633974483
    if a.dtype == tl.float64:
        other = (1.5707963267948966 - a) + 6.123233995736766e-17
        u = tl.where(swap, other, a)
        z = u * u
        s = 2.755731610161787444e-6 + z * (-2.505113165023518147e-8 + z * 1.591811526326597519e-10)
        s = -1.666666666666666462e-1 + z * (8.333333333330947294e-3 + z * (-1.984126983675677253e-4 + z * s))
        c = -2.755731727114514596e-7 + z * (2.087614614655861158e-9 + z * -1.138262364747460463e-11)
        c = 4.166666666666666539e-2 + z * (-1.388888888888739649e-3 + z * (2.480158729876456077e-5 + z * c))
    else:
        other = (1.57079637 - a) + -4.37113883e-8
        u = tl.where(swap, other, a)
        z = u * u
        s = -1.66666646617e-1 + z * (8.33274815408e-3 + z * -1.95878657021e-4)
        c = 4.16666646589e-2 + z * (-1.38883029191e-3 + z * 2.45479168537e-5)
    s = u + u * z * s
    c = 1.0 - 0.5 * z + z * z * c
    return tl.where(swap, c, s), tl.where(swap, s, c)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """h(x) of a float32 or float64 block."""
    if KIND == "tanh":
        z = tanh(x)
    elif KIND == "softsign":
        z = softsign(x)
    elif KIND == "asinh":
        z = asinh(x)
    elif KIND == "atan":
        z = atan(x)
    else:
        tl.static_assert(KIND == "identity", "unknown activation")
        z = x
    return z


@triton.jit
def derivative(q, KIND: tl.constexpr):
    """(h'(v), q - v h'(v)) where q = h(v)."""
    a = tl.abs(q)
    if KIND == "tanh":
        # rounding may lift q above 1: the derivative is 0 there, and the logarithm must stay finite
        a = tl.where(a > 1.0, 1.0, a)
        slope = (1.0 - a) * (1.0 + a)
        if q.dtype == tl.float64:
            below = a - (a == 1.0).to(tl.float64) * 1.1102230246251565e-16
            v = 0.5 * log1p(2.0 * below / (1.0 - below))
            rest = a - v * slope
        else:
            # the two terms cancel for small |q|: there a polynomial in q^2, relative error 6e-9
            z = a * a
            p = 3.071898342e-2 + z * 2.708248720e-2
            p = 5.720335438e-2 + z * p
            p = 1.333321038e-1 + z * p
            p = 6.666666706e-1 + z * p
            below = a - (a == 1.0).to(tl.float32) * 5.960464477539063e-8
            v = 0.34657359027997264 * tl.log2((1.0 + below) / (1.0 - below))
            rest = tl.where(a < 0.4, a * z * p, a - v * slope)
        rest = tl.where(q < 0, -rest, rest)
    elif KIND == "softsign":
        r = tl.where(a > 1.0, 0.0, 1.0 - a)
        slope = r * r
        rest = q * (1.0 - r)
    elif KIND == "asinh":
        e = tl.exp(-a)
        slope = 2.0 * e / (1.0 + e * e)
        rest = q - tanh(q)
    elif KIND == "atan":
        s, c = sine_cosine(a)
        slope = c * c
        rest = tl.where(q < 0, s * c - a, a - s * c)
    else:
        tl.static_assert(KIND == "identity", "unknown activation")
        # s h(x / s) = x whatever s is
        slope = q * 0.0 + 1.0
        rest = q * 0.0
    return slope, rest


@triton.jit
def spectral_activation_kernel(
    x_ptr,  # (length,) = (B, C, *F, 2)
    scale_ptr,  # (channels,)
    out_ptr,  # (length,) = (B, C, *F, 2)
    length,
    inner,
    channels,
    KIND: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Forward over flat real memory.

    Args:
        x_ptr: input, interleaved pairs.
        scale_ptr: scale s of each channel (unused without HAS_SCALE).
        out_ptr: output, interleaved pairs.
        length: real elements.
        inner: real elements of one channel of one sample.
        channels: number of channels.
        KIND: name of h.
        HAS_SCALE: whether there is a scale.
        LONG: whether a channel of a sample is no shorter than a block.
        BLOCK: real elements a program handles.
    """
    i_block = tl.program_id(0).to(tl.int64)
    o_real = i_block * BLOCK + tl.arange(0, BLOCK)
    m_real = o_real < length
    b_x = tl.load(x_ptr + o_real, mask=m_real, other=0.0)
    if HAS_SCALE:
        # divide the block's start in 64 bits, once; what is left is small
        i_first = i_block * BLOCK // inner
        o_inner = (i_block * BLOCK % inner).to(tl.int32) + tl.arange(0, BLOCK)
        if LONG:
            i_channel = (i_first % channels).to(tl.int32) + (o_inner >= inner).to(tl.int32)
        else:
            i_channel = (i_first % channels).to(tl.int32) + divide(o_inner, inner)
        i_channel -= divide(i_channel, channels) * channels
        b_scale = tl.load(scale_ptr + i_channel, mask=m_real, other=1.0).to(b_x.dtype)
        b_z = b_scale * activate(b_x / b_scale, KIND)
    else:
        b_z = activate(b_x, KIND)
    tl.store(out_ptr + o_real, b_z, mask=m_real)


@triton.jit
def spectral_activation_backward_kernel(
    grad_ptr,  # (length,) = (B, C, *F, 2)
    z_ptr,  # (length,) = (B, C, *F, 2)
    grad_x_ptr,  # (length,) = (B, C, *F, 2)
    length,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Backward without a scale, over flat real memory.

    Args:
        grad_ptr: gradient of the output, interleaved pairs.
        z_ptr: output of the forward, interleaved pairs.
        grad_x_ptr: gradient of the input, interleaved pairs.
        length: real elements.
        KIND: name of h.
        BLOCK: real elements a program handles.
    """
    i_block = tl.program_id(0).to(tl.int64)
    o_real = i_block * BLOCK + tl.arange(0, BLOCK)
    m_real = o_real < length
    b_grad = tl.load(grad_ptr + o_real, mask=m_real, other=0.0)
    b_z = tl.load(z_ptr + o_real, mask=m_real, other=0.0)
    slope, _ = derivative(b_z, KIND)
    tl.store(grad_x_ptr + o_real, b_grad * slope, mask=m_real)


@triton.jit
def spectral_activation_scale_backward_kernel(
    grad_ptr,  # (rows, columns)
    z_ptr,  # (rows, columns)
    scale_ptr,  # (channels,)
    grad_x_ptr,  # (rows, columns)
    partial_ptr,  # (rows, column blocks) or (row blocks, columns)
    rows,
    columns,
    inner,
    channels,
    KIND: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Backward with a scale; sums stay within a channel, so that partial sums need no atomics.

    Either a row is one channel of one sample, rows = B * C, and is summed along its columns, or (BY_COLUMN, for
    channels of few elements) a row is one sample, rows = B, and sums run down the rows.

    Args:
        grad_ptr: gradient of the output, interleaved pairs.
        z_ptr: output of the forward, interleaved pairs.
        scale_ptr: scale s of each channel.
        grad_x_ptr: gradient of the input, interleaved pairs.
        partial_ptr: what each block adds to the gradient of the scale, one number a row, or one a column.
        rows, columns: real elements.
        inner: real elements of one channel of one sample.
        channels: C.
        KIND: name of h.
        BY_COLUMN: whether a row holds all channels.
        BLOCK_R, BLOCK_C: rows and real columns a program handles.
    """
    i_program = tl.program_id(0).to(tl.int64)
    n_column_blocks = tl.cdiv(columns, BLOCK_C)
    i_column_block = i_program % n_column_blocks
    i_row_block = i_program // n_column_blocks
    i_row = i_row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = i_row < rows
    o_real = i_column_block * BLOCK_C + tl.arange(0, BLOCK_C)
    m_column = o_real < columns
    m_real = m_row[:, None] & m_column[None, :]
    o_block = i_row[:, None] * columns + o_real[None, :]

    b_grad = tl.load(grad_ptr + o_block, mask=m_real, other=0.0)
    b_z = tl.load(z_ptr + o_block, mask=m_real, other=0.0)
    if BY_COLUMN:
        b_scale = tl.load(scale_ptr + o_real // inner, mask=m_column, other=1.0).to(b_z.dtype)[None, :]
    else:
        i_channel = (i_row_block * BLOCK_R % channels).to(tl.int32) + tl.arange(0, BLOCK_R)
        i_channel -= divide(i_channel, channels) * channels
        b_scale = tl.load(scale_ptr + i_channel, mask=m_row, other=1.0).to(b_z.dtype)[:, None]
    slope, rest = derivative(b_z / b_scale, KIND)
    tl.store(grad_x_ptr + o_block, b_grad * slope, mask=m_real)
    b_rest = b_grad * rest  # zero where masked, as the gradient is
    if BY_COLUMN:
        tl.store(partial_ptr + i_row_block * columns + o_real, tl.sum(b_rest, axis=0), mask=m_column)
    else:
        tl.store(partial_ptr + i_row * n_column_blocks + i_column_block, tl.sum(b_rest, axis=1), mask=m_row)


def _pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(x.resolve_conj().resolve_neg().contiguous())


def plan_spectral_activation(
    x: torch.Tensor, kind: str, scale: torch.Tensor | None = None, config: Stream | None = None
) -> tuple[Launch, torch.Tensor]:
    """The launch behind `spectral_activation`, by default in the configuration chosen for it, and what it fills."""
    assert kind in KINDS, kind
    x_real = _pairs(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    channels = 1 if scale is None else x.shape[1]
    inner = 1 if scale is None else math.prod(x_real.shape[2:])
    assert scale is None or scale.shape == (channels,), "scale must have one element a channel"
    assert channels < 2**19, "the kernel divides by way of float32"
    length = x_real.numel()
    if config is None:
        sizes = (length, 0 if scale is None else inner)
        config = SPECTRAL_ACTIVATION.choose(x.device, (x_real.dtype,), sizes)
    block = config.block_bytes // x_real.element_size()
    meta = {
        "KIND": kind,
        "HAS_SCALE": scale is not None,
        "LONG": inner >= block,
        "BLOCK": block,
        "num_warps": config.num_warps,
    }
    args = (
        x_real,
        None if scale is None else scale.contiguous(),
        torch.view_as_real(out),
        length,
        inner,
        channels,
    )
    return Launch(spectral_activation_kernel, (ceil_div(length, block),), args, meta), out


def spectral_activation(x: torch.Tensor, kind: str, scale: torch.Tensor | None = None) -> torch.Tensor:
    """`s h(re / s) + i s h(im / s)`.

    Args:
        x: complex, any shape without a scale and `(B, C, *F)` with one.
        kind: one of `KINDS`.
        scale: real `(C,)`.

    Returns:
        A new contiguous tensor like `x`.
    """
    launch, out = plan_spectral_activation(x, kind, scale)
    launch.run()
    return out


def plan_spectral_activation_backward(
    grad: torch.Tensor, z: torch.Tensor, kind: str, scale: torch.Tensor | None = None, config: Stream | None = None
) -> tuple[Launch, torch.Tensor, torch.Tensor | None]:
    """The launch behind `spectral_activation_backward`, by default in the configuration chosen for it.

    Returns:
        The launch, the gradient it fills and the partial sums for the scale (None without one).
    """
    assert kind in KINDS, kind
    assert grad.shape == z.shape and grad.dtype == z.dtype, "gradient and output must be alike"
    grad_real, z_real = _pairs(grad), _pairs(z)
    grad_x = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    grad_x_real = torch.view_as_real(grad_x)
    if scale is None:
        length = z_real.numel()
        if config is None:
            config = SPECTRAL_ACTIVATION_BACKWARD.choose(z.device, (z_real.dtype,), (length,))
        block = config.block_bytes // z_real.element_size()
        meta = {"KIND": kind, "BLOCK": block, "num_warps": config.num_warps}
        launch = Launch(
            spectral_activation_backward_kernel,
            (ceil_div(length, block),),
            (grad_real, z_real, grad_x_real, length),
            meta,
        )
        return launch, grad_x, None

    batch, channels = z.shape[:2]
    inner = math.prod(z_real.shape[2:])
    assert scale.shape == (channels,), "scale must have one element a channel"
    assert channels < 2**19, "the kernel divides by way of float32"
    # a channel of few elements would leave most of a row block empty: take all channels as one row then
    by_column = inner < ROW_MIN_COLUMNS
    rows, columns = (batch, channels * inner) if by_column else (batch * channels, inner)
    if config is None:
        sizes = (batch, channels, inner)
        config = SPECTRAL_ACTIVATION_SCALE_BACKWARD.choose(z.device, (z_real.dtype,), sizes)
    most_columns = COLUMN_SUM_BLOCK if by_column else None
    block_rows, block_columns = config.row_block(columns, z_real.element_size(), most_columns)
    row_blocks, column_blocks = ceil_div(rows, block_rows), ceil_div(columns, block_columns)
    # both are (.., channels, ..): what is summed afterwards stands around the channels
    shape = (row_blocks, channels, inner) if by_column else (batch, channels, column_blocks)
    partial = torch.empty(shape, dtype=z_real.dtype, device=z.device)
    meta = {
        "KIND": kind,
        "BY_COLUMN": by_column,
        "BLOCK_R": block_rows,
        "BLOCK_C": block_columns,
        "num_warps": config.num_warps,
    }
    args = (grad_real, z_real, scale.contiguous(), grad_x_real, partial, rows, columns, inner, channels)
    launch = Launch(spectral_activation_scale_backward_kernel, (row_blocks * column_blocks,), args, meta)
    return launch, grad_x, partial


def spectral_activation_backward(
    grad: torch.Tensor, z: torch.Tensor, kind: str, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of `spectral_activation` from its output.

    Args:
        grad: gradient of the output, like `z`.
        z: output of the forward.
        kind: one of `KINDS`.
        scale: real `(C,)`, as in the forward.

    Returns:
        The gradient of the input, contiguous, and that of the scale (None without one); both bit by bit the same from
        run to run in one configuration.
    """
    launch, grad_x, partial = plan_spectral_activation_backward(grad, z, kind, scale)
    launch.run()
    if partial is None:
        return grad_x, None
    assert scale is not None
    return grad_x, partial.sum(dim=(0, 2)).to(scale.dtype)
