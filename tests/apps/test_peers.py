"""What is used today to train with less memory, beside both networks and together with packed spectra."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from apps_standins import made_up_data
from torch import nn

from spectriton import cli, memory, models, ops, peers, plots, report
from spectriton import nn as snn
from spectriton.compare import CompareConfig, compare
from spectriton.data import ImageData
from spectriton.measure import gradient, measure_step, relative_difference
from spectriton.models import densenet
from spectriton.models._describe import spatial_network, spectral_network
from spectriton.peers import PEERS, Recomputed, measure_peers
from spectriton.train import TrainConfig, seed_everything, training_batch

CONFIG = TrainConfig(epochs=1, batch_size=8, device="cpu")
#: Networks with each kind of layer there is, and the images that they take.
NETWORKS = {"lenet": 12, "vgg16_bn": 32, "densenet": 8}


def data_for(name: str) -> ImageData:
    return made_up_data(train=8, test=4, size=NETWORKS[name])


def builder(name: str, variant: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        seed_everything(0)
        if name == "densenet":  # a small one
            layers = densenet.describe(10, 1, NETWORKS[name], 0.2, blocks=(2, 3), growth=12)
            return spatial_network(layers) if variant == "spatial" else spectral_network(layers, models.Options())
        width = 1.0 if name == "lenet" else 0.1
        return models.build(name, variant, in_channels=1, image_size=NETWORKS[name], width=width)

    return build


@pytest.mark.parametrize("variant", ["spatial", "spectral"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_checkpointing_saves_less_and_finds_the_same_gradient_and_statistics(name: str, variant: str) -> None:
    data, build = data_for(name), builder(name, variant)
    alone, changed = build(), peers.recomputed(build())
    assert [p.shape for p in alone.parameters()] == [p.shape for p in changed.parameters()]
    found, expected = gradient(changed, data, CONFIG), gradient(alone, data, CONFIG)
    assert any(bool(part.any()) for part in expected) and relative_difference(found, expected) == 0
    for after, other in zip(changed.buffers(), alone.buffers(), strict=True):
        assert torch.equal(after, other)
    # Both have the same further steps behind them.
    assert measure_step(changed, data, CONFIG)["saved_bytes"] < 0.8 * measure_step(alone, data, CONFIG)["saved_bytes"]


def test_what_checkpointing_keeps_is_counted() -> None:
    """Packed inputs of segments, each once, and the pattern that the last layer keeps."""
    blocks = [snn.SpecBlock(3, 4, 3, 0.2), snn.SpecBlock(4, 4, 3, 0.2)]
    x = torch.randn(2, 3, 8, 8)
    packed = [ops.to_spectral(x, threshold=0.1)]
    for block in blocks:
        packed.append(block(packed[-1]))
    model = nn.Sequential(*(Recomputed(block) for block in blocks), snn.ToSpatial())
    given = packed[0].detach().requires_grad_()
    with memory.track(model=model) as usage:
        model(given).sum().backward()
    pattern = packed[2].bitmap.nbytes + packed[2].offsets.nbytes
    edge = 4  # one number of storage; the first one is a leaf
    assert usage.saved_bytes == packed[0].nbytes + packed[1].nbytes + edge + pattern
    assert given.edge.grad is not None


@pytest.mark.parametrize("variant", ["spatial", "spectral"])
def test_offloading_finds_the_same_gradient(variant: str) -> None:
    data, build = data_for("vgg16_bn"), builder("vgg16_bn", variant)
    found = gradient(build(), data, CONFIG, around=lambda: PEERS["offload"].around(torch.device("cpu")))
    assert relative_difference(found, gradient(build(), data, CONFIG)) == 0


def test_rows_have_figures_or_say_why_not() -> None:
    rows = {row["peer"]: row for row in measure_peers(builder("lenet", "spatial"), data_for("lenet"), CONFIG, [*PEERS])}
    assert list(rows) == ["none", *PEERS]
    assert "host" in rows["offload"]["note"] and "batch norm" in rows["inplace-bn"]["note"]
    assert not {"saved_bytes", "gradient_difference"} & {*rows["offload"], *rows["inplace-bn"]}
    for name in ("none", "checkpoint", "bf16"):
        row = rows[name]
        assert row["note"] is None and 0 < row["saved_bytes"] <= row["peak_bytes"] and row["seconds_per_step"] > 0
    assert rows["none"]["gradient_difference"] == rows["checkpoint"]["gradient_difference"] == 0
    assert 0 < rows["bf16"]["gradient_difference"] < 1
    recipe = dataclasses.replace(CONFIG, amp="bf16")
    rows = {row["peer"]: row for row in measure_peers(builder("lenet", "spatial"), data_for("lenet"), recipe, ["bf16"])}
    assert "--amp bf16" in rows["bf16"]["note"] and "saved_bytes" in rows["none"]


class StandIn(nn.BatchNorm2d):
    """Takes what ``inplace_abn.InPlaceABN`` takes and computes the same, not in place."""

    def __init__(self, num_features: int, *, eps: float, momentum: float, activation: str, activation_param: float):
        super().__init__(num_features, eps, momentum)
        assert activation == "leaky_relu"
        self.slope = activation_param

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.leaky_relu(super().forward(input), self.slope)


def test_batch_norm_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    data, build = data_for("vgg16_bn"), builder("vgg16_bn", "spatial")
    if peers.importlib.util.find_spec("inplace_abn") is None:
        (_, row) = measure_peers(build, data, CONFIG, ["inplace-bn"])
        assert row == {"peer": "inplace-bn", "note": "the package inplace_abn is not installed"}
    module = types.ModuleType("inplace_abn")
    module.InPlaceABN = StandIn  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "inplace_abn", module)
    network = PEERS["inplace-bn"].prepare(build())
    kinds = [type(layer) for layer in network.modules()]
    assert kinds.count(StandIn) == 13 and nn.ReLU not in kinds and nn.BatchNorm2d not in kinds
    network.eval()
    images, _ = training_batch(data, CONFIG, torch.device("cpu"))
    torch.testing.assert_close(network(images), _leaky(build()).eval()(images))
    (_, row) = measure_peers(build, data, CONFIG, ["inplace-bn"])
    assert "leaky ReLU" in row["note"] and row["saved_bytes"] > 0


def _leaky(network: nn.Module) -> nn.Module:
    for name, layer in network.named_children():
        if isinstance(layer, nn.ReLU):
            setattr(network, name, nn.LeakyReLU(0.01))
    return network


@pytest.mark.usefixtures("apps_extra")
def test_the_report_has_a_row_for_each_network_and_peer(tmp_path: Path) -> None:
    config = CompareConfig(data="made-up", train=CONFIG)
    data = made_up_data(train=16, test=8, size=12)
    result = compare(config, tmp_path, data=data, seeds=[0, 1], peers=["checkpoint", "offload"])
    assert json.loads((tmp_path / "report.json").read_text()) == result
    rows = result["peers"]
    assert [(row["variant"], row["peer"]) for row in rows] == [
        (variant, peer) for variant in ("spatial", "spectral") for peer in ("none", "checkpoint", "offload")
    ]
    assert len({tuple(row) for row in rows}) == 1  # the same keys in each
    assert set(rows[0]["ratio"].values()) == {1.0}
    ratios = [row["ratio"]["saved_bytes"] for row in rows]
    assert ratios[4] == rows[4]["saved_bytes"] / rows[0]["saved_bytes"] < min(ratios[1], ratios[3])
    assert rows[2]["saved_bytes"] is None and set(rows[2]["ratio"].values()) == {None}
    assert all("peers" not in part for part in (result["spatial"], result["spectral"], *result["runs"]))
    stream = io.StringIO()
    report.print_report(result, stream)
    for text in ("spectral + checkpoint", "spatial + offload: the memory of a CPU", "spectral / spatial"):
        assert text in stream.getvalue()
    assert max(map(len, stream.getvalue().splitlines()[:12])) <= 80
    with_peers = (tmp_path / "memory.png").read_bytes()
    del result["peers"]
    plots.draw_memory(result, tmp_path / "memory.png")
    assert len((tmp_path / "memory.png").read_bytes()) < len(with_peers)


def test_names() -> None:
    assert peers.chosen(["all"]) == list(PEERS) and peers.chosen(["bf16", "bf16"]) == ["bf16"] and not peers.chosen([])
    with pytest.raises(ValueError, match="did you mean 'checkpoint'"):
        peers.chosen(["chekpoint"])


@pytest.mark.usefixtures("apps_extra")
def test_an_unknown_peer_ends_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["compare", "--peers", "bf16,chekpoint", "--out", str(tmp_path)])
    assert caught.value.code == 2 and "did you mean 'checkpoint'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
