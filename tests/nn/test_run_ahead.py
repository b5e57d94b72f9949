"""Training steps for which the host does not wait, and what happens where more is kept than there is room for."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from spectriton import nn as snn
from spectriton import ops
from spectriton.packed import layout
from tests.waits import watch

WORKSPACE = 16 << 10  # several chunks to an op

pytestmark = pytest.mark.triton


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRITON_BACKEND", "triton")


def network(device: torch.device) -> nn.Sequential:
    """Every layer that packs, by threshold and by density, with strides and norm."""
    torch.manual_seed(0)
    room = {"workspace": WORKSPACE}
    return nn.Sequential(
        snn.ToSpectral(0.3, **room),
        snn.SpecBlock(3, 4, 3, 0.5, norm=True, activation_scale=2.0, value_dtype="int8", **room),
        snn.MaxPool2d(2, threshold=0.2, **room),
        snn.SpatialReLU(density=0.5, **room),
        snn.SpecBlock(4, 4, 3, activation="identity", density=0.4, stride=2, **room),
        snn.SpectralBatchNorm2d(4, **room),
        snn.ToSpatial(**room),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).to(device)


PACKED_OUTPUTS = 5


def batch(device: torch.device, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = scale * torch.randn(2, 3, 8, 4, generator=generator)
    return images.to(device), torch.tensor([0, 3], device=device)


def make_step(net: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        net.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(net(images), labels)
        loss.backward()
        return loss.detach()

    return step


def state(net: nn.Module) -> list[Tensor]:
    """Gradients and buffers."""
    assert all(p.grad is not None for p in net.parameters())
    return [*(p.grad.clone() for p in net.parameters()), *(b.clone() for b in net.buffers())]


def test_steady_state_without_waiting(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    if device.type != "cpu":
        pytest.skip("counts what the host calls, for kernels in the interpreter; the next test asks the GPU's runtime")
    net = network(device)
    step = make_step(net, *batch(device))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    with watch(monkeypatch) as waits:
        step()
    assert len(waits.found) > PACKED_OUTPUTS  # the first pass is packed to measure

    with watch(monkeypatch) as waits:
        step()
        optimizer.step()
    assert waits.found == ["counts"] * PACKED_OUTPUTS  # one each

    in_step: list[str] = []

    def watched_step() -> Tensor:
        loss = step()
        in_step.extend(waits.found)
        return loss

    with watch(monkeypatch) as waits:
        ops.run_ahead(watched_step, net)
        optimizer.step()
    assert in_step == []
    assert waits.found == ["counts"] * PACKED_OUTPUTS  # all of them when the step has been launched


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks the runtime of a GPU")
def test_steady_state_without_synchronisation():
    """Of the runtime's own waits none is left; those for events, which it does not report, are counted above."""
    device = torch.device("cuda")
    net = network(device)
    step = make_step(net, *batch(device))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(3):  # optimiser state, tables of frequencies, compiled kernels
        ops.run_ahead(step, net)
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = ops.run_ahead(step, net)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert loss.isfinite()


@pytest.mark.parametrize("layer", [snn.ToSpatial(), snn.SpatialReLU(0.1), snn.MaxPool2d(2, threshold=0.1)], ids=str)
def test_room_to_spare_has_no_gradient(device: torch.device, layer: nn.Module):
    there, (images, _) = snn.ToSpectral(0.3).to(device), batch(device)
    there(images)
    torch.use_deterministic_algorithms(True)  # memory that is not written is not a number
    try:
        with ops.deferred_packing():
            packed = there(images).detach().requires_grad_()
            made = layer(packed)
            made = made if isinstance(made, Tensor) else made.edge
            made.backward(torch.ones(made.shape, device=device))
    finally:
        torch.use_deterministic_algorithms(False)
    grad = packed.edge.grad
    assert grad is not None and grad.shape[0] > packed.kept
    assert grad.isfinite().all()


def test_what_would_wait_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """The instrument of the first test."""
    x = torch.arange(4.0)
    calls: list[Callable[[], object]] = [
        lambda: x.sum().item(),
        lambda: bool((x > 0).any()),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.to("cpu"),
        lambda: torch.nonzero(x),
        lambda: x[x > 1],
        lambda: torch.where(x > 1, 0, x),
        lambda: x.index_put_((torch.arange(2),), torch.zeros(())),
        lambda: torch.tensor(3.0),
    ]
    for call in calls:
        with watch(monkeypatch) as waits:
            call()
        assert waits.found, call
    with watch(monkeypatch) as waits:
        (x * 2 + x.to(torch.float64)).masked_fill_(x > 1, 0).index_select(0, torch.arange(2))
    assert waits.found == []


def test_ahead_is_the_same(device: torch.device):
    """Results, gradients and running statistics, with norms, checkpointing, and room that is not taken up."""
    net = network(device)
    for part in (1, 2):
        net[part].forward = partial(checkpoint, net[part].forward, use_reentrant=False)
    step = make_step(net, *batch(device))
    step()
    initial = copy.deepcopy(net.state_dict())
    expected_loss, expected = step(), state(net)
    densities = [module.last_density for module in net[:5]]
    net.load_state_dict(initial)
    loss = ops.run_ahead(step, net)
    torch.testing.assert_close([loss, *state(net)], [expected_loss, *expected], rtol=1e-4, atol=1e-5)
    assert [module.last_density for module in net[:5]] == densities


