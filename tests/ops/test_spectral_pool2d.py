"""Spectral pooling against a full spectrum cropped by hand, and against matrices in space."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from spectriton import PackedSpectrum, ops
from tests import oracles
from tests.ops.test_workspace import allocations

DOUBLE = torch.float64
# (size, output size): even and odd, square and not, one direction only, down to one and not at all.
SIZES = [
    ((8, 8), (4, 4)),
    ((8, 8), (3, 5)),
    ((7, 9), (3, 4)),
    ((6, 5), (4, 5)),
    ((6, 8), (6, 4)),
    ((12, 10), (6, 5)),
    ((10, 12), (4, 10)),
    ((9, 8), (4, 2)),
    ((5, 6), (5, 6)),
    ((8, 6), (1, 1)),
    ((7, 1), (4, 1)),
]


def crop_by_hand(full: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Every frequency of the small map added up from the full spectrum; half of each where two fall onto one."""
    height, width = full.shape[2:]
    h, w = output_size
    out = torch.zeros(*full.shape[:2], h, w, dtype=full.dtype)
    for ky in range(-(h // 2), h // 2 + 1):
        for kx in range(-(w // 2), w // 2 + 1):
            share = (0.5 if 2 * abs(ky) == h else 1.0) * (0.5 if 2 * abs(kx) == w else 1.0)
            out[:, :, ky % h, kx % w] += share * full[:, :, ky % height, kx % width]
    return out * (h * w / (height * width)) ** 0.5


def interpolation(size: int, output_size: int) -> Tensor:
    """Real ``(output, input)``: the trigonometric polynomial through the samples, cut off and sampled anew."""
    k = torch.arange(-(output_size // 2), output_size // 2 + 1, dtype=DOUBLE)
    share = torch.where(2 * k.abs() == output_size, 0.5, 1.0)
    there, here = torch.arange(output_size, dtype=DOUBLE) / output_size, torch.arange(size, dtype=DOUBLE) / size
    return (share * torch.cos(2 * torch.pi * k * (there[:, None, None] - here[:, None]))).sum(-1) / size


@pytest.mark.parametrize(("size", "output_size"), SIZES)
def test_equals_cropping_by_hand(
    backend: str, device: torch.device, size: tuple[int, int], output_size: tuple[int, int]
):
    threshold = 0.8
    x = torch.randn(2, 3, *size, dtype=DOUBLE, device=device, requires_grad=True)
    masked = oracles.masked(torch.fft.rfft2(x, norm="ortho"), threshold)
    kept = torch.fft.irfft2(masked, s=size, norm="ortho")
    full = torch.fft.ifft2(crop_by_hand(torch.fft.fft2(kept, norm="ortho").cpu(), output_size), norm="ortho")
    assert full.imag.abs().max() < 1e-13
    expected = full.real.to(device)
    packed = ops.to_spectral(x, threshold=threshold)
    pooled = ops.spectral_pool2d(packed, output_size=output_size)
    assert pooled.shape == expected.shape
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, x, grad, retain_graph=True)
    for got in (ops.to_spatial(pooled), ops.spectral_pool2d(kept, output_size=output_size)):
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, x, grad, retain_graph=True)[0], expected_grad)
    half = ops.spectral_pool2d(masked, output_size=output_size, size=size)
    torch.testing.assert_close(pooled.to_dense(), half)


@pytest.mark.parametrize(("size", "output_size"), SIZES)
def test_equals_interpolation_in_space(size: tuple[int, int], output_size: tuple[int, int]):
    x = torch.randn(3, 2, *size, dtype=DOUBLE)
    rows, columns = (interpolation(n, small) for n, small in zip(size, output_size, strict=True))
    pooled = ops.to_spatial(ops.spectral_pool2d(ops.to_spectral(x, threshold=0.0), output_size=output_size))
    torch.testing.assert_close(pooled, rows @ x @ columns.T)
    torch.testing.assert_close(pooled.mean((2, 3)), x.mean((2, 3)))


def test_all_sizes_of_small_maps():
    """Packed and dense are written independently of one another."""
    for height in range(1, 7):
        for width in range(1, 7):
            x = torch.randn(1, 2, height, width, dtype=DOUBLE)
            packed = ops.to_spectral(x, threshold=0.5)
            for h in range(1, height + 1):
                for w in range(1, width + 1):
                    pooled = ops.spectral_pool2d(packed, output_size=(h, w))
                    dense = ops.spectral_pool2d(packed.to_dense(), output_size=(h, w), size=(height, width))
                    torch.testing.assert_close(pooled.to_dense(), dense)


def with_values(packed: PackedSpectrum, values: Tensor) -> PackedSpectrum:
    """The same pattern with other values."""
    return PackedSpectrum(
        packed.edge, values, packed.scales, packed.bitmap, packed.offsets, packed.shape, packed.value_dtype
    )


def pattern(packed: PackedSpectrum) -> Tensor:
    """``(B, C, H, Wh)`` bool: what is kept."""
    return with_values(packed, torch.ones_like(packed.values)).to_dense() != 0


@pytest.mark.parametrize(("size", "output_size"), [((8, 8), (4, 4)), ((7, 9), (4, 6)), ((6, 8), (6, 4))])
def test_keeps_what_has_a_kept_source(size: tuple[int, int], output_size: tuple[int, int]):
    x = torch.randn(4, 3, *size, dtype=DOUBLE)
    packed = ops.to_spectral(x, threshold=1.2)
    # Conjugates stand side by side in the full spectrum, so a coefficient that any source keeps is not zero here.
    full = torch.fft.fft2(torch.fft.irfft2(pattern(packed).to(DOUBLE) + 0j, s=size, norm="ortho"), norm="ortho")
    expected = crop_by_hand(full.real.round() + 0j, output_size)[..., : output_size[1] // 2 + 1].abs() > 1e-6
    pooled = ops.spectral_pool2d(packed, output_size=output_size)
    assert torch.equal(pattern(pooled), expected)
    assert expected[..., 0, 0].all() and not expected.all()
    zeros = with_values(packed, torch.zeros_like(packed.values))
    assert torch.equal(ops.spectral_pool2d(zeros, output_size=output_size).bitmap, pooled.bitmap)


@pytest.mark.parametrize(("batch", "size"), [(1, (6, 9)), (40, (6, 9)), (230, (65, 64))])
@pytest.mark.parametrize("workspace", [None, 1])
def test_tiles_and_chunks_of_any_size(batch: int, size: tuple[int, int], workspace: int | None):
    """Smaller maps have larger tiles, with which rows may end in more padding."""
    output_size = (5, 4)
    x = torch.randn(batch, 2, *size, dtype=DOUBLE, requires_grad=True)
    packed = ops.to_spectral(x, threshold=1.0)
    pooled = ops.spectral_pool2d(packed, output_size=output_size, workspace=workspace)
    assert (pooled.layout.padded_row != packed.layout.padded_row) == (batch == 230)
    masked = oracles.masked(torch.fft.rfft2(x, norm="ortho"), 1.0)
    half = ops.spectral_pool2d(masked, output_size=output_size, size=size)
    torch.testing.assert_close(pooled.to_dense(), half)
    expected = torch.fft.irfft2(half, s=output_size, norm="ortho")
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(ops.to_spatial(pooled), x, grad), torch.autograd.grad(expected, x, grad)
    )


@pytest.mark.parametrize("output_size", [(2, 2), (2, 3)])
def test_gradcheck(backend: str, device: torch.device, output_size: tuple[int, int]):
    x = torch.randn(1, 2, 4, 5, dtype=DOUBLE, device=device, requires_grad=True)

    def network(x: Tensor) -> Tensor:
        return ops.to_spatial(ops.spectral_pool2d(ops.to_spectral(x, threshold=0.4), output_size=output_size))

    assert gradcheck(network, (x,), fast_mode=backend == "triton")


def test_gradcheck_of_dense_inputs():
    x = torch.randn(1, 2, 4, 5, dtype=DOUBLE, requires_grad=True)
    spectrum = torch.randn(1, 2, 6, 3, dtype=torch.complex128, requires_grad=True)
    assert gradcheck(lambda t: ops.spectral_pool2d(t, (2, 1)), (x,))
    assert gradcheck(lambda t: ops.spectral_pool2d(t, output_size=(4, 2)), (spectrum,))


def test_opcheck():
    packed = ops.to_spectral(torch.randn(2, 3, 6, 5, dtype=DOUBLE), threshold=0.5).requires_grad_()
    fields = (packed.edge, packed.values, packed.scales, packed.bitmap, packed.offsets)
    torch.library.opcheck(
        torch.ops.spectriton.spectral_pool2d.default, (*fields, list(packed.shape), 4, 2, "float64", 0)
    )
    x = torch.randn(2, 3, 6, 5, dtype=DOUBLE, requires_grad=True)
    torch.library.opcheck(torch.ops.spectriton.spectral_pool2d_maps.default, (x, 4, 2, 0))


@pytest.mark.parametrize("value_dtype", ["float16", "bfloat16", "int8", "int4"])
def test_value_formats(backend: str, device: torch.device, value_dtype: str):
    x = torch.randn(3, 2, 8, 6, device=device, requires_grad=True)
    packed = ops.to_spectral(x, threshold=0.5, value_dtype=value_dtype)
    pooled = ops.spectral_pool2d(packed)
    assert pooled.value_dtype == value_dtype and pooled.values.dtype == packed.values.dtype
    exact = ops.spectral_pool2d(packed.to_dense(), size=(8, 6))
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3, "int8": 1 / 127, "int4": 1 / 7}[value_dtype]
    torch.testing.assert_close(pooled.to_dense(), exact, rtol=0, atol=tolerance * float(exact.detach().abs().max()))
    grad = torch.randn(3, 2, 4, 3, device=device)
    plain = ops.spectral_pool2d(ops.to_spectral(x, threshold=0.5))
    (expected,) = torch.autograd.grad(ops.to_spatial(plain), x, grad)
    torch.testing.assert_close(torch.autograd.grad(ops.to_spatial(pooled), x, grad)[0], expected)


def saved_by(call) -> dict[int | str, Tensor]:
    """What is saved for backward, by address, and the result of the call."""
    saved: dict[int | str, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        saved["result"] = call()
    return saved


def test_saves_patterns_only():
    packed = ops.to_spectral(torch.randn(8, 4, 16, 16), threshold=0.8).requires_grad_()
    saved = saved_by(lambda: ops.spectral_pool2d(packed))
    pooled = saved.pop("result")
    patterns = [packed.bitmap, packed.offsets, pooled.bitmap, pooled.offsets]
    assert set(saved) == {t.untyped_storage().data_ptr() for t in patterns}


def test_saves_nothing_of_maps():
    x = torch.randn(8, 4, 16, 16, requires_grad=True)
    assert set(saved_by(lambda: ops.spectral_pool2d(x))) == {"result"}


def test_temporaries_stay_within_the_workspace():
    workspace = 1 << 20
    x = torch.randn(64, 32, 32, 32)
    packed = ops.to_spectral(x, threshold=1.2).requires_grad_()
    assert 0.1 < packed.density < 0.4
    assert x.nbytes >= 8 * workspace  # a dense map could not hide
    del x
    pooled: list[PackedSpectrum] = []
    ops.spectral_pool2d(packed)  # the plan for these sizes is made once
    sizes, peak, numpys = allocations(lambda: pooled.append(ops.spectral_pool2d(packed, workspace=workspace)))
    assert max(sizes) <= max(workspace, pooled[0].values.nbytes)
    assert peak + numpys <= pooled[0].nbytes + workspace
    grad, gradient = torch.randn(pooled[0].kept, 2), packed.kept * 8
    sizes, peak, numpys = allocations(lambda: torch.autograd.grad(pooled[0].edge, packed.edge, grad))
    assert [size for size in sizes if size > workspace and size != gradient] == []
    assert peak + numpys <= gradient + workspace


def test_sizes_are_rounded_down_as_by_max_pool2d():
    for height, width, kernel in ((7, 9, 2), (10, 7, 3), (8, 8, (4, 1)), (5, 5, 5)):
        x = torch.randn(2, 2, height, width)
        expected = torch.nn.functional.max_pool2d(x, kernel).shape
        assert ops.spectral_pool2d(x, kernel).shape == expected
        assert ops.spectral_pool2d(ops.to_spectral(x, threshold=0.0), kernel).shape == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps(dtype: torch.dtype):
    x = torch.randn(2, 2, 8, 8).to(dtype)
    assert ops.spectral_pool2d(x).dtype == dtype
    torch.testing.assert_close(ops.spectral_pool2d(x).float(), ops.spectral_pool2d(x.float()), rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ops.spectral_pool2d(x.float()).sum(), x.float().sum() / 4)


def test_empty_batch():
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    for entry in (ops.to_spectral(x, threshold=0.5), x):
        pooled = ops.spectral_pool2d(entry)
        assert pooled.shape == (0, 3, 2, 2)
        (ops.to_spatial(pooled) if isinstance(pooled, PackedSpectrum) else pooled).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_maps_of_any_strides():
    x = torch.randn(4, 6, 9, 7).to(memory_format=torch.channels_last)
    torch.testing.assert_close(ops.spectral_pool2d(x), ops.spectral_pool2d(x.contiguous()))
    torch.testing.assert_close(ops.spectral_pool2d(x[:, ::2, 1:]), ops.spectral_pool2d(x[:, ::2, 1:].contiguous()))
    torch.testing.assert_close(ops.spectral_pool2d(x, workspace=1), ops.spectral_pool2d(x))


def test_nan_stays_in_its_map():
    x = torch.randn(2, 2, 6, 6)
    x[1, 0, 2, 2] = float("nan")
    pooled = ops.to_spatial(ops.spectral_pool2d(ops.to_spectral(x, threshold=0.5)))
    assert torch.isnan(pooled[1, 0]).all() and torch.isfinite(pooled[0]).all() and torch.isfinite(pooled[1, 1]).all()


BAD = [
    (lambda p: ops.spectral_pool2d(torch.zeros(4, 4)), ValueError, "4 dimensions"),
    (lambda p: ops.spectral_pool2d(torch.zeros(1, 1, 4, 4, dtype=torch.int64)), TypeError, "real"),
    (lambda p: ops.spectral_pool2d("maps"), TypeError, "got 'maps'"),
    (lambda p: ops.spectral_pool2d(p, 5), ValueError, "kernel_size got .*at most the 4x6 maps"),
    (lambda p: ops.spectral_pool2d(p, 0), ValueError, "kernel_size got 0"),
    (lambda p: ops.spectral_pool2d(p, output_size=(4, 8)), ValueError, "output_size got .*at most the 4x6 maps"),
    (lambda p: ops.spectral_pool2d(p, output_size=0), ValueError, "output_size got 0, expected a positive int"),
    (lambda p: ops.spectral_pool2d(p, size=(4, 4)), ValueError, r"size got \(4, 4\)"),
    (lambda p: ops.spectral_pool2d(p.to_dense(), size=(4, 8)), ValueError, r"size got \(4, 8\)"),
    (lambda p: ops.spectral_pool2d(p, workspace=-1), ValueError, "positive number of bytes"),
]


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_bad_input(call, kind: type[Exception], text: str):
    with pytest.raises(kind, match=text):
        call(ops.to_spectral(torch.randn(1, 2, 4, 6), threshold=0.0))
