"""Plans that stay over several forward passes of a compressed network: when they are made, used and given up."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import spectriton
from spectriton import _plans, memory
from spectriton._backend import Backend, backend
from spectriton._plans import MOST_USES, KeptPlan, Place, Plans, is_due
from spectriton.codec import BlockCodec, Encoded, make_codec
from spectriton.compression import gradient_report
from spectriton.reference import block_codec

SIZE, BATCH = 16, 8


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics at the 1st, 2nd, 4th, 8th, .. time, so that few steps show what kept ones do."""
    monkeypatch.setattr(_plans, "is_due", doubling)


def doubling(use: int, refresh: int) -> bool:
    return use % refresh == 0 or use & (use - 1) == 0


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was made from here on: ``"statistics"`` and ``"tables"``."""
    found: list[str] = []
    runs = type(backend(torch.device("cpu")))
    fit, plan = runs.fit_blocks, runs.block_plan

    def noted_fit(*given: Any) -> Any:
        found.append("statistics")
        return fit(*given)

    def noted_plan(*given: Any) -> Any:
        found.append("tables")
        return plan(*given)

    monkeypatch.setattr(runs, "fit_blocks", noted_fit)
    monkeypatch.setattr(runs, "block_plan", noted_plan)
    return found


def network(refresh: int | None = None) -> nn.Sequential:
    """Encodes the output of its first convolution, 8 channels."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()]
    return spectriton.compress(nn.Sequential(*layers), bits=8, refresh=refresh)


def images(seed: int = 0, batch: int = BATCH) -> Tensor:
    x = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return x + x.roll(1, 2) + x.roll(1, 3)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of one step, which is taken."""
    model.zero_grad()
    model(x).square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.05 * p.grad
    return gradients


def test_when_statistics_are_taken():
    due = [use for use in range(1, 200) if is_due(use, 16)]
    assert due == [*range(1, 16), *range(16, 32, 2), *range(32, 64, 4), *range(64, 128, 8), *range(128, 200, 16)]
    assert [use for use in range(60, 100) if is_due(use, 10)] == [60, 64, 72, 80, 88, 96]
    assert [use for use in range(150, 200) if is_due(use, 10)] == [150, 160, 170, 180, 190]
    assert all(is_due(use, 1) for use in range(1, 99))


def test_statistics_and_tables_are_made_when_they_are_due_only(made: list[str]):
    model = network(refresh=5)
    counts = []
    for number in range(12):
        made.clear()
        step(model, images(number))
        assert made.count("tables") == made.count("statistics")
        counts.append(made.count("statistics"))
    assert counts == [int(doubling(use, 5)) for use in range(1, 13)]


def test_refresh_of_one_keeps_nothing(made: list[str]):
    model = network(refresh=1)
    assert model[0].codec.plans is None
    for number in range(3):
        step(model, images(number))
    # Tables once to encode, once to decode.
    assert made.count("statistics") == 3 and made.count("tables") == 6


def placed(codec: BlockCodec, place: Place, x: Tensor) -> Encoded:
    return replace(codec, place=place).encode(x)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("channels", [1, 8, 66])
def test_kept_plans_decode_as_what_is_stored_does(channels: int, rounding: str):
    """And the first maps are encoded as if nothing was kept."""
    torch.manual_seed(0)
    codec = BlockCodec(density=1, bits=2, rounding=rounding)
    place = Place(Plans(16))
    x = torch.randn(6, channels, 12, 9).cumsum(2)
    first = placed(codec, place, x)
    fresh = codec.encode(x)
    assert all(torch.equal(a, b) for a, b in zip(first.tensors, fresh.tensors, strict=True))
    placed(codec, place, x)
    other = 1.3 * x.flip(0) + 0.5
    encoded = placed(codec, place, other)
    assert place.kept is not None and encoded.tensors[3] is place.kept._spectrum
    elsewhere = encoded.with_tensors([t.clone() for t in encoded.tensors])
    assert torch.equal(encoded.decode(), elsewhere.decode())
    assert torch.equal(encoded.decode(), pickle.loads(pickle.dumps(encoded)).decode())
    # Means are those of the maps themselves.
    torch.testing.assert_close(encoded.tensors[1][:channels], other.mean((0, 2, 3)))
    error, least = ((e.decode() - other).norm() / other.norm() for e in (encoded, codec.encode(other)))
    assert error < 1.2 * least


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("uses", [2, 3])
def test_what_is_not_finite_is_seen_and_forgotten(uses: int, value: float):
    """By a kept plan (third use), and where statistics are taken anew (second use)."""
    codec, place = BlockCodec(density=1, bits=3, mix=2), Place(Plans(16))
    x = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0)).cumsum(2)
    for _ in range(uses - 1):
        expected = placed(codec, place, x).decode()
    spoilt = x.clone()
    spoilt[1, 2, 3, 4] = value
    out = placed(codec, place, spoilt).decode()
    assert out[:, 2:4].isnan().all() and out.isnan().sum() == out[:, 2:4].numel()
    kept = [0, 1, 4, 5]
    torch.testing.assert_close(out[:, kept], expected[:, kept])
    torch.testing.assert_close(placed(codec, place, x).decode(), expected)


def test_saturation_is_harmless():
    """Maps ten times as large as those of the statistics are clipped to the last level."""
    codec, place = BlockCodec(density=1, bits=3), Place(Plans(16))
    x = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        placed(codec, place, x)
    out = placed(codec, place, 10 * x).decode()
    assert out.isfinite().all() and float(torch.nn.functional.cosine_similarity(out.flatten(), x.flatten(), 0)) > 0.8


def test_a_batch_of_another_size_leaves_the_plan_alone(made: list[str]):
    model = network()
    for number in range(4):
        step(model, images(number))
    made.clear()
    # The last batch of an epoch.
    step(model, images(4, batch=3))
    assert made.count("statistics") == 1
    made.clear()
    for number in range(5, 8):  # up to the seventh use
        step(model, images(number))
    assert not made
    step(model, images(8))
    assert made == ["statistics", "tables"]
    # From the second one on, what was another size is the size.
    made.clear()
    for number in range(4):
        step(model, images(number, batch=5))
    assert [m for m in made if m == "statistics"] == ["statistics"] * 3
    assert len(made) == 3 + 2 + 1 + 1


class Thrice(nn.Module):
    """A convolution, norm and activation that are used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.again = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.again(x)
        return x


