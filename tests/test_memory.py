"""Memory accounting against figures computed by hand, and against the profiler's own count of allocations."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from spectriton import memory
from spectriton._registry import op_bodies, register_body

FLOAT = 4
INT64 = 8


@pytest.fixture(autouse=True)
def nothing_left_in_force() -> Iterator[None]:
    yield
    assert not _get_current_dispatch_mode_stack()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def profiled_peak(step: Callable[[], object], before: int) -> int:
    """The most bytes allocated at one time according to the profiler; ``before``: what was allocated already."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    live = peak = before
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


# Saved bytes, by hand


def test_product_and_sum_by_hand():
    x, w = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    one, scalar = 12 * FLOAT, FLOAT
    with memory.track("cpu") as usage:
        y = (x * w).sum()
        assert usage.saved_bytes == one  # x, for the gradient of w
        # After the product: x, w, x * w; after the sum: its result, too.
        assert usage.peak_bytes == 3 * one + scalar
        assert usage.average_bytes == (3 * one + 3 * one + scalar) // 2
        y.backward()
    # Backward: ones for y (x * w is gone), then the gradient. Views (expand, detach) are no events.
    events = [3 * one, 3 * one + scalar, 2 * one + 2 * scalar, 3 * one + 2 * scalar]
    assert usage.saved_bytes == one
    assert usage.peak_bytes == max(events)
    assert usage.average_bytes == round(sum(events) / 4)
    # Nothing was named as state.
    assert usage.parameter_bytes == usage.state_bytes == 0
    assert usage.peak_beyond_state_bytes == usage.peak_bytes
    assert usage.average_beyond_state_bytes == usage.average_bytes


def test_linear_relu_linear():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(5, 4)
    with memory.track("cpu") as usage:
        model(x).sum().backward()
    # The first layer saves x; ReLU its result, which the second layer saves again. Weights do not count.
    assert usage.saved_bytes == 5 * 4 * FLOAT + 5 * 8 * FLOAT


def test_convolution_tanh():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh())
    x = torch.randn(2, 3, 8, 8)
    with memory.track() as usage:
        model(x).sum().backward()
    assert usage.saved_bytes == nbytes(x) + 2 * 4 * 8 * 8 * FLOAT


@pytest.mark.parametrize("inplace", [False, True])
def test_relu_in_place(inplace):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=inplace))
    x = torch.randn(2, 3, 8, 8)
    maps = 2 * 4 * 8 * 8 * FLOAT
    with memory.track(model=model) as usage:
        model(x)
    # Either way only the result is saved; in place it never has company.
    assert usage.saved_bytes == nbytes(x) + maps
    assert usage.peak_beyond_state_bytes == nbytes(x) + (1 if inplace else 2) * maps


def test_max_pool_saves_input_and_indices():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with memory.track() as usage:
        F.max_pool2d(x.tanh(), 2).sum().backward()
    # One storage for the result of tanh and the input of the pooling.
    assert usage.saved_bytes == 2 * 3 * 8 * 8 * FLOAT + 2 * 3 * 4 * 4 * INT64


def test_batch_norm_buffers_are_state():
    model = nn.Sequential(nn.BatchNorm2d(3))
    x = torch.randn(2, 3, 4, 4)
    with memory.track(model=model) as usage:
        model(x)
    # Input, and mean and deviation of the batch; weight and running statistics belong to the model.
    assert usage.saved_bytes == nbytes(x) + 2 * 3 * FLOAT
    assert usage.parameter_bytes == 2 * 3 * FLOAT
    assert usage.state_bytes == 4 * 3 * FLOAT + INT64


def test_each_storage_once():
    x = torch.randn(6)
    w = torch.randn(6, requires_grad=True)
    with memory.track() as usage:
        a = w * x[:]
        b = a * x.view(2, 3).reshape(-1)
        _ = b * x
    # Only x is needed for the gradients of w, a and b.
    assert usage.saved_bytes == 6 * FLOAT


def test_views_count_their_storage():
    row = torch.randn(4)
    w = torch.randn(100, 4, requires_grad=True)
    with memory.track() as usage:
        row.expand(100, 4) * w
    assert usage.saved_bytes == 4 * FLOAT
    whole = torch.randn(1000)
    with memory.track() as usage:
        whole[:4] * w
    assert usage.saved_bytes == 1000 * FLOAT


