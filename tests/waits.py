"""Which calls would make the host wait for a GPU, found without one: for tests with the kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from spectriton._counts import Counts
from spectriton._registry import op_bodies
from spectriton_kernels import _launch

aten = torch.ops.aten

# Ops that bring a number to the host: a result, or the size of one.
OPS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}

# Methods and functions that a tensor on the host passes without an op: they copy, and wait for the copy. (numpy() is
# none of them: tensors of a GPU do not have it.)
CALLS = {
    Tensor.cpu,
    Tensor.tolist,
    Tensor.item,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    torch.tensor,
    torch.as_tensor,
}


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


class Waits:
    """What was found, in order; ``paused`` within kernels, which the interpreter runs on arrays of the host."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.paused = False

    def add(self, what: str) -> None:
        if not self.paused:
            self.found.append(what)


class _Calls(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moves = func is Tensor.to and any(isinstance(a, (str, torch.device)) for a in (*args, kwargs.get("device")))
        if func in CALLS or (moves and not kwargs.get("non_blocking")):
            self.waits.add(_name(func))
        return func(*args, **kwargs)


class _Ops(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in OPS or self._by_arguments(packet, args, kwargs):
            self.waits.add(str(packet))
        body = op_bodies.get(func)
        if body is None:
            return func(*args, **kwargs)
        with self, _Calls(self.waits):
            return body(*args, **kwargs)

    @staticmethod
    def _by_arguments(packet: Any, args: Any, kwargs: Any) -> bool:
        if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            # A mask is searched first, and a number moved to the GPU.
            masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            return masks or (packet is not aten.index and args[2].dim() == 0)
        if packet is aten.where:  # a number is moved to the GPU
            return any(not isinstance(t, Tensor) or t.dim() == 0 for t in args[1:])
        if packet is aten.repeat_interleave:
            return kwargs.get("output_size") is None
        return False


@contextmanager
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Records what would wait for a GPU: ops, calls, and counts that are asked for (``"counts"``)."""
    waits = Waits()

    def pausing(function: Callable[..., Any], what: str | None = None) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if what is not None:
                waits.add(what)
            before, waits.paused = waits.paused, True
            try:
                return function(*args)
            finally:
                waits.paused = before

        return run

    with monkeypatch.context() as patch:
        patch.setattr(_launch.Launch, "run", pausing(_launch.Launch.run))
        patch.setattr(Counts, "_receive", pausing(Counts._receive, "counts"))
        with _Calls(waits), _Ops(waits):
            yield waits
