"""Budgets: thresholds that hold a number of bytes, bits that hold the error of the gradient."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import spectriton
from spectriton import budget
from spectriton import nn as snn
from spectriton.budget import BudgetController, GradientTarget, packed_bytes, parse_budget, set_thresholds, thresholds
from spectriton.codec import CastCodec, QuantiseCodec, SpectrumCodec
from spectriton.compression import gradient_report


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(threshold: float | None = 0.5, **options: object) -> nn.Sequential:
    """Two blocks and a packed pooling between them, for maps of one channel."""
    torch.manual_seed(0)
    rule = {"threshold": threshold, "value_dtype": "float16", **options}
    return nn.Sequential(
        snn.ToSpectral(),
        snn.SpecBlock(1, 8, 3, **rule),
        snn.MaxPool2d(2, **rule),
        snn.SpecBlock(8, 8, 3, norm=True, **rule),
        snn.ToSpatial(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    """Handwritten digits of 16x16 pixels, 32 a batch."""
    sets = pytest.importorskip("sklearn.datasets", reason="scikit-learn holds the images")
    images, labels = sets.load_digits(return_X_y=True)
    maps = functional.interpolate(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, size=(16, 16))
    return list(zip(maps.split(32), torch.tensor(labels).split(32), strict=True))


def train(
    model: nn.Module, controller: BudgetController, batches: list[tuple[Tensor, Tensor]], lr: float = 0.05
) -> list[int]:
    """A step for each batch; gives the packed bytes of each."""
    used = []
    for images, labels in batches:
        model.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
        used.append(packed_bytes(model))
        controller.step()
    return used


def dense_bytes(batch: int) -> int:
    """Of the maps of :func:`network`, in float32."""
    return 4 * batch * (1 * 16 * 16 + 8 * 16 * 16 + 8 * 8 * 8 + 8 * 8 * 8)


@pytest.mark.parametrize(("threshold", "ratio"), [(0.02, 0.2), (0.5, 0.4), (20.0, 0.2)])
def test_a_ratio_is_held_from_any_start(batches: list[tuple[Tensor, Tensor]], threshold: float, ratio: float) -> None:
    model = network(threshold)
    used = train(model, BudgetController(model, saved_ratio=ratio), batches[:40])
    found = [bytes_ / dense_bytes(32) for bytes_ in used]
    assert abs(found[0] / ratio - 1) > 0.05  # there is something to do
    assert sum(found[30:]) / 10 == pytest.approx(ratio, rel=0.03)
    assert all(value == pytest.approx(ratio, rel=0.1) for value in found[30:])
    levels = thresholds(model)
    assert levels["0"] == 0 and levels["1"] == levels["2"] == levels["3"] != threshold


def test_bytes_are_held_and_a_smaller_batch_gets_its_share(batches: list[tuple[Tensor, Tensor]]) -> None:
    model, wanted = network(), 100_000
    controller = BudgetController(model, saved_bytes=wanted)
    used = train(model, controller, batches[:40], lr=0.0)
    assert sum(used[30:]) / 10 == pytest.approx(wanted, rel=0.03)
    before = controller.factor
    (used_by_half,) = train(model, controller, [(batches[0][0][:16], batches[0][1][:16])], lr=0.0)
    assert used_by_half == pytest.approx(wanted / 2, rel=0.1)
    assert controller.factor == pytest.approx(before, rel=0.05)


def test_what_has_a_density_or_no_threshold_stays_and_counts(batches: list[tuple[Tensor, Tensor]]) -> None:
    model = network()
    model[2] = snn.MaxPool2d(2, density=0.25)
    model[3] = snn.SpecBlock(8, 8, 3, threshold=math.inf)
    controller = BudgetController(model, saved_ratio=0.3)
    used = train(model, controller, batches[:40])
    assert used[-1] / dense_bytes(32) == pytest.approx(0.3, rel=0.1)
    assert controller.thresholds() == thresholds(model) == {"0": 0.0, "1": 0.5 * controller.factor, "3": math.inf}
    assert model[2].threshold is None and model[2].density == 0.25


def test_it_goes_on_from_its_state(batches: list[tuple[Tensor, Tensor]]) -> None:
    whole = network()
    controller = BudgetController(whole, saved_bytes=100_000)
    expected = train(whole, controller, batches[:12])
    first = network()
    started = BudgetController(first, saved_bytes=100_000)
    used = train(first, started, batches[:5])
    state = json.loads(json.dumps(started.state_dict()))
    second = network(threshold=3.0)
    second.load_state_dict(first.state_dict())
    resumed = BudgetController(second, saved_ratio=0.9)
    resumed.load_state_dict(state)
    assert thresholds(second) == thresholds(first)
    assert used + train(second, resumed, batches[5:12]) == expected
    assert resumed.state_dict() == controller.state_dict()
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(("text", "expected"), [
    ("0.2", 0.2), (0.2, 0.2), ("1", 1.0), (" 64MiB ", 64 << 20), ("1.5 GiB", 3 << 29), ("500B", 500), ("2KiB", 2048),
])  # fmt: skip
def test_budgets_as_users_write_them(text: str | float, expected: float) -> None:
    found = parse_budget(text)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("text", ["0", "1.5", "-0.2", "nan", "0MiB", "64MB", "much", "", 0])
def test_budgets_that_are_none(text: str | float) -> None:
    with pytest.raises(ValueError, match=r"give 0\.2 or 64MiB"):
        parse_budget(text)


def packed_network(threshold: float) -> nn.Sequential:
    return nn.Sequential(snn.ToSpectral(threshold), snn.ToSpatial())


def test_mistakes_are_named() -> None:
    for arguments, message in (
        ({}, "got neither"),
        ({"saved_bytes": 1, "saved_ratio": 0.1}, "got both"),
        ({"saved_bytes": 0}, "positive number of bytes"),
        ({"saved_ratio": 1.5}, "at most 1"),
        ({"saved_ratio": math.nan}, "not negative"),
    ):
        with pytest.raises(ValueError, match=message):
            BudgetController(network(), **arguments)
    with pytest.raises(ValueError, match="0 packed layers, none with one"):
        BudgetController(nn.Linear(1, 1), saved_ratio=0.1)
    with pytest.raises(ValueError, match="1 packed layers, none with one"):
        BudgetController(packed_network(0.0), saved_ratio=0.1)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        BudgetController("lenet", saved_ratio=0.1)  # type: ignore[arg-type]
    controller = BudgetController(packed_network(0.5), saved_ratio=0.1)
    with pytest.raises(RuntimeError, match="after a training step"):
        controller.step()
    with pytest.raises(ValueError, match="state of the same network"):
        controller.load_state_dict(BudgetController(network(), saved_ratio=0.1).state_dict())
    with pytest.raises(ValueError, match="got '2', expected one of '0'"):
        set_thresholds(packed_network(0.5), {"2": 0.5})
    with pytest.raises(ValueError, match="no layer"):
        set_thresholds(nn.ReLU(), {"2": 0.5})


def test_a_budget_that_no_threshold_reaches_is_refused() -> None:
    model = network()
    controller = BudgetController(model, saved_ratio=0.01)
    model(torch.randn(4, 1, 16, 16))
    with pytest.raises(ValueError, match="bitmaps, offsets, zero frequencies"):
        controller.step()


def test_a_small_rest_whose_tiles_take_more_than_its_share_is_passed_over() -> None:
    model = packed_network(0.5)
    controller = BudgetController(model, saved_ratio=0.2)
    for batch in (64, 1):
        model(torch.randn(batch, 1, 8, 8))
        before = controller.state_dict()
        controller.step()
    assert packed_bytes(model) > 0.2 * 4 * 64 and controller.state_dict() == before


def test_empty_batches_and_maps_without_anything_to_save_change_little() -> None:
    model = packed_network(0.5)
    controller = BudgetController(model, saved_ratio=0.5)
    model(torch.empty(0, 4, 16, 16))
    controller.step()
    assert thresholds(model) == {"0": 0.5}
    for _ in range(200):  # nothing is kept, however low the threshold
        model(torch.zeros(16, 4, 16, 16))
        controller.step()
    assert 0 < thresholds(model)["0"] < 0.5 and controller.factor == pytest.approx(1e-4)


# -- compressed networks --------------------------------------------------------------------------------------------


def compressed(**options: object) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))
    return spectriton.compress(network, **options)


def bits_of(model: nn.Module) -> set[float]:
    return {module.codec.bits for module in model.modules() if hasattr(module, "codec")}


@pytest.mark.parametrize("transform", ["none", "dct"])
def test_the_fewest_bits_that_reach_a_cosine(batches: list[tuple[Tensor, Tensor]], transform: str) -> None:
    model, few = compressed(transform=transform), batches[:2]
    found = {}
    for bits in (1, 2, 4, 8):
        spectriton.compress(model, transform=transform, bits=bits)
        found[bits] = gradient_report(model, few).total.cosine
    assert found[1] < found[2] < found[4] < found[8]
    for below, expected in ((1, 2), (2, 4), (4, 8)):
        target = GradientTarget(model, cosine=(found[below] + found[expected]) / 2, bits=(1, 2, 4, 8))
        report = target.measure(few)
        assert bits_of(model) == {expected} and target.bits == expected
        assert report.total.cosine == target.cosine == found[expected]
    target = GradientTarget(model, cosine=found[1], bits=(1, 2, 4, 8))
    target.measure(few)
    assert target.bits == 1


def test_where_no_bits_reach_it_the_most_are_taken(batches: list[tuple[Tensor, Tensor]]) -> None:
    model = compressed(transform="none")
    target = GradientTarget(model, cosine=0.98, bits=(1,))
    target.measure(batches[:1])
    assert bits_of(model) == {1} and target.cosine is not None and target.cosine < 0.98


def test_it_measures_now_and_then_and_goes_on_from_its_state(batches: list[tuple[Tensor, Tensor]]) -> None:
    target = GradientTarget(compressed(transform="none"), every=3)
    measured = [target.step(batches[:1]) is not None for _ in range(4)]
    assert measured == [True, False, False, True]
    model = compressed(transform="none", bits=1)
    resumed = GradientTarget(model, every=3)
    resumed.load_state_dict(json.loads(json.dumps(target.state_dict())))
    assert bits_of(model) == {target.bits} and resumed.state_dict() == target.state_dict()
    assert [resumed.step(batches[:1]) is not None for _ in range(3)] == [False, False, True]
    other = GradientTarget(compressed(transform="none"), bits=(1,))
    with pytest.raises(ValueError, match="same list"):
        other.load_state_dict({"bits": 3, "cosine": 1.0, "calls": 1})


def test_the_usual_bits_are_those_that_the_codec_takes() -> None:
    for codec, expected in ((QuantiseCodec(), [1, 2, 4, 8]), (SpectrumCodec(), [4, 8, 16])):
        assert budget._usual_bits([compressed(codec=codec)[0]]) == expected
    both = [compressed(transform="dct", density=1.0)[0], compressed(transform="none")[0]]
    assert budget._usual_bits(both) == [1, 2, 4, 8]


def test_targets_that_cannot_be() -> None:
    for arguments, message in (
        ({"cosine": 1.0}, "above 0, below 1"),
        ({"cosine": 0.0}, "above 0, below 1"),
        ({"bits": ()}, "ascending"),
        ({"bits": (4, 2)}, "ascending"),
        ({"bits": (3,)}, "one of 1, 2, 4, 8"),
        ({"every": 0}, "whole number from 1"),
    ):
        with pytest.raises(ValueError, match=message):
            GradientTarget(compressed(transform="none"), **arguments)
    with pytest.raises(ValueError, match="codec that has bits"):
        GradientTarget(compressed(codec=CastCodec()))
    with pytest.raises(ValueError, match=r"spectriton\.compress"):
        GradientTarget(nn.Linear(1, 1))
