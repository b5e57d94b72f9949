"""Codecs: what comes back, what it costs, and that nothing is lost unseen."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from spectriton import memory, ops
from spectriton.codec import BlockCodec, CastCodec, Codec, QuantiseCodec, SpectrumCodec, make_codec
from spectriton.reference import block_codec

SHAPES = [(2, 3, 8, 8), (1, 5, 7, 9), (3, 2, 1, 1), (2, 3, 2, 13), (0, 3, 4, 4), (2, 0, 4, 4)]
CODECS: list[Codec] = [
    CastCodec(torch.bfloat16),
    CastCodec(torch.float16, rounding="stochastic"),
    QuantiseCodec(bits=1),
    QuantiseCodec(bits=2, workspace=1),
    QuantiseCodec(bits=4, group=64, rounding="nearest"),
    QuantiseCodec(bits=8, group=8),
    BlockCodec(),
    BlockCodec(density=0.5, bits=4, mix=2, workspace=1),
    BlockCodec(bits=8, mix=1, rounding="stochastic"),
    SpectrumCodec(density=0.5),
    SpectrumCodec(density=0.5, bits=16, rounding="stochastic", workspace=1),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def smooth(*shape: int, seed: int = 0) -> torch.Tensor:
    """Maps that look like those of a network: smooth, channels of their own mean and scale."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(*shape, generator=generator)
    if maps.numel():
        for dim in (2, 3):
            maps = maps + maps.roll(1, dim) + maps.roll(2, dim)
    scale = 1 + torch.arange(shape[1]).view(-1, 1, 1)
    return maps * scale + scale


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, torch.float32) for shape in SHAPES), *((SHAPES[1], dtype) for dtype in DTYPES[1:])]
)
@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_shape_dtype_and_size(codec: Codec, shape: tuple[int, ...], dtype: torch.dtype):
    x = smooth(*shape).to(dtype)
    encoded = codec.encode(x)
    assert encoded.shape == x.shape and encoded.dtype == dtype
    assert encoded.nbytes == sum(t.untyped_storage().nbytes() for t in encoded.tensors)
    assert not any(t.requires_grad for t in encoded.tensors)
    if not isinstance(codec, SpectrumCodec):  # it keeps whole bins of a histogram
        # The size is known from the shape alone.
        assert encoded.nbytes == codec.encode(torch.zeros_like(x)).nbytes
    out = encoded.decode()
    assert out.shape == x.shape and out.dtype == dtype and out.isfinite().all()
    assert encoded.decode(torch.float64).dtype == torch.float64


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_strides_do_not_matter(codec: Codec):
    x = smooth(4, 6, 7, 5)
    expected = codec.encode(x, seed=1).decode()
    for other in (x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([x, x], -1)[..., 0]):
        out = codec.encode(other, seed=1).decode()
        # Sums for the statistics of blocks run in another order.
        assert relative_error(out, expected) <= (0.01 if isinstance(codec, BlockCodec) else 0)
        assert out.is_contiguous()
    last = codec.encode(x.contiguous(memory_format=torch.channels_last)).decode()
    assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()
    assert relative_error(last, x) < 2 * relative_error(expected, x)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_repeatable_and_rebuilt_from_tensors(codec: Codec):
    x = smooth(3, 4, 9, 9)
    state = torch.get_rng_state()
    first, second = codec.encode(x), codec.encode(x.clone())
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.tensors, second.tensors, strict=True):
        assert torch.equal(a, b)
    copies = tuple(t.clone() for t in first.tensors)
    assert torch.equal(first.with_tensors(copies).decode(), first.decode())
    again = pickle.loads(pickle.dumps(codec))
    assert again == codec and hash(again) == hash(codec) and repr(again) == repr(codec)
    with pytest.raises(ValueError, match="pass them all"):
        first.with_tensors(copies[:-1])


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_autocast_does_not_reach_into_codecs(codec: Codec):
    x = smooth(3, 4, 9, 9)
    expected = codec.encode(x, seed=1).decode()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(codec.encode(x, seed=1).decode(), expected, rtol=0, atol=0)


STOCHASTIC = [
    CastCodec(torch.bfloat16, rounding="stochastic"),
    CastCodec(torch.float16, rounding="stochastic"),
    QuantiseCodec(bits=2, group=64),
    SpectrumCodec(density=1.0, bits=4, rounding="stochastic"),
]


@pytest.mark.parametrize("codec", STOCHASTIC, ids=repr)
def test_stochastic_rounding_is_unbiased(codec: Codec):
    x = smooth(2, 3, 6, 6)
    errors = torch.stack([codec.encode(x, seed=s).decode(torch.float64) for s in range(400)]) - x.double()
    signs = torch.randn(216, 32, generator=torch.Generator().manual_seed(0)).sign().double()
    # Weighted sums of all errors: their means over seeds are normal, so 4.5 standard errors are exceeded by one of 32
    # with a probability of 2e-4.
    sums = errors.flatten(1) @ torch.cat([signs, torch.ones(216, 1).double()], 1)
    assert (sums.std(0) > 0).all()
    assert (sums.mean(0) / (sums.std(0) / 20)).abs().max() < 4.5
    if isinstance(codec, SpectrumCodec):
        return  # the transform spreads errors over all values of a map
    # Errors of different values are independent: the spread of a sum is that of its terms.
    spread = errors.var(0).sum().sqrt()
    torch.testing.assert_close(sums.std(0), spread.expand(33), rtol=0.2, atol=0)


