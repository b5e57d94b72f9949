"""The packed spectrum as users hold it: contents, sizes, formats, moving, saving."""

from __future__ import annotations

import io
import pickle

import pytest
import torch

from spectriton import PackedSpectrum, ops
from spectriton.frequencies import frequency_grid
from spectriton.packed import layout, tile_size
from tests import oracles

SHAPES = [(2, 3, 8, 8), (1, 1, 5, 7), (3, 5, 1, 6), (2, 40, 7, 4), (130, 3, 9, 9), (1, 1, 1, 1), (0, 3, 4, 4)]


def spectrum_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return oracles.half_spectrum(torch.randn(shape, dtype=dtype, generator=generator))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.0, 0.8, float("inf")])
def test_pack_keeps_what_the_threshold_says(shape: tuple[int, ...], dtype: torch.dtype, threshold: float):
    spectrum = spectrum_of(shape, dtype)
    packed = ops.pack(spectrum, size=shape[2:], threshold=threshold)
    assert tuple(packed.shape) == shape
    expected = oracles.masked(spectrum, threshold)
    torch.testing.assert_close(packed.to_dense(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)
    grid = frequency_grid(*shape[2:])
    kept = oracles.masked(torch.ones_like(spectrum) * spectrum.abs(), threshold).flatten(2)[..., grid.index] != 0
    kept[..., 0] = True
    if spectrum.numel():
        assert packed.kept == int(kept.sum()) if threshold else packed.density == 1.0


def test_row_layout_follows_the_format():
    """Bits, offsets and values where docs/packed-format.md says they are."""
    shape = (3, 50, 4, 6)
    spectrum = spectrum_of(shape)
    packed = ops.pack(spectrum, size=shape[2:], threshold=0.7)
    grid, sizes = frequency_grid(4, 6), layout(shape)
    rows = spectrum.flatten(0, 1).flatten(1).T[grid.index]
    at = 0
    for f in range(sizes.frequencies):
        for t in range(sizes.tiles):
            assert packed.offsets[f, t] == at
            for j in range(sizes.tile):
                position = t * sizes.tile + j
                bit = int(packed.bitmap[f, t, j // 8]) >> (j % 8) & 1
                if position >= sizes.row:
                    assert bit == 0
                    continue
                value = rows[f, position]
                assert bit == int(f == 0 or abs(complex(value)) >= 0.7)
                if bit:
                    assert complex(*packed.values[at].tolist()) == pytest.approx(complex(value), abs=1e-12)
                    at += 1
    assert at == packed.kept


def test_equality_is_kept_and_below_is_dropped():
    spectrum = torch.zeros(1, 1, 4, 3, dtype=torch.complex64)
    spectrum[0, 0, 1, 1], spectrum[0, 0, 2, 1], spectrum[0, 0, 3, 1] = 3 + 4j, 5, 4.999
    dense = ops.pack(spectrum, size=(4, 4), threshold=5.0).to_dense()[0, 0]
    assert dense[1, 1] == 3 + 4j
    assert dense[2, 1] == 5
    assert dense[3, 1] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), complex(0, float("nan"))])
@pytest.mark.parametrize("value_dtype", ["float32", "float16", "int8", "int4"])
def test_what_is_not_a_number_is_kept_and_seen(value: complex, value_dtype: str):
    spectrum = torch.zeros(2, 3, 6, 4, dtype=torch.complex64)
    spectrum[1, 2, 3, 1] = value
    packed = ops.pack(spectrum, size=(6, 6), threshold=2.0, value_dtype=value_dtype)
    assert packed.kept == 2 * 3 + 1  # the zero frequency, and this one
    assert not torch.isfinite(torch.view_as_real(packed.to_dense()[1, 2, 3, 1])).all()


@pytest.mark.parametrize("density", [0.0, 0.1, 0.25, 0.6, 1.0])
def test_density_rule_keeps_the_largest(density: float):
    shape = (4, 8, 16, 15)
    spectrum = spectrum_of(shape)
    packed = ops.pack(spectrum, size=shape[2:], density=density)
    grid = frequency_grid(16, 15)
    least = 1 / grid.count  # the zero frequency stays
    assert packed.density == pytest.approx(max(density, least), abs=0.01)
    assert packed.density <= max(density, least) + 1e-9
    modulus = spectrum.flatten(2)[..., grid.index][..., 1:].abs()
    kept = packed.to_dense().flatten(2)[..., grid.index][..., 1:] != 0
    if kept.any() and not kept.all():
        assert modulus[kept].min() >= modulus[~kept].max()


