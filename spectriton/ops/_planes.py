"""Walks over chunks of planes: between half spectra ``(n, H, Wh)`` and packed rows, under a bounded workspace.

A plane is one ``(batch, channel)`` map. A chunk holds whole tiles, so packing one chunk never touches another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectriton._backend import backend, workspace_bytes
from spectriton.frequencies import FrequencyGrid, frequency_grid
from spectriton.packed import VALUE_DTYPES, Layout, layout, make_edge
from spectriton.reference import row_pattern

# Moduli are counted by the leading bits of their float32 pattern: bins of 0.2 % of the modulus.
_HISTOGRAM_SHIFT = 14


class Packed(NamedTuple):
    """What the packing ops return; the tensors of a :class:`spectriton.PackedSpectrum`."""

    edge: Tensor
    values: Tensor
    scales: Tensor
    bitmap: Tensor
    offsets: Tensor


def fake_packed(like: Tensor, dtype: torch.dtype, shape: Sequence[int], value_dtype: str) -> Packed:
    """Shapes and dtypes of packed maps ``shape`` whose number of kept coefficients is not known yet."""
    sizes = layout(tuple(shape))
    kept = torch.library.get_ctx().new_dynamic_size()
    pairs = () if value_dtype == "int4" else (2,)
    offsets = like.new_empty(sizes.frequencies, sizes.tiles, dtype=torch.int32)
    quantised = value_dtype in ("int8", "int4")
    return Packed(
        make_edge(kept, dtype, like.device),
        like.new_empty(kept, *pairs, dtype=VALUE_DTYPES[value_dtype]),
        like.new_empty(offsets.shape if quantised else (0,), dtype=torch.float32),
        like.new_empty(sizes.bitmap_shape, dtype=torch.uint8),
        offsets,
    )


class Packer:
    """A packed spectrum in the making: chunks go in, exactly sized tensors come out.

    Args:
        sizes: the layout of the maps.
        value_dtype: name of the value format.
        dtype: real precision of the coefficients.
        device: where.
    """

    def __init__(self, sizes: Layout, value_dtype: str, dtype: torch.dtype, device: torch.device) -> None:
        self.sizes = sizes
        self.dtype = dtype
        self.value_dtype = value_dtype
        self.bitmap = torch.zeros(sizes.bitmap_shape, dtype=torch.uint8, device=device)
        self.offsets = torch.zeros(sizes.frequencies, sizes.tiles, dtype=torch.int32, device=device)
        quantised = value_dtype in ("int8", "int4")
        self.scales = torch.zeros(self.offsets.shape if quantised else 0, dtype=torch.float32, device=device)
        self._pieces: list[Tensor] = []
        self._buffer: Tensor | None = None
        self._density = 0.5  # of the last chunk; a guess for the first
        self._kept = 0

    def append_rows(
        self,
        y: Tensor,
        rows: Tensor,
        threshold: float | Tensor,
        kind: str = "identity",
        scale: Tensor | None = None,
    ) -> None:
        """Threshold, activate and pack whole rows: ``y`` ``(Fc, P, 2)`` of the frequencies ``rows``."""
        sizes, primitives = self.sizes, backend(y.device)

        def pack(room: Tensor, cursor: Tensor) -> None:
            primitives.pack_rows(
                y,
                sizes.row,
                threshold,
                rows,
                0,
                self.bitmap,
                self.offsets,
                room,
                cursor,
                kind,
                scale,
                sizes.channels,
                scales=self.scales,
            )

        self._append(pack, y.shape[0] * y.shape[1], rows, slice(None))

    def append_planes(self, half: Tensor, grid: FrequencyGrid, t0: int, t1: int, threshold: float) -> None:
        """Threshold and pack the planes of the tiles ``t0:t1`` from their half spectra ``(n, H, Wh)``."""
        primitives = backend(half.device)

        def pack(room: Tensor, cursor: Tensor) -> None:
            primitives.pack_planes(
                half, grid, threshold, t0, self.bitmap, self.offsets, room, cursor, scales=self.scales
            )

        self._append(pack, grid.count * half.shape[0], slice(None), slice(t0, t1))

    def _append(
        self, pack: Callable[[Tensor, Tensor], None], coefficients: int, rows: Tensor | slice, tiles: slice
    ) -> None:
        """Run ``pack(room, cursor)`` with room for what a chunk of so many coefficients is expected to keep.

        Where the room does not do, it is made to measure and the chunk packed again: nothing is lost.
        """
        device = self.bitmap.device
        cursor = torch.zeros(1, dtype=torch.int64, device=device)
        room = self._room(min(coefficients, int(1.25 * self._density * coefficients) + 1024))
        pack(room, cursor)
        kept = int(cursor)
        if kept > room.shape[0]:
            room = self._room(kept)
            pack(room, cursor.zero_())
        self._density = kept / max(1, coefficients)
        if self._kept + kept > torch.iinfo(torch.int32).max:
            raise ValueError(
                f"spectriton: packed spectrum got {self._kept + kept} kept coefficients, expected at most 2^31 - 1; "
                "raise the threshold, or split the batch"
            )
        if self._kept:
            self.offsets[rows, tiles] += self._kept
        self._pieces.append(room[:kept].clone())
        self._kept += kept

    def _room(self, coefficients: int) -> Tensor:
        """A buffer for values, kept for the next chunk."""
        if self._buffer is None or self._buffer.shape[0] < coefficients:
            pairs = () if self.value_dtype == "int4" else (2,)
            self._buffer = torch.empty(
                coefficients, *pairs, dtype=VALUE_DTYPES[self.value_dtype], device=self.bitmap.device
            )
        return self._buffer

    def finish(self) -> Packed:
        """The packed tensors, values in one piece."""
        pieces = self._pieces or [self._room(0)[:0]]
        self._pieces, self._buffer = [], None
        values = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        edge = make_edge(self._kept, self.dtype, values.device)
        return Packed(edge, values, self.scales, self.bitmap, self.offsets)


class Histogram:
    """Counts of moduli, from which a threshold is taken that keeps a set fraction of the coefficients."""

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros((1 << (31 - _HISTOGRAM_SHIFT)) + 1, dtype=torch.int64, device=device)

    def add(self, y: Tensor) -> None:
        """Count the moduli of pairs ``(..., 2)``."""
        size = torch.view_as_complex(y).abs().to(torch.float32).flatten().nan_to_num_(nan=torch.inf)
        bins = size.view(torch.int32) >> _HISTOGRAM_SHIFT
        self._counts += torch.bincount(bins, minlength=self._counts.numel())

    def threshold(self, keep: int) -> float:
        """A modulus that at most ``keep`` of the counted coefficients reach, within the width of a bin."""
        from_top = torch.cumsum(self._counts.flip(0), 0)
        bins = int((from_top <= keep).sum())
        lowest = self._counts.numel() - bins
        pattern = torch.tensor(min(lowest << _HISTOGRAM_SHIFT, 0x7F800000), dtype=torch.int32)
        return float(pattern.view(torch.float32))


def keep_from_density(density: float, sizes: Layout) -> int:
    """Coefficients to keep beside the zero-frequency row, which is always kept."""
    return max(0, round(density * sizes.frequencies * sizes.row) - sizes.row)


def plane_chunks(sizes: Layout, itemsize: int, workspace: int) -> Iterator[tuple[int, int, int, int]]:
    """``(t0, t1, first plane, one past the last plane)`` of chunks whose temporaries fit the workspace."""
    # Maps, half spectrum, its rows and their padded copy.
    bytes_per_tile = 5 * sizes.tile * sizes.height * (sizes.width + 2) * itemsize
    step = max(1, workspace // max(1, bytes_per_tile))
    for t0 in range(0, sizes.tiles, step):
        t1 = min(t0 + step, sizes.tiles)
        yield t0, t1, t0 * sizes.tile, min(t1 * sizes.tile, sizes.row)


def row_chunks(rows: Tensor, bytes_per_row: int, workspace: int) -> Iterator[Tensor]:
    """``rows`` in chunks whose temporaries fit the workspace."""
    yield from rows.split(max(1, workspace // max(1, bytes_per_row)))


def pack_planes(
    half_of: Callable[[int, int], Tensor],
    sizes: Layout,
    threshold: float,
    density: float,
    value_dtype: str,
    dtype: torch.dtype,
    device: torch.device,
    workspace: int,
) -> Packed:
    """Pack the half spectra that ``half_of(first, last)`` gives for a range of planes.

    ``density`` of zero or more overrides the threshold by the one that keeps this fraction.
    """
    grid = frequency_grid(sizes.height, sizes.width, device)
    chunks = list(plane_chunks(sizes, dtype.itemsize, workspace))
    if density >= 0:
        histogram = Histogram(device)
        for _, _, first, last in chunks:
            histogram.add(torch.view_as_real(half_of(first, last).flatten(1)[:, grid.index[1:]]))
        threshold = histogram.threshold(keep_from_density(density, sizes))
    packer = Packer(sizes, value_dtype, dtype, device)
    for t0, t1, first, last in chunks:
        packer.append_planes(half_of(first, last), grid, t0, t1, threshold)
    packed = packer.finish()
    return packed if len(chunks) <= 1 else in_row_order(packed, sizes, workspace)


def in_row_order(packed: Packed, sizes: Layout, workspace: int) -> Packed:
    """The same spectrum with its values in row-major tile order.

    The reference reads rows by slices then. The kernels do not care for the order.
    """
    device = packed.values.device
    if backend(device).name != "reference":
        return packed
    values = torch.empty_like(packed.values)
    offsets = torch.empty_like(packed.offsets)
    first = 0
    for rows in row_chunks(torch.arange(sizes.frequencies, device=device), 32 * sizes.padded_row, workspace):
        pattern = row_pattern(packed.bitmap, packed.offsets, rows, 0, sizes.tiles)
        last = first + pattern.positions.numel()
        values[first:last] = packed.values[pattern.slots]
        running = torch.cumsum(pattern.counts, 0) - pattern.counts + first
        offsets[rows] = running.view(rows.numel(), sizes.tiles).to(offsets.dtype)
        first = last
    return packed._replace(values=values, offsets=offsets)


def unpack_planes(
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    sizes: Layout,
    row_scale: Tensor | None,
    dtype: torch.dtype,
    workspace: int,
    out: Tensor | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yields ``(first plane, one past the last, half spectra (n, H, Wh))`` chunk by chunk, mirrors filled in.

    The half spectra stand in ``out``, pairs ``(B * C, H, Wh, 2)``, where it is given; else in a buffer that the next
    chunk overwrites.
    """
    device = values.device
    grid = frequency_grid(sizes.height, sizes.width, device)
    buffer: Tensor | None = None
    for t0, t1, first, last in plane_chunks(sizes, dtype.itemsize, workspace):
        if out is not None:
            half = out[first:last]
        else:
            if buffer is None:
                buffer = torch.empty(last - first, sizes.height, grid.half_width, 2, dtype=dtype, device=device)
            half = buffer[: last - first]
        backend(device).unpack_planes(values, scales, bitmap, offsets, grid, t0, t1, last - first, row_scale, half)
        yield first, last, torch.view_as_complex(half)


