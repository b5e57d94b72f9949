"""Trainable layers. Parameters are real taps with the names and shapes of ``torch.nn``, so state dicts interchange."""

from spectriton.nn.activation import SpatialReLU, SpectralActivation
from spectriton.nn.block import SpecBlock
from spectriton.nn.conv import SpectralConv2d
from spectriton.nn.global_pool import GlobalAvgPool, GlobalMaxPool
from spectriton.nn.norm import SpectralBatchNorm2d
from spectriton.nn.pool import AvgPool2d, MaxPool2d
from spectriton.nn.spectral_pool import SpectralPool2d
from spectriton.nn.transform import ToSpatial, ToSpectral

__all__ = [
    "AvgPool2d",
    "GlobalAvgPool",
    "GlobalMaxPool",
    "MaxPool2d",
    "SpatialReLU",
    "SpecBlock",
    "SpectralActivation",
    "SpectralBatchNorm2d",
    "SpectralConv2d",
    "SpectralPool2d",
    "ToSpatial",
    "ToSpectral",
]
