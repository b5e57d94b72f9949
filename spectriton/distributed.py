"""Several processes, each with a device of its own, that train one network: what the applications need of it.

Every function also works in a single process, which is a world of size 1: there is one code path. Processes are started
by ``torchrun``; :func:`joined` makes them one group. A *global* batch is what the recipe's batch size means. Each
process, by its *rank*, takes its share of every global batch, and gradients are averaged by
``nn.parallel.DistributedDataParallel``. Rank 0 is the main one: it alone writes files and shows progress.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_T = TypeVar("_T")
_P = ParamSpec("_P")


class FailedOnMain(RuntimeError):
    """The main process failed in a part that only it runs; its own error says how."""


@contextmanager
def joined() -> Iterator[None]:
    """Make the processes that ``torchrun`` started one group for as long as the block lasts.

    Tensors on the CPU are exchanged by gloo, those on CUDA devices by NCCL; the current CUDA device becomes that of the
    local rank. Nothing happens where there is one process only, or a group already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _has_group():
        yield
        return
    if torch.cuda.is_available():
        if local_rank() < torch.cuda.device_count():  # with more processes than devices, settings may ask for the CPU
            torch.cuda.set_device(local_rank())
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    yield
    # Not after an error: where another process is gone, taking leave of it would wait in vain.
    dist.destroy_process_group()


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _has_group() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _has_group() else 0


def local_rank() -> int:
    """Number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return rank() == 0


def share(count: int) -> slice:
    """Which of ``count`` things are for this process: a run of them; shares differ in length by one at most."""
    number, size = rank(), world_size()
    return slice(number * count // size, (number + 1) * count // size)


def gather(value: _T) -> list[_T]:
    """The values that all processes hand in, in the order of ranks; each process gets them all. They are pickled."""
    if world_size() == 1:
        return [value]
    values: list[_T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call a function in the main process only; every process gets what it returns, once it has.

    Raises:
        Exception: in the main process, what the function raises.
        FailedOnMain: then, in the others, so that none waits for one that has ended.
    """
    value: _T | None = None
    error: Exception | None = None
    if is_main():
        try:
            value = function(*args, **kwargs)
        except Exception as raised:
            error = raised
    value, failed = gather((value, error is not None))[0]
    if error is not None:
        raise error
    if failed:
        raise FailedOnMain("rank 0 failed; see its message")
    return value  # type: ignore[return-value]  # None only where the function returned it


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Each flag: whether it is set in any process. All processes get the same answer."""
    if world_size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes.tolist())


def total(values: Sequence[int]) -> list[int]:
    """The sums over all processes, entry by entry; every process gets the same."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.int64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(sums)
    return sums.tolist()


def parallel(model: nn.Module) -> nn.Module:
    """The model as it is called in a training step: gradients are then averaged over the processes.

    Parameters become those of rank 0 in every process. Buffers are left to :func:`average_buffers`.

    Args:
        model: on the device it is trained on; it stays the one to save and to evaluate.
    """
    if world_size() == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # until torch 2.12
    # Gradients as views of what is exchanged: else there would be two copies of them.
    options: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
    return DistributedDataParallel(model, **options)


def average_buffers(model: nn.Module) -> None:
    """Replace the floating-point buffers (running statistics of batch norm) by their means over the processes."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if world_size() == 1 or not buffers:
        return
    joined = torch.cat([buffer.detach().double().flatten() for buffer in buffers])
    dist.all_reduce(joined)
    parts = (joined / world_size()).split([buffer.numel() for buffer in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.view_as(buffer))