def jump(device: torch.device) -> tuple[nn.Sequential, Callable[[float], Callable[[], Tensor]]]:
    """A network that keeps little of small images and all of large ones, and its step for images of a size."""
    torch.manual_seed(0)
    net = nn.Sequential(
        snn.ToSpectral(1.0, workspace=WORKSPACE),
        snn.SpecBlock(3, 4, 3, 0.5, activation="identity", workspace=WORKSPACE),
        snn.SpectralBatchNorm2d(4),
        snn.SpatialReLU(1e-3, workspace=WORKSPACE),
        snn.ToSpatial(),
        nn.Flatten(),
        nn.Linear(128, 5),
    ).to(device)

    def step_of(scale: float) -> Callable[[], Tensor]:
        return make_step(net, *batch(device, scale))

    for _ in range(2):
        step_of(0.1)()
    assert net[0].last_density < 0.15
    return net, step_of


@pytest.mark.parametrize("ahead", [False, True])
def test_nothing_is_lost_where_the_density_jumps(device: torch.device, monkeypatch: pytest.MonkeyPatch, ahead: bool):
    net, step_of = jump(device)
    initial = copy.deepcopy(net.state_dict())
    step = step_of(1e4)
    loss = ops.run_ahead(step, net) if ahead else step()
    found = [loss, *state(net)]
    assert net[0].last_density == net[1].last_density == 1.0
    assert net[2].num_batches_tracked == 3  # not once for each attempt

    net.load_state_dict(initial)
    monkeypatch.setenv("SPECTRITON_BACKEND", "reference")
    torch.testing.assert_close(found, [step(), *state(net)], rtol=1e-4, atol=1e-4)


def test_a_repeated_step_draws_the_same_numbers():
    """Dropout, say, does not depend on whether there was room."""
    drawn = []

    def step() -> None:
        drawn.append(torch.rand(3))
        if len(drawn) == 1:
            raise ops.PackingOverflow("as where something does not fit")

    ops.run_ahead(step, nn.Linear(1, 1))
    assert len(drawn) == 2 and torch.equal(*drawn)


def test_an_overflow_is_said_and_learnt_from(device: torch.device):
    _, step_of = jump(device)
    with pytest.raises(ops.PackingOverflow, match="room"), ops.deferred_packing():
        step_of(1e4)()
    with pytest.raises(ops.PackingOverflow) as raised, ops.deferred_packing():
        step_of(1e4)()  # the first layer has learnt; what came to the others was incomplete
        raise ArithmeticError("of what was incomplete")
    assert isinstance(raised.value.__context__, ArithmeticError)


def test_what_is_no_module_is_said():
    with pytest.raises(TypeError, match="run_ahead: modules got"):
        ops.run_ahead(lambda: None, [nn.Linear(1, 1)])  # type: ignore[arg-type]


def test_other_threads_check_for_themselves(device: torch.device):
    layer = snn.ToSpectral(0.5)
    x = torch.randn(2, 8, 4, 4, device=device)
    layer(x)
    found = []
    with ops.deferred_packing():
        thread = threading.Thread(target=lambda: found.append(layer(x)))
        thread.start()
        thread.join()
        here = layer(x)
    assert found[0].values.shape[0] == found[0].kept == here.kept < here.values.shape[0]


def test_compiled_networks_pack_to_measure(device: torch.device):
    net = nn.Sequential(snn.ToSpectral(0.5), snn.SpecBlock(2, 3, 3, 0.2), snn.ToSpatial()).to(device)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 2, 4, 4, device=device)
    expected, packed = net(x), net[1].last_packed
    with ops.deferred_packing():
        y = compiled(x)
    torch.testing.assert_close(y, expected)
    assert net[1].last_packed == packed


def test_room_that_is_not_taken_up(device: torch.device):
    layer = snn.ToSpectral(0.5)
    x = torch.randn(2, 64, 16, 16, device=device)
    exact = layer(x)
    assert exact.nbytes == exact.packed_size.nbytes
    with ops.deferred_packing():
        packed = layer(x)
    assert packed.kept == exact.kept < packed.values.shape[0] == packed.edge.shape[0]
    spare = packed.nbytes - packed.packed_size.nbytes
    assert 0 < spare <= (packed.kept / 16 + 256 + 1) * 8
    torch.testing.assert_close(packed.to_dense(), exact.to_dense(), rtol=0, atol=0)

    with io.BytesIO() as file:
        torch.save(packed, file)
        assert file.tell() < exact.nbytes + 4096
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
    assert loaded.kept == loaded.values.shape[0] == exact.kept
    moved = packed.to("meta" if device.type == "cpu" else "cpu")
    assert moved.values.shape == exact.values.shape
    copied = copy.deepcopy(layer)
    assert copied.last_density == layer.last_density == exact.density


def test_density_has_room_from_the_start(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """The rule says how much is kept at most: ops by themselves do not wait either, but for what is not a number."""
    x = torch.randn(2, 32, 8, 8, device=device)
    with ops.deferred_packing():
        packed = ops.to_spectral(x, density=0.25)
    assert 0 <= packed.values.shape[0] - packed.kept <= 0.01 * packed.kept
    x[0] = torch.nan
    with pytest.raises(ops.PackingOverflow), ops.deferred_packing():
        ops.to_spectral(x, density=0.25)
    assert ops.to_spectral(x, density=0.25).kept >= 32 * layout(x.shape).frequencies
