"""Block transform coding of feature maps: mix channels, DCT of small blocks, bits where the energy is.

Maps are cut into blocks of 4 to 8 positions an edge. Channels of a block are rotated into the principal components of
their group, and each component is transformed by an orthonormal DCT-II. What results are *rows*: one number for each
(component, frequency) and block. Rows differ in variance by orders of magnitude, so each gets its own number of bits
(reverse water-filling), none for most of them. All numbers of a block stand in one record of fixed length, which is
known from the shape of the maps alone; a block can be read and written without looking at another.

What is stored::

    records   (N, L) uint8         one record a block; fields in the order of the rows, lowest bit first
    scales    (2 C + 1,) float32   mean of each channel, its deviation, and the water level as log2 of a variance
    basis     (G, g, g) int8       principal components of each group of g channels, times 127
    spectrum  (rows / 2,) uint8    the class of each row, four bits each; or
              (G g + M,) int8      log2 variance of each component and of each frequency, where rows are too many

The class of a row stands for an interval of its variance above the water level, and so for the number of its bits and
for the scale of its quantiser (:data:`CLASS_EDGES`).

Quantiser
---------
Numbers of a row, over its deviation, are taken as Laplacian with unit variance. ``b`` bits distinguish
``2^(b-1)`` magnitudes: ``floor(2^(b-1) m_b (1 - exp(-sqrt(2) |x| / 3)))``, the compander of Panter and Dite (1951),
whose last cell is open; ``m_b`` (:data:`COMPANDER`) minimises the mean squared error for that density. This comes
within 0.3 % of the Lloyd-Max quantiser, and needs no table to encode. Each cell is read back as the mean of the density
within it, so errors are uncorrelated with what is read back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from spectriton.reference.rounding import copy_in_range, uniform

#: Largest number of bits of a field.
MAX_WIDTH = 8

#: ``m_b`` of the quantiser with ``b = 1 ..`` bits.
COMPANDER = (1.0, 1.21333, 1.11255, 1.05813, 1.02948, 1.01482, 1.00751, 1.00381)

#: Classes of rows: lower edges of their intervals, log2 of the variance over the water level; class 0 is below the
#: first. Bit b pays where the error that it saves, variance times (D[b - 1] - D[b]) of the quantiser's mean squared
#: errors D, is that of the first bit at the water level; the intervals between are halved, but for the highest.
CLASS_EDGES = (0.0, 0.63, 1.33, 2.04, 2.86, 3.68, 4.57, 5.47, 6.42, 7.36, 8.33, 9.31, 11.29, 13.3, 15.5)
#: Bits of each class, from class 0.
CLASS_WIDTHS = (0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8, 8, 8)
#: The variance that each class stands for, log2 over the water level.
CLASS_VARIANCE = (0.0, 0.32, 0.98, 1.69, 2.45, 3.27, 4.13, 5.02, 5.95, 6.89, 7.85, 8.82, 10.3, 12.3, 14.4, 16.6)
#: A variance this far (log2) above the water level is still within the last class.
HEADROOM = 17.0
#: Stands for the logarithm of no variance at all.
NOTHING = -1000.0

#: Rounds of orthogonal iteration. More leave the coding gain as it is: components of like variance need no telling
#: apart.
ROUNDS = 3
# At most this share of the budget goes to the basis, and to the classes of rows: where there are few blocks to a
# channel, a smaller group or a coarser spectrum leaves more for the values.
_BASIS_SHARE = 1 / 3
_SPECTRUM_SHARE = 1 / 4
# At least so many blocks tell the variances and the components, as far as there are so many.
_SAMPLE_BLOCKS = 128


class BlockLayout(NamedTuple):
    """Sizes of the stored form; they follow from the shape of the maps and the settings of the codec alone.

    Attributes:
        shape: ``(B, C, H, W)`` of the maps.
        edges: height and width of a block.
        grid: blocks down and across a map.
        groups: groups of channels, ``G``.
        mix: channels in a group, ``g``; the last group may have fewer.
        record: bytes of a record, ``L``.
        separable: whether variances are stored by component and by frequency instead of by row.
    """

    shape: tuple[int, int, int, int]
    edges: tuple[int, int]
    grid: tuple[int, int]
    groups: int
    mix: int
    record: int
    separable: bool

    @property
    def blocks(self) -> int:
        """Blocks of all images, ``N``."""
        return self.shape[0] * self.grid[0] * self.grid[1]

    @property
    def frequencies(self) -> int:
        """Frequencies of a block, ``M``."""
        return self.edges[0] * self.edges[1]

    @property
    def components(self) -> int:
        """Channels, those that fill up the last group included: ``G * g``."""
        return self.groups * self.mix

    @property
    def rows(self) -> int:
        """Numbers of a block."""
        return self.components * self.frequencies


def block_edge(size: int) -> int:
    """Edge of the blocks along an axis of ``size`` positions: from 4 to 8, wasting least; ``size`` where it is less."""
    return size if size < 4 else min(range(8, 3, -1), key=lambda edge: -size % edge)


@lru_cache(maxsize=512)
def block_layout(shape: tuple[int, int, int, int], rate: float, mix: int) -> BlockLayout:
    """The layout for maps of ``shape`` with ``rate`` bits per value, everything included.

    A record has one byte at least, so maps of a few values a block take more.

    Args:
        shape: ``(B, C, H, W)``, none of them 0.
        rate: bits per value of the maps.
        mix: at most so many channels in a group; fewer where their basis would take too much of the budget.
    """
    batch, channels, height, width = shape
    edges = block_edge(height), block_edge(width)
    grid = -(-height // edges[0]), -(-width // edges[1])
    budget = int(batch * channels * height * width * rate / 8)
    mix = min(mix, channels)
    while mix > 1 and channels * mix > budget * _BASIS_SHARE:
        mix //= 2
    groups = -(-channels // mix)
    mix = -(-channels // groups)
    rows = groups * mix * edges[0] * edges[1]
    separable = rows / 2 > budget * _SPECTRUM_SHARE
    beside = 4 * (2 * channels + 1) + (groups * mix * mix if mix > 1 else 0)
    beside += groups * mix + edges[0] * edges[1] if separable else -(-rows // 2)
    blocks = batch * grid[0] * grid[1]
    record = min(-(-rows * MAX_WIDTH // 8), max(1, (budget - beside) // blocks))
    return BlockLayout(shape, edges, grid, groups, mix, record, separable)


class Region(NamedTuple):
    """Images ``b0:b1`` and rows of blocks ``r0:r1`` of them: all, unless it is one image. Holds blocks ``n0:n1``."""

    b0: int
    b1: int
    r0: int
    r1: int
    n0: int
    n1: int


def regions(layout: BlockLayout, workspace: int) -> Iterator[Region]:
    """Parts of the maps whose temporaries fit the workspace in bytes."""
    down, across = layout.grid
    # Four arrays of four bytes a value at the most.
    row_bytes = 16 * layout.rows * across
    images = workspace // (row_bytes * down)
    if images:
        for b0 in range(0, layout.shape[0], images):
            b1 = min(b0 + images, layout.shape[0])
            yield Region(b0, b1, 0, down, b0 * down * across, b1 * down * across)
        return
    step = max(1, workspace // row_bytes)
    for b in range(layout.shape[0]):
        for r0 in range(0, down, step):
            r1 = min(r0 + step, down)
            yield Region(b, b + 1, r0, r1, (b * down + r0) * across, (b * down + r1) * across)


def maps_of(x: Tensor, layout: BlockLayout, region: Region) -> Tensor:
    """The part of ``x`` ``(B, C, H, W)`` in a region, a view."""
    edge = layout.edges[0]
    return x[region.b0 : region.b1, :, region.r0 * edge : region.r1 * edge]


# -- statistics -----------------------------------------------------------------------------------------------------


class Transform(NamedTuple):
    """Between maps and coefficients.

    Attributes:
        mean, inverse, scale: ``(C,)`` float32 of each channel; ``inverse`` is ``1 / scale``, 0 for 0.
        basis: ``(G, g, k)`` float32 orthonormal components of each group, the first ``k``; None for ``g = 1``.
        dct: ``(M, M)`` float32.
    """

    mean: Tensor
    inverse: Tensor
    scale: Tensor
    basis: Tensor | None
    dct: Tensor


class Plan(NamedTuple):
    """How blocks are coded: what is stored beside the records, made ready. Both sides make it from the stored form.

    Attributes:
        change: the transform, to the components that have bits.
        rows: ``(R,)`` int64, rows that are coded, counted by component of the transform, then by kept frequency.
        width, start: ``(R,)`` int64, bits of their fields and where they begin in a record.
        deviation: ``(R,)`` float32 that their quantisers take them to have.
        narrow: how many of the first rows have one bit, and how many have two, where the host knows.
        kept: ``(F,)`` int64 frequencies at which some component has bits; None for all.
        encoding, decoding: what the passes over the blocks take of all this, where a backend has made it ready; it does
            not depend on the means. What they do not take besides may be empty then.
    """

    change: Transform
    rows: Tensor
    width: Tensor
    start: Tensor
    deviation: Tensor
    narrow: tuple[int, int] = (0, 0)
    kept: Tensor | None = None
    encoding: Any = None
    decoding: Any = None


def channel_means(x: Tensor, layout: BlockLayout) -> Tensor:
    """The mean of each channel ``(C,)``, NaN throughout groups with values that are not finite."""
    mean = x.mean((0, 2, 3), dtype=torch.float32)
    return _without_groups(mean, mean, layout)


def _without_groups(mean: Tensor, finite: Tensor, layout: BlockLayout) -> Tensor:
    """``mean`` of each channel, NaN throughout groups in which ``finite`` is not."""
    channels, missing = mean.numel(), layout.components - mean.numel()
    mean, finite = ((functional.pad(t, (0, missing)) if missing else t).view(layout.groups, -1) for t in (mean, finite))
    return torch.add(mean, finite.sum(1, keepdim=True), alpha=0).view(-1)[:channels]


def sample_of(x: Tensor, layout: BlockLayout) -> tuple[Tensor, BlockLayout]:
    """The images that statistics are taken of, and their layout, with the records of all."""
    sample = x[:: max(1, layout.blocks // _SAMPLE_BLOCKS)]
    return sample, layout._replace(shape=(sample.shape[0], *layout.shape[1:]))


def fit(x: Tensor, layout: BlockLayout, workspace: int, mean: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, basis and spectrum to store for maps ``x``; see the head of this file. The device is never waited for.

    Means are those of all images, what else is needed comes from some of them, evenly spread.

    Args:
        x: the maps.
        layout: theirs.
        workspace: bound on temporaries in bytes.
        mean: what a backend gives as :func:`channel_means`; by default that.
    """
    channels, groups, mix = x.shape[1], layout.groups, layout.mix
    if mean is None:
        mean = channel_means(x, layout)
    sample, sampled = sample_of(x, layout)
    parts = [maps_of(sample, sampled, part) for part in regions(sampled, workspace)]
    count = sample.numel() // channels
    # Over the mean modulus, squares neither overflow nor vanish.
    size = torch.zeros_like(mean)
    for maps in parts:
        size += (maps - mean[:, None, None]).abs_().sum((0, 2, 3), dtype=torch.float32) / count
    # What rounding leaves of a constant is none.
    size = torch.where(size <= 1e-6 * mean.abs(), 0, size)
    change = Transform(mean, _inverse(size), size, None, dct_matrix(layout.edges, x.device))
    covariance = torch.zeros(groups, mix, mix, device=x.device)
    for maps in parts:
        grouped = _standardised(maps, change, layout).view(groups, mix, -1)
        covariance += torch.matmul(grouped, grouped.mT)
    covariance /= layout.frequencies * sampled.blocks
    deviation = covariance.diagonal(dim1=1, dim2=2).sqrt()
    inverse = _inverse(deviation)
    scale = size * deviation.reshape(-1)[:channels]
    # One value that is not a number leaves nothing of its group.
    mean = _without_groups(mean, mean + scale, layout)
    change = Transform(mean, _inverse(scale), scale, None, change.dct)
    basis = torch.empty(0, dtype=torch.int8, device=x.device)
    if mix > 1:
        basis = _components(covariance * inverse[:, :, None] * inverse[:, None])
        change = change._replace(basis=_orthonormal(basis))
    spread = torch.zeros(layout.frequencies, layout.components, device=x.device)
    for maps in parts:
        spread += torch.linalg.vector_norm(transform(maps, layout, change), dim=-1).square_()
    spread = spread.T / sampled.blocks

    logs = torch.log2(spread).nan_to_num(NOTHING, NOTHING, NOTHING)
    if layout.separable:
        by_component = torch.log2(spread.mean(1)).nan_to_num(NOTHING, NOTHING, NOTHING).round().clamp(-100, 27)
        by_frequency = torch.log2(spread.mean(0) / spread.mean()).nan_to_num(0, 0, -100).round().clamp(-100, 27)
        spectrum = torch.cat([by_component, by_frequency]).to(torch.int8)
        logs = _separable_logs(spectrum, layout)
    level = _water_level(logs.flatten(), 8 * layout.record)
    if not layout.separable:
        classes = _fitting(_classes(logs.flatten(), level), layout)
        spectrum = functional.pad(classes, (0, classes.numel() % 2)).view(-1, 2)
        spectrum = spectrum[:, 0] | (spectrum[:, 1] << 4)
    return torch.cat([mean, scale, level[None]]), basis, spectrum


