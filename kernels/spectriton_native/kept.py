"""What is kept of rows of packed spectra."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from spectriton_native._call import FORMATS, call, check_complete
from spectriton_native.rows import Part


def sum_kept(
    part: Part, values: Tensor, scales: Tensor, first: int, weight: Tensor, numbers: Tensor | None, sums: Tensor
) -> None:
    """Adds to ``sums`` ``(positions,)`` float64, over rows times ``weight`` ``(Fc,)``: values times ``numbers``.

    ``numbers`` ``(n, 2)`` stand as the values do from ``first`` on; without them values are squared.
    """
    given = (part, values, FORMATS[values.dtype], scales, first, weight, numbers)
    check_complete(call("sum_kept", *given, sums, result=ctypes.c_int))


def combine_kept(
    part: Part,
    values: Tensor,
    scales: Tensor,
    first: int,
    gain: Tensor | None,
    weight: Tensor | None,
    numbers: Tensor | None,
    factors: Tensor | None,
    out: Tensor,
) -> None:
    """Writes ``out`` ``(n, 2)``: values times ``gain`` (a place) and ``weight`` (a row), plus ``numbers * factors``.

    Values are left out without a ``gain``. ``out`` may be the numbers.
    """
    given = (part, values, FORMATS[values.dtype], scales, first, gain, weight, numbers, factors)
    check_complete(call("combine_kept", *given, out, result=ctypes.c_int))


class Norm(ctypes.Structure):
    """A batch norm as the functions take it. See :func:`Norm.of`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "channels", "elements", "batch_statistics")),
        *((name, ctypes.c_void_p) for name in ("mean", "var", "gamma", "beta")),
        ("eps", ctypes.c_double),
    )

    @staticmethod
    def of(
        maps: tuple[int, int, int],
        mean: Tensor | None = None,
        var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 0.0,
        batch_statistics: bool = True,
    ) -> Norm:
        """Of ``maps``, batch, channels and elements of a map; parameters are ``(C,)``, as of ``nn.BatchNorm2d``.

        ``batch_statistics`` says for gradients that mean and variance are those of the batch.
        """
        tensors = (mean, var, weight, bias)
        norm = Norm(*maps, batch_statistics, *(None if t is None else t.data_ptr() for t in tensors), eps)
        norm.held = tensors  # as long as there are pointers to them
        return norm


def norm_statistics(part: Part, values: Tensor, scales: Tensor, weight: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(C,)`` of the maps of a packed spectrum.

    Args:
        part: all tiles of the rows from frequency zero on.
        values, scales: what is stored.
        weight: ``(F,)``, how often a coefficient counts in a map.
        norm: without parameters.
    """
    mean, var = torch.empty(norm.channels), torch.empty(norm.channels)
    given = (part, values, FORMATS[values.dtype], scales, weight, norm)
    check_complete(call("norm_statistics", *given, *_room(part, norm), mean, var, result=ctypes.c_int))
    return mean, var


def norm_gradients(
    part: Part, values: Tensor, scales: Tensor, weight: Tensor, norm: Norm, grad: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients ``(C,)`` of weight and bias of a batch norm; writes that of the values, where asked for.

    Args:
        part, values, scales, weight: as of :func:`norm_statistics`.
        norm: with mean and variance.
        grad: ``(N, 2)``, of what the norm gives, which stand as the values do.
        out: ``(N, 2)``, may be ``grad``.
    """
    of_weight, of_bias = torch.empty(norm.channels), torch.empty(norm.channels)
    places, sums = _room(part, norm)
    stored = (part, values, FORMATS[values.dtype], scales, weight, norm)
    given = (*stored, grad, places, sums, torch.empty(2, sums.numel()), out, of_weight, of_bias)
    check_complete(call("norm_gradients", *given, result=ctypes.c_int))
    return of_weight, of_bias


def _room(part: Part, norm: Norm) -> tuple[Tensor, Tensor]:
    return torch.empty(norm.batch * norm.channels, dtype=torch.int64), torch.zeros(part.positions, dtype=torch.float64)


def norm_planes(norm: Norm) -> tuple[Tensor, Tensor]:
    """A batch norm as a factor and a shift for each plane, ``(B * C,)``."""
    gain, shift = torch.empty(2, norm.batch * norm.channels)
    call("norm_planes", norm, gain, shift)
    return gain, shift
