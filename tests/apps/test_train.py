"""Training: the recipe, and runs that are cut short and go on to the same result."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from apps_standins import made_up_data, run_and_kill, tiny_network
from torch import nn

from spectriton import train as st
from spectriton.data import ImageData
from spectriton.train import Checkpoint, TrainConfig, train

CONFIG = TrainConfig(epochs=4, batch_size=16, device="cpu", seed=3)


class Killed(Exception):
    """Stands for whatever ends a process."""


class KillAt(st.Silent):
    """Raises at a step or after an epoch."""

    def __init__(self, step: tuple[int, int] | None = None, epoch: int | None = None) -> None:
        self.at_step, self.at_epoch = step, epoch

    def step(self, epoch: int, batch: int) -> None:
        if (epoch, batch) == self.at_step:
            raise Killed

    def epoch(self, record: Mapping[str, Any]) -> None:
        if record["epoch"] == self.at_epoch:
            raise Killed


class Count(st.Silent):
    """Counts steps."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self, epoch: int, batch: int) -> None:
        self.steps += 1


def network() -> nn.Module:
    torch.manual_seed(0)
    return tiny_network(threshold=0.3)


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


def assert_same_run(
    model: nn.Module, result: st.TrainResult, other_model: nn.Module, other_result: st.TrainResult
) -> None:
    assert timeless(result.history) == timeless(other_result.history)
    state, other = model.state_dict(), other_model.state_dict()
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert tensor.numpy().tobytes() == other[name].numpy().tobytes(), name


@pytest.fixture(scope="module")
def whole() -> tuple[nn.Module, st.TrainResult]:
    model = network()
    return model, train(model, made_up_data(), CONFIG)


def test_training_learns_and_records(whole: tuple[nn.Module, st.TrainResult], data: ImageData) -> None:
    model, result = whole
    first, last = result.history[0], result.history[-1]
    assert last["train_loss"] < first["train_loss"] and result.test_accuracy == last["test_accuracy"] > 0.5
    assert [record["epoch"] for record in result.history] == [1, 2, 3, 4]
    assert set(first) == {
        "epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "density", "seconds",
    }  # fmt: skip
    assert result.density.keys() == {"3"} and 0 < result.density["3"] < 1
    assert result.seconds_per_epoch > 0
    again = st.evaluate(model, data.test_images, data.test_labels, to_input=data.to_input, batch_size=16)
    assert again.accuracy == last["test_accuracy"] and again.loss == last["test_loss"]


def test_what_is_recorded_is_what_happened(data: ImageData) -> None:
    """One step of SGD on all images: the record holds the loss before it."""
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=len(data.train_images), momentum=0.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    twin = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    twin.load_state_dict(model.state_dict())
    record = train(model, data, config).history[0]
    scores = twin(data.to_input(data.train_images))
    loss = nn.functional.cross_entropy(scores, data.train_labels)
    assert record["train_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert record["train_accuracy"] == pytest.approx(float((scores.argmax(1) == data.train_labels).float().mean()))
    loss.backward()
    assert "density" not in record
    for after, before in zip(model.parameters(), twin.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(after, before - config.lr * before.grad)


def test_the_same_seed_gives_the_same_run(whole: tuple[nn.Module, st.TrainResult]) -> None:
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    model = network()
    assert_same_run(model, train(model, made_up_data(), CONFIG), *whole)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(whole: tuple[nn.Module, st.TrainResult], data: ImageData, workers: int) -> None:
    model = network()
    assert_same_run(model, train(model, data, dataclasses.replace(CONFIG, workers=workers)), *whole)


@pytest.mark.parametrize("kill", [{"epoch": 1}, {"epoch": 3}, {"step": (0, 0)}, {"step": (1, 2)}, {"step": (3, 4)}])
@pytest.mark.parametrize("every_seconds", [60.0, 0.0])
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, whole: tuple[nn.Module, st.TrainResult], data: ImageData, kill: dict[str, Any], every_seconds: float
) -> None:
    checkpoint = Checkpoint(tmp_path / "run.pt", every_seconds=every_seconds)
    with pytest.raises(Killed):
        train(network(), data, CONFIG, checkpoint=checkpoint, progress=KillAt(**kill))
    # What another process would have in its generators, and in its weights.
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    model, count = tiny_network(threshold=0.3), Count()
    if not checkpoint.path.exists():
        model = network()
    result = train(model, data, CONFIG, checkpoint=checkpoint, progress=count)
    assert_same_run(model, result, *whole)
    done = kill["epoch"] * 5 if "epoch" in kill else kill["step"][0] * 5 + (kill["step"][1] if not every_seconds else 0)
    assert count.steps == 20 - done


def test_adam_resumes_too(tmp_path: Path, data: ImageData) -> None:
    config = dataclasses.replace(CONFIG, optimizer="adam", lr=1e-3, epochs=2)
    whole = network()
    expected = train(whole, data, config)
    with pytest.raises(Killed):
        train(network(), data, config, checkpoint=tmp_path / "run.pt", progress=KillAt(epoch=1))
    model = network()
    assert_same_run(model, train(model, data, config, checkpoint=tmp_path / "run.pt"), whole, expected)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[2])
