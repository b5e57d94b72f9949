"""The tuner with made-up times; on a CPU the kernels run in the interpreter."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import tune
from spectriton import cli, tuner, tuning
from spectriton.tuner import Case
from spectriton_kernels import configs
from spectriton_kernels._launch import Launch

pytestmark = pytest.mark.triton
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SINGLE, HALF, BRAIN, DOUBLE = torch.float32, torch.float16, torch.bfloat16, torch.float64
PRODUCT = Case("complex_product", (SINGLE,), (300,))


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(tuning.DIRECTORY, str(tmp_path))
    monkeypatch.delenv(tuning.SWITCH, raising=False)
    yield tmp_path
    configs.set_lookup(None)


def times(*seconds: float) -> tuner.Timer:
    """Gives these, one a configuration."""
    left = iter(seconds)
    return lambda sets, device: next(left)


TINY = [
    Case("complex_product", (DOUBLE,), (1500,)),
    Case("complex_product_broadcast", (SINGLE,), (6, 37, 1, 0)),
    Case("complex_product_broadcast", (SINGLE,), (6, 37, 2, 1)),
    Case("spectral_activation", (SINGLE,), (1500, 0)),
    Case("spectral_activation", (SINGLE,), (1500, 30)),
    Case("spectral_activation", (SINGLE,), (9000, 4200)),
    Case("spectral_activation_backward", (SINGLE,), (1500,)),
    Case("spectral_activation_scale_backward", (SINGLE,), (3, 5, 200)),
    Case("spectral_activation_scale_backward", (SINGLE,), (40, 5, 2)),
    Case("pack_rows", (SINGLE, SINGLE), (5, 64)),
    Case("pack_rows", (BRAIN, HALF), (21, 32)),
    Case("pack_rows", (SINGLE, torch.int8), (5, 64)),
    Case("gather_rows", (SINGLE, HALF), (21, 32)),
    Case("gather_rows", (SINGLE, torch.uint8), (21, 32)),
    Case("unpack_rows", (SINGLE, BRAIN), (21, 32)),
    Case("unpack_gradient_rows", (SINGLE, BRAIN), (21, 32)),
    Case("unpack_rows", (SINGLE, torch.uint8), (21, 32)),
    Case("unpack_gradient_rows", (SINGLE, torch.uint8), (21, 32)),
    Case("sum_kept", (SINGLE, HALF), (21, 32)),
    Case("combine_kept", (SINGLE, torch.int8), (21, 32)),
    Case("unpack_planes", (SINGLE, SINGLE), (70, 30, 64)),
    Case("unpack_planes", (SINGLE, torch.int8), (70, 30, 64)),
    Case("rows_of_half", (SINGLE,), (96, 30)),
    Case("gather_planes", (SINGLE,), (70, 30, 64)),
    Case("kernel_spectrum", (SINGLE, BRAIN), (7, 2, 3, 5, 9)),
    Case("kernel_spectrum_adjoint", (SINGLE, SINGLE), (64, 1, 2, 3, 4)),
    Case("decode_blocks", (SINGLE,), (16, 6, 6, 3)),
    Case("encode_blocks", (BRAIN,), (5, 68, 4, 1)),
    Case("rectify", (BRAIN,), (1001,)),
    Case("clear_outside", (SINGLE,), (1001,)),
    Case("rebuild", (BRAIN,), (30, 9)),
    Case("pool_maxima", (SINGLE,), (30, 8, 3, 3)),
    Case("spread_maxima", (BRAIN,), (120, 8, 2, 2)),
    Case("pool_planes", (SINGLE,), (800, 2, 2)),
    Case("pool_planes", (DOUBLE,), (600, 1, 1)),
    Case("spread_planes", (SINGLE,), (2400, 2, 2)),
    Case("spread_planes", (SINGLE,), (600, 1, 1)),
]


def test_every_kernel_is_among_the_cases():
    assert {case.kernel for case in TINY} == set(configs.TUNABLES)
    assert {case.kernel for case in tuner.default_cases()} == set(configs.TUNABLES)
    for case in [*TINY, *tuner.default_cases()]:
        assert len(case.sizes) == len(configs.TUNABLES[case.kernel].sizes)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_every_configuration_computes_the_same(case):
    result = tuner.tune_case(case, DEVICE, lambda sets, device: 1.0)
    assert result.failures == {}
    assert set(result.seconds) == set(configs.TUNABLES[case.kernel].space)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_a_launch_that_does_nothing_is_found(case, monkeypatch):
    problem = tuner.problem(case, DEVICE)
    space = configs.TUNABLES[case.kernel].space
    problem.prepare()
    problem.run(space[0]).call()
    monkeypatch.setattr(Launch, "run", lambda launch: None)
    run = problem.run(space[1])
    problem.prepare()
    run.call()
    with pytest.raises(tuner.WrongResult):
        tuner.check(case, run, problem.expected())


def test_configurations_that_compute_something_else_are_left_out(monkeypatch):
    space = configs.COMPLEX_PRODUCT.space
    problem = tuner.problem(PRODUCT, DEVICE)

    def run(config: Any) -> tuner.Run:
        ready = problem.run(config)
        if config != space[2]:
            return ready
        return tuner.Run(ready.call, lambda: tuple(result + 1e-3 for result in ready.results()))

    monkeypatch.setattr(tuner, "problem", lambda *_: dataclasses.replace(problem, run=run))
    result = tuner.tune_case(PRODUCT, DEVICE, lambda sets, device: 1.0)
    assert list(result.failures) == [space[2]] and "wrong by" in result.failures[space[2]]
    assert set(result.seconds) == set(space) - {space[2]}
    monkeypatch.setattr(
        tuner, "problem", lambda *_: dataclasses.replace(problem, expected=lambda: (torch.full((150,), torch.nan),))
    )
    with pytest.raises(RuntimeError, match="please report"):
        tuner.tune_case(PRODUCT, DEVICE, lambda sets, device: 1.0)


def test_the_fastest_is_chosen_where_it_is_worth_it():
    space = configs.COMPLEX_PRODUCT.space
    heuristic = space.index(configs.Stream(8192, 4))
    seconds = [4.0] * len(space)
    seconds[1] = 2.0
    result = tuner.tune_case(PRODUCT, DEVICE, times(*seconds))
    assert result.best == space[1] and result.heuristic == space[heuristic] and result.speedup == 2
    assert result.moved == 3 * 150 * 8
    assert result.rate(result.best) == result.moved / 2
    assert result.share(result.best) == result.copy_seconds / 2
    found = result.entry()
    assert found.key == ("complex_product", ("float32",), (512,))
    assert found.config == dataclasses.asdict(space[1]) and found.measured["heuristic_seconds"] == 4
    seconds[1] = 4 / 1.01
    assert tuner.tune_case(PRODUCT, DEVICE, times(*seconds)).best == space[heuristic]


def test_the_clock():
    problem = tuner.problem(Case("pack_rows", (SINGLE, SINGLE), (3, 32)), DEVICE)
    run = problem.run(configs.PACK_ROWS.space[0])
    prepared = []
    counting = dataclasses.replace(problem, prepare=lambda: prepared.append(problem.prepare()))
    assert 0 < tuner.median_seconds([(counting, run)], DEVICE, fewest=2, budget=0.0) < 10
    assert len(prepared) == 4
    tuner.check(Case("pack_rows", (SINGLE, SINGLE), (3, 32)), run, problem.expected())


def test_a_run_writes_what_later_launches_find(directory, monkeypatch):
    pytest.importorskip("rich", reason="rich is not installed")
    shown = io.StringIO()
    cases = [PRODUCT, Case("spectral_activation_backward", (SINGLE,), (300,))]
    seconds = [4e-6] * 7 + [4e-6] * 6 + [1e-6]
    path = tuner.run(cases, DEVICE, "Test GPU", times(*seconds), shown)
    assert path is not None and path.parent == directory
    lines = shown.getvalue().splitlines()
    assert any("before GB/s" in line and "speed-up" in line for line in lines)
    assert any("complex_product" in line and "1.00" in line and "the heuristic's" in line for line in lines)
    tuned = configs.SPECTRAL_ACTIVATION_BACKWARD.space[-1]
    assert any("4.00" in line and tuner.describe(tuned) in line for line in lines)
    assert len(json.loads(path.read_text())["entries"]) == 2
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Test GPU")
    assert configs.SPECTRAL_ACTIVATION_BACKWARD.choose(torch.device("cuda", 0), (SINGLE,), (290,)) == tuned


def test_what_was_found_before_an_interruption_is_kept(directory):
    pytest.importorskip("rich", reason="rich is not installed")

    def timer(sets: Any, device: torch.device) -> float:
        if len(calls) == 8:
            raise KeyboardInterrupt
        calls.append(1)
        return 1.0

    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        tuner.run([PRODUCT, PRODUCT], DEVICE, "Test GPU", timer, io.StringIO())
    (path,) = directory.glob("*.json")
    assert len(tuning.read(path)) == 1


def test_the_benchmarks_script_takes_every_kernel_in_turn(directory, monkeypatch, capsys):
    cases = tune.cases()
    assert sorted(map(str, cases)) == sorted(map(str, tuner.default_cases()))
    assert {case.kernel for case in cases[: len(configs.TUNABLES)]} == set(configs.TUNABLES)
    # two of ten cases fit into its time
    results = (tuner.tune_case(PRODUCT, DEVICE, lambda sets, device: 1.0) for _ in range(10))
    monkeypatch.setattr(tuner, "tune", lambda cases, device: results)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Test GPU")
    clock = iter([0.0, 4.0, 6.0, 6.0])
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    tune.main([str(directory / "out"), "--seconds", "5"])
    (path,) = (directory / "out").glob("*.json")
    assert set(tuning.read(path, "Test GPU")) == {("complex_product", ("float32",), (512,))}
    assert "2 of" in capsys.readouterr().out
    assert len(list(results)) == 8


def test_one_case_a_bucket_the_largest():
    cases = [Case("complex_product", (SINGLE,), (size,)) for size in (300, 512, 400, 513)]
    assert [case.sizes for case in tuner.unique(cases)] == [(512,), (513,)]


def command(*arguments: str) -> int:
    pytest.importorskip("typer", reason="typer is not installed")
    with pytest.raises(SystemExit) as caught:
        cli.main(["tune", *arguments])
    return caught.value.code or 0  # type: ignore[return-value]


def test_a_dry_run_lists_the_launches_of_a_model(capsys):
    settings = ("SPECTRITON_BACKEND", "TRITON_INTERPRET")
    before = [os.environ.get(name) for name in settings]
    assert command("--dry-run", "--shapes", "lenet", "--batch-size", "1", "--image-size", "12") == 0
    assert [os.environ.get(name) for name in settings] == before
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    # a training step of a block needs all of these
    assert {"pack_rows", "unpack_rows", "gather_rows", "kernel_spectrum", "kernel_spectrum_adjoint"} <= listed
    assert listed <= set(configs.TUNABLES)


def test_a_dry_run_of_some_kernels(capsys):
    assert command("--dry-run", "--kernel", "pack_rows", "--kernel", "gather_rows") == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {"pack_rows", "gather_rows"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "expected a GPU"),
        (["--dry-run", "--kernel", "pack_row"], "did you mean 'pack_rows'"),
        (["--dry-run", "--shapes", "lennet"], "did you mean 'lenet'"),
        (["--dry-run", "--shapes", "lenet", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_mistakes_end_with_a_clear_message_and_status_2(arguments, said, capsys):
    assert command(*arguments) == 2
    printed = capsys.readouterr().err
    assert said in printed and "Traceback" not in printed
