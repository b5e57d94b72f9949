"""Modules of ``torch.nn`` that keep compressed maps for backward: same parameters, same results, less memory.

:func:`spectriton.compress` makes them of the modules of a network.
"""

from spectriton.nn.compressed._modules import (
    COMPRESSED,
    CompressedAdaptiveAvgPool2d,
    CompressedAvgPool2d,
    CompressedBatchNorm2d,
    CompressedConv2d,
    CompressedDropout,
    CompressedELU,
    CompressedGELU,
    CompressedHardswish,
    CompressedLeakyReLU,
    CompressedMaxPool2d,
    CompressedMish,
    CompressedReLU,
    CompressedReLU6,
    CompressedSiLU,
)

__all__ = [
    "COMPRESSED",
    "CompressedAdaptiveAvgPool2d",
    "CompressedAvgPool2d",
    "CompressedBatchNorm2d",
    "CompressedConv2d",
    "CompressedDropout",
    "CompressedELU",
    "CompressedGELU",
    "CompressedHardswish",
    "CompressedLeakyReLU",
    "CompressedMaxPool2d",
    "CompressedMish",
    "CompressedReLU",
    "CompressedReLU6",
    "CompressedSiLU",
]