def _inverse(scale: Tensor) -> Tensor:
    """``1 / scale``; 0 for nothing."""
    return torch.where(scale == 0, 0, 1 / scale)


def _standardised(maps: Tensor, change: Transform, layout: BlockLayout) -> Tensor:
    """``(C', n, M)`` blocks without mean and of unit deviation, float32: channels filled up to whole groups."""
    _, channels, height, width = maps.shape
    down, across = layout.edges
    bottom, right = -height % down, -width % across
    if bottom or right:
        # Edges are repeated to whole blocks.
        maps = functional.pad(maps, (0, right, 0, bottom), mode="replicate")
    blocks = maps.unflatten(3, (-1, across)).unflatten(2, (-1, down)).permute(1, 0, 2, 4, 3, 5)
    out = maps.new_empty(layout.components, *blocks.shape[1:], dtype=torch.float32)
    out[channels:] = 0
    own = out[:channels].copy_(blocks).view(channels, -1)
    own.sub_(change.mean[:, None]).mul_(change.inverse[:, None])
    return out.view(layout.components, -1, layout.frequencies)


def _components(correlation: Tensor) -> Tensor:
    """Principal components in the columns, int8: orthogonal iteration from the identity."""
    unit = torch.eye(correlation.shape[1], device=correlation.device)
    # Keeps what has no variance from spoiling the rest.
    correlation = correlation + 1e-6 * unit
    basis = unit.expand_as(correlation)
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(correlation @ basis).Q
    return (127 * basis).round_().to(torch.int8)


