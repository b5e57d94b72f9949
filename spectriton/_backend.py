"""Which implementation of the primitives runs: the Triton kernels or the plain PyTorch reference.

``SPECTRITON_BACKEND`` says ``auto`` (the default: Triton on GPUs, the reference on the CPU), ``triton`` (also on the
CPU, where it needs ``TRITON_INTERPRET=1``) or ``reference``. It is read at every call, so tests can change it.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from spectriton import reference
from spectriton.frequencies import FrequencyGrid
from spectriton.reference import RowPattern
from spectriton.reference.pattern import within_row
from spectriton.reference.spectral_activation import activate_backward
from spectriton.reference.unpack import read_values

BACKENDS = ("auto", "triton", "reference")
_MIB = 1 << 20


def backend_name(device: torch.device) -> str:
    """``"triton"`` or ``"reference"``: what runs on ``device``.

    Raises:
        ValueError: ``SPECTRITON_BACKEND`` is set to something else than one of :data:`BACKENDS`, or to ``triton`` for
            the CPU without the interpreter.
    """
    choice = os.environ.get("SPECTRITON_BACKEND", "auto")
    if choice not in BACKENDS:
        raise ValueError(
            f"spectriton: SPECTRITON_BACKEND got {choice!r}, expected one of {', '.join(BACKENDS)}; "
            "unset it to let the device decide"
        )
    if choice == "auto":
        return "triton" if device.type == "cuda" else "reference"
    if choice == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "spectriton: SPECTRITON_BACKEND got 'triton' for CPU tensors, expected a GPU or Triton's interpreter; "
            "set TRITON_INTERPRET=1 before anything imports triton"
        )
    return choice


def workspace_bytes(workspace: int | None, device: torch.device) -> int:
    """The bound on temporaries in bytes: ``workspace``, else ``SPECTRITON_WORKSPACE_MIB``, else the device's default.

    On a CPU chunks should stay in the caches; on a GPU they should be large enough to fill it.
    """
    if workspace is not None:
        return workspace
    setting = os.environ.get("SPECTRITON_WORKSPACE_MIB")
    if setting is None:
        return (4 if device.type == "cpu" else 64) * _MIB
    try:
        size = float(setting)
    except ValueError:
        size = 0.0
    if not size > 0:
        raise ValueError(
            f"spectriton: SPECTRITON_WORKSPACE_MIB got {setting!r}, expected a positive number of MiB; unset it for "
            "the default"
        )
    return int(size * _MIB)


class Backend:
    """The primitives in plain PyTorch; what another backend does not override, it takes from here.

    Channels are mixed by complex matrix products: the CPU's libraries are at their best there.
    """

    name = "reference"
    complex_product = staticmethod(reference.complex_product)
    spectral_activation = staticmethod(reference.spectral_activation)
    spectral_activation_backward = staticmethod(reference.spectral_activation_backward)
    kernel_spectrum = staticmethod(reference.kernel_spectrum)
    kernel_spectrum_adjoint = staticmethod(reference.kernel_spectrum_adjoint)
    pack_rows = staticmethod(reference.pack_rows)
    unpack_rows = staticmethod(reference.unpack_rows)
    gather_rows = staticmethod(reference.gather_rows)
    gather_planes = staticmethod(reference.gather_planes)
    pack_planes = staticmethod(reference.pack_planes)
    unpack_planes = staticmethod(reference.unpack_planes)

    def row_pattern(self, bitmap: Tensor, offsets: Tensor, rows: Tensor, t0: int, t1: int) -> RowPattern | None:
        """What may be handed to :meth:`unpack_rows` and :meth:`gather_rows` to save reading the bitmap twice."""
        return reference.row_pattern(bitmap, offsets, rows, t0, t1)

    def mixing_weights(self, weight: Tensor, basis: Tensor, groups: int) -> Tensor:
        """``(Fc, g, I / g, O / g)`` complex."""
        return reference.complex_kernel_spectrum(weight, basis, groups)

    def mixing_taps(self, grad: Tensor, basis: Tensor, out: Tensor) -> None:
        """Adds the gradient for the taps to ``out`` ``(O, I / g, kh, kw)``."""
        out += reference.complex_kernel_spectrum_adjoint(grad, basis, (out.shape[2], out.shape[3]))

    @staticmethod
    def mix(x: Tensor, weights: Tensor, out: Tensor) -> None:
        """``out[f, b, o] = sum_i x[f, b, i] weights[f, i, o]`` on pairs ``(Fc, B, C, 2)``."""
        _matmul_into(torch.view_as_complex(x), weights, torch.view_as_complex(out))

    @staticmethod
    def mix_grad_input(grad: Tensor, weights: Tensor, out: Tensor) -> None:
        """``out[f, b, i] = sum_o grad[f, b, o] conj(weights[f, i, o])``."""
        _matmul_into(torch.view_as_complex(grad), weights.mH, torch.view_as_complex(out))

    @staticmethod
    def mix_grad_weights(x: Tensor, grad: Tensor, groups: int) -> Tensor:
        """``(Fc, g, I / g, O / g)``: ``sum_b conj(x[f, b, i]) grad[f, b, o]``."""
        left, right = (_by_group(torch.view_as_complex(pairs), groups) for pairs in (x, grad))
        return torch.matmul(left.mH, right)

    def unpack_gradient_rows(
        self,
        grad: Tensor,
        values: Tensor,
        scales: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        rows: Tensor,
        kind: str,
        scale: Tensor | None,
        channels: int,
        out: Tensor,
    ) -> Tensor | None:
        """Writes ``grad * h'`` of ``rows`` to ``out`` ``(Fc, P, 2)``; returns the ``(channels,)`` gradient for scale.

        ``h'`` is taken from the outputs in ``values``; ``grad`` ``(N, 2)`` stands in their order.
        """
        pattern = reference.row_pattern(bitmap, offsets, rows, 0, offsets.shape[1])
        kept = grad[pattern.slots]
        grad_scale = None
        if kind != "identity":
            tile_scales = scales[rows] if scales.numel() else scales
            output = read_values(values, scales, pattern, tile_scales, out.dtype)
            of_kept = channel = None
            if scale is not None:
                channel = torch.arange(out.shape[1], device=out.device) % channels
                channel = channel.index_select(0, within_row(pattern, out.shape[0], out.shape[1]))
                of_kept = scale.index_select(0, channel)[:, None].to(out.dtype)
            kept, terms = activate_backward(kept, output, kind, of_kept)
            if terms is not None and channel is not None:
                grad_scale = torch.zeros(channels, dtype=out.dtype, device=out.device)
                grad_scale.index_add_(0, channel, terms.sum(-1))
        flat = torch.view_as_complex(out).view(-1)
        flat.zero_().scatter_(0, pattern.positions, torch.view_as_complex(kept.contiguous()))
        return grad_scale


class TritonBackend(Backend):
    """The Triton kernels; integer values are left to the reference.

    Channels are mixed by real matrix products of embedded weights: tensor cores apply.
    """

    name = "triton"

    def __init__(self) -> None:
        import spectriton_kernels as kernels

        self._kernels = kernels
        self.complex_product = kernels.complex_product
        self.spectral_activation = kernels.spectral_activation
        self.spectral_activation_backward = kernels.spectral_activation_backward
        self.kernel_spectrum = kernels.kernel_spectrum
        self.kernel_spectrum_adjoint = kernels.kernel_spectrum_adjoint

    def row_pattern(self, bitmap: Tensor, offsets: Tensor, rows: Tensor, t0: int, t1: int) -> RowPattern | None:
        """None: the kernels read the bitmap themselves."""
        return None

    def pack_rows(
        self,
        y: Tensor,
        length: int,
        threshold: float | Tensor,
        rows: Tensor,
        t0: int,
        bitmap: Tensor,
        offsets: Tensor,
        values: Tensor,
        cursor: Tensor,
        kind: str = "identity",
        scale: Tensor | None = None,
        channels: int = 1,
        scales: Tensor | None = None,
    ) -> None:
        """As the reference's."""
        arguments = (y, length, threshold, rows, t0, bitmap, offsets, values, cursor, kind, scale, channels)
        if scales is not None and scales.numel():
            reference.pack_rows(*arguments, scales=scales)
        else:
            self._kernels.pack_rows(*arguments)

    def unpack_rows(
        self,
        values: Tensor,
        scales: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        rows: Tensor,
        t0: int,
        t1: int,
        out: Tensor,
        pattern: RowPattern | None = None,
    ) -> Tensor:
        """As the reference's."""
        implementation = reference if scales.numel() else self._kernels
        return implementation.unpack_rows(values, scales, bitmap, offsets, rows, t0, t1, out)

    def gather_rows(
        self,
        y: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        rows: Tensor,
        t0: int,
        out: Tensor,
        pattern: RowPattern | None = None,
    ) -> Tensor:
        """As the reference's."""
        return self._kernels.gather_rows(y, bitmap, offsets, rows, t0, out)

    def pack_planes(
        self,
        half: Tensor,
        grid: FrequencyGrid,
        threshold: float,
        t0: int,
        bitmap: Tensor,
        offsets: Tensor,
        values: Tensor,
        cursor: Tensor,
        scales: Tensor | None = None,
    ) -> None:
        """As the reference's, through frequency-major rows."""
        chunk = _rows_of_half(half, grid, bitmap.shape[2] * 8)
        rows = torch.arange(grid.count, device=half.device)
        length = t0 * bitmap.shape[2] * 8 + half.shape[0]
        self.pack_rows(chunk, length, threshold, rows, t0, bitmap, offsets, values, cursor, scales=scales)

    def gather_planes(
        self,
        half: Tensor,
        grid: FrequencyGrid,
        bitmap: Tensor,
        offsets: Tensor,
        t0: int,
        row_scale: Tensor | None,
        out: Tensor,
    ) -> Tensor:
        """As the reference's, through frequency-major rows."""
        chunk = _rows_of_half(half, grid, bitmap.shape[2] * 8)
        if row_scale is not None:
            chunk *= row_scale.to(chunk.dtype)[:, None, None]
        rows = torch.arange(grid.count, device=half.device)
        return self.gather_rows(chunk, bitmap, offsets, rows, t0, out)

    def unpack_planes(
        self,
        values: Tensor,
        scales: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        grid: FrequencyGrid,
        t0: int,
        t1: int,
        count: int,
        row_scale: Tensor | None,
        out: Tensor,
    ) -> Tensor:
        """As the reference's."""
        implementation = reference if scales.numel() else self._kernels
        return implementation.unpack_planes(values, scales, bitmap, offsets, grid, t0, t1, count, row_scale, out)

    def mixing_weights(self, weight: Tensor, basis: Tensor, groups: int) -> Tensor:
        """``(Fc, g, 2 I / g, 2 O / g)`` real."""
        outputs, inputs = weight.shape[:2]
        out = weight.new_empty(basis.shape[0], groups, 2 * inputs, 2 * outputs // groups)
        return self._kernels.kernel_spectrum(weight.contiguous(), basis, groups, out)

    def mixing_taps(self, grad: Tensor, basis: Tensor, out: Tensor) -> None:
        """Adds the gradient for the taps to ``out`` ``(O, I / g, kh, kw)``."""
        self._kernels.kernel_spectrum_adjoint(grad, basis, grad.shape[1], out)

    @staticmethod
    def mix(x: Tensor, weights: Tensor, out: Tensor) -> None:
        """As the reference's, weights embedded."""
        _matmul_into(x.flatten(2), weights, out.flatten(2))

    @staticmethod
    def mix_grad_input(grad: Tensor, weights: Tensor, out: Tensor) -> None:
        """As the reference's, weights embedded: the transpose of an embedded weight is its conjugate transpose."""
        _matmul_into(grad.flatten(2), weights.mT, out.flatten(2))

    @staticmethod
    def mix_grad_weights(x: Tensor, grad: Tensor, groups: int) -> Tensor:
        """``(Fc, g, 2 I / g, 2 O / g)``: the gradient of the embedded weights."""
        left, right = (_by_group(pairs.flatten(2), groups) for pairs in (x, grad))
        return torch.matmul(left.mT, right)

    def unpack_gradient_rows(
        self,
        grad: Tensor,
        values: Tensor,
        scales: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        rows: Tensor,
        kind: str,
        scale: Tensor | None,
        channels: int,
        out: Tensor,
    ) -> Tensor | None:
        """As the reference's, on the dense chunk."""
        tiles = offsets.shape[1]
        self.unpack_rows(grad, scales.new_empty(0), bitmap, offsets, rows, 0, tiles, out)
        if kind == "identity":
            return None
        output = torch.empty_like(out)
        self.unpack_rows(values, scales, bitmap, offsets, rows, 0, tiles, output)
        if scale is None:
            product, _ = self.spectral_activation_backward(
                torch.view_as_complex(out), torch.view_as_complex(output), kind
            )
            out.copy_(torch.view_as_real(product))
            return None
        # Channels to dimension 1, (Fc * B, C); padding is left alone, it holds zeros.
        row = out.shape[1] // channels * channels
        grads, outputs = (torch.view_as_complex(t)[:, :row].reshape(-1, channels) for t in (out, output))
        product, grad_scale = self.spectral_activation_backward(grads, outputs, kind, scale.to(out.dtype))
        torch.view_as_complex(out)[:, :row] = product.view(out.shape[0], row)
        return grad_scale


def _rows_of_half(half: Tensor, grid: FrequencyGrid, tile: int) -> Tensor:
    """Half spectra ``(n, H, Wh)`` to pairs ``(F, padded, 2)``, padded to whole tiles."""
    rows = torch.view_as_real(half.flatten(1).T[grid.index])
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[1] % tile))


def _by_group(chunk: Tensor, groups: int) -> Tensor:
    """``(Fc, B, C)`` as ``(Fc, g, B, C / g)``, a view."""
    return chunk.unflatten(2, (groups, -1)).transpose(1, 2)


def _matmul_into(x: Tensor, weights: Tensor, out: Tensor) -> None:
    """``out`` ``(Fc, B, N) = x`` ``(Fc, B, K)`` times ``weights`` ``(Fc, g, K / g, N / g)``, group by group."""
    if weights.shape[1] == 1 and out.is_contiguous():
        torch.bmm(x, weights[:, 0], out=out)
    else:
        # A strided result would send bmm down a slow path, so it goes through a contiguous one.
        _by_group(out, weights.shape[1]).copy_(torch.matmul(_by_group(x, weights.shape[1]), weights))


_REFERENCE = Backend()
_triton: TritonBackend | None = None


def backend(device: torch.device) -> Backend:
    """The backend for tensors on ``device``."""
    global _triton
    if backend_name(device) == "reference":
        return _REFERENCE
    if _triton is None:
        _triton = TritonBackend()
    return _triton
