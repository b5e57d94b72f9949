"""The packed spectrum: the kept Fourier coefficients of a batch of feature maps, and nothing else.

The format is described in ``docs/packed-format.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectriton._check import check_choice, check_threshold, fail
from spectriton._counts import counts_of
from spectriton.frequencies import stored_frequencies

# A chunk of planes is transformed tile by tile, so a tile of planes must stay small beside any workspace.
_TILE_ELEMENTS = 1 << 18
_TILE_MIN, _TILE_MAX = 32, 1024

#: Names of the value formats, and the dtype that holds them. Four-bit pairs share a byte.
VALUE_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int4": torch.uint8,
}

#: Formats with one scale a tile.
QUANTISED = ("int8", "int4")


def tile_size(batch: int, channels: int, height: int, width: int) -> int:
    """Coefficients in a tile for maps of this shape: a power of two from 32 to 1024.

    As large as possible while a tile of planes stays small and the padding of a row stays below an eighth of it.
    """
    row = batch * channels
    tile = _TILE_MAX
    while tile > _TILE_MIN and (tile * height * width > _TILE_ELEMENTS or 8 * (-row % tile) > row):
        tile //= 2
    return tile


class Layout(NamedTuple):
    """Sizes that follow from the shape ``(B, C, H, W)`` of the maps alone."""

    batch: int
    channels: int
    height: int
    width: int
    frequencies: int
    tile: int
    tiles: int

    @property
    def row(self) -> int:
        """Coefficients in a row (one frequency): ``B * C``."""
        return self.batch * self.channels

    @property
    def padded_row(self) -> int:
        """Length of a row with its last tile padded."""
        return self.tile * self.tiles

    @property
    def bitmap_shape(self) -> tuple[int, int, int]:
        """Shape of the bitmap, ``(F, T, tile / 8)`` bytes."""
        return self.frequencies, self.tiles, self.tile // 8


def layout(shape: tuple[int, ...] | torch.Size | list[int]) -> Layout:
    """The :class:`Layout` of maps of shape ``(B, C, H, W)``."""
    batch, channels, height, width = shape
    tile = tile_size(batch, channels, height, width)
    return Layout(batch, channels, height, width, stored_frequencies(height, width), tile, -(-batch * channels // tile))


def most_kept(density: float, sizes: Layout) -> int:
    """Coefficients that a density keeps at most, to the nearest whole number; the zero-frequency row always stays."""
    return max(sizes.row, round(density * sizes.frequencies * sizes.row))


class PackedSize(NamedTuple):
    """What decides how many bytes a packed spectrum takes.

    Attributes:
        shape: ``(B, C, H, W)`` of the maps.
        kept: number of coefficients kept.
        value_dtype: name of the value format, a key of :data:`VALUE_DTYPES`.
    """

    shape: tuple[int, ...]
    kept: int
    value_dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales, bitmap and offsets."""
        sizes = layout(self.shape)
        tiles = sizes.frequencies * sizes.tiles
        words = 2 if self.value_dtype in QUANTISED else 1  # offsets, and scales
        parts = 1 if self.value_dtype == "int4" else 2
        return self.kept * parts * VALUE_DTYPES[self.value_dtype].itemsize + tiles * (sizes.tile // 8 + 4 * words)

    @property
    def density(self) -> float:
        """Kept coefficients over independent coefficients, from 0 to 1."""
        sizes = layout(self.shape)
        return self.kept / max(1, sizes.frequencies * sizes.row)

    @property
    def least_nbytes(self) -> int:
        """Bytes with an infinite threshold, which keeps the zero frequency only."""
        return self._replace(kept=layout(self.shape).row).nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same maps, dense in float32."""
        return 4 * math.prod(self.shape)


class Origin(NamedTuple):
    """What a packed spectrum is made from again: the batch norm (and activation) of another.

    Attributes:
        tensors: values and scales of the other; weight, bias, mean and variance of the norm; scale of the activation;
            bitmap and offsets of the other, None where the pattern is the same.
        settings: kind of the activation (``"relu"`` for that of the maps, in space), ``eps`` of the norm, workspace in
            bytes.
    """

    tensors: tuple[Tensor | None, ...]
    settings: tuple[str, float, int]


class PackedSpectrum:
    """Feature maps ``(B, C, H, W)`` held as the Fourier coefficients that passed a threshold.

    What flows between :class:`spectriton.nn.SpecBlock` modules. Made by :func:`spectriton.ops.pack` or
    :class:`spectriton.nn.ToSpectral`; read back by :meth:`to_dense` or :class:`spectriton.nn.ToSpatial`.

    Attributes:
        shape: ``(B, C, H, W)`` of the maps.
        values: ``(N, 2)`` real and imaginary parts of the kept coefficients (``(N,)`` uint8 for ``"int4"``). Of those
            made within :func:`spectriton.ops.deferred_packing`, ``N`` counts room to spare, in the edge likewise.
        scales: ``(F, T)`` float32, one per tile, for ``int8`` and ``"int4"`` values; empty otherwise.
        bitmap: ``(F, T, tile / 8)`` uint8, one bit a coefficient.
        offsets: ``(F, T)`` int32, where the values of a tile begin.
        value_dtype: name of the value format, a key of :data:`VALUE_DTYPES`.
        edge: the differentiable tensor. It has the shape and precision of the gradient, ``(N, 2)``, one element of
            storage, and carries no values: gradients of packed spectra are packed in the same pattern, in full
            precision even where the values are 8-bit integers.
    """

    __slots__ = ("bitmap", "edge", "offsets", "origin", "scales", "shape", "value_dtype", "values")

    shape: torch.Size
    value_dtype: str
    #: From what the values can be made again, for ops that keep them for backward; None where nothing is gained.
    origin: Origin | None

    def __init__(
        self,
        edge: Tensor,
        values: Tensor,
        scales: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        shape: tuple[int, ...] | torch.Size,
        value_dtype: str,
    ) -> None:
        self.edge = edge
        self.values = values
        self.scales = scales
        self.bitmap = bitmap
        self.offsets = offsets
        self.shape = torch.Size(shape)
        self.value_dtype = value_dtype
        self.origin = None

    @classmethod
    def of(cls, fields: Sequence[Tensor], shape: Sequence[int], value_dtype: str) -> PackedSpectrum:
        """From the five tensors that the packing ops return: edge, values, scales, bitmap, offsets."""
        edge, values, scales, bitmap, offsets = fields
        return cls(edge, values, scales, bitmap, offsets, tuple(shape), value_dtype)

    @staticmethod
    def bytes_for(shape: Sequence[int], density: float = 1.0, value_dtype: torch.dtype | str = torch.float32) -> int:
        """The most that maps packed with ``density=`` take, in bytes; :attr:`nbytes` of what is packed is no larger.

        It holds for finite coefficients: those that are not stay whatever the density.

        Args:
            shape: ``(B, C, H, W)`` of the maps.
            density: fraction of the coefficients to keep; 1 is the bound for any threshold, too.
            value_dtype: format of the kept values, see :func:`spectriton.ops.pack`.

        Raises:
            TypeError, ValueError: a density that is no fraction, no such format, or not the shape of maps.
        """
        op = "PackedSpectrum.bytes_for"
        if len(shape) != 4 or min(shape[:2]) < 0 or min(shape[2:]) < 1:
            fail(op, "shape", tuple(shape), "(B, C, H, W) of maps", "pass the shape of the maps, not of their spectrum")
        quarter = "pass 0.25 for a quarter of the coefficients"
        if check_threshold(op, density, "density", quarter) > 1:
            fail(op, "density", density, "a fraction from 0 to 1", quarter)
        name = value_dtype_name(op, value_dtype, torch.float32)
        return PackedSize(tuple(shape), most_kept(density, layout(tuple(shape))), name).nbytes

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Complex dtype of the spectrum: complex64, or complex128."""
        return torch.complex128 if self.edge.dtype == torch.float64 else torch.complex64

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return self.values.device

    @property
    def layout(self) -> Layout:
        """Sizes of rows and tiles."""
        return layout(self.shape)

    @property
    def kept(self) -> int:
        """Number of coefficients kept: ``N`` less room to spare, where there is any; a GPU is waited for then."""
        if torch.compiler.is_compiling():
            return self.values.shape[0]
        counts = counts_of(self.bitmap)
        return self.values.shape[0] if counts is None else counts.kept

    @property
    def density(self) -> float:
        """Kept coefficients over independent coefficients, from 0 to 1."""
        return self.packed_size.density

    @property
    def nbytes(self) -> int:
        """Bytes of storage: values, scales, bitmap and offsets."""
        return sum(t.untyped_storage().nbytes() for t in (self.values, self.scales, self.bitmap, self.offsets))

    @property
    def packed_size(self) -> PackedSize:
        """Shape, number of kept coefficients and value format, without the tensors."""
        return PackedSize(tuple(self.shape), self.kept, self.value_dtype)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same maps, dense and real, in the precision of :attr:`dtype`."""
        return self.shape.numel() * (self.dtype.itemsize // 2)

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow back through this spectrum."""
        return self.edge.requires_grad

    @property
    def ndim(self) -> int:
        """Always 4."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """``shape``, or one of its entries."""
        return self.shape if dim is None else self.shape[dim]

    def __repr__(self) -> str:
        gradient = ", requires_grad=True" if self.requires_grad else ""
        share = self.nbytes / max(1, self.dense_nbytes)
        return (
            f"PackedSpectrum(shape={tuple(self.shape)}, density={self.density:.3f}, "
            f"{_bytes(self.nbytes)} ({share:.1%} of dense), value_dtype={self.value_dtype}, "
            f"device='{self.device}'{gradient})"
        )

    # -- what can be done with it -------------------------------------------------------------------------------

    def to_dense(self) -> Tensor:
        """The half spectrum ``(B, C, H, W // 2 + 1)`` as of ``rfft2(norm="ortho")``, dropped coefficients zero.

        Differentiable. Conjugate columns are filled in, so ``torch.fft.irfft2(..., s=(H, W), norm="ortho")`` gives
        the maps.
        """
        # By name, not by import: the ops are built on this module.
        return torch.ops.spectriton.unpack(
            self.edge, self.values, self.scales, self.bitmap, self.offsets, list(self.shape)
        )

    def detach(self) -> PackedSpectrum:
        """The same packed data, cut off from the autograd graph."""
        return self._replace(edge=self.edge.detach())

    def requires_grad_(self, requires_grad: bool = True) -> PackedSpectrum:
        """Make this spectrum a leaf that gradients are collected for, in ``edge.grad``; returns it."""
        self.edge.requires_grad_(requires_grad)
        return self

    def to(self, *args: Any, **kwargs: Any) -> PackedSpectrum:
        """Move to a device. The value format is fixed when packing, so dtypes are refused.

        Args:
            *args, **kwargs: a device, and ``non_blocking``, as for :meth:`torch.Tensor.to`.

        Raises:
            TypeError: a dtype was given.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None:
            raise TypeError(
                f"PackedSpectrum.to: dtype got {dtype}, expected a device; "
                "choose the format when packing: ops.pack(..., value_dtype=...)"
            )
        if device is None or device == self.device:
            return self
        packed = self._without_spare_room()
        move = {
            name: getattr(packed, name).to(device, non_blocking=non_blocking)
            for name in ("edge", "values", "scales", "bitmap", "offsets")
        }
        return self._replace(**move)

    def cpu(self) -> PackedSpectrum:
        """Move to the CPU."""
        return self.to("cpu")

    def cuda(self, device: torch.device | int | str = "cuda") -> PackedSpectrum:
        """Move to a GPU."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device)

    def _without_spare_room(self) -> PackedSpectrum:
        kept = self.kept
        if kept == self.values.shape[0]:
            return self
        return self._replace(edge=self.edge[:kept], values=self.values[:kept].clone())

    def _replace(self, **changes: Tensor) -> PackedSpectrum:
        fields = {name: changes.get(name, getattr(self, name)) for name in self.__slots__ if name != "origin"}
        return PackedSpectrum(**fields)

    # -- pickling: plain tensors and a tuple, so that torch.load(weights_only=True) can read it -------------------

    def __getstate__(self) -> dict[str, Any]:
        # The edge is one element seen N times; its precision is all that has to be kept.
        return {
            "values": self._without_spare_room().values,
            "scales": self.scales,
            "bitmap": self.bitmap,
            "offsets": self.offsets,
            "shape": tuple(self.shape),
            "value_dtype": self.value_dtype,
            "double": self.edge.dtype == torch.float64,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        values = state["values"]
        precision = torch.float64 if state["double"] else torch.float32
        self.__init__(  # type: ignore[misc]
            make_edge(values.shape[0], precision, values.device),
            values,
            state["scales"],
            state["bitmap"],
            state["offsets"],
            state["shape"],
            state["value_dtype"],
        )


def value_dtype_name(op: str, value_dtype: torch.dtype | str | None, precision: torch.dtype) -> str:
    """The name of a value format given as a dtype, a name, or None for that of ``precision``.

    Raises:
        ValueError: no such format.
    """
    if value_dtype is None:
        value_dtype = precision
    name = str(value_dtype).removeprefix("torch.")
    return check_choice(op, "value_dtype", name, VALUE_DTYPES)


def make_edge(kept: int | torch.SymInt, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A differentiable ``(kept, 2)`` tensor with a single element of storage; see :class:`PackedSpectrum`."""
    return torch.zeros(1, dtype=dtype, device=device).expand(kept, 2)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


torch.serialization.add_safe_globals([PackedSpectrum])