def _orthonormal(basis: Tensor) -> Tensor:
    """Stored components as an orthonormal float32 basis: two rounds of Newton and Schulz take off what rounding did."""
    columns = basis.to(torch.float32) / 127
    unit = torch.eye(columns.shape[1], device=columns.device)
    for _ in range(2):
        columns = columns @ (1.5 * unit - 0.5 * columns.mT @ columns)
    return columns


def _separable_logs(spectrum: Tensor, layout: BlockLayout) -> Tensor:
    """``(G * g, M)`` log2 variances from those of components and frequencies."""
    logs = spectrum.to(torch.float32)
    return logs[: layout.components, None] + logs[layout.components :]


def _water_level(logs: Tensor, bits: int) -> Tensor:
    """The lowest level (log2 of a variance) at which the fields of all rows have at most so many bits.

    Bit ``b`` of a row is paid where its log2 variance is above the level by the edge of that bit: the level is the
    first that is not paid.
    """
    first = tuple(CLASS_EDGES[CLASS_WIDTHS.index(width) - 1] for width in range(1, MAX_WIDTH + 1))
    levels = (logs[:, None] - _table(first, logs.device)).flatten()
    floor = logs.amax() - HEADROOM
    if bits < levels.numel():
        floor = torch.maximum(floor, levels.kthvalue(levels.numel() - bits).values)
    return floor.clamp_min(NOTHING / 2)


