"""What one training step costs: memory, time, and the gradient it finds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from spectriton import distributed, memory
from spectriton.images import Images
from spectriton.timing import Stopwatch
from spectriton.train import TrainConfig, make_optimizer, seed_everything, training_batch, training_step


def measure_step(
    model: nn.Module,
    data: Images,
    config: TrainConfig,
    *,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    timed_steps: int = 0,
) -> dict[str, Any]:
    """Memory of one training step (forward, backward, update) at the full batch size. Changes the weights.

    A step goes before the one that is measured, so that the optimiser's state, the buffers of libraries and whatever is
    set up once exist already. Of several processes, the batch is each one's share and the figures are those of rank 0.

    Args:
        model, data, config: as in :func:`spectriton.train.train`.
        around: gives a context to run each step in.
        timed_steps: take so many further steps, without accounting, and report their median time.

    Returns:
        Bytes: ``peak_bytes``, ``average_bytes`` (everything alive), ``saved_bytes`` (held for backward at the end of
        forward), ``peak_beyond_state_bytes`` and ``average_beyond_state_bytes`` (without the state), ``state_bytes``
        (parameters, buffers, gradients, optimiser state), ``parameter_bytes``; ``seconds_per_step`` where steps are
        timed.
    """
    device = config.resolve_device()
    model.to(device).train()
    optimizer = make_optimizer(model, config)
    called = distributed.parallel(model)
    images, labels = training_batch(data, config, device)

    def step() -> None:
        with around():
            training_step(called, optimizer, images, labels, config.amp)

    step()
    with memory.track(device, model=model, optimizer=optimizer) as usage:
        step()
    found: dict[str, Any] = {
        "peak_bytes": int(usage.peak_bytes),
        "average_bytes": round(usage.average_bytes),
        "saved_bytes": int(usage.saved_bytes),
        "peak_beyond_state_bytes": int(usage.peak_beyond_state_bytes),
        "average_beyond_state_bytes": round(usage.average_beyond_state_bytes),
        "state_bytes": int(usage.state_bytes),
        "parameter_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }
    if timed_steps:
        watch = Stopwatch(device)
        found["seconds_per_step"] = median(watch.lap(step, events=False) for _ in range(timed_steps))
    return distributed.gather(found)[0]


def gradient(
    model: nn.Module,
    data: Images,
    config: TrainConfig,
    *,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Tensor]:
    """The gradient of each parameter on the first batch, on the CPU; whatever is drawn follows from the seed.

    Args:
        model, data, config, around: as in :func:`measure_step`.
    """
    device = config.resolve_device()
    model.to(device).train()
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    images, labels = training_batch(data, config, device)
    seed_everything(config.seed)
    with around():
        training_step(distributed.parallel(model), still, images, labels, config.amp)
    return [torch.zeros_like(p, device="cpu") if p.grad is None else p.grad.cpu() for p in model.parameters()]


def relative_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of two gradients' entries, over the largest entry of the second; 0 for two zeros."""
    difference = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    largest = max(float(b.abs().max()) for b in expected)
    return difference / largest if difference else 0.0


def release_memory() -> None:
    """Let go of the last network, reference cycles included, before the next one is measured."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
