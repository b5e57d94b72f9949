"""Which implementation of the primitives runs: the Triton kernels, the C functions or the plain PyTorch reference.

``SPECTRITON_BACKEND`` says ``auto`` (the default: Triton on GPUs; on the CPU C where there is a compiler, else the
reference), ``triton`` (also on the CPU, where it needs ``TRITON_INTERPRET=1``), ``native`` (C; for CPU tensors, GPUs
take the reference) or ``reference``. It is read at every call, so tests can change it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spectriton import reference, tuning
from spectriton._mixing import EmbeddedMixing, Mixing
from spectriton.frequencies import FrequencyGrid, frequency_grid
from spectriton.reference import RowPattern, TileIndex, across, bits, block_codec, kept, max_pool
from spectriton.reference.pattern import channel_of
from spectriton.reference.rebuild import Statistics, rebuild
from spectriton.reference.rounding import noise_key
from spectriton.reference.spectral_activation import activate_backward
from spectriton.reference.spectral_batch_norm import norm_factor, norm_planes
from spectriton.reference.unpack import read_values, take_values

BACKENDS = ("auto", "triton", "native", "reference")
_MIB = 1 << 20
# The environment as Python keeps it: to find that something is not set takes a tenth of the time there, and a training
# step asks hundreds of times.
_variables: Any = getattr(os.environ, "_data", os.environ)
_key_of: Callable[[str], Any] = os.environ.encodekey if _variables is not os.environ else str
_SETTINGS = {name: _key_of(name) for name in ("SPECTRITON_BACKEND", "SPECTRITON_WORKSPACE_MIB")}


def _setting(name: str) -> str | None:
    return os.environ[name] if _SETTINGS[name] in _variables else None


def backend_name(device: torch.device) -> str:
    """``"triton"``, ``"native"`` or ``"reference"``: what runs on ``device``.

    Raises:
        ValueError: ``SPECTRITON_BACKEND`` is set to something else than one of :data:`BACKENDS`, to ``triton`` for the
            CPU without the interpreter, or to ``native`` where nothing could be compiled.
    """
    setting = _setting("SPECTRITON_BACKEND")
    choice = "auto" if setting is None else setting
    if choice not in BACKENDS:
        raise ValueError(
            f"spectriton: SPECTRITON_BACKEND got {choice!r}, expected one of {', '.join(BACKENDS)}; "
            "unset it to let the device decide"
        )
    if choice == "auto":
        if device.type == "cuda":
            return "triton"
        return "native" if device.type == "cpu" and why_not_native() is None else "reference"
    if choice == "native" and device.type != "cpu":
        return "reference"
    if choice == "native" and why_not_native() is not None:
        raise ValueError(
            f"spectriton: SPECTRITON_BACKEND got 'native', but {why_not_native()}; install a C compiler, or unset it"
        )
    if choice == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "spectriton: SPECTRITON_BACKEND got 'triton' for CPU tensors, expected a GPU or Triton's interpreter; "
            "set TRITON_INTERPRET=1 before anything imports triton"
        )
    return choice


def why_not_native() -> str | None:
    """Why the C functions cannot be had, or None where they can; the first time they are compiled."""
    import spectriton_native  # not at import, which has no side effects

    return spectriton_native.why_unavailable()


def workspace_bytes(workspace: int | None, device: torch.device, maps: int = 0) -> int:
    """The bound on temporaries in bytes: ``workspace``, else ``SPECTRITON_WORKSPACE_MIB``, else the device's default.

    Args:
        workspace: what was asked for.
        device: where the work is done.
        maps: bytes that the largest maps at work would take, dense.
    """
    if workspace is not None:
        return workspace
    setting = _setting("SPECTRITON_WORKSPACE_MIB")
    if setting is None:
        return default_workspace(device.type, maps)
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


def default_workspace(device_type: str, maps: int) -> int:
    """Bytes of temporaries on a device of a type, for maps of so many.

    On a CPU chunks should stay in the caches. For a GPU the host launches some kernels for each chunk: chunks grow with
    the maps, so that their number stays at about twenty and the host ahead.
    """
    if device_type == "cpu":
        return 4 * _MIB
    return min(max(64 * _MIB, maps // 8), 256 * _MIB)


class Backend:
    """The primitives in plain PyTorch; what another backend does not override, it takes from here.

    Chunks hold the frequencies ``rows`` of a packed spectrum, as a range, and its tiles ``t0:t1``.
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
    count_moduli = staticmethod(reference.count_moduli)
    compact_rows = staticmethod(reference.compact_rows)
    to_format = staticmethod(reference.to_format)
    tile_starts = staticmethod(reference.tile_starts)
    store_rows = staticmethod(reference.store_rows)
    reorder = staticmethod(reference.reorder)
    planes_innermost = staticmethod(reference.planes_innermost)
    by_products = staticmethod(reference.by_products)
    unpack_planes = staticmethod(reference.unpack_planes)
    rows_of_half = staticmethod(reference.rows_of_half)
    rows_of_maps = staticmethod(reference.rows_of_maps)
    channel_means = staticmethod(block_codec.channel_means)
    rectify = staticmethod(bits.rectify)
    clear_outside = staticmethod(bits.clear_outside)
    rebuild = staticmethod(rebuild)
    pool_maxima = staticmethod(max_pool.pool_maxima)
    pool_maxima_again = staticmethod(max_pool.pool_maxima_again)
    spread_maxima = staticmethod(max_pool.spread_maxima)
    pool_across = staticmethod(across.pool_across)
    spread_across = staticmethod(across.spread_across)
    kept_rows = staticmethod(kept.kept_rows)
    spread_kept = staticmethod(kept.spread_kept)
    sum_places = staticmethod(kept.sum_places)
    sum_kept = staticmethod(kept.sum_kept)
    scale_kept = staticmethod(kept.scale_kept)
    combine_kept = staticmethod(kept.combine_kept)
    norm_planes = staticmethod(norm_planes)
    store_kept = staticmethod(kept.store_kept)

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
        """Mean and biased variance ``(C,)`` of packed maps ``shape``; None where it takes the steps one by one."""
        return None

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
        """Gradients ``(C,)`` of weight and bias of a batch norm, and those of the values to ``out``; None likewise."""
        return None

    def mixing(self, weight: Tensor, groups: int) -> Mixing:
        """The products of channels, for taps ``(O, I / groups, kh, kw)``."""
        return Mixing(weight, groups)

    def fit_blocks(self, x: Tensor, layout: block_codec.BlockLayout, workspace: int) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`spectriton.reference.block_codec.fit`; means are those of :meth:`channel_means`."""
        return block_codec.fit(x, layout, workspace, self.channel_means(x, layout))

    def block_plan(self, stored: tuple[Tensor, Tensor, Tensor], layout: block_codec.BlockLayout) -> block_codec.Plan:
        """How blocks are coded, from what is stored beside the records. On a GPU the host does not wait for it."""
        return block_codec.make_plan(stored, layout, compact=stored[0].device.type == "cpu")

    def ready_plan(self, plan: block_codec.Plan, layout: block_codec.BlockLayout) -> block_codec.Plan:
        """A plan of :meth:`block_plan` with all tables, for those who encode and decode by it more than once."""
        encoding, decoding = block_codec.encoding_tables(plan, layout), block_codec.decoding_tables(plan, layout)
        return plan._replace(
            rows=plan.rows.new_empty(0),
            width=plan.width.int(),
            start=plan.start.int(),
            encoding=encoding,
            decoding=decoding,
        )

    def encode_blocks(
        self, x: Tensor, layout: block_codec.BlockLayout, plan: block_codec.Plan, seed: Tensor | None, workspace: int
    ) -> Tensor:
        """See :func:`spectriton.reference.block_codec.encode_blocks`; the plan is that of :meth:`block_plan`."""
        return block_codec.encode_blocks(x, layout, plan, seed, workspace)

    def decode_blocks(
        self, records: Tensor, layout: block_codec.BlockLayout, plan: block_codec.Plan, out: Tensor, workspace: int
    ) -> Tensor:
        """See :func:`spectriton.reference.block_codec.decode_blocks`; the plan is that of :meth:`block_plan`."""
        return block_codec.decode_blocks(records, layout, plan, out, workspace)

    def by_bits(self, dtype: torch.dtype, kind: str = "identity") -> bool:
        """Whether kept coefficients are moved, by an activation, without lists of their places and copies."""
        return False

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
        """Kept coefficients of a chunk in their format, in row order: :meth:`compact_rows`, then :meth:`to_format`.

        Writes ``scales`` ``(F, T)`` at ``rows`` and the chunk's tiles where values are integers.
        """
        kept = self.compact_rows(y, length, threshold, rows, t0, bitmap, kind, scale, channels)
        tiles = slice(t0, t0 + y.shape[1] // (bitmap.shape[2] * 8))
        kept, of_tiles = self.to_format(kept, bitmap, rows, tiles, dtype, seed)
        if of_tiles is not None:
            scales[rows, tiles] = of_tiles
        return kept

    def plane_arrays(self, grid: FrequencyGrid, dtype: torch.dtype, repacked: bool) -> int:
        """How many arrays of the size of a chunk's half spectra stand side by side while planes are transformed.

        ``repacked``: of maps that are made of a packed spectrum to become another.
        """
        # Maps, half spectrum, its rows and their padded copy; each way.
        return 10 if repacked else 5

    def tile_index(self, bitmap: Tensor, offsets: Tensor) -> TileIndex | None:
        """What may be handed to :meth:`row_pattern` to save counting at every chunk."""
        return reference.TileIndex(bitmap, offsets)

    def row_pattern(
        self, bitmap: Tensor, offsets: Tensor, rows: slice | Tensor, t0: int, t1: int, index: TileIndex | None = None
    ) -> RowPattern | None:
        """What may be handed to :meth:`unpack_rows` and :meth:`gather_rows` to save reading the bitmap twice."""
        return reference.row_pattern(bitmap, offsets, rows, t0, t1, index)

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
        """Writes the real maps ``out`` ``(n, H, W)`` of the planes from ``t0 * tile`` on.

        Not ``weighted``: the adjoint of maps to their stored coefficients.
        """
        if index is not None and self.by_products(grid, out):
            reference.unpack_maps(values, scales, bitmap, offsets, grid, t0, t1, weighted, out, index)
            return
        half = out.new_empty(out.shape[0], grid.height, grid.half_width, 2)
        # irfft2 counts a coefficient twice where its conjugate is not stored, which the adjoint does not.
        row_scale = None if weighted else 1 / grid.weight
        self.unpack_planes(values, scales, bitmap, offsets, grid, t0, t1, out.shape[0], row_scale, half, index)
        reference.maps_of_half(torch.view_as_complex(half), grid, out)

    def make_maps(
        self,
        values: Tensor,
        scales: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        grid: FrequencyGrid,
        t0: int,
        t1: int,
        planes: int,
        weighted: bool,
        innermost: bool,
        dtype: torch.dtype,
        index: TileIndex | None,
    ) -> Tensor:
        """The real maps ``(planes, H, W)`` that :meth:`unpack_maps` writes, with planes innermost in memory or not."""
        like, size = values.new_empty(0, dtype=dtype), [grid.height, grid.width]
        maps = across.empty_across(like, planes, size) if innermost else like.new_empty(planes, *size)
        self.unpack_maps(values, scales, bitmap, offsets, grid, t0, t1, weighted, maps, index)
        return maps

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
        """Writes half of the adjoint of weighted :meth:`unpack_maps`, for maps ``(n, H, W)``, to ``out`` ``(N, 2)``."""
        if index is not None and self.by_products(grid, maps):
            reference.gather_maps(maps, bitmap, offsets, grid, t0, t1, out, index)
            return
        rows = self.rows_of_maps(maps, grid, (t1 - t0) * bitmap.shape[2] * 8)
        rows[grid.self_conjugate] *= 0.5
        every = slice(0, grid.count)
        pattern = self.row_pattern(bitmap, offsets, every, t0, t1, index)
        self.gather_rows(rows, bitmap, offsets, every, t0, out, pattern)

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
        """Writes ``out`` ``(n, Ho, Wo)``: what pooling gives of the maps that :meth:`unpack_maps` makes.

        Only where it is done without these maps in memory; returns whether it was. ``pool`` is that of the tiles.
        """
        return False

    def pool_planes(self, maps: Tensor, pool: across.Pool, out: Tensor) -> bool:
        """Writes ``out`` ``(n, Ho, Wo)``, codes and signs of ``pool`` of maps ``(n, H, W)``, in the order of ``out``.

        Only where one kernel does it all; returns whether it was done. The maps may be written over.
        """
        return False

    def spread_planes(self, grad: Tensor, pool: across.Pool, size: list[int]) -> Tensor | None:
        """The adjoint of :meth:`pool_planes`, for gradients ``(n, Ho, Wo)`` and maps ``size``, or None likewise.

        Where windows are single elements, the gradients are written over and given back.
        """
        return None

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
        """The rows ``(F, padded, 2)`` of the spectra of what :meth:`unpack_pooled` writes, or None likewise.

        ``pooled`` is the grid of the pooled maps, of which there are ``planes``.
        """
        return None

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
        """The adjoint of :meth:`unpack_pooled` of all tiles: of ``grad`` ``(n, Ho, Wo)`` to ``(kept, 2)``, or None."""
        return None

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
        """:meth:`gather_pooled` for the gradient ``(N', 2)`` of the packed spectra of the pooled maps."""
        return None

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
        """Writes ``grad * h'`` of ``rows`` to ``out`` ``(Fc, P, 2)``; returns the ``(channels,)`` gradient for scale.

        ``h'`` is taken from the outputs in ``values``; ``grad`` ``(N, 2)`` stands in their order.
        """
        pattern = reference.row_pattern(bitmap, offsets, rows, 0, offsets.shape[1], index)
        kept = take_values(grad, pattern.slots)
        grad_scale = None
        if kind != "identity":
            tile_scales = scales[rows] if scales.numel() else scales
            output = read_values(values, scales, pattern, tile_scales, out.dtype)
            of_kept = channel = None
            if scale is not None:
                channel = channel_of(pattern.positions, out.shape[1], 0, channels)
                of_kept = scale.index_select(0, channel)[:, None].to(out.dtype)
            kept, terms = activate_backward(kept, output, kind, of_kept)
            if terms is not None and channel is not None:
                grad_scale = torch.bincount(channel, terms.sum(-1), minlength=channels).to(out.dtype)
        flat = torch.view_as_complex(out).view(-1)
        flat.zero_().scatter_(0, pattern.positions, torch.view_as_complex(kept.contiguous()))
        return grad_scale


class TritonBackend(Backend):
    """The Triton kernels."""

    name = "triton"

    def __init__(self) -> None:
        import spectriton_kernels as kernels

        tuning.install()
        self._kernels = kernels
        self.complex_product = kernels.complex_product
        self.spectral_activation = kernels.spectral_activation
        self.spectral_activation_backward = kernels.spectral_activation_backward
        self.kernel_spectrum = kernels.kernel_spectrum
        self.kernel_spectrum_adjoint = kernels.kernel_spectrum_adjoint

    def by_bits(self, dtype: torch.dtype, kind: str = "identity") -> bool:
        """In all precisions."""
        return True

    def mixing(self, weight: Tensor, groups: int) -> Mixing:
        """By tensor cores."""
        return EmbeddedMixing(weight, groups)

    def tile_index(self, bitmap: Tensor, offsets: Tensor) -> TileIndex | None:
        """None: the kernels read the bitmap themselves."""
        return None

    def row_pattern(
        self, bitmap: Tensor, offsets: Tensor, rows: slice | Tensor, t0: int, t1: int, index: TileIndex | None = None
    ) -> RowPattern | None:
        """None, likewise."""
        return None

    def count_moduli(self, y: Tensor, guard: int, shift: int, counts: Tensor) -> None:
        """As the reference's, without bincount, which would wait for the device."""
        bins = reference.bins_of_moduli(y, guard, shift)
        counts.index_add_(0, bins, counts.new_ones(1).expand(bins.numel()))

    def pack_rows(
        self,
        y: Tensor,
        length: int,
        threshold: float | Tensor,
        rows: slice | Tensor,
        t0: int,
        bitmap: Tensor,
        offsets: Tensor,
        values: Tensor,
        cursor: Tensor,
        kind: str = "identity",
        scale: Tensor | None = None,
        channels: int = 1,
        scales: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> None:
        """As the reference's."""
        numbers = row_numbers(rows, y.device)
        key = None if seed is None else noise_key(seed)
        self._kernels.pack_rows(
            y, length, threshold, numbers, t0, bitmap, offsets, values, cursor, kind, scale, channels, scales, key
        )

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
        numbers = row_numbers(rows, out.device)
        return self._kernels.unpack_rows(values, scales, bitmap, offsets, numbers, t0, t1, out)

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
        numbers = row_numbers(rows, y.device)
        return self._kernels.gather_rows(y, bitmap, offsets, numbers, t0, out)

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
        self._kernels.gather_rows(y, bitmap, offsets, row_numbers(rows, y.device), t0, values, scales)

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
        return self._kernels.unpack_planes(values, scales, bitmap, offsets, grid, t0, t1, count, row_scale, out)

    def plane_arrays(self, grid: FrequencyGrid, dtype: torch.dtype, repacked: bool) -> int:
        """As the reference's."""
        # The half spectrum that maps are made of, its copy, which the transform destroys, and its room for work; or the
        # maps, their half spectrum, that room, and rows. Gradients are made of others, which stand beside them.
        return 5 if repacked else 4

    def planes_innermost(self, grid: FrequencyGrid) -> bool:
        """Never: maps take the fast transform, on a CPU as on a GPU."""
        return False

    def by_products(self, grid: FrequencyGrid, maps: Tensor) -> bool:
        """Likewise."""
        return False

    def rows_of_half(self, half: Tensor, grid: FrequencyGrid, padded: int, row_scale: Tensor | None = None) -> Tensor:
        """As the reference's; times a factor ``(F,)`` of each row where there are any."""
        pairs = torch.view_as_real(half.contiguous())
        out = pairs.new_empty(grid.count, padded, 2)
        return self._kernels.rows_of_half(pairs, grid, row_scale, out)

    def rows_of_maps(self, maps: Tensor, grid: FrequencyGrid, padded: int) -> Tensor:
        """As the reference's."""
        # On a GPU a normalised transform passes over its result once more.
        half = torch.fft.rfft2(maps, norm="backward")
        return self.rows_of_half(half, grid, padded, _ortho_scale(grid, 1.0, 1.0, maps.dtype))

    def make_maps(
        self,
        values: Tensor,
        scales: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        grid: FrequencyGrid,
        t0: int,
        t1: int,
        planes: int,
        weighted: bool,
        innermost: bool,
        dtype: torch.dtype,
        index: TileIndex | None,
    ) -> Tensor:
        """As the reference's."""
        half = values.new_empty(planes, grid.height, grid.half_width, 2, dtype=dtype)
        # irfft2 counts a coefficient twice where its conjugate is not stored, which the adjoint does not.
        row_scale = _ortho_scale(grid, 1.0 if weighted else 0.5, 1.0, dtype)
        self.unpack_planes(values, scales, bitmap, offsets, grid, t0, t1, planes, row_scale, half)
        # What is written to a given place, or normalised, is passed over once more on a GPU.
        return torch.fft.irfft2(torch.view_as_complex(half), s=(grid.height, grid.width), norm="forward")

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
        """As the reference's."""
        fields = (values, scales, bitmap, offsets)
        out.copy_(self.make_maps(*fields, grid, t0, t1, out.shape[0], weighted, False, out.dtype, index))

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
        """As the reference's."""
        half = torch.view_as_real(torch.fft.rfft2(maps, norm="backward").contiguous())
        row_scale = _ortho_scale(grid, 1.0, 0.5, maps.dtype)
        self._kernels.gather_planes(half, bitmap, offsets, grid, t0, row_scale, out)

    def pool_planes(self, maps: Tensor, pool: across.Pool, out: Tensor) -> bool:
        """Where the kernels take the windows."""
        if not (self._kernels.can_pool_planes(pool.windows, maps.dtype) and out.is_contiguous()):
            return False
        windows, codes, signs, affine, rectify = pool
        self._kernels.pool_planes(maps.contiguous(), windows, out, codes, signs, affine, rectify)
        return True

    def spread_planes(self, grad: Tensor, pool: across.Pool, size: list[int]) -> Tensor | None:
        """Likewise."""
        if not self._kernels.can_pool_planes(pool.windows, grad.dtype):
            return None
        grad = grad.contiguous()
        out = grad if pool.codes is None else grad.new_empty(grad.shape[0], *size)
        return self._kernels.spread_planes(grad, pool.windows, pool.codes, pool.signs, out)

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
        """From what is kept, in one pass."""
        batch, channels, height, width = shape
        if not batch * channels:
            return None
        weight = frequency_grid(height, width, values.device).weight
        power = self._kernels.sum_kept(values, scales, bitmap, offsets, weight, None, dtype, workspace // 2)
        zero = self._zero_frequency(values, scales, bitmap, offsets, shape, dtype)
        # The zero frequency enters by its deviation from the mean of the batch: no small difference of large sums.
        centre = zero.mean(0)
        power = _per_channel(power, shape) + (zero - centre).square_().sum(0)
        return (centre / (height * width) ** 0.5).to(dtype), (power / (batch * height * width)).to(dtype)

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
        """From what is kept, in one pass for the sums and one for the gradients."""
        batch, channels, height, width = shape
        if not batch * channels:
            return None
        pattern, root = (bitmap, offsets), float((height * width) ** 0.5)
        centred = self._zero_frequency(values, scales, *pattern, shape, grad.dtype) - mean.double() * root
        of_zero = self._zero_frequency(grad, scales.new_empty(0), *pattern, shape, grad.dtype)
        inner = _per_channel(
            self._kernels.sum_kept(values, scales, *pattern, None, grad, grad.dtype, workspace // 2), shape
        )
        inner += (of_zero * centred).sum(0)
        total = of_zero.sum(0)
        if out is not None:
            factor = norm_factor(weight, var, eps)
            gain = zero = None
            if batch_statistics:
                pull = -factor / (var + eps) * inner / (batch * height * width)
                gain = _places(pull.expand(batch, -1), *pattern)
                zero = _places(centred * pull - factor * total / batch, *pattern)
            factors = _places(factor.expand(batch, -1), *pattern)
            weights = frequency_grid(height, width, values.device).weight
            self._kernels.combine_kept(values, scales, grad, *pattern, weights, factors, gain, zero, out)
        return (inner * norm_factor(None, var, eps)).to(grad.dtype), (total * root).to(grad.dtype)

    def _zero_frequency(
        self, values: Tensor, scales: Tensor, bitmap: Tensor, offsets: Tensor, shape: list[int], dtype: torch.dtype
    ) -> Tensor:
        """Real parts ``(B, C)`` of the first row of a packed spectrum, float64."""
        tiles, tile = offsets.shape[1], 8 * bitmap.shape[2]
        out = torch.empty(1, tiles * tile, 2, dtype=dtype, device=values.device)
        self.unpack_rows(values, scales, bitmap, offsets, slice(0, 1), 0, tiles, out)
        return out[0, : shape[0] * shape[1], 0].double().view(shape[0], shape[1])

    def block_plan(self, stored: tuple[Tensor, Tensor, Tensor], layout: block_codec.BlockLayout) -> block_codec.Plan:
        """Of all rows: the kernels pass over those without bits."""
        return block_codec.make_plan(stored, layout, compact=False)

    def ready_plan(self, plan: block_codec.Plan, layout: block_codec.BlockLayout) -> block_codec.Plan:
        """As the reference's; of what the kernels do not take nothing stays."""
        if not self._kernels.can_code(layout):
            return super().ready_plan(plan, layout)
        encoding, decoding = self._kernels.block_tables(
            plan, layout, block_codec.compander_factors(plan.width.device), block_codec.RATE
        )
        none = plan.rows.new_empty(0)
        return plan._replace(rows=none, width=none, start=none, encoding=encoding, decoding=decoding)

    def encode_blocks(
        self, x: Tensor, layout: block_codec.BlockLayout, plan: block_codec.Plan, seed: Tensor | None, workspace: int
    ) -> Tensor:
        """As the reference's, without temporaries but for groups too large for the kernels."""
        if not self._kernels.can_code(layout):
            return super().encode_blocks(x, layout, plan, seed, workspace)
        levels, factors = block_codec.quantiser_levels(x.device), block_codec.compander_factors(x.device)
        key = None if seed is None else noise_key(seed)
        return self._kernels.encode_blocks(x, layout, plan, levels, factors, block_codec.RATE, key)

    def decode_blocks(
        self, records: Tensor, layout: block_codec.BlockLayout, plan: block_codec.Plan, out: Tensor, workspace: int
    ) -> Tensor:
        """As the reference's, without temporaries but for groups too large for the kernels."""
        if not self._kernels.can_code(layout):
            return super().decode_blocks(records, layout, plan, out, workspace)
        return self._kernels.decode_blocks(records, layout, plan, block_codec.quantiser_levels(out.device), out)

    def rectify(self, x: Tensor, limit: float, inplace: bool) -> tuple[Tensor, Tensor]:
        """As the reference's; maps with gaps between them are left to it."""
        flat = bits.in_memory_order(x)
        if not flat.is_contiguous():
            return bits.rectify(x, limit, inplace)
        y = x if inplace else torch.empty_like(x)
        outside = self._kernels.rectify(flat.view(-1), limit, bits.in_memory_order(y).view(-1))
        if inplace:
            torch.autograd.graph.increment_version(x)
        return y, outside

    def clear_outside(self, x: Tensor, outside: Tensor, channels_last: bool, inplace: bool) -> Tensor:
        """As the reference's."""
        dense = x.contiguous(memory_format=_format(channels_last))
        out = dense if inplace or dense is not x else torch.empty_like(dense)
        flat, result = ((maps.permute(0, 2, 3, 1) if channels_last else maps).view(-1) for maps in (dense, out))
        self._kernels.clear_outside(flat, outside, result)
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
        dense = x.contiguous(memory_format=_format(channels_last))
        out = dense if inplace or dense is not x else torch.empty_like(dense)
        return self._kernels.rebuild(dense, statistics, eps, outside, channels_last, out)

    def pool_maxima(self, x: Tensor, window: max_pool.Window) -> tuple[Tensor, Tensor]:
        """As the reference's, without positions of 64 bits where the kernels take the window."""
        channels_last = bits.is_channels_last(x)
        shape = torch.Size((*x.shape[:2], *max_pool.pooled_size(window, *x.shape[2:])))
        if not self._kernels.can_pool(window, shape, channels_last):
            return max_pool.pool_maxima(x, window)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(channels_last))
        # Of one position or one channel nothing tells how the maxima stand: the order is the same.
        return y, self._kernels.pool_maxima(x, window, y, channels_last)

    def pool_maxima_again(
        self, x: Tensor, window: max_pool.Window, codes: Tensor, outputs: torch.Size, channels_last: bool
    ) -> Tensor:
        """As the reference's, likewise."""
        if not self._kernels.can_pool(window, outputs, channels_last):
            return max_pool.pool_maxima_again(x, window, codes, outputs, channels_last)
        y = torch.empty(outputs, dtype=x.dtype, device=x.device, memory_format=_format(channels_last))
        return self._kernels.pool_maxima_again(x, window, codes, y, channels_last)

    def spread_maxima(
        self, grad: Tensor, window: max_pool.Window, codes: Tensor, shape: torch.Size, channels_last: bool
    ) -> Tensor:
        """As the reference's, likewise."""
        if not self._kernels.can_pool(window, grad.shape, channels_last):
            return max_pool.spread_maxima(grad, window, codes, shape, channels_last)
        out = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=_format(channels_last))
        return self._kernels.spread_maxima(
            grad.contiguous(memory_format=_format(channels_last)), window, codes, out, channels_last
        )

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
        if kind == "identity":
            self.unpack_rows(grad, scales.new_empty(0), bitmap, offsets, rows, 0, offsets.shape[1], out)
            return None
        numbers = row_numbers(rows, out.device)
        return self._kernels.unpack_gradient_rows(
            grad, values, scales, bitmap, offsets, numbers, kind, scale, channels, out
        )


def _per_channel(sums: Tensor, shape: list[int]) -> Tensor:
    """Sums ``(P,)`` of the places of a row, added up to those ``(C,)`` of the channels of maps ``[B, C, H, W]``."""
    return sums[: shape[0] * shape[1]].view(shape[0], shape[1]).sum(0)


def _places(planes: Tensor, bitmap: Tensor, offsets: Tensor) -> Tensor:
    """Numbers of planes ``(B, C)`` at the places ``(P,)`` of a row."""
    out = planes.new_zeros(offsets.shape[1] * bitmap.shape[2] * 8)
    out[: planes.numel()].view(planes.shape).copy_(planes)
    return out


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


@lru_cache(maxsize=256)
def _ortho_scale(grid: FrequencyGrid, pair: float, own: float, dtype: torch.dtype) -> Tensor:
    """``(F,)``: what makes a transform an ortho one, times ``pair``, or ``own`` for what is its own conjugate."""
    root = (grid.height * grid.width) ** 0.5
    return torch.full_like(grid.weight, pair / root).masked_fill_(grid.weight == 1, own / root).to(dtype)


def row_numbers(rows: slice | Tensor, device: torch.device) -> Tensor:
    """The kernels take frequencies one by one."""
    if not isinstance(rows, slice):
        return rows.contiguous()
    return _numbers(1 << max(0, rows.stop - 1).bit_length(), device)[rows]


@lru_cache(maxsize=64)
def _numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


def backend(device: torch.device) -> Backend:
    """The backend for tensors on ``device``."""
    return _made(backend_name(device))


@lru_cache(maxsize=len(BACKENDS))
def _made(name: str) -> Backend:
    if name == "native":
        from spectriton._native import NativeBackend  # it builds on this module

        return NativeBackend()
    return TritonBackend() if name == "triton" else Backend()
