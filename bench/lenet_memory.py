"""What a training step of the LeNet twins holds: ``python -m bench.lenet_memory [--json FILE]``.

One step (forward, loss, backward, SGD with momentum) after another that made the optimiser's state, batch 128 (less in
a quick run) of photograph-like 28x28 images, measured by :func:`spectriton.memory.track`: *saved* for backward at the
end of forward; *peak* and *average* of everything alive, and beyond the state (parameters, gradients, momentum). Ratios
are to the spatial network in single precision and in bf16 autocast.
The options are those of ``bench/conftest.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.bench_lenet import BATCH, NETWORKS, THRESHOLD, batch, build
from bench.timing import DEVICE, environment
from spectriton import memory

COLUMNS = ("saved_bytes", "peak_bytes", "average_bytes", "peak_beyond_state_bytes", "average_beyond_state_bytes")


def step_memory(name: str, autocast: bool) -> dict[str, Any]:
    """The figures of one network."""
    net = build(name)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    images, labels = batch(0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    with memory.track(DEVICE, model=net, optimizer=optimizer) as usage:
        step()
    densities = {
        part: round(module.last_density, 4)
        for part, module in net.named_modules()
        if getattr(module, "last_density", None) is not None
    }
    return usage.as_dict() | ({"density": densities} if densities else {})


def table(figures: dict[str, dict[str, Any]]) -> str:
    """Markdown, in KiB, with the share of the spatial network's saved and peak bytes."""
    spatial, half = figures["spatial"], figures["spatial bf16 autocast"]
    head = ("network", *(column.removesuffix("_bytes").replace("_", " ") for column in COLUMNS), "saved", "peak")
    marks = [*head[:-2], "saved / fp32, bf16", "peak / fp32, bf16"]
    lines = [f"| {' | '.join(marks)} |", f"| --- |{' ---: |' * (len(marks) - 1)}"]
    for name, row in figures.items():
        shares = (
            ", ".join(f"{100 * row[column] / max(1, other[column]):.0f} %" for other in (spatial, half))
            for column in ("saved_bytes", "peak_bytes")
        )
        lines.append(
            f"| {name} | {' | '.join(f'{row[column] / 1024:,.0f}' for column in COLUMNS)} | {' | '.join(shares)} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.lenet_memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    given = parser.parse_args(arguments)
    figures = {"spatial": step_memory("spatial", False), "spatial bf16 autocast": step_memory("spatial", True)}
    figures |= {name: step_memory(name, False) for name in NETWORKS if name != "spatial"}
    conditions = environment()
    print(f"A training step of LeNet on {conditions['device']}, batch {BATCH}, threshold {THRESHOLD:g}; KiB.\n")
    print(table(figures))
    if given.json:
        config = {"batch": BATCH, "threshold": THRESHOLD}
        given.json.write_text(
            json.dumps({"networks": figures, "config": config, "environment": conditions}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