def test_each_use_of_a_module_has_its_own_plan():
    torch.manual_seed(0)
    model = spectriton.compress(Thrice())
    step(model, images())
    plans = model.first.codec.plans
    (uses,) = plans._places.values()
    assert len(uses.places) == 3 and len({id(place.kept) for place in uses.places}) == 3
    # Forward without backward: places are few, and gone after the next step.
    for _ in range(MOST_USES):
        model(images())
    assert len(uses.places) == MOST_USES
    for _ in range(3):
        step(model, images())
    assert len(uses.places) == 3


@pytest.mark.parametrize("shared", [False, True])
def test_checkpointing_gives_the_gradients_of_plain_training(shared: bool, made: list[str]):
    torch.manual_seed(0)
    plain = spectriton.compress(Thrice(), bits=16) if shared else network()
    other = copy.deepcopy(plain)

    def checkpointed(x: Tensor) -> Tensor:
        parts = [other.first, *([other.again] * 3)] if shared else [other[:4], other[4:]]
        for part in parts:
            x = checkpoint(part, x, use_reentrant=False)
        return x

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = other

        def forward(self, x: Tensor) -> Tensor:
            return checkpointed(x)

    for number in range(6):
        made.clear()
        expected = step(plain, images(number))
        count = made.count("statistics")
        made.clear()
        found = step(Checkpointed(), images(number))
        if not shared:
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
            assert made.count("statistics") >= count
            assert number < 4 or not made
        else:  # where nothing tells which use is computed again, statistics are those of the maps themselves
            vectors = [torch.cat([g.flatten() for g in side]) for side in (expected, found)]
            assert (vectors[0] - vectors[1]).norm() < 0.1 * vectors[0].norm()


