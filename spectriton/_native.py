"""The primitives on a CPU that has a C compiler: those that move kept coefficients in C, the others in plain PyTorch.

The C functions take float32; double precision, stochastic rounding and whatever else they do not know go to the
reference.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import spectriton_native as native
from spectriton import reference
from spectriton._backend import Backend, _format
from spectriton._mixing import Mixing
from spectriton.frequencies import FrequencyGrid, frequency_grid
from spectriton.reference import (
    RowPattern,
    TileIndex,
    across,
    activate,
    bits,
    block_codec,
    max_pool,
)
from spectriton.reference.block_codec import BlockLayout, Plan, Transform
from spectriton.reference.kept import KeptRows
from spectriton.reference.max_pool import Window
from spectriton.reference.rebuild import Statistics, rebuild
from spectriton.reference.rounding import noise_key
from spectriton.reference.transform import products, turns
from spectriton.reference.unpack import fill_mirrors
from spectriton_native import Part

# Activations that are a part of the functions.
_KINDS = ("identity", "tanh")


class NativeMixing(Mixing):
    """By the C functions, which have no library's overhead for small matrices: float32 on the CPU.

    Weights are pairs ``(Fc, g, I / g, O / g, 2)``.
    """

    def __init__(self, weight: Tensor, groups: int) -> None:
        self.shape = weight.shape
        self.groups = groups
        outputs, inputs = weight.shape[:2]
        taps = weight.reshape(groups, outputs // groups, inputs, -1).permute(3, 0, 2, 1).contiguous()
        self._taps = taps.view(taps.shape[0], -1)
        self._gradient = None

    @staticmethod
    def takes(weight: Tensor, groups: int) -> bool:
        """Whether the functions are faster than the libraries, for taps as in the constructor."""
        fewest = min(weight.shape[0] // groups, weight.shape[1])
        return weight.dtype == torch.float32 and not weight.is_cuda and fewest <= native.most_channels()

    def weights(self, basis: Tensor) -> Tensor:
        """The kernel spectrum of a chunk, as pairs."""
        outputs, inputs = self.shape[:2]
        spectrum = basis.new_empty(basis.shape[0], self.groups, inputs, outputs // self.groups, 2)
        native.kernel_spectrum(self._taps, basis.contiguous(), spectrum)
        return spectrum

    def mix(self, x: Tensor, weights: Tensor, out: Tensor, add: bool = False) -> None:
        """As by complex products."""
        if _rows_apart(out):
            native.mix(_dense(x), weights, out, add=add)
            return
        dense = out.contiguous()
        native.mix(_dense(x), weights, dense, add=add)
        out.copy_(dense)

    def mix_grad_input(self, grad: Tensor, weights: Tensor, out: Tensor) -> None:
        """As by complex products."""
        dense = out if _rows_apart(out) else torch.empty(out.shape)
        native.mix(_dense(grad), weights, dense, transposed=True)
        if dense is not out:
            out.copy_(dense)

    def add_grad_taps(self, x: Tensor, grad: Tensor, basis: Tensor, inputs: slice | None = None) -> None:
        """As by complex products."""
        groups, outputs = self.groups, self.shape[0]
        spectrum = x.new_empty(x.shape[0], groups, x.shape[2] // groups, outputs // groups, 2)
        native.mix_grad_weights(_dense(x), _dense(grad), spectrum)
        if self._gradient is None:
            self._gradient = torch.zeros_like(self._taps)
        part = self._gradient if inputs is None else self._gradient[:, inputs.start * outputs : inputs.stop * outputs]
        native.kernel_spectrum_adjoint(spectrum, basis.contiguous(), part)


class NativeTileIndex(TileIndex):
    """As the reference's; of contiguous tensors."""

    @cached_property
    def filled(self) -> int:
        return native.filled_rows(self._pattern[0])

    @cached_property
    def _tiles(self) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
        counts, starts, ordered = native.index_tiles(*self._pattern)
        return counts.numpy(), starts.numpy(), ordered