def test_parameters_do_not_count_in_any_guise():
    w = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(4, 4, requires_grad=True)
    with memory.track() as usage:
        (w.t() @ x)[0]
        w.detach() * x
        w.view(2, 8)[:1] * x.view(2, 8)[1:]
    assert usage.saved_bytes == 0


def test_saved_storage_drops_with_its_graph():
    w = torch.randn(10, requires_grad=True)
    one = 10 * FLOAT
    with memory.track() as usage:
        for _ in range(3):
            w.exp().sum().backward()
            assert usage.saved_bytes == one
        kept = w.exp()
        values = kept.detach()
        del kept
        # The storage is alive, but not held for backward.
        again = w.exp()
        assert usage.saved_bytes == one
        both = w.exp()
        assert usage.saved_bytes == 2 * one
    del again, both, values


def test_backward_frees_what_was_saved():
    w = torch.randn(10, requires_grad=True)
    with memory.track() as usage:
        y = w.exp()
        y.sum().backward()
        # y is alive and so is its node, but backward has freed what the node saved.
        z = w.exp()
        assert usage.saved_bytes == 10 * FLOAT
        y.sum()
    del y, z


def test_no_grad_saves_nothing():
    w = torch.randn(10, requires_grad=True)
    with memory.track() as usage, torch.no_grad():
        w.exp().sin()
    assert usage.saved_bytes == 0
    with torch.inference_mode(), memory.track() as usage:
        torch.ones(10).exp()
    assert usage.saved_bytes == 0
    assert usage.peak_bytes == 20 * FLOAT


# Peak and average


def test_resized_storage():
    with memory.track() as usage:
        x = torch.zeros(10)
        x.resize_(100)
        x.untyped_storage().resize_(5 * FLOAT)
        x.resize_(5)
    assert usage.peak_bytes == 100 * FLOAT
    assert usage.average_bytes == round((10 + 100 + 5) * FLOAT / 3)


def test_nothing_happens():
    model = nn.Linear(2, 3)
    with memory.track() as empty:
        pass
    assert set(empty.as_dict().values()) == {0}
    with memory.track(model=model) as usage:
        assert usage.peak_bytes == usage.average_bytes == 9 * FLOAT
    assert usage.peak_bytes == usage.average_bytes == usage.state_bytes == usage.parameter_bytes == 9 * FLOAT
    assert usage.peak_beyond_state_bytes == usage.average_beyond_state_bytes == 0


