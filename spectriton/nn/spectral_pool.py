"""Pooling of spectra."""

from __future__ import annotations

from torch import Tensor, nn

from spectriton import ops
from spectriton.packed import PackedSpectrum


class SpectralPool2d(nn.Module):
    """Smaller maps by cropping their spectra (Rippel et al. 2015, arXiv 1506.03767).

    Keeps the mean of each map, and of its frequencies all that the smaller map has. A drop-in for ``nn.AvgPool2d`` on
    maps, too. See :func:`spectriton.ops.spectral_pool2d` for what happens at the Nyquist frequencies.

    Args:
        kernel_size: by how much smaller, one number or two; sizes are rounded down, as by ``nn.MaxPool2d``.
        output_size: instead, the size of the output.
        workspace: bound on temporaries in bytes, for packed spectra and maps.

    Shapes: packed ``(B, C, H, W)`` to packed ``(B, C, h, w)``, real maps to real maps, or dense ortho half spectra
    ``(B, C, H, W // 2 + 1)`` to ``(B, C, h, w // 2 + 1)``.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int] = 2,
        *,
        output_size: int | tuple[int, int] | None = None,
        workspace: int | None = None,
    ) -> None:
        super().__init__()
        kernel, _ = ops.check_window("SpectralPool2d", kernel_size, None)
        self.kernel_size = (kernel[0], kernel[1])
        self.output_size = None if output_size is None else ops.check_output_size("SpectralPool2d", output_size)
        self.workspace = workspace

    def forward(self, input: PackedSpectrum | Tensor, size: tuple[int, int] | None = None) -> PackedSpectrum | Tensor:
        """Pool; ``size`` is ``(H, W)`` of the maps behind half spectra, by default ``(H, 2 (Wh - 1))``."""
        return ops.spectral_pool2d(
            input, self.kernel_size, output_size=self.output_size, size=size, workspace=self.workspace
        )

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}" if self.output_size is None else f"output_size={self.output_size}"
