"""Spectral pooling of dense half spectra: cropping to the low frequencies."""

from __future__ import annotations

import torch
from torch import Tensor


def spectral_pool2d(spectrum: Tensor, size: tuple[int, int], output_size: tuple[int, int]) -> Tensor:
    """Crop ortho half spectra ``(B, C, H, W // 2 + 1)`` of maps ``size`` to the frequencies of maps ``output_size``.

    Scaled by ``sqrt(h w / (H W))``, which keeps the mean of the maps. Where an even output size ``n`` is below the
    input's, its Nyquist coefficient is the mean of the two at ``+n / 2`` and ``-n / 2``.
    """
    (height, width), (h, w) = size, output_size
    columns = spectrum[..., : w // 2 + 1]
    low, negative = columns[..., : h // 2 + 1, :], columns[..., height - (h - 1) // 2 :, :]
    if h % 2 == 0 and h < height:
        opposite = columns[..., height - h // 2, :]
        nyquist = (low[..., -1, :] + opposite) / 2
        low = torch.cat([low[..., :-1, :], nyquist[..., None, :]], -2)
    out = torch.cat([low, negative], -2)
    if w % 2 == 0 and w < width:
        last = out[..., -1]
        opposite = last[..., -torch.arange(h, device=out.device) % h].conj()  # (ky, -w / 2), by symmetry
        out = torch.cat([out[..., :-1], ((last + opposite) / 2)[..., None]], -1)
    return out * (h * w / (height * width)) ** 0.5
