"""Convolution through the Fourier domain against nn.Conv2d."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from spectriton import ops
from tests import oracles

DOUBLE = torch.float64


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (7, 7), (3, 5), (2, 4), (6, 1)])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (10, 7)])
@pytest.mark.parametrize("padding_mode", ["circular", "zeros"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_convolution_in_space(kernel: tuple[int, int], size: tuple[int, int], padding_mode: str, groups: int):
    x = torch.randn(2, 4, *size, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(8, 4 // groups, *kernel, dtype=DOUBLE, requires_grad=True)
    bias = torch.randn(8, dtype=DOUBLE, requires_grad=True)
    for stride in (1, (2, 3)):
        steps = (stride, stride) if isinstance(stride, int) else stride
        got = ops.spectral_conv2d(x, weight, bias, stride, padding_mode, groups, workspace=4096)
        expected = oracles.same_conv2d(x, weight, bias, groups, padding_mode)[:, :, :: steps[0], :: steps[1]]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
        grad = torch.randn_like(got)
        for a, b in zip(
            torch.autograd.grad(got, (x, weight, bias), grad),
            torch.autograd.grad(expected, (x, weight, bias), grad),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("padding_mode", ["circular", "zeros"])
def test_strided_odd_kernels_equal_the_module(padding_mode: str):
    conv = torch.nn.Conv2d(3, 5, 5, stride=2, padding=2, padding_mode=padding_mode).double()
    x = torch.randn(2, 3, 11, 8, dtype=DOUBLE)
    got = ops.spectral_conv2d(x, conv.weight, conv.bias, 2, padding_mode)
    torch.testing.assert_close(got, conv(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3), 2), ((5, 3), (1, 3)), ((2, 4), (3, 2)), ((3, 2), (3, 1))])
@pytest.mark.parametrize("size", [(11, 12), (13, 11)])
@pytest.mark.parametrize("padding_mode", ["circular", "zeros"])
@pytest.mark.parametrize("groups", [1, 4])
def test_dilation(
    kernel: tuple[int, int], dilation: int | tuple[int, int], size: tuple[int, int], padding_mode: str, groups: int
):
    conv = torch.nn.Conv2d(4, 8, kernel, padding="same", dilation=dilation, padding_mode=padding_mode, groups=groups)
    conv = conv.double()
    x = torch.randn(2, 4, *size, dtype=DOUBLE, requires_grad=True)
    got = ops.spectral_conv2d(x, conv.weight, conv.bias, 1, padding_mode, groups, dilation=dilation)
    expected = conv(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    grad = torch.randn_like(got)
    inputs = (x, *conv.parameters())
    for a, b in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_kernel_larger_than_the_maps_with_zeros():
    x, weight = torch.randn(1, 2, 3, 4, dtype=DOUBLE), torch.randn(3, 2, 7, 9, dtype=DOUBLE)
    got = ops.spectral_conv2d(x, weight, padding_mode="zeros")
    torch.testing.assert_close(got, oracles.same_conv2d(x, weight, None, 1, "zeros"), rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["channels_last", "sliced", "batch_of_one", "one_pixel"])
def test_strides_and_small_sizes(case: str):
    x = {
        "channels_last": torch.randn(2, 3, 6, 6, dtype=DOUBLE).to(memory_format=torch.channels_last),
        "sliced": torch.randn(2, 6, 6, 12, dtype=DOUBLE)[:, ::2, :, ::2],
        "batch_of_one": torch.randn(1, 3, 6, 6, dtype=DOUBLE),
        "one_pixel": torch.randn(2, 3, 1, 1, dtype=DOUBLE),
    }[case]
    weight = torch.randn(4, 3, 1, 1, dtype=DOUBLE) if case == "one_pixel" else torch.randn(4, 3, 3, 3, dtype=DOUBLE)
    for mode in ("circular", "zeros"):
        got = ops.spectral_conv2d(x, weight, padding_mode=mode)
        torch.testing.assert_close(got, oracles.same_conv2d(x, weight, None, 1, mode), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_of_the_maps_is_kept(dtype: torch.dtype):
    x, weight = torch.randn(2, 3, 8, 8).to(dtype), torch.randn(4, 3, 3, 3)
    got = ops.spectral_conv2d(x, weight)
    assert got.dtype == dtype and got.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(got.float(), oracles.same_conv2d(x.float(), weight, None, 1), rtol=0, atol=tolerance)


def test_backends_agree(backend: str, device: torch.device):
    x = torch.randn(2, 4, 5, 6, dtype=DOUBLE, device=device, requires_grad=True)
    weight = torch.randn(4, 2, 3, 3, dtype=DOUBLE, device=device, requires_grad=True)
    got = ops.spectral_conv2d(x, weight, groups=2)
    expected = oracles.same_conv2d(x, weight, None, 2)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), (x, weight)),
        torch.autograd.grad(expected.square().sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_gradcheck_and_opcheck():
    x = torch.randn(1, 2, 4, 5, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, dtype=DOUBLE, requires_grad=True)
    bias = torch.randn(2, dtype=DOUBLE, requires_grad=True)
    assert gradcheck(lambda *t: ops.spectral_conv2d(*t, stride=2, padding_mode="zeros"), (x, weight, bias))
    torch.library.opcheck(
        torch.ops.spectriton.spectral_conv2d.default, (x, weight, bias, [1, 2], [1, 1], "circular", 1, 0)
    )


@pytest.mark.parametrize("padding_mode", ["circular", "zeros"])
def test_empty_batch(padding_mode: str):
    x = torch.zeros(0, 3, 4, 5, requires_grad=True)
    weight = torch.ones(2, 3, 3, 3, requires_grad=True)
    y = ops.spectral_conv2d(x, weight, padding_mode=padding_mode)
    assert y.shape == (0, 2, 4, 5)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and not weight.grad.any()


def test_saves_maps_and_taps_only():
    saved = []
    x, weight = torch.randn(2, 3, 16, 16, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.spectral_conv2d(x, weight)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"x": torch.zeros(3, 8, 8)}, ValueError, "4 dimensions"),
        ({"x": torch.zeros(1, 2, 8, 8)}, ValueError, "input got 2 channels, expected 3"),
        ({"x": torch.zeros(1, 3, 8, 8, dtype=torch.cfloat)}, TypeError, "irfft2"),
        ({"x": torch.zeros(1, 3, 2, 8)}, ValueError, "padding_mode='zeros'"),
        ({"stride": 0}, ValueError, "stride got 0"),
        ({"stride": (1, 2, 3)}, ValueError, "two of them"),
        ({"padding_mode": "reflect"}, ValueError, "padding_mode got 'reflect'"),
        ({"groups": 3}, ValueError, "divisor of the 4"),
        ({"workspace": -1}, ValueError, "workspace"),
        ({"stride": None}, ValueError, "stride got None"),
        ({"bias": [0.0] * 4}, TypeError, "bias got"),
        ({"bias": torch.zeros(4, dtype=torch.cfloat)}, TypeError, "bias got a complex64"),
        ({"weight": torch.zeros(0, 3, 3, 3)}, ValueError, "weight got"),
        ({"weight": torch.zeros(4, 3, 3, 3).tolist()}, TypeError, "weight got a value of type list"),
    ],
)
def test_bad_input(change: dict[str, object], kind: type[Exception], text: str):
    arguments = {"x": torch.zeros(1, 3, 8, 8), "weight": torch.zeros(4, 3, 3, 3), **change}
    with pytest.raises(kind, match=text):
        ops.spectral_conv2d(**arguments)
