"""The sweep over thresholds: what it trains, what it writes, and that it goes on to the same table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import signal
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from apps_standins import made_up_data, run_and_kill, tiny_network

from bench import networks_accuracy
from spectriton import cli, report
from spectriton import sweep as sw
from spectriton.compare import CompareConfig
from spectriton.data import ImageData
from spectriton.sweep import sweep
from spectriton.train import Silent, TrainConfig

pytestmark = pytest.mark.usefixtures("apps_extra")

CONFIG = CompareConfig(data="made-up", train=TrainConfig(epochs=2, batch_size=16, device="cpu"))
OPTIONS: dict[str, Any] = {"models": ["lenet", "vgg16_bn"], "thresholds": [0.6, 0.3], "seeds": [0, 1]}
SMALL: dict[str, Any] = {"thresholds": [0.6], "seeds": [0, 1], "plots": False}
STEPS = 5 * 2  # of a cell


class Killed(BaseException):
    """Stands for whatever ends a process."""


class Watch(Silent):
    """Counts the steps of each run; may raise after one of all steps."""

    def __init__(self, kill: int | None = None) -> None:
        self.steps: Counter[str] = Counter()
        self.kill = kill

    def begin(self, title: str, epochs: int, batches: int, done: int) -> None:
        self.title = title.partition(" ")[2]

    def step(self, epoch: int, batch: int) -> None:
        self.steps[self.title] += 1
        if self.steps.total() == self.kill:
            raise Killed


def lasting(value: Any) -> Any:
    """A result without what differs from run to run."""
    if isinstance(value, Mapping):
        return {key: lasting(entry) for key, entry in value.items() if "seconds" not in key}
    return [lasting(entry) for entry in value] if isinstance(value, list) else value


def fake_build(name: str, *, variant: str, threshold: float, **rest: Any) -> Any:
    return tiny_network(threshold if variant == "spectral" else None)


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectriton.models.build", fake_build)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Watch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spectriton.models.build", fake_build)
        out, watch = tmp_path_factory.mktemp("sweep"), Watch()
        return out, sweep(CONFIG, out, data=made_up_data(), progress=watch, **OPTIONS), watch


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spectriton.models.build", fake_build)
        return sweep(CONFIG, tmp_path_factory.mktemp("small"), data=made_up_data(), **SMALL)


def test_every_network_is_trained_once_for_each_threshold_and_seed(finished: tuple[Path, Any, Watch]) -> None:
    _, result, watch = finished
    assert len(watch.steps) == 12 and set(watch.steps.values()) == {STEPS}
    assert [name for name in watch.steps if "spatial" in name] == [
        "lenet, spatial, seed 0",
        "vgg16_bn, spatial, seed 0",
        "lenet, spatial, seed 1",
        "vgg16_bn, spatial, seed 1",
    ]
    assert len(result["cells"]) == 12 and all(len(cell["history"]) == 2 for cell in result["cells"])


def test_the_table_holds_means_and_ratios(finished: tuple[Path, Any, Watch]) -> None:
    _, result, _ = finished
    rows = result["rows"]
    assert [(row["network"], row["threshold"]) for row in rows] == [
        (model, level) for model in ("lenet", "vgg16_bn") for level in (None, 0.3, 0.6)
    ]
    cells = {(c["model"], c["threshold"], c["seed"]): c for c in result["cells"]}
    for row in rows:
        runs, spatial = ([cells[row["network"], t, seed] for seed in (0, 1)] for t in (row["threshold"], None))
        accuracies = [run["test_accuracy"] for run in runs]
        assert row["seeds"] == 2 and row["test_accuracy"] == pytest.approx(statistics.mean(accuracies))
        assert row["test_accuracy_sd"] == pytest.approx(statistics.stdev(accuracies))
        assert row["accuracy_change"] == pytest.approx(
            statistics.mean(accuracies) - statistics.mean(run["test_accuracy"] for run in spatial)
        )
        for kind in ("saved", "average", "peak", "average_beyond_state", "peak_beyond_state"):
            mean, base = (statistics.mean(run[f"{kind}_bytes"] for run in entries) for entries in (runs, spatial))
            assert row[f"{kind}_bytes"] == mean and row[f"{kind}_ratio"] == pytest.approx(mean / base)
        assert (row["density"] is None) == (row["threshold"] is None)
        assert row["top5_accuracy_change"] is None
    assert rows[1]["density"] > rows[2]["density"]


def test_what_is_written_agrees(finished: tuple[Path, Any, Watch]) -> None:
    out, result, _ = finished
    assert json.loads((out / "sweep.json").read_text()) == result
    lines = list(csv.DictReader(io.StringIO((out / "sweep.csv").read_text())))
    assert [{key: "" if value is None else str(value) for key, value in row.items()} for row in result["rows"]] == lines
    text = (out / "sweep.md").read_text()
    assert f"| vgg16_bn | 0.6 | 2 | {100 * result['rows'][5]['test_accuracy']:.2f} ± " in text
    assert "lenet, vgg16_bn on made-up" in text and "seeds 0, 1" in text and "published" not in text
    for name in ("fig1.png", "fig2.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert result["config"]["thresholds"] == [0.3, 0.6] and "threshold" not in result["config"]


@pytest.mark.parametrize("kill", [1, STEPS, STEPS + 3, 3 * STEPS + 6])
def test_a_sweep_that_was_killed_goes_on_to_the_same_table(
    tmp_path: Path, small: dict[str, Any], data: ImageData, kill: int
) -> None:
    with pytest.raises(Killed):
        sweep(CONFIG, tmp_path, data=data, progress=Watch(kill), **SMALL)
    watch = Watch()
    result = sweep(CONFIG, tmp_path, data=data, progress=watch, **SMALL)
    assert lasting(result) == lasting(small)
    # Whole epochs are not repeated.
    assert watch.steps.total() == 4 * STEPS - (kill - 1) // 5 * 5


@pytest.mark.parametrize("writes", [0, 1, 3, 6])
def test_killed_while_writing(
    tmp_path: Path, small: dict[str, Any], data: ImageData, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Between the end of a training run, its cell, and the tables."""
    whole, done = report.write_text, []

    def write(text: str, path: Path) -> None:
        if len(done) == writes:
            path.with_name(path.name + ".partial").write_text(text[:100])
            raise Killed
        done.append(path)
        whole(text, path)

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_text", write)
        with pytest.raises(Killed):
            sweep(CONFIG, tmp_path, data=data, **SMALL)
    watch = Watch()
    result = sweep(CONFIG, tmp_path, data=data, progress=watch, **SMALL)
    assert lasting(result) == lasting(small)
    assert watch.steps.total() == (3 - writes // 4) * STEPS


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[2])
import spectriton.models
from test_sweep import CONFIG, SMALL, Silent, fake_build, made_up_data, sweep
import torch

