"""The doors between maps and packed spectra."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spectriton import ops
from spectriton._counts import Counts, counts_of
from spectriton.packed import PackedSize, PackedSpectrum, value_dtype_name


class PackedOutput(nn.Module):
    """What layers share whose output is packed: the room that it takes, and the size of the last one.

    Attributes:
        last_density: fraction kept by the last forward pass, None before the first.
        last_packed: its size, a :class:`spectriton.packed.PackedSize`; None likewise. Asking for either waits for a GPU
            that has not counted yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self._room = ops.Room()
        self._last: tuple[tuple[int, ...], int | Counts, str] | None = None

    def _remember(self, out: PackedSpectrum) -> PackedSpectrum:
        counts = None if torch.compiler.is_compiling() else counts_of(out.bitmap)
        self._last = tuple(out.shape), out.kept if counts is None else counts, out.value_dtype
        return out

    def _last_size(self) -> PackedSize | None:
        if self._last is None:
            return None
        shape, kept, value_dtype = self._last
        return PackedSize(shape, kept.kept if isinstance(kept, Counts) else kept, value_dtype)

    @property
    def last_packed(self) -> PackedSize | None:
        return self._last_size()

    @property
    def last_density(self) -> float | None:
        size = self._last_size()
        return None if size is None else size.density


class PackingLayer(PackedOutput):
    """What layers share that pack what an op gives: thresholding rule, value format and workspace."""

    _default_threshold: float

    def __init__(
        self,
        threshold: float | None = None,
        density: float | None = None,
        value_dtype: torch.dtype | str | None = None,
        workspace: int | None = None,
    ) -> None:
        super().__init__()
        self.threshold, self.density = ops.thresholding_rule(
            type(self).__name__, threshold, density, default=self._default_threshold
        )
        self.value_dtype = checked_format(type(self).__name__, value_dtype)
        self.workspace = workspace

    def _packed_by(self, op: Callable[..., PackedSpectrum], x: Tensor | PackedSpectrum) -> PackedSpectrum:
        packed = ops.with_room(
            self._room,
            op,
            x,
            threshold=self.threshold,
            density=self.density,
            value_dtype=self.value_dtype,
            workspace=self.workspace,
        )
        return self._remember(packed)

    def extra_repr(self) -> str:
        return describe_rule(self.threshold, self.density, self.value_dtype)


def checked_format(op: str, value_dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    """A value format as it was given, None for that of the input.

    Raises:
        ValueError: no such format.
    """
    value_dtype_name(op, value_dtype, torch.float32)
    return value_dtype


class ToSpectral(PackingLayer):
    """Maps ``(B, C, H, W)`` to a :class:`~spectriton.PackedSpectrum`.

    Args:
        threshold: coefficients of the ortho spectrum whose modulus is below it are dropped.
        density: instead of a threshold, the fraction of coefficients to keep.
        value_dtype: format of the kept values, see :func:`spectriton.ops.pack`.
        workspace: bound on temporaries in bytes.

    Attributes:
        last_density: fraction kept by the last forward pass, None before the first.
        last_packed: its size, a :class:`spectriton.packed.PackedSize`; None likewise.
    """

    _default_threshold = 0.0

    def forward(self, x: Tensor) -> PackedSpectrum:
        return self._packed_by(ops.to_spectral, x)


class ToSpatial(nn.Module):
    """A :class:`~spectriton.PackedSpectrum` to maps ``(B, C, H, W)``; backward keeps the pattern only.

    Args:
        workspace: bound on temporaries in bytes.
    """

    def __init__(self, workspace: int | None = None) -> None:
        super().__init__()
        self.workspace = workspace

    def forward(self, packed: PackedSpectrum) -> Tensor:
        return ops.to_spatial(packed, workspace=self.workspace)


def describe_rule(threshold: float | None, density: float | None, value_dtype: torch.dtype | str | None) -> str:
    """The thresholding rule and the value format for a module's repr."""
    rule = f"threshold={threshold:g}" if density is None else f"density={density:g}"
    return rule if value_dtype is None else f"{rule}, value_dtype={str(value_dtype).removeprefix('torch.')}"
