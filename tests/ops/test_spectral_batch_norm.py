"""Batch norm of spectra against torch's batch norm of the maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from spectriton import PackedSpectrum, ops
from spectriton.ops.spectral_batch_norm import remake
from tests import oracles
from tests.ops.test_workspace import allocations

DOUBLE = torch.float64
SHAPES = [(4, 3, 8, 8), (3, 2, 7, 5), (1, 4, 6, 9), (40, 2, 4, 6), (5, 2, 1, 1), (2, 1, 1, 4)]


def parameters(channels: int, device: torch.device, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    """Weight, bias, running mean and running variance."""
    weight, bias, mean = (torch.randn(channels, dtype=dtype, device=device) for _ in range(3))
    return [
        weight.requires_grad_(),
        bias.requires_grad_(),
        mean,
        torch.rand(channels, dtype=dtype, device=device) + 0.5,
    ]


def maps(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = DOUBLE) -> Tensor:
    return (2 * torch.randn(shape, dtype=dtype, device=device) + 3).requires_grad_()


def compare(got: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    grad = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# The last two: as many chunks as there are frequencies.
@pytest.mark.parametrize(
    ("shape", "workspace"), [*((shape, None) for shape in SHAPES), ((2, 3, 3, 4), 1), ((9, 5, 5, 4), 1)]
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_equals_batch_norm_of_the_maps(
    backend: str,
    device: torch.device,
    shape: tuple[int, int, int, int],
    workspace: int | None,
    training: bool,
    threshold: float,
):
    if backend == "triton" and device.type == "cpu" and shape[0] * shape[1] > 12:
        pytest.skip("too slow in the interpreter; the same sizes run on a GPU")
    x, (weight, bias, mean, var) = maps(shape, device), parameters(shape[1], device)
    packed = ops.to_spectral(x, threshold=threshold, workspace=workspace)
    out, new_mean, new_var = ops.spectral_batch_norm(
        packed, weight, bias, mean, var, training, 0.3, 1e-3, workspace=workspace
    )
    assert out.bitmap is packed.bitmap and out.offsets is packed.offsets

    kept = torch.fft.irfft2(oracles.masked(oracles.half_spectrum(x), threshold), s=shape[2:], norm="ortho")
    expected_mean, expected_var = mean.clone(), var.clone()
    expected = F.batch_norm(kept, expected_mean, expected_var, weight, bias, training, 0.3, 1e-3)
    compare(ops.to_spatial(out), expected, [x, weight, bias])
    torch.testing.assert_close(new_mean, expected_mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(new_var, expected_var, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_dense_half_spectra(shape: tuple[int, int, int, int], training: bool):
    x, (weight, bias, mean, var) = maps(shape, torch.device("cpu")), parameters(shape[1], torch.device("cpu"))
    size = None if shape[3] % 2 == 0 or shape[3] == 1 else shape[2:]
    out, new_mean, new_var = ops.spectral_batch_norm(
        torch.fft.rfft2(x, norm="ortho"), weight, bias, mean, var, training, size=size
    )
    expected_mean, expected_var = mean.clone(), var.clone()
    expected = F.batch_norm(x, expected_mean, expected_var, weight, bias, training)
    compare(torch.fft.irfft2(out, s=shape[2:], norm="ortho"), expected, [x, weight, bias])
    torch.testing.assert_close(new_mean, expected_mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(new_var, expected_var, rtol=0, atol=1e-10)


def test_gradcheck_of_dense_half_spectra():
    x, (weight, bias, _, _) = maps((2, 2, 3, 4), torch.device("cpu")), parameters(2, torch.device("cpu"))
    spectrum = torch.fft.rfft2(x, norm="ortho").detach().requires_grad_()
    assert gradcheck(lambda *t: ops.spectral_batch_norm(*t, training=True)[0], (spectrum, weight, bias))


def test_without_affine_and_running_statistics(backend: str, device: torch.device):
    x = maps((3, 2, 4, 5), device)
    out, mean, var = ops.spectral_batch_norm(ops.to_spectral(x, threshold=0.0), training=True)
    assert mean is None and var is None
    compare(ops.to_spatial(out), F.batch_norm(x, None, None, training=True), [x])


def test_gradient_is_that_of_the_stored_coefficients():
    """Stored coefficients are independent variables: moving one moves its conjugate, which is not stored, with it."""
    packed = ops.to_spectral(maps((2, 2, 4, 5), torch.device("cpu")).detach(), threshold=2.0).requires_grad_()
    weight, bias, _, _ = parameters(2, packed.device)
    towards = torch.randn(2, 2, 4, 5, dtype=DOUBLE)

    def loss(values: Tensor) -> Tensor:
        moved = PackedSpectrum(
            packed.edge, values, packed.scales, packed.bitmap, packed.offsets, packed.shape, "float64"
        )
        out, _, _ = ops.spectral_batch_norm(moved, weight, bias, training=True)
        return (ops.to_spatial(out) * towards).sum()

    (gradient,) = torch.autograd.grad(loss(packed.values), packed.edge)
    step = 1e-5
    for place in torch.nonzero(packed.values):
        shift = torch.zeros_like(packed.values)
        shift[tuple(place)] = step
        slope = (loss(packed.values + shift) - loss(packed.values - shift)) / (2 * step)
        assert gradient[tuple(place)].item() == pytest.approx(slope.item(), abs=1e-8)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(backend: str, device: torch.device, training: bool):
    x, (weight, bias, mean, var) = maps((2, 2, 3, 4), device), parameters(2, device)

    def packed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        entry = ops.to_spectral(x, threshold=1.5)
        return ops.to_spatial(ops.spectral_batch_norm(entry, weight, bias, mean, var, training)[0])

    assert gradcheck(packed, (x, weight, bias), fast_mode=backend == "triton")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["tanh", "softsign", "asinh", "atan"])
def test_with_an_activation(backend: str, device: torch.device, training: bool, kind: str):
    """As one after the other, and so the gradients, scale included; what a block keeps of it can be made again."""
    x, (weight, bias, mean, var) = maps((2, 3, 4, 5), device), parameters(3, device)
    scale = (torch.rand(3, dtype=DOUBLE, device=device) + 0.5).requires_grad_()
    packed = ops.to_spectral(x, threshold=1.0)
    settings = (weight, bias, mean, var, training)
    got = ops.spectral_batch_norm(packed, *settings, activation=kind, activation_scale=scale, workspace=256)[0]
    expected = ops.spectral_activation(ops.spectral_batch_norm(packed, *settings)[0], kind, scale)
    torch.testing.assert_close(got.values, expected.values, rtol=0, atol=1e-12)
    assert got.origin is not None and expected.origin is None
    taps = torch.randn(2, 3, 3, 3, dtype=DOUBLE, device=device, requires_grad=True)
    blocks = [ops.spec_block(p, taps, threshold=0.3) for p in (got, expected)]
    grad = torch.randn_like(blocks[0].edge)
    gradients = (torch.autograd.grad(p.edge, (x, weight, bias, scale, taps), grad, retain_graph=True) for p in blocks)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

    dense = torch.fft.rfft2(x.detach(), norm="ortho")
    got, expected = (
        ops.spectral_batch_norm(dense, *settings, size=(4, 5), **options)[0]
        for options in ({"activation": kind, "activation_scale": scale}, {})
    )
    torch.testing.assert_close(got, ops.spectral_activation(expected, kind, scale))


@pytest.mark.parametrize("value_dtype", ["float32", "float16", "int8", "int4"])
def test_is_made_again_to_the_bit(value_dtype: str):
    x, (weight, bias, _, _) = maps((3, 4, 8, 8), torch.device("cpu")).float(), parameters(4, torch.device("cpu"))
    packed = ops.to_spectral(x, threshold=0.5, value_dtype=value_dtype)
    settings = {"training": True, "activation": "tanh", "activation_scale": torch.full((4,), 3.0)}
    made = ops.spectral_batch_norm(packed, weight, bias, **settings)[0]
    assert made.origin is not None
    tensors = [x.new_empty(0) if t is None else t for t in made.origin.tensors]
    again = remake(tensors, made.bitmap, made.offsets, made.origin.settings, list(made.shape), torch.float32)
    assert torch.equal(again[0], made.values) and torch.equal(again[1], made.scales)
    with torch.no_grad():
        assert ops.spectral_batch_norm(packed, weight, bias, **settings)[0].origin is None


@pytest.mark.parametrize("training", [True, False])
def test_opcheck(training: bool):
    packed = ops.to_spectral(maps((2, 3, 5, 6), torch.device("cpu")).detach(), threshold=2.0).requires_grad_()
    weight, bias, mean, var = parameters(3, packed.device)
    fields = (packed.edge, packed.values, packed.scales, packed.bitmap, packed.offsets)
    scale = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    torch.library.opcheck(
        torch.ops.spectriton.spectral_batch_norm.default,
        (*fields, weight, bias, mean, var, scale, "tanh", [2, 3, 5, 6], training, 1e-5, 0),
    )


@pytest.mark.parametrize("value_dtype", ["float16", "bfloat16", "int8", "int4"])
def test_value_formats(backend: str, device: torch.device, value_dtype: str):
    """The result is rounded as the input is; the gradient is exact at the values that were read."""
    x, (weight, bias, _, _) = maps((4, 3, 6, 5), device, torch.float32), parameters(3, device, torch.float32)
    packed = ops.to_spectral(x, threshold=1.0, value_dtype=value_dtype)
    out, _, _ = ops.spectral_batch_norm(packed, weight, bias, training=True)
    assert out.value_dtype == value_dtype and out.values.dtype == packed.values.dtype
    assert out.edge.dtype == torch.float32 and out.values.data_ptr() != packed.values.data_ptr()

    read = ops.to_spatial(packed).detach().requires_grad_()
    expected = F.batch_norm(read, None, None, weight, bias, training=True)
    wanted = torch.fft.rfft2(expected.detach(), norm="ortho")
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3, "int8": 1 / 127, "int4": 1 / 7}[value_dtype]
    torch.testing.assert_close(out.to_dense(), wanted, rtol=0, atol=float(wanted.abs().max()) * tolerance)
    grad = torch.randn_like(expected)
    got = torch.autograd.grad(ops.to_spatial(out), [x, weight, bias], grad)
    of_read, *of_parameters = torch.autograd.grad(expected, [read, weight, bias], grad)
    # What is dropped gets no gradient.
    pattern = oracles.masked(torch.fft.rfft2(x, norm="ortho"), 1.0) != 0
    of_x = torch.fft.irfft2(torch.fft.rfft2(of_read, norm="ortho") * pattern, s=(6, 5), norm="ortho")
    for a, b in zip(got, (of_x, *of_parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_variance_beside_a_large_mean():
    """A zero frequency thousands of times the deviation costs no digits of it."""
    spectrum = 0.1 * torch.fft.rfft2(torch.randn(8, 2, 16, 16), norm="ortho")
    spectrum[:, :, 0, 0] += 1.6e4
    exact = torch.fft.irfft2(spectrum.to(torch.complex128), s=(16, 16), norm="ortho")
    expected = F.batch_norm(exact, None, None, training=True)
    packed = ops.pack(spectrum, size=(16, 16), threshold=0.0)
    for x in (packed, spectrum):
        out, mean, var = ops.spectral_batch_norm(
            x, running_mean=torch.zeros(2), running_var=torch.zeros(2), training=True, momentum=1.0
        )
        assert mean is not None and var is not None
        torch.testing.assert_close(var.double(), exact.var((0, 2, 3)), rtol=1e-3, atol=0)
        dense = out.to_dense() if isinstance(out, PackedSpectrum) else out
        wanted = torch.fft.rfft2(expected, norm="ortho")
        torch.testing.assert_close(dense[..., 1:], wanted[..., 1:].to(torch.complex64), rtol=1e-3, atol=1e-3)


def test_saves_one_packed_copy_and_two_numbers_a_channel():
    packed = ops.to_spectral(maps((16, 8, 16, 16), torch.device("cpu"), torch.float32).detach(), threshold=2.0)
    packed.requires_grad_()
    weight, bias, mean, var = parameters(8, packed.device, torch.float32)
    for training in (True, False):
        saved: dict[int, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            ops.spectral_batch_norm(packed, weight, bias, mean, var, training)
        own = [t for t in (packed.values, packed.bitmap, packed.offsets, packed.scales) if t.numel()]
        assert {t.untyped_storage().data_ptr() for t in own} <= set(saved)
        total = sum(t.untyped_storage().nbytes() for t in saved.values() if t is not weight and t is not bias)
        assert total == packed.nbytes + 2 * 8 * 4


def test_temporaries_stay_within_the_workspace():
    workspace = 1 << 20
    x = maps((64, 32, 32, 32), torch.device("cpu"), torch.float32).detach()
    packed = ops.to_spectral(x, threshold=2.2).requires_grad_()
    assert 0.1 < packed.density < 0.4
    assert x.nbytes >= 8 * workspace  # a dense map could not hide
    del x
    weight, bias, _, _ = parameters(32, packed.device, torch.float32)
    outputs: list[PackedSpectrum] = []
    values, gradient = packed.values.nbytes, packed.kept * 8

    def forward() -> None:
        out, _, _ = ops.spectral_batch_norm(packed, weight, bias, training=True, workspace=workspace)
        outputs.append(out)

    sizes, peak, numpys = allocations(forward)
    assert [size for size in sizes if size > workspace and size != values] == []
    assert peak + numpys <= values + workspace
    grad = torch.randn(packed.kept, 2)
    sizes, peak, numpys = allocations(lambda: torch.autograd.grad(outputs[0].edge, [packed.edge, weight, bias], grad))
    assert [size for size in sizes if size > workspace and size != gradient] == []
    assert peak + numpys <= gradient + workspace


def test_nothing_is_changed_in_place():
    packed = ops.to_spectral(maps((2, 3, 4, 4), torch.device("cpu")).detach(), threshold=0.0)
    weight, bias, mean, var = parameters(3, packed.device)
    before = [t.detach().clone() for t in (packed.values, mean, var)]
    _, new_mean, _ = ops.spectral_batch_norm(packed, weight, bias, mean, var, training=True)
    assert all(torch.equal(a, b) for a, b in zip(before, (packed.values, mean, var), strict=True))
    assert new_mean is not None and not new_mean.requires_grad and not torch.equal(new_mean, mean)


def test_empty_batch_leaves_the_statistics():
    x = maps((0, 3, 4, 4), torch.device("cpu"))
    weight, bias, mean, var = parameters(3, x.device)
    out, new_mean, new_var = ops.spectral_batch_norm(
        ops.to_spectral(x, threshold=0.5), weight, bias, mean, var, training=True
    )
    assert out.shape == x.shape and torch.equal(new_mean, mean) and torch.equal(new_var, var)
    ops.to_spatial(out).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(3, dtype=DOUBLE))


def test_input_without_gradient():
    x = maps((3, 2, 4, 4), torch.device("cpu")).detach()
    weight, bias, _, _ = parameters(2, x.device)
    out, _, _ = ops.spectral_batch_norm(ops.to_spectral(x, threshold=0.0), weight, bias, training=True)
    compare(ops.to_spatial(out), F.batch_norm(x, None, None, weight, bias, training=True), [weight, bias])


def test_nan_stays_in_its_channel():
    x = maps((2, 3, 4, 4), torch.device("cpu")).detach()
    x[1, 0, 2, 2] = float("nan")
    out = ops.to_spatial(ops.spectral_batch_norm(ops.to_spectral(x, threshold=0.5), training=True)[0])
    assert torch.isnan(out[:, 0]).all() and torch.isfinite(out[:, 1:]).all()


def test_gradient_where_a_weight_is_zero():
    x = maps((3, 2, 4, 4), torch.device("cpu"))
    weight, bias = torch.zeros(2, dtype=DOUBLE, requires_grad=True), torch.zeros(2, dtype=DOUBLE, requires_grad=True)
    out, _, _ = ops.spectral_batch_norm(ops.to_spectral(x, threshold=0.0), weight, bias, training=True)
    assert out.kept == 3 * 2 * 10  # what has become zero stays in the pattern
    compare(ops.to_spatial(out), F.batch_norm(x, None, None, weight, bias, training=True), [x, weight, bias])


BAD = [
    (lambda p: ops.spectral_batch_norm(torch.randn(2, 3, 4, 4), training=True), TypeError, "complex tensor"),
    (lambda p: ops.spectral_batch_norm(p.to_dense()[0], training=True), ValueError, "4 dimensions"),
    (lambda p: ops.spectral_batch_norm(p, torch.ones(4), training=True), ValueError, r"weight got .*shape \(3,\)"),
    (lambda p: ops.spectral_batch_norm(p, None, torch.ones(1, 3), training=True), ValueError, "bias got"),
    (lambda p: ops.spectral_batch_norm(p), ValueError, "got neither, expected both"),
    (lambda p: ops.spectral_batch_norm(p, None, None, torch.ones(3), training=True), ValueError, "got one of them"),
    (lambda p: ops.spectral_batch_norm(p, training=True, size=(4, 5)), ValueError, r"size got \(4, 5\)"),
    (lambda p: ops.spectral_batch_norm(p.to_dense(), training=True, size=(4, 7)), ValueError, r"size got \(4, 7\)"),
    (lambda p: ops.spectral_batch_norm(p, training=True, workspace=0), ValueError, "positive number of bytes"),
    (
        lambda p: ops.spectral_batch_norm(ops.to_spectral(torch.ones(1, 3, 1, 1), threshold=0.0), training=True),
        ValueError,
        "more than one value per channel",
    ),
]


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_bad_input(call, kind: type[Exception], text: str):
    with pytest.raises(kind, match=text):
        call(ops.to_spectral(torch.randn(2, 3, 4, 4), threshold=0.0))