def _classes(logs: Tensor, level: Tensor) -> Tensor:
    """The class of each row, uint8."""
    return torch.bucketize(logs - level, _table(CLASS_EDGES, logs.device)).to(torch.uint8)


def _fitting(classes: Tensor, layout: BlockLayout) -> Tensor:
    """Class 0 for rows whose fields would not fit the record: rounding of the level may let one slip in."""
    width = _lookup(CLASS_WIDTHS, classes)
    return torch.where(width.cumsum(0) <= 8 * layout.record, classes, 0)


@lru_cache(maxsize=64)
def _table(values: tuple[int, ...] | tuple[float, ...], device: torch.device) -> Tensor:
    """Constants on a device; sending them each time would make the host wait."""
    return torch.tensor(values, device=device)


def _lookup(table: tuple[int, ...] | tuple[float, ...], index: Tensor) -> Tensor:
    return _table(table, index.device)[index.long()]


def stored_transform(stored: tuple[Tensor, Tensor, Tensor], layout: BlockLayout) -> Transform:
    """The transform to all components, from the scales and the basis that are stored."""
    scales, basis, _ = stored
    mean, scale = scales[: layout.shape[1]], scales[layout.shape[1] : 2 * layout.shape[1]]
    columns = _orthonormal(basis) if basis.numel() else None
    return Transform(mean, _inverse(scale), scale, columns, dct_matrix(layout.edges, scales.device))