from test_train import CONFIG, Checkpoint, network, st, train
from apps_standins import made_up_data
from pathlib import Path

class Tell(st.Silent):
    def step(self, epoch, batch):
        print(epoch, batch, flush=True)

import torch

torch.set_num_threads(1)
train(network(), made_up_data(), CONFIG, progress=Tell(), checkpoint=Checkpoint(Path(sys.argv[1]), every_seconds=0))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_run_that_is_really_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, whole: tuple[nn.Module, st.TrainResult], data: ImageData
) -> None:
    path = tmp_path / "run.pt"
    run_and_kill(SCRIPT, path, "2 1")
    model = network()
    result = train(model, data, CONFIG, checkpoint=path)
    assert result.resumed_epochs >= 2
    assert_same_run(model, result, *whole)


def test_asked_to_stop_it_saves_and_goes_on(
    tmp_path: Path, whole: tuple[nn.Module, st.TrainResult], data: ImageData
) -> None:
    stop = threading.Event()

    class Ask(st.Silent):
        def step(self, epoch: int, batch: int) -> None:
            if (epoch, batch) == (1, 1):
                stop.set()

    with pytest.raises(st.Interrupted, match="epoch 2 after 2 of 5"):
        train(network(), data, CONFIG, checkpoint=tmp_path / "run.pt", progress=Ask(), stop=stop)
    model, count = network(), Count()
    assert_same_run(model, train(model, data, CONFIG, checkpoint=tmp_path / "run.pt", progress=count), *whole)
    assert count.steps == 20 - 7


def test_a_finished_run_is_not_trained_again_and_can_be_extended(
    tmp_path: Path, whole: tuple[nn.Module, st.TrainResult], data: ImageData
) -> None:
    short = dataclasses.replace(CONFIG, epochs=2)
    train(network(), data, short, checkpoint=tmp_path / "run.pt")
    count = Count()
    assert train(network(), data, short, checkpoint=tmp_path / "run.pt", progress=count).resumed_epochs == 2
    assert count.steps == 0
    model = network()
    assert_same_run(model, train(model, data, CONFIG, checkpoint=tmp_path / "run.pt"), *whole)
    with pytest.raises(ValueError, match=r"run\.pt.*--epochs 4 or more.*--fresh"):
        train(network(), data, short, checkpoint=tmp_path / "run.pt")


@pytest.mark.parametrize(
    "change", [{"lr": 0.1}, {"seed": 4}, {"batch_size": 8}, {"momentum": 0.5}, {"optimizer": "adam"}, {"amp": "bf16"}]
)
def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path, data: ImageData, change: dict[str, Any]) -> None:
    path = tmp_path / "run.pt"
    config = dataclasses.replace(CONFIG, epochs=1)
    train(network(), data, config, checkpoint=path)
    before = path.read_bytes()
    other = dataclasses.replace(config, **change)
    with pytest.raises(ValueError, match=next(iter(change))) as caught:
        train(network(), data, other, checkpoint=path)
    assert str(path) in str(caught.value) and "--fresh" in str(caught.value)
    assert path.read_bytes() == before
    train(network(), data, other, checkpoint=Checkpoint(path, fresh=True))
    assert path.read_bytes() != before


def test_a_checkpoint_of_other_data_or_another_network_is_refused(tmp_path: Path, data: ImageData) -> None:
    path, config = tmp_path / "run.pt", dataclasses.replace(CONFIG, epochs=1)
    train(network(), data, config, checkpoint=Checkpoint(path, {"model": "one"}))
    with pytest.raises(ValueError, match="data_fingerprint.*train_images=70"):
        train(network(), data.limited(train=60), config, checkpoint=Checkpoint(path, {"model": "one"}))
    with pytest.raises(ValueError, match="model='one'.*model='two'"):
        train(network(), data, config, checkpoint=Checkpoint(path, {"model": "two"}))
    with pytest.raises(ValueError, match="another network"):
        train(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data, config, checkpoint=Checkpoint(path, {"model": "one"})
        )


