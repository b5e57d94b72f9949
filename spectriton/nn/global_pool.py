"""Global average pooling of packed spectra."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectriton import ops
from spectriton.packed import PackedSpectrum


class GlobalAvgPool(nn.Module):
    """The mean of each map: packed ``(B, C, H, W)`` to ``(B, C)``.

    Equals ``ToSpatial()(packed).mean((2, 3))``, but reads the zero frequency only. A list of spectra stands for their
    concatenation along the channels.
    """

    def forward(self, packed: PackedSpectrum | Sequence[PackedSpectrum]) -> Tensor:
        if isinstance(packed, Sequence):
            return torch.cat([ops.global_avg_pool(part) for part in packed], 1)
        return ops.global_avg_pool(packed)