def make_plan(stored: tuple[Tensor, Tensor, Tensor], layout: BlockLayout, compact: bool) -> Plan:
    """The :class:`Plan` from the scales, basis and spectrum that are stored.

    ``compact`` leaves out the rows that have no bits, and the last components where they have none, and puts rows of
    few bits first: less to compute, but the host has to know how many.
    """
    scales, _, spectrum = stored
    level = scales[-1]
    if layout.separable:
        classes = _fitting(_classes(_separable_logs(spectrum, layout).flatten(), level), layout)
    else:
        classes = torch.stack([spectrum & 15, spectrum >> 4], 1).flatten()[: layout.rows]
    change = stored_transform(stored, layout)
    deviation = torch.exp2((_lookup(CLASS_VARIANCE, classes) + level) / 2)
    if compact:
        return _compact_plan(change, classes.numpy(), deviation, layout)
    width = _lookup(CLASS_WIDTHS, classes)
    rows = torch.arange(layout.rows, device=scales.device)
    return Plan(change, rows, width, width.cumsum(0) - width, deviation)


def _compact_plan(change: Transform, classes: NDArray[np.uint8], deviation: Tensor, layout: BlockLayout) -> Plan:
    """Of small arrays, NumPy makes it in a fraction of the time."""
    widths = np.array(CLASS_WIDTHS, dtype=np.uint8)[classes]
    none, *narrow = np.bincount(widths, minlength=3)[:3].tolist()
    chosen = np.argsort(widths, kind="stable")[min(none, layout.rows - 1) :]
    width = widths[chosen].astype(np.int64)
    start = (widths.cumsum(dtype=np.int64) - widths)[chosen]
    component, frequency = np.divmod(chosen, layout.frequencies)
    if change.basis is not None:
        group, place = np.divmod(component, layout.mix)
        leading = int(place.max()) + 1
        change = change._replace(basis=change.basis[:, :, :leading].contiguous())
        component = group * leading + place
    kept, place = np.unique(frequency, return_inverse=True)
    return Plan(
        change,
        torch.from_numpy(component * len(kept) + place),
        torch.from_numpy(width),
        torch.from_numpy(start),
        deviation[torch.from_numpy(chosen)],
        (narrow[0], narrow[1]),
        torch.from_numpy(kept),
    )


# -- transform ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def dct_matrices(edges: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Orthonormal DCT-II down and across a block, frequencies down, positions across."""

    def one(size: int) -> Tensor:
        k, t = np.arange(size)[:, None], np.arange(size)
        matrix = np.sqrt(2 / size) * np.cos(np.pi * k * (t + 0.5) / size)
        matrix[0] = np.sqrt(1 / size)
        return torch.from_numpy(matrix.astype(np.float32)).to(device)

    return one(edges[0]), one(edges[1])