def test_state_of_a_step():
    model = nn.Linear(50, 20, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(2, 50)
    weight = 50 * 20 * FLOAT
    for _ in range(2):
        with memory.track(model=model, optimizer=optimizer) as usage:
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert usage.parameter_bytes == weight
        # Weight, gradient and momentum, although the gradient is gone at the end.
        assert usage.state_bytes == 3 * weight
        # The gradient counts as state from its first moment, not from that of the step.
        assert usage.peak_beyond_state_bytes < weight
        assert usage.saved_bytes == nbytes(x)
    with memory.track(optimizer=optimizer) as alone:
        pass
    assert alone.parameter_bytes == weight
    assert alone.state_bytes == 2 * weight


def test_gradients_before_the_block_are_state():
    model = nn.Linear(5, 5)
    model(torch.ones(1, 5)).sum().backward()
    with memory.track(model=model) as usage:
        model.zero_grad()
    assert usage.parameter_bytes == 30 * FLOAT
    assert usage.peak_bytes == usage.state_bytes == 60 * FLOAT


def chain_step(x: Tensor, weights: list[Tensor]) -> None:
    for weight in weights:
        x = torch.tanh(torch.mm(x, weight))
    x.sum().backward()


def test_peak_of_a_chain_is_that_of_the_profiler():
    def tensors() -> tuple[Tensor, list[Tensor]]:
        sizes = [32, 64, 16, 128]
        return torch.randn(8, 32), [torch.randn(i, o, requires_grad=True) for i, o in itertools.pairwise(sizes)]

    x, weights = tensors()
    before = nbytes(x, *weights)
    expected = profiled_peak(lambda: chain_step(x, weights), before)
    for weight in weights:
        weight.grad = None
    # Untouched inputs count from their first use; the first op of each sees them before the peak.
    with memory.track() as usage:
        chain_step(x, weights)
    assert usage.peak_bytes == expected
    # And the tracker allocates nothing itself.
    for weight in weights:
        weight.grad = None

    def tracked() -> None:
        with memory.track():
            chain_step(x, weights)

    assert profiled_peak(tracked, before) == expected


def test_peak_of_a_chain_by_hand():
    # Square weights and as many rows: every tensor has one size, but for the sum.
    one = 16 * 16 * FLOAT
    x = torch.randn(16, 16)
    weights = [torch.randn(16, 16, requires_grad=True) for _ in range(2)]
    with memory.track() as usage:
        chain_step(x, weights)
    # x, both weights; tanh results t1 (saved) and t2 (saved and the variable). At the tanh backward of layer 2: the
    # sum and its gradient, which is expanded and needs no storage, and the gradient before tanh; then both gradients
    # of the product; then that of the first activation leads on.
    forward = 3 * one + [one, 2 * one, 2 * one, 3 * one][-1] + FLOAT
    backward = 3 * one + 2 * one + 2 * FLOAT + 3 * one
    assert usage.peak_bytes == max(forward, backward)
    assert usage.saved_bytes == 3 * one  # x, t1, t2
    weights = [weight.detach().requires_grad_() for weight in weights]
    assert profiled_peak(lambda: chain_step(x, weights), 3 * one) == usage.peak_bytes


def test_accumulated_gradients_as_without_tracker():
    # Three users of one tensor: their gradients are summed, which PyTorch may do in place or not.
    w = torch.randn(1000, requires_grad=True)

    def step() -> None:
        a = w * w
        torch.stack([a.sin().sum(), a.cos().sum(), a.exp().sum()]).sum().backward()

    expected = profiled_peak(step, nbytes(w))
    w.grad = None
    with memory.track() as usage:
        step()
    # Within the few scalars that PyTorch makes where a mode cannot see them.
    assert abs(usage.peak_bytes - expected) <= 64


def test_training_step_against_the_profiler():
    torch.manual_seed(0)
    # No convolution or batch norm, whose scratch memory only the profiler sees.
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(inplace=True), nn.Linear(32, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, labels = torch.randn(16, 12), torch.randint(0, 5, (16,))

    def step() -> None:
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    step()
    # Gradients go before: the profiler does not see that what it has not seen allocated is freed.
    optimizer.zero_grad()
    state = list(model.parameters())
    state += [entry["momentum_buffer"] for entry in optimizer.state.values()]
    expected = profiled_peak(step, nbytes(x, labels, *state))
    optimizer.zero_grad()
    with memory.track(model=model, optimizer=optimizer) as usage:
        step()
    # Within the few scalars that PyTorch makes where a mode cannot see them.
    assert abs(usage.peak_bytes - expected) <= 64
    assert usage.state_bytes == nbytes(*state) + nbytes(*model.parameters())
    assert usage.parameter_bytes == nbytes(*model.parameters())
    assert usage.saved_bytes < usage.peak_beyond_state_bytes < usage.peak_bytes
    assert usage.average_beyond_state_bytes < usage.average_bytes < usage.peak_bytes


def test_convolutions_against_the_profiler():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 5))
    x = torch.randn(16, 1, 8, 8)

    def step() -> None:
        model(x).sum().backward()

    step()
    model.zero_grad()
    expected = profiled_peak(step, nbytes(x, *model.parameters()))
    model.zero_grad()
    with memory.track(model=model) as usage:
        step()
    assert usage.saved_bytes < usage.peak_bytes <= expected + 64


# The ops of the project


