"""Finding the fastest configuration of each kernel on the GPU at hand: what ``spectriton tune`` does.

A *case* is a kernel with dtypes and sizes. For each one the tuner makes random inputs, asserts of every configuration
in the kernel's space that its results are right, times it as :mod:`spectriton.timing` says with inputs rotated beyond
the last-level cache, and keeps the fastest. What is right comes from :mod:`spectriton.reference`, or for the kernels
that pack and unpack from the pattern that the inputs were made with.

Bytes are those that have to be moved: every input read once, every output written once, a quarter of the coefficients
kept.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from spectriton import _backend, environment, reference, tuning
from spectriton._check import check_choice, fail
from spectriton.frequencies import FrequencyGrid, frequency_grid
from spectriton.packed import layout
from spectriton.reference import across, bits, block_codec, max_pool
from spectriton.reference.rebuild import Statistics, rebuild
from spectriton.reference.spectral_activation import activate_backward
from spectriton.timing import MOST_SETS, Stopwatch, copy_seconds, evict, input_sets

#: A configuration replaces the heuristic where it is faster by this factor: less is within the scatter of timings.
WORTH = 1.02

_DENSITY = 0.25
# The largest error of a result over the largest number in it.
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# One step, of 8 bits and of 4.
_TOLERANCES |= {torch.int8: 1 / 127, torch.uint8: 1 / 7}


@dataclass(frozen=True)
class Case:
    """What is tuned: a kernel with dtypes and sizes, whose meaning is in ``spectriton_kernels.configs``."""

    kernel: str
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, ...]

    @property
    def texts(self) -> tuple[str, str, str]:
        """Kernel, dtypes and sizes."""
        names = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        return self.kernel, ", ".join(names), " x ".join(map(str, self.sizes))

    def __str__(self) -> str:
        return " ".join(self.texts)


@dataclass(frozen=True)
class Run:
    """A launch that is ready.

    Attributes:
        call: launches, and whatever belongs to it; this is timed.
        results: what it wrote, to be compared with what is right.
    """

    call: Callable[[], Any]
    results: Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """Inputs for a case.

    Attributes:
        run: makes the launch in a configuration, and spoils what it will write: an earlier launch's results must not
            pass for its own.
        expected: the right results.
        moved: bytes.
        prepare: puts back what a launch changes; not timed.
    """

    run: Callable[[Any], Run]
    expected: Callable[[], tuple[Tensor, ...]]
    moved: int
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Result:
    """What tuning a case found.

    Attributes:
        case: what was tuned.
        heuristic: the configuration without tuning.
        best: the configuration chosen.
        seconds: median of each configuration that works.
        failures: why the others do not.
        moved: bytes that the work has to move.
        copy_seconds: median of a device copy that moves as many bytes.
    """

    case: Case
    heuristic: Any
    best: Any
    seconds: dict[Any, float]
    failures: dict[Any, str]
    moved: int
    copy_seconds: float

    @property
    def speedup(self) -> float:
        """Of the configuration chosen, over the heuristic."""
        return self.seconds[self.heuristic] / self.seconds[self.best]

    def rate(self, config: Any) -> float:
        """Bytes a second of a configuration."""
        return self.moved / self.seconds[config]

    def share(self, config: Any) -> float:
        """Of a configuration in the bandwidth of copying."""
        return self.copy_seconds / self.seconds[config]

    def entry(self) -> tuning.Entry:
        """For the file."""
        measured = {
            "seconds": self.seconds[self.best],
            "heuristic_seconds": self.seconds[self.heuristic],
            "gb_per_s": self.rate(self.best) / 1e9,
            "copy_fraction": self.share(self.best),
        }
        key = tuning.key_of(self.case.kernel, self.case.dtypes, self.case.sizes)
        return tuning.Entry(*key, asdict(self.best), {name: round(value, 9) for name, value in measured.items()})


# -- inputs ----------------------------------------------------------------------------------------------------------


class _Random:
    """Random tensors on a device, the same for the same seed."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def real(self, *shape: int, dtype: torch.dtype) -> Tensor:
        wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        return torch.randn(shape, generator=self.generator, dtype=wide, device=self.device).to(dtype)

    def complex(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.view_as_complex(self.real(*shape, 2, dtype=dtype))

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device) < _DENSITY

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(256, shape, generator=self.generator, dtype=torch.uint8, device=self.device)

    def scale(self, channels: int, dtype: torch.dtype) -> Tensor:
        return torch.linspace(1, 4, channels, dtype=dtype, device=self.device)


