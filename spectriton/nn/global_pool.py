"""Global pooling of packed spectra."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectriton import ops
from spectriton._check import fail
from spectriton.packed import PackedSpectrum


class GlobalAvgPool(nn.Module):
    """The mean of each map: packed ``(B, C, H, W)`` to ``(B, C)``.

    Equals ``ToSpatial()(packed).mean((2, 3))``, but reads the zero frequency only. A list of spectra stands for their
    concatenation along the channels.
    """

    def forward(self, packed: PackedSpectrum | Sequence[PackedSpectrum]) -> Tensor:
        if isinstance(packed, Sequence):
            _check_some("GlobalAvgPool", packed)
            return torch.cat([ops.global_avg_pool(part) for part in packed], 1)
        return ops.global_avg_pool(packed)


class GlobalMaxPool(nn.Module):
    """The maximum of each map: packed ``(B, C, H, W)`` to ``(B, C)``.

    Equals ``ToSpatial()(packed).amax((2, 3))``; maps are made a chunk at a time, and backward keeps where the maxima
    stood, one byte each up to 16x16. A list of spectra stands for their concatenation along the channels.

    Args:
        workspace: bound on temporaries in bytes.
    """

    def __init__(self, workspace: int | None = None) -> None:
        super().__init__()
        self.workspace = workspace

    def forward(self, packed: PackedSpectrum | Sequence[PackedSpectrum]) -> Tensor:
        if isinstance(packed, Sequence):
            _check_some("GlobalMaxPool", packed)
            return torch.cat([self(part) for part in packed], 1)
        window = [_largest_divisor(size) for size in packed.shape[2:]]
        maxima = ops.max_pool2d(packed, (window[0], window[1]), workspace=self.workspace)
        assert isinstance(maxima, Tensor)  # without a thresholding rule
        return maxima.amax((2, 3))


def _check_some(op: str, packed: Sequence[PackedSpectrum]) -> None:
    if not packed:
        fail(op, "packed", "an empty list", "at least one packed spectrum", "pass what the layers before it gave")


def _largest_divisor(size: int, most: int = 16) -> int:
    """The largest divisor of ``size`` that is at most ``most``: windows whose positions fit a byte."""
    return next(divisor for divisor in range(min(size, most), 0, -1) if size % divisor == 0)