def gather_planes(
    half_of: Callable[[int, int], Tensor],
    bitmap: Tensor,
    offsets: Tensor,
    kept: int,
    sizes: Layout,
    row_scale: Tensor | None,
    dtype: torch.dtype,
    workspace: int,
) -> Tensor:
    """``(kept, 2)``: the half spectra that ``half_of`` gives, at the positions of an existing pattern."""
    device = bitmap.device
    grid = frequency_grid(sizes.height, sizes.width, device)
    out = torch.empty(kept, 2, dtype=dtype, device=device)
    for t0, _, first, last in plane_chunks(sizes, dtype.itemsize, workspace):
        backend(device).gather_planes(half_of(first, last), grid, bitmap, offsets, t0, row_scale, out)
    return out


def real_planes(x: Tensor, dtype: torch.dtype) -> Callable[[int, int], Tensor]:
    """``half_of`` for maps ``(B, C, H, W)``: the ortho half spectra of a range of planes."""
    planes = _plane_slices(x)
    grid = frequency_grid(x.shape[2], x.shape[3], x.device)

    def half_of(first: int, last: int) -> Tensor:
        half = torch.fft.rfft2(planes(first, last).to(dtype), norm="ortho").contiguous()
        return _real_where_self_conjugate(half, grid)

    return half_of


