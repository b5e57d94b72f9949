"""Spectral pooling: maps made smaller by cropping their spectra (Rippel et al. 2015, arXiv 1506.03767).

A coefficient of the output is that of the same integer frequency of the input, times ``sqrt(h w / (H W))`` so that the
mean of a map stays. An even output size ``n`` below the input's has one Nyquist frequency where the input has two
coefficients, at ``+n / 2`` and ``-n / 2``: their mean is taken, in each direction. Then the result is the spectrum of a
real map, and pooling is linear, acts on rows and columns independently, commutes with reflections and adds no energy.

Packed, an output coefficient is kept where one that it is made of is kept, whatever its modulus.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectriton import reference
from spectriton._backend import backend
from spectriton._check import check_real_maps, fail
from spectriton._counts import Counts, counts_of, note_counts
from spectriton.frequencies import frequency_grid
from spectriton.ops._arguments import check_half_spectrum, check_output_size, check_window, check_workspace
from spectriton.ops._define import PACKED_FIELDS, PACKED_RESULT, define_op
from spectriton.ops._planes import Packed, fake_packed, resolve_workspace
from spectriton.ops._rows import row_bytes, store_rows
from spectriton.packed import PackedSpectrum, layout, make_edge


class _Group(NamedTuple):
    """Frequencies of the output that are made alike; on the host.

    Attributes:
        rows: ``(n,)`` int64, the frequencies, ascending.
        sources: for each of the one or two terms ``(n,)`` int64, the frequency of the input.
        factors: for each term ``(n, 2)`` of real and imaginary part, beside the gain; None where they are one.
    """

    rows: Tensor
    sources: list[Tensor]
    factors: list[Tensor] | None


class _Term(NamedTuple):
    """What a chunk of output frequencies takes from the input.

    Attributes:
        rows: ``(Fc,)`` int64, frequencies of the input, ascending.
        places: ``(Fc,)`` int64, the frequency of the chunk that each of them belongs to.
        factor: ``(Fc, 2)`` or None, see :class:`_Group`.
    """

    rows: Tensor
    places: Tensor
    factor: Tensor | None


class _Plan(NamedTuple):
    """Which stored coefficients of the input, times what, make up each stored one of the output.

    Attributes:
        first, second: ``(f,)`` int64, the sources of each frequency of the output; the same twice where it has one.
            On the device.
        groups: those with one source taken as it is, those with its real part, and those with two.
        gain: ``sqrt(h w / (H W))``.
    """

    first: Tensor
    second: Tensor
    groups: list[_Group]
    gain: float


@lru_cache(maxsize=64)
def _plan(size: tuple[int, int], output_size: tuple[int, int], device: torch.device) -> _Plan:
    (height, width), (h, w) = size, output_size
    source, target = frequency_grid(height, width), frequency_grid(h, w)
    # The stored frequency of the output at each position of its half spectrum, and whether its conjugate stands there.
    row_at = torch.empty(h * target.half_width, dtype=torch.int64)
    row_at[target.index], row_at[target.mirror_index] = torch.arange(target.count), target.mirror_row
    conjugate_at = torch.zeros_like(row_at, dtype=torch.bool)
    conjugate_at[target.mirror_index] = True

    inside = torch.nonzero((2 * source.ky.abs() <= h) & (2 * source.kx <= w)).flatten()
    ky, kx = source.ky[inside], source.kx[inside]
    position = ky % h * target.half_width + kx
    row = row_at[position]
    share = torch.ones(inside.numel(), dtype=torch.float64)
    share[(2 * ky.abs() == h) & (h < height)] /= 2
    share[(2 * kx == w) & (w < width)] /= 2
    factor = torch.zeros(source.count, 2, dtype=torch.float64)
    # A frequency and its conjugate that meet in one that is its own conjugate give twice the real part.
    factor[inside, 0] = share * source.weight[inside] / target.weight[row]
    factor[inside, 1] = share * torch.where(conjugate_at[position], -1.0, 1.0) * (target.weight[row] - 1)

    by_row = inside[torch.argsort(row, stable=True)]
    ends = torch.cumsum(torch.bincount(row, minlength=target.count), 0)
    first, second = by_row[torch.cat([ends.new_zeros(1), ends[:-1]])], by_row[ends - 1]
    single = first == second
    whole = single & (source.weight[first] == target.weight)
    groups = []
    for chosen, terms in ((whole, [first]), (single & ~whole, [first]), (~single, [first, second])):
        sources = [term[chosen] for term in terms]
        factors = None if chosen is whole else [factor[source] for source in sources]
        groups.append(_Group(torch.nonzero(chosen).flatten(), sources, factors))
    return _Plan(first.to(device), second.to(device), groups, (h * w / (height * width)) ** 0.5)


class _Walk:
    """What forward and backward share: both layouts, the plan, chunks of output frequencies, a buffer for each side."""

    def __init__(
        self, shape: list[int], output_size: tuple[int, int], dtype: torch.dtype, device: torch.device, workspace: int,
        kept: int,
    ) -> None:  # fmt: skip
        self.inputs, self.outputs = layout(shape), layout((*shape[:2], *output_size))
        self.plan = _plan((shape[2], shape[3]), output_size, device)
        self.primitives = backend(device)
        self.workspace = resolve_workspace(workspace, device, self.inputs)
        # A chunk of each side, and a copy in the order of the other.
        sides = row_bytes(self.inputs, dtype, kept), row_bytes(self.outputs, dtype, kept, 2)
        self.rows_at_once = max(1, self.workspace // max(1, sum(sides)))
        rows = min(self.rows_at_once, self.outputs.frequencies)
        self.input_buffer, self.output_buffer = (
            torch.zeros(rows, sizes.padded_row, 2, dtype=dtype, device=device) for sizes in (self.inputs, self.outputs)
        )

    def chunks(self, filled: Tensor) -> Iterator[tuple[Tensor, list[_Term]]]:
        """Yields chunks of the output frequencies that are ``filled`` ``(f,)`` bool, and their terms.

        ``filled`` lies on the host, as the plan does: a GPU is sent what it needs and not waited for.
        """
        for group in self.plan.groups:
            for at in torch.nonzero(filled[group.rows]).flatten().split(self.rows_at_once):
                if at.numel() == 0:
                    continue  # nothing to split comes as one empty piece
                terms = []
                for number, source in enumerate(group.sources):
                    rows, places = source[at].sort()
                    factor = None if group.factors is None else self.move(group.factors[number][at[places]])
                    terms.append(_Term(self.move(rows), self.move(places), factor))
                yield self.move(group.rows[at]), terms

    def move(self, tensor: Tensor) -> Tensor:
        """Host to device."""
        return tensor.to(self.input_buffer.device, non_blocking=True)

    def scale(self, chunk: Tensor, factor: Tensor | None) -> None:
        """Multiplies pairs ``(Fc, P, 2)`` by the gain, and by ``factor`` ``(Fc, 2)`` where given, in place."""
        chunk *= self.plan.gain
        if factor is not None:
            chunk *= factor[:, None].to(chunk.dtype)


def _count_bits(bitmap: Tensor) -> Tensor:
    """int64 ``(...)``: set bits of each tile of a bitmap ``(..., tile / 8)``, counted in parallel within each byte."""
    pairs = bitmap - ((bitmap >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((nibbles + (nibbles >> 4)) & 0x0F).sum(-1)


def _pattern(bitmap: Tensor, walk: _Walk) -> tuple[Tensor, Tensor]:
    """Bitmap of the output, and how many coefficients it keeps in each tile, ``(f, T)`` int64."""
    sizes, plan = walk.outputs, walk.plan
    # Bits of a row stand in a line: cut into other tiles, a row has the same bytes but for its padding.
    bits = bitmap.flatten(1)
    out = bitmap.new_zeros(sizes.bitmap_shape)
    counts = torch.zeros(sizes.frequencies, sizes.tiles, dtype=torch.int64, device=bitmap.device)
    shared = min(bits.shape[1], sizes.padded_row // 8)
    step = max(1, walk.workspace // max(1, 4 * bits.shape[1]))
    for start in range(0, sizes.frequencies, step):
        part = slice(start, start + step)
        out[part].flatten(1)[:, :shared] = (bits[plan.first[part]] | bits[plan.second[part]])[:, :shared]
        counts[part] = _count_bits(out[part])
    return out, counts


@define_op(
    f"(Tensor edge, {PACKED_FIELDS}, SymInt[] shape, int height, int width, str value_dtype, int workspace) "
    f"-> {PACKED_RESULT}"
)
def _spectral_pool2d(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    shape: list[int],
    height: int,
    width: int,
    value_dtype: str,
    workspace: int,
) -> Packed:
    """Packed maps ``shape`` to packed maps of ``height x width``."""
    walk = _Walk(shape, (height, width), edge.dtype, values.device, workspace, values.shape[0])
    row, tiles = walk.inputs.row, walk.inputs.tiles
    out_bitmap, counts = _pattern(bitmap, walk)
    out_offsets = (torch.cumsum(counts.flatten(), 0).view_as(counts) - counts).to(torch.int32)
    per_row = counts.sum(1).cpu()
    kept = int(per_row.sum())
    if walk.primitives.name == "triton":
        filled_rows = (torch.arange(1, per_row.numel() + 1) * (per_row > 0)).max()
        note_counts(out_bitmap, Counts(torch.stack([per_row.sum(), filled_rows])))
    out_values = values.new_empty(kept, *values.shape[1:])
    out_scales = torch.zeros(counts.shape if scales.numel() else 0, dtype=torch.float32, device=values.device)
    for rows, terms in walk.chunks(per_row > 0):
        y = walk.output_buffer[: rows.numel()].zero_()
        for term in terms:
            x = walk.input_buffer[: rows.numel()]
            walk.primitives.unpack_rows(values, scales, bitmap, offsets, term.rows, 0, tiles, x)
            walk.scale(x, term.factor)
            y[:, :row] += x[:, :row].index_select(0, term.places.argsort())
        store_rows(y, out_bitmap, out_offsets, rows, out_values, out_scales)
    return Packed(make_edge(kept, edge.dtype, values.device), out_values, out_scales, out_bitmap, out_offsets)


@_spectral_pool2d.register_fake
def _(
    edge: Tensor,
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    shape: list[int],
    height: int,
    width: int,
    value_dtype: str,
    workspace: int,
) -> Packed:
    return fake_packed(edge, edge.dtype, (*shape[:2], height, width), value_dtype)


@define_op(
    "(Tensor grad, Tensor bitmap, Tensor offsets, Tensor out_bitmap, Tensor out_offsets, SymInt kept, SymInt[] shape, "
    "int height, int width, int workspace) -> Tensor"
)
def _spectral_pool2d_backward(
    grad: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    out_bitmap: Tensor,
    out_offsets: Tensor,
    kept: int,
    shape: list[int],
    height: int,
    width: int,
    workspace: int,
) -> Tensor:
    """The adjoint, ``(kept, 2)`` in the pattern of the input: zero at the frequencies that are cropped away."""
    walk = _Walk(shape, (height, width), grad.dtype, grad.device, workspace, kept)
    row, tiles = walk.inputs.row, walk.outputs.tiles
    grad, no_scales = grad.contiguous(), grad.new_empty(0)
    grad_input = grad.new_zeros(kept, 2)
    counts = counts_of(out_bitmap)
    if counts is None:
        filled = out_bitmap.flatten(1).any(1).cpu() > 0
    else:
        filled = torch.arange(walk.outputs.frequencies) < counts.rows
    for rows, terms in walk.chunks(filled):
        g = walk.output_buffer[: rows.numel()]
        walk.primitives.unpack_rows(grad, no_scales, out_bitmap, out_offsets, rows, 0, tiles, g)
        for term in terms:
            x = walk.input_buffer[: rows.numel()]
            x[:, :row] = g[:, :row].index_select(0, term.places)
            walk.scale(x, term.factor)
            walk.primitives.gather_rows(x, bitmap, offsets, term.rows, 0, grad_input)
    return grad_input


@_spectral_pool2d_backward.register_fake
def _(
    grad: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    out_bitmap: Tensor,
    out_offsets: Tensor,
    kept: int,
    shape: list[int],
    height: int,
    width: int,
    workspace: int,
) -> Tensor:
    return grad.new_empty(kept, 2)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Packed) -> None:
    _, values, _, bitmap, offsets, shape, height, width, _, workspace = inputs
    ctx.settings = values.shape[0], shape, height, width, workspace
    ctx.mark_non_differentiable(output[1], output[2])  # gradients travel along the edge
    ctx.set_materialize_grads(False)  # no zeros of the size of the values
    ctx.save_for_backward(bitmap, offsets, *output[3:])


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    return _spectral_pool2d_backward(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 9


_spectral_pool2d.register_autograd(_autograd, setup_context=_setup)


# -- maps: pooling is a matrix in each direction, and two products cost less than two transforms ----------------------


@lru_cache(maxsize=64)
def _matrix(size: int, output_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(output_size, size)``: what pooling does to a row of samples."""
    units = torch.eye(size, dtype=torch.float64)[None, :, :, None]  # maps of one column
    pooled = reference.spectral_pool2d(torch.fft.rfft2(units, norm="ortho"), (size, 1), (output_size, 1))
    return torch.fft.irfft2(pooled, s=(output_size, 1), norm="ortho")[0, :, :, 0].T.to(device, dtype)


