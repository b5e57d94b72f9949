"""The comparison and its report."""

from __future__ import annotations

import dataclasses
import io
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from apps_standins import made_up_data

from spectriton import compare as sc
from spectriton import compression, environment, plots, report
from spectriton import nn as snn
from spectriton.compare import CompareConfig, compare
from spectriton.data import ImageData
from spectriton.train import Silent, TrainConfig

pytestmark = pytest.mark.usefixtures("apps_extra")

CONFIG = CompareConfig(
    data="made-up", threshold=0.3, train=TrainConfig(epochs=2, batch_size=16, device="cpu"), data_dir="/secret/place"
)
NUMBERS = (
    "test_accuracy",
    "peak_bytes",
    "average_bytes",
    "saved_bytes",
    "parameter_bytes",
    "seconds_per_epoch",
    "peak_beyond_state_bytes",
    "average_beyond_state_bytes",
)


class Killed(Exception):
    """Stands for whatever ends a process."""


class Watch(Silent):
    """Counts the steps of each network; may raise after one."""

    def __init__(self, kill: tuple[str, int] | None = None) -> None:
        self.steps: dict[str, int] = {"spatial": 0, "spectral": 0}
        self.kill = kill
        self.title = ""

    def begin(self, title: str, epochs: int, batches: int, done: int) -> None:
        self.title = title

    def step(self, epoch: int, batch: int) -> None:
        self.steps[self.title] = self.steps.get(self.title, 0) + 1

    def epoch(self, record: Mapping[str, Any]) -> None:
        if (self.title, record["epoch"]) == self.kill:
            raise Killed


def lasting(result: Any) -> Any:
    """A report without what differs from run to run."""
    if isinstance(result, dict):
        return {key: lasting(value) for key, value in result.items() if "seconds" not in key}
    return [lasting(value) for value in result] if isinstance(result, list) else result


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        from apps_standins import tiny_network

        patch.setattr(
            sc.models,
            "build",
            lambda name, *, variant, threshold, **rest: tiny_network(threshold if variant == "spectral" else None),
            raising=False,
        )
        out = tmp_path_factory.mktemp("compare") / "runs" / "x"
        return out, compare(CONFIG, out, data=made_up_data())


