"""Packing of spectra and of maps, and back: ``pack``, ``unpack``, ``to_spectral``, ``to_spatial``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectriton._check import check_complex, check_rank, check_real_maps, fail
from spectriton.frequencies import frequency_grid
from spectriton.ops._arguments import check_packed, check_rounding, check_rule, check_size, check_workspace
from spectriton.ops._define import PACKED_FIELDS, PACKED_RESULT, define_op
from spectriton.ops._planes import (
    Packed,
    fake_packed,
    gather_maps,
    gather_planes,
    pack_planes,
    plane_slices,
    resolve_workspace,
    rows_of_maps,
    rows_of_spectrum,
    unpack_maps,
    unpack_planes,
)
from spectriton.packed import PackedSpectrum, layout, value_dtype_name


def _precision(tensor: Tensor) -> torch.dtype:
    """Real precision of the coefficients made from ``tensor``: double stays double, the rest is single."""
    return torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32


# -- half spectrum <-> packed ---------------------------------------------------------------------------------------


@define_op(
    f"(Tensor spectrum, int height, int width, float threshold, float density, str value_dtype, int workspace, "
    f"Tensor? seed) "
    f"-> {PACKED_RESULT}"
)
def _pack(
    spectrum: Tensor,
    height: int,
    width: int,
    threshold: float,
    density: float,
    value_dtype: str,
    workspace: int,
    seed: Tensor | None,
) -> Packed:
    dtype, sizes = _precision(spectrum), layout((*spectrum.shape[:2], height, width))
    return pack_planes(
        rows_of_spectrum(spectrum, (height, width), dtype),
        sizes,
        threshold,
        density,
        value_dtype,
        dtype,
        spectrum.device,
        resolve_workspace(workspace, spectrum.device, sizes),
        seed,
    )


@_pack.register_fake
def _(
    spectrum: Tensor,
    height: int,
    width: int,
    threshold: float,
    density: float,
    value_dtype: str,
    workspace: int,
    seed: Tensor | None,
) -> Packed:
    return fake_packed(spectrum, _precision(spectrum), [*spectrum.shape[:2], height, width], value_dtype)


@define_op("(Tensor grad, Tensor bitmap, Tensor offsets, SymInt[] shape, int workspace) -> Tensor")
def _pack_backward(grad: Tensor, bitmap: Tensor, offsets: Tensor, shape: list[int], workspace: int) -> Tensor:
    """Packed gradient to the half spectrum's: zero at the positions that packing does not read."""
    grid = frequency_grid(shape[2], shape[3], grad.device)
    out = torch.empty(*shape[:3], grid.half_width, 2, dtype=grad.dtype, device=grad.device)
    planes = out.flatten(0, 1)
    packed = (grad.contiguous(), grad.new_empty(0), bitmap, offsets)
    sizes = layout(shape)
    for half in unpack_planes(*packed, sizes, resolve_workspace(workspace, grad.device, sizes), planes):
        flat = half.flatten(1, 2)
        flat.index_fill_(1, grid.mirror_index, 0)
        flat[..., 1].index_fill_(1, grid.index[grid.self_conjugate], 0)
    return torch.view_as_complex(out)


