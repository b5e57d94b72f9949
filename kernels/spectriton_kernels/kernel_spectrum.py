"""Spectra of convolution kernels, straight into the layout of the channel-mixing matmul, and the adjoint.

`K[f, o, i] = sum_t weight[o, i, t] basis[f, t]`; each complex weight stands as `[[re, im], [-im, re]]` with rows
(input channel, part) and columns (output channel, part). There are few taps, so the sum is cheap next to writing (or,
in the adjoint, reading) the sixteen bytes of each embedded weight: plain multiply-adds in full precision keep up.
"""

import torch
import triton
import triton.language as tl

from ._device import convert
from ._launch import Launch
from .configs import KERNEL_SPECTRUM, KERNEL_SPECTRUM_ADJOINT, Adjoint, Spectrum, adjoint_splits, ceil_div


@triton.jit
def kernel_spectrum_kernel(
    weight_ptr,  # (O, I/g, K)
    basis_ptr,  # (Fc, K, 2)
    out_ptr,  # (Fc, g, 2 I/g, 2 O/g)
    frequencies,
    groups,
    inputs,
    outputs,
    TAPS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Kernel spectra of a block of frequencies, inputs and outputs of one group.

    Args:
        weight_ptr: real taps.
        basis_ptr: complex exponentials, interleaved pairs.
        out_ptr: embedded spectra.
        frequencies: Fc.
        groups: g.
        inputs: input channels of a group, I/g.
        outputs: output channels of a group, O/g.
        TAPS: K = kh * kw.
        WIDE: accumulate in float64 instead of float32.
        BLOCK_F, BLOCK_I, BLOCK_O: frequencies, inputs and outputs a program handles.
    """
    i_program = tl.program_id(0).to(tl.int64)
    n_output_blocks = tl.cdiv(outputs, BLOCK_O)
    n_input_blocks = tl.cdiv(inputs, BLOCK_I)
    i_output = i_program % n_output_blocks
    i_input = i_program // n_output_blocks % n_input_blocks
    i_group = i_program // (n_output_blocks * n_input_blocks) % groups
    i_frequency = i_program // (n_output_blocks * n_input_blocks) // groups

    o_f = i_frequency * BLOCK_F + tl.arange(0, BLOCK_F)
    o_i = i_input * BLOCK_I + tl.arange(0, BLOCK_I)
    o_o = i_output * BLOCK_O + tl.arange(0, BLOCK_O)
    m_f = o_f < frequencies
    m_weight = (o_i < inputs)[:, None] & (o_o < outputs)[None, :]
    p_basis = basis_ptr + o_f * (2 * TAPS)
    p_weight = weight_ptr + ((i_group * outputs + o_o)[None, :] * inputs + o_i[:, None]) * TAPS

    if WIDE:
        b_re = tl.zeros([BLOCK_F, BLOCK_I, BLOCK_O], tl.float64)
    else:
        b_re = tl.zeros([BLOCK_F, BLOCK_I, BLOCK_O], tl.float32)
    b_im = b_re
    for i_tap in range(TAPS):
        b_weight = tl.load(p_weight + i_tap, mask=m_weight, other=0.0).to(b_re.dtype)
        basis_re = tl.load(p_basis + 2 * i_tap, mask=m_f, other=0.0).to(b_re.dtype)
        basis_im = tl.load(p_basis + 2 * i_tap + 1, mask=m_f, other=0.0).to(b_re.dtype)
        b_re += basis_re[:, None, None] * b_weight[None, :, :]
        b_im += basis_im[:, None, None] * b_weight[None, :, :]

    o_column = i_output * (2 * BLOCK_O) + tl.arange(0, 2 * BLOCK_O)
    m_out = (m_f[:, None] & (o_i < inputs)[None, :])[:, :, None] & (o_column < 2 * outputs)[None, None, :]
    o_row = (o_f * groups + i_group)[:, None] * (2 * inputs) + 2 * o_i[None, :]
    p_out = out_ptr + o_row[:, :, None] * (2 * outputs) + o_column[None, None, :]
    b_upper = tl.reshape(tl.join(b_re, b_im), [BLOCK_F, BLOCK_I, 2 * BLOCK_O])
    b_lower = tl.reshape(tl.join(-b_im, b_re), [BLOCK_F, BLOCK_I, 2 * BLOCK_O])
    tl.store(p_out, convert(b_upper, out_ptr), mask=m_out)
    tl.store(p_out + 2 * outputs, convert(b_lower, out_ptr), mask=m_out)


@triton.jit
def kernel_spectrum_adjoint_kernel(
    grad_ptr,  # (Fc, g, 2 I/g, 2 O/g)
    basis_ptr,  # (Fc, K, 2)
    out_ptr,  # (splits, O, I/g, K)
    frequencies,
    groups,
    inputs,
    outputs,
    taps,
    split_frequencies,
    ADD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Gradient of a block of taps, inputs and outputs of one group, over one split of the frequencies.

    Args:
        grad_ptr: gradient of the embedded spectra.
        basis_ptr: complex exponentials, interleaved pairs.
        out_ptr: gradient of the taps, one copy a split.
        frequencies: Fc.
        groups: g.
        inputs: input channels of a group, I/g.
        outputs: output channels of a group, O/g.
        taps: K = kh * kw.
        split_frequencies: frequencies of a split.
        ADD: add to `out` instead of overwriting it.
        WIDE: accumulate in float64 instead of float32.
        BLOCK_K, BLOCK_I, BLOCK_O: taps, inputs and outputs a program handles.
    """
    i_program = tl.program_id(0).to(tl.int64)
    n_output_blocks = tl.cdiv(outputs, BLOCK_O)
    n_input_blocks = tl.cdiv(inputs, BLOCK_I)
    n_tap_blocks = tl.cdiv(taps, BLOCK_K)
    i_output = i_program % n_output_blocks
    i_rest = i_program // n_output_blocks
    i_input = i_rest % n_input_blocks
    i_rest = i_rest // n_input_blocks
    i_group = i_rest % groups
    i_rest = i_rest // groups
    i_taps = i_rest % n_tap_blocks
    i_split = i_rest // n_tap_blocks

    o_k = i_taps * BLOCK_K + tl.arange(0, BLOCK_K)
    o_i = i_input * BLOCK_I + tl.arange(0, BLOCK_I)
    o_o = i_output * BLOCK_O + tl.arange(0, BLOCK_O)
    o_column = i_output * (2 * BLOCK_O) + tl.arange(0, 2 * BLOCK_O)
    o_basis = i_taps * (2 * BLOCK_K) + tl.arange(0, 2 * BLOCK_K)
    m_k = o_k < taps
    m_grad = (o_i < inputs)[:, None] & (o_column < 2 * outputs)[None, :]
    o_grad = (i_group * (2 * inputs) + 2 * o_i)[:, None] * (2 * outputs) + o_column[None, :]
    grad_stride = groups * 4 * inputs * outputs

    if WIDE:
        b_acc = tl.zeros([BLOCK_K, BLOCK_I, BLOCK_O], tl.float64)
    else:
        b_acc = tl.zeros([BLOCK_K, BLOCK_I, BLOCK_O], tl.float32)
    i_begin = i_split * split_frequencies
    i_end = tl.minimum(i_begin + split_frequencies, frequencies)
    # a while loop: in the interpreter range() takes no run-time bound with every triton and numpy
    i_f = i_begin
    while i_f < i_end:
        p_grad = grad_ptr + i_f * grad_stride + o_grad
        b_upper = tl.load(p_grad, mask=m_grad, other=0.0).to(b_acc.dtype)
        b_lower = tl.load(p_grad + 2 * outputs, mask=m_grad, other=0.0).to(b_acc.dtype)
        re_re, re_im = tl.split(tl.reshape(b_upper, [BLOCK_I, BLOCK_O, 2]))
        im_re, im_im = tl.split(tl.reshape(b_lower, [BLOCK_I, BLOCK_O, 2]))
        p_basis = basis_ptr + i_f * (2 * taps) + o_basis
        b_basis = tl.load(p_basis, mask=o_basis < 2 * taps, other=0.0).to(b_acc.dtype)
        basis_re, basis_im = tl.split(tl.reshape(b_basis, [BLOCK_K, 2]))
        b_acc += basis_re[:, None, None] * (re_re + im_im)[None, :, :]
        b_acc += basis_im[:, None, None] * (re_im - im_re)[None, :, :]
        i_f += 1

    o_channel = ((i_split * groups + i_group) * outputs + o_o)[None, :] * inputs + o_i[:, None]
    p_out = out_ptr + o_channel[None, :, :] * taps + o_k[:, None, None]
    m_out = m_k[:, None, None] & ((o_i < inputs)[:, None] & (o_o < outputs)[None, :])[None, :, :]
    if ADD:
        b_acc += tl.load(p_out, mask=m_out, other=0.0).to(b_acc.dtype)
    tl.store(p_out, convert(b_acc, out_ptr), mask=m_out)


def plan_kernel_spectrum(
    weight: torch.Tensor, basis: torch.Tensor, groups: int, out: torch.Tensor, config: Spectrum | None = None
) -> Launch:
    """The launch behind `kernel_spectrum`, by default in the configuration chosen for it."""
    outputs, inputs, taps = weight.shape[0] // groups, weight.shape[1], weight.shape[2] * weight.shape[3]
    frequencies = basis.shape[0]
    assert basis.shape == (frequencies, taps, 2), "basis must have one pair for each frequency and tap"
    assert out.shape == (frequencies, groups, 2 * inputs, 2 * outputs) and out.is_contiguous()
    wide = torch.float64 in (weight.dtype, basis.dtype)
    if config is None:
        sizes = (frequencies, groups, inputs, outputs, taps)
        config = KERNEL_SPECTRUM.choose(out.device, (weight.dtype, out.dtype), sizes)
    block_f, block_i, block_o = config.shape(frequencies, inputs, outputs, 8 if wide else 4)
    meta = {
        "TAPS": taps,
        "WIDE": wide,
        "BLOCK_F": block_f,
        "BLOCK_I": block_i,
        "BLOCK_O": block_o,
        "num_warps": config.num_warps,
    }
    args = (weight.contiguous(), basis.contiguous(), out, frequencies, groups, inputs, outputs)
    programs = ceil_div(frequencies, block_f) * groups * ceil_div(inputs, block_i) * ceil_div(outputs, block_o)
    return Launch(kernel_spectrum_kernel, (programs,), args, meta)


def kernel_spectrum(weight: torch.Tensor, basis: torch.Tensor, groups: int, out: torch.Tensor) -> torch.Tensor:
    """Writes the embedded kernel spectra.

    Args:
        weight: `(O, I/g, kh, kw)` real taps.
        basis: `(Fc, kh * kw, 2)` complex exponentials.
        groups: g.
        out: `(Fc, g, 2 I/g, 2 O/g)` contiguous, any float dtype; sums are taken in float64 when `weight` or `basis`
            are float64 and in float32 otherwise.

    Returns:
        `out`.
    """
    plan_kernel_spectrum(weight, basis, groups, out).run()
    return out


def plan_kernel_spectrum_adjoint(
    grad: torch.Tensor,
    basis: torch.Tensor,
    groups: int,
    out: torch.Tensor,
    config: Adjoint | None = None,
    sums: torch.Tensor | None = None,
    apart: bool = False,
) -> tuple[Launch, torch.Tensor | None]:
    """The launch behind `kernel_spectrum_adjoint`, by default in the configuration chosen for it.

    With `sums`, the partial sums of another call, it adds to them instead; `apart` from `out` it stays in any case.

    Returns:
        The launch, and the partial sums left to be added (None: added already).
    """
    outputs, inputs, taps = out.shape[0] // groups, out.shape[1], out.shape[2] * out.shape[3]
    frequencies = basis.shape[0]
    assert basis.shape == (frequencies, taps, 2), "basis must have one pair for each frequency and tap"
    assert grad.shape == (frequencies, groups, 2 * inputs, 2 * outputs), "gradient must match basis and out"
    assert out.is_contiguous(), "out must be contiguous"
    wide = torch.float64 in (out.dtype, basis.dtype, grad.dtype)
    if config is None:
        sizes = (frequencies, groups, inputs, outputs, taps)
        config = KERNEL_SPECTRUM_ADJOINT.choose(out.device, (grad.dtype, out.dtype), sizes)
    block_k, block_i, block_o = config.shape(taps, inputs, outputs, 8 if wide else 4)
    programs = ceil_div(taps, block_k) * groups * ceil_div(inputs, block_i) * ceil_div(outputs, block_o)
    # few channels make few programs: share the frequencies out, to partial sums that are added in a fixed order
    splits = adjoint_splits(programs, frequencies) if sums is None else sums.shape[0]
    partial = sums
    if partial is None and (splits > 1 or apart):
        dtype = torch.float64 if wide else torch.float32
        partial = torch.empty((splits, *out.shape), dtype=dtype, device=out.device)
    meta = {
        "ADD": partial is sums,
        "WIDE": wide,
        "BLOCK_K": block_k,
        "BLOCK_I": block_i,
        "BLOCK_O": block_o,
        "num_warps": config.num_warps,
    }
    target = out if partial is None else partial
    args = (
        grad.contiguous(),
        basis.contiguous(),
        target,
        frequencies,
        groups,
        inputs,
        outputs,
        taps,
        ceil_div(frequencies, splits),
    )
    return Launch(kernel_spectrum_adjoint_kernel, (programs * splits,), args, meta), partial


def kernel_spectrum_adjoint(grad: torch.Tensor, basis: torch.Tensor, groups: int, out: torch.Tensor) -> torch.Tensor:
    """Adds the gradient of the taps to `out`; the same bits from run to run in one configuration.

    Args:
        grad: `(Fc, g, 2 I/g, 2 O/g)` gradient of the embedded kernel spectra, any float dtype.
        basis: `(Fc, kh * kw, 2)` complex exponentials.
        groups: g.
        out: `(O, I/g, kh, kw)` contiguous, float32 or float64.

    Returns:
        `out`.
    """
    launch, partial = plan_kernel_spectrum_adjoint(grad, basis, groups, out)
    launch.run()
    if partial is not None:
        out += partial.sum(dim=0)
    return out


def kernel_spectrum_adjoint_sums(
    grad: torch.Tensor, basis: torch.Tensor, groups: int, shape: torch.Size, sums: torch.Tensor | None
) -> torch.Tensor:
    """`kernel_spectrum_adjoint` of several chunks of frequencies, whose partial sums are added up at the end.

    Args:
        grad, basis, groups: of a chunk, the first one no smaller than the others.
        shape: of the taps, `(O, I/g, kh, kw)`.
        sums: what the last call returned, to be added to; None for the first chunk.

    Returns:
        `(splits, *shape)`, float64 where `grad` or `basis` are and float32 otherwise: its sum over the first dimension
        is the gradient of the taps.
    """
    out = grad.new_empty(shape) if sums is None else sums[0]
    launch, partial = plan_kernel_spectrum_adjoint(grad, basis, groups, out, None, sums, apart=True)
    launch.run()
    assert partial is not None
    return partial