torch.set_num_threads(1)
spectriton.models.build = fake_build

class Tell(Silent):
    steps = 0
    def step(self, epoch, batch):
        Tell.steps += 1
        print(Tell.steps, flush=True)

sweep(CONFIG, sys.argv[1], data=made_up_data(), progress=Tell(), **SMALL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_sweep_that_is_really_killed_goes_on_to_the_same_table(
    tmp_path: Path, small: dict[str, Any], data: ImageData
) -> None:
    run_and_kill(SCRIPT, tmp_path, str(2 * STEPS + 7))
    result = sweep(CONFIG, tmp_path, data=data, **SMALL)
    assert lasting(result) == lasting(small)


def test_thresholds_and_epochs_can_be_added_later(tmp_path: Path, data: ImageData) -> None:
    first = sweep(CONFIG, tmp_path, thresholds=[0.3], data=data, plots=False)
    watch = Watch()
    second = sweep(CONFIG, tmp_path, thresholds=[0.3, 0.6], data=data, progress=watch, plots=False)
    assert list(watch.steps) == ["lenet, threshold 0.6, seed 0"]
    assert second["rows"][:2] == first["rows"]
    longer = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, epochs=3))
    watch = Watch()
    sweep(longer, tmp_path, thresholds=[0.3], data=data, progress=watch, plots=False)
    assert set(watch.steps.values()) == {STEPS // 2}


def test_cells_of_another_recipe_are_refused_unless_fresh(tmp_path: Path, data: ImageData) -> None:
    sweep(CONFIG, tmp_path, thresholds=[0.3], data=data, plots=False)
    other = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, lr=0.1))
    with pytest.raises(ValueError, match=r"spatial\.pt.*lr=0\.02.*lr=0\.1.*--fresh"):
        sweep(other, tmp_path, thresholds=[0.3], data=data, plots=False)
    watch = Watch()
    sweep(other, tmp_path, thresholds=[0.3], data=data, progress=watch, fresh=True, plots=False)
    assert watch.steps.total() == 2 * STEPS


def test_a_damaged_cell_is_measured_again(tmp_path: Path, data: ImageData) -> None:
    first = sweep(CONFIG, tmp_path, thresholds=[0.3], data=data, plots=False)
    for path in tmp_path.glob("lenet/*/cell.json"):
        path.write_text(path.read_text()[:50])
    watch = Watch()
    assert lasting(sweep(CONFIG, tmp_path, thresholds=[0.3], data=data, progress=watch, plots=False)) == lasting(first)
    assert not watch.steps


