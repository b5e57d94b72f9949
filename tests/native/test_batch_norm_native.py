"""What batch norm does with what is kept of packed spectra: in C against the reference, and the op on both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectriton import PackedSpectrum, ops
from spectriton._backend import Backend
from spectriton.ops.spectral_batch_norm import norm_gradients
from spectriton.reference.kept import KeptRows

pytestmark = pytest.mark.usefixtures("build")

DTYPES = ["float32", "float16", "bfloat16", "int8", "int4"]
SHAPES = [(3, 5, 7, 6), (40, 8, 4, 4), (1, 1, 1, 1), (2, 130, 5, 4)]


@pytest.fixture(scope="module")
def native() -> Backend:
    from spectriton._native import NativeBackend

    return NativeBackend()


def packed_of(shape: tuple[int, int, int, int], value_dtype: str) -> PackedSpectrum:
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(len(value_dtype)))
    return ops.to_spectral(maps, threshold=0.9, value_dtype=value_dtype)


def rows_of(backend: Backend, packed: PackedSpectrum, rows: Tensor) -> KeptRows:
    index = backend.tile_index(packed.bitmap, packed.offsets)
    return backend.kept_rows(packed.bitmap, packed.offsets, rows, index, torch.float32)


def some_rows(packed: PackedSpectrum, which: str) -> Tensor:
    """Those with something kept: all, the first, or all but the first."""
    rows = torch.nonzero(packed.bitmap.flatten(1).any(1)).flatten()
    return {"all": rows, "first": rows[:1], "rest": rows[1:]}[which]


def check(native: Backend, packed: PackedSpectrum, which: str) -> None:
    """Sums to the rounding of float32, the rest as exactly as the order of factors allows."""
    values, scales, rows = packed.values, packed.scales, some_rows(packed, which)
    plain, made = Backend(), []
    of_c = rows_of(native, packed, rows)
    assert (of_c.pattern is None) is bool(rows.numel())
    generator = torch.Generator().manual_seed(7)
    places = of_c.places
    gain, factors = torch.randn(2, places, generator=generator)
    weight, every = torch.rand(rows.numel(), generator=generator), torch.randn(packed.kept, 2, generator=generator)
    for backend, kept in ((plain, rows_of(plain, packed, rows)), (native, of_c)):
        numbers = every[kept.slots]
        out, over = torch.full_like(numbers, float("nan")), numbers.clone()
        backend.combine_kept(kept, numbers, factors, values, scales, gain, weight, out)
        backend.combine_kept(kept, over, factors, values, scales, None, weight, over)
        stored, stored_scales = torch.zeros_like(values), torch.zeros_like(scales)
        backend.store_kept(kept, numbers, stored, stored_scales)
        made.append(
            (
                backend.sum_kept(kept, values, scales, weight, None).float(),
                backend.sum_kept(kept, values, scales, weight, numbers).float(),
                backend.sum_places(kept, numbers),
                backend.scale_kept(kept, values, scales, gain),
                backend.spread_kept(kept, gain),
                out,
                over,
                stored.float(),
                stored_scales,
            )
        )
    for expected, got in zip(*made, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    for expected, got in list(zip(*made, strict=True))[-2:]:
        assert torch.equal(got.nan_to_num(-9), expected.nan_to_num(-9))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value_dtype", DTYPES)
def test_equals_the_reference(native: Backend, shape: tuple[int, int, int, int], value_dtype: str):
    packed = packed_of(shape, value_dtype)
    for which in ("all", "first", "rest"):
        check(native, packed, which)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("value_dtype", ["float32", "float16"])
def test_what_is_no_number(native: Backend, value: float, value_dtype: str):
    packed = packed_of((3, 5, 7, 6), value_dtype)
    packed.values.view(-1)[3] = value
    check(native, packed, "all")


def test_a_tile_without_a_scale(native: Backend):
    """Its values are no numbers; where it keeps nothing, sums are as they were."""
    packed = packed_of((3, 5, 7, 6), "int8")
    packed.scales[5] = float("nan")
    rows = some_rows(packed, "all")
    kept = rows_of(native, packed, rows)
    ones = torch.ones(max(rows.numel(), kept.places))
    got = native.sum_kept(kept, packed.values, packed.scales, ones[: rows.numel()], None)
    bits = (packed.bitmap[5].flatten()[:, None] >> torch.arange(8)) & 1
    assert torch.equal(got.isnan(), bits.flatten() == 1)
    of_row = rows_of(native, packed, torch.tensor([5]))
    assert bool(native.scale_kept(of_row, packed.values, packed.scales, ones[: kept.places]).isnan().all())
    fields = (packed.values, packed.scales, packed.bitmap, packed.offsets)
    dense = native.unpack_rows(*fields, slice(5, 6), 0, packed.offsets.shape[1], torch.empty(1, kept.places, 2))
    assert torch.equal(dense[0, :, 0].isnan(), bits.flatten() == 1)


def test_sums_are_in_double_precision(native: Backend):
    """Many small squares beside a large one, which in float32 would swallow them."""
    packed = packed_of((40, 8, 4, 4), "float32")
    packed.values.fill_(1e-3)
    packed.values[0] = 30
    rows = some_rows(packed, "all")
    sums = native.sum_kept(rows_of(native, packed, rows), packed.values, packed.scales, torch.ones(rows.numel()), None)
    others = int((packed.bitmap[1:, 0, 0] & 1).sum())  # kept at the first place, besides the large one
    assert others > 0
    assert float(sums[0]) - 2 * 30**2 == pytest.approx(others * 2e-6, rel=1e-4)


@pytest.mark.parametrize("shape", [*SHAPES, (0, 3, 4, 4)])
def test_tile_index(native: Backend, shape: tuple[int, int, int, int]):
    packed = packed_of(shape, "float16")
    for offsets in (packed.offsets, packed.offsets + 1):
        expected, got = (backend.tile_index(packed.bitmap, offsets) for backend in (Backend(), native))
        assert expected is not None and got is not None
        assert (got.counts == expected.counts).all() and (got.starts == expected.starts).all()
        assert (got.ordered, got.filled) == (expected.ordered, expected.filled)
    assert packed.kept == 0 or not got.ordered


def test_values_with_a_gap_go_to_the_reference(native: Backend):
    packed = packed_of((3, 5, 7, 6), "float32")
    values, offsets = torch.cat([torch.zeros(1, 2), packed.values]), packed.offsets + 1
    index = native.tile_index(packed.bitmap, offsets)
    kept = native.kept_rows(packed.bitmap, offsets, some_rows(packed, "all"), index, torch.float32)
    assert kept.pattern is not None
    assert torch.equal(native.scale_kept(kept, values, packed.scales, torch.ones(kept.places)), packed.values)


@pytest.mark.parametrize("value_dtype", ["float32", "int8"])
@pytest.mark.parametrize("kind", ["identity", "tanh"])
@pytest.mark.parametrize("workspace", [None, 1])
def test_the_op(monkeypatch: pytest.MonkeyPatch, value_dtype: str, kind: str, workspace: int | None):
    """Forward and backward, whatever the workspace, with a scale of the activation."""
    made = []
    for name in ("reference", "native"):
        monkeypatch.setenv("SPECTRITON_BACKEND", name)
        packed = packed_of((6, 5, 7, 6), value_dtype).requires_grad_()
        weight, bias, scale = (torch.linspace(0.5, first, 5).requires_grad_() for first in (1.5, -1.0, 2.0))
        settings = {"activation": kind, "activation_scale": None if kind == "identity" else scale}
        out, mean, var = ops.spectral_batch_norm(
            packed, weight, bias, torch.zeros(5), torch.ones(5), True, workspace=workspace, **settings
        )
        assert isinstance(out, PackedSpectrum)
        dense = out.to_dense()
        inputs = [packed.edge, weight, bias, *([] if kind == "identity" else [scale])]
        grads = torch.autograd.grad(dense, inputs, torch.linspace(-1, 1, dense.numel()).view(dense.shape) * (1 + 1j))
        made.append((dense, mean, var, *grads))
    for expected, got in zip(*made, strict=True):
        # A value between two levels may go to either.
        tolerance = 1e-4 if value_dtype == "float32" else 3e-2
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=tolerance)


def behind_a_gap(packed: PackedSpectrum) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values = torch.cat([torch.zeros_like(packed.values[:1]), packed.values])
    return values, packed.scales, packed.bitmap, packed.offsets + 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value_dtype", DTYPES)
def test_statistics(native: Backend, shape: tuple[int, int, int, int], value_dtype: str):
    """Those of the maps in float64, far from zero, wherever the values stand."""
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(5)) + 20
    packed = ops.to_spectral(maps, threshold=0.9, value_dtype=value_dtype)
    spectrum = packed.to_dense().detach().to(torch.complex128)
    maps = torch.fft.irfft2(spectrum, s=shape[2:], norm="ortho")
    fields = (packed.values, packed.scales, packed.bitmap, packed.offsets)
    for given in (fields, behind_a_gap(packed)):
        found = native.norm_statistics(*given, list(shape), torch.float32, 0)
        assert found is not None
        torch.testing.assert_close(found[0].double(), maps.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1].double(), maps.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)
    assert native.norm_statistics(*fields, list(shape), torch.float64, 0) is None


@pytest.mark.parametrize("shape", [*SHAPES, (0, 3, 4, 4)])
@pytest.mark.parametrize("value_dtype", DTYPES)
@pytest.mark.parametrize("batch_statistics", [True, False])
def test_norm_gradients(
    monkeypatch: pytest.MonkeyPatch,
    native: Backend,
    shape: tuple[int, int, int, int],
    value_dtype: str,
    batch_statistics: bool,
):
    """As by single steps in double precision; the same where values stand elsewhere, or are written over."""
    packed, sizes, generator = packed_of(shape, value_dtype), list(shape), torch.Generator().manual_seed(3)
    fields = (packed.values, packed.scales, packed.bitmap, packed.offsets)
    grad, weight = torch.randn(packed.kept, 2, generator=generator), torch.randn(shape[1], generator=generator)
    mean, var = torch.randn(shape[1], generator=generator), torch.rand(shape[1], generator=generator) + 0.1
    monkeypatch.setenv("SPECTRITON_BACKEND", "reference")
    gap = torch.cat([torch.zeros(1, 2), grad])
    for gamma in (weight, None):
        norm = (None if gamma is None else gamma.double(), None, mean.double(), var.double(), None)
        settings = ("identity", sizes, batch_statistics, 1e-5, 0, True)
        expected = norm_gradients(grad.double(), *fields, *norm, *settings)
        for given, above, first in ((fields, grad, 0), (behind_a_gap(packed), gap, 1)):
            apart, over = torch.full_like(above, float("nan")), above.clone()
            for taken, out in ((above, apart), (over, over), (above, None)):
                found = native.norm_gradients(taken, *given, gamma, mean, var, sizes, batch_statistics, 1e-5, out, 0)
                assert found is not None
                made = expected[0] if out is None else out[first:]
                for got, exact in zip((made, *found), expected[:3], strict=True):
                    atol = 1e-5 * float(exact.abs().max()) if exact.numel() else 0
                    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=atol)


def test_offsets_beyond_the_values(native: Backend):
    packed, sizes = packed_of((3, 5, 7, 6), "float16"), [3, 5, 7, 6]
    fields = (packed.values[:-1], packed.scales, packed.bitmap, packed.offsets)
    with pytest.raises(ValueError, match="damaged"):
        native.norm_statistics(*fields, sizes, torch.float32, 0)
    grad, ones = torch.ones(packed.kept - 1, 2), torch.ones(5)
    with pytest.raises(ValueError, match="damaged"):
        native.norm_gradients(grad, *fields, None, ones, ones, sizes, True, 0.0, None, 0)


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (2, 1)])
def test_norm_planes(native: Backend, shape: tuple[int, int]):
    batch, channels = shape
    mean, weight, bias = torch.randn(3, channels, generator=torch.Generator().manual_seed(1))
    for gamma, beta in ((weight, bias), (None, None)):
        settings = (gamma, beta, mean, weight.square(), batch, 1e-5, torch.float32)
        torch.testing.assert_close(native.norm_planes(*settings), Backend().norm_planes(*settings))