def half_planes(
    spectrum: Tensor, size: tuple[int, int], dtype: torch.dtype, fold: bool = False
) -> Callable[[int, int], Tensor]:
    """``half_of`` for half spectra ``(B, C, H, Wh)``; ``fold`` adds the conjugates of the mirrored positions."""
    planes = _plane_slices(spectrum.resolve_conj())
    grid = frequency_grid(*size, spectrum.device)
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64

    def half_of(first: int, last: int) -> Tensor:
        half = planes(first, last).to(complex_dtype)
        real = grid.index[grid.self_conjugate]
        if not fold and not bool(half.flatten(1)[:, real].imag.any()):
            return half  # as spectra of real maps are: nothing to change, so nothing to copy
        half = half.clone(memory_format=torch.contiguous_format)
        if fold:
            flat = half.view(last - first, -1)
            flat[:, grid.index[grid.mirror_row]] += flat[:, grid.mirror_index].conj_physical()
        return _real_where_self_conjugate(half, grid)

    return half_of


def _real_where_self_conjugate(half: Tensor, grid: FrequencyGrid) -> Tensor:
    """Drops the imaginary part where a frequency is its own conjugate, in place."""
    torch.view_as_real(half).view(half.shape[0], -1, 2)[:, grid.index[grid.self_conjugate], 1] = 0
    return half


def _plane_slices(x: Tensor) -> Callable[[int, int], Tensor]:
    """Ranges of the ``B * C`` planes of ``x``; a copy of the range where they do not lie one after the other."""
    channels = x.shape[1]

    def planes(first: int, last: int) -> Tensor:
        if x.is_contiguous():
            return x.view(-1, *x.shape[2:])[first:last]
        image = first // channels
        images = x[image : -(-last // channels)]
        return images.flatten(0, 1)[first - image * channels : last - image * channels]

    return planes


def resolve_workspace(workspace: int, device: torch.device) -> int:
    """Ops take 0 for the default workspace of the device."""
    return workspace_bytes(workspace or None, device)
