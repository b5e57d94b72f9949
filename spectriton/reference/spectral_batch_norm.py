"""Batch norm of dense half spectra, exact by Parseval's theorem; and as factors and shifts of channels and planes."""

from __future__ import annotations

import torch
from torch import Tensor


def spectral_batch_norm(
    spectrum: Tensor,
    size: tuple[int, int],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise half spectra ``(B, C, H, Wh)`` per channel, with statistics of the batch where none are given.

    Returns:
        The half spectra, and mean and biased variance ``(C,)`` of the maps by which they were normalised.
    """
    batch, _, height, half_width = spectrum.shape
    root = float((size[0] * size[1]) ** 0.5)
    zero = spectrum[:, :, 0, 0].real
    if mean is None or var is None:
        columns = torch.arange(half_width, device=spectrum.device)
        # Parseval over the whole spectrum: columns whose conjugates are not part of the half spectrum count twice.
        twice = ((columns > 0) & (2 * columns != size[1])).to(zero.dtype) + 1
        others = twice.repeat(height, 1)
        others[0, 0] = 0
        # The zero frequency enters by its deviation from the mean of the batch: no small difference of large sums.
        zero_mean = zero.sum(0) / max(1, batch)
        power = (torch.view_as_real(spectrum).square().sum(-1) * others).sum((0, 2, 3))
        mean = zero_mean / root
        var = (power + (zero - zero_mean).square().sum(0)) / max(1, batch * size[0] * size[1])
    mean, var = mean.to(zero.dtype), var.to(zero.dtype)
    factor = (var + eps).rsqrt()
    if weight is not None:
        factor = factor * weight.to(zero.dtype)
    out = spectrum * factor[:, None, None]
    shifted = (zero - mean * root) * factor
    if bias is not None:
        shifted = shifted + bias.to(zero.dtype) * root
    out[:, :, 0, 0] = shifted.to(out.dtype)
    return out, mean, var


def norm_factor(weight: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """``gamma / sigma`` ``(C,)``, float64."""
    inverse = (var.double() + eps).rsqrt()
    return inverse if weight is None else inverse * weight


def per_plane(per_channel: Tensor, batch: int) -> Tensor:
    """``(C,)`` to the planes ``(B * C,)``."""
    return per_channel.expand(batch, -1).reshape(-1)


def norm_planes(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, batch: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A batch norm as a factor and a shift for each plane, ``(B * C,)`` of ``dtype``.

    Args:
        weight, bias: ``(C,)`` or None, as of ``nn.BatchNorm2d``.
        mean, var: ``(C,)``, the variance biased.
        batch: B.
        eps: added to the variance.
        dtype: of the result; made in float64.
    """
    factor = norm_factor(weight, var, eps)
    shift = -mean.double() * factor if bias is None else bias - mean.double() * factor
    return per_plane(factor.to(dtype), batch), per_plane(shift.to(dtype), batch)