def test_the_report_holds_what_it_promises(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    assert json.loads((out / "report.json").read_text()) == result
    assert list(result) == ["spatial", "spectral", "ratio", "config", "environment"]
    for variant in ("spatial", "spectral"):
        network = result[variant]
        assert all(isinstance(network[key], (int, float)) for key in NUMBERS)
        assert 0 <= network["test_accuracy"] <= 1
        assert 0 < network["saved_bytes"] <= network["peak_beyond_state_bytes"] <= network["peak_bytes"]
        assert network["average_bytes"] <= network["peak_bytes"]
        assert len(network["history"]) == 2
        assert network["seconds_per_epoch"] == statistics.median(r["seconds"] for r in network["history"])
    # Conv 4*1*9 + 4, batch norm 4 + 4, linear 640 + 10, in float32.
    assert result["spatial"]["parameter_bytes"] == 4 * (40 + 8 + 650)
    assert "density" not in result["spatial"] and result["spectral"]["density"].keys() == {"3"}
    assert result["ratio"] == {key: result["spectral"][key] / result["spatial"][key] for key in NUMBERS}
    assert result["config"]["threshold"] == 0.3 and result["config"]["lr"] == 0.02 and result["config"]["seed"] == 0


def test_the_report_names_no_machine_path(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    text = (out / "report.json").read_text()
    assert "secret" not in text and str(out) not in text and str(Path.home()) not in text.replace('"/', "")


def test_figures_are_written(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    for name in ("curves.png", "memory.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_twins_start_alike(fake_models: list[dict[str, object]], data: ImageData) -> None:
    spatial = sc.build_network(CONFIG, data, "spatial").state_dict()
    spectral = sc.build_network(CONFIG, data, "spectral").state_dict()
    assert torch.equal(spatial["0.weight"], spectral["0.weight"])
    other = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, seed=1))
    assert not torch.equal(spatial["0.weight"], sc.build_network(other, data, "spatial").state_dict()["0.weight"])


def test_options_reach_the_networks(fake_models: list[dict[str, object]], data: ImageData) -> None:
    sc.build_network(dataclasses.replace(CONFIG, paper=True), data, "spectral")
    config = dataclasses.replace(CONFIG, value_dtype="int4")
    sc.build_network(config, data, "spatial")
    sc.build_network(config, data, "spectral")
    sc.build_network(dataclasses.replace(CONFIG, value_dtype="int8"), data, "spectral")
    sc.build_network(dataclasses.replace(CONFIG, width=0.5), data, "spectral")
    assert [call.get("value_dtype") for call in fake_models] == [None, "int4", "int4", "int8", None]
    assert [call["paper"] for call in fake_models] == [True, False, False, False, False]
    assert [call["width"] for call in fake_models] == [1, 1, 1, 1, 0.5]
    assert {call["image_size"] for call in fake_models} == {8}


@pytest.mark.parametrize("kill", [("spatial", 2), ("spectral", 1)])
def test_a_comparison_goes_on_where_it_was_cut_short(
    tmp_path: Path,
    finished: tuple[Path, dict[str, Any]],
    fake_models: list[dict[str, object]],
    data: ImageData,
    kill: tuple[str, int],
) -> None:
    with pytest.raises(Killed):
        compare(CONFIG, tmp_path, data=data, progress=Watch(kill), plots=False)
    assert not (tmp_path / "report.json").exists()
    watch = Watch()
    result = compare(CONFIG, tmp_path, data=data, progress=watch, plots=False)
    assert lasting(result) == lasting(finished[1])
    before = 5 * kill[1]
    assert watch.steps == (
        {"spatial": 10 - before, "spectral": 10} if kill[0] == "spatial" else {"spatial": 0, "spectral": 10 - before}
    )


def test_a_finished_comparison_is_not_trained_again_unless_fresh(
    tmp_path: Path, fake_models: list[dict[str, object]], data: ImageData
) -> None:
    first = compare(CONFIG, tmp_path, data=data, plots=False)
    watch = Watch()
    assert lasting(compare(CONFIG, tmp_path, data=data, progress=watch, plots=False)) == lasting(first)
    assert watch.steps == {"spatial": 0, "spectral": 0}
    compare(CONFIG, tmp_path, data=data, progress=watch, plots=False, fresh=True)
    assert watch.steps == {"spatial": 10, "spectral": 10}
    with pytest.raises(ValueError, match=r"spatial\.pt.*threshold=0\.3.*threshold=0\.5"):
        compare(dataclasses.replace(CONFIG, threshold=0.5), tmp_path, data=data, plots=False)


def test_several_seeds_give_means(tmp_path: Path, fake_models: list[dict[str, object]], data: ImageData) -> None:
    result = compare(CONFIG, tmp_path, seeds=[0, 1, 0], data=data)
    assert [run["config"]["seed"] for run in result["runs"]] == [0, 1] == result["config"]["seeds"]
    for key in ("test_accuracy", "saved_bytes"):
        assert result["spectral"][key] == pytest.approx(statistics.mean(r["spectral"][key] for r in result["runs"]))
    assert result["ratio"]["test_accuracy"] == result["spectral"]["test_accuracy"] / result["spatial"]["test_accuracy"]
    assert len(result["spatial"]["history"]) == 2
    assert (tmp_path / "seed-1" / "spectral.pt").exists() and (tmp_path / "curves.png").exists()
    stream = io.StringIO()
    report.print_report(result, stream)
    assert "±" in stream.getvalue() and "seeds 0, 1" in stream.getvalue()
    with pytest.raises(ValueError, match="--seeds"):
        compare(CONFIG, tmp_path, seeds=[], data=data, plots=False)


def test_one_network_alone_and_then_the_comparison(
    tmp_path: Path, fake_models: list[dict[str, object]], data: ImageData
) -> None:
    result = sc.train_alone(CONFIG, "spatial", tmp_path, data=data)
    assert list(result) == ["spatial", "config", "environment"] and (tmp_path / "curves.png").exists()
    assert json.loads((tmp_path / "report.json").read_text()) == result
    stream = io.StringIO()
    report.print_report(result, stream)
    assert "spectral" not in stream.getvalue().splitlines()[1]
    watch = Watch()
    compare(CONFIG, tmp_path, data=data, progress=watch, plots=False)
    assert watch.steps == {"spatial": 0, "spectral": 10}
    with pytest.raises(ValueError, match="did you mean 'spatial'"):
        sc.train_alone(CONFIG, "spacial", tmp_path, data=data)


def test_what_the_second_network_refuses_is_found_before_the_first_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: ImageData
) -> None:
    def build(name: str, *, variant: str, **rest: object) -> None:
        if variant == "spectral":
            raise ValueError("too small")
        raise AssertionError("the spatial network is built first")

    monkeypatch.setattr(sc.models, "build", build, raising=False)
    with pytest.raises(ValueError, match="too small"):
        compare(CONFIG, tmp_path, data=data, plots=False)


def test_missing_matplotlib_is_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_models: list[dict[str, object]], data: ImageData
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'matplotlib.*pip install "spectriton\[apps\]"'):
        compare(CONFIG, tmp_path, data=data)
    assert not fake_models


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threshold": -1.0}, "threshold"),
        ({"value_dtype": "int16"}, "value_dtype.*'int8'"),
        ({"value_dtype": "int8", "paper": True}, "--paper"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIG, **change)


