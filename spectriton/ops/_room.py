"""Room for what a layer keeps, chosen before it is known, so that the host need not wait for a GPU to count.

A layer keeps about as much as in its last passes. Its kernels pack into a buffer of that size and a margin, and count
what they would have needed; tiles that do not fit are left empty. When the count is looked at decides what that costs:

* by default at the end of the op. The host waits once for each packed output; where something did not fit the op packs
  again, chunk by chunk and to measure. What is returned holds everything, without room to spare.
* within :func:`deferred_packing` at the end of the block, for all ops at once. What is returned has room to spare.
  Where something did not fit nothing that was computed may be used, and :class:`PackingOverflow` says so;
  :func:`run_ahead` computes it again.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from spectriton._check import describe, fail
from spectriton._counts import Counts
from spectriton.packed import Layout

T = TypeVar("T")

# Passes that are remembered; the largest of them counts.
_PASSES = 4
# Beyond it, of what a layer keeps and of the frequencies that it fills. What is not taken up counts as memory where the
# check is deferred.
_MARGIN = 1 / 16
_LEAST_MARGIN = 256


class PackingOverflow(RuntimeError):
    """Something did not fit the room that had been chosen for it: the results of the block must not be used."""


class Expected(NamedTuple):
    """The most that an op may keep: coefficients, and frequencies before the tail at which nothing is kept."""

    kept: int
    rows: int


class Room:
    """What a layer kept in its last passes, relative to what there was: batches and maps may change their size."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=_PASSES)

    def saw(self, sizes: Layout, kept: int, rows: int) -> None:
        """Remember a pass."""
        if sizes.row:
            self._seen.append((kept / (sizes.frequencies * sizes.row), rows / sizes.frequencies))

    def expect(self, sizes: Layout) -> Expected | None:
        """What to expect of the next pass; None before the first."""
        if not self._seen:
            return None
        kept, rows = (max(shares) for shares in zip(*self._seen, strict=True))
        return Expected(
            math.ceil(kept * (1 + _MARGIN) * sizes.frequencies * sizes.row) + _LEAST_MARGIN,
            math.ceil(rows * (1 + _MARGIN) * sizes.frequencies) + 1,
        )


class _Packing(NamedTuple):
    """A packed output whose counts are to be looked at later."""

    room: Room | None
    sizes: Layout
    counts: Counts
    expected: Expected | None


_in_force: ContextVar[Room | None] = ContextVar("spectriton_room", default=None)
# Under this name among what PyTorch hands from a thread to those of its backward passes, where gradient checkpointing
# packs again: the thread's _Holder. Other threads are none the wiser.
_DEFERRED = "spectriton.deferred_packing"


class _Holder:
    """What a thread has packed while counts are looked at later; None at other times."""

    packings: list[_Packing] | None = None


_own = threading.local()
# PyTorch lets go of what it is handed without having taken hold of it (seen in 2.11): one to spare for each time.
_references: list[_Holder] = []


def _handed_on() -> _Holder | None:
    return torch._C._get_obj_in_tls(_DEFERRED) if torch._C._is_key_in_tls(_DEFERRED) else None


def _holder_of_thread() -> _Holder:
    holder: _Holder | None = getattr(_own, "holder", None)
    if holder is None:
        holder = _own.holder = _Holder()
        _references.append(holder)
    if _handed_on() is not holder:
        _references.append(holder)
        torch._C._stash_obj_in_tls(_DEFERRED, holder)
    return holder


def _deferred() -> list[_Packing] | None:
    holder = _handed_on()
    return None if holder is None else holder.packings