class NativeBackend(Backend):
    """See the module's text."""

    name = "native"

    def by_bits(self, dtype: torch.dtype, kind: str = "identity") -> bool:
        """Where the functions take it."""
        return dtype == torch.float32 and kind in _KINDS

    def mixing(self, weight: Tensor, groups: int) -> Mixing:
        """In C where it is faster."""
        return NativeMixing(weight, groups) if NativeMixing.takes(weight, groups) else super().mixing(weight, groups)

    def plane_arrays(self, grid: FrequencyGrid, dtype: torch.dtype, repacked: bool) -> int:
        """As the reference's where it does the work."""
        if dtype != torch.float32 or not self.planes_innermost(grid):
            return super().plane_arrays(grid, dtype, repacked)
        return 2 if repacked else 1  # rows, and what is kept of them

    def tile_index(self, bitmap: Tensor, offsets: Tensor) -> TileIndex | None:
        """As the reference's."""
        if not (bitmap.is_contiguous() and offsets.is_contiguous()):
            return reference.TileIndex(bitmap, offsets)
        return NativeTileIndex(bitmap, offsets)

    def row_pattern(
        self, bitmap: Tensor, offsets: Tensor, rows: slice | Tensor, t0: int, t1: int, index: TileIndex | None = None
    ) -> RowPattern | None:
        """None: the functions read the bitmap themselves."""
        return None

    def unpack_rows(
        self,
        values: Tensor,
        scales: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        rows: slice | Tensor,
        t0: int,
        t1: int,
        out: Tensor,
        pattern: RowPattern | None = None,
    ) -> Tensor:
        """As the reference's."""
        if not _takes(out, values, scales, bitmap, offsets):
            return reference.unpack_rows(values, scales, bitmap, offsets, rows, t0, t1, out, pattern)
        native.expand_rows(Part.of(bitmap, rows, t0, t1, offsets, values.shape[0]), values, scales, out)
        return out

    def gather_rows(
        self,
        y: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        rows: slice | Tensor,
        t0: int,
        out: Tensor,
        pattern: RowPattern | None = None,
    ) -> Tensor:
        """As the reference's."""
        if not _takes(y, out, bitmap, offsets) or out.dtype != torch.float32:
            return reference.gather_rows(y, bitmap, offsets, rows, t0, out, pattern)
        t1 = t0 + y.shape[1] // (bitmap.shape[2] * 8)
        native.store_rows(Part.of(bitmap, rows, t0, t1, offsets, out.shape[0]), y, out)
        return out

    def count_moduli(self, y: Tensor, guard: int, shift: int, counts: Tensor) -> None:
        """As the reference's, to float32 rounding."""
        if y.dtype != torch.float32 or y.is_cuda or y.stride()[1:] != (2, 1):
            reference.count_moduli(y, guard, shift, counts)
            return
        native.count_moduli(y, guard, shift, counts)

    def compact_rows(
        self,
        y: Tensor,
        length: int,
        threshold: float | Tensor,
        rows: slice | Tensor,
        t0: int,
        bitmap: Tensor,
        kind: str = "identity",
        scale: Tensor | None = None,
        channels: int = 1,
    ) -> Tensor:
        """As the reference's, but that squares of moduli are compared."""
        if not _takes(y, bitmap):
            return reference.compact_rows(y, length, threshold, rows, t0, bitmap, kind, scale, channels)
        kept = self.pack_chunk(y, length, threshold, rows, t0, bitmap, y.new_empty(0), y.dtype)
        if kind == "identity":
            return kept
        of_kept = None
        if scale is not None:
            tile = bitmap.shape[2] * 8
            part = Part.of(bitmap, rows, t0, t0 + y.shape[1] // tile)
            chunk = part.with_offsets(native.tile_starts(part)[0], kept.shape[0])
            of_kept = y.new_empty(kept.shape[0])
            native.gather_channels(chunk, scale.to(y.dtype), t0 * tile, of_kept)
        return activate(kept, kind, None if of_kept is None else of_kept[:, None])

    def pack_chunk(
        self,
        y: Tensor,
        length: int,
        threshold: float | Tensor,
        rows: slice | Tensor,
        t0: int,
        bitmap: Tensor,
        scales: Tensor,
        dtype: torch.dtype,
        kind: str = "identity",
        scale: Tensor | None = None,
        channels: int = 1,
        seed: Tensor | None = None,
    ) -> Tensor:
        """As the reference's, in two passes over the chunk, and without temporaries."""
        if not (_takes(y, bitmap, scales) and dtype in native.FORMATS and kind in _KINDS and seed is None):
            return super().pack_chunk(
                y, length, threshold, rows, t0, bitmap, scales, dtype, kind, scale, channels, seed
            )
        if isinstance(threshold, Tensor):
            threshold = threshold.to(y.dtype)
        part = Part.of(bitmap, rows, t0, t0 + y.shape[1] // (bitmap.shape[2] * 8))
        starts, count = native.threshold_rows(part, y, length, threshold)
        values = torch.empty(count, *(() if dtype == torch.uint8 else (2,)), dtype=dtype)
        numbers = None if scale is None or kind == "identity" else scale.to(y.dtype)
        native.store_rows(part.with_offsets(starts, count), y, values, scales, kind == "tanh", numbers)
        return values

    def tile_starts(self, bitmap: Tensor) -> Tensor:
        """As the reference's."""
        return native.tile_starts(Part.of(bitmap, slice(0, bitmap.shape[0]), 0, bitmap.shape[1]))[0]

    def store_rows(
        self,
        y: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        rows: slice | Tensor,
        values: Tensor,
        scales: Tensor,
        pattern: RowPattern | None = None,
        t0: int = 0,
    ) -> None:
        """As the reference's."""
        if not (_takes(y, values, scales, bitmap, offsets) and values.dtype in native.FORMATS):
            reference.store_rows(y, bitmap, offsets, rows, values, scales, pattern, t0)
            return
        t1 = t0 + y.shape[1] // (bitmap.shape[2] * 8)
        native.store_rows(Part.of(bitmap, rows, t0, t1, offsets, values.shape[0]), y, values, scales)

    def reorder(self, values: Tensor, starts: Tensor, counts: Tensor, targets: Tensor) -> Tensor:
        """As the reference's."""
        if not values.is_contiguous():
            return reference.reorder(values, starts, counts, targets)
        out = torch.empty_like(values)
        native.move_runs(values, starts, targets, counts, out)
        return out

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
        index: TileIndex | None = None,
    ) -> Tensor:
        """As the reference's."""
        if not _takes(out, values, scales, bitmap, offsets):
            return reference.unpack_planes(values, scales, bitmap, offsets, grid, t0, t1, count, row_scale, out, index)
        half = out.view(count, -1, 2)
        part = Part.of(bitmap, slice(0, grid.count), t0, t1, offsets, values.shape[0])
        factors = None if row_scale is None else row_scale.to(out.dtype)
        native.expand_planes(part, values, scales, grid.index, factors, half)
        fill_mirrors(torch.view_as_complex(half), grid)
        return out

    def planes_innermost(self, grid: FrequencyGrid) -> bool:
        """As the reference's, for larger maps, too."""
        return max(grid.height, grid.width) <= native.LARGEST_SIDE

    def by_products(self, grid: FrequencyGrid, maps: Tensor) -> bool:
        """Likewise, whatever the memory order of the maps."""
        if maps.dtype != torch.float32:
            return reference.by_products(grid, maps)
        return self.planes_innermost(grid)

    def rows_of_maps(self, maps: Tensor, grid: FrequencyGrid, padded: int) -> Tensor:
        """As the reference's."""
        if not (maps.dtype == torch.float32 and self.by_products(grid, maps)):
            return reference.rows_of_maps(maps, grid, padded)
        rows = maps.new_empty(grid.count, padded, 2)
        native.rows_of_maps(maps, *_plan(grid, grid.count), rows)
        return rows

    def unpack_maps(
        self,
        values: Tensor,
        scales: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        grid: FrequencyGrid,
        t0: int,
        t1: int,
        weighted: bool,
        out: Tensor,
        index: TileIndex | None,
    ) -> None:
        """As the reference's, without parts of more than a block of planes."""
        fields = (values, scales, bitmap, offsets)
        if index is None or out.dtype != torch.float32 or not (_stand(*fields) and self.by_products(grid, out)):
            super().unpack_maps(values, scales, bitmap, offsets, grid, t0, t1, weighted, out, index)
            return
        pooling = native.BlockPooling.of((out.shape[0], out.shape[1], out.shape[2]), bitmap.shape[2] * 8)
        native.unpack_maps(_packed(*fields, grid, t0, t1, weighted, index), pooling, out)

    def gather_maps(
        self,
        maps: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        grid: FrequencyGrid,
        t0: int,
        t1: int,
        out: Tensor,
        index: TileIndex | None,
    ) -> None:
        """As the reference's, likewise."""
        if index is None or maps.dtype != torch.float32:
            super().gather_maps(maps, bitmap, offsets, grid, t0, t1, out, index)
            return
        if not (_takes(out, bitmap, offsets) and self.by_products(grid, maps)):
            super().gather_maps(maps, bitmap, offsets, grid, t0, t1, out, index)
            return
        pooling = native.BlockPooling.of((maps.shape[0], maps.shape[1], maps.shape[2]), bitmap.shape[2] * 8)
        packed = _pattern(bitmap, offsets, grid, t0, t1, _halves(grid), index, out.shape[0])
        native.gather_maps(packed, pooling, maps, out)

    def unpack_pooled(
        self,
        values: Tensor,
        scales: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        grid: FrequencyGrid,
        t0: int,
        t1: int,
        pool: across.Pool,
        out: Tensor,
        index: TileIndex | None,
    ) -> bool:
        """Where the functions take it, a block of planes at a time."""
        fields = (values, scales, bitmap, offsets)
        if index is None or not (out.dtype == torch.float32 and _stand(*fields) and self.planes_innermost(grid)):
            return False
        pooling = _pooling(pool, (out.shape[0], out.shape[1], out.shape[2]))
        native.unpack_maps(_packed(*fields, grid, t0, t1, True, index), pooling, out)
        return True

    def rows_of_pooled(
        self,
        values: Tensor,
        scales: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        grid: FrequencyGrid,
        t0: int,
        t1: int,
        pool: across.Pool,
        pooled: FrequencyGrid,
        planes: int,
        padded: int,
        dtype: torch.dtype,
        index: TileIndex | None,
    ) -> Tensor | None:
        """Likewise."""
        fields = (values, scales, bitmap, offsets)
        if index is None or not (dtype == torch.float32 and _stand(*fields) and self.planes_innermost(grid)):
            return None
        rows = torch.empty(pooled.count, padded, 2)
        pooling = _pooling(pool, (planes, pooled.height, pooled.width))
        packed = _packed(*fields, grid, t0, t1, True, index)
        native.unpack_rows_of_maps(packed, pooling, *_plan(pooled, pooled.count), rows)
        return rows

    def gather_pooled(
        self,
        grad: Tensor,
        pool: across.Pool,
        bitmap: Tensor,
        offsets: Tensor,
        grid: FrequencyGrid,
        kept: int,
        index: TileIndex | None,
    ) -> Tensor | None:
        """Likewise."""
        if (
            index is None
            or grad.dtype != torch.float32
            or not (_stand(bitmap, offsets) and self.planes_innermost(grid))
        ):
            return None
        out = torch.empty(kept, 2)
        pooling = _pooling(pool, (grad.shape[0], grad.shape[1], grad.shape[2]))
        packed = _pattern(bitmap, offsets, grid, 0, bitmap.shape[1], _factors(grid, True), index, kept)
        native.gather_maps(packed, pooling, grad, out)
        return out

    def gather_repacked(
        self,
        grad: Tensor,
        grad_bitmap: Tensor,
        grad_offsets: Tensor,
        pooled: FrequencyGrid,
        pool: across.Pool,
        planes: int,
        bitmap: Tensor,
        offsets: Tensor,
        grid: FrequencyGrid,
        kept: int,
        index: TileIndex | None,
    ) -> Tensor | None:
        """Likewise."""
        of_grad = self.tile_index(grad_bitmap, grad_offsets)
        if index is None or of_grad is None or not self.planes_innermost(grid):
            return None
        if not _takes(grad, grad_bitmap, grad_offsets, bitmap, offsets):
            return None
        out = torch.empty(kept, 2)
        pooling = _pooling(pool, (planes, pooled.height, pooled.width))
        fields = (grad, grad.new_empty(0), grad_bitmap, grad_offsets)
        gradients = _packed(*fields, pooled, 0, grad_bitmap.shape[1], False, of_grad)
        packed = _pattern(bitmap, offsets, grid, 0, bitmap.shape[1], _factors(grid, True), index, kept)
        native.gather_packed_maps(packed, pooling, gradients, out)
        return out

    def unpack_gradient_rows(
        self,
        grad: Tensor,
        values: Tensor,
        scales: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        rows: slice,
        kind: str,
        scale: Tensor | None,
        channels: int,
        out: Tensor,
        index: TileIndex | None,
    ) -> Tensor | None:
        """As the reference's."""
        if kind not in _KINDS or not _takes(out, grad, values, scales, bitmap, offsets):
            return super().unpack_gradient_rows(
                grad, values, scales, bitmap, offsets, rows, kind, scale, channels, out, index
            )
        part = Part.of(bitmap, rows, 0, offsets.shape[1], offsets, grad.shape[0])
        if kind == "identity":
            native.expand_rows(part, grad, scales, out)
            return None
        numbers = None if scale is None else scale.to(out.dtype)
        return native.unpack_gradient_rows(part, grad, values, scales, numbers, out)

    def kept_rows(
        self, bitmap: Tensor, offsets: Tensor, rows: Tensor, index: TileIndex | None, dtype: torch.dtype
    ) -> KeptRows:
        """As the reference's, without a pattern where the functions take what is kept."""
        if index is None or not index.ordered or dtype != torch.float32 or not rows.numel():
            return super().kept_rows(bitmap, offsets, rows, index, dtype)
        first, last = int(rows[0]), int(rows[-1])  # nothing is kept of those between that are left out
        start, stop = int(index.starts[first, 0]), int(index.starts[last, -1] + index.counts[last, -1])
        return KeptRows(bitmap, offsets, rows, slice(start, stop), None)

    def spread_kept(self, kept: KeptRows, table: Tensor) -> Tensor:
        """As the reference's."""
        if kept.pattern is not None:
            return super().spread_kept(kept, table)
        out = table.new_empty(_count(kept))
        native.gather_channels(_part(kept, local=True), table, 0, out)
        return torch.view_as_real(torch.complex(out, out))

    def sum_places(self, kept: KeptRows, numbers: Tensor) -> Tensor:
        """As the reference's."""
        if kept.pattern is not None:
            return super().sum_places(kept, numbers)
        sums = numbers.new_zeros(kept.places, 2)
        native.sum_rows(_part(kept, local=True), numbers.contiguous(), sums)
        return sums.sum(1)

    def sum_kept(
        self, kept: KeptRows, values: Tensor, scales: Tensor, weight: Tensor, numbers: Tensor | None
    ) -> Tensor:
        """As the reference's, added up in float64."""
        if kept.pattern is not None:
            return super().sum_kept(kept, values, scales, weight, numbers)
        sums, numbers = torch.zeros(kept.places, dtype=torch.float64), None if numbers is None else numbers.contiguous()
        native.sum_kept(_part(kept), values, scales, _first(kept), weight, numbers, sums)
        return sums

    def scale_kept(self, kept: KeptRows, values: Tensor, scales: Tensor, gain: Tensor) -> Tensor:
        """As the reference's."""
        if kept.pattern is not None:
            return super().scale_kept(kept, values, scales, gain)
        out = gain.new_empty(_count(kept), 2)
        native.combine_kept(_part(kept), values, scales, _first(kept), gain, None, None, None, out)
        return out

    def combine_kept(
        self,
        kept: KeptRows,
        numbers: Tensor,
        factors: Tensor,
        values: Tensor,
        scales: Tensor,
        gain: Tensor | None,
        weight: Tensor,
        out: Tensor,
    ) -> None:
        """As the reference's."""
        if kept.pattern is not None:
            super().combine_kept(kept, numbers, factors, values, scales, gain, weight, out)
            return
        given = (gain, weight, numbers.contiguous(), factors, out)
        native.combine_kept(_part(kept), values, scales, _first(kept), *given)

    def store_kept(self, kept: KeptRows, numbers: Tensor, values: Tensor, scales: Tensor) -> None:
        """As the reference's."""
        if kept.pattern is not None:
            super().store_kept(kept, numbers, values, scales)
            return
        if scales.numel():
            starts, _ = native.tile_starts(_part(kept))
            numbers, scales[kept.rows] = _quantised(numbers.contiguous(), starts, values.dtype)
        values[kept.slots] = numbers

    def norm_statistics(
        self,
        values: Tensor,
        scales: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        shape: list[int],
        dtype: torch.dtype,
        workspace: int,
    ) -> tuple[Tensor, Tensor] | None:
        """In one function."""
        if dtype != torch.float32 or not _stand(values, scales, bitmap, offsets):
            return None
        norm = native.Norm.of(_maps(shape))
        return native.norm_statistics(*_of_norm(values, scales, bitmap, offsets, shape), norm)

    def norm_gradients(
        self,
        grad: Tensor,
        values: Tensor,
        scales: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        var: Tensor,
        shape: list[int],
        batch_statistics: bool,
        eps: float,
        out: Tensor | None,
        workspace: int,
    ) -> tuple[Tensor, Tensor] | None:
        """Likewise."""
        parameters = (mean, var) if weight is None else (mean, var, weight)
        if not (_takes(grad, values, scales, bitmap, offsets) and all(map(_takes, parameters))):
            return None
        norm = native.Norm.of(_maps(shape), mean, var, weight, None, eps, batch_statistics)
        return native.norm_gradients(*_of_norm(values, scales, bitmap, offsets, shape), norm, grad, out)

    def norm_planes(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        batch: int,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """As the reference's."""
        given = [t for t in (mean, var, weight, bias) if t is not None]
        if dtype != torch.float32 or not all(map(_takes, given)):
            return super().norm_planes(weight, bias, mean, var, batch, eps, dtype)
        return native.norm_planes(native.Norm.of((batch, mean.shape[0], 1), mean, var, weight, bias, eps))

    def fit_blocks(self, x: Tensor, layout: BlockLayout, workspace: int) -> tuple[Tensor, Tensor, Tensor]:
        """As the reference's, in three passes over the sample."""
        sample, sampled = block_codec.sample_of(x, layout)
        dct, mean = block_codec.dct_matrices(layout.edges, x.device), self.channel_means(x, layout)
        return native.fit_blocks(sampled, _classes(), dct, block_codec.ROUNDS, sample, mean)

    def block_plan(self, stored: tuple[Tensor, Tensor, Tensor], layout: BlockLayout) -> Plan:
        """Of all rows: the functions pass over those without bits. What they do not take is left out."""
        scales, basis, spectrum = (t.contiguous() for t in stored)
        inverse, bits, deviation, rows = native.plan_blocks(layout, _classes(), scales, basis, spectrum)
        mean, scale, _ = scales.tensor_split((inverse.numel(), 2 * inverse.numel()))
        none, cpu = torch.empty(0, dtype=torch.int64), scales.device
        change = Transform(mean, inverse, scale, None, block_codec.dct_matrix(layout.edges, cpu))
        constants = block_codec.quantiser_levels(cpu), block_codec.compander_factors(cpu), block_codec.RATE
        dct = block_codec.dct_matrices(layout.edges, cpu)
        tables = BlockTables(bits, deviation, rows, native.Coding.of(layout, rows, bits, deviation, dct, *constants))
        return Plan(change, none, none, none, deviation, encoding=tables, decoding=tables)

    def ready_plan(self, plan: Plan, layout: BlockLayout) -> Plan:
        """It is."""
        return plan

    def encode_blocks(self, x: Tensor, layout: BlockLayout, plan: Plan, seed: Tensor | None, workspace: int) -> Tensor:
        """As the reference's, sixteen blocks at a time on each thread."""
        key = None if seed is None else noise_key(seed)
        records = torch.empty(layout.blocks, layout.record, dtype=torch.uint8)
        change, coding = plan.change, plan.encoding.coding
        native.encode_blocks(coding, x, change.mean.contiguous(), change.inverse.contiguous(), key, records)
        return records

    def decode_blocks(self, records: Tensor, layout: BlockLayout, plan: Plan, out: Tensor, workspace: int) -> Tensor:
        """As the reference's, likewise."""
        change, coding = plan.change, plan.decoding.coding
        native.decode_blocks(coding, out, change.mean.contiguous(), change.scale.contiguous(), records.contiguous())
        return out

    def channel_means(self, x: Tensor, layout: BlockLayout) -> Tensor:
        """As the reference's."""
        order = _order(x)
        if order is None:
            return block_codec.channel_means(x, layout)
        mean = x.new_empty(x.shape[1])
        native.channel_means(x, order, layout.mix, mean)
        return mean

    def rectify(self, x: Tensor, limit: float, inplace: bool) -> tuple[Tensor, Tensor]:
        """As the reference's."""
        if _order(x) is None:
            return bits.rectify(x, limit, inplace)
        y = x if inplace else torch.empty_like(x)
        outside = torch.empty(-(-x.numel() // 8), dtype=torch.uint8)
        native.rectify(x, limit, y, outside)
        if inplace:
            torch.autograd.graph.increment_version(x)
        return y, outside

    def clear_outside(self, x: Tensor, outside: Tensor, channels_last: bool, inplace: bool) -> Tensor:
        """As the reference's."""
        if x.dtype != torch.float32:
            return bits.clear_outside(x, outside, channels_last, inplace)
        dense, out = _in_order(x, channels_last, inplace)
        native.clear_outside(dense, outside, out)
        return out

    def rebuild(
        self,
        x: Tensor,
        statistics: Statistics,
        eps: float | None,
        outside: Tensor | None,
        channels_last: bool,
        inplace: bool,
    ) -> Tensor:
        """As the reference's, but that a batch norm alone leaves the maps in the order of the bits, too."""
        given = [t for t in (x, *statistics) if t is not None]
        if any(t.dtype != torch.float32 for t in given):
            return rebuild(x, statistics, eps, outside, channels_last, inplace)
        mean, scale, weight, bias = (None if t is None else t.contiguous() for t in statistics)
        if mean is not None and scale is not None:
            dense, out = _in_order(x, channels_last, inplace)
            if eps is not None:
                scale = torch.rsqrt(scale + eps)
            native.rebuild(dense, mean, scale, weight, bias, outside, channels_last, out)
            return out
        if outside is None:
            return x
        dense, out = _in_order(x, channels_last, inplace)
        native.rectify_again(dense, outside, out)
        return out

    def pool_maxima(self, x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """As the reference's, without positions of 64 bits."""
        order = _order(x)
        if order is None:
            return max_pool.pool_maxima(x, window)
        shape = (*x.shape[:2], *max_pool.pooled_size(window, *x.shape[2:]))
        y = torch.empty(shape, memory_format=_format(order))
        codes = torch.empty(-(-y.numel() * window.bits // 8), dtype=torch.uint8)
        native.pool_maxima(native.Pooling.of(x, y, window, order), x, y, codes)
        return y, codes

    def pool_maxima_again(
        self, x: Tensor, window: Window, codes: Tensor, outputs: torch.Size, channels_last: bool
    ) -> Tensor:
        """As the reference's, likewise."""
        if x.dtype != torch.float32:
            return max_pool.pool_maxima_again(x, window, codes, outputs, channels_last)
        y = torch.empty(outputs, memory_format=_format(channels_last))
        native.pool_maxima_again(native.Pooling.of(x, y, window, channels_last), x, codes, y)
        return y

    def spread_maxima(
        self, grad: Tensor, window: Window, codes: Tensor, shape: torch.Size, channels_last: bool
    ) -> Tensor:
        """As the reference's, likewise."""
        if grad.dtype != torch.float32:
            return max_pool.spread_maxima(grad, window, codes, shape, channels_last)
        above = grad.contiguous(memory_format=_format(channels_last))
        out = torch.empty(shape, memory_format=_format(channels_last))
        native.spread_maxima(native.Pooling.of(out, above, window, channels_last), above, codes, out)
        return out


def _rows_apart(chunk: Tensor) -> bool:
    """Whether each frequency of ``(Fc, B, C, 2)`` is dense."""
    return chunk.stride()[1:] == (2 * chunk.shape[2], 2, 1)


def _dense(chunk: Tensor) -> Tensor:
    return chunk if _rows_apart(chunk) else chunk.contiguous()


def _order(x: Tensor) -> bool | None:
    """Whether maps stand channels last; None where the functions do not take them as they are."""
    if x.dtype != torch.float32:
        return None
    if x.is_contiguous():
        return False
    return True if x.is_contiguous(memory_format=torch.channels_last) else None


def _in_order(x: Tensor, channels_last: bool, inplace: bool) -> tuple[Tensor, Tensor]:
    """Maps in an order, and where to write the result: to them, unless they are the given ones and have to stay."""
    dense = x.contiguous(memory_format=_format(channels_last))
    return dense, dense if inplace or dense is not x else torch.empty_like(dense)


class BlockTables(NamedTuple):
    """What the functions take of a plan.

    Attributes:
        bits: ``(rows,)`` uint8, of the fields.
        deviation: ``(rows,)`` float32.
        basis: ``(G, g, g)`` float32, components in the rows; None for g = 1.
        coding: pointers to all of them.
    """

    bits: Tensor
    deviation: Tensor
    basis: Tensor | None
    coding: native.Coding


@lru_cache(maxsize=1)
def _classes() -> native.Classes:
    widths = torch.tensor(block_codec.CLASS_WIDTHS, dtype=torch.uint8)
    edges, variance = torch.tensor(block_codec.CLASS_EDGES), torch.tensor(block_codec.CLASS_VARIANCE)
    return native.Classes.of(edges, variance, widths, block_codec.HEADROOM, block_codec.NOTHING)


def _takes(dense: Tensor, *others: Tensor) -> bool:
    """Whether the functions take these tensors: a dense one, whose precision counts, and others."""
    return dense.dtype == torch.float32 and _stand(dense, *others)


def _stand(*tensors: Tensor) -> bool:
    """Whether tensors stand in the host's memory as the functions expect them to."""
    for t in tensors:  # a generator takes longer than what it asks for
        if t.is_cuda or not t.is_contiguous():
            return False
    return True


def _first(kept: KeptRows) -> int:
    """Where what is kept begins among the values."""
    assert isinstance(kept.slots, slice)
    return int(kept.slots.start)


def _count(kept: KeptRows) -> int:
    assert isinstance(kept.slots, slice)
    return int(kept.slots.stop - kept.slots.start)


def _part(kept: KeptRows, local: bool = False) -> Part:
    """``local``: of numbers rather than of values."""
    first, count, tiles = _first(kept), _count(kept), kept.offsets.shape[1]
    if local:
        return Part.of(kept.bitmap, kept.rows, 0, tiles, kept.offsets, count, base=first)
    return Part.of(kept.bitmap, kept.rows, 0, tiles, kept.offsets, first + count)


def _quantised(kept: Tensor, starts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    pairs = (2,) if dtype == torch.int8 else ()
    out, scales = torch.empty(kept.shape[0], *pairs, dtype=dtype), torch.empty(starts.shape)
    native.quantise(kept, starts, out, scales)
    return out, scales


def _maps(shape: list[int]) -> tuple[int, int, int]:
    """Batch, channels, and elements of a map."""
    batch, channels, height, width = shape
    return batch, channels, height * width


def _of_norm(
    values: Tensor, scales: Tensor, bitmap: Tensor, offsets: Tensor, shape: list[int]
) -> tuple[Part, Tensor, Tensor, Tensor]:
    """What the functions of batch norms take of a packed spectrum."""
    part = Part.of(bitmap, slice(0, bitmap.shape[0]), 0, bitmap.shape[1], offsets, values.shape[0])
    return part, values, scales, _factors(frequency_grid(shape[2], shape[3], bitmap.device), True)


@lru_cache(maxsize=128)
def _factors(grid: FrequencyGrid, weighted: bool) -> Tensor:
    """``(F,)`` float32: how often a coefficient counts in a map."""
    return grid.weight.to(torch.float32) if weighted else torch.ones(grid.count)


@lru_cache(maxsize=64)
def _halves(grid: FrequencyGrid) -> Tensor:
    """``(F,)`` float32: half of how often."""
    return grid.weight.to(torch.float32) / 2


def _packed(
    values: Tensor,
    scales: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    grid: FrequencyGrid,
    t0: int,
    t1: int,
    weighted: bool,
    index: TileIndex,
) -> native.Packed:
    """Tiles of planes of a packed spectrum that become maps."""
    part = Part.of(bitmap, slice(0, index.filled), t0, t1, offsets, values.shape[0])
    return native.Packed.of(part, *_plan(grid, index.filled, True), _factors(grid, weighted), values, scales)


def _pattern(
    bitmap: Tensor,
    offsets: Tensor,
    grid: FrequencyGrid,
    t0: int,
    t1: int,
    factors: Tensor,
    index: TileIndex,
    kept: int,
) -> native.Packed:
    """Tiles of planes of a packed spectrum that are made of maps."""
    part = Part.of(bitmap, slice(0, index.filled), t0, t1, offsets, kept)
    return native.Packed.of(part, *_plan(grid, index.filled), factors)


def _pooling(pool: across.Pool, outputs: tuple[int, int, int]) -> native.BlockPooling:
    windows, codes, signs, affine, rectify = pool
    (down, right), (step_down, step_right), bits, tile, margin = windows
    bits = 0 if codes is None else bits
    window = (down, right), (step_down, step_right), bits, margin
    return native.BlockPooling.of(outputs, tile, *window, codes, signs, affine, rectify)


@lru_cache(maxsize=256)
def _plan(grid: FrequencyGrid, count: int, transposed: bool = False) -> tuple[native.Plan, Tensor]:
    """How a band that holds the first ``count`` frequencies is transformed, and the places of its parts."""
    by = products(grid, count, torch.float32)
    return _half_plan(*by.size, by.bands, by.band, transposed), by.places


@lru_cache(maxsize=256)
def _half_plan(height: int, width: int, bands: int, columns: int, transposed: bool) -> native.Plan:
    """By turns of frequencies ``(k, i)`` with the positions of half a side, times the factor of an ortho transform."""

    def half(count: int, size: int) -> tuple[Tensor, Tensor]:
        cosine, sine = (t[:, : size // 2 + 1] / math.sqrt(size) for t in turns(torch.arange(count), size))
        both = (t.to(torch.float32) for t in (cosine, sine))
        cosine, sine = (t.T if transposed else t for t in both)
        return cosine, sine

    return native.Plan.of(height, width, (*half(bands, height), *half(columns, width)), int(transposed))