def test_ratios_over_zero_are_none() -> None:
    network: dict[str, Any] = dict.fromkeys(NUMBERS, 1)
    result = report.assemble({"spatial": {**network, "test_accuracy": 0}, "spectral": network}, CONFIG.describe())
    assert result["ratio"]["test_accuracy"] is None and result["ratio"]["saved_bytes"] == 1


def test_json_is_strict_and_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    report.write_json({"a": 1}, path)
    with pytest.raises(ValueError):
        report.write_json({"a": float("nan")}, path)
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (1536 * 1024, "1.5 MiB"), (5 << 40, "5.12e+03 GiB")],
)
def test_bytes_are_readable(count: int, text: str) -> None:
    assert report.format_bytes(count) == text


def test_plain_progress_gives_a_line_an_epoch_with_the_time_left(data: ImageData) -> None:
    stream = io.StringIO()
    shown = report.PlainProgress(stream, every_seconds=0)
    record = {"epoch": 1, "train_loss": 0.5, "train_accuracy": 0.75, "test_accuracy": 0.5, "seconds": 1.0}
    shown.begin("spatial", 2, 10, 0)
    shown.step(0, 0)
    shown.epoch(record)
    shown.epoch({**record, "epoch": 2})
    shown.end()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert "step 1/10" in lines[0] and "left" in lines[0]
    assert "epoch 1/2" in lines[1] and "75.00 %" in lines[1] and "left" in lines[1] and "left" not in lines[2]
    shown.begin("spectral", 2, 10, 20)
    assert "already trained" in stream.getvalue()


def test_the_bar_runs(capsys: pytest.CaptureFixture[str]) -> None:
    shown = report.BarProgress()
    shown.begin("spatial", 2, 3, 3)
    shown.step(1, 0)
    shown.epoch({"train_loss": 0.5, "train_accuracy": 0.75, "test_accuracy": 0.5})
    shown.end()
    assert "spatial" in capsys.readouterr().err