@pytest.mark.parametrize(
    ("value_dtype", "bits", "error"),
    [("float64", 128, 0), ("float32", 64, 1e-6), ("float16", 32, 2e-3), ("bfloat16", 32, 2e-2), ("int8", 16, 0.02),
     ("int4", 8, 0.35)],
)  # fmt: skip
def test_value_formats(value_dtype: str, bits: int, error: float):
    shape = (8, 16, 12, 12)
    spectrum = spectrum_of(shape)
    packed = ops.pack(spectrum, size=shape[2:], threshold=1.0, value_dtype=value_dtype)
    assert packed.value_dtype == value_dtype
    assert packed.values.untyped_storage().nbytes() * 8 == packed.kept * bits
    torch.testing.assert_close(packed.to_dense(), oracles.masked(spectrum, 1.0), rtol=0, atol=error + 1e-12)
    as_dtype = getattr(torch, value_dtype, None)
    if as_dtype is not None:
        assert ops.pack(spectrum, size=shape[2:], threshold=1.0, value_dtype=as_dtype).value_dtype == value_dtype


def test_integer_scales_adapt_to_each_tile():
    """A large coefficient coarsens only its own tile."""
    spectrum = torch.full((64, 16, 8, 5), 0.01 + 0.02j)
    spectrum[0, 0, 1, 1] = 1000
    dense = ops.pack(spectrum, size=(8, 8), threshold=0.0, value_dtype="int8").to_dense()
    assert dense[0, 0, 1, 1].real == pytest.approx(1000, rel=1e-6)
    torch.testing.assert_close(dense[:, :, 2, 1], spectrum[:, :, 2, 1], rtol=0, atol=0.02 / 127)


def test_bytes_follow_the_formula():
    """(d b + 0.5) / 8 bytes per real value of the map, and the offsets."""
    shape = (64, 16, 32, 32)
    packed = ops.pack(spectrum_of(shape, torch.float32), size=shape[2:], threshold=1.2)
    sizes, values = layout(shape), torch.Size(shape).numel()
    coefficients = sizes.frequencies * sizes.row
    expected = packed.density * coefficients * 8 + coefficients / 8 + packed.offsets.numel() * 4
    assert packed.nbytes == pytest.approx(expected, rel=1e-9)
    assert coefficients == pytest.approx(values / 2, rel=0.01)
    assert packed.offsets.numel() * 4 < 0.01 * values


@pytest.mark.parametrize(
    "shape", [(1, 1, 4, 4), (128, 64, 16, 16), (64, 3, 224, 224), (7, 13, 28, 28), (128, 6, 28, 28)]
)
def test_tiles_are_powers_of_two_with_little_padding(shape: tuple[int, int, int, int]):
    tile, sizes = tile_size(*shape), layout(shape)
    assert tile in (32, 64, 128, 256, 512, 1024)
    assert sizes.row <= sizes.padded_row < sizes.row + tile
    assert tile == 32 or 8 * (sizes.padded_row - sizes.row) <= sizes.row


def test_repr_says_what_it_is():
    packed = ops.pack(spectrum_of((2, 3, 8, 8), torch.float32), size=(8, 8), threshold=0.5, value_dtype="int8")
    text = repr(packed)
    assert "shape=(2, 3, 8, 8)" in text
    assert f"density={packed.density:.3f}" in text
    assert "value_dtype=int8" in text
    assert " B (" in text and "% of dense" in text


@pytest.mark.parametrize("value_dtype", ["float32", "int4"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_saving_and_loading(value_dtype: str, how: str):
    packed = ops.pack(spectrum_of((2, 3, 8, 8), torch.float32), size=(8, 8), threshold=0.5, value_dtype=value_dtype)
    if how == "torch":
        file = io.BytesIO()
        torch.save({"packed": packed}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)["packed"]
    else:
        loaded = pickle.loads(pickle.dumps(packed))
    assert isinstance(loaded, PackedSpectrum)
    assert torch.equal(loaded.to_dense(), packed.to_dense())
    assert repr(loaded) == repr(packed)
    assert loaded.dtype == packed.dtype == torch.complex64


def test_moving_and_detaching():
    spectrum = spectrum_of((2, 3, 8, 8)).requires_grad_()
    packed = ops.pack(spectrum, size=(8, 8), threshold=0.5)
    assert packed.requires_grad and not packed.detach().requires_grad
    assert packed.to("cpu") is packed
    moved = packed.to("meta")
    assert moved.device.type == "meta" and moved.values.device.type == "meta"
    with pytest.raises(TypeError, match=r"PackedSpectrum.to: dtype got torch.float16, expected a device"):
        packed.to(torch.float16)
    leaf = packed.detach().requires_grad_()
    leaf.to_dense().abs().sum().backward()
    assert leaf.edge.grad is not None and leaf.edge.grad.shape == (packed.kept, 2)


def test_edge_takes_no_memory():
    packed = ops.pack(spectrum_of((8, 8, 16, 16)), size=(16, 16), threshold=0.0)
    assert packed.edge.shape == (packed.kept, 2)
    assert packed.edge.untyped_storage().nbytes() == 8
