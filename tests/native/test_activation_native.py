"""tanh of kept coefficients in C, and its backward, against the reference in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import spectriton_native as native
from spectriton._backend import Backend
from spectriton._native import NativeBackend
from spectriton.reference import TileIndex, activate, activate_backward, unpack_rows
from spectriton_native import Part
from tests.native.spectra import FORMATS, SIZES, Room, Spectrum, parts_of, spectrum

pytestmark = pytest.mark.usefixtures("build")

SPECIAL = torch.tensor(
    [[0.0, -0.0], [torch.inf, -torch.inf], [torch.nan, 1.0], [0.6249999, -0.6250001], [1e-36, -9.01]]
)


def pairs(count: int) -> Tensor:
    """Of all sizes, with what functions could trip over at the end."""
    sizes = torch.tensor([1e-6, 1e-3, 0.1, 0.5, 1.0, 3.0, 30.0, 1e6]).repeat(count // 8 + 1)[:count, None]
    return torch.cat([torch.randn(count, 2, generator=torch.Generator().manual_seed(count)) * sizes, SPECIAL])


def some_scales(channels: int) -> Tensor:
    return torch.rand(channels, generator=torch.Generator().manual_seed(1)) * 10 + 0.1


def one_row(count: int) -> tuple[Part, Tensor]:
    """A row of which these places are kept, and their numbers."""
    tiles = -(-count // 32)
    places = torch.arange(tiles * 32)
    bitmap = (places < count).view(1, tiles, 4, 8).to(torch.uint8).mul(2 ** torch.arange(8)).sum(-1).to(torch.uint8)
    starts = torch.arange(tiles, dtype=torch.int32)[None] * 32
    return Part.of(bitmap, slice(0, 1), 0, tiles, starts, count), places[:count]


@pytest.mark.parametrize("channels", [0, 1, 3, 200])
@pytest.mark.parametrize("count", [0, 1, 127, 5000])
def test_tanh(count: int, channels: int) -> None:
    """By a scale for each channel, or none for 0 channels."""
    x = pairs(count)
    part, places = one_row(len(x))
    y = torch.zeros(1, part.positions, 2)
    y[0, : len(x)] = x
    scales = some_scales(channels) if channels else None
    room = Room(*x.shape)
    native.store_rows(part, y, room.tensor, None, True, scales)
    expected = activate(x.double(), "tanh", None if scales is None else scales[places % channels].double()[:, None])
    torch.testing.assert_close(room.tensor.double(), expected, rtol=5e-7, atol=0, equal_nan=True)
    assert torch.equal(room.tensor.signbit(), x.signbit()) and room.guarded


@pytest.mark.parametrize("channels", [0, 1, 3, 200])
@pytest.mark.parametrize("count", [0, 1, 127, 5000])
def test_tanh_backward(count: int, channels: int) -> None:
    x = pairs(count)
    part, places = one_row(len(x))
    scales = some_scales(channels) if channels else None
    wide = None if scales is None else scales[places % channels].double()[:, None]
    output = activate(x.double(), "tanh", wide).float()
    grad, room = pairs(count).flip(0).clamp(-3, 3), Room(1, part.positions, 2)
    of_scales = native.unpack_gradient_rows(part, grad, output, torch.empty(0), scales, room.tensor)
    of_input, terms = activate_backward(grad.double(), output.double(), "tanh", wide)
    kept, rest = room.tensor[0].split([len(x), part.positions - len(x)])
    torch.testing.assert_close(kept.double(), of_input, rtol=1e-6, atol=2e-6, equal_nan=True)
    assert not rest.any() and room.guarded
    if terms is None:
        assert of_scales is None
    else:
        expected = torch.zeros(channels, dtype=torch.float64).index_add_(0, places % channels, terms.sum(1))
        torch.testing.assert_close(of_scales.double(), expected, rtol=1e-6, atol=1e-5, equal_nan=True)


def outputs(given: Spectrum) -> None:
    """Makes the values of floats what tanh can have given with scales of one and more, some of them not numbers."""
    if given.values.dtype.is_floating_point:
        generator = torch.Generator().manual_seed(2)
        given.values.copy_(torch.rand(given.values.shape, generator=generator) * 2 - 1)
        given.values[::50] = torch.nan


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_unpack_gradient_rows(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Tiles in any order, with gaps between them; from any row and tile on."""
    for density, channels in ((0.0, 3), (0.05, 7), (0.6, 1), (0.9, 40), (0.4, 0)):
        given = spectrum(*size, dtype, density)
        outputs(given)
        scales = some_scales(channels) + 127 if channels else None
        count = given.values.shape[0]
        grad = torch.randn(count, 2, generator=torch.Generator().manual_seed(3))
        for rows, t0, t1 in parts_of(given):
            part = Part.of(given.bitmap, rows, t0, t1, given.offsets, count)
            shape = (*part.tiles_of(), given.tile, 2)
            room, zeros = Room(*shape), torch.zeros(0)
            of_scales = native.unpack_gradient_rows(part, grad, given.values, given.scales, scales, room.tensor)
            pattern = (given.bitmap, given.offsets, rows, t0, t1)
            wide = torch.float64
            dense, output = (torch.empty(part.row_count, part.positions, 2, dtype=wide) for _ in range(2))
            unpack_rows(grad.double(), zeros, *pattern, dense)
            unpack_rows(given.values, given.scales, *pattern, output)
            channel = torch.arange(t0 * given.tile, t1 * given.tile) % max(1, channels)
            of_places = None if scales is None else scales[channel].double()[:, None]
            expected, terms = activate_backward(dense, output, "tanh", of_places)
            expected[dense == 0] = 0  # where nothing is kept
            torch.testing.assert_close(
                room.tensor.view(dense.shape).double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True
            )
            assert room.guarded
            if terms is not None:
                terms[dense == 0] = 0
                sums = torch.zeros(channels, dtype=wide).index_add_(0, channel, terms.sum((0, 2)))
                torch.testing.assert_close(of_scales.double(), sums, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", ["identity", "tanh", "asinh"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_unpack_gradient_rows_by_the_backend(dtype: torch.dtype, kind: str) -> None:
    given = spectrum(5, 100, 32, dtype)
    outputs(given)
    grad = torch.randn(given.values.shape[0], 2, generator=torch.Generator().manual_seed(4))
    index = TileIndex(given.bitmap, given.offsets)
    for channels, rows in ((5, slice(0, 5)), (20, slice(2, 4)), (5, slice(1, 1))):
        for scale in (None, some_scales(channels) + 127):
            results = []
            for backend in (Backend(), NativeBackend()):
                out = torch.empty(rows.stop - rows.start, given.tiles * given.tile, 2)
                packed = (given.values, given.scales, given.bitmap, given.offsets)
                results.append(
                    (out, backend.unpack_gradient_rows(grad, *packed, rows, kind, scale, channels, out, index))
                )
            for got, expected in zip(*results, strict=True):
                assert (got is None) == (expected is None)
                if got is not None:
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_the_gradient_of_scales_does_not_depend_on_threads() -> None:
    given = spectrum(40, 5000, 1024, density=0.3)
    outputs(given)
    count, before, results = given.values.shape[0], torch.get_num_threads(), []
    values, scales = given.values.nan_to_num(0.5), some_scales(7)
    grad = torch.randn(count, 2, generator=torch.Generator().manual_seed(5))
    part = Part.of(given.bitmap, slice(0, 40), 0, given.tiles, given.offsets, count)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = torch.empty(40, given.tiles * 1024, 2)
            results.append((native.unpack_gradient_rows(part, grad, values, given.scales, scales, out), out))
    finally:
        torch.set_num_threads(before)
    for sums, out in results[1:]:
        assert torch.equal(sums, results[0][0]) and torch.equal(out, results[0][1])
