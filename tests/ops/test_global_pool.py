"""The mean of a map from its zero frequency, against the mean of the map."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from spectriton import PackedSpectrum, ops
from spectriton import nn as snn

SHAPES = [(2, 3, 8, 8), (1, 1, 1, 1), (3, 5, 7, 9), (2, 70, 4, 6), (1, 1, 5, 2), (5, 300, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [0.0, 1.0, float("inf")])
def test_equals_the_mean_in_space(shape: tuple[int, ...], threshold: float):
    x = torch.randn(shape, dtype=torch.float64)
    packed = ops.to_spectral(x, threshold=threshold).requires_grad_()
    got, expected = ops.global_avg_pool(packed), ops.to_spatial(packed).mean((2, 3))
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad(got, packed.edge, grad), torch.autograd.grad(expected, packed.edge, grad)
    )


@pytest.mark.parametrize("value_dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_every_format_of_values(value_dtype: str):
    packed = ops.to_spectral(torch.randn(6, 20, 5, 4), threshold=0.5, value_dtype=value_dtype)
    torch.testing.assert_close(ops.global_avg_pool(packed), ops.to_spatial(packed).mean((2, 3)))


def test_tiles_in_any_order():
    """As a GPU leaves them: offsets that do not ascend."""
    packed = ops.to_spectral(torch.randn(4, 40, 4, 4, dtype=torch.float64), threshold=0.0)
    expected = ops.global_avg_pool(packed)
    starts = packed.offsets.flatten().tolist()
    pieces = list(torch.tensor_split(packed.values, starts[1:]))
    order = list(reversed(range(len(pieces))))
    offsets, at = torch.zeros_like(packed.offsets).flatten(), 0
    for tile in order:
        offsets[tile], at = at, at + len(pieces[tile])
    values = torch.cat([pieces[tile] for tile in order])
    fields = (packed.edge, values, packed.scales, packed.bitmap, offsets.view_as(packed.offsets))
    shuffled = PackedSpectrum.of(fields, packed.shape, packed.value_dtype)
    torch.testing.assert_close(ops.global_avg_pool(shuffled), expected)


def test_gradients():
    def pooled(x: torch.Tensor) -> torch.Tensor:
        return ops.global_avg_pool(ops.to_spectral(x, threshold=0.3))

    assert gradcheck(pooled, torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True))


def test_opcheck():
    packed = ops.to_spectral(torch.randn(2, 3, 5, 4), threshold=0.3).requires_grad_()
    fields = (packed.edge, packed.values, packed.scales, packed.bitmap, packed.offsets, list(packed.shape))
    torch.library.opcheck(torch.ops.spectriton.global_avg_pool, fields)
    backward = (torch.randn(2, 3), packed.offsets, packed.kept, list(packed.shape))
    torch.library.opcheck(torch.ops.spectriton.global_avg_pool_backward, backward)


def test_an_empty_batch():
    assert ops.global_avg_pool(ops.to_spectral(torch.zeros(0, 3, 4, 4), threshold=0.0)).shape == (0, 3)


def test_module_joins_a_list_along_the_channels():
    parts = [ops.to_spectral(torch.randn(2, channels, 6, 6), threshold=0.2) for channels in (3, 1, 4)]
    pool = snn.GlobalAvgPool()
    torch.testing.assert_close(pool(parts), torch.cat([pool(part) for part in parts], 1))
    assert pool(tuple(parts)).shape == (2, 8)
    with pytest.raises(TypeError, match="expected a PackedSpectrum"):
        pool(torch.zeros(2, 3, 4, 4))