def _nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _spoil(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.fill_(torch.nan if tensor.is_floating_point() or tensor.is_complex() else 77)


def _complex_product(case: Case, random: _Random) -> Problem:
    (reals,), (dtype,) = case.sizes, case.dtypes
    return _product(*(random.complex(reals // 2, dtype=dtype) for _ in range(2)))


def _complex_product_broadcast(case: Case, random: _Random) -> Problem:
    (rows, columns, *steps), (dtype,) = case.sizes, case.dtypes

    def operand(step: int) -> Tensor:
        if step == 0:
            return random.complex(rows, 1, dtype=dtype)
        # Apart, so that rows and columns cannot be walked as one.
        if step == 1:
            return random.complex(rows, columns + 16, dtype=dtype)[:, :columns]
        return random.complex(columns, rows + 1, dtype=dtype)[:, :rows].T

    return _product(*(operand(step) for step in steps))


def _product(x: Tensor, w: Tensor) -> Problem:
    from spectriton_kernels.complex_product import plan_complex_product

    def run(config: Any) -> Run:
        launch, out = plan_complex_product(x, w, False, config)
        _spoil(out)
        return Run(launch.run, lambda: (out,))

    result = x.element_size() * torch.broadcast_shapes(x.shape, w.shape).numel()
    return Problem(run, lambda: (reference.complex_product(x, w, False),), _nbytes(x, w) + result)


def _spectral_activation(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.spectral_activation import plan_spectral_activation

    (reals, inner), (dtype,) = case.sizes, case.dtypes
    x, scale = random.complex(reals // 2, dtype=dtype), None
    if inner:
        channels = max(1, min(64, reals // inner))
        x = random.complex(max(1, reals // (inner * channels)), channels, inner // 2, dtype=dtype)
        scale = random.scale(channels, dtype)

    def run(config: Any) -> Run:
        launch, out = plan_spectral_activation(x, "tanh", scale, config)
        _spoil(out)
        return Run(launch.run, lambda: (out,))

    return Problem(run, lambda: (reference.spectral_activation(x, "tanh", scale),), 2 * _nbytes(x))


def _spectral_activation_backward(case: Case, random: _Random) -> Problem:
    (reals,), (dtype,) = case.sizes, case.dtypes
    return _activation_backward((reals // 2,), dtype, None, random)


def _spectral_activation_scale_backward(case: Case, random: _Random) -> Problem:
    (batch, channels, inner), (dtype,) = case.sizes, case.dtypes
    return _activation_backward((batch, channels, inner // 2), dtype, random.scale(channels, dtype), random)


def _activation_backward(shape: tuple[int, ...], dtype: torch.dtype, scale: Tensor | None, random: _Random) -> Problem:
    from spectriton_kernels.spectral_activation import plan_spectral_activation_backward

    grad, x = (random.complex(*shape, dtype=dtype) for _ in range(2))
    z = reference.spectral_activation(x, "tanh", scale)

    def run(config: Any) -> Run:
        launch, grad_x, partial = plan_spectral_activation_backward(grad, z, "tanh", scale, config)
        _spoil(grad_x, *(() if partial is None else (partial,)))
        sums: list[Tensor] = []

        def call() -> None:
            launch.run()
            if partial is not None:
                sums[:] = [partial.sum(dim=(0, 2))]

        return Run(call, lambda: (grad_x, *sums))

    def expected() -> tuple[Tensor, ...]:
        return tuple(
            tensor for tensor in reference.spectral_activation_backward(grad, z, "tanh", scale) if tensor is not None
        )

    return Problem(run, expected, 3 * _nbytes(z))


def _stored(kept: Tensor, counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Coefficients ``(N, 2)`` in a value format, and the scales of tiles that keep ``counts``; empty for floats."""
    if dtype.is_floating_point:
        return kept.to(dtype), kept.new_empty(0)
    return reference.quantise(kept, counts, dtype)


def _parts(values: Tensor) -> Tensor:
    """Values as numbers ``(N, 2)``."""
    if values.ndim == 2:
        return values
    signed = values.view(torch.int8)
    return torch.stack([(signed << 4) >> 4, signed >> 4], dim=1)


@dataclass(frozen=True)
class _Packed:
    """A packed spectrum of random coefficients, and what it was made from.

    Attributes:
        dense: ``(rows, T * tile, 2)``, zero where nothing is kept.
        mask: ``(rows, T * tile)``.
        bitmap, offsets, values, scales: as in ``docs/packed-format.md``, tiles in ascending order.
        rows: numbers of all rows.
    """

    dense: Tensor
    mask: Tensor
    bitmap: Tensor
    offsets: Tensor
    values: Tensor
    scales: Tensor
    rows: Tensor

    @classmethod
    def random(cls, rows: int, tiles: int, tile: int, dtypes: Sequence[torch.dtype], random: _Random) -> _Packed:
        """Of random values and pattern; the dense side and the values are of two dtypes and equal."""
        dtype, value_dtype = dtypes
        mask = random.mask(rows, tiles * tile)
        mask[0] = True
        floats = (dtype for dtype in dtypes if dtype.is_floating_point)
        coarse = min(floats, key=lambda dtype: (dtype.itemsize, torch.finfo(dtype).max))
        dense = random.real(rows, tiles * tile, 2, dtype=coarse).to(dtype) * mask[..., None]
        bits = 1 << torch.arange(8, device=random.device)
        bitmap = (mask.view(rows, tiles, tile // 8, 8) * bits).sum(-1).to(torch.uint8)
        kept = mask.view(rows, tiles, tile).sum(-1)
        offsets = (kept.flatten().cumsum(0).view_as(kept) - kept).to(torch.int32)
        numbers = torch.arange(rows, device=random.device)
        values, scales = _stored(dense[mask], kept, value_dtype)
        if scales.numel():
            reference.unpack_rows(values, scales, bitmap, offsets, numbers, 0, tiles, dense)
        return cls(dense, mask, bitmap, offsets, values, scales, numbers)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed spectrum."""
        return _nbytes(self.bitmap, self.offsets, self.values, self.scales)


def _pack_rows(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.pack import plan_pack_rows

    (tiles, tile), (dtype, value_dtype) = case.sizes, case.dtypes
    given = _Packed.random(tiles, 1, tile, (dtype, dtype), random)
    # A kept coefficient has a part of two or more, the others are small: rounding decides nothing.
    kept = given.dense + torch.where(given.dense < 0, -2, 2)
    y = torch.where(given.mask[..., None], kept, random.real(tiles, tile, 2, dtype=dtype).tanh() / 4)
    bitmap, offsets = torch.empty_like(given.bitmap), torch.empty_like(given.offsets)
    right, right_scales = _stored(torch.tanh(y[given.mask].double()), given.mask.sum(1, keepdim=True), value_dtype)
    values, scales = torch.empty_like(right), torch.empty_like(right_scales)
    cursor = torch.zeros(1, dtype=torch.int64, device=random.device)
    rank = given.mask.cumsum(1) - 1

    def results() -> tuple[Tensor, ...]:
        # Tiles stand in the order in which programs ran; through the offsets they come in their own.
        return bitmap, cursor, _parts(values[(offsets + rank)[given.mask] % len(values)]), scales

    def run(config: Any) -> Run:
        _spoil(bitmap, offsets, values, scales)
        target = (bitmap, offsets, values, cursor)
        launch = plan_pack_rows(
            y, tile, 1.0, given.rows, 0, *target, "tanh", None, 1, scales=scales, key=None, config=config
        )
        return Run(launch.run, results)

    def expected() -> tuple[Tensor, ...]:
        return given.bitmap, cursor.new_tensor([len(values)]), _parts(right), right_scales

    return Problem(run, expected, _nbytes(y) + _nbytes(bitmap, offsets, values, scales), cursor.zero_)


def _gather_rows(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.pack import plan_gather_rows

    (tiles, tile), dtypes = case.sizes, case.dtypes
    given = _Packed.random(tiles, 1, tile, dtypes, random)
    y = torch.where(given.mask[..., None], given.dense, 1)
    out, scales = torch.empty_like(given.values), torch.empty_like(given.scales)

    def run(config: Any) -> Run:
        _spoil(out, scales)
        launch = plan_gather_rows(y, given.bitmap, given.offsets, given.rows, 0, out, scales, config)
        return Run(launch.run, lambda: (_parts(out), scales))

    return Problem(run, lambda: (_parts(given.values), given.scales), _nbytes(y) + given.nbytes)


def _unpack_rows(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.unpack import plan_unpack_rows

    (tiles, tile), dtypes = case.sizes, case.dtypes
    given = _Packed.random(tiles, 1, tile, dtypes, random)
    out = torch.empty_like(given.dense)

    def run(config: Any) -> Run:
        _spoil(out)
        launch = plan_unpack_rows(
            given.values, given.scales, given.bitmap, given.offsets, given.rows, 0, 1, out, config
        )
        return Run(launch.run, lambda: (out,))

    return Problem(run, lambda: (given.dense,), _nbytes(out) + given.nbytes)


def _unpack_gradient_rows(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.unpack import plan_unpack_gradient_rows

    (tiles, tile), (dtype, value_dtype) = case.sizes, case.dtypes
    given = _Packed.random(tiles, 1, tile, (dtype, value_dtype), random)
    grad = random.real(len(given.values), 2, dtype=dtype)
    scale = torch.full((1,), 2 * float(given.dense.abs().max()), dtype=dtype, device=random.device)
    out = torch.empty_like(given.dense)

    def run(config: Any) -> Run:
        pattern = (given.bitmap, given.offsets, given.rows)
        launch, partial = plan_unpack_gradient_rows(
            grad, given.values, given.scales, *pattern, "tanh", scale, 1, out, config
        )
        assert partial is not None
        _spoil(out, partial)
        return Run(launch.run, lambda: (out, partial.sum(0)))

    def expected() -> tuple[Tensor, ...]:
        kept, terms = activate_backward(grad.double(), given.dense[given.mask].double(), "tanh", scale.double())
        assert terms is not None
        dense, sums = torch.zeros_like(given.dense), torch.zeros_like(given.dense, dtype=torch.float64)
        dense[given.mask], sums[given.mask] = kept.to(dtype), terms
        return dense, sums.sum((0, 2)).to(dtype)

    return Problem(run, expected, _nbytes(out, grad) + given.nbytes)


def _sum_kept(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.kept import plan_sum_kept

    (tiles, tile), dtypes = case.sizes, case.dtypes
    given = _Packed.random(tiles, 1, tile, dtypes, random)
    grad = random.real(len(given.values), 2, dtype=dtypes[0])

    def run(config: Any) -> Run:
        pattern = (given.values, given.scales, given.bitmap, given.offsets)
        launch, partial = plan_sum_kept(*pattern, None, grad, dtypes[0], _CHUNK_BYTES, config)
        _spoil(partial)
        return Run(launch.run, lambda: (partial.sum(0),))

    def expected() -> tuple[Tensor, ...]:
        products = torch.zeros_like(given.dense, dtype=torch.float64)
        products[given.mask] = given.dense[given.mask].double() * grad
        return (products[1:].sum((0, 2)).to(dtypes[0]),)

    return Problem(run, expected, _nbytes(grad) + given.nbytes)


def _combine_kept(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.kept import plan_combine_kept

    (tiles, tile), (dtype, value_dtype) = case.sizes, case.dtypes
    given = _Packed.random(tiles, 1, tile, (dtype, value_dtype), random)
    grad = random.real(len(given.values), 2, dtype=dtype)
    weight, zero = torch.ones(tiles, device=random.device), torch.zeros(tile, device=random.device)
    factor, gain = torch.full_like(zero, 2.0), torch.full_like(zero, 0.5)
    out = torch.empty_like(grad)

    def run(config: Any) -> Run:
        _spoil(out)
        pattern = (given.bitmap, given.offsets, weight)
        launch = plan_combine_kept(given.values, given.scales, grad, *pattern, factor, gain, zero, out, config)
        return Run(launch.run, lambda: (out,))

    def expected() -> tuple[Tensor, ...]:
        of_values = given.dense.double() / 2
        of_values[:1] = 0
        return ((2 * grad.double() + of_values[given.mask]).to(dtype),)

    return Problem(run, expected, 2 * _nbytes(grad) + given.nbytes)


def _grid_of(positions: int, device: torch.device) -> FrequencyGrid:
    """Of maps as square as can be whose half spectra have so many positions."""
    half = next(width for width in range(math.isqrt(max(1, positions // 2)), 0, -1) if positions % width == 0)
    return frequency_grid(positions // half, max(1, 2 * (half - 1)), device)


def _unpack_planes(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.unpack import plan_unpack_planes

    (count, positions, tile), dtypes = case.sizes, case.dtypes
    grid = _grid_of(positions, random.device)
    tiles = -(-count // tile)
    given = _Packed.random(grid.count, tiles, tile, dtypes, random)
    out = given.dense.new_empty(count, grid.height, grid.half_width, 2)

    def run(config: Any) -> Run:
        _spoil(out)
        launch = plan_unpack_planes(
            given.values, given.scales, given.bitmap, given.offsets, grid, 0, tiles, count, None, out, config
        )
        return Run(launch.run, lambda: (out,))

    def expected() -> tuple[Tensor, ...]:
        half = torch.empty_like(out).flatten(1, 2)
        half[:, grid.index] = given.dense[:, :count].transpose(0, 1)
        mirrored = given.dense[grid.mirror_row, :count].transpose(0, 1)
        half[:, grid.mirror_index] = mirrored * mirrored.new_tensor([1, -1])
        return (half.view_as(out),)

    return Problem(run, expected, _nbytes(out) + given.nbytes)


def _rows_of_half(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.planes import plan_rows_of_half

    (padded, positions), (dtype,) = case.sizes, case.dtypes
    grid = _grid_of(positions, random.device)
    half = random.real(padded, grid.height, grid.half_width, 2, dtype=dtype)
    out = half.new_empty(grid.count, padded, 2)

    def run(config: Any) -> Run:
        _spoil(out)
        return Run(plan_rows_of_half(half, grid, None, out, config).run, lambda: (out,))

    return Problem(
        run, lambda: (reference.rows_of_half(torch.view_as_complex(half), grid, padded),), _nbytes(half, out)
    )


def _gather_planes(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.planes import plan_gather_planes

    (count, positions, tile), (dtype,) = case.sizes, case.dtypes
    grid, tiles = _grid_of(positions, random.device), -(-count // tile)
    given = _Packed.random(grid.count, tiles, tile, (dtype, dtype), random)
    half = random.real(tiles * tile, grid.height, grid.half_width, 2, dtype=dtype)
    out = torch.empty_like(given.values)
    rows = reference.rows_of_half(torch.view_as_complex(half), grid, tiles * tile)

    def run(config: Any) -> Run:
        _spoil(out)
        return Run(
            plan_gather_planes(half, given.bitmap, given.offsets, grid, 0, None, out, config).run, lambda: (out,)
        )

    def expected() -> tuple[Tensor, ...]:
        kept = torch.empty_like(out)
        every = torch.arange(grid.count, device=random.device)
        return (reference.gather_rows(rows, given.bitmap, given.offsets, every, 0, kept),)

    return Problem(run, expected, _nbytes(half) + given.nbytes)


def _kernel_spectrum(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.kernel_spectrum import plan_kernel_spectrum

    (frequencies, groups, inputs, outputs, taps), (dtype, out_dtype) = case.sizes, case.dtypes
    weight = random.real(groups * outputs, inputs, 1, taps, dtype=dtype)
    basis = random.real(frequencies, taps, 2, dtype=dtype)
    out = torch.empty(frequencies, groups, 2 * inputs, 2 * outputs, dtype=out_dtype, device=random.device)

    def run(config: Any) -> Run:
        _spoil(out)
        return Run(plan_kernel_spectrum(weight, basis, groups, out, config).run, lambda: (out,))

    def expected() -> tuple[Tensor, ...]:
        return (reference.kernel_spectrum(weight, basis, groups, torch.empty_like(out)),)

    return Problem(run, expected, _nbytes(weight, basis, out))


def _kernel_spectrum_adjoint(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.kernel_spectrum import plan_kernel_spectrum_adjoint

    (frequencies, groups, inputs, outputs, taps), (dtype, out_dtype) = case.sizes, case.dtypes
    grad = random.real(frequencies, groups, 2 * inputs, 2 * outputs, dtype=dtype)
    basis = random.real(frequencies, taps, 2, dtype=out_dtype)
    out = torch.zeros(groups * outputs, inputs, 1, taps, dtype=out_dtype, device=random.device)

    def run(config: Any) -> Run:
        launch, partial = plan_kernel_spectrum_adjoint(grad, basis, groups, out, config)
        if partial is not None:
            _spoil(partial)

        def call() -> None:
            launch.run()
            if partial is not None:
                out.add_(partial.sum(dim=0))

        return Run(call, lambda: (out,))

    def expected() -> tuple[Tensor, ...]:
        return (reference.kernel_spectrum_adjoint(grad, basis, groups, torch.zeros_like(out)),)

    return Problem(run, expected, _nbytes(grad, basis, out), out.zero_)


def _coded(case: Case, random: _Random) -> tuple[block_codec.BlockLayout, block_codec.Plan, Tensor, Tensor]:
    """(layout, plan, records of random bits, maps): rows of none, one and two bits.

    The maps are those of the records: numbers lie within their cells, where rounding decides nothing.
    """
    (blocks, components, frequencies, mix), (dtype,) = case.sizes, case.dtypes
    edge = next(edge for edge in range(math.isqrt(frequencies), 0, -1) if frequencies % edge == 0)
    grid = (4, 4) if blocks % 16 == 0 else (1, 1)
    edges = edge, frequencies // edge
    width = torch.arange(1, components * frequencies + 1, device=random.device) % 3
    bits = int(width.sum())
    shape = (blocks // (grid[0] * grid[1]), components, grid[0] * edges[0], grid[1] * edges[1])
    layout = block_codec.BlockLayout(shape, edges, grid, components // mix, mix, -(-bits // 8), False)
    records = random.bytes(blocks, layout.record)
    records[:, -1] &= (1 << (bits - 8 * (layout.record - 1))) - 1
    one = torch.ones(components, device=random.device)
    basis = None
    if mix > 1:
        basis = torch.linalg.qr(random.real(layout.groups, mix, mix, dtype=torch.float32)).Q
    change = block_codec.Transform(one / 8, one, one, basis, block_codec.dct_matrix(edges, random.device))
    rows = torch.arange(width.shape[0], device=random.device)
    plan = block_codec.Plan(change, rows, width, width.cumsum(0) - width, torch.ones_like(width, dtype=torch.float32))
    maps = torch.empty(shape, dtype=dtype, device=random.device)
    return layout, plan, records, block_codec.decode_blocks(records, layout, plan, maps, _CHUNK_BYTES)


def _decode_blocks(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.block_codec import plan_decode_blocks

    layout, plan, records, maps = _coded(case, random)
    out, levels = torch.empty_like(maps), block_codec.quantiser_levels(random.device)

    def run(config: Any) -> Run:
        _spoil(out)
        return Run(plan_decode_blocks(records, layout, plan, levels, out, config).run, lambda: (out,))

    return Problem(run, lambda: (maps,), _nbytes(records, maps))


def _encode_blocks(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.block_codec import add_shared, plan_encode_blocks

    layout, plan, records, maps = _coded(case, random)
    out, levels = torch.zeros_like(records), block_codec.quantiser_levels(random.device)
    factors = block_codec.compander_factors(random.device)

    def run(config: Any) -> Run:
        launch, ends, shared = plan_encode_blocks(
            maps, layout, plan, levels, factors, block_codec.RATE, None, out, config
        )

        def call() -> None:
            launch.run()
            add_shared(out, ends, shared)

        return Run(call, lambda: (out,))

    return Problem(run, lambda: (records,), _nbytes(records, maps), out.zero_)


def _maps(case: Case, random: _Random) -> Tensor:
    """Maps of one image, channels last: of so many positions and channels."""
    (rows, columns, *_), (dtype,) = case.sizes, case.dtypes
    down = next(edge for edge in range(math.isqrt(rows), 0, -1) if rows % edge == 0)
    return random.real(1, columns, down, rows // down, dtype=dtype).contiguous(memory_format=torch.channels_last)


def _rectify(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.sign_bits import plan_rectify

    (count,), (dtype,) = case.sizes, case.dtypes
    x = random.real(count, dtype=dtype)
    out, outside = torch.empty_like(x), bits.pack(x <= 0, 1)
    written = torch.empty_like(outside)

    def run(config: Any) -> Run:
        _spoil(out, written)
        return Run(plan_rectify(x, math.inf, out, written, config).run, lambda: (out, written))

    return Problem(run, lambda: (x.relu(), outside), _nbytes(x, out, outside))


def _clear_outside(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.sign_bits import plan_clear_outside

    (count,), (dtype,) = case.sizes, case.dtypes
    x = random.real(count, dtype=dtype)
    out, outside = torch.empty_like(x), bits.pack(x <= 0, 1)

    def run(config: Any) -> Run:
        _spoil(out)
        return Run(plan_clear_outside(x, outside, out, config).run, lambda: (out,))

    return Problem(run, lambda: (x.relu(),), _nbytes(x, out, outside))


def _rebuild(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.rebuild import plan_rebuild

    x = _maps(case, random)
    statistics = Statistics(*(random.scale(x.shape[1], torch.float32) for _ in range(4)))
    outside, out = bits.outside(x), torch.empty_like(x)

    def run(config: Any) -> Run:
        _spoil(out)
        return Run(plan_rebuild(x, statistics, None, outside, True, out, config).run, lambda: (out,))

    return Problem(run, lambda: (rebuild(x, statistics, None, outside, True, inplace=False),), _nbytes(x, out, outside))


def _window(case: Case) -> max_pool.Window:
    """With half as many maxima along either axis as there are positions."""
    down, across = case.sizes[2:]
    return max_pool.Window((down, across), (2, 2), ((down - 1) // 2, (across - 1) // 2), (1, 1), False)


def _pool_maxima(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.max_pool import plan_pool_maxima

    out, window = _maps(case, random), _window(case)
    shape = (*out.shape[:2], 2 * out.shape[2], 2 * out.shape[3])
    x = random.real(*shape, dtype=out.dtype).contiguous(memory_format=torch.channels_last)
    codes = torch.empty(out.numel() * window.bits // 8, dtype=torch.uint8, device=random.device)

    def run(config: Any) -> Run:
        _spoil(out, codes)
        return Run(plan_pool_maxima(x, window, True, out, codes, False, config).run, lambda: (out, codes))

    return Problem(run, lambda: max_pool.pool_maxima(x, window), _nbytes(x, out, codes))


def _spread_maxima(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.max_pool import plan_spread_maxima

    quarter, window = replace(case, sizes=(case.sizes[0] // 4, *case.sizes[1:])), _window(case)
    grad = _maps(quarter, random)
    shape = torch.Size((*grad.shape[:2], 2 * grad.shape[2], 2 * grad.shape[3]))
    out = grad.new_empty(shape).contiguous(memory_format=torch.channels_last)
    x = random.real(*shape, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    codes = max_pool.pool_maxima(x, window)[1]

    def run(config: Any) -> Run:
        _spoil(out)
        return Run(plan_spread_maxima(grad, window, True, codes, out, config).run, lambda: (out,))

    return Problem(run, lambda: (max_pool.spread_maxima(grad, window, codes, shape, True),), _nbytes(grad, codes, out))


# Results down and across a plane.
_PLANE_EDGE = 16


def _side_by_side(case: Case) -> max_pool.Window:
    kernel = (case.sizes[1], case.sizes[2])
    return max_pool.Window(kernel, kernel, (0, 0), (1, 1), False)


def _pooled_planes(
    planes: int, case: Case, random: _Random
) -> tuple[Tensor, across.Windows, tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """Maps, windows side by side, factors and shifts of planes, and what batch norm, pooling and ReLU make of these.

    All are whole numbers, so that no rounding decides on a bit.
    """
    (_, *kernel), (dtype,), window = case.sizes, case.dtypes, _side_by_side(case)
    maps = random.real(planes, *(_PLANE_EDGE * n for n in kernel), dtype=dtype).mul_(16).round_()
    gain, shift = (random.real(planes, dtype=dtype).mul_(4).round_() for _ in range(2))
    y, codes = max_pool.pool_maxima(torch.addcmul(shift[:, None, None], maps, gain[:, None, None])[:, None], window)
    signs = bits.pack((y <= 0).logical_not_().view(-1), 1)
    windows = across.Windows(kernel, kernel, window.bits, 32)
    return maps, windows, (gain, shift), (y[:, 0].clamp_min_(0), None if kernel == [1, 1] else codes, signs)


def _pool_planes(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.pool_planes import plan_pool_planes

    maps, windows, affine, made = _pooled_planes(max(1, case.sizes[0] // _PLANE_EDGE**2), case, random)
    out, codes, signs = (None if t is None else torch.empty_like(t) for t in made)
    assert out is not None
    written = [t for t in (out, codes, signs) if t is not None]

    def run(config: Any) -> Run:
        _spoil(*written)
        launch = plan_pool_planes(maps, windows, out, codes, signs, affine, True, config)
        return Run(launch.run, lambda: tuple(written))

    return Problem(run, lambda: tuple(t for t in made if t is not None), _nbytes(maps, *written))


def _spread_planes(case: Case, random: _Random) -> Problem:
    from spectriton_kernels.pool_planes import plan_spread_planes

    of_plane = _PLANE_EDGE**2 * case.sizes[1] * case.sizes[2]
    maps, windows, _, (y, codes, signs) = _pooled_planes(max(1, case.sizes[0] // of_plane), case, random)
    assert y is not None and signs is not None
    grad, out = random.real(*y.shape, dtype=y.dtype), torch.empty_like(maps)

    def run(config: Any) -> Run:
        _spoil(out)
        return Run(plan_spread_planes(grad, windows, codes, signs, out, config).run, lambda: (out,))

    def expected() -> tuple[Tensor, ...]:
        passed = grad * bits.unpack(signs, 1, grad.numel()).view_as(grad)
        if codes is None:
            return (passed,)
        window = _side_by_side(case)
        return (max_pool.spread_maxima(passed[:, None], window, codes, maps[:, None].shape, False)[:, 0],)

    read = [t for t in (grad, codes, signs) if t is not None]
    return Problem(run, expected, _nbytes(out, *read))


_PROBLEMS: dict[str, Callable[[Case, _Random], Problem]] = {
    "complex_product": _complex_product,
    "complex_product_broadcast": _complex_product_broadcast,
    "spectral_activation": _spectral_activation,
    "spectral_activation_backward": _spectral_activation_backward,
    "spectral_activation_scale_backward": _spectral_activation_scale_backward,
    "pack_rows": _pack_rows,
    "gather_rows": _gather_rows,
    "unpack_rows": _unpack_rows,
    "unpack_gradient_rows": _unpack_gradient_rows,
    "sum_kept": _sum_kept,
    "combine_kept": _combine_kept,
    "unpack_planes": _unpack_planes,
    "rows_of_half": _rows_of_half,
    "gather_planes": _gather_planes,
    "kernel_spectrum": _kernel_spectrum,
    "kernel_spectrum_adjoint": _kernel_spectrum_adjoint,
    "decode_blocks": _decode_blocks,
    "encode_blocks": _encode_blocks,
    "rectify": _rectify,
    "clear_outside": _clear_outside,
    "rebuild": _rebuild,
    "pool_maxima": _pool_maxima,
    "spread_maxima": _spread_maxima,
    "pool_planes": _pool_planes,
    "spread_planes": _spread_planes,
}


def problem(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Random inputs for a case."""
    return _PROBLEMS[case.kernel](case, _Random(device, seed))


# -- tuning ----------------------------------------------------------------------------------------------------------

#: Seconds of a configuration, from its launches on several sets of inputs.
Timer = Callable[[Sequence[tuple[Problem, Run]], torch.device], float]


def median_seconds(
    sets: Sequence[tuple[Problem, Run]], device: torch.device, fewest: int = 10, budget: float = 0.03
) -> float:
    """The median of so many laps, and of more (up to 100) while they took less than ``budget`` seconds."""
    clock = Stopwatch(device)
    laps: list[float] = []
    while len(laps) < fewest + 2 or (clock.seconds < budget and len(laps) < 100):
        given, run = sets[len(laps) % len(sets)]
        given.prepare()
        if len(sets) == MOST_SETS:
            evict(device)
        laps.append(clock.lap(run.call))
    return statistics.median(laps[2:])


class WrongResult(Exception):
    """A configuration computes something else than it should."""


def check(case: Case, run: Run, expected: tuple[Tensor, ...]) -> None:
    """Compares what a launch wrote with what is right.

    Raises:
        WrongResult: they differ by more than rounding.
    """
    tolerance = max(_TOLERANCES[dtype] for dtype in case.dtypes)
    for number, (result, right) in enumerate(zip(run.results(), expected, strict=True)):
        if result.shape != right.shape:
            raise WrongResult(f"result {number} has shape {tuple(result.shape)}, not {tuple(right.shape)}")
        if not right.numel():
            continue
        wide = torch.complex128 if result.is_complex() else torch.float64
        wanted = right.to(wide)
        error = float((result.to(wide) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
        if not error <= tolerance:
            raise WrongResult(f"result {number} is wrong by {error:.2g} of its largest number")


def tune_case(case: Case, device: torch.device, timer: Timer = median_seconds) -> Result:
    """Checks and times every configuration for a case.

    Raises:
        RuntimeError: the heuristic does not work.
    """
    from spectriton_kernels.configs import TUNABLES

    tunable = TUNABLES[case.kernel]
    heuristic = tunable.heuristic(case.dtypes, case.sizes)
    first = problem(case, device)
    expected = first.expected()
    problems = [first, *(problem(case, device, seed) for seed in range(1, input_sets(first.moved, device)))]
    seconds: dict[Any, float] = {}
    failures: dict[Any, str] = {}
    for config in tunable.space:
        try:
            runs = [given.run(config) for given in problems]
            first.prepare()
            runs[0].call()
            check(case, runs[0], expected)
            seconds[config] = timer(list(zip(problems, runs, strict=True)), device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever compiling, launching or checking it raises
            failures[config] = f"{type(error).__name__}: {error}".split("\n")[0]
    if heuristic in failures:
        raise RuntimeError(f"tune: {case} does not work as it is ({failures[heuristic]}); please report this")
    best = min(seconds, key=lambda config: seconds[config])
    if seconds[heuristic] < WORTH * seconds[best]:
        best = heuristic
    return Result(case, heuristic, best, seconds, failures, first.moved, copy_seconds(first.moved, device))


def tune(cases: Sequence[Case], device: torch.device, timer: Timer = median_seconds) -> Iterator[Result]:
    """Tunes one case after the other; warns of those that the memory does not suffice for."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for case in cases:
            try:
                yield tune_case(case, device, timer)
            except torch.OutOfMemoryError:
                warnings.warn(f"tune: {case} is left out: the GPU has too little memory for it", stacklevel=2)


# -- cases -----------------------------------------------------------------------------------------------------------

# (batch, channels, size of the maps, size of the kernel): VGG-16 at 32 and 224 pixels, and a large kernel.
_LAYERS = (
    (128, 64, 32, 3),
    (128, 128, 16, 3),
    (128, 256, 8, 3),
    (128, 512, 4, 3),
    (32, 64, 224, 3),
    (64, 256, 56, 3),
    (128, 64, 32, 7),
)
_CHUNK_BYTES = 32 << 20


def default_cases() -> list[Case]:
    """Of layers that networks have, in float32, values of 32, 16 and 8 bits."""
    return unique(case for layer in _LAYERS for case in layer_cases(*layer))


def layer_cases(batch: int, channels: int, size: int, kernel: int) -> Iterator[Case]:
    """The kernels of a block, forward and backward, and the elementwise ones on all of its maps."""
    single, half = torch.float32, torch.float16
    sizes = layout((batch, channels, size, size))
    positions = size * (size // 2 + 1)
    reals = 2 * batch * channels * positions
    rows = max(1, min(sizes.frequencies, _CHUNK_BYTES // (8 * sizes.padded_row)))
    yield Case("complex_product", (single,), (reals,))
    yield Case("complex_product_broadcast", (single,), (batch * channels, positions, 1, 0))
    yield Case("spectral_activation", (single,), (reals, 0))
    yield Case("spectral_activation", (single,), (reals, 2 * positions))
    yield Case("spectral_activation_backward", (single,), (2 * rows * sizes.row,))
    yield Case("spectral_activation_scale_backward", (single,), (rows * batch, channels, 2))
    for values in (single, half, torch.int8):
        tiles = (rows * sizes.tiles, sizes.tile)
        planes = max(sizes.tile, min(sizes.row, _CHUNK_BYTES // (8 * positions)))
        yield Case("pack_rows", (single, values), tiles)
        yield Case("unpack_rows", (single, values), tiles)
        yield Case("unpack_gradient_rows", (single, values), tiles)
        yield Case("sum_kept", (single, values), (sizes.frequencies * sizes.tiles, sizes.tile))
        yield Case("combine_kept", (single, values), (sizes.frequencies * sizes.tiles, sizes.tile))
        yield Case("unpack_planes", (single, values), (planes, positions, sizes.tile))
    yield Case("rows_of_half", (single,), (planes, positions))
    yield Case("gather_planes", (single,), (planes, positions, sizes.tile))
    for values in (single, torch.int8):
        yield Case("gather_rows", (single, values), tiles)
    for name in ("kernel_spectrum", "kernel_spectrum_adjoint"):
        weights = max(1, min(sizes.frequencies, _CHUNK_BYTES // (16 * channels * channels)))
        yield Case(name, (single, single), (weights, 1, channels, channels, kernel * kernel))
    coded = block_codec.block_layout((batch, channels, size, size), 1.0, 64)
    for name, dtype in itertools.product(("decode_blocks", "encode_blocks"), (single, torch.bfloat16)):
        yield Case(name, (dtype,), (coded.blocks, coded.components, coded.frequencies, coded.mix))
    # Those of autocast, channels last.
    brain, positions = (torch.bfloat16,), batch * size * size
    yield Case("rectify", brain, (positions * channels,))
    yield Case("clear_outside", brain, (positions * channels,))
    yield Case("rebuild", brain, (positions, channels))
    for window in (2, 3):
        yield Case("pool_maxima", brain, (positions // 4, channels, window, window))
        yield Case("spread_maxima", brain, (positions, channels, window, window))
    of_maps = planes * size * size
    for window in (1, 2):
        yield Case("pool_planes", (single,), (of_maps // window**2, window, window))
        yield Case("spread_planes", (single,), (of_maps, window, window))


def unique(cases: Iterable[Case]) -> list[Case]:
    """One case of each key, the largest, in the order of the kernels."""
    from spectriton_kernels.configs import TUNABLES

    largest: dict[tuning.Key, Case] = {}
    for case in cases:
        key = tuning.key_of(case.kernel, case.dtypes, case.sizes)
        if key not in largest or math.prod(case.sizes) > math.prod(largest[key].sizes):
            largest[key] = case
    order = list(TUNABLES)
    return sorted(largest.values(), key=lambda case: (order.index(case.kernel), str(case.dtypes), case.sizes))


def recorded_cases(step: Callable[[], Any], device: torch.device) -> list[Case]:
    """The cases of every kernel that ``step`` launches.

    Raises:
        ValueError: it launches none.
    """
    from spectriton_kernels.configs import set_lookup

    _backend.backend(device)  # it looks tuned configurations up as soon as it is there
    found: list[Case] = []
    set_lookup(lambda device, kernel, dtypes, sizes: found.append(Case(kernel, dtypes, sizes)))
    try:
        step()
    finally:
        tuning.install()
    # Of nothing there is nothing to tune.
    found = [case for case in found if case.sizes[0]]
    if not found:
        fail("tune", "shapes", "no launch of a kernel", "a GPU and the Triton backend", "unset SPECTRITON_BACKEND")
    return unique(found)


def model_cases(name: str, batch: int, image_size: int, in_channels: int, device: torch.device) -> list[Case]:
    """The cases of a training step of the spectral network ``name`` of :mod:`spectriton.models`.

    On a CPU the step runs in Triton's interpreter, slowly, unless triton was imported without it; its chunks are those
    of a CPU's workspace.

    Raises:
        TypeError, ValueError: no such network, or a size it cannot take.
    """
    from spectriton import models

    if batch < 1:
        fail("tune", "--batch-size", batch, "a positive int", "pass the batch size you train with")
    network = models.build(name, "spectral", in_channels=in_channels, image_size=image_size).to(device)
    images = torch.randn(batch, in_channels, image_size, image_size, device=device)
    with contextlib.nullcontext() if device.type == "cuda" else _interpreter():
        return recorded_cases(lambda: network(images).sum().backward(), device)


@contextlib.contextmanager
def _interpreter() -> Iterator[None]:
    """The kernels on a CPU."""
    settings = {"SPECTRITON_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def chosen_cases(cases: Sequence[Case], kernels: Sequence[str]) -> list[Case]:
    """Those of some kernels; all for none.

    Raises:
        ValueError: no such kernel.
    """
    from spectriton_kernels.configs import TUNABLES

    for kernel in kernels:
        check_choice("tune", "--kernel", kernel, TUNABLES)
    return [case for case in cases if not kernels or case.kernel in kernels]


# -- the command -----------------------------------------------------------------------------------------------------


def check_device(device: torch.device) -> None:
    """Refuses to tune where timings would say nothing.

    Raises:
        ValueError: the device is no GPU.
    """
    if device.type != "cuda":
        fix = "run this on the machine you train on, or give --dry-run to see what would be tuned"
        fail("tune", "--device", f"{device.type!r}", "a GPU, which torch does not find here", fix)


def run(
    cases: Sequence[Case], device: torch.device, gpu: str, timer: Timer = median_seconds, stream: TextIO | None = None
) -> Path | None:
    """Tunes with a progress bar, prints before and after, and adds what was found to the user's file.

    When interrupted, what was found until then is kept.

    Args:
        cases: what is tuned.
        device: where.
        gpu: whom the file is for.
        timer: what is asked for times.
        stream: where the table goes; standard output where left out.

    Returns:
        The file, None where there were no results.

    Raises:
        ImportError: rich is not installed.
        OSError: the file cannot be written.
    """
    rich = environment.require("rich.progress")
    console = environment.require("rich.console").Console
    bar = rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
    )
    results: list[Result] = []
    try:
        with bar:
            task = bar.add_task("", total=len(cases))
            for result in tune(cases, device, timer):
                results.append(result)
                bar.update(task, completed=len(results), description=str(result.case))
    finally:
        path = tuning.save(gpu, [result.entry() for result in results]) if results else None
        tuning.install()
    header, *body = table(results)
    shown = environment.require("rich.table").Table()
    for place, title in enumerate(header):
        shown.add_column(title, justify="right" if 2 < place < 8 else "left", no_wrap=True)
    for row in body:
        shown.add_row(*row)
    # A log gets whole lines.
    file = stream or sys.stdout
    console(file=file, width=None if file.isatty() else 200).print(shown)
    for result in results:
        for config, reason in result.failures.items():
            print(f"{result.case}: {describe(config)} was left out ({reason})", file=sys.stderr)
    return path


def describe(config: Any) -> str:
    """A configuration as text."""
    return ", ".join(f"{name} {value}" for name, value in asdict(config).items())


def table(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Before and after as text, the header first."""

    def rates(result: Result, config: Any) -> tuple[str, str]:
        return f"{result.rate(config) / 1e9:.0f}", f"{100 * result.share(config):.0f} %"

    head = ("kernel", "dtypes", "sizes", "before GB/s", "of copy", "after GB/s", "of copy", "speed-up", "configuration")
    body = [
        (
            *result.case.texts,
            *rates(result, result.heuristic),
            *rates(result, result.best),
            f"{result.speedup:.2f}",
            "the heuristic's" if result.best == result.heuristic else describe(result.best),
        )
        for result in results
    ]
    return [head, *body]
