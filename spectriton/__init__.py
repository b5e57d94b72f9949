"""CNN training on sparse Fourier spectra: less memory for feature maps, for PyTorch.

Thresholds are moduli of the ortho-normalised spectrum (``torch.fft.rfft2(x, norm="ortho")``) throughout.
"""

from spectriton import memory, models, nn, ops
from spectriton.compression import compress, decompress
from spectriton.packed import PackedSpectrum

__version__ = "0.1.0"

__all__ = ["PackedSpectrum", "__version__", "compress", "decompress", "memory", "models", "nn", "ops"]
