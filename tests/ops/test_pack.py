"""Packing as differentiable ops, on both backends."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from spectriton import ops
from spectriton.ops._room import Room, with_room
from tests import oracles

SHAPES = [(2, 3, 8, 8), (1, 1, 5, 7), (2, 20, 4, 3), (1, 2, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("workspace", [None, 1])
def test_maps_to_packed_and_back(backend: str, device: torch.device, shape: tuple[int, ...], workspace: int | None):
    x = torch.randn(shape, dtype=torch.float64, device=device)
    packed = ops.to_spectral(x, threshold=0.0, workspace=workspace)
    torch.testing.assert_close(ops.to_spatial(packed, workspace=workspace), x)
    packed = ops.to_spectral(x, threshold=0.9, workspace=workspace)
    expected = oracles.masked(torch.fft.rfft2(x, norm="ortho"), 0.9)
    torch.testing.assert_close(packed.to_dense(), expected)
    torch.testing.assert_close(ops.unpack(packed), expected)
    back = ops.to_spatial(packed, workspace=workspace)
    torch.testing.assert_close(back, torch.fft.irfft2(expected, s=shape[2:], norm="ortho"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("workspace", [None, 1])
def test_gradients_equal_those_of_dense_masks(
    backend: str, device: torch.device, shape: tuple[int, ...], workspace: int | None
):
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    grad_maps = torch.randn(shape, dtype=torch.float64, device=device)
    packed = ops.to_spectral(x, threshold=0.9, workspace=workspace)
    dense = oracles.masked(torch.fft.rfft2(x, norm="ortho"), 0.9)
    expected = torch.autograd.grad(torch.fft.irfft2(dense, s=shape[2:], norm="ortho"), x, grad_maps, retain_graph=True)
    got = torch.autograd.grad(ops.to_spatial(packed, workspace=workspace), x, grad_maps, retain_graph=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)

    # Through the dense half spectrum: real maps cannot tell its redundant columns apart.
    through_dense = torch.fft.irfft2(packed.to_dense(), s=shape[2:], norm="ortho")
    torch.testing.assert_close(torch.autograd.grad(through_dense, x, grad_maps), expected, rtol=0, atol=1e-10)


def test_gradcheck_of_packing(backend: str, device: torch.device):
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(lambda t: ops.to_spatial(ops.to_spectral(t, threshold=0.6)), (x,))
    spectrum = torch.randn(1, 2, 4, 3, dtype=torch.complex128, device=device, requires_grad=True)
    assert gradcheck(lambda t: ops.pack(t, size=(4, 4), threshold=0.6).to_dense(), (spectrum,))


@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_gradients_ignore_rounding_of_values(value_dtype: str):
    """Values may be rounded to integers; what flows back is exact and in full precision."""
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    grad = torch.randn(2, 3, 6, 6)
    (plain,) = torch.autograd.grad(ops.to_spatial(ops.to_spectral(x, threshold=0.5)), x, grad)
    rounded = ops.to_spectral(x, threshold=0.5, value_dtype=value_dtype)
    torch.testing.assert_close(torch.autograd.grad(ops.to_spatial(rounded), x, grad)[0], plain)


@pytest.mark.parametrize("value_dtype", ["float16", "bfloat16", "int8", "int4"])
def test_stochastic_rounding(value_dtype: str):
    x = torch.randn(2, 3, 6, 5)
    state = torch.get_rng_state()

    def dense(seed: int | torch.Tensor | None, workspace: int | None = None) -> torch.Tensor:
        settings = {"threshold": 0.5, "value_dtype": value_dtype, "rounding": "stochastic", "seed": seed}
        return torch.view_as_real(ops.to_spectral(x, **settings, workspace=workspace).to_dense())

    assert torch.equal(dense(3), dense(torch.tensor(3)))
    assert torch.equal(dense(None), dense(None))
    assert not torch.equal(dense(3), dense(4))
    # Noise belongs to the coefficient, however the maps are cut.
    torch.testing.assert_close(dense(3), dense(3, workspace=1))
    assert torch.equal(torch.get_rng_state(), state)

    exact = torch.view_as_real(ops.to_spectral(x, threshold=0.5).to_dense())
    errors = torch.stack([dense(seed) for seed in range(300)]).double() - exact.double()
    weights = torch.randn(exact.numel(), 20, generator=torch.Generator().manual_seed(0)).double()
    sums = errors.flatten(1) @ weights
    # Means of sums over 300 seeds are normal: one of 20 exceeds 4.5 standard errors with a probability of 1e-4.
    assert (sums.mean(0).abs() < 4.5 * sums.std(0) / 300**0.5).all()
    # One of the two neighbours is taken, so the error is below the spacing of the format at the largest value.
    spacing = {"float16": 2**-10, "bfloat16": 2**-7, "int8": 1 / 127, "int4": 1 / 7}[value_dtype]
    assert errors.abs().max() <= 1.001 * spacing * exact.abs().max()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("value_dtype", ["float16", "int8", "int4"])
def test_rounding_on_both_backends(backend: str, device: torch.device, value_dtype: str, rounding: str, monkeypatch):
    """The same values and scales to the bit, whatever packs, and however the maps are cut."""
    spectrum = torch.fft.rfft2(torch.randn(11, 3, 4, 5), norm="ortho").to(device)
    settings = {"size": (4, 5), "threshold": 0.5, "value_dtype": value_dtype, "seed": 1, "rounding": rounding}
    packed = ops.pack(spectrum, **settings)
    if rounding == "stochastic":
        assert not torch.equal(packed.to_dense(), ops.pack(spectrum, **{**settings, "rounding": "nearest"}).to_dense())
    dense = packed.to_dense()
    monkeypatch.setenv("SPECTRITON_BACKEND", "reference")
    expected = ops.pack(spectrum.cpu(), **settings, workspace=1)
    assert torch.equal(packed.scales.cpu(), expected.scales) and torch.equal(packed.bitmap.cpu(), expected.bitmap)
    assert torch.equal(dense.cpu(), expected.to_dense())


@pytest.mark.triton
@pytest.mark.parametrize("value_dtype", ["int8", "int4"])
def test_low_bit_values_that_overflow_their_room(value_dtype: str, device: torch.device, monkeypatch):
    """A layer that keeps more than before packs again; what it keeps less leaves nothing behind."""
    spectrum = torch.fft.rfft2(torch.randn(11, 9, 4, 5), norm="ortho").to(device)
    settings = {"size": (4, 5), "value_dtype": value_dtype, "seed": 1, "rounding": "stochastic"}
    room = Room()
    for threshold in (1e6, 0.01, 0.4):
        monkeypatch.setenv("SPECTRITON_BACKEND", "triton")
        packed = with_room(room, ops.pack, spectrum, **settings, threshold=threshold)
        dense = packed.to_dense()
        monkeypatch.setenv("SPECTRITON_BACKEND", "reference")
        expected = ops.pack(spectrum.cpu(), **settings, threshold=threshold)
        assert packed.values.shape == expected.values.shape
        assert torch.equal(packed.scales.cpu(), expected.scales)
        assert torch.equal(dense.cpu(), expected.to_dense())


def test_stochastic_rounding_of_a_half_spectrum():
    x = torch.randn(2, 3, 6, 6)
    spectrum = torch.fft.rfft2(x, norm="ortho")
    settings = {"value_dtype": "int8", "rounding": "stochastic", "seed": 5}
    given = ops.pack(spectrum, size=(6, 6), threshold=0.5, **settings).to_dense()
    torch.testing.assert_close(given, ops.to_spectral(x, threshold=0.5, **settings).to_dense())
    assert ops.pack(spectrum, size=(6, 6), threshold=0.5, rounding="stochastic").values.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_transformed_in_single(dtype: torch.dtype):
    x = torch.randn(2, 3, 6, 6).to(dtype).requires_grad_()
    packed = ops.to_spectral(x, threshold=0.0)
    assert packed.dtype == torch.complex64
    back = ops.to_spatial(packed)
    torch.testing.assert_close(back, x.float())
    back.sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype


@pytest.mark.parametrize("layout_of", ["channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("workspace", [None, 1])
def test_maps_of_any_strides(layout_of: str, workspace: int | None):
    x = torch.randn(40, 5, 6, 7, dtype=torch.float64)
    other = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": torch.randn(40, 10, 6, 7, dtype=torch.float64)[:, ::2],
    }[layout_of]
    packed = ops.to_spectral(other, threshold=0.3, workspace=workspace)
    torch.testing.assert_close(packed.to_dense(), oracles.masked(torch.fft.rfft2(other, norm="ortho"), 0.3))


def test_values_stand_in_row_order_however_many_chunks():
    x = torch.randn(200, 3, 6, 6)
    one, many = ops.to_spectral(x, threshold=0.5), ops.to_spectral(x, threshold=0.5, workspace=1)
    for name in ("values", "bitmap", "offsets"):
        torch.testing.assert_close(getattr(one, name), getattr(many, name), rtol=0, atol=1e-6)


def test_empty_batch():
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    packed = ops.to_spectral(x, threshold=0.5)
    assert packed.kept == 0 and packed.density == 0.0
    ops.to_spatial(packed).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def arguments(name: str) -> tuple[object, ...]:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    packed = ops.to_spectral(x.detach(), threshold=0.5).requires_grad_()
    fields = (packed.edge, packed.values, packed.scales, packed.bitmap, packed.offsets, list(packed.shape))
    return {
        "pack": (torch.fft.rfft2(x.detach()).requires_grad_(), 5, 6, 0.5, -1.0, "int8", 0, None),
        "unpack": fields,
        "to_spectral": (x, 0.5, -1.0, "float16", 0, torch.tensor(3)),
        "to_spatial": (*fields, 0),
    }[name]


@pytest.mark.parametrize("name", ["pack", "unpack", "to_spectral", "to_spatial"])
def test_opcheck(name: str):
    torch.library.opcheck(getattr(torch.ops.spectriton, name).default, arguments(name))


BAD = [
    (lambda: ops.pack(torch.randn(2, 3, 4, 3), size=(4, 4), threshold=0.5), TypeError, "expected a complex tensor"),
    (lambda: ops.pack(torch.zeros(3, 4, 3, dtype=torch.cfloat), size=(4, 4), threshold=1), ValueError, "4 dimensions"),
    (lambda: ops.pack(torch.zeros(1, 3, 4, 4, dtype=torch.cfloat), size=(4, 4), threshold=1), ValueError, "4x4"),
    (lambda: ops.pack(torch.zeros(1, 3, 4, 3, dtype=torch.cfloat), size=(4, 4)), ValueError, "got neither"),
    (lambda: ops.to_spectral(torch.randn(1, 3, 4, 4), threshold=0.5, density=0.2), ValueError, "got both"),
    (lambda: ops.to_spectral(torch.randn(3, 4, 4), threshold=0.5), ValueError, "4 dimensions"),
    (lambda: ops.to_spectral(torch.zeros(1, 3, 4, 4, dtype=torch.cfloat), threshold=0.5), TypeError, "real"),
    (lambda: ops.to_spectral(torch.zeros(1, 3, 4, 4, dtype=torch.int64), threshold=0.5), TypeError, r"\.float\(\)"),
    (lambda: ops.to_spectral(torch.randn(1, 3, 4, 4), threshold=-0.5), ValueError, "not negative"),
    (lambda: ops.to_spectral(torch.randn(1, 3, 4, 4), threshold=float("nan")), ValueError, "got nan"),
    (lambda: ops.to_spectral(torch.randn(1, 3, 4, 4), density=1.5), ValueError, "fraction from 0 to 1"),
    (lambda: ops.to_spectral(torch.randn(1, 3, 4, 4), threshold=1, value_dtype="int5"), ValueError, "did you mean"),
    (
        lambda: ops.to_spectral(torch.randn(1, 3, 4, 4), threshold=1, workspace=0),
        ValueError,
        "positive number of bytes",
    ),
    (
        lambda: ops.to_spectral(torch.randn(1, 3, 4, 4), threshold=1, rounding="up"),
        ValueError,
        "'nearest', 'stochastic'",
    ),
    (lambda: ops.to_spectral(torch.randn(1, 3, 4, 4), threshold=1, seed=1.5), TypeError, "an int64 tensor without"),
    (lambda: ops.to_spectral(torch.randn(1, 3, 4, 4), density=-1), ValueError, "keep a quarter"),
    (lambda: ops.pack(torch.zeros(1, 3, 4, 3, dtype=torch.cfloat), size=4, threshold=1), ValueError, "size got 4,"),
    (lambda: ops.pack(torch.zeros(1, 3, 4, 3, dtype=torch.cfloat), size="44", threshold=1), ValueError, "got '44'"),
    (lambda: ops.to_spatial(torch.randn(1, 3, 4, 4)), TypeError, "ToSpectral"),
    (lambda: ops.unpack(torch.randn(1, 3, 4, 4)), TypeError, "expected a PackedSpectrum"),
]


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_bad_input(call, kind: type[Exception], text: str):
    with pytest.raises(kind, match=text):
        call()


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPECTRITON_BACKEND", "cuda")
    expected = "SPECTRITON_BACKEND got 'cuda', expected one of auto, triton, native, reference"
    with pytest.raises(ValueError, match=expected):
        ops.to_spectral(torch.randn(1, 1, 4, 4), threshold=0.0)


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPECTRITON_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 before anything imports triton"):
        ops.to_spectral(torch.randn(1, 1, 4, 4), threshold=0.0)


def test_unusable_workspace_setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPECTRITON_WORKSPACE_MIB", "-3")
    with pytest.raises(ValueError, match="SPECTRITON_WORKSPACE_MIB got '-3'"):
        ops.to_spectral(torch.randn(1, 1, 4, 4), threshold=0.0)
