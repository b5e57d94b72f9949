"""How long work takes on a device, and how long copying as many bytes does.

On the CPU a lap is read from the host's clock. On a GPU it lies between two CUDA events on the stream; a short idle
kernel goes before the first event, so that the host is ahead of the device when the lap begins: what is measured is the
work, and the launching only as far as it takes longer than that or the call itself waits for the device.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

#: The most sets of inputs that are worth their memory.
MOST_SETS = 16
_AHEAD_CYCLES = 400_000  # a fifth of a millisecond or more


class Stopwatch:
    """Measures calls on a device, and adds up what it measured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0

    def read(self) -> float:
        """Seconds measured so far."""
        return self.seconds

    def lap(self, call: Callable[..., Any], arguments: tuple[Any, ...] = (), events: bool = True) -> float:
        """Measures one call and returns its seconds; what it returns is let go outside of them.

        ``events``: on a GPU, between CUDA events; otherwise by the host's clock between synchronisations.
        """
        if events and self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            torch.cuda._sleep(_AHEAD_CYCLES)
            start.record()
            result = call(*arguments)
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
        else:
            synchronize(self.device)
            begin = time.perf_counter()
            result = call(*arguments)
            synchronize(self.device)
            seconds = time.perf_counter() - begin
        del result
        self.seconds += seconds
        return seconds


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@lru_cache(maxsize=8)
def _last_level_cache(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def input_sets(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs, each with ``nbytes`` of traffic, go beyond a GPU's last-level cache twice."""
    if device.type != "cuda":
        return 1
    return min(MOST_SETS, 1 + math.ceil(2 * _last_level_cache(device) / max(1, nbytes)))


@lru_cache(maxsize=8)
def _eviction_buffer(device: torch.device) -> Tensor:
    return torch.zeros(max(1, 2 * _last_level_cache(device) // 4), device=device)


def evict(device: torch.device) -> None:
    """Reads twice a GPU's last-level cache (writing would leave it full of lines still to be written back)."""
    if device.type == "cuda":
        _eviction_buffer(device).sum()


@lru_cache(maxsize=256)
def copy_seconds(nbytes: int, device: torch.device, fewest: int = 10, budget: float = 0.1) -> float:
    """Median seconds of ``clone`` where ``nbytes`` are moved: one half read, the other written.

    Args:
        nbytes: bytes moved.
        device: where.
        fewest: laps at least, after two to warm up.
        budget: seconds after which there are no more than these; 30 laps are enough anyway.
    """
    size = max(1, nbytes // 2)
    sources = [torch.ones(size, dtype=torch.uint8, device=device) for _ in range(input_sets(nbytes, device))]
    clock = Stopwatch(device)
    begin = time.perf_counter()
    laps: list[float] = []
    while len(laps) < fewest + 2 or (len(laps) < 30 and time.perf_counter() - begin < budget):
        laps.append(clock.lap(torch.clone, (sources[len(laps) % len(sources)],)))
    return statistics.median(laps[2:])
