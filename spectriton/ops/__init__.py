"""Differentiable operations on spectra: custom ops that pick the Triton kernels or the plain PyTorch reference."""

from spectriton.ops._arguments import (
    check_activation,
    check_output_size,
    check_padding_mode,
    check_pair,
    check_stride,
    check_window,
    thresholding_rule,
)
from spectriton.ops._room import PackingOverflow, Room, deferred_packing, run_ahead, with_room
from spectriton.ops.channel_mix import channel_mix
from spectriton.ops.complex_product import complex_product
from spectriton.ops.global_pool import global_avg_pool
from spectriton.ops.kernel_spectrum import kernel_spectrum
from spectriton.ops.pack import pack, to_spatial, to_spectral, unpack
from spectriton.ops.pool2d import avg_pool2d, max_pool2d
from spectriton.ops.spatial_relu import batch_norm_relu, spatial_relu
from spectriton.ops.spec_block import spec_block
from spectriton.ops.spectral_activation import spectral_activation
from spectriton.ops.spectral_batch_norm import spectral_batch_norm
from spectriton.ops.spectral_conv2d import spectral_conv2d
from spectriton.ops.spectral_pool2d import spectral_pool2d
from spectriton.reference import ACTIVATIONS

__all__ = [
    "ACTIVATIONS",
    "PackingOverflow",
    "Room",
    "avg_pool2d",
    "batch_norm_relu",
    "channel_mix",
    "check_activation",
    "check_output_size",
    "check_padding_mode",
    "check_pair",
    "check_stride",
    "check_window",
    "complex_product",
    "deferred_packing",
    "global_avg_pool",
    "kernel_spectrum",
    "max_pool2d",
    "pack",
    "run_ahead",
    "spatial_relu",
    "spec_block",
    "spectral_activation",
    "spectral_batch_norm",
    "spectral_conv2d",
    "spectral_pool2d",
    "thresholding_rule",
    "to_spatial",
    "to_spectral",
    "unpack",
    "with_room",
]
