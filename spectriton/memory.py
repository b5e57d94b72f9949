"""How much memory a step takes: saved, peak and average bytes.

.. code-block:: python

    from spectriton import memory

    with memory.track("cuda", model=model, optimizer=optimizer) as usage:
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
    print(usage)
    usage.saved_bytes, usage.peak_bytes, usage.average_bytes

What the figures mean:

*saved*
    storage held for the backward pass, each storage once, at the moment when it is largest (the end of the
    forward pass). A storage counts from the first time a tensor on it is saved until the graph that saved it is gone,
    whether or not something else keeps it alive too. Parameters, and other leaves that require a gradient, do not
    count; neither do the buffers of ``model``: they are there anyway.
*peak* and *average*
    everything alive: parameters, gradients, optimiser state, feature maps, temporaries. The average is over the
    operations that PyTorch dispatches, each with what is alive once it has run; operations that only make a view are
    no events. A custom op of this project counts as one event with the mean of what was alive inside it.
*beyond state*
    the same without the state: parameters, buffers, gradients and optimiser state. It needs ``model`` and
    ``optimizer`` to know what those are.

On a CUDA device, peak and average come from the statistics of the caching allocator, and so hold workspaces of cuDNN,
cuBLAS and cuFFT as far as these allocate through it. On the CPU, which has no such statistics, a dispatch mode sees
the inputs and outputs of every operation and counts live storages; scratch memory inside an operator of PyTorch is not
seen, temporaries inside the ops of this project are (:mod:`spectriton._registry`).

Limits. Storages that existed before the block and belong to neither ``model`` nor ``optimizer`` count from the first
operation that touches them. Saved-tensor hooks that are entered inside the block (checkpointing, offloading) take over
what is saved under them, and what they keep is not counted as saved (of a checkpointed segment, the tensors that it is
given are); where hooks were entered before the block, what they keep is counted. The transforms of ``torch.func``
refuse to run under saved-tensor hooks, hence inside the block.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from spectriton import _check
from spectriton._registry import op_bodies

__all__ = ["Usage", "track"]

# The log holds pairs (what, value): a storage's token with the change of its size, or one of these.
_SAMPLE = -1  # an operation has run; value: bytes allocated (CUDA only)
_PEAK = -2  # the allocator's peak has risen to value (CUDA only)
_OPEN = -3  # the operations of an op's body begin
_CLOSE = -4  # and end: together they are one event

_COMPRESSED_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_COMPRESSED_COLUMNS = (torch.sparse_csc, torch.sparse_bsc)


class _Figures(NamedTuple):
    """What a log amounts to; all in bytes."""

    peak: int
    average: int
    peak_beyond_state: int
    average_beyond_state: int
    state: int


class _StorageRef(weakref.ref):
    """A weak reference to a storage, with what is known of it."""

    __slots__ = ("exempt", "key", "nbytes", "token")

    key: int
    token: int
    nbytes: int
    exempt: bool


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in the arguments or results of an op: tensors, and (nested) sequences and mappings of them."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages that hold a tensor's data: several for sparse tensors and wrapper subclasses."""
    if type(tensor) is not Tensor and hasattr(tensor, "__tensor_flatten__"):
        # The storage of a wrapper itself claims a size and has no data.
        for name in tensor.__tensor_flatten__()[0]:
            inner = getattr(tensor, name)
            if isinstance(inner, Tensor):
                yield from _storages(inner)
        return
    layout = tensor.layout
    if layout is torch.strided or layout is torch.jagged:
        # Opaque tensors (functional or functorch wrappers) have none that can be asked for.
        with contextlib.suppress(NotImplementedError, RuntimeError):
            yield tensor.untyped_storage()
        return
    parts: tuple[Tensor, ...] = ()
    if layout is torch.sparse_coo:
        # Not indices() and values(): those refuse tensors that are not coalesced.
        parts = (tensor._indices(), tensor._values())
    elif layout in _COMPRESSED_ROWS:
        parts = (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif layout in _COMPRESSED_COLUMNS:
        parts = (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    for part in parts:
        yield from _storages(part)


def _is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a leaf that requires a gradient, or a view of one (``weight.t()``)."""
    base = tensor._base if tensor._is_view() else tensor
    return base is not None and base.is_leaf and base.requires_grad


class _Ledger:
    """Storages of one device: which are alive, of which size, and a log of every change.

    Holds weak references only, and none once closed. Safe to call from the threads of the autograd engine and from
    the garbage collector, which may interrupt a call in the same thread: hence a re-entrant lock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.RLock()
        self.what = array("q")
        self.value = array("q")
        self.state: set[int] = set()
        self.saved_bytes = 0
        self.most_saved_bytes = 0
        self._refs: dict[int, _StorageRef] = {}
        self._saved: dict[int, list[int]] = {}  # token -> [holders, bytes]
        self._next_token = 0
        # The callback reaches the ledger weakly: a reference cycle would keep it until the garbage collector runs.
        ledger = weakref.ref(self)

        def forget(ref: _StorageRef) -> None:
            owner = ledger()
            if owner is not None:
                owner._forget(ref)

        self._on_death = forget

    def log(self, what: int, value: int = 0) -> None:
        with self.lock:
            self.what.append(what)
            self.value.append(value)

    def _on_device(self, storage: torch.UntypedStorage) -> bool:
        device = storage.device
        return device.type == self.device.type and (self.device.index is None or device.index == self.device.index)

    def _see_storage(self, storage: torch.UntypedStorage) -> tuple[_StorageRef, bool]:
        """Register a storage or note its new size; the flag says that it was not known."""
        # PyTorch keeps the Python object of a storage for as long as the storage lives, however many tensors and
        # views come and go: its identity is the storage's, and it dies when the memory is freed.
        key = id(storage)
        nbytes = storage.nbytes()
        ref = self._refs.get(key)
        if ref is not None:
            if ref() is storage:
                if ref.nbytes != nbytes:
                    self.log(ref.token, nbytes - ref.nbytes)
                    ref.nbytes = nbytes
                return ref, False
            self._forget(ref)
        ref = _StorageRef(storage, self._on_death)
        ref.key, ref.token, ref.nbytes, ref.exempt = key, self._next_token, nbytes, False
        self._next_token += 1
        self._refs[key] = ref
        self.log(ref.token, nbytes)
        return ref, True

    def _forget(self, ref: _StorageRef) -> None:
        with self.lock:
            if self._refs.get(ref.key) is ref:
                del self._refs[ref.key]
                self.log(ref.token, -ref.nbytes)

    def see(self, tensor: Tensor) -> None:
        """Register the storages of a tensor."""
        for storage in _storages(tensor):
            if not self._on_device(storage):
                continue
            with self.lock:
                ref, new = self._see_storage(storage)
                if new and tensor.requires_grad and tensor.is_leaf:
                    ref.exempt = True

    def see_state(self, tensor: Tensor) -> int:
        """Register the storages of a tensor as state; returns the bytes of those that were not yet state."""
        added = 0
        for storage in _storages(tensor):
            if not self._on_device(storage):
                continue
            with self.lock:
                ref, _ = self._see_storage(storage)
                ref.exempt = True
                if ref.token not in self.state:
                    self.state.add(ref.token)
                    added += ref.nbytes
        return added

    def hold(self, tensor: Tensor, parameter: bool) -> list[int]:
        """Count the storages of a tensor as saved; returns the tokens for :meth:`release`."""
        tokens = []
        for storage in _storages(tensor):
            if not self._on_device(storage):
                continue
            with self.lock:
                ref, _ = self._see_storage(storage)
                ref.exempt = ref.exempt or parameter
                if ref.exempt:
                    continue
                tokens.append(ref.token)
                entry = self._saved.setdefault(ref.token, [0, 0])
                entry[0] += 1
                self.saved_bytes += ref.nbytes - entry[1]
                entry[1] = ref.nbytes
                self.most_saved_bytes = max(self.most_saved_bytes, self.saved_bytes)
        return tokens

    def release(self, tokens: Iterable[int]) -> None:
        with self.lock:
            for token in tokens:
                entry = self._saved[token]
                entry[0] -= 1
                if not entry[0]:
                    self.saved_bytes -= entry[1]
                    del self._saved[token]

    def close(self) -> None:
        """Drop every weak reference, and with them the callbacks, and the log.

        A graph that outlives the block keeps the ledger; it should not keep more than it must.
        """
        with self.lock:
            self._refs.clear()
            self.what, self.value = array("q"), array("q")

    def figures(self) -> _Figures:
        """Play the log back.

        Only now, because a gradient is known to be state after it was born: the log lets its storage count as state
        for all of its life.
        """
        with self.lock:
            what, value = self.what[:], self.value[:]
            state_tokens = set(self.state)
        # The allocator's figures hold the storages too: on CUDA those of the ledger serve only to know the state.
        allocator = self.device.type == "cuda"
        live = state = peak = peak_beyond = most_state = 0
        # [sum, sum beyond state, events] of the block and of the bodies that are open.
        frames = [[0.0, 0.0, 0.0]]
        for kind, amount in zip(what, value, strict=True):
            if kind >= 0:
                if kind in state_tokens:
                    state += amount
                    most_state = max(most_state, state)
                if allocator:
                    continue
                live += amount
                peak = max(peak, live)
                peak_beyond = max(peak_beyond, live - state)
            elif kind == _SAMPLE:
                if allocator:
                    live = amount
                    peak = max(peak, live)
                    peak_beyond = max(peak_beyond, live - state)
                frames[-1][0] += live
                frames[-1][1] += live - state
                frames[-1][2] += 1
            elif kind == _PEAK:
                peak = max(peak, amount)
                peak_beyond = max(peak_beyond, amount - state)
            elif kind == _OPEN:
                frames.append([0.0, 0.0, 0.0])
            elif len(frames) > 1:
                total, beyond, events = frames.pop()
                frames[-1][0] += total / events if events else live
                frames[-1][1] += beyond / events if events else live - state
                frames[-1][2] += 1
        # A body that is still open (usage read from within) counts with what it has so far.
        total, beyond, events = (sum(column) for column in zip(*frames, strict=True))
        if not events:
            total, beyond, events = live, live - state, 1
        return _Figures(peak, round(total / events), peak_beyond, round(beyond / events), most_state)


class _Held:
    """What stands in the autograd graph for a saved tensor; counts it as saved for as long as the graph lives."""

    __slots__ = ("ledger", "payload", "tokens", "version")

    def __init__(self, ledger: _Ledger, payload: Any, tokens: list[int], version: int | None) -> None:
        self.ledger = ledger
        self.payload = payload
        self.tokens = tokens
        self.version = version

    def __del__(self) -> None:
        self.ledger.release(self.tokens)


def _payload_tensors(payload: Any) -> Iterator[Tensor]:
    """The tensors that an outer pack hook keeps, as far as they can be seen in what it returned."""
    if isinstance(payload, _Held):
        yield from _payload_tensors(payload.payload)
    else:
        yield from _tensors(payload)


def _saved_hooks(ledger: _Ledger) -> saved_tensors_hooks:
    """Hooks that count what is saved, and otherwise behave as if they were not there.

    Only the innermost saved-tensor hooks take effect, so the ones that were in force before (offloading, an outer
    ``track``) are called from these.
    """
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def pack(tensor: Tensor) -> _Held:
        parameter = _is_parameter(tensor)
        if outer is not None:
            payload = outer[0](tensor)
            tokens = [token for part in _payload_tensors(payload) for token in ledger.hold(part, parameter)]
            return _Held(ledger, payload, tokens, None)
        # Keeping the tensor itself would tie an output to the node that computed it: a cycle that is never freed.
        # detach() shares its storage and its version counter.
        payload = tensor.detach()
        version = None if payload.is_inference() else payload._version
        return _Held(ledger, payload, ledger.hold(tensor, parameter), version)

    def unpack(held: _Held) -> Tensor:
        if outer is not None:
            return outer[1](held.payload)
        tensor: Tensor = held.payload
        # PyTorch leaves this check out where hooks are in force; tracking must not hide a bug of the step.
        if held.version is not None and tensor._version != held.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version "
                f"{held.version} instead"
            )
        return tensor

    return saved_tensors_hooks(pack, unpack)


class _Mode(TorchDispatchMode):
    """Shows the ledger the storages of every op and takes a sample after it."""

    # torch.cond and its like: counted as one op.
    supports_higher_order_operators = True

    def __init__(self, ledger: _Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.allocator_peak = 0

    def sample(self) -> None:
        if self.ledger.device.type != "cuda":
            self.ledger.log(_SAMPLE)
            return
        # memory_allocated and max_memory_allocated each flatten all statistics; one nested dict is enough for both.
        stats = torch.cuda.memory_stats_as_nested_dict(self.ledger.device).get("allocated_bytes", {}).get("all", {})
        peak = stats.get("peak", 0)
        if peak > self.allocator_peak:
            self.allocator_peak = peak
            self.ledger.log(_PEAK, peak)
        self.ledger.log(_SAMPLE, stats.get("current", 0))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            # A wrapper subclass goes first: the ops on the plain tensors inside it come here in their turn.
            return NotImplemented
        ledger = self.ledger
        for tensor in _tensors(args):
            ledger.see(tensor)
        for tensor in _tensors(kwargs):
            ledger.see(tensor)
        body = op_bodies.get(func) if ledger.device.type != "cuda" else None
        if body is None:
            result = func(*args, **kwargs)
            for tensor in _tensors(result):
                ledger.see(tensor)
            if not getattr(func, "is_view", False):
                self.sample()
            return result
        ledger.log(_OPEN)
        try:
            # This runs below autograd, as the body would: the tensors inside carry no graph.
            with self:
                result = body(*args, **kwargs)
            for tensor in _tensors(result):
                ledger.see(tensor)
        finally:
            ledger.log(_CLOSE)
        return result


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:12.3f} MiB"


class Usage:
    """The figures of one :func:`track` block, in bytes. They may be read inside the block (so far) and after it."""

    def __init__(self, ledger: _Ledger, parameter_bytes: int, refresh: Callable[[], None]) -> None:
        self._ledger: _Ledger | None = ledger
        self._refresh: Callable[[], None] | None = refresh
        self._cached: tuple[int, _Figures] | None = None
        self._saved_bytes = 0
        self._parameter_bytes = parameter_bytes
        self.device = ledger.device

    def _figures(self) -> _Figures:
        ledger, refresh = self._ledger, self._refresh
        if ledger is not None and refresh is not None:
            refresh()
            entries = len(ledger.what)
            if self._cached is None or self._cached[0] != entries:
                self._cached = entries, ledger.figures()
        assert self._cached is not None
        return self._cached[1]

    def _freeze(self) -> None:
        """Keep the figures and let go of everything else."""
        self._figures()
        assert self._ledger is not None
        self._saved_bytes = self._ledger.most_saved_bytes
        self._ledger = self._refresh = None

    @property
    def saved_bytes(self) -> int:
        """The most storage held for backward at one time, each storage once, without parameters."""
        return self._saved_bytes if self._ledger is None else self._ledger.most_saved_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at one time."""
        return self._figures().peak

    @property
    def average_bytes(self) -> int:
        """Bytes alive, as the mean over the operations of the block."""
        return self._figures().average

    @property
    def parameter_bytes(self) -> int:
        """Parameters of the model (or, without one, of the optimiser); 0 where neither was given."""
        return self._parameter_bytes

    @property
    def state_bytes(self) -> int:
        """Parameters, buffers, gradients and optimiser state, when they are largest; 0 where none were given."""
        return self._figures().state

    @property
    def peak_beyond_state_bytes(self) -> int:
        """The most bytes alive at one time that are not state."""
        return self._figures().peak_beyond_state

    @property
    def average_beyond_state_bytes(self) -> int:
        """Bytes alive that are not state, as the mean over the operations of the block."""
        return self._figures().average_beyond_state

    def as_dict(self) -> dict[str, int]:
        """All figures by name."""
        return {
            "saved_bytes": self.saved_bytes,
            "peak_bytes": self.peak_bytes,
            "average_bytes": self.average_bytes,
            "peak_beyond_state_bytes": self.peak_beyond_state_bytes,
            "average_beyond_state_bytes": self.average_beyond_state_bytes,
            "parameter_bytes": self.parameter_bytes,
            "state_bytes": self.state_bytes,
        }

    def __repr__(self) -> str:
        figures = self.as_dict()
        lines = [f"memory on {self.device}{'' if self._ledger is None else ' (so far)'}"]
        lines += [
            f"  {name.removesuffix('_bytes').replace('_', ' '):<22}{_megabytes(nbytes)}"
            for name, nbytes in figures.items()
        ]
        return "\n".join(lines)


class _Tracker:
    """The block of :func:`track`: puts the mode and the hooks in force and takes them away again."""

    def __init__(
        self, device: torch.device, model: torch.nn.Module | None, optimizer: torch.optim.Optimizer | None
    ) -> None:
        self.device = device
        self.model = model
        self.optimizer = optimizer
        self.ledger: _Ledger | None = None
        self.usage: Usage | None = None
        self.stack: contextlib.ExitStack | None = None

    def _parameters(self) -> list[Tensor]:
        if self.model is not None:
            return list(self.model.parameters())
        if self.optimizer is not None:
            return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return []

    def _see_state(self) -> None:
        """Register what is state now: parameters, buffers, gradients, optimiser state."""
        assert self.ledger is not None
        parameters = self._parameters()
        if self.model is not None and self.optimizer is not None:
            parameters += [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            self.ledger.see_state(parameter)
            if parameter.grad is not None:
                self.ledger.see_state(parameter.grad)
        if self.model is not None:
            for buffer in self.model.buffers():
                self.ledger.see_state(buffer)
        if self.optimizer is not None:
            for entry in self.optimizer.state.values():
                for tensor in _tensors(entry):
                    self.ledger.see_state(tensor)

    def __enter__(self) -> Usage:
        if self.stack is not None:
            raise RuntimeError("memory.track: this block is already entered; call track() again for another one")
        self.ledger = ledger = _Ledger(self.device)
        parameter_bytes = sum(ledger.see_state(parameter) for parameter in self._parameters())
        self._see_state()
        self.usage = Usage(ledger, parameter_bytes, self._see_state)
        with contextlib.ExitStack() as stack:
            if self.optimizer is not None:
                # Gradients are there before the step and the optimiser's own tensors after it, whatever else the
                # block does with them (zero_grad).
                for register in (self.optimizer.register_step_pre_hook, self.optimizer.register_step_post_hook):
                    stack.callback(register(lambda *_: self._see_state()).remove)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
                ledger.log(_PEAK, torch.cuda.memory_allocated(self.device))
            stack.enter_context(_saved_hooks(ledger))
            stack.enter_context(_Mode(ledger))
            self.stack = stack.pop_all()
        return self.usage

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stack, usage, ledger = self.stack, self.usage, self.ledger
        assert stack is not None and usage is not None and ledger is not None
        try:
            stack.close()
            if self.device.type == "cuda":
                if kind is None:
                    # Not after an error: what the device has to say then would hide it.
                    torch.cuda.synchronize(self.device)
                ledger.log(_PEAK, torch.cuda.max_memory_allocated(self.device))
            usage._freeze()
        finally:
            ledger.close()
            self.stack = self.usage = self.ledger = None


def track(
    device: torch.device | str | int = "cpu",
    *,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> contextlib.AbstractContextManager[Usage]:
    """Measure the memory of the block: ``with memory.track(device) as usage: step()``.

    Args:
        device: the device whose memory counts, a CPU or a CUDA device.
        model: its parameters, buffers and gradients are the state, together with
        optimizer: its state.

    Returns:
        A context manager, for one block, that gives the :class:`Usage` of it. Blocks may be nested.

    Raises:
        ValueError: a device of another kind, or CUDA where there is none.
        TypeError: ``model`` is no module, or ``optimizer`` no optimiser.
    """
    op = "memory.track"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        got = repr(device) if isinstance(device, (str, int)) else _check.describe(device)
        raise ValueError(f"{op}: device got {got}, expected a device; pass 'cpu' or 'cuda'") from error
    if resolved.type not in ("cpu", "cuda"):
        _check.fail(op, "device", repr(str(resolved)), "'cpu' or 'cuda'", "only these two can be measured")
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            _check.fail(op, "device", repr(str(resolved)), "a device that is there", "pass 'cpu': torch finds no CUDA")
        if resolved.index is None:
            resolved = torch.device("cuda", torch.cuda.current_device())
    else:
        resolved = torch.device("cpu")
    if model is not None and not isinstance(model, torch.nn.Module):
        _check.fail(op, "model", model, "a torch.nn.Module or None", "pass the module that is trained", TypeError)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        fix = "pass the optimiser of the step"
        _check.fail(op, "optimizer", optimizer, "a torch.optim.Optimizer or None", fix, TypeError)
    return _Tracker(resolved, model, optimizer)