def test_figures_of_networks_without_packing_blocks(tmp_path: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    result = json.loads(json.dumps(finished[1]))
    del result["spectral"]["density"]
    plots.draw_memory(result, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 1000


def test_a_real_spectral_network_resumes_exactly_and_saves_less(tmp_path: Path) -> None:
    config = CompareConfig(
        threshold=0.5, train_limit=64, test_limit=16, train=TrainConfig(epochs=2, batch_size=32, device="cpu")
    )
    data = config.load_data()
    whole = sc.train_variant(config, "spectral", tmp_path / "whole", data=data)
    with pytest.raises(Killed):
        sc.train_variant(config, "spectral", tmp_path / "cut", data=data, progress=Watch(("spectral", 1)))
    assert lasting(sc.train_variant(config, "spectral", tmp_path / "cut", data=data)) == lasting(whole)
    states = [torch.load(tmp_path / run / "spectral.pt", weights_only=True)["model"] for run in ("whole", "cut")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert len(whole["density"]) >= 3 and all(0 < density <= 1 for density in whole["density"].values())
    spatial = sc.measure_step(sc.build_network(config, data, "spatial"), data, config.train)
    assert whole["saved_bytes"] < 0.5 * spatial["saved_bytes"]


def test_a_network_with_compressed_maps(tmp_path: Path) -> None:
    """It is the original, so it starts with the same numbers, and it goes on where it was cut short."""
    config = CompareConfig(
        method="compress",
        transform="none",
        bits=4,
        train_limit=64,
        test_limit=16,
        train=TrainConfig(epochs=2, batch_size=32, device="cpu", lr=0.01),
    )
    data = config.load_data()
    result = compare(config, tmp_path / "whole", data=data)
    assert list(result) == ["spatial", "compressed", "ratio", "config", "environment"]
    spatial, compressed = result["spatial"], result["compressed"]
    assert compressed["parameter_bytes"] == spatial["parameter_bytes"]
    assert result["ratio"]["saved_bytes"] == compressed["saved_bytes"] / spatial["saved_bytes"] < 0.7
    assert "QuantiseCodec(bits=4" in result["config"]["codec"] and result["config"]["method"] == "compress"
    assert (tmp_path / "whole" / "memory.png").exists()
    with pytest.raises(Killed):
        sc.train_variant(config, "compressed", tmp_path / "cut", data=data, progress=Watch(("compressed", 1)))
    assert lasting(sc.train_variant(config, "compressed", tmp_path / "cut", data=data)) == lasting(compressed)
    with pytest.raises(ValueError, match=r"compressed\.pt.*bits=4.*bits=2"):
        sc.train_variant(dataclasses.replace(config, bits=2), "compressed", tmp_path / "cut", data=data)
    stream = io.StringIO()
    report.print_report(result, stream)
    assert "compressed / spatial" in stream.getvalue() and "maps compressed by QuantiseCodec" in stream.getvalue()
    merged = report.merge([result, result])
    assert merged["compressed"] == compressed and merged["ratio"] == result["ratio"]


def test_settings_of_the_codec_are_checked() -> None:
    with pytest.raises(ValueError, match="did you mean 'compress'"):
        CompareConfig(method="compressed")
    with pytest.raises(ValueError, match="density"):
        CompareConfig(method="compress", density=2.0)
    assert not {"density", "bits", "transform", "codec"} & CONFIG.describe().keys()


def test_figure_of_gradients(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    compression.compress(network, bits=2, transform="none")
    batch = torch.randn(2, 1, 12, 12), torch.zeros(2)
    result = compression.gradient_report(network, [batch], loss=lambda y, _: y.square().mean())
    plots.draw_gradients(result.to_dict(), tmp_path / "new" / "gradients.png")
    assert (tmp_path / "new" / "gradients.png").read_bytes().startswith(b"\x89PNG")


def test_the_activation_is_the_networks_own_unless_it_is_chosen() -> None:
    assert "activation" not in CONFIG.describe()
    chosen = dataclasses.replace(CONFIG, model="lenet", activation="relu")
    assert chosen.describe()["activation"] == "relu"
    network = sc.build_network(chosen, made_up_data(size=28), "spectral")
    assert any(isinstance(module, snn.SpatialReLU) for module in network.modules())
    assert "relu" in report.conditions({"config": chosen.describe(), "environment": environment.collect()})
    with pytest.raises(ValueError, match="activation got 'gelu'"):
        dataclasses.replace(CONFIG, activation="gelu")
    with pytest.raises(ValueError, match="--paper or --activation"):
        dataclasses.replace(CONFIG, activation="relu", paper=True)