def _multiply(rows: Tensor, x: Tensor, columns: Tensor, workspace: int) -> Tensor:
    """``rows @ x @ columns`` for maps ``x`` ``(B, C, H, W)``, a chunk of planes at a time; in the dtype of ``x``."""
    planes = x.flatten(0, 1)
    (height, width), (h, w) = x.shape[2:], (rows.shape[0], columns.shape[1])
    out = x.new_empty(planes.shape[0], h, w)
    per_plane = rows.element_size() * (height * width + height * w + h * w)  # its precision, and both products
    step = max(1, resolve_workspace(workspace, x.device) // per_plane)
    with torch.autocast(x.device.type, enabled=False):
        for first in range(0, planes.shape[0], step):
            part = slice(first, first + step)
            out[part] = rows @ (planes[part].to(rows.dtype) @ columns)
    return out.unflatten(0, x.shape[:2])


def _matrices(x: Tensor, size: tuple[int, int], output_size: tuple[int, int]) -> list[Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [_matrix(n, small, dtype, x.device) for n, small in zip(size, output_size, strict=True)]


@define_op("(Tensor x, int height, int width, int workspace) -> Tensor")
def _spectral_pool2d_maps(x: Tensor, height: int, width: int, workspace: int) -> Tensor:
    """Maps ``(B, C, H, W)`` to ``(B, C, height, width)``."""
    rows, columns = _matrices(x, (x.shape[2], x.shape[3]), (height, width))
    return _multiply(rows, x, columns.T, workspace)


@_spectral_pool2d_maps.register_fake
def _(x: Tensor, height: int, width: int, workspace: int) -> Tensor:
    return x.new_empty(*x.shape[:2], height, width)


@define_op("(Tensor grad, SymInt height, SymInt width, int workspace) -> Tensor")
def _spectral_pool2d_maps_backward(grad: Tensor, height: int, width: int, workspace: int) -> Tensor:
    """The adjoint: to maps of ``height x width``."""
    rows, columns = _matrices(grad, (height, width), (grad.shape[2], grad.shape[3]))
    return _multiply(rows.T, grad, columns, workspace)


@_spectral_pool2d_maps_backward.register_fake
def _(grad: Tensor, height: int, width: int, workspace: int) -> Tensor:
    return grad.new_empty(*grad.shape[:2], height, width)


def _maps_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, workspace = inputs
    ctx.settings = x.shape[2], x.shape[3], workspace


def _maps_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _spectral_pool2d_maps_backward(grad, *ctx.settings), None, None, None


_spectral_pool2d_maps.register_autograd(_maps_autograd, setup_context=_maps_setup)


# -- what users call ------------------------------------------------------------------------------------------------


def _pooled_size(op: str, size: tuple[int, int], kernel_size: Any, output_size: Any) -> tuple[int, int]:
    """``(h, w)`` by the window or as given.

    Raises:
        ValueError: not whole positive numbers, or an output that is empty or larger than the maps.
    """
    if output_size is None:
        window, _ = check_window(op, kernel_size, None)
        if window[0] > size[0] or window[1] > size[1]:
            fail(op, "kernel_size", tuple(window), f"at most the {size[0]}x{size[1]} maps", "use a smaller window")
        return size[0] // window[0], size[1] // window[1]
    height, width = check_output_size(op, output_size)
    if height > size[0] or width > size[1]:
        fail(op, "output_size", (height, width), f"at most the {size[0]}x{size[1]} maps", "pooling only makes smaller")
    return height, width


def spectral_pool2d(
    x: PackedSpectrum | Tensor,
    kernel_size: int | tuple[int, int] = 2,
    *,
    output_size: int | tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    workspace: int | None = None,
) -> PackedSpectrum | Tensor:
    """Spectral pooling: crop the spectrum to the frequencies that smaller maps have (arXiv 1506.03767).

    The mean of each map stays. At the Nyquist frequency of an even output size below the input's, the mean of the two
    coefficients that it stands for is taken: the result is the spectrum of a real map. Backward keeps patterns only,
    and nothing for maps.

    Args:
        x: packed maps ``(B, C, H, W)``, real maps of this shape, or dense ortho half spectra ``(B, C, H, W // 2 + 1)``.
        kernel_size: by how much smaller, one number or two: ``floor(H / kernel)``, as ``nn.MaxPool2d(kernel)``.
        output_size: instead of a window, ``(h, w)`` or one number for both; at most the input's.
        size: ``(H, W)`` of the maps behind half spectra, by default ``(H, 2 (Wh - 1))``.
        workspace: bound on temporaries in bytes, for packed spectra and maps.

    Returns:
        What ``x`` is, of size ``(h, w)``. Packed coefficients are kept where one that they are made of is kept, in the
        value format of the input.

    Raises:
        TypeError, ValueError: ``x`` is none of these, or the sizes do not fit.
    """
    op = "spectral_pool2d"
    if isinstance(x, PackedSpectrum):
        whole = (x.shape[2], x.shape[3])
    elif isinstance(x, Tensor) and x.is_complex():
        whole = check_half_spectrum(op, "x", x, size)
    else:
        check_real_maps(op, "x", x)
        whole = (x.shape[2], x.shape[3])
    if size is not None and tuple(size) != whole:
        fail(op, "size", tuple(size), f"{whole}, that of the maps", "leave size out")
    height, width = _pooled_size(op, whole, kernel_size, output_size)

    if isinstance(x, PackedSpectrum):
        fields = _spectral_pool2d(
            x.edge,
            x.values,
            x.scales,
            x.bitmap,
            x.offsets,
            list(x.shape),
            height,
            width,
            x.value_dtype,
            check_workspace(op, workspace),
        )
        return PackedSpectrum.of(fields, (*x.shape[:2], height, width), x.value_dtype)
    if x.is_complex():
        return reference.spectral_pool2d(x, whole, (height, width))
    return _spectral_pool2d_maps(x, height, width, check_workspace(op, workspace))