@lru_cache(maxsize=64)
def dct_matrix(edges: tuple[int, int], device: torch.device) -> Tensor:
    """``(M, M)`` orthonormal DCT-II of blocks, frequencies down, positions across, both row by row."""
    return torch.kron(*dct_matrices(edges, device))


def transform(maps: Tensor, layout: BlockLayout, change: Transform) -> Tensor:
    """Maps ``(b, C, h, W)`` to ``(M, components, n)`` coefficients of their ``n`` blocks."""
    blocks = _standardised(maps, change, layout)
    count = blocks.shape[1]
    if change.basis is not None:
        blocks = torch.matmul(change.basis.mT, blocks.view(layout.groups, layout.mix, -1))
    down, across = dct_matrices(layout.edges, maps.device)
    # Each product takes the last axis to the front.
    values = torch.mm(across, blocks.view(-1, layout.edges[1]).T)
    values = torch.mm(down, values.view(-1, layout.edges[0]).T)
    return values.view(layout.frequencies, -1, count)


def transform_back(coefficients: Tensor, layout: BlockLayout, change: Transform, out: Tensor) -> None:
    """The inverse of :func:`transform`: writes maps ``(b, C, h, W)`` of coefficients ``(components, F, n)``.

    The DCT of ``change`` may have only the ``F`` frequencies that there are.
    """
    blocks = torch.matmul(coefficients.mT, change.dct)
    if change.basis is not None:
        blocks = torch.matmul(change.basis, blocks.view(layout.groups, -1, blocks[0].numel()))
    batch, channels, height, width = out.shape
    down, across = layout.edges
    blocks = blocks.view(layout.components, batch, -(-height // down), -1, down, across)[:channels]
    blocks.view(channels, -1).mul_(change.scale[:, None]).add_(change.mean[:, None])
    maps = blocks.permute(1, 0, 2, 4, 3, 5)
    if height % down or width % across:
        copy_in_range(out, maps.flatten(4, 5).flatten(2, 3)[:, :, :height, :width])
    else:
        copy_in_range(out.unflatten(3, (-1, across)).unflatten(2, (-1, down)), maps)


# -- quantiser ------------------------------------------------------------------------------------------------------

#: Of the compander, for values over their deviation.
RATE = math.sqrt(2) / 3


@lru_cache(maxsize=1)
def _level_table() -> NDArray[np.float32]:
    """Levels of all widths one after the other, those of ``b`` bits from ``2^b`` on, in two's complement order."""
    table = np.zeros(2 << MAX_WIDTH)
    for width in range(1, MAX_WIDTH + 1):
        half = 1 << (width - 1)
        edges = -np.log1p(-np.arange(half) / (half * COMPANDER[width - 1])) / RATE
        # Mean of a density proportional to exp(-sqrt(2) x) between each edge and the next.
        tail = np.append(np.exp(-math.sqrt(2) * edges), 0)
        first = np.append((edges + math.sqrt(0.5)), 0) * tail
        levels = (first[:-1] - first[1:]) / (tail[:-1] - tail[1:])
        table[2 * half : 3 * half] = levels
        table[3 * half : 4 * half] = -levels[::-1]
    return table.astype(np.float32)


@lru_cache(maxsize=16)
def quantiser_levels(device: torch.device) -> Tensor:
    """``(512,)`` float32: levels of ``b`` bits from ``2^b`` on, by their codes."""
    return torch.from_numpy(_level_table()).to(device)


def compander_factors(device: torch.device) -> Tensor:
    """``2^(b-1) m_b`` of ``b = 0 ..`` bits, 0 for none."""
    return _table((0.0, *(m * (1 << width) for width, m in enumerate(COMPANDER))), device)


def quantise_rows(values: Tensor, plan: Plan, noise: Tensor | None) -> Tensor:
    """Rows ``(R, n)`` to codes in two's complement, uint8; of the highest bits only ``width`` count.

    Args:
        values: coefficients; they are overwritten.
        plan: widths and deviations of the rows.
        noise: uniform in [0, 1): picks one of the two levels about each value, without bias between the extreme ones.
            By default the nearest cell is taken.
    """
    if noise is None and plan.narrow != (0, 0):
        return _quantise_narrow(values, plan)
    half = torch.exp2(plan.width.to(torch.float32) - 1)[:, None]
    factor = compander_factors(plan.width.device)[plan.width][:, None]
    deviation = plan.deviation[:, None]
    # exp(-x) is 1 / sigmoid(x) - 1, and faster so on a CPU.
    code = values.abs().mul_(RATE / deviation).sigmoid_().reciprocal_().sub_(2).mul_(-factor)
    code = code.mul_(values.sign()).floor_()
    code = torch.maximum(torch.minimum(code, half - 1, out=code), -half, out=code)
    if noise is None:
        return code.to(torch.int8).view(torch.uint8)
    scaled = values / deviation
    # The level of the cell, and the next one on the other side of the value.
    here = _level(code, half)
    code = torch.where(scaled < here, code - 1, code).clamp_(min=-half, max=half - 1)
    below, above = _level(code, half), _level((code + 1).clamp_(max=half - 1), half)
    gap = (above - below).clamp_min(1e-9)
    code += (scaled - below) / gap + noise >= 1
    return code.clamp_(max=half - 1).to(torch.int8).view(torch.uint8)


def _quantise_narrow(values: Tensor, plan: Plan) -> Tensor:
    """:func:`quantise_rows` to the nearest, with one threshold where there is but one."""
    one, two = plan.narrow[0], sum(plan.narrow)
    codes = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    codes[:one] = values[:one].floor_().clamp_(-1, 0)
    threshold = -math.log1p(-1 / (2 * COMPANDER[1])) / RATE * plan.deviation[one:two, None]
    codes[one:two] = values[one:two].div_(threshold).floor_().clamp_(-2, 1)
    wide = plan._replace(width=plan.width[two:], deviation=plan.deviation[two:], narrow=(0, 0))
    codes[two:] = quantise_rows(values[two:], wide, None).view(torch.int8)
    return codes.view(torch.uint8)


def _level(code: Tensor, half: Tensor) -> Tensor:
    place = torch.where(code < 0, code + 4 * half, code + 2 * half).to(torch.int32)
    return quantiser_levels(code.device).index_select(0, place.view(-1)).view(code.shape)


def field_bits(plan: Plan, length: int) -> tuple[Tensor, Tensor]:
    """For each bit of a record of ``length`` bytes: the row, and which bit of its code. Bits left over repeat some."""
    bits = torch.arange(8 * length, device=plan.start.device)
    end = plan.start + plan.width
    # Of rows that end at the same bit all but the first are empty.
    end, order = end.sort(stable=True)
    row = order[torch.searchsorted(end, bits, right=True).clamp_(max=end.numel() - 1)]
    return row, (bits - plan.start[row]).clamp_(0, 7).to(torch.uint8)[:, None]


def write_fields(codes: Tensor, bits: tuple[Tensor, Tensor]) -> Tensor:
    """Codes ``(R, n)`` to records ``(n, L)``; ``bits`` comes from :func:`field_bits`."""
    row, place = bits
    planes = codes.index_select(0, row).bitwise_right_shift_(place).bitwise_and_(1).view(-1, 8, codes.shape[1])
    planes <<= torch.arange(8, dtype=torch.uint8, device=codes.device)[:, None]
    for half in (4, 2, 1):
        planes = planes[:, :half] | planes[:, half:]
    return planes[:, 0].T


def read_fields(records: Tensor, plan: Plan, spare: int = 0) -> Tensor:
    """Records ``(n, L)`` to values ``(R + spare, n)`` float32, zero in the last rows."""
    packed = records.T.contiguous()
    byte, shift, deviation = plan.start >> 3, (plan.start & 7)[:, None], plan.deviation[:, None]
    levels = quantiser_levels(records.device)
    values = torch.empty(byte.numel() + spare, packed.shape[1], device=records.device)
    values[byte.numel() :] = 0
    one = plan.narrow[0]
    if one:
        bits = packed.index_select(0, byte[:one]).bitwise_right_shift_(shift[:one].to(torch.uint8)).bitwise_and_(1)
        high = levels[2] * deviation[:one]
        values[:one].copy_(bits).mul_(-2 * high).add_(high)
    # A field of up to eight bits lies within two bytes.
    window = packed.index_select(0, byte[one:].clamp(max=packed.shape[0] - 1)).to(torch.int32)
    window |= packed.index_select(0, (byte[one:] + 1).clamp_(max=packed.shape[0] - 1)).to(torch.int32) << 8
    first = (1 << plan.width[one:]).to(torch.int32)[:, None]
    window = window.bitwise_right_shift_(shift[one:].to(torch.int32)).bitwise_and_(first - 1).add_(first)
    wide = values[one : byte.numel()]
    torch.index_select(levels, 0, window.view(-1), out=wide.view(-1))
    wide.mul_(deviation[one:])
    return values


def encoding_tables(plan: Plan, layout: BlockLayout) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``(R,)`` rows that are coded, in the order in which :func:`transform` gives them, and :func:`field_bits`."""
    frequencies = _kept(plan, layout)
    component, frequency = plan.rows // frequencies.numel(), frequencies[plan.rows % frequencies.numel()]
    row, place = field_bits(plan, layout.record)
    return (frequency * _transformed(plan, layout) + component).int(), (row.int(), place)


def decoding_tables(plan: Plan, layout: BlockLayout) -> Tensor:
    """For each (component, kept frequency) its number among the coded rows."""
    # Where there are no bits the spare row is read.
    row = plan.rows.new_full((_transformed(plan, layout) * _kept(plan, layout).numel(),), plan.rows.numel())
    row[plan.rows] = torch.arange(plan.rows.numel(), device=row.device)
    return row.int()


def encode_blocks(x: Tensor, layout: BlockLayout, plan: Plan, seed: Tensor | None, workspace: int) -> Tensor:
    """The records ``(N, L)`` of maps ``x`` ``(B, C, H, W)``, any strides.

    Args:
        x: the maps.
        layout: theirs.
        plan: how they are coded.
        seed: of stochastic rounding, 0-dimensional int64; by default cells are rounded to the nearest.
        workspace: bound on temporaries in bytes.
    """
    rows, bits = plan.encoding or encoding_tables(plan, layout)
    records = torch.empty(layout.blocks, layout.record, dtype=torch.uint8, device=x.device)
    # Noise takes as much again.
    for part in regions(layout, workspace if seed is None else workspace // 2):
        values = transform(maps_of(x, layout, part), layout, plan.change).flatten(0, 1).index_select(0, rows)
        noise = None
        if seed is not None:
            block = torch.arange(part.n0, part.n1, device=x.device)
            noise = uniform(seed, block * (8 * layout.record) + plan.start[:, None])
        records[part.n0 : part.n1] = write_fields(quantise_rows(values, plan, noise), bits)
    return records


def decode_blocks(records: Tensor, layout: BlockLayout, plan: Plan, out: Tensor, workspace: int) -> Tensor:
    """Writes the maps ``out`` ``(B, C, H, W)`` of records ``(N, L)``, and returns them. In float16 they saturate."""
    row = decoding_tables(plan, layout) if plan.decoding is None else plan.decoding
    change = plan.change
    if plan.kept is not None:
        change = change._replace(dct=change.dct[plan.kept])
    for part in regions(layout, workspace):
        target, own = maps_of(out, layout, part), records[part.n0 : part.n1]
        coefficients = read_fields(own, plan, spare=1).index_select(0, row)
        transform_back(coefficients.view(-1, change.dct.shape[0], coefficients.shape[1]), layout, change, target)
    return out


def _kept(plan: Plan, layout: BlockLayout) -> Tensor:
    """Frequencies at which rows are counted."""
    return torch.arange(layout.frequencies, device=plan.rows.device) if plan.kept is None else plan.kept


def _transformed(plan: Plan, layout: BlockLayout) -> int:
    """Components of the transform of a plan."""
    basis = plan.change.basis
    return layout.groups * (layout.mix if basis is None else basis.shape[2])
