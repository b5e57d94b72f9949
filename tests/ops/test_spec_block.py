"""The packed block against a dense one convolved in space."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from spectriton import PackedSpectrum, ops
from tests import oracles

DOUBLE = torch.float64


def taps(outputs: int, inputs: int, kernel: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    weight = torch.randn(outputs, inputs, *kernel, dtype=DOUBLE, device=device) / kernel[0]
    return weight.requires_grad_(), torch.randn(outputs, dtype=DOUBLE, device=device, requires_grad=True)


def compare(got: Tensor, expected: Tensor, leaves: Sequence[Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    grad = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        ((2, 3, 8, 8), ((3, 3), (5, 5))),
        ((3, 2, 7, 5), ((5, 3), (1, 1))),
        ((1, 4, 6, 9), ((2, 4), (3, 3))),
        ((40, 2, 5, 6), ((3, 3), (3, 3))),
    ],
)
@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.parametrize("scaled", [False, True])
def test_chain_equals_dense_autograd(
    backend: str,
    device: torch.device,
    shape: tuple[int, int, int, int],
    kernels: tuple[tuple[int, int], tuple[int, int]],
    workspace: int | None,
    scaled: bool,
):
    if backend == "triton" and device.type == "cpu" and shape[0] == 40:
        pytest.skip("too slow in the interpreter; the same sizes run on a GPU")
    torch.manual_seed(sum(shape))
    x = torch.randn(shape, dtype=DOUBLE, device=device, requires_grad=True)
    w1, b1 = taps(4, shape[1], kernels[0], device)
    w2, b2 = taps(2, 4, kernels[1], device)
    scale = (torch.rand(4, dtype=DOUBLE, device=device) + 1).requires_grad_() if scaled else None
    size = shape[2:]

    packed = ops.to_spectral(x, threshold=0.5, workspace=workspace)
    packed = ops.spec_block(packed, w1, b1, threshold=1.0, activation_scale=scale, workspace=workspace)
    packed = ops.spec_block(packed, w2, b2, threshold=1.0, activation="softsign", workspace=workspace)
    got = ops.to_spatial(packed, workspace=workspace)
    assert 0.05 < packed.density < 1  # the threshold does something

    dense = oracles.masked(torch.fft.rfft2(x, norm="ortho"), 0.5)
    dense = oracles.block(dense, size, w1, b1, 1.0, "tanh", scale)
    dense = oracles.block(dense, size, w2, b2, 1.0, "softsign")
    expected = torch.fft.irfft2(dense, s=size, norm="ortho")
    compare(got, expected, [x, w1, b1, w2, b2] + ([scale] if scale is not None else []))


@pytest.mark.parametrize("activation", sorted(oracles.ACTIVATIONS))
@pytest.mark.parametrize("scaled", [False, True])
def test_every_activation(activation: str, scaled: bool):
    x = torch.randn(2, 3, 6, 5, dtype=DOUBLE, requires_grad=True)
    weight, bias = taps(4, 3, (3, 3), x.device)
    scale = (torch.rand(4, dtype=DOUBLE) + 0.5).requires_grad_() if scaled else None
    packed = ops.to_spectral(x, threshold=0.2)
    got = ops.to_spatial(
        ops.spec_block(packed, weight, bias, threshold=0.6, activation=activation, activation_scale=scale)
    )
    dense = oracles.masked(torch.fft.rfft2(x, norm="ortho"), 0.2)
    dense = oracles.block(dense, (6, 5), weight, bias, 0.6, activation, scale)
    leaves = [x, weight, bias] + ([scale] if scale is not None else [])
    compare(got, torch.fft.irfft2(dense, s=(6, 5), norm="ortho"), leaves)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_groups_and_no_bias(groups: int, with_bias: bool):
    x = torch.randn(2, 4, 6, 6, dtype=DOUBLE, requires_grad=True)
    weight, bias = taps(8, 4 // groups, (3, 3), x.device)
    used = bias if with_bias else None
    got = ops.to_spatial(ops.spec_block(ops.to_spectral(x, threshold=0.2), weight, used, threshold=0.6, groups=groups))
    dense = oracles.masked(torch.fft.rfft2(x, norm="ortho"), 0.2)
    dense = oracles.block(dense, (6, 6), weight, used, 0.6, "tanh", groups=groups)
    compare(got, torch.fft.irfft2(dense, s=(6, 6), norm="ortho"), [x, weight] + ([bias] if with_bias else []))


def test_threshold_zero_keeps_all_even_where_nothing_comes_in():
    x = torch.zeros(1, 2, 4, 4)
    packed = ops.to_spectral(x, threshold=1.0)
    assert packed.density < 1
    out = ops.spec_block(packed, torch.randn(3, 2, 3, 3), torch.randn(3), threshold=0.0)
    assert out.density == 1.0


def test_single_precision_agrees_to_rounding():
    x = torch.randn(8, 6, 12, 12, requires_grad=True)
    weight, bias = torch.randn(10, 6, 3, 3, requires_grad=True), torch.randn(10, requires_grad=True)
    got = ops.to_spatial(ops.spec_block(ops.to_spectral(x, threshold=0.0), weight, bias, threshold=0.0))
    dense = oracles.block(
        torch.fft.rfft2(x.double(), norm="ortho"), (12, 12), weight.double(), bias.double(), 0.0, "tanh"
    )
    expected = torch.fft.irfft2(dense, s=(12, 12), norm="ortho")
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)


def test_density_rule():
    x = torch.randn(16, 8, 16, 16)
    weight = torch.randn(12, 8, 3, 3) / 6
    out = ops.spec_block(ops.to_spectral(x, threshold=0.0), weight, density=0.3)
    assert out.density == pytest.approx(0.3, abs=0.01)
    everything = ops.spec_block(ops.to_spectral(x, threshold=0.0), weight, threshold=0.0).to_dense().abs()
    kept = out.to_dense() != 0
    kept[..., 0, 0] = everything[..., 0, 0] < -1
    assert everything[kept].min() >= everything[~kept & (everything > 0)].quantile(0.5)


@pytest.mark.parametrize("value_dtype", ["float16", "bfloat16", "int8", "int4"])
def test_value_formats_round_forward_only(value_dtype: str):
    x = torch.randn(4, 3, 8, 8)
    weight = torch.randn(5, 3, 3, 3, requires_grad=True)
    exact = ops.spec_block(ops.to_spectral(x, threshold=0.2), weight, threshold=0.5)
    rounded = ops.spec_block(ops.to_spectral(x, threshold=0.2), weight, threshold=0.5, value_dtype=value_dtype)
    assert torch.equal(rounded.bitmap, exact.bitmap)
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3, "int8": 8e-3, "int4": 0.15}[value_dtype]
    torch.testing.assert_close(rounded.to_dense(), exact.to_dense(), rtol=0, atol=tolerance)
    assert rounded.edge.dtype == torch.float32
    ops.to_spatial(rounded).square().sum().backward()
    assert weight.grad is not None and torch.isfinite(weight.grad).all()


def test_nan_and_inf_go_through():
    x = torch.randn(2, 3, 6, 6)
    x[1, 0, 2, 2] = float("nan")
    weight = torch.randn(4, 3, 3, 3)
    y = ops.to_spatial(ops.spec_block(ops.to_spectral(x, threshold=0.5), weight, threshold=0.5))
    assert torch.isnan(y[1]).all()
    assert torch.isfinite(y[0]).all()


def test_gradcheck(backend: str, device: torch.device):
    x = torch.randn(1, 2, 4, 3, dtype=DOUBLE, device=device, requires_grad=True)
    weight, bias = taps(2, 2, (3, 3), device)
    scale = (torch.rand(2, dtype=DOUBLE, device=device) + 1).requires_grad_()

    def network(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        packed = ops.to_spectral(x, threshold=0.3)
        return ops.to_spatial(ops.spec_block(packed, weight, bias, threshold=0.4, activation_scale=scale))

    assert gradcheck(network, (x, weight, bias, scale), fast_mode=backend == "triton")


def test_opcheck():
    packed = ops.to_spectral(torch.randn(2, 3, 5, 6, dtype=DOUBLE), threshold=0.5).requires_grad_()
    weight, bias = taps(4, 3, (3, 3), packed.device)
    scale = (torch.rand(4, dtype=DOUBLE) + 0.5).requires_grad_()
    fields = ([t] for t in (packed.edge, packed.values, packed.scales, packed.bitmap, packed.offsets))
    convolution = ([2, 5, 6], [3], [1, 1], [1, 1], 1, "tanh", 0)
    torch.library.opcheck(
        torch.ops.spectriton.spec_block.default,
        (*fields, weight, bias, scale, *convolution, 0.5, -1.0, "float64", None, [], [""], [0.0]),
    )


def test_gradients_of_taps_are_contiguous(backend: str, device: torch.device):
    """As the fake of the op says: what inductor compiles relies on it."""
    weight, bias = taps(4, 3, (3, 3), device)
    packed = ops.to_spectral(torch.randn(1, 3, 4, 5, dtype=DOUBLE, device=device), threshold=0.5)
    y = ops.to_spatial(ops.spec_block(packed, weight, bias, threshold=0.5))
    assert torch.autograd.grad(y.sum(), weight)[0].is_contiguous()


def circular_convolution(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int], dilation: tuple[int, int],
                         groups: int = 1) -> Tensor:  # fmt: skip
    """In space: wrapped around, with taps apart by ``dilation``, taken at every ``stride``-th position."""
    padding = []
    for taps_, step in zip(weight.shape[:1:-1], dilation[::-1], strict=True):
        padding += [step * (taps_ - 1) // 2, step * (taps_ - 1) - step * (taps_ - 1) // 2]
    wrapped = torch.nn.functional.pad(x, padding, mode="circular")
    return torch.nn.functional.conv2d(wrapped, weight, bias, stride, 0, dilation, groups)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "groups"),
    [
        ((8, 8), (3, 3), (2, 2), (1, 1), 1),
        ((6, 10), (3, 5), (2, 1), (1, 1), 2),
        ((12, 12), (11, 11), (4, 4), (1, 1), 1),
        ((9, 6), (3, 2), (3, 2), (1, 1), 1),
        ((7, 8), (3, 3), (1, 1), (2, 3), 1),
        ((8, 8), (3, 3), (2, 2), (1, 2), 4),
        ((4, 4), (3, 3), (4, 4), (1, 1), 1),
    ],
)
def test_stride_and_dilation(
    backend: str,
    device: torch.device,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
):
    """Against the convolution in space, forward and gradients; chunks of a few frequencies."""
    x = torch.randn(2, 4, *size, dtype=DOUBLE, device=device, requires_grad=True)
    weight = torch.randn(8, 4 // groups, *kernel, dtype=DOUBLE, device=device, requires_grad=True)
    bias = torch.randn(8, dtype=DOUBLE, device=device, requires_grad=True)
    expected = circular_convolution(x, weight, bias, stride, dilation, groups)
    packed = ops.to_spectral(x, threshold=0.0)
    out = ops.spec_block(
        packed, weight, bias, stride=stride, dilation=dilation, groups=groups, threshold=0.0, activation="identity",
        workspace=4096,
    )  # fmt: skip
    got = ops.to_spatial(out)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(got)
    leaves = (x, weight, bias)
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
def test_several_inputs_are_concatenated_channels(backend: str, device: torch.device, stride: int):
    parts = [torch.randn(3, c, 6, 8, dtype=DOUBLE, device=device, requires_grad=True) for c in (2, 5, 1)]
    weight, bias = taps(4, 8, (3, 3), device)
    packed = [ops.to_spectral(x, threshold=0.8) for x in parts]
    settings = {"stride": stride, "threshold": 0.7, "workspace": 4096}
    got = ops.to_spatial(ops.spec_block(packed, weight, bias, **settings))
    dense = torch.cat([ops.to_spatial(p) for p in packed], 1)
    expected = ops.to_spatial(ops.spec_block(ops.to_spectral(dense, threshold=0.0), weight, bias, **settings))
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(got)
    leaves = (*parts, weight, bias)
    torch.testing.assert_close(*(torch.autograd.grad(y, leaves, grad, retain_graph=True) for y in (got, expected)))


def test_inputs_that_do_not_fit_are_refused():
    small, large = (ops.to_spectral(torch.randn(2, 3, n, n), threshold=0.5) for n in (4, 6))
    weight = torch.randn(4, 6, 3, 3)
    with pytest.raises(ValueError, match="maps of 4x4"):
        ops.spec_block([small, large], weight, threshold=0.5)
    with pytest.raises(ValueError, match="groups"):
        ops.spec_block([small, small], torch.randn(4, 3, 3, 3), threshold=0.5, groups=2)
    with pytest.raises(ValueError, match="at least one"):
        ops.spec_block([], weight, threshold=0.5)
    with pytest.raises(ValueError, match="a divisor of the 4x4 maps"):
        ops.spec_block(small, weight[:, :3], threshold=0.5, stride=3)
    with pytest.raises(ValueError, match="dilation"):
        ops.spec_block(small, weight[:, :3], threshold=0.5, dilation=0)


def test_block_saves_packed_data_and_parameters_only():
    """Input and output of a block, each once; the output is the next one's input."""
    saved: dict[int, Tensor] = {}

    def record(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor.detach()

    weights = [torch.randn(8, 8, 3, 3, requires_grad=True) for _ in range(3)]
    packed: PackedSpectrum = ops.to_spectral(torch.randn(16, 8, 16, 16), threshold=1.0)
    chain = [packed]
    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
        for weight in weights:
            chain.append(ops.spec_block(chain[-1], weight, threshold=1.0))
    allowed = {w.untyped_storage().data_ptr(): 0 for w in weights}
    for p in chain:
        for tensor in (p.values, p.bitmap, p.offsets, p.scales):
            allowed[tensor.untyped_storage().data_ptr()] = 0
    assert set(saved) <= set(allowed)
    total = sum(t.untyped_storage().nbytes() for t in saved.values() if not t.requires_grad)
    assert total == sum(p.nbytes for p in chain)


BAD = [
    (lambda p, w: ops.spec_block(torch.zeros(1, 3, 4, 4), w, threshold=0.5), TypeError, "expected a PackedSpectrum"),
    (lambda p, w: ops.spec_block(p, w[:, :2], threshold=0.5), ValueError, "input got 3 channels, expected 2"),
    (lambda p, w: ops.spec_block(p, w[0], threshold=0.5), ValueError, "4 dimensions"),
    (lambda p, w: ops.spec_block(p, w.to(torch.complex64), threshold=0.5), TypeError, "real taps"),
    (lambda p, w: ops.spec_block(p, w, torch.zeros(7), threshold=0.5), ValueError, r"bias got .*expected shape \(4,\)"),
    (lambda p, w: ops.spec_block(p, w, threshold=-1), ValueError, "not negative"),
    (lambda p, w: ops.spec_block(p, w, threshold=float("nan")), ValueError, "nan"),
    (lambda p, w: ops.spec_block(p, w), ValueError, "got neither"),
    (lambda p, w: ops.spec_block(p, w, threshold=1, activation="relu"), ValueError, "activation got 'relu'"),
    (lambda p, w: ops.spec_block(p, w, threshold=1, groups=3), ValueError, "divisor of the 4 output channels"),
    (lambda p, w: ops.spec_block(p, w, threshold=1, activation_scale=torch.ones(3)), ValueError, "per output channel"),
    (lambda p, w: ops.spec_block(p, w, threshold=1, value_dtype=torch.int32), ValueError, "value_dtype got 'int32'"),
]


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_bad_input(call, kind: type[Exception], text: str):
    packed = ops.to_spectral(torch.randn(1, 3, 4, 4), threshold=0.5)
    with pytest.raises(kind, match=text):
        call(packed, torch.randn(4, 3, 3, 3))


def test_threshold_scale_sets_the_threshold_of_each_channel(backend: str, device: torch.device):
    packed = ops.to_spectral(torch.randn(4, 3, 6, 6, dtype=DOUBLE, device=device), threshold=0.3)
    weight, bias = taps(2, 3, (3, 3), device)
    scale = torch.tensor([0.5, 2.0], dtype=DOUBLE, device=device)
    both = ops.spec_block(packed, weight, bias, threshold=1.0, threshold_scale=scale).to_dense()
    for channel in range(2):
        alone = ops.spec_block(packed, weight, bias, threshold=float(scale[channel])).to_dense()
        torch.testing.assert_close(both[:, channel], alone[:, channel])