@_pack_backward.register_fake
def _(grad: Tensor, bitmap: Tensor, offsets: Tensor, shape: list[int], workspace: int) -> Tensor:
    dtype = torch.complex128 if grad.dtype == torch.float64 else torch.complex64
    return grad.new_empty(*shape[:3], shape[3] // 2 + 1, dtype=dtype)


def _pack_setup(ctx: Any, inputs: tuple[Any, ...], output: Packed) -> None:
    spectrum, height, width, _, _, _, workspace, _ = inputs
    ctx.shape, ctx.workspace, ctx.dtype = [*spectrum.shape[:2], height, width], workspace, spectrum.dtype
    ctx.mark_non_differentiable(output[1], output[2])  # gradients travel along the edge
    ctx.set_materialize_grads(False)  # no zeros of the size of the values
    ctx.save_for_backward(output[3], output[4])


def _pack_autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    bitmap, offsets = ctx.saved_tensors
    grad_spectrum = _pack_backward(grad, bitmap, offsets, ctx.shape, ctx.workspace)
    return grad_spectrum.to(ctx.dtype), None, None, None, None, None, None, None


_pack.register_autograd(_pack_autograd, setup_context=_pack_setup)


@define_op(f"(Tensor edge, {PACKED_FIELDS}, SymInt[] shape) -> Tensor")
def _unpack(edge: Tensor, values: Tensor, scales: Tensor, bitmap: Tensor, offsets: Tensor, shape: list[int]) -> Tensor:
    """Packed to half spectra ``(B, C, H, Wh)``."""
    out = torch.empty(*shape[:3], shape[3] // 2 + 1, 2, dtype=edge.dtype, device=values.device)
    packed, sizes = (values, scales, bitmap, offsets), layout(shape)
    for _ in unpack_planes(*packed, sizes, resolve_workspace(0, values.device, sizes), out.flatten(0, 1)):
        pass  # each chunk is written where it belongs
    return torch.view_as_complex(out)


@_unpack.register_fake
def _(edge: Tensor, values: Tensor, scales: Tensor, bitmap: Tensor, offsets: Tensor, shape: list[int]) -> Tensor:
    dtype = torch.complex128 if edge.dtype == torch.float64 else torch.complex64
    return values.new_empty(*shape[:3], shape[3] // 2 + 1, dtype=dtype)


@define_op("(Tensor grad, Tensor bitmap, Tensor offsets, SymInt kept, SymInt[] shape) -> Tensor")
def _unpack_backward(grad: Tensor, bitmap: Tensor, offsets: Tensor, kept: int, shape: list[int]) -> Tensor:
    """Gradient of half spectra to the packed one: a stored coefficient collects that of its mirror image too."""
    dtype, sizes = _precision(grad), layout(shape)
    return gather_planes(
        rows_of_spectrum(grad, (shape[2], shape[3]), dtype, fold=True),
        bitmap,
        offsets,
        kept,
        sizes,
        dtype,
        resolve_workspace(0, grad.device, sizes),
    )


@_unpack_backward.register_fake
def _(grad: Tensor, bitmap: Tensor, offsets: Tensor, kept: int, shape: list[int]) -> Tensor:
    return grad.new_empty(kept, 2, dtype=_precision(grad))


def _unpack_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    edge, _, _, bitmap, offsets, shape = inputs
    ctx.kept, ctx.shape = edge.shape[0], shape
    ctx.save_for_backward(bitmap, offsets)


def _unpack_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _unpack_backward(grad, *ctx.saved_tensors, ctx.kept, ctx.shape), None, None, None, None, None


_unpack.register_autograd(_unpack_autograd, setup_context=_unpack_setup)


# -- maps <-> packed ------------------------------------------------------------------------------------------------


@define_op(
    f"(Tensor x, float threshold, float density, str value_dtype, int workspace, Tensor? seed) -> {PACKED_RESULT}"
)
def _to_spectral(
    x: Tensor, threshold: float, density: float, value_dtype: str, workspace: int, seed: Tensor | None
) -> Packed:
    dtype, sizes = _precision(x), layout(x.shape)
    return pack_planes(
        rows_of_maps(plane_slices(x), sizes, dtype, x.device),
        sizes,
        threshold,
        density,
        value_dtype,
        dtype,
        x.device,
        resolve_workspace(workspace, x.device, sizes),
        seed,
    )


@_to_spectral.register_fake
def _(x: Tensor, threshold: float, density: float, value_dtype: str, workspace: int, seed: Tensor | None) -> Packed:
    return fake_packed(x, _precision(x), x.shape, value_dtype)


@define_op("(Tensor grad, Tensor bitmap, Tensor offsets, SymInt[] shape, int workspace) -> Tensor")
def _to_spectral_backward(grad: Tensor, bitmap: Tensor, offsets: Tensor, shape: list[int], workspace: int) -> Tensor:
    """The adjoint of ``rfft2`` restricted to a pattern."""
    return _maps(grad.contiguous(), grad.new_empty(0), bitmap, offsets, shape, False, grad.dtype, workspace)


@_to_spectral_backward.register_fake
def _(grad: Tensor, bitmap: Tensor, offsets: Tensor, shape: list[int], workspace: int) -> Tensor:
    return grad.new_empty(shape)


def _to_spectral_setup(ctx: Any, inputs: tuple[Any, ...], output: Packed) -> None:
    x, _, _, _, workspace, _ = inputs
    ctx.shape, ctx.workspace, ctx.dtype = list(x.shape), workspace, x.dtype
    ctx.mark_non_differentiable(output[1], output[2])  # gradients travel along the edge
    ctx.set_materialize_grads(False)  # no zeros of the size of the values
    ctx.save_for_backward(output[3], output[4])


def _to_spectral_autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    grad_x = _to_spectral_backward(grad, *ctx.saved_tensors, ctx.shape, ctx.workspace)
    return grad_x.to(ctx.dtype), None, None, None, None, None


_to_spectral.register_autograd(_to_spectral_autograd, setup_context=_to_spectral_setup)


def _maps(
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    shape: list[int],
    weighted: bool,
    dtype: torch.dtype,
    workspace: int,
) -> Tensor:
    """Packed coefficients to real maps ``(B, C, H, W)``, a chunk of planes at a time."""
    x = torch.empty(shape, dtype=dtype, device=values.device)
    sizes = layout(shape)
    bound = resolve_workspace(workspace, values.device, sizes)
    for _ in unpack_maps(values, scales, bitmap, offsets, sizes, weighted, bound, plane_slices(x)):
        pass  # each chunk is written where it belongs
    return x


@define_op(f"(Tensor edge, {PACKED_FIELDS}, SymInt[] shape, int workspace) -> Tensor")
def _to_spatial(
    edge: Tensor, values: Tensor, scales: Tensor, bitmap: Tensor, offsets: Tensor, shape: list[int], workspace: int
) -> Tensor:
    """Packed to real maps ``(B, C, H, W)``."""
    return _maps(values, scales, bitmap, offsets, shape, True, edge.dtype, workspace)


@_to_spatial.register_fake
def _(
    edge: Tensor, values: Tensor, scales: Tensor, bitmap: Tensor, offsets: Tensor, shape: list[int], workspace: int
) -> Tensor:
    return edge.new_empty(shape)


@define_op("(Tensor grad, Tensor bitmap, Tensor offsets, SymInt kept, int workspace) -> Tensor")
def _to_spatial_backward(grad: Tensor, bitmap: Tensor, offsets: Tensor, kept: int, workspace: int) -> Tensor:
    """The adjoint of ``irfft2`` from a pattern, ``(kept, 2)``."""
    sizes = layout(grad.shape)
    bound = resolve_workspace(workspace, grad.device, sizes)
    return gather_maps(plane_slices(grad), bitmap, offsets, kept, sizes, _precision(grad), bound)


@_to_spatial_backward.register_fake
def _(grad: Tensor, bitmap: Tensor, offsets: Tensor, kept: int, workspace: int) -> Tensor:
    return grad.new_empty(kept, 2, dtype=_precision(grad))


def _to_spatial_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    edge, _, _, bitmap, offsets, _, workspace = inputs
    ctx.kept, ctx.workspace = edge.shape[0], workspace
    ctx.save_for_backward(bitmap, offsets)


def _to_spatial_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _to_spatial_backward(grad, *ctx.saved_tensors, ctx.kept, ctx.workspace), None, None, None, None, None, None


_to_spatial.register_autograd(_to_spatial_autograd, setup_context=_to_spatial_setup)


# -- what users call ------------------------------------------------------------------------------------------------


def pack(
    spectrum: Tensor,
    size: tuple[int, int],
    *,
    threshold: float | None = None,
    density: float | None = None,
    value_dtype: torch.dtype | str | None = None,
    rounding: str = "nearest",
    seed: int | Tensor | None = None,
    workspace: int | None = None,
) -> PackedSpectrum:
    """Keep the large coefficients of half spectra, packed.

    Args:
        spectrum: ``(B, C, H, W // 2 + 1)`` complex, as ``torch.fft.rfft2(x, norm="ortho")`` gives it. One of each
            conjugate pair is read; the coefficients that are their own conjugate are taken as real.
        size: ``(H, W)`` of the maps.
        threshold: coefficients whose modulus (in the ortho spectrum) is below it are dropped; those equal to it, and
            those that are not numbers, stay. The zero frequency always stays.
        density: instead of a threshold, the fraction of the independent coefficients to keep (the largest ones). No
            more are kept, but for the zero frequency and for those that are not finite, so that the size is known in
            advance: :meth:`PackedSpectrum.bytes_for`. Moduli that differ by less than 0.2 % may be dropped together.
        value_dtype: format of the kept values: ``torch.float32``, ``float16``, ``bfloat16``, ``float64``, ``int8`` or
            ``"int4"``; by default the precision of the spectrum. Integers get one scale a tile.
        rounding: of values to their format: ``"nearest"``, or ``"stochastic"``, which has no bias. No random generator
            is touched: the noise is a function of the seed and the place of a coefficient.
        seed: of stochastic rounding, an int or an int64 tensor without dimensions; by default made from the data.
        workspace: bound on temporaries in bytes.

    Returns:
        A :class:`~spectriton.PackedSpectrum` of shape ``(B, C, H, W)``; differentiable.

    Raises:
        TypeError, ValueError: ``spectrum`` is real or has another shape than ``size`` implies, the rule is missing or
            out of range, or there is no such value format.
    """
    check_complex("pack", "spectrum", spectrum)
    check_rank("pack", "spectrum", spectrum, 4)
    height, width = check_size("pack", size)
    if tuple(spectrum.shape[2:]) != (height, width // 2 + 1):
        fail(
            "pack",
            "spectrum",
            spectrum,
            f"(B, C, {height}, {width // 2 + 1}) for maps of {height}x{width}",
            "pass torch.fft.rfft2(x, norm='ortho') and size=x.shape[-2:]",
        )
    level, fraction = check_rule("pack", threshold, density)
    name = value_dtype_name("pack", value_dtype, _precision(spectrum))
    noise = check_rounding("pack", rounding, seed, spectrum)
    fields = _pack(spectrum, height, width, level, fraction, name, check_workspace("pack", workspace), noise)
    return PackedSpectrum.of(fields, (*spectrum.shape[:2], height, width), name)


def unpack(packed: PackedSpectrum) -> Tensor:
    """The half spectra ``(B, C, H, W // 2 + 1)`` of a packed spectrum; see :meth:`PackedSpectrum.to_dense`."""
    return check_packed("unpack", "packed", packed).to_dense()


def to_spectral(
    x: Tensor,
    *,
    threshold: float | None = None,
    density: float | None = None,
    value_dtype: torch.dtype | str | None = None,
    rounding: str = "nearest",
    seed: int | Tensor | None = None,
    workspace: int | None = None,
) -> PackedSpectrum:
    """Transform maps ``(B, C, H, W)`` and pack their spectra, without ever holding all of the dense spectrum.

    Args:
        x: real floating-point maps. Half precision is transformed in float32.
        threshold, density, value_dtype, rounding, seed, workspace: as for :func:`pack`.

    Raises:
        TypeError, ValueError: ``x`` is not four-dimensional and real, or the rule or format is wrong.
    """
    check_real_maps("to_spectral", "x", x)
    level, fraction = check_rule("to_spectral", threshold, density)
    name = value_dtype_name("to_spectral", value_dtype, _precision(x))
    noise = check_rounding("to_spectral", rounding, seed, x)
    fields = _to_spectral(x, level, fraction, name, check_workspace("to_spectral", workspace), noise)
    return PackedSpectrum.of(fields, x.shape, name)


def to_spatial(packed: PackedSpectrum, *, workspace: int | None = None) -> Tensor:
    """The maps ``(B, C, H, W)`` of a packed spectrum, float32 (float64 for complex128).

    Backward needs the pattern only: nothing dense is saved.

    Raises:
        TypeError: not a packed spectrum.
    """
    check_packed("to_spatial", "packed", packed)
    return _to_spatial(
        packed.edge,
        packed.values,
        packed.scales,
        packed.bitmap,
        packed.offsets,
        list(packed.shape),
        check_workspace("to_spatial", workspace),
    )
