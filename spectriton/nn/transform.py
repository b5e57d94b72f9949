"""The doors between maps and packed spectra."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spectriton import ops
from spectriton.packed import PackedSize, PackedSpectrum


class PackingLayer(nn.Module):
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
        self.value_dtype = value_dtype
        self.workspace = workspace
        self.last_density: float | None = None
        self.last_packed: PackedSize | None = None

    def _packed_by(self, op: Callable[..., PackedSpectrum], x: Tensor | PackedSpectrum) -> PackedSpectrum:
        packed = op(
            x,
            threshold=self.threshold,
            density=self.density,
            value_dtype=self.value_dtype,
            workspace=self.workspace,
        )
        self.last_density, self.last_packed = packed.density, packed.packed_size
        return packed

    def extra_repr(self) -> str:
        return describe_rule(self.threshold, self.density, self.value_dtype)


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