def damage(raw: bytes) -> dict[str, bytes]:
    middle = bytearray(raw)
    # The bytes of a weight: nothing but a checksum tells.
    position = raw.index(b"FB", len(raw) // 2) + 200
    middle[position] ^= 1
    return {
        "empty": b"",
        "cut short": raw[: len(raw) // 2],
        "last byte gone": raw[:-1],
        "first byte gone": raw[1:],
        "text": b"not a checkpoint",
        "a flipped bit": bytes(middle),
    }


@pytest.mark.parametrize("kind", list(damage(b"FB" * 1000)))
def test_a_damaged_checkpoint_is_refused_and_left_alone(tmp_path: Path, data: ImageData, kind: str) -> None:
    path, config = tmp_path / "run.pt", dataclasses.replace(CONFIG, epochs=1)
    train(network(), data, config, checkpoint=path)
    raw = damage(path.read_bytes())[kind]
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="unreadable") as caught:
        train(network(), data, config, checkpoint=path)
    assert str(path) in str(caught.value) and "--fresh" in str(caught.value)
    assert path.read_bytes() == raw


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, data: ImageData) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"format": 1, "identity": Harm()}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="unreadable"):
        train(network(), data, CONFIG, checkpoint=tmp_path / "run.pt")
    assert not (tmp_path / "harm").exists()


def test_a_crash_while_writing_leaves_the_old_checkpoint(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = tmp_path / "run.pt", dataclasses.replace(CONFIG, epochs=1)
    train(network(), data, config, checkpoint=path)
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(st.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        train(network(), data, dataclasses.replace(config, epochs=2), checkpoint=path)
    assert path.read_bytes() == before


def test_a_loss_that_is_not_finite_is_reported(tmp_path: Path, data: ImageData) -> None:
    with pytest.raises(st.Diverged, match="--lr"):
        train(network(), data, dataclasses.replace(CONFIG, lr=1e38), checkpoint=tmp_path / "run.pt")
    assert not (tmp_path / "run.pt").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("optimizer", "sdg"),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr_halve_every", -1),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("seed", -1),
        ("amp", "fp16"),
        ("workers", -1),
        ("device", "gpu"),
        ("device", "meta"),
        ("device", f"cuda:{torch.cuda.device_count()}"),
    ],
)
def test_bad_settings_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value})  # type: ignore[arg-type]


def test_the_learning_rate_is_halved() -> None:
    config = TrainConfig(lr=0.02, lr_halve_every=50)
    assert [config.lr_at(epoch) for epoch in (0, 49, 50, 100)] == [0.02, 0.02, 0.01, 0.005]
    assert TrainConfig(lr_halve_every=0).lr_at(1000) == 0.02
    optimizer = st.make_optimizer(nn.Linear(1, 1), config)
    assert optimizer.param_groups[0]["momentum"] == 0.95 and optimizer.param_groups[0]["weight_decay"] == 0


def test_the_learning_rate_reaches_the_optimiser(data: ImageData) -> None:
    result = train(network(), data, dataclasses.replace(CONFIG, lr_halve_every=1))
    assert [record["lr"] for record in result.history] == [0.02, 0.01, 0.005, 0.0025]


@pytest.mark.parametrize(("count", "batch", "steps"), [(70, 16, 5), (65, 16, 4), (64, 16, 4), (1, 16, 1), (3, 1, 3)])
def test_a_last_batch_of_one_image_is_left_out(count: int, batch: int, steps: int) -> None:
    data = made_up_data(train=count)
    counter = Count()
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=batch)
    record = train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data, config, progress=counter).history[0]
    assert counter.steps == steps and math.isfinite(record["train_loss"]) and record["train_accuracy"] <= 1


def test_every_image_is_seen_once_an_epoch_in_another_order(data: ImageData) -> None:
    first, second = st._order(70, 0, 0), st._order(70, 0, 1)
    assert sorted(first.tolist()) == list(range(70)) and not torch.equal(first, second)
    assert torch.equal(first, st._order(70, 0, 0)) and not torch.equal(first, st._order(70, 1, 0))


def test_autocast_trains(data: ImageData) -> None:
    result = train(network(), data, dataclasses.replace(CONFIG, amp="bf16"))
    assert result.test_accuracy > 0.5


def test_evaluation_restores_the_mode_and_averages_density(data: ImageData) -> None:
    model = network().train()
    whole = st.evaluate(model, data.test_images, data.test_labels, to_input=data.to_input, batch_size=30)
    parts = st.evaluate(model, data.test_images, data.test_labels, to_input=data.to_input, batch_size=7)
    assert model.training
    assert parts.accuracy == whole.accuracy
    assert parts.density["3"] == pytest.approx(whole.density["3"]) and parts.loss == pytest.approx(whole.loss)


def test_densities_are_found_by_attribute() -> None:
    model = network()
    assert st.block_densities(model) == {}
    model(torch.zeros(2, 1, 8, 8))
    assert st.block_densities(model).keys() == {"3"}