@pytest.fixture(params=["registered", "hidden"])
def toy_op(request: pytest.FixtureRequest) -> Iterator[tuple[Callable[..., Tensor], bool]]:
    """A custom op that needs ten times its input while it runs."""

    def body(x: Tensor) -> Tensor:
        wide = x.repeat(10)
        assert not wide.requires_grad, "the body runs below autograd"
        return wide.view(10, -1).sum(0)

    with torch.library._scoped_library("spectriton_test_memory", "FRAGMENT"):
        op = torch.library.custom_op(
            "spectriton_test_memory::widen", body, mutates_args=(), schema="(Tensor x) -> Tensor"
        )
        op.register_fake(torch.empty_like)
        op.register_autograd(lambda ctx, grad: grad * 10)
        registered = request.param == "registered"
        if registered:
            register_body(op, body)
        try:
            yield op, registered
        finally:
            op_bodies.pop(op._opoverload, None)


def test_temporaries_inside_an_op(toy_op):
    op, registered = toy_op
    x = torch.ones(5, requires_grad=True)
    one = 5 * FLOAT
    with memory.track() as usage:
        y = op(x)
        # While it runs: x, the wide tensor, the result.
        assert usage.peak_bytes == (12 if registered else 2) * one
        if registered:
            # One event: the mean of repeat and sum.
            assert usage.average_bytes == (11 + 12) * one // 2
        else:
            assert usage.average_bytes == 2 * one
        y.sum().backward()
    assert torch.equal(y, torch.full((5,), 10.0))
    assert torch.equal(x.grad, torch.full((5,), 10.0))


def test_error_inside_an_op():
    def body(x: Tensor) -> Tensor:
        x.exp()
        raise ArithmeticError("no")

    with torch.library._scoped_library("spectriton_test_memory", "FRAGMENT"):
        op = torch.library.custom_op(
            "spectriton_test_memory::raises", body, mutates_args=(), schema="(Tensor x) -> Tensor"
        )
        register_body(op, body)
        try:
            with memory.track() as usage:
                with pytest.raises(ArithmeticError):
                    op(torch.ones(3))
                torch.ones(1)
            assert usage.peak_bytes == 6 * FLOAT
        finally:
            op_bodies.pop(op._opoverload, None)


# Tracking changes nothing


def test_gradients_are_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    twin = copy.deepcopy(model)
    x = torch.randn(2, 1, 8, 8)
    model(x).square().sum().backward()
    with memory.track(model=twin):
        twin(x).square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_double_backward():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    with memory.track():
        assert torch.autograd.gradgradcheck(lambda t: t.exp().tanh() * t, (x,))


def test_graph_outlives_the_block():
    w = torch.randn(3, requires_grad=True)
    with memory.track() as usage:
        y = w.exp().sum()
    y.backward()
    assert torch.equal(w.grad, w.exp())
    assert usage.saved_bytes == 3 * FLOAT


def test_in_place_changes_are_still_found():
    w = torch.randn(3, requires_grad=True)
    with memory.track():
        y = w.exp()
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation.*is at version 1; expected version 0"):
            y.sum().backward()
        y = w.clone().relu_()
        y.sum().backward()


def test_the_model_is_left_as_it_was():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with memory.track(model=model, optimizer=optimizer):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert all(not parameter._backward_hooks for parameter in model.parameters())
    pickle.loads(pickle.dumps(model))


# Other hooks and modes


def test_checkpoint():
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))
    x = torch.randn(2, 8)
    one = 2 * 8 * FLOAT
    with memory.track(model=layers) as plain:
        layers(x).sum().backward()
    layers.zero_grad()
    with memory.track(model=layers) as usage:
        y = checkpoint(layers, x, use_reentrant=False)
        y.sum().backward()
    assert plain.saved_bytes == 5 * one
    assert usage.saved_bytes == one  # the input of the segment
    assert all(parameter.grad is not None for parameter in layers.parameters())


@pytest.mark.parametrize("inside", [True, False])
def test_save_on_cpu(inside):
    w = torch.randn(3, requires_grad=True)
    if inside:
        with memory.track(), save_on_cpu():
            w.exp().sum().backward()
    else:
        with save_on_cpu(), memory.track() as usage:
            w.exp().sum().backward()
        assert usage.saved_bytes == 3 * FLOAT
    assert torch.equal(w.grad, w.exp())


def test_outer_hooks_stay_in_force():
    w = torch.randn(4, 4, requires_grad=True)
    packed, unpacked = [], []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor.detach().to(torch.float16)

    def unpack(tensor: Tensor) -> Tensor:
        unpacked.append(tensor.shape)
        return tensor.float()

    with saved_tensors_hooks(pack, unpack), memory.track() as usage:
        w.exp().sum().backward()
    assert len(packed) == len(unpacked) == 1
    assert usage.saved_bytes == 16 * 2  # what they keep: half precision


