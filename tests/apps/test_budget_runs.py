"""Runs under a budget: what is reported, and that they go on to the same result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from apps_standins import made_up_data
from torch import nn

from spectriton import budget, models
from spectriton.budget import BudgetController
from spectriton.cli import main
from spectriton.compare import CompareConfig, compare, train_alone
from spectriton.data import ImageData
from spectriton.train import Checkpoint, Silent, TrainConfig, train

CONFIG = CompareConfig(
    data="made-up", width=0.5, budget=0.2, train=TrainConfig(epochs=5, batch_size=24, device="cpu", seed=1)
)


class Killed(Exception):
    """Stands for whatever ends a process."""


class KillAt(Silent):
    """Raises at a step of a network."""

    def __init__(self, title: str, step: tuple[int, int]) -> None:
        self.title, self.at, self.now = title, step, ""

    def begin(self, title: str, epochs: int, batches: int, done: int) -> None:
        self.now = title

    def step(self, epoch: int, batch: int) -> None:
        if self.now == self.title and (epoch, batch) == self.at:
            raise Killed


def images() -> ImageData:
    return made_up_data(train=96, test=20, size=16)


def timeless(value: Any) -> Any:
    """Without what differs from run to run."""
    if isinstance(value, Mapping):
        return {key: timeless(entry) for key, entry in value.items() if "seconds" not in key}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compare(CONFIG, tmp_path_factory.mktemp("whole"), data=images(), plots=False, peers=["checkpoint"])


def test_the_report_holds_the_budget_and_the_thresholds(finished: dict[str, Any]) -> None:
    assert finished["ratio"]["saved_bytes"] == pytest.approx(0.2, rel=0.05)
    entry = finished["spectral"]
    assert set(entry["thresholds"]) == {"conv1_to_spectral", "conv1", "pool1", "conv2"}
    factor = entry["history"][-1]["threshold_factor"]
    moved = {level for name, level in entry["thresholds"].items() if name != "conv1_to_spectral"}
    assert moved == {0.5 * factor} and factor != 1 and entry["thresholds"]["conv1_to_spectral"] == 0
    assert "thresholds" not in finished["spatial"] and finished["config"]["budget"] == 0.2
    # What is measured beside is the same network, at its thresholds.
    rows = {(row["variant"], row["peer"]): row for row in finished["peers"]}
    assert rows["spectral", "none"]["saved_bytes"] == pytest.approx(entry["saved_bytes"], rel=0.05)


def test_a_comparison_under_a_budget_goes_on_to_the_same_result(tmp_path: Path, finished: dict[str, Any]) -> None:
    with pytest.raises(Killed):
        compare(CONFIG, tmp_path, data=images(), plots=False, progress=KillAt("spectral", (2, 1)))
    resumed = compare(CONFIG, tmp_path, data=images(), plots=False, peers=["checkpoint"])
    assert timeless(resumed) == timeless(finished)


def test_a_run_that_is_cut_within_an_epoch_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    def run(path: Path | None, progress: Silent | None = None) -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        model = models.build("lenet", "spectral", in_channels=1, image_size=16)
        controller = BudgetController(model, saved_bytes=60_000)
        checkpoint = None if path is None else Checkpoint(path, every_seconds=0)
        result = train(model, images(), CONFIG.train, checkpoint=checkpoint, progress=progress, controller=controller)
        return model, result.history, controller.state_dict()

    whole, history, state = run(None)
    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        run(path, KillAt("model", (1, 2)))
    assert torch.load(path, weights_only=True)["batch"] == 2
    model, resumed, resumed_state = run(path)
    assert timeless(resumed) == timeless(history) and resumed_state == state
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    with pytest.raises(ValueError, match="controller=True"):
        train(model, images(), CONFIG.train, checkpoint=path)


def test_bytes_are_those_of_one_training_step(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, budget="80KiB")
    result = train_alone(config, "spectral", tmp_path, data=images(), plots=False)
    assert result["spectral"]["saved_bytes"] == pytest.approx(80 << 10, rel=0.05)
    with pytest.raises(ValueError, match=r"budget='81920'.*budget='0\.3'"):
        train_alone(dataclasses.replace(config, budget=0.3), "spectral", tmp_path, data=images(), plots=False)


def test_budgets_that_cannot_be_held_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="held beside packed maps; raise --budget"):
        compare(dataclasses.replace(CONFIG, budget="1KiB"), tmp_path, data=images(), plots=False)
    with pytest.raises(ValueError, match=r"give 0\.2 or 64MiB"):
        dataclasses.replace(CONFIG, budget="much")
    with pytest.raises(ValueError, match="none with method='compress'"):
        dataclasses.replace(CONFIG, method="compress")
    assert "budget" not in dataclasses.replace(CONFIG, budget=None).describe()


@pytest.mark.usefixtures("apps_extra")
def test_the_command_takes_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--budget 0.25 --width 0.25 --train-limit 320 --test-limit 32 --batch-size 16 --epochs 1 --device cpu"
    with pytest.raises(SystemExit) as end:
        main(["compare", *options.split(), "--out", str(tmp_path)])
    assert end.value.code == 0 and "saved bytes held to 0.25" in capsys.readouterr().out
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["ratio"]["saved_bytes"] == pytest.approx(0.25, rel=0.05)
    assert found["spectral"]["thresholds"] and budget.parse_budget(found["config"]["budget"]) == 0.25
    with pytest.raises(SystemExit) as end:
        main(["train", "--budget", "64MB", "--out", str(tmp_path)])
    assert end.value.code == 2 and "give 0.2 or 64MiB" in capsys.readouterr().err
