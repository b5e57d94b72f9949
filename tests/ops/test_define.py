"""Calls of ops that run the body at once, and those that are left to PyTorch's dispatcher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import spectriton
from spectriton import models
from spectriton.ops._define import Op, define_op


class _Calls:
    """What the body of the op below was given, and how often the dispatcher was asked."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []
        self.dispatched = 0


_calls = _Calls()


@define_op("(Tensor[] xs, Tensor? y, float factor, SymInt[] sizes) -> (Tensor, Tensor)")
def _example_of_a_definition(
    xs: list[Tensor], y: Tensor | None, factor: float, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    _calls.given.append((xs, y, factor, sizes))
    total = torch.stack([x * x for x in xs]).sum(0) * factor
    return (total if y is None else total * y), total.new_zeros(sizes)


@_example_of_a_definition.register_fake
def _(xs: list[Tensor], y: Tensor | None, factor: float, sizes: list[int]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(xs[0]), xs[0].new_empty(sizes)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    xs, y, ctx.factor, _ = inputs
    ctx.count = len(xs)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*xs, y)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    *xs, y = ctx.saved_tensors
    need_xs, need_y, *_ = ctx.needs_input_grad
    grads = [2 * x * grad * ctx.factor * (1 if y is None else y) if need else None
             for x, need in zip(xs, need_xs, strict=True)]  # fmt: skip
    grad_y = sum(x * x for x in xs) * grad * ctx.factor if need_y else None
    return grads, grad_y, None, None


op: Op = _example_of_a_definition
op.register_autograd(_backward, setup_context=_setup)


@define_op("(Tensor x) -> Tensor")
def _example_without_a_rule(x: Tensor) -> Tensor:
    return x + 1


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> _Calls:
    _calls.given.clear()
    _calls.dispatched = 0
    for each in (op, _example_without_a_rule):
        overload = each._overload

        def dispatch(*args: Any, overload: Any = overload) -> Any:
            _calls.dispatched += 1
            return overload(*args)

        monkeypatch.setattr(each, "_overload", dispatch)
    return _calls


def leaves(*needs: bool) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, dtype=torch.float64, requires_grad=need) for need in needs]


class Nothing(TorchDispatchMode):
    """A mode that changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class NothingEither(TorchFunctionMode):
    """Nor does this one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_y", [True, False])
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (False, False, True)])
def test_results_and_gradients_are_those_of_the_dispatcher(needs: tuple[bool, ...], with_y: bool) -> None:
    found = []
    for overload in (False, True):
        first, second, y = leaves(*needs)
        arguments = ([first, second], y if with_y else None, 0.5, [2])
        out, rest = torch.ops.spectriton.example_of_a_definition(*arguments) if overload else op(*arguments)
        assert not rest.requires_grad
        if out.requires_grad:
            out.sum().backward(retain_graph=True)
            out.sum().backward()  # again: nothing was used up
        found.append([out, rest, first.grad, second.grad, y.grad])
    assert _calls.dispatched == 0
    for direct, dispatched in zip(*found, strict=True):
        assert (direct is None) == (dispatched is None)
        assert direct is None or torch.equal(direct, dispatched)


def test_arguments_are_converted_as_the_dispatcher_does() -> None:
    x = torch.ones(2)
    op((x, x), None, 2, torch.Size([3, 1]))
    (xs, _, factor, sizes) = _calls.given[0]
    assert type(xs) is list and type(sizes) is list and sizes == [3, 1]
    assert type(factor) is float
    assert _calls.dispatched == 0


def test_parameters_inference_and_checkpoints_need_no_dispatcher() -> None:
    weight = nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        assert op([weight], None, 1.0, [1])[0].is_inference()
    with torch._C._AutoDispatchBelowAutograd():
        assert not op([weight], None, 1.0, [1])[0].requires_grad
    out = checkpoint(lambda w: op([w], None, 1.0, [1])[0].sin(), weight, use_reentrant=False)
    out.sum().backward()
    torch.testing.assert_close(weight.grad, 2 * torch.ones(3).cos())
    assert _calls.dispatched == 0
    assert len(_calls.given) == 4


def within_dispatch_mode(x: Tensor) -> Tensor:
    with Nothing():
        return op([x], None, 1.0, [1])[0]


def within_function_mode(x: Tensor) -> Tensor:
    with NothingEither():
        return op([x], None, 1.0, [1])[0]


def profiled(x: Tensor) -> Tensor:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = op([x], None, 1.0, [1])[0]
    assert any(event.key == "spectriton::example_of_a_definition" for event in profile.key_averages())
    return out


def conjugated(x: Tensor) -> Tensor:
    out: Tensor = op([torch.view_as_complex(torch.stack([x, x - x], -1)).conj()], None, 1.0, [1])[0].real
    assert not _calls.given[-1][0][0].is_conj()
    return out


def negated(x: Tensor) -> Tensor:
    lazy = torch.view_as_complex(torch.stack([x - x, -x], -1)).conj().imag
    assert lazy.is_neg()
    out: Tensor = op([lazy], None, 1.0, [1])[0]
    assert not _calls.given[-1][0][0].is_neg()
    return out


def transformed(x: Tensor) -> Tensor:
    def squares(x: Tensor) -> Tensor:
        out: Tensor = op([x], None, 1.0, [1])[0]
        return out

    return torch.func.functionalize(squares)(x)


@pytest.mark.parametrize(
    "call", [within_dispatch_mode, within_function_mode, profiled, conjugated, negated, transformed]
)
def test_what_else_is_at_work_goes_to_the_dispatcher(call: Callable[[Tensor], Tensor]) -> None:
    (x,) = leaves(True)
    torch.testing.assert_close(call(x), (x * x).detach(), check_dtype=False)
    assert _calls.dispatched == 1


def test_tensors_without_data_go_to_the_dispatcher() -> None:
    assert op([torch.empty(3, device="meta")], None, 1.0, [1])[0].is_meta
    with torch._subclasses.FakeTensorMode():
        assert op([torch.empty(3)], None, 1.0, [1])[0].shape == (3,)
    assert _calls.dispatched == 2 and not _calls.given


def test_subclasses_go_to_the_dispatcher() -> None:
    class Tagged(Tensor):
        pass

    x = torch.ones(3).as_subclass(Tagged)
    assert type(op([x], None, 1.0, [1])[0]) is Tagged
    assert _calls.dispatched == 1


def test_an_op_without_a_rule_says_so_in_backward() -> None:
    (x,) = leaves(True)
    out = _example_without_a_rule(x)
    with pytest.raises(RuntimeError, match="no autograd formula|not implemented|autograd"):
        out.sum().backward()
    assert _calls.dispatched == 1
    _example_without_a_rule(x.detach())
    assert _calls.dispatched == 1


@pytest.mark.parametrize("variant", ["spatial", "spectral"])
def test_a_network_is_trained_alike(variant: str) -> None:
    torch.manual_seed(0)
    net = models.build("lenet", variant=variant, num_classes=10, in_channels=1, image_size=16)
    if variant == "spatial":
        spectriton.compress(net, density=0.5)
    other = copy.deepcopy(net)
    x, target = torch.randn(4, 1, 16, 16), torch.arange(4)
    nn.functional.cross_entropy(net(x), target).backward()
    with NothingEither():
        nn.functional.cross_entropy(other(x), target).backward()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert a.grad is not None and torch.equal(a.grad, b.grad)