def test_nested_blocks():
    w = torch.randn(3, requires_grad=True)
    with memory.track() as outer:
        a = w.exp()
        with memory.track() as inner:
            b = a.exp()
            b.sum().backward()
    assert inner.saved_bytes == 3 * FLOAT
    assert outer.saved_bytes == 6 * FLOAT
    assert outer.peak_bytes >= inner.peak_bytes
    assert torch.allclose(w.grad, (w.exp().exp() * w.exp()).detach())


def test_a_block_is_for_once():
    block = memory.track()
    with block:
        with pytest.raises(RuntimeError, match="already entered"):
            block.__enter__()
    with block as usage:
        torch.ones(1)
    assert usage.peak_bytes == FLOAT


@pytest.mark.parametrize("where", ["forward", "backward", "in a hook"])
def test_exceptions_leave_nothing_behind(where):
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            if where == "forward":
                raise KeyError(where)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise KeyError(where)

    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises((KeyError, RuntimeError)):
        with memory.track(model=model, optimizer=optimizer) as usage:
            y = Refuses.apply(model(torch.ones(2, 3)))
            if where == "in a hook":
                optimizer.register_step_pre_hook(lambda *_: 1 // 0)
                try:
                    optimizer.step()
                except ZeroDivisionError as error:
                    raise KeyError(where) from error
            y.sum().backward()
    assert usage.peak_bytes > usage.parameter_bytes == 12 * FLOAT
    assert not optimizer._optimizer_step_post_hooks


# Unusual tensors


class Pair(Tensor):
    """A wrapper subclass with two storages."""

    a: Tensor
    b: Tensor

    @staticmethod
    def __new__(cls, a: Tensor, b: Tensor):
        return Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype, requires_grad=a.requires_grad)

    def __init__(self, a: Tensor, b: Tensor):
        self.a, self.b = a, b

    def __tensor_flatten__(self):
        return ["a", "b"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, outer_size, outer_stride):
        return Pair(inner["a"], inner["b"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def part(name):
            return func(*(getattr(x, name) if isinstance(x, Pair) else x for x in args), **(kwargs or {}))

        return cls(part("a"), part("b"))


def test_wrapper_subclass():
    pair = Pair(torch.ones(3), torch.ones(3))
    w = torch.ones(3, requires_grad=True)
    with memory.track() as usage:
        y = pair * pair
        assert usage.peak_bytes == 12 * FLOAT
        y = pair * w
    # The product saves pair, once per storage inside.
    assert usage.saved_bytes == 6 * FLOAT
    assert isinstance(y, Pair)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_sparse():
    w = torch.randn(4, 2, requires_grad=True)
    coo = torch.sparse_coo_tensor(torch.arange(4).repeat(2, 1), torch.ones(4), (4, 4), check_invariants=True)
    csr = torch.sparse_csr_tensor(torch.arange(5), torch.arange(4), torch.ones(4), (4, 4), check_invariants=True)
    with memory.track() as usage:
        torch.sparse.mm(coo, w).sum().backward()
    assert usage.saved_bytes == 4 * FLOAT + 2 * 4 * INT64
    with memory.track() as usage:
        torch.mm(csr, w).sum().backward()
    assert usage.saved_bytes == 4 * FLOAT + 4 * INT64 + 5 * INT64


def test_complex_views_and_dtypes():
    x = torch.randn(4, dtype=torch.complex64)
    w = torch.randn(4, dtype=torch.complex64, requires_grad=True)
    with memory.track() as usage:
        (torch.view_as_real(x * w) * torch.view_as_real(x)).sum().backward()
    assert usage.saved_bytes == 4 * 8


def test_other_devices_do_not_count():
    with memory.track() as usage:
        torch.empty(1000, device="meta").exp()
    assert usage.peak_bytes == 0


def test_compiled_step():
    w = torch.randn(3, requires_grad=True)
    step = torch.compile(lambda t: t.exp().sum(), backend="eager")
    with memory.track():
        step(w).backward()
    assert torch.equal(w.grad, w.exp())


# Leaks


def test_nothing_stays_alive_through_the_tracker():
    gc.collect()
    gc.disable()
    try:
        model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4))
        optimizer = torch.optim.Adam(model.parameters())
        x = torch.randn(2, 4)
        with memory.track(model=model, optimizer=optimizer) as usage:
            y = model(x).exp()
            y.sum().backward()
            optimizer.step()
            hidden = model[1](model[0](x))
        watched = [x, y, hidden, *model.parameters()]
        refs = [weakref.ref(tensor) for tensor in watched]
        refs += [weakref.ref(tensor.untyped_storage()) for tensor in watched]
        del watched, x, y, hidden, model, optimizer
        # Modules and optimisers have cycles of their own; tensors of the step must be gone without the collector.
        alive = [ref() is not None for ref in refs[:3]]
        assert alive == [False] * 3
        # Only this test can collect what PyTorch's objects tie together.
        gc.collect()
        assert not [ref for ref in refs if ref() is not None]
        assert usage.peak_bytes > 0
    finally:
        gc.enable()


