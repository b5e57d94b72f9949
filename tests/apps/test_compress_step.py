"""The benchmark of training steps with compressed maps, and its counting."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import spectriton
from bench import compress_step, step_traffic
from bench.compress_step import EXACT, ROWS, largest
from bench.step_traffic import Machine, Operation, Traffic, counting, seconds_of
from spectriton import _plans, memory
from spectriton.codec import BlockCodec
from spectriton.reference.block_codec import block_layout

TINY = ("--models", "lenet", "--image-size", "28", "--batch", "4", "--width", "1", "--classes", "5")
SHORT = (EXACT, "compress 4 bits", "checkpointing")


def tiny() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 1, bias=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5, bias=False),
    )


def step_of(network: nn.Module) -> Callable[[], None]:
    x = torch.randn(2, 3, 16, 16)
    return lambda: network(x).sum().backward()


def test_a_step_moves_what_it_moves_by_hand():
    traffic = Traffic()
    with counting(traffic):
        step = step_of(tiny())
        traffic.operations.clear()
        step()
    image, first, second = 2 * 3 * 256 * 4, 2 * 4 * 256 * 4, 2 * 8 * 256 * 4  # bytes of the maps
    statistics = 4 * 4  # one number a channel
    by_hand = {
        "convolution": [
            (image + 4 * 27 * 4, first, 2 * 2 * 256 * 4 * 27),
            (first + 8 * 4 * 4 + 8 * 4, second, 2 * 2 * 256 * 8 * 4),
        ],
        # twice over the maps; weight, bias, running mean and variance; mean and inverse deviation are results
        "native_batch_norm": [(2 * first + 4 * statistics, first + 2 * statistics, 0)],
        "relu": [(first, first, 0)],
        "threshold_backward": [(2 * first, first, 0)],
        # twice over maps and gradient; weight, running and batch statistics; gradients of weight and bias
        "native_batch_norm_backward": [(4 * first + 5 * statistics, first + 2 * statistics, 0)],
        "convolution_backward": [
            # of input, weight and bias, each by itself; the last for the weight only: images need no gradient
            (
                (second + 8 * 4 * 4) + (second + first) + second,
                first + 8 * 4 * 4 + 8 * 4,
                2 * 2 * (2 * 256 * 8 * 4),
            ),
            (first + image, 4 * 27 * 4, 2 * 2 * 256 * 4 * 27),
        ],
    }
    found = {
        name: [
            (o.read, o.written, o.flops)
            for o in traffic.operations
            if o.name == name and o.part == "network and optimiser"
        ]
        for name in by_hand
    }
    assert found == by_hand
    assert not traffic.coded


def test_views_and_shapes_move_nothing():
    traffic = Traffic()
    with counting(traffic):
        x = torch.zeros(64, 64)
        traffic.operations.clear()
        y = x.t()[3:].expand(2, 61, 64)
        torch.empty_like(y)
        assert not traffic.operations
        x.new_zeros(3)
        y.sum()
        x.copy_(x + 1)
        x.index_select(0, torch.zeros(4, dtype=torch.long))
    by_name = {o.name: (o.read, o.written) for o in traffic.operations}
    assert by_name["new_zeros"] == (0, 12)
    assert by_name["sum"] == (64 * 64 * 4, 4)  # what is expanded is there once
    assert by_name["copy_"] == (64 * 64 * 4, 64 * 64 * 4)
    assert by_name["index_select"] == (4 * 64 * 4 + 4 * 8, 4 * 64 * 4)


def test_compressed_maps_are_encoded_and_decoded_as_documented():
    traffic = Traffic()
    with counting(traffic):
        step = step_of(spectriton.compress(tiny(), density=0.25, bits=8))
        traffic.operations.clear()
        step()
    # Batch norm decodes the maps in front of it, and so does the convolution behind it, unless the two share them.
    first, *others = traffic.coded
    assert first.shape == (2, 4, 16, 16) and not first.decoded
    decodes = len(others)
    assert decodes in (1, 2) and all(c.decoded for c in others)
    stored = BlockCodec(density=0.25, bits=8).encode(torch.randn(2, 4, 16, 16)).nbytes
    dense = 2 * 4 * 256 * 4
    assert all((c.dense, c.stored) == (dense, stored) for c in traffic.coded)
    assert traffic.coding_bytes() == (1 + decodes) * (dense + stored)
    assert traffic.coding_bytes(decodes=1) == 2 * (dense + stored)
    launches = [o for o in traffic.operations if o.name.endswith("_blocks")]
    assert [o.name for o in launches] == ["encode_blocks", *["decode_blocks"] * decodes]
    assert all(o.values == 2 * 4 * 256 for o in launches)
    # Maps and records once, and tables: basis and transform in two parts of 16 bits, mean and scale of the channels.
    # Four channels are filled up to 16.
    layout = block_layout((2, 4, 16, 16), 2.0, 64)
    assert layout.groups == 1 and layout.frequencies == 64
    rows, common = 16 * 64, dense + layout.blocks * layout.record + 2 * 2 * (16**2 + 64**2) + 4 * 2 * 4
    # Where each four rows begin, two numbers a row, levels.
    assert [o.read + o.written for o in launches[1:]] == [common + 4 * (rows // 4 + 2 * rows + 512)] * decodes
    # Three numbers a row, the row of each bit in 16 bits, ends of the slices (one).
    assert launches[0].read + launches[0].written == common + 4 * 3 * rows + 2 * 8 * layout.record + 4 * 2
    parts = traffic.parts()
    assert {"statistics of the codec", "encoding", "decoding", "batch norm and ReLU, again"} <= set(parts)
    assert sum(part.nbytes for part in parts.values()) == traffic.nbytes


def test_a_step_between_statistics_has_few_operations(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_plans, "is_due", lambda use, refresh: use == 1)
    traffic = Traffic()
    with counting(traffic):
        step = step_of(spectriton.compress(tiny(), bits=8))
        for _ in range(3):
            counts = len(traffic.operations)
            step()
        counts = len(traffic.operations) - counts
        traffic.operations = traffic.operations[-counts:]
    parts = {name: sorted(o.name for o in part.operations) for name, part in traffic.parts().items()}
    # The means, NaN for groups that are not finite; room for the records.
    assert parts["statistics of the codec"] == ["add", "mean", "sum"]
    assert parts["encoding"] == ["encode_blocks", "zeros"]
    assert set(parts["decoding"]) == {"decode_blocks"} and "tables of the codec" not in parts


@pytest.mark.parametrize("compressed", [False, True])
def test_bytes_held_are_those_of_a_real_step(compressed: bool):
    def usage(track: Callable[..., object]) -> memory.Usage:
        network = tiny()
        network.insert(3, nn.MaxPool2d(2))
        if compressed:
            spectriton.compress(network)
        step = step_of(network)
        with track(network, torch.optim.SGD(network.parameters(), lr=0.1)) as found:
            step()
        return found

    with counting(Traffic()):
        counted = usage(step_traffic.tracked)
    real = usage(lambda model, optimizer: memory.track("cpu", model=model, optimizer=optimizer))
    assert counted.saved_bytes == real.saved_bytes
    if not compressed:  # temporaries of the CPU's codec are others
        assert counted.peak_bytes == real.peak_bytes


def test_nothing_fake_is_left_behind():
    with counting(Traffic()):
        BlockCodec().encode(torch.randn(1, 4, 16, 16))
    x = torch.randn(1, 4, 16, 16)
    assert torch.isfinite(BlockCodec().encode(x).decode()).all()


def test_the_slowest_bound_decides():
    machine = Machine(copy=10, matmul=100, efficiency=0.5, single=20, issue=1000)
    bounds = {"encode_blocks": 50.0}
    assert seconds_of(Operation("a", "", 15, 5), machine, bounds) == 2
    assert seconds_of(Operation("a", "", 15, 5, flops=200, half=True), machine, bounds) == 4
    assert seconds_of(Operation("a", "", 15, 5, flops=200), machine, bounds) == 10
    assert seconds_of(Operation("encode_blocks", "", 15, 5, values=100), machine, bounds) == 5


@pytest.mark.parametrize("most", [0, 1, 3, 7, 63, 64, 65, 1000])
def test_largest_batch(most: int):
    tried = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= most

    found, certain = largest(fits, 8, lambda: True)
    assert certain
    assert most - max(1, most // 16) < found <= most or found == most == 0
    assert found == 0 or found in tried
    assert len(tried) < 16


def test_largest_batch_without_time_or_limit():
    assert largest(lambda batch: True, 64, lambda: True) == (compress_step.MOST_BATCH, False)
    in_time = iter([True, True, True, False])
    assert largest(lambda batch: True, 4, lambda: next(in_time)) == (16, False)
    in_time = iter([True, True, True, False])
    assert largest(lambda batch: batch < 8, 4, lambda: next(in_time)) == (6, False)


def test_batches_that_do_not_fit_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch):
    held = []

    class Full:
        def __init__(self, *of_step: object) -> None:
            self.maps = torch.zeros(8)
            held.append(weakref.ref(self))

        def __call__(self) -> None:
            raise errors.pop()

    monkeypatch.setattr(compress_step, "Step", Full)
    given, reasons = compress_step.arguments(list(TINY)), []
    errors = [RuntimeError("cuDNN: no such size\nat line 3"), torch.cuda.OutOfMemoryError("CUDA out of memory")]
    assert not compress_step.fits(ROWS[EXACT], given, "lenet", 8, reasons) and not reasons
    assert not compress_step.fits(ROWS[EXACT], given, "lenet", 16, reasons)
    assert reasons == ["batch 16: cuDNN: no such size"]
    assert [ref() for ref in held] == [None, None]


def test_measured(tmp_path: Path):
    file = tmp_path / "steps.json"
    assert compress_step.main([*TINY, "--rows", *SHORT, "--row-seconds", "0.01", "--json", str(file)]) == 0
    stored = json.loads(file.read_text())
    rows = stored["models"]["lenet"]
    assert set(rows) == set(SHORT)
    for row in rows.values():
        assert 0 < row["seconds_p20"] <= row["seconds"] <= row["seconds_p80"]
        assert 0 < row["saved_bytes"] < row["peak_bytes"]
        assert row.get("loss_difference", 0) == 0
    assert rows["compress 4 bits"]["saved_bytes"] < rows[EXACT]["saved_bytes"]
    table = file.with_suffix(".md").read_text()
    assert "| compress 4 bits |" in table and "to the bit" in table


def test_rows_that_there_is_no_time_for_are_left_out(tmp_path: Path):
    file = tmp_path / "steps.json"
    short = ("--rows", *SHORT, "--seconds", "-1", "--row-seconds", "0.01")
    assert compress_step.main([*TINY, *short, "--json", str(file)]) == 0
    assert list(json.loads(file.read_text())["models"]["lenet"]) == list(SHORT[:2])


def test_another_loss_is_refused():
    given = compress_step.arguments(list(TINY))
    exact = compress_step.first_loss(ROWS[EXACT], given, "lenet")
    assert compress_step.check_loss(ROWS["compress 8 bits"], exact, given, "lenet") == 0
    with pytest.raises(AssertionError, match="loss is off"):
        compress_step.check_loss(ROWS["compress 8 bits"], exact * 1.01, given, "lenet")


def test_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compress_step, "instructions", lambda: {"encode_blocks": 100.0, "decode_blocks": 80.0})
    file = tmp_path / "predicted.json"
    rows = ("exact fp32", EXACT, "compress 4 bits")
    assert compress_step.main(["--predict", *TINY, "--rows", *rows, "--json", str(file)]) == 0
    stored = json.loads(file.read_text())
    found = stored["models"]["lenet"]
    assert stored["instructions_per_value"]["decode_blocks"] == 80
    exact, compressed = found[EXACT], found["compress 4 bits"]
    assert compressed["read_bytes"] > exact["read_bytes"] and compressed["device_seconds"] > exact["device_seconds"]
    assert compressed["saved_bytes"] < exact["saved_bytes"]
    assert (
        compressed["first_operations"] > 2 * compressed["operations"] > exact["operations"] == exact["first_operations"]
    )
    assert "device_seconds" not in found["exact fp32"]
    assert sum(m["encoded"] for m in compressed["maps"]) > 0
    assert sum(p["operations"] for p in compressed["parts"].values()) == compressed["operations"]
    assert "Parts of *compress 4 bits*" in file.with_suffix(".md").read_text()