def with_room(room: Room, op: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """``op(*args, **kwargs)``, which finds room for what it packs in what the same layer kept before."""
    if torch.compiler.is_compiling():  # a compiled graph knows nothing of layers: its ops pack to measure
        return op(*args, **kwargs)
    token = _in_force.set(room)
    try:
        return op(*args, **kwargs)
    finally:
        _in_force.reset(token)


def expect(sizes: Layout, most: int | None) -> Expected | None:
    """What an op that packs maps of ``sizes`` may expect to keep; None where there is nothing to go by.

    Args:
        sizes: of what is packed.
        most: coefficients that are kept at most by the thresholding rule, where it says so.
    """
    room, coefficients = _in_force.get(), sizes.frequencies * sizes.row
    found = None if room is None else room.expect(sizes)
    if found is None:
        if most is None:
            return None
        found = Expected(most, sizes.frequencies)
    # Offsets are 32 bits wide.
    bounds = (found.kept, coefficients, torch.iinfo(torch.int32).max, coefficients if most is None else most)
    return Expected(min(bounds), min(found.rows, sizes.frequencies))


def is_deferred() -> bool:
    """Whether counts are looked at later."""
    return _deferred() is not None


def take_down(sizes: Layout, counts: Counts, expected: Expected | None = None) -> None:
    """Remember, now or when the counts are looked at, what the layer at work kept and what it was ``expected`` to."""
    room, deferred = _in_force.get(), _deferred()
    if deferred is not None:
        deferred.append(_Packing(room, sizes, counts, expected))
    elif room is not None:
        room.saw(sizes, *counts.wait())


@contextmanager
def deferred_packing() -> Iterator[None]:
    """Within this block the host does not wait for packing; at its end it looks at what was kept.

    For a GPU, whose Triton kernels pack into room chosen from what each layer kept before. They wait as ever in a
    layer's first pass, and in ops called by themselves with a threshold. Packed spectra made within have room to
    spare: 1/16, and what the layer kept less than in the largest of its last 4 passes. ``nbytes`` counts it, ``kept``
    and ``density`` do not, and wait for the number.

    It should end before what cannot be taken back, the step of an optimiser, and best after the backward pass has been
    launched: a GPU that is at work there is waited for without running dry. Inside another such block it does nothing.
    It holds for this thread, and for the backward passes that it starts.

    Raises:
        PackingOverflow: something did not fit, and what was computed is incomplete. The layers have learnt of it, so
            the next attempt finds room for what has been seen; outside of the block it is certain to succeed.
    """
    if is_deferred():
        yield
        return
    holder = _holder_of_thread()
    packings = holder.packings = []
    try:
        yield
    finally:
        holder.packings = None
        _look_at(packings)  # incomplete results may be the reason of another error, which becomes the context of this


def _look_at(packings: list[_Packing]) -> None:
    short = 0
    for room, sizes, counts, expected in packings:
        kept, rows = counts.wait()
        if room is not None:
            room.saw(sizes, kept, rows)
        short += expected is not None and (kept > expected.kept or rows > expected.rows)
    if short:
        raise PackingOverflow(
            f"deferred_packing: {short} of {len(packings)} packed outputs got more than there was room for, expected "
            "about as much as in earlier passes; discard what was computed and do it again, or use ops.run_ahead"
        )


def run_ahead(step: Callable[[], T], *modules: nn.Module) -> T:
    """``step()`` without the host waiting for packing, and once more, waiting, where something did not fit.

    .. code-block:: python

        def step():
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            return loss

        loss = ops.run_ahead(step, model)
        optimizer.step()

    Args:
        step: may be called twice: clears the gradients that it adds to, changes no parameters, and nothing else but
            buffers of ``modules`` and torch's random generators.
        modules: whose buffers (running statistics) are put back before ``step`` is called again, as the generators of
            the host and of the devices of ``modules`` are.

    Returns:
        What ``step`` returned. Of several processes each would repeat by itself while others wait for its gradients;
        there the step is run as it is.

    Raises:
        TypeError: something among ``modules`` is none.
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            fail("run_ahead", "modules", describe(module), "modules", "pass them one by one", TypeError)
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return step()
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    drawn, drawn_there = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}
    try:
        with deferred_packing():
            return step()
    except PackingOverflow:
        with torch.no_grad():
            for buffer, earlier in zip(buffers, before, strict=True):
                buffer.copy_(earlier)
    torch.set_rng_state(drawn)
    for device, state in drawn_there.items():
        torch.cuda.set_rng_state(state, device)
    return step()
