"""A GPU that is not there: tensors that say they are on ``cuda:0`` and stand in the memory of the host.

What the host does for a GPU is run on it as it is: the branches that ask for the device, the launches of the kernels
(in Triton's interpreter), and every mistake that a CPU forgives. As on a GPU, an operator refuses tensors of two
devices, and numpy does not see its memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from spectriton._registry import op_bodies
from spectriton_kernels import _launch

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)

# Operators that take tensors of several devices: copies between them, and indices from the host.
_ACROSS = {aten.copy_, aten._to_copy, aten.index, aten.index_put_, aten._index_put_impl_, aten._assert_tensor_metadata}


class OnGpu(Tensor):
    """A tensor of the GPU; ``inner`` holds its values."""

    inner: Tensor
    __slots__ = ("inner",)

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=inner.device,  # autograd asks the runtime of the device
        )
        made.inner = inner
        return made

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def cpu(self) -> Tensor:
        return _ToHost.apply(self)

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        other = next((a for a in (*args, kwargs.pop("other", None)) if isinstance(a, Tensor)), None)
        if other is not None:
            return self.to(other.device, other.dtype)
        copy = kwargs.pop("copy", False)
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        here = self if device is None or device.type == "cuda" else self.cpu()
        memory_format = memory_format or torch.preserve_format
        return Tensor.to(here, dtype or self.dtype, copy=copy, memory_format=memory_format)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _Gpu().run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: None = None) -> str:
        return f"OnGpu({self.inner!r})"


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: OnGpu) -> Tensor:
        return x.inner.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return OnGpu(grad)


class _Gpu(TorchDispatchMode):
    """Runs operators of the GPU on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        body = op_bodies.get(func)
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": None}
        leaves = tree_flatten((args, kwargs))[0]
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        here = [t for t in tensors if isinstance(t, OnGpu)]
        to_gpu = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not here and not to_gpu:
            if body is None:
                return func(*args, **kwargs)
            with self:
                return body(*args, **kwargs)
        strangers = [t for t in tensors if not isinstance(t, OnGpu) and t.dim()]
        if here and strangers and func.overloadpacket not in _ACROSS:
            raise RuntimeError(f"{func}: tensors of two devices, {[tuple(t.shape) for t in strangers]} on the CPU")
        if body is not None:
            with self:
                return body(*args, **kwargs)
        inner = tree_map_only(OnGpu, lambda t: t.inner, (args, kwargs))
        inner_args, inner_kwargs = tree_map_only(torch.device, lambda device: torch.device("cpu"), inner)
        out = func(*inner_args, **inner_kwargs)
        if func.overloadpacket is aten.copy_ and not isinstance(args[0], OnGpu):
            return args[0]
        # An operator in place gives back the tensor it was given.
        given = {id(t.inner): t for t in here}
        return tree_map_only(
            Tensor, lambda t: given[id(t)] if id(t) in given else OnGpu(t.resolve_conj().resolve_neg()), out
        )


def _run(launch: _launch.Launch) -> None:
    if 0 in launch.grid:
        return
    tensors = [arg for arg in launch.args if isinstance(arg, Tensor)]
    strangers = [tuple(t.shape) for t in tensors if not isinstance(t, OnGpu)]
    if 0 < len(strangers) < len(tensors):
        raise RuntimeError(f"{launch.kernel}: tensors of two devices, {strangers} on the CPU")
    args = [arg.inner if isinstance(arg, OnGpu) else arg for arg in launch.args]
    with torch.utils._python_dispatch._disable_current_modes():
        launch.kernel[launch.grid](*args, **launch.meta)


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def query(self) -> bool:
        return True


class _Properties:
    name = "no GPU"
    major, minor = 9, 0
    multi_processor_count = 132
    L2_cache_size = 50 << 20
    total_memory = 80 << 30


@contextlib.contextmanager
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Within it there is a GPU."""
    with monkeypatch.context() as patch, torch.autograd.set_multithreading_enabled(False), _Gpu():
        cuda = torch.cuda
        patch.setattr(cuda, "_lazy_init", lambda: None)
        patch.setattr(cuda, "is_available", lambda: True)
        patch.setattr(cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(cuda, "current_device", lambda: 0)
        patch.setattr(cuda, "device_count", lambda: 1)
        patch.setattr(cuda, "synchronize", lambda *args: None)
        patch.setattr(cuda, "get_device_properties", lambda *args: _Properties())
        patch.setattr(cuda, "get_device_name", lambda *args: _Properties.name)
        patch.setattr(cuda, "get_device_capability", lambda *args: (9, 0))
        patch.setattr(cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(cuda, "Event", _Event)
        patch.setattr(cuda, "get_rng_state", lambda device=None: torch.get_rng_state())
        patch.setattr(cuda, "set_rng_state", lambda state, device=None: None)
        patch.setattr(cuda, "current_stream", lambda *args: None)
        patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        patch.setattr(_launch.Launch, "run", _run)
        torch._C._set_only_lift_cpu_tensors(True)  # as fake tensors have it: made on the host, and then moved
        try:
            yield DEVICE
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