@pytest.mark.parametrize(
    ("model", "name", "published"),
    [
        ("vgg16_bn", "cifar10", {"peak_ratio": 0.37, "test_accuracy": 0.918}),
        ("densenet", "cifar10", {"peak_ratio": 0.37, "test_accuracy": 0.925}),
        ("densenet169", "imagenet", {"peak_ratio": 0.366, "average_ratio": 0.408, "accuracy_change": -0.016}),
        ("vgg16", "svhn", None),
    ],
)
def test_the_paper_stands_beside(
    tmp_path: Path, data: ImageData, model: str, name: str, published: dict[str, float] | None
) -> None:
    config = dataclasses.replace(CONFIG, model=model, train=dataclasses.replace(CONFIG.train, epochs=1))
    data = dataclasses.replace(data, name=name)
    rows = sweep(config, tmp_path, thresholds=[0.3], data=data)["rows"]
    text = (tmp_path / "sweep.md").read_text()
    if published is None:
        assert len(rows) == 2 and "published" not in text
        return
    assert rows[2]["variant"] == "published" and published.items() <= rows[2].items()
    assert f"| {model} | published |" in text and "1905.10915" in text


def test_bad_settings_are_found_before_training(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    for change, said in (
        ({"thresholds": []}, "thresholds"),
        ({"thresholds": [0.3, -1.0]}, "threshold got -1.0"),
        ({"models": []}, "models"),
        ({"seeds": []}, "seeds"),
    ):
        with pytest.raises(ValueError, match=said):
            sweep(CONFIG, tmp_path, data=data, plots=False, **change)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="did you mean 'lenet'"):
        sweep(CONFIG, tmp_path, models=["lenet", "lennet"], data=made_up_data(size=28), plots=False)
    assert not list(tmp_path.iterdir())


def test_the_spatial_network_does_not_depend_on_what_only_spectral_ones_have() -> None:
    cells = [sw.Cell("lenet", None, 3).config(dataclasses.replace(CONFIG, **change)) for change in (
        {"threshold": 0.1}, {"paper": True}, {"value_dtype": "int8"},
    )]  # fmt: skip
    assert cells[0] == cells[1] == cells[2] and cells[0].train.seed == 3
    assert sw.Cell("lenet", 0.7, 3).config(dataclasses.replace(CONFIG, value_dtype="int8")).value_dtype == "int8"


def test_sweep_on_digits_from_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """End to end with real networks: spatial and spectral LeNet, two thresholds."""
    monkeypatch.undo()
    arguments = ["sweep", "--data", "digits", "--model", "lenet", "--thresholds", "0.5,1", "--epochs", "1"]
    arguments += ["--train-limit", "96", "--test-limit", "32", "--batch-size", "32", "--device", "cpu"]
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, "--out", str(tmp_path)])
    assert not caught.value.code
    assert {path.name for path in tmp_path.iterdir()} == {
        "lenet", "sweep.json", "sweep.csv", "sweep.md", "fig1.png", "fig2.png",
    }  # fmt: skip
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [row["threshold"] for row in rows] == [None, 0.5, 1.0]
    assert rows[2]["saved_ratio"] < rows[1]["saved_ratio"] < 0.4 and rows[2]["density"] < rows[1]["density"] < 1
    printed = capsys.readouterr()
    assert "lenet on digits" in printed.out and "3/3 lenet, threshold 1, seed 0" in printed.err
    assert max(map(len, printed.out.splitlines()[: 3 + len(rows)])) <= 80
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--thresholds", "0.5;1", "--out", str(tmp_path)])
    assert "give --thresholds 0.5,1,1.5" in capsys.readouterr().err


@pytest.mark.usefixtures("fake_models")
def test_the_bench_stops_in_time_and_goes_on(
    data: ImageData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.setattr(CompareConfig, "load_data", lambda config: data)
    command = ["networks_accuracy", "--out", str(tmp_path), "--models", "lenet", "--epochs", "2", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*command, "--batch-size", "16", "--seconds", "0"])
    networks_accuracy.main()
    assert "out of time" in capsys.readouterr().out and not (tmp_path / "sweep.md").exists()
    monkeypatch.setattr("sys.argv", [*command, "--batch-size", "16"])
    networks_accuracy.main()
    output = capsys.readouterr()
    assert "| lenet | 0.03 | 1 |" in output.out and "goes on after" in output.out + output.err