def test_backward_twice_gives_the_same():
    """Also where the plan has been replaced between."""
    model = network()
    for number in range(5):
        step(model, images(number))
    loss = model(images(9)).square().mean()
    (uses,) = model[0].codec.plans._places.values()
    kept = uses.places[0].kept
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    for number in range(3):
        with torch.no_grad():
            model(images(3))
        model(images(number)).mean().backward()
    assert uses.places[0].kept is not kept
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_copies_and_states_have_no_plans():
    model = network()
    names = list(model.state_dict())
    for number in range(3):
        step(model, images(number))
    assert list(model.state_dict()) == names and model[0].codec.plans.nbytes > 0
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].codec.plans.nbytes == 0 and other[0].codec.plans.refresh == 16
        assert other[0].codec.plans is other[3].codec.plans is not model[0].codec.plans
        assert other[0].codec == model[0].codec
    plans = weakref.ref(model[0].codec.plans)
    spectriton.decompress(model)
    gc.collect()
    assert plans() is None


def test_a_report_changes_nothing_and_always_says_the_same():
    model = network()
    for number in range(3):
        step(model, images(number))
    (uses,) = model[0].codec.plans._places.values()
    place = uses.places[0]
    before, codec = (place.kept, place._uses, uses.count), model[0].codec
    batches = [(images(number), None) for number in (7, 8)]
    reports = [gradient_report(model, batches, loss=lambda y, _: y.square().mean()) for _ in range(2)]
    assert reports[0] == reports[1]
    assert model[0].codec is codec and (place.kept, place._uses, uses.count) == before


def test_what_is_saved_is_what_it_was_and_what_stays_is_small():
    figures = []
    for refresh in (1, 16):
        model = network(refresh)
        for number in range(3):
            step(model, images(number, batch=32))
        with memory.track(model=model) as usage:
            step(model, images(3, batch=32))
        figures.append(usage.saved_bytes)
    assert figures[0] == figures[1]
    maps = 32 * 8 * SIZE**2 * 4
    assert 0 < model[0].codec.plans.nbytes < maps / 8


def test_no_map_stays(monkeypatch: pytest.MonkeyPatch):
    seen = []
    runs = type(backend(torch.device("cpu")))
    fit = runs.fit_blocks

    def noted(self: Backend, x: Tensor, *given: Any) -> Any:
        seen.append(weakref.ref(x.untyped_storage()))
        return fit(self, x, *given)

    monkeypatch.setattr(runs, "fit_blocks", noted)
    model = network()
    for number in range(4):
        step(model, images(number))
    gc.collect()
    assert seen and all(ref() is None for ref in seen)


def test_the_host_never_waits(monkeypatch: pytest.MonkeyPatch):
    """Tensors without data can neither be read nor have a shape that depends on data."""
    make_plan = block_codec.make_plan
    monkeypatch.setenv("SPECTRITON_BACKEND", "reference")
    monkeypatch.setattr(block_codec, "make_plan", lambda stored, layout, compact: make_plan(stored, layout, False))
    caches = [f for f in vars(block_codec).values() if hasattr(f, "cache_clear")]
    for cache in caches:
        cache.cache_clear()
    with FakeTensorMode():
        place = Place(Plans(16))
        for _ in range(4):
            out = placed(BlockCodec(), place, torch.empty(4, 6, 16, 9)).decode()
        assert isinstance(place.kept, KeptPlan) and out.shape == (4, 6, 16, 9)
    for cache in caches:
        cache.cache_clear()


def test_gradients_hardly_change():
    """Training with statistics of every step, and with kept ones, on the same images."""
    errors = []
    for refresh in (1, 16):
        torch.manual_seed(0)
        model, exact = network(refresh), spectriton.decompress(network())
        differences = []
        for number in range(24):
            x = images(number)
            with torch.no_grad():
                for ours, theirs in zip(exact.parameters(), model.parameters(), strict=True):
                    ours.copy_(theirs)
            expected, found = step(exact, x)[-2], step(model, x)[-2]
            differences.append(float((found - expected).norm() / expected.norm()))
        errors.append(sum(differences[1:]))
    assert errors[1] < 1.25 * errors[0]


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: BlockCodec(refresh=0), ValueError, "refresh got 0"),
        (lambda: BlockCodec(refresh=2.5), ValueError, "number of forward passes"),
        (lambda: make_codec("none", refresh=4), ValueError, "refresh got 4.*transform='none'"),
    ],
)
def test_bad_settings(call: Any, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        call()
