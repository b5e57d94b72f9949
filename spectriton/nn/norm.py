"""Batch norm of spectra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spectriton import ops
from spectriton._plans import in_backward
from spectriton.packed import PackedSpectrum


def computed_again() -> bool:
    """Whether this forward pass is part of a backward pass, as gradient checkpointing has it."""
    return not torch.compiler.is_compiling() and in_backward()


class SpectralBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` of the maps behind a spectrum, exact; same parameters, buffers and ``state_dict``.

    The mean is the zero frequency's, the variance the energy of the others (Parseval). Of a thresholded spectrum the
    statistics are those of the maps that it stands for. Under gradient checkpointing each batch counts once.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as for ``nn.BatchNorm2d``.
        workspace: bound on temporaries in bytes, for packed spectra.

    Shapes: packed ``(B, C, H, W)`` to packed in the same pattern and value format, or dense ortho half spectra
    ``(B, C, H, W // 2 + 1)`` to dense ones.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        workspace: int | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.workspace = workspace

    def forward(  # type: ignore[override]
        self,
        input: PackedSpectrum | Tensor,
        size: tuple[int, int] | None = None,
        activation: str = "identity",
        activation_scale: Tensor | None = None,
        relu: dict[str, Any] | None = None,
    ) -> PackedSpectrum | Tensor:
        """Normalise; ``size`` is ``(H, W)`` of the maps behind half spectra, by default ``(H, 2 (Wh - 1))``.

        An activation may follow in the same pass, see :func:`spectriton.ops.spectral_activation`; or ReLU in space, by
        the keywords of :func:`spectriton.ops.spatial_relu`.
        """
        options = {"activation": activation, "activation_scale": activation_scale, "size": size}
        if relu is not None:
            options = relu
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        update = self.training and self.track_running_stats and not computed_again()
        if update and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean over all batches so far; on its device, so nothing waits for it
                momentum = self.num_batches_tracked.double().reciprocal()
        tracked = update or not self.training
        op: Callable[..., Any] = ops.spectral_batch_norm if relu is None else ops.batch_norm_relu
        out, mean, var = op(
            input,
            self.weight,
            self.bias,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.training or self.running_mean is None,
            momentum,
            self.eps,
            workspace=self.workspace,
            **options,
        )
        for buffer, new in ((self.running_mean, mean), (self.running_var, var)):
            if update and buffer is not None and new is not None:
                buffer.copy_(new)
        maps: PackedSpectrum | Tensor = out
        return maps