def test_saved_outputs_form_no_cycle():
    w = torch.randn(5, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        with memory.track() as usage:
            y = w.exp()  # saves its own result
            ref, storage = weakref.ref(y), weakref.ref(y.untyped_storage())
            del y
            assert ref() is None
            assert storage() is None
            assert usage.peak_bytes == 10 * FLOAT
            ledger = weakref.ref(usage._ledger)
        assert ledger() is None
    finally:
        gc.enable()


# Interface


def test_repr():
    with memory.track() as usage:
        torch.zeros(2**18)
        assert "(so far)" in repr(usage)
    text = repr(usage)
    assert text.splitlines()[0] == "memory on cpu"
    assert "  peak                         1.000 MiB" in text.splitlines()
    assert len(text.splitlines()) == 1 + len(usage.as_dict())


def test_bad_arguments():
    with pytest.raises(ValueError, match="device got 'tpu', expected a device; pass 'cpu' or 'cuda'"):
        memory.track("tpu")
    with pytest.raises(ValueError, match="device got 'meta'"):
        memory.track("meta")
    with pytest.raises(TypeError, match="model got"):
        memory.track(model=[])
    with pytest.raises(TypeError, match="optimizer got"):
        memory.track(optimizer=nn.Linear(1, 1))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no CUDA"):
            memory.track("cuda")


def test_allocator_figures_by_hand():
    # What a CUDA block logs, without a device: the ledger knows the state, the allocator everything.
    ledger = memory._Ledger(torch.device("cuda", 0))
    weight, gradient = 0, 1
    ledger.state |= {weight, gradient}
    ledger.log(memory._PEAK, 100)
    ledger.log(weight, 100)
    ledger.log(memory._PEAK, 700)  # workspace of the first op
    ledger.log(memory._SAMPLE, 400)
    ledger.log(gradient, 100)
    ledger.log(memory._PEAK, 750)
    ledger.log(memory._SAMPLE, 500)
    ledger.log(gradient, -100)
    ledger.log(memory._SAMPLE, 300)
    figures = ledger.figures()
    assert figures.peak == 750
    assert figures.average == 400
    assert figures.state == 200
    assert figures.peak_beyond_state == 600
    assert figures.average_beyond_state == round((300 + 300 + 200) / 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_follows_the_allocator():
    device = torch.device("cuda", torch.cuda.current_device())
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Tanh()).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(512, 256, device=device)

    def step() -> None:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    step()
    start = torch.cuda.memory_allocated(device)
    with memory.track(device, model=model, optimizer=optimizer) as usage:
        step()
    assert usage.peak_bytes == torch.cuda.max_memory_allocated(device)
    assert start <= usage.average_bytes <= usage.peak_bytes
    assert usage.saved_bytes == 2 * 512 * 256 * FLOAT  # x and the result of tanh
    weight = 256 * 256 * FLOAT
    assert usage.parameter_bytes == weight
    assert usage.state_bytes == 3 * weight
    assert 2 * 512 * 256 * FLOAT <= usage.peak_beyond_state_bytes <= usage.peak_bytes - 2 * weight
