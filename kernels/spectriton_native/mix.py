"""Products of small complex matrices at every frequency: mixing of channels, spectra of taps, and their gradients."""

from __future__ import annotations

import ctypes

from torch import Tensor

from spectriton_native._call import call


def most_channels() -> int:
    """Up to how many channels, of inputs or of outputs, these functions are faster than PyTorch's libraries."""
    return int(call("most_channels", result=ctypes.c_int64))


def mix(x: Tensor, weights: Tensor, out: Tensor, transposed: bool = False, add: bool = False) -> None:
    """Writes, or adds to, ``out`` ``(Fc, B, N, 2)`` products of ``x`` ``(Fc, B, K, 2)``, group by group.

    Args:
        x: pairs; frequencies may stand apart.
        weights: ``(Fc, g, K / g, N / g, 2)``, or with ``transposed`` ``(Fc, g, N / g, K / g, 2)``, whose conjugate
            transposes are taken; frequencies may stand apart.
        out: pairs; frequencies may stand apart.
        transposed: see ``weights``.
        add: to what is there.
    """
    rows, groups, terms, columns, _ = weights.shape
    if transposed:
        terms, columns = columns, terms
    given = (x, x.stride(0), weights, weights.stride(0), rows, x.shape[1], groups, terms, columns)
    call("mix", *given, transposed, add, out, out.stride(0))


def mix_grad_weights(x: Tensor, grad: Tensor, out: Tensor) -> None:
    """Writes ``out`` ``(Fc, g, I / g, O / g, 2)``: sums over the batch of ``conj(x)`` times ``grad``.

    Args:
        x: pairs ``(Fc, B, I, 2)``; frequencies may stand apart.
        grad: pairs ``(Fc, B, O, 2)``, likewise.
        out: pairs.
    """
    call("mix_grad_weights", x, x.stride(0), grad, grad.stride(0), *x.shape[:2], *out.shape[1:4], out)


def kernel_spectrum(taps: Tensor, basis: Tensor, out: Tensor) -> None:
    """Writes ``out`` ``(Fc, n, 2)``, the spectrum of taps ``(T, n)``, for a basis ``(Fc, T, 2)``."""
    call("kernel_spectrum", taps, basis, *basis.shape[:2], taps.shape[1], out)


def kernel_spectrum_adjoint(grad: Tensor, basis: Tensor, out: Tensor) -> None:
    """Adds to taps ``out`` ``(T, n)``, whose rows may stand apart, for a spectrum's gradient ``(Fc, n, 2)``."""
    call("kernel_spectrum_adjoint", grad, basis, *basis.shape[:2], out.shape[1], out, out.stride(0))
