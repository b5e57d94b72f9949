"""The prediction of the steps of twins, and what is counted for it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import twin_step
from bench.step_traffic import NETWORK, Machine, Operation, Traffic, assuming, counting, seconds_of
from spectriton import nn as snn
from spectriton import ops

TINY = ("--models", "vgg16_bn", "--image-size", "32", "--batch", "2", "--width", "0.0625", "--classes", "5")

# Maps (4, 8, 8, 8): 34 frequencies, four of them their own conjugates, of 32 coefficients, which are one tile.
SHAPE, FREQUENCIES, ROW = (4, 8, 8, 8), 34, 32
DENSE = FREQUENCIES * ROW * 8
PATTERN = FREQUENCIES * (ROW // 8 + 4)  # bitmap and offsets


def counted(make: Callable[[], Any], density: float = 0.25) -> dict[str, list[tuple[int, int, int]]]:
    """(read, written, flops) of the operations of what is called within, by their names."""
    traffic = Traffic()
    with counting(traffic, meta=True), assuming(density):
        call = make()
        traffic.operations.clear()
        call()
    found: dict[str, list[tuple[int, int, int]]] = {}
    for o in traffic.operations:
        found.setdefault(o.name, []).append((o.read, o.written, o.flops))
    return found


def total(moved: list[tuple[int, int, int]]) -> tuple[int, ...]:
    return tuple(sum(numbers) for numbers in zip(*moved, strict=True))


def images() -> torch.Tensor:
    return torch.empty(SHAPE, device="meta")


def packed(layer: snn.ToSpectral, shape: tuple[int, ...] = SHAPE) -> Any:
    with torch.no_grad(), ops.deferred_packing():
        return layer(torch.empty(shape, device="meta")).detach().requires_grad_()


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_a_packed_spectrum_counts_as_what_it_keeps(density: float):
    def there_and_back() -> Callable[[], Any]:
        x, there, back = images(), snn.ToSpectral(threshold=0.5), snn.ToSpatial()

        def call() -> None:
            with ops.deferred_packing():
                back(there(x))

        return call

    found = counted(there_and_back, density)
    kept = int(density * DENSE)
    assert found["pack_rows"] == [(DENSE, kept + PATTERN, 0)]
    # Of the half spectrum, 8 x 5, all 40 places are written, and read as if they were stored.
    share = Fraction(40, FREQUENCIES)
    assert found["unpack_planes"] == [(int(share * (kept + PATTERN)), int(share * DENSE), 0)]


@pytest.mark.parametrize("workspace", [None, 1 << 15])
def test_a_block_counts_the_same_in_chunks(workspace: int | None):
    def step_of_block() -> Callable[[], Any]:
        x, layer = packed(snn.ToSpectral(threshold=0.5)), snn.SpecBlock(8, 16, 3, workspace=workspace, device="meta")

        def call() -> None:
            with ops.deferred_packing():
                edge = layer(x).edge
                edge.backward(torch.empty(edge.shape, device="meta"))

        return call

    found = counted(step_of_block)
    chunks = len(found["pack_rows"])
    assert chunks == 1 if workspace is None else chunks > 2
    # Maps with 16 channels are of twice the size, in one tile a frequency as well.
    inputs, outputs = DENSE // 4 + PATTERN, 2 * DENSE // 4 + FREQUENCIES * (2 * ROW // 8 + 4)
    assert total(found["pack_rows"]) == (2 * DENSE, outputs, 0)
    # Input in forward and backward; gradients, and output for the derivative of the activation.
    assert total(found["unpack_rows"]) == (2 * inputs, 2 * DENSE, 0)
    assert total(found["unpack_gradient_rows"]) == (outputs + 2 * DENSE // 4, 2 * DENSE, 0)
    assert total(found["gather_rows"]) == (DENSE + PATTERN, DENSE // 4, 0)
    # Each complex weight is four numbers. Products: the output, its adjoint, and the gradient of the weights.
    weights, product = FREQUENCIES * 16 * 32 * 4, 2 * FREQUENCIES * 4 * 16 * 32
    assert total(found["bmm"]) == (6 * DENSE + 2 * weights, 3 * DENSE + weights, 3 * product)
    taps, basis = 16 * 8 * 9 * 4, FREQUENCIES * 9 * 8
    spectra = found["kernel_spectrum"]
    assert sum(read + written for read, written, _ in spectra) == 2 * (weights + basis) + len(spectra) * taps


# What the host launches for a chunk on a GPU: a step of a large network has thousands of chunks, and a device that is
# through with one before the host has launched the next is idle.
OF_BLOCK = ["kernel_spectrum", "unpack_rows", "bmm", "pack_rows"]
OF_BLOCK_BACKWARD = [
    *("unpack_gradient_rows", "kernel_spectrum", "unpack_rows", "bmm", "kernel_spectrum_adjoint", "bmm", "gather_rows")
]
OF_MAPS = ["unpack_planes", "_fft_c2r", "pool_planes", "_fft_r2c", "rows_of_half", "pack_rows"]
OF_MAPS_BACKWARD = ["unpack_planes", "_fft_c2r", "spread_planes", "_fft_r2c", "gather_planes"]


@pytest.mark.parametrize(
    ("layer", "of_chunk", "of_chunk_backward"),
    [
        (lambda **given: snn.SpecBlock(32, 16, 3, **given), OF_BLOCK, OF_BLOCK_BACKWARD),
        (lambda **given: snn.SpatialReLU(**given), OF_MAPS, OF_MAPS_BACKWARD),
    ],
    ids=["block", "relu"],
)
def test_what_a_chunk_takes(layer: Callable[..., torch.nn.Module], of_chunk: list[str], of_chunk_backward: list[str]):
    """Nothing but what is listed grows with the number of chunks."""

    def step(workspace: int) -> Counter[str]:
        def step_of_layer() -> Callable[[], Any]:
            x = packed(snn.ToSpectral(threshold=0.5), (512, 32, 8, 8))
            net = layer(workspace=workspace).to("meta")

            def call() -> None:
                with ops.deferred_packing():
                    edge = net(x).edge
                    edge.backward(torch.empty(edge.shape, device="meta"))

            call()  # constants are made once
            return call

        return Counter({name: len(times) for name, times in counted(step_of_layer).items()})

    few, many = step(1 << 23), step(1 << 21)
    more = Counter({name: many[name] - few[name] for name in many | few if many[name] != few[name]})
    forward = more["pack_rows"]
    backward = next(more[name] // of_chunk_backward.count(name) for name in of_chunk_backward if name not in of_chunk)
    assert forward > 1 and backward > 1
    expected = Counter({name: times * forward for name, times in Counter(of_chunk).items()})
    expected += Counter({name: times * backward for name, times in Counter(of_chunk_backward).items()})
    assert more == expected


def test_a_fourier_transform_is_counted_pass_by_pass():
    maps, half = 2 * 4 * 6 * 4, 2 * 4 * 4 * 8

    def transforms() -> Callable[[], Any]:
        x = torch.empty(2, 4, 6, device="meta")
        return lambda: torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho"), s=(4, 6), norm="forward")

    # Rows, columns, norm; copy, columns, rows, and no norm.
    assert counted(transforms) == {
        "_fft_r2c": [(maps + half + half, half + half + half, 0)],
        "_fft_c2r": [(half + half + half, half + half + maps, 0)],
    }


def test_what_is_put_somewhere_counts_there_only():
    def puts() -> Callable[[], Any]:
        x, rows = torch.empty(10, 6, device="meta"), torch.empty(3, dtype=torch.long, device="meta")

        def call() -> None:
            x.index_fill_(0, rows, 0)
            x[rows] = x.new_empty(3, 6)
            x.index_add_(0, rows, x.new_empty(3, 6))
            x.scatter_(1, rows[:, None], x.new_empty(3, 1))

        return call

    index, three = 3 * 8, 3 * 6 * 4
    assert counted(puts) == {
        "index_fill_": [(index, three, 0)],
        "index_put_": [(index + three, three, 0)],
        "index_add_": [(index + 2 * three, three, 0)],
        "scatter_": [(index + 3 * 4, 3 * 4, 0)],
    }


def test_spectra_of_more_taps_take_more_instructions():
    def values(kernel: int) -> int:
        traffic = Traffic()
        with counting(traffic, meta=True), assuming(0.25), ops.deferred_packing():
            snn.SpecBlock(8, 16, kernel, device="meta")(packed(snn.ToSpectral(threshold=0.5)))
        return sum(o.values for o in traffic.operations if o.name == "kernel_spectrum")

    assert values(3) == FREQUENCIES * 8 * 16
    assert values(6) == 4 * values(3)


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn", "densenet22"])
def test_every_launch_has_a_part(name: str):
    given = twin_step.arguments(["--models", name, *TINY[2:]])
    traffic = twin_step.count_network("spectral", name, given)
    launches = Counter(o.part for o in traffic.operations if o.triton)
    assert NETWORK not in launches and launches.total() == traffic.launches > 50
    assert {"blocks, forward", "blocks, backward", "ReLU and pooling, forward"} <= set(launches)
    assert ("batch norm, backward" in launches) == (name != "vgg16")
    # Optimiser and classifier go through their parameters.
    assert traffic.parts()[NETWORK].nbytes > 0


def test_less_is_kept_and_less_is_moved():
    def moved(density: str) -> int:
        given = twin_step.arguments([*TINY[2:], "--density", density])
        return twin_step.count_network("spectral", "vgg16", given).nbytes

    assert moved("0.1") < moved("0.4")


def test_products_are_faster_in_tf32():
    machine = Machine(matmul=100, efficiency=0.5, single=5)
    product = Operation("bmm", "", 0, 0, flops=100)
    assert seconds_of(product, machine, {}) == 20
    assert seconds_of(product, machine.with_tf32(), {}) == 4


def test_nothing_that_was_assumed_stays():
    counted(lambda: lambda: packed(snn.ToSpectral(threshold=0.5)))
    x = torch.randn(2, 3, 8, 8)
    again = snn.ToSpatial()(snn.ToSpectral(threshold=0.0)(x))
    assert torch.allclose(again, x, atol=1e-5)


def test_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(twin_step, "instructions", lambda kernels: dict.fromkeys(kernels, 50.0))
    monkeypatch.setattr(twin_step, "SHAPES", [twin_step.Shape(4, 8, 3)])
    file = tmp_path / "twins.json"
    assert twin_step.main([*TINY, "--density", "0.3", "--blocks", "--block-batch", "2", "--json", str(file)]) == 0
    stored, text = json.loads(file.read_text()), file.with_suffix(".md").read_text()
    assert "nothing is measured" in text and "A density of 0.3 is assumed" in text
    assert "Parts of *spectral*" in text and "4 at 8x8, 3x3" in text
    assert stored["measured"] is False and stored["config"]["density"] == 0.3
    assert stored["instructions_per_value"]["pack_rows"] == 50
    rows = stored["models"]["vgg16_bn"]
    assert set(rows) == {*twin_step.SPATIAL, "spectral"}
    twin = rows["spectral"]
    for figure in ("read_bytes", "written_bytes", "flops", "operations", "launches"):
        assert sum(part[figure] for part in twin["parts"].values()) == twin[figure] > 0
    assert twin["host_seconds"] == pytest.approx(5e-6 * twin["operations"])
    single, half = (rows[name] for name in twin_step.SPATIAL)
    assert single["flops"] == half["flops"] and single["launches"] == 0
    assert set(stored["blocks"]["4 at 8x8, 3x3"]) == {*twin_step.CONVOLUTIONS, *twin_step.BLOCKS}


def test_a_density_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        twin_step.arguments(["--density", "1.5"])
    assert "--density got 1.5" in capsys.readouterr().err
