"""Mixing of channels at every frequency, and its gradients: the matrix products of a convolution.

``x`` and ``out`` are pairs ``(Fc, B, C, 2)`` of a chunk of frequencies, ``basis`` their tap basis ``(Fc, kh * kw, 2)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectriton import reference


class Mixing:
    """By complex matrix products: the CPU's libraries are at their best there.

    Args:
        weight: taps ``(O, I / groups, kh, kw)`` in the precision of the products.
        groups: as for ``nn.Conv2d``.
    """

    #: Complex numbers a frequency that stand beside the chunk, for each pair of channels: in forward, and in backward.
    temporaries = (3, 3)

    def __init__(self, weight: Tensor, groups: int) -> None:
        self.shape = weight.shape
        self.groups = groups
        self._taps = reference.taps_matrix(weight, groups)
        self._gradient: Tensor | None = None

    def weights(self, basis: Tensor) -> Tensor:
        """The kernel spectrum of a chunk, for the products: ``(Fc, g, I / g, O / g)`` complex."""
        outputs, inputs = self.shape[:2]
        spectrum = reference.complex_kernel_spectrum(self._taps, basis)
        return spectrum.view(-1, self.groups, inputs, outputs // self.groups)

    def of_inputs(self, weights: Tensor, inputs: slice) -> Tensor:
        """The part of :meth:`weights` for a range of input channels."""
        return weights if inputs == slice(0, self.shape[1]) else weights[:, :, inputs]

    def mix(self, x: Tensor, weights: Tensor, out: Tensor, add: bool = False) -> None:
        """``out[f, b, o] = sum_i x[f, b, i] weights[f, i, o]``; ``add`` adds it to what is there."""
        _matmul_into(torch.view_as_complex(x), weights, torch.view_as_complex(out), add)

    def mix_grad_input(self, grad: Tensor, weights: Tensor, out: Tensor) -> None:
        """``out[f, b, i] = sum_o grad[f, b, o] conj(weights[f, i, o])``."""
        _matmul_into(torch.view_as_complex(grad), weights.mH, torch.view_as_complex(out))

    def add_grad_taps(self, x: Tensor, grad: Tensor, basis: Tensor, inputs: slice | None = None) -> None:
        """Adds what a chunk contributes to the gradient of the taps of a range of input channels, by default all."""
        left, right = (_by_group(torch.view_as_complex(pairs), self.groups) for pairs in (x, grad))
        spectrum = torch.matmul(left.mH, right)  # sum_b conj(x[f, b, i]) grad[f, b, o]
        taps = reference.complex_kernel_spectrum_adjoint(spectrum.flatten(1), basis)
        if self._gradient is None:
            self._gradient = torch.zeros_like(self._taps)
        if inputs is None or inputs == slice(0, self.shape[1]):
            self._gradient += taps
        else:
            whole = self._gradient.view(taps.shape[0], self.shape[1], self.shape[0])
            whole[:, inputs] += taps.view(taps.shape[0], -1, self.shape[0])

    def grad_taps(self) -> Tensor:
        """``(O, I / g, kh, kw)``: what was added."""
        matrix = torch.zeros_like(self._taps) if self._gradient is None else self._gradient
        return reference.taps_of_matrix(matrix, self.shape, self.groups)


class EmbeddedMixing(Mixing):
    """By real matrix products of embedded weights, made by the Triton kernels: tensor cores apply."""

    temporaries = (2, 4)  # the weights, embedded; and their gradient

    def __init__(self, weight: Tensor, groups: int) -> None:
        import spectriton_kernels as kernels

        self._kernels = kernels
        self.shape = weight.shape
        self.groups = groups
        self._taps = weight.contiguous()
        self._sums: dict[int, Tensor] = {}  # by the first of the input channels

    def weights(self, basis: Tensor) -> Tensor:
        """``(Fc, g, 2 I / g, 2 O / g)`` real."""
        outputs, inputs = self.shape[:2]
        out = self._taps.new_empty(basis.shape[0], self.groups, 2 * inputs, 2 * outputs // self.groups)
        return self._kernels.kernel_spectrum(self._taps, basis, self.groups, out)

    def of_inputs(self, weights: Tensor, inputs: slice) -> Tensor:
        """As for complex products."""
        return weights[:, :, 2 * inputs.start : 2 * inputs.stop]

    def mix(self, x: Tensor, weights: Tensor, out: Tensor, add: bool = False) -> None:
        """As by complex products, weights embedded."""
        _matmul_into(x.flatten(2), weights, out.flatten(2), add)

    def mix_grad_input(self, grad: Tensor, weights: Tensor, out: Tensor) -> None:
        """As by complex products: the transpose of an embedded weight is its conjugate transpose."""
        _matmul_into(grad.flatten(2), weights.mT, out.flatten(2))

    def add_grad_taps(self, x: Tensor, grad: Tensor, basis: Tensor, inputs: slice | None = None) -> None:
        """As by complex products, through the gradient of the embedded weights."""
        left, right = (_by_group(pairs.flatten(2), self.groups) for pairs in (x, grad))
        spectrum = torch.matmul(left.mT, right)
        first = 0 if inputs is None else inputs.start
        shape, sums = torch.Size((self.shape[0], x.shape[2] // self.groups, *self.shape[2:])), self._sums.get(first)
        self._sums[first] = self._kernels.kernel_spectrum_adjoint_sums(spectrum, basis, self.groups, shape, sums)

    def grad_taps(self) -> Tensor:
        """``(O, I / g, kh, kw)``: what was added."""
        if not self._sums:
            return torch.zeros_like(self._taps)
        every = (self._sums[first] for first in sorted(self._sums))
        parts = [sums[0] if sums.shape[0] == 1 else sums.sum(0) for sums in every]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _by_group(chunk: Tensor, groups: int) -> Tensor:
    """``(Fc, B, C)`` as ``(Fc, g, B, C / g)``, a view."""
    return chunk.view(*chunk.shape[:2], groups, chunk.shape[2] // groups).transpose(1, 2)


def _matmul_into(x: Tensor, weights: Tensor, out: Tensor, add: bool = False) -> None:
    """``out`` ``(Fc, B, N) = x`` ``(Fc, B, K)`` times ``weights`` ``(Fc, g, K / g, N / g)``, group by group."""
    if weights.shape[1] == 1 and out.is_contiguous():
        if weights.shape[2] == 1 and not add:  # which libraries for products take several times as long for
            torch.mul(x, weights[:, 0], out=out)
        elif add:
            torch.baddbmm(out, x, weights[:, 0], out=out)
        else:
            torch.bmm(x, weights[:, 0], out=out)
        return
    # A strided result would send bmm down a slow path, so it goes through a contiguous one.
    product, target = torch.matmul(_by_group(x, weights.shape[1]), weights), _by_group(out, weights.shape[1])
    if add:
        target += product
    else:
        target.copy_(product)