@pytest.mark.parametrize("codec", STOCHASTIC, ids=repr)
def test_seeds(codec: Codec):
    x = smooth(2, 3, 6, 6)
    decoded = codec.encode(x, seed=7).decode()
    assert torch.equal(decoded, codec.encode(x, seed=torch.tensor(7)).decode())
    assert not torch.equal(decoded, codec.encode(x, seed=8).decode())
    assert not torch.equal(decoded, codec.encode(x, seed=7 + (1 << 40)).decode())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_what_is_not_finite_stays_visible(codec: Codec, dtype: torch.dtype, value: float):
    x = smooth(2, 4, 8, 8).to(dtype)
    x[1, 2, 3, 4] = value
    out = codec.encode(x).decode()
    assert not out[1, 2, 3, 4].isfinite()


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_half_precision_does_not_overflow(codec: Codec):
    x = (smooth(2, 4, 8, 8) / 50).clamp(-1, 1).mul(65504).to(torch.float16)
    assert codec.encode(x).decode().isfinite().all()
    assert codec.encode(x.float() * 2).decode(torch.float16).isfinite().all()


@pytest.mark.parametrize("value", [0.0, 2.5, -0.1])
@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_constant_maps_come_back_as_they_are(codec: Codec, value: float):
    x = torch.full((3, 4, 6, 6), value)
    # A format of few bits may lie between its values.
    tolerance = 4e-3 if isinstance(codec, (CastCodec, SpectrumCodec)) else 1e-6
    torch.testing.assert_close(codec.encode(x).decode(), x, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize(("bits", "bound"), [(1, 0.5), (2, 0.17), (4, 0.034), (8, 0.002)])
def test_quantised_to_the_nearest_level(bits: int, bound: float):
    x = torch.rand(2, 4, 8, 8)
    codec = QuantiseCodec(bits=bits, rounding="nearest")
    encoded = codec.encode(x)
    assert (encoded.decode() - x).abs().max() <= bound
    assert encoded.bits_per_value == bits + 0.25


def test_cast():
    x = smooth(2, 3, 5, 5)
    assert torch.equal(CastCodec(torch.bfloat16).encode(x).decode(), x.bfloat16().float())
    assert torch.equal(CastCodec(torch.float32, rounding="stochastic").encode(x).decode(), x)


def test_codecs_by_transform():
    assert make_codec() == BlockCodec() == make_codec("dct", density=0.25, bits=4)
    assert make_codec("fft", density=0.5, workspace=1 << 20) == SpectrumCodec(density=0.5, workspace=1 << 20)
    assert make_codec("none", density=1, rounding="nearest") == QuantiseCodec(bits=2, rounding="nearest")
    assert make_codec("cast", bits=16) == CastCodec(torch.bfloat16)


def test_spectrum_is_the_packed_one():
    x = smooth(4, 3, 9, 10)
    packed = ops.to_spectral(x, density=0.3, value_dtype="int8")
    encoded = SpectrumCodec(density=0.3, bits=8).encode(x)
    assert encoded.nbytes == packed.nbytes
    torch.testing.assert_close(encoded.decode(), ops.to_spatial(packed), rtol=0, atol=0)


@pytest.fixture
def fresh_tables() -> Iterator[None]:
    """Constants that are kept for later calls are made anew, before and after."""
    caches = [f for f in vars(block_codec).values() if hasattr(f, "cache_clear")]
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("fresh_tables")
@pytest.mark.parametrize("codec", [c for c in CODECS if not isinstance(c, SpectrumCodec)], ids=repr)
def test_the_host_never_waits(codec: Codec, monkeypatch: pytest.MonkeyPatch):
    """Tensors without data can neither be read nor have a shape that depends on data."""
    make_plan = block_codec.make_plan
    # Kernels cannot be launched on nothing.
    monkeypatch.setenv("SPECTRITON_BACKEND", "reference")
    # As on a GPU; on the CPU there is nothing to wait for.
    monkeypatch.setattr(block_codec, "make_plan", lambda stored, layout, compact: make_plan(stored, layout, False))
    with FakeTensorMode():
        out = codec.encode(torch.empty(4, 6, 16, 9), seed=None).decode()
    assert out.shape == (4, 6, 16, 9)


@pytest.mark.parametrize("codec", [BlockCodec(), BlockCodec(rounding="stochastic"), QuantiseCodec()], ids=repr)
def test_temporaries_are_bounded(codec: Codec):
    x = smooth(64, 32, 24, 24)
    codec = replace(codec, workspace=1 << 20)
    codec.encode(x).decode()  # tables that stay
    with memory.track(torch.device("cpu")) as usage:
        encoded = codec.encode(x)
    assert usage.peak_bytes < x.nbytes + encoded.nbytes + 1.5 * (1 << 20)
    with memory.track(torch.device("cpu")) as usage:
        out = encoded.decode()
    assert usage.peak_bytes < out.nbytes + encoded.nbytes + 1.5 * (1 << 20)


BAD = [
    (lambda: make_codec("fast"), ValueError, "did you mean 'cast'"),
    (lambda: make_codec("none", density=0.5), ValueError, "choose a transform"),
    (lambda: make_codec("cast", bits=8), ValueError, "one of 16, 32"),
    (lambda: make_codec("fft", bits=5), ValueError, "one of 4, 8, 16, 32"),
    (lambda: BlockCodec(workspace=0), ValueError, "positive number of bytes"),
    (lambda: CastCodec(torch.int8), ValueError, "CastCodec: dtype got torch.int8"),
    (lambda: CastCodec(rounding="up"), ValueError, "one of 'nearest', 'stochastic'"),
    (lambda: QuantiseCodec(bits=3), ValueError, "one of 1, 2, 4, 8"),
    (lambda: QuantiseCodec(group=100), ValueError, "multiple of 8"),
    (lambda: BlockCodec(density=0.0), ValueError, "above 0"),
    (lambda: BlockCodec(density=1, bits=9), ValueError, "8 / density"),
    (lambda: BlockCodec(mix=0), ValueError, "number of channels"),
    (lambda: QuantiseCodec().encode(torch.zeros(2, 3)), ValueError, "4 dimensions"),
    (lambda: QuantiseCodec().encode(torch.zeros(1, 2, 3, 4, dtype=torch.int32)), TypeError, r"\.float\(\)"),
    (lambda: QuantiseCodec().encode(torch.zeros(1, 2, 3, 4), seed=0.5), TypeError, "an int64 tensor without"),
    (
        lambda: QuantiseCodec().encode(torch.zeros(1, 2, 3, 4), seed=torch.zeros(2)),
        TypeError,
        "an int64 tensor without",
    ),
]


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_bad_input(call, kind: type[Exception], text: str):
    with pytest.raises(kind, match=text):
        call()


@pytest.mark.parametrize("rate", [0.5, 1.0, 1.5, 2.0, 3.3])
@pytest.mark.parametrize("shape", [(8, 12, 28, 28), (16, 40, 14, 14), (64, 48, 7, 7), (1, 8, 61, 45)])
def test_blocks_cost_what_was_asked_for(shape: tuple[int, ...], rate: float):
    encoded = BlockCodec(density=0.5, bits=2 * rate).encode(smooth(*shape))
    slack = 8 * encoded.tensors[0].shape[0] / encoded.shape.numel()  # records are whole bytes
    assert rate - slack <= encoded.bits_per_value <= rate


def test_error_of_blocks_falls_with_the_rate_and_with_mixing():
    x = smooth(16, 12, 28, 28)
    x = x + 2 * x.roll(1, 1)
    errors = [relative_error(BlockCodec(density=1, bits=rate).encode(x).decode(), x) for rate in (0.5, 1, 2, 4, 6)]
    assert all(later < 0.75 * earlier for earlier, later in pairwise(errors))
    alone = relative_error(BlockCodec(density=1, bits=2, mix=1).encode(x).decode(), x)
    grouped = relative_error(QuantiseCodec(bits=2, rounding="nearest").encode(x).decode(), x)
    assert errors[2] < alone < grouped


def test_no_value_of_blocks_is_lost_for_its_scale():
    """Channels whose scales lie far apart are coded alike, and neither squares nor sums overflow or vanish."""
    x = smooth(16, 8, 16, 16)
    codec = BlockCodec(density=0.5, bits=4)
    scale = 10.0 ** torch.tensor([-30, -10, -3, 0, 3, 10, 20, 30])
    error = codec.encode(x * scale[:, None, None]).decode() / scale[:, None, None] - x
    expected = codec.encode(x).decode() - x
    torch.testing.assert_close(error.std((0, 2, 3)), expected.std((0, 2, 3)), rtol=0.05, atol=0)


def test_outliers_saturate():
    x = smooth(64, 4, 8, 8)
    x[63, 1, 3, 3] = 1e6
    out = BlockCodec().encode(x).decode()
    assert out.isfinite().all() and out[63, 1, 3, 3] > 1e4


def test_spectrum_stored_by_component_and_frequency_where_there_are_few_blocks():
    x = smooth(2, 16, 8, 8)
    codec = BlockCodec(density=1, bits=4, mix=1)
    encoded = codec.encode(x)
    assert encoded.tensors[3].dtype == torch.int8
    assert relative_error(encoded.decode(), x) < 0.3
