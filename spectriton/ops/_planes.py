"""Walks over chunks of planes: between half spectra ``(n, H, Wh)`` and packed rows, under a bounded workspace.

A plane is one ``(batch, channel)`` map. A chunk holds whole tiles, so packing one chunk never touches another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectriton._backend import backend, row_numbers, workspace_bytes
from spectriton._counts import Counts, note_counts
from spectriton.frequencies import frequency_grid
from spectriton.ops._room import Expected, expect, is_deferred, take_down
from spectriton.packed import QUANTISED, VALUE_DTYPES, Layout, layout, make_edge, most_kept
from spectriton.reference.pattern import tile_counts

# Moduli are counted by the leading bits of their float32 pattern: bins of 0.2 % of the modulus.
_HISTOGRAM_SHIFT = 14
# Kernels compare squares, which rounds otherwise than a modulus does. Bins begin so many units in the last place below
# a multiple of their width, thresholds stand half of that below it: what is kept for rounding's sake has been counted.
_GUARD = 16
# The square of a smaller threshold is zero in float32, and zeros are not below that.
_LEAST_THRESHOLD = 2.0**-60


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
    quantised = value_dtype in QUANTISED
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
        seed: of stochastic rounding, 0-dimensional int64; to nearest where left out.
    """

    def __init__(
        self, sizes: Layout, value_dtype: str, dtype: torch.dtype, device: torch.device, seed: Tensor | None = None
    ) -> None:
        self.sizes = sizes
        self.dtype = dtype
        self.seed = seed
        self._primitives = backend(device)
        self.value_dtype = VALUE_DTYPES[value_dtype]
        self.bitmap = torch.zeros(sizes.bitmap_shape, dtype=torch.uint8, device=device)
        shape = (sizes.frequencies, sizes.tiles)
        self.scales = torch.zeros(shape if value_dtype in QUANTISED else 0, dtype=torch.float32, device=device)
        self._pieces: list[Tensor] = []
        self._tiles: list[tuple[int, int]] = []  # the first of each piece, and how many

    def append(
        self,
        y: Tensor,
        rows: slice,
        threshold: float | Tensor,
        kind: str = "identity",
        scale: Tensor | None = None,
        t0: int = 0,
    ) -> None:
        """Threshold, activate and pack ``y`` ``(Fc, Tc * tile, 2)``: the frequencies ``rows``, tiles from ``t0`` on."""
        sizes, chosen = self.sizes, (self.bitmap, self.scales, self.value_dtype)
        kept = self._primitives.pack_chunk(
            y, sizes.row, threshold, rows, t0, *chosen, kind, scale, sizes.channels, self.seed
        )
        self._pieces.append(kept)
        self._tiles.append((t0, y.shape[1] // sizes.tile))

    def finish(self) -> Packed:
        """The packed tensors; the values stand in row order."""
        pieces, self._pieces = self._pieces or [self._room(0)], []
        values = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        del pieces
        check_kept(values.shape[0])
        offsets = self._primitives.tile_starts(self.bitmap)
        if len(set(self._tiles)) > 1:
            values = self._in_row_order(values)
        return Packed(make_edge(values.shape[0], self.dtype, values.device), values, self.scales, self.bitmap, offsets)

    def _room(self, count: int) -> Tensor:
        """For the values of so many coefficients."""
        pairs = (2,) if self.value_dtype != torch.uint8 else ()
        return torch.empty(count, *pairs, dtype=self.value_dtype, device=self.bitmap.device)

    def _in_row_order(self, values: Tensor) -> Tensor:
        """Values that came as columns of tiles, all frequencies of one column before those of the next."""
        counts: NDArray[np.int64] = tile_counts(self.bitmap).cpu().numpy()
        starts, first = np.empty_like(counts), 0
        for t0, some in self._tiles:
            tiles = slice(t0, t0 + some)
            column = counts[:, tiles]
            running = np.cumsum(column)
            starts[:, tiles] = (running - column.ravel()).reshape(column.shape) + first
            first += int(running[-1])
        targets = np.cumsum(counts) - counts.ravel()
        runs = (torch.from_numpy(numbers.ravel()) for numbers in (starts, counts, targets))
        return self._primitives.reorder(values, *runs)


class KernelPacker(Packer):
    """By the Triton kernels, which append to a buffer that a chunk is expected to fit.

    The host waits for each chunk. Where it does not fit, the buffer is made to measure and the chunk packed again:
    nothing is lost, whatever comes.
    """

    def __init__(
        self, sizes: Layout, value_dtype: str, dtype: torch.dtype, device: torch.device, seed: Tensor | None = None
    ) -> None:
        super().__init__(sizes, value_dtype, dtype, device, seed)
        self._offsets = torch.zeros(sizes.frequencies, sizes.tiles, dtype=torch.int32, device=device)
        self._buffer = self._room(0)
        self._density = 0.5  # of the last chunk; a guess for the first
        self._kept = 0

    def append(
        self,
        y: Tensor,
        rows: slice,
        threshold: float | Tensor,
        kind: str = "identity",
        scale: Tensor | None = None,
        t0: int = 0,
    ) -> None:
        """As the reference's."""
        sizes, coefficients = self.sizes, y.shape[0] * y.shape[1]
        cursor = torch.zeros(1, dtype=torch.int64, device=y.device)

        def pack(room: int) -> int:
            if self._buffer.shape[0] < room:
                self._buffer = self._room(room)
            target = (self.bitmap, self._offsets, self._buffer, cursor)
            self._primitives.pack_rows(
                y, sizes.row, threshold, rows, t0, *target, kind, scale, sizes.channels, self.scales, self.seed
            )
            return int(cursor)

        kept = pack(min(coefficients, int(1.25 * self._density * coefficients) + 1024))
        if kept > self._buffer.shape[0]:
            cursor.zero_()
            pack(kept)
        self._density = kept / max(1, coefficients)
        check_kept(self._kept + kept)
        if self._kept:
            self._offsets[rows, t0 : t0 + y.shape[1] // sizes.tile] += self._kept
        self._pieces.append(self._buffer[:kept].clone())
        self._kept += kept

    def finish(self) -> Packed:
        """The packed tensors; the kernels do not care for the order of the values."""
        pieces, self._pieces = self._pieces or [self._room(0)], []
        self._buffer = self._room(0)
        values = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        counts = Counts(_count(torch.full((2,), self._kept, device=values.device), self.bitmap))
        note_counts(self.bitmap, counts)
        take_down(self.sizes, counts)
        edge = make_edge(self._kept, self.dtype, values.device)
        return Packed(edge, values, self.scales, self.bitmap, self._offsets)


class RoomPacker(Packer):
    """By the Triton kernels, into room for all that is expected: the host does not wait between the chunks.

    Whether it :meth:`fits` is known once all chunks are in.
    """

    def __init__(
        self,
        sizes: Layout,
        value_dtype: str,
        dtype: torch.dtype,
        device: torch.device,
        expected: Expected,
        seed: Tensor | None = None,
    ) -> None:
        super().__init__(sizes, value_dtype, dtype, device, seed)
        self._expected = expected
        self._offsets = torch.zeros(sizes.frequencies, sizes.tiles, dtype=torch.int32, device=device)
        self._values = self._room(expected.kept)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # as of Counts

    def append(
        self,
        y: Tensor,
        rows: slice,
        threshold: float | Tensor,
        kind: str = "identity",
        scale: Tensor | None = None,
        t0: int = 0,
    ) -> None:
        """As the reference's."""
        target = (self.bitmap, self._offsets, self._values, self._counts[:1])
        self._primitives.pack_rows(
            y, self.sizes.row, threshold, rows, t0, *target, kind, scale, self.sizes.channels, self.scales, self.seed
        )

    def fits(self) -> bool:
        """Whether all is there, for which the host waits; where checks are deferred, it is taken for granted."""
        numbers = _count(self._counts, self.bitmap)
        if is_deferred():
            counts = Counts(numbers, self._expected.rows)
        else:
            counts = Counts(numbers)
            if counts.kept > self._expected.kept:
                return False
            if counts.kept < self._expected.kept:
                self._values = self._values[: counts.kept].clone()
        note_counts(self.bitmap, counts)
        take_down(self.sizes, counts, self._expected)
        return True

    def finish(self) -> Packed:
        """The packed tensors; values and edge have room to spare where checks are deferred."""
        edge = make_edge(self._values.shape[0], self.dtype, self._values.device)
        return Packed(edge, self._values, self.scales, self.bitmap, self._offsets)


def _count(counts: Tensor, bitmap: Tensor) -> Tensor:
    """Writes the second of ``(2,)`` int64 :class:`Counts`: the frequencies before the tail without values."""
    filled = bitmap.flatten(1).any(1)
    torch.amax(filled * row_numbers(slice(1, filled.numel() + 1), bitmap.device), 0, out=counts[1])
    return counts


def packer(
    sizes: Layout, value_dtype: str, dtype: torch.dtype, device: torch.device, seed: Tensor | None = None
) -> Packer:
    """The :class:`Packer` for a device, whatever it is given to pack."""
    making = KernelPacker if backend(device).name == "triton" else Packer
    return making(sizes, value_dtype, dtype, device, seed)


def pack_chunks(
    fill: Callable[[Packer], None],
    sizes: Layout,
    value_dtype: str,
    dtype: torch.dtype,
    device: torch.device,
    seed: Tensor | None = None,
    most: int | None = None,
) -> Packed:
    """Pack what ``fill`` appends to the packer that it is given.

    It is called a second time where the kernels packed into room that was chosen in advance, and it did not fit.

    Args:
        fill: calls :meth:`Packer.append` for each chunk.
        sizes, value_dtype, dtype, device, seed: as for :class:`Packer`.
        most: coefficients that the thresholding rule keeps at most, None where it does not say.
    """
    expected = expect(sizes, most) if backend(device).name == "triton" else None
    if expected is not None:
        ahead = RoomPacker(sizes, value_dtype, dtype, device, expected, seed)
        fill(ahead)
        if ahead.fits():
            return ahead.finish()
        del ahead  # before its values are made once more
    making = packer(sizes, value_dtype, dtype, device, seed)
    fill(making)
    return making.finish()


def check_kept(kept: int) -> None:
    """Check that offsets can count so many coefficients.

    Raises:
        ValueError: they cannot.
    """
    if kept > torch.iinfo(torch.int32).max:
        raise ValueError(
            f"spectriton: packed spectrum got {kept} kept coefficients, expected at most 2^31 - 1; "
            "raise the threshold, or split the batch"
        )


class Histogram:
    """Counts of moduli, from which a threshold is taken that keeps a set fraction of the coefficients."""

    def __init__(self, device: torch.device) -> None:
        self._primitives = backend(device)
        self._on_host = self._primitives.name != "triton"
        self._counts = torch.zeros((1 << (31 - _HISTOGRAM_SHIFT)) + 1, dtype=torch.int64, device=device)

    def add(self, y: Tensor) -> None:
        """Count the moduli of pairs ``(rows, n, 2)``."""
        self._primitives.count_moduli(y, _GUARD, _HISTOGRAM_SHIFT, self._counts)

    def threshold(self, density: float, sizes: Layout) -> float | Tensor:
        """A modulus that at most a fraction of the coefficients of maps reach, within the width of a bin.

        Moduli of one bin are kept or dropped together. Zeros are dropped unless there is room for every coefficient.
        Where the kernels run the host does not wait for the number: it is given as ``(channels,)``.
        """
        keep = keep_from_density(density, sizes)
        from_top = torch.cumsum(self._counts.flip(0), 0)
        lowest = self._counts.numel() - (from_top <= keep).sum()
        pattern = ((lowest << _HISTOGRAM_SHIFT) - _GUARD // 2).clamp(0, 0x7F800000).to(torch.int32)
        level = pattern.view(torch.float32).clamp(min=_LEAST_THRESHOLD).masked_fill(lowest == 0, 0.0)
        return float(level) if self._on_host else level.repeat(sizes.channels)


def keep_from_density(density: float, sizes: Layout) -> int:
    """Coefficients to keep beside the zero-frequency row, which is always kept."""
    return most_kept(density, sizes) - sizes.row


def tiles_at_a_time(
    sizes: Layout, dtype: torch.dtype, workspace: int, device: torch.device, repacked: bool = False
) -> int:
    """Tiles of planes whose temporaries fit the workspace, at least one; ``repacked`` as of the backends."""
    arrays = backend(device).plane_arrays(frequency_grid(sizes.height, sizes.width, device), dtype, repacked)
    bytes_per_tile = arrays * sizes.tile * sizes.height * (sizes.width + 2) * dtype.itemsize
    return max(1, workspace // max(1, bytes_per_tile))


def plane_chunks(
    sizes: Layout, dtype: torch.dtype, workspace: int, device: torch.device, repacked: bool = False
) -> Iterator[tuple[int, int, int, int]]:
    """``(t0, t1, first plane, one past the last plane)`` of chunks whose temporaries fit the workspace."""
    step = tiles_at_a_time(sizes, dtype, workspace, device, repacked)
    for t0 in range(0, sizes.tiles, step):
        t1 = min(t0 + step, sizes.tiles)
        yield t0, t1, t0 * sizes.tile, min(t1 * sizes.tile, sizes.row)


def row_chunks(count: int, bytes_per_row: int, workspace: int) -> Iterator[slice]:
    """The rows ``0:count`` in chunks whose temporaries fit the workspace."""
    step = max(1, workspace // max(1, bytes_per_row))
    if step > 1:
        # Triton compiles anew for rows that do not begin at a multiple of sixteen bytes. And what is kept differs from
        # step to step, of which the sizes of chunks should not make new ones for PyTorch's allocator each time.
        step -= step % max(2, 1 << max(0, step.bit_length() - 4))
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


#: Gives the planes ``first:last`` as pairs ``(F, padded, 2)``: ``rows_of(first, last, padded)``.
RowsOf = Callable[[int, int, int], Tensor]


def pack_planes(
    rows_of: RowsOf,
    sizes: Layout,
    threshold: float,
    density: float,
    value_dtype: str,
    dtype: torch.dtype,
    device: torch.device,
    workspace: int,
    seed: Tensor | None = None,
    repacked: bool = False,
) -> Packed:
    """Pack the spectra that ``rows_of`` gives.

    ``density`` of zero or more overrides the threshold by the one that keeps this fraction. With a ``seed`` values are
    rounded stochastically. ``repacked`` as of the backends.
    """
    chunks = list(plane_chunks(sizes, dtype, workspace, device, repacked))
    level: float | Tensor = threshold
    if density >= 0:
        histogram = Histogram(device)
        for t0, t1, first, last in chunks:
            histogram.add(rows_of(first, last, (t1 - t0) * sizes.tile)[1:, : last - first])
        level = histogram.threshold(density, sizes)

    def fill(making: Packer) -> None:
        for t0, t1, first, last in chunks:
            rows = rows_of(first, last, (t1 - t0) * sizes.tile)
            making.append(rows, slice(0, sizes.frequencies), level, t0=t0)
            del rows  # before the next are made

    most = most_kept(density, sizes) if density >= 0 else None
    return pack_chunks(fill, sizes, value_dtype, dtype, device, seed, most)


def unpack_planes(
    values: Tensor, scales: Tensor, bitmap: Tensor, offsets: Tensor, sizes: Layout, workspace: int, out: Tensor
) -> Iterator[Tensor]:
    """Writes half spectra to ``out``, pairs ``(B * C, H, Wh, 2)``, mirrors filled in; yields them chunk by chunk."""
    device = values.device
    primitives = backend(device)
    grid = frequency_grid(sizes.height, sizes.width, device)
    index = primitives.tile_index(bitmap, offsets)
    for t0, t1, first, last in plane_chunks(sizes, out.dtype, workspace, device):
        half = out[first:last]
        primitives.unpack_planes(values, scales, bitmap, offsets, grid, t0, t1, last - first, None, half, index)
        yield half


def unpack_maps(
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    sizes: Layout,
    weighted: bool,
    workspace: int,
    out_of: Callable[[int, int], Tensor],
) -> Iterator[tuple[int, int, Tensor]]:
    """Yields ``(first, last, maps (n, H, W))`` of chunks of planes, written to what ``out_of(first, last)`` gives."""
    primitives = backend(values.device)
    grid = frequency_grid(sizes.height, sizes.width, values.device)
    index = primitives.tile_index(bitmap, offsets)
    dtype = torch.promote_types(values.dtype, torch.float32)
    for t0, t1, first, last in plane_chunks(sizes, dtype, workspace, values.device):
        maps = out_of(first, last)
        primitives.unpack_maps(values, scales, bitmap, offsets, grid, t0, t1, weighted, maps, index)
        yield first, last, maps


def gather_planes(
    rows_of: RowsOf, bitmap: Tensor, offsets: Tensor, kept: int, sizes: Layout, dtype: torch.dtype, workspace: int
) -> Tensor:
    """``(kept, 2)``: the spectra that ``rows_of`` gives, at the positions of an existing pattern."""
    primitives = backend(bitmap.device)
    index = primitives.tile_index(bitmap, offsets)
    every = slice(0, sizes.frequencies)
    out = _gradient_room(kept, dtype, bitmap.device)
    for t0, t1, first, last in plane_chunks(sizes, dtype, workspace, bitmap.device):
        rows = rows_of(first, last, (t1 - t0) * sizes.tile)
        pattern = primitives.row_pattern(bitmap, offsets, every, t0, t1, index)
        primitives.gather_rows(rows, bitmap, offsets, every, t0, out, pattern)
        del rows, pattern
    return out


def _gradient_room(kept: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """For the gradients of what is kept."""
    # The kernels' patterns may leave room to spare, which must not look like gradients that are not numbers.
    make = torch.zeros if backend(device).name == "triton" else torch.empty
    return make(kept, 2, dtype=dtype, device=device)


def gather_maps(
    planes: Callable[[int, int], Tensor],
    bitmap: Tensor,
    offsets: Tensor,
    kept: int,
    sizes: Layout,
    dtype: torch.dtype,
    workspace: int,
    repacked: bool = False,
) -> Tensor:
    """``(kept, 2)``: the adjoint of packed coefficients to real maps, for maps ``planes(first, last)``.

    ``repacked`` as of the backends.
    """
    primitives = backend(bitmap.device)
    grid = frequency_grid(sizes.height, sizes.width, bitmap.device)
    index = primitives.tile_index(bitmap, offsets)
    out = _gradient_room(kept, dtype, bitmap.device)
    for t0, t1, first, last in plane_chunks(sizes, dtype, workspace, bitmap.device, repacked):
        primitives.gather_maps(planes(first, last).to(dtype), bitmap, offsets, grid, t0, t1, out, index)
    return out.mul_(2)  # a stored coefficient stands for two, unless it is its own conjugate


def rows_of_maps(
    planes: Callable[[int, int], Tensor], sizes: Layout, dtype: torch.dtype, device: torch.device
) -> RowsOf:
    """:data:`RowsOf` the maps ``(n, H, W)`` that ``planes(first, last)`` gives, by Fourier transform."""
    grid = frequency_grid(sizes.height, sizes.width, device)

    def rows_of(first: int, last: int, padded: int) -> Tensor:
        return backend(device).rows_of_maps(planes(first, last).to(dtype), grid, padded)

    return rows_of


def rows_of_spectrum(spectrum: Tensor, size: tuple[int, int], dtype: torch.dtype, fold: bool = False) -> RowsOf:
    """:data:`RowsOf` half spectra ``(B, C, H, Wh)``; ``fold`` adds the conjugates of the mirrored positions."""
    planes = plane_slices(spectrum.resolve_conj())
    grid = frequency_grid(*size, spectrum.device)

    def rows_of(first: int, last: int, padded: int) -> Tensor:
        half = planes(first, last).to(dtype.to_complex())
        rows = backend(half.device).rows_of_half(half, grid, padded)
        if fold:  # none onto a frequency that is its own conjugate
            mirrored = half.flatten(1)[:, grid.mirror_index].T.conj_physical()
            rows[grid.mirror_row, : last - first] += torch.view_as_real(mirrored.contiguous())
        return rows

    return rows_of


def plane_slices(x: Tensor) -> Callable[[int, int], Tensor]:
    """Ranges of the ``B * C`` planes of ``x`` ``(B, C, H, W)``, copied only where strides call for it."""
    channels, (height, width) = x.shape[1], x.shape[2:]
    if x.is_contiguous():
        return lambda first, last: x.view(-1, height, width)[first:last]
    inner = x.permute(2, 3, 0, 1)
    if inner.is_contiguous():  # planes innermost
        return lambda first, last: inner.view(height, width, -1)[..., first:last].permute(2, 0, 1)

    def planes(first: int, last: int) -> Tensor:
        image = first // channels
        images = x[image : -(-last // channels)]
        return images.flatten(0, 1)[first - image * channels : last - image * channels]

    return planes


def resolve_workspace(workspace: int, device: torch.device, *maps: Layout) -> int:
    """Ops take 0 for the default workspace of the device; on a GPU it depends on the largest of the ``maps``."""
    dense = max((4 * sizes.row * sizes.height * sizes.width for sizes in maps), default=0)
    return workspace_bytes(workspace or None, device, dense)
