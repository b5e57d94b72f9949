"""What a training step of a network and of its spectral twin holds: ``python -m bench.step_memory [--model NAME]``.

One step (forward, loss, backward, SGD with momentum) after another that made the optimiser's state, on photograph-like
images, measured by :func:`spectriton.memory.track`: *saved* for backward at the end of forward; *peak* and *average* of
everything alive, and beyond the state (parameters, gradients, momentum). Ratios are to the spatial network in single
precision and in bf16 autocast.

On the CPU the profiler counts the same step once more, allocation by allocation. *Above workspace* are the bytes of the
largest one that exceeds the workspace and is no parameter, gradient or packed spectrum: a dense map, say, or a kernel
spectrum. Spectral networks have none but their logits' and images' where those are large.
The options are those of ``bench/conftest.py``.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.maps import photograph_like
from bench.timing import CUDA, DEVICE, by_size, environment, generator
from spectriton import PackedSpectrum, memory, models
from spectriton._backend import workspace_bytes

COLUMNS = ("saved_bytes", "peak_bytes", "average_bytes", "peak_beyond_state_bytes", "average_beyond_state_bytes")
ROWS: dict[str, dict[str, Any]] = {
    "spatial": {"variant": "spatial"},
    "spatial bf16 autocast": {"variant": "spatial"},
    "spectriton": {"variant": "spectral"},
    "spectriton int8 values": {"variant": "spectral", "value_dtype": "int8"},
    "spectriton as in the paper": {"variant": "spectral", "paper": True},
}


class Step:
    """A training step of one row, and the sizes of what it may hold whole."""

    def __init__(self, row: str, given: argparse.Namespace) -> None:
        torch.manual_seed(0)
        options = {"num_classes": given.classes, "in_channels": given.channels, "image_size": given.image_size}
        options |= {"threshold": given.threshold, "width": given.width} | ROWS[row]
        if options["variant"] == "spectral":
            options["activation"] = given.activation
        self.net: nn.Module = models.build(given.model, **options).to(DEVICE)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)
        self.autocast = row.endswith("autocast")
        self.images = photograph_like((given.batch, given.channels, given.image_size, given.image_size), 0)
        self.labels = torch.randint(given.classes, (given.batch,), generator=generator(0), device=DEVICE)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.autocast):
            loss = nn.functional.cross_entropy(self.net(self.images), self.labels)
        loss.backward()
        self.optimizer.step()

    def seconds(self) -> float:
        """Of one step, by the host's clock."""
        begin = time.perf_counter()
        self()
        if CUDA:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def memory(self) -> dict[str, Any]:
        """The figures of :func:`spectriton.memory.track`."""
        self.optimizer.zero_grad(set_to_none=True)
        with memory.track(DEVICE, model=self.net, optimizer=self.optimizer) as usage:
            self()
        return usage.as_dict()

    def above_workspace(self) -> int:
        """Bytes of the largest allocation above the workspace that is no parameter, gradient or packed spectrum."""
        known: set[int] = {p.nbytes for p in self.net.parameters()}

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            for packed in [*inputs, *(output if isinstance(output, list) else [output])]:
                if isinstance(packed, PackedSpectrum):
                    tensors: list[Tensor] = [packed.values, packed.scales, packed.bitmap, packed.offsets]
                    known.update(t.nbytes for t in tensors)
                    known.add(packed.kept * packed.edge.dtype.itemsize * 2)  # its gradient

        # Inside a block with batch norm, what comes before the norm is a packed spectrum of its own.
        hooks = [module.register_forward_hook(note) for module in self.net.modules()]
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self()
        for hook in hooks:
            hook.remove()
        assert profile.profiler is not None
        events = profile.profiler.kineto_results.events()
        sizes = {event.nbytes() for event in events if event.name() == "[memory]"}
        return max((s for s in sizes - known if s > workspace_bytes(None, DEVICE)), default=0)

    def densities(self) -> dict[str, float]:
        """Fraction kept by each layer that packs."""
        found = {name: getattr(module, "last_density", None) for name, module in self.net.named_modules()}
        return {name: round(density, 4) for name, density in found.items() if density is not None}


def measure(row: str, given: argparse.Namespace) -> dict[str, Any]:
    """The figures of one row."""
    step = Step(row, given)
    step()
    figures = {"seconds": step.seconds()} | step.memory() | {"density": step.densities()}
    return figures if CUDA else figures | {"above_workspace_bytes": step.above_workspace()}


def table(figures: dict[str, dict[str, Any]]) -> str:
    """Markdown, in MiB, with the share of the spatial network's saved and peak bytes."""
    spatial, half = figures["spatial"], figures.get("spatial bf16 autocast", figures["spatial"])
    heads = [column.removesuffix("_bytes").replace("_", " ") for column in COLUMNS]
    shared = ("saved_bytes", "peak_bytes", "peak_beyond_state_bytes")
    marks = ["network", *heads, "above workspace", "seconds"]
    marks += [f"{column.removesuffix('_bytes').replace('_', ' ')} / fp32, bf16" for column in shared]
    lines = [f"| {' | '.join(marks)} |", f"| --- |{' ---: |' * (len(marks) - 1)}"]
    for name, row in figures.items():
        cells = [f"{row[column] / 2**20:,.2f}" for column in COLUMNS]
        above = row.get("above_workspace_bytes")
        cells.append("" if above is None else f"{above / 2**20:,.2f}")
        cells.append(f"{row['seconds']:.3f}")
        cells += [
            ", ".join(f"{100 * row[column] / max(1, other[column]):.1f} %" for other in (spatial, half))
            for column in shared
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.step_memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="lenet", choices=list(models.NETWORKS))
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=by_size(cuda=128, cpu=128, quick=32))
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--activation", default="tanh", help="of the spectral networks, see models.build")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="which networks")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    given = parser.parse_args(arguments)
    figures: dict[str, dict[str, Any]] = {}
    for row in ["spatial", *(row for row in given.rows if row != "spatial")]:
        figures[row] = measure(row, given)
        gc.collect()
        print(f"{row}: {figures[row]['seconds']:.2f} s a step", file=sys.stderr, flush=True)
    conditions = environment()
    config = {name: value for name, value in vars(given).items() if name not in ("json", "rows")}
    config["workspace_bytes"] = workspace_bytes(None, DEVICE)
    sizes = f"{given.channels}x{given.image_size}x{given.image_size}, width {given.width:g}"
    print(f"A training step of {given.model} on {conditions['device']}: batch {given.batch} of {sizes}, ", end="")
    print(f"threshold {given.threshold:g}; MiB.\n\n{table(figures)}")
    if given.json:
        found = {"networks": figures, "config": config, "environment": conditions}
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
