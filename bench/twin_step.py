"""What a step of a network and of its spectral twin takes on an H100, predicted: ``python -m bench.twin_step``.

**Nothing is measured**, and no GPU is needed: :mod:`bench.step_traffic` counts operations, bytes and products of a
training step (forward, loss, backward, SGD with momentum), and says how long an H100 would take at least. The twin is
stepped as on a GPU, by the Triton kernels and without the host waiting for packing, on tensors without values. What its
packed spectra keep is assumed: the same ``--density`` in all layers, spread evenly over all frequencies.

With ``--blocks`` single layers are compared as well: convolution, batch norm and ReLU, with those of a SpecBlock, and a
SpecBlock as in the paper; forward and backward.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.compress_step import EXACT, ROWS, Row, Step, operators
from bench.step_traffic import Machine, Traffic, assuming, counting, instructions
from bench.timing import environment
from spectriton import PackedSpectrum, models, ops
from spectriton import nn as snn
from spectriton_kernels import roof

SPATIAL = {
    "spatial TF32 channels_last": Row(autocast=False),
    "spatial bf16 channels_last": ROWS[EXACT],
}
BASE = "spatial bf16 channels_last"
#: Further options of :func:`spectriton.models.build`.
TWINS: dict[str, dict[str, Any]] = {"spectral": {}, "spectral as in the paper": {"paper": True}}
NETWORKS = (*SPATIAL, *TWINS)


class Shape(NamedTuple):
    """A layer: as many channels come in as go out."""

    channels: int
    size: int
    kernel: int

    def __str__(self) -> str:
        return f"{self.channels} at {self.size}x{self.size}, {self.kernel}x{self.kernel}"


#: The layers of VGG-16 for images of 224x224, and the same with larger kernels.
SHAPES = [
    Shape(channels, size, kernel)
    for kernel in (3, 7)
    for channels, size in ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14))
]
CONVOLUTIONS = {"conv2d, TF32": torch.float32, "conv2d, bf16": torch.bfloat16}
BLOCKS: dict[str, dict[str, Any]] = {"SpecBlock": {"norm": True, "activation": "relu"}, "as in the paper": {}}


# -- counting --------------------------------------------------------------------------------------------------------


def count(make: Callable[[], Callable[[], Any]], density: float | None) -> Traffic:
    """What is counted of a call of what ``make`` gives, after a first one, in which tables are made.

    A ``density`` is assumed where everything is on the device ``meta``, without it they are fake tensors of the CPU.
    """
    traffic = Traffic()
    packing = contextlib.nullcontext() if density is None else assuming(density)
    with counting(traffic, meta=density is not None), packing:
        step = make()
        step()
        traffic.operations.clear()
        step()
    return traffic


def twin_step(model: str, given: argparse.Namespace, options: dict[str, Any]) -> Callable[[], None]:
    """A step of a spectral network on the device ``meta``."""
    with torch.device("meta"):
        sizes = {"num_classes": given.classes, "image_size": given.image_size, "width": given.width}
        # Any threshold will do: by the density that is assumed nothing is compared with it.
        net = models.build(model, "spectral", threshold=0.5, **sizes, **options)
        images = torch.empty(given.batch, 3, given.image_size, given.image_size)
        labels = torch.empty(given.batch, dtype=torch.long)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, foreach=True)

    def gradients() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(net(images), labels).backward()

    def step() -> None:
        ops.run_ahead(gradients, net)
        optimizer.step()

    return step


def count_network(name: str, model: str, given: argparse.Namespace) -> Traffic:
    """A step of one of :data:`NETWORKS`."""
    if name in SPATIAL:
        return count(partial(Step, SPATIAL[name], given, model, given.batch, torch.device("cpu")), None)
    return count(partial(twin_step, model, given, TWINS[name]), given.density)


def convolution(shape: Shape, batch: int, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of convolution, batch norm and ReLU, channels last, on fake tensors."""
    channels, size, kernel = shape
    taps = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
    taps.weight = nn.Parameter(taps.weight.detach().contiguous(memory_format=torch.channels_last))
    layer = nn.Sequential(taps, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    maps = torch.empty(batch, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x, grad = maps.requires_grad_(), torch.empty_like(maps)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = layer(x)
        y.backward(grad)
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return step


def block(shape: Shape, batch: int, options: dict[str, Any]) -> Callable[[], None]:
    """Forward and backward of a SpecBlock on the device ``meta``."""
    channels, size, kernel = shape
    with torch.device("meta"):
        layer = snn.SpecBlock(channels, channels, kernel, threshold=0.5, **options)
        with torch.no_grad(), ops.deferred_packing():
            packed: PackedSpectrum = snn.ToSpectral(threshold=0.5)(torch.empty(batch, channels, size, size))
    x = packed.detach().requires_grad_()

    def step() -> None:
        with ops.deferred_packing():
            edge = layer(x).edge
            edge.backward(torch.empty_like(edge, memory_format=torch.contiguous_format))
        layer.zero_grad(set_to_none=True)
        x.edge.grad = None

    return step


# -- predicting ------------------------------------------------------------------------------------------------------


def figures(traffic: Traffic, machine: Machine, per_value: dict[str, float]) -> dict[str, Any]:
    """What was counted, and the seconds that follow from it."""
    return {
        "read_bytes": sum(o.read for o in traffic.operations),
        "written_bytes": sum(o.written for o in traffic.operations),
        "flops": traffic.flops,
        "operations": len(traffic.operations),
        "launches": traffic.launches,
        "device_seconds": traffic.seconds(machine, per_value),
        "host_seconds": len(traffic.operations) * machine.launch,
    }


def kernels_of(found: Sequence[Traffic]) -> list[str]:
    """The Triton kernels that were launched, and whose instructions are known."""
    return sorted({o.name for traffic in found for o in traffic.operations if o.triton} & roof.WORK.keys())


def predicted(traffic: Traffic, machine: Machine, per_value: dict[str, float]) -> dict[str, Any]:
    """The figures of a step and of its parts, those that take longest first."""
    parts = {
        part: figures(of_part, machine, per_value) | {"operators": operators(of_part)}
        for part, of_part in traffic.parts().items()
    }
    in_order = dict(sorted(parts.items(), key=lambda item: -item[1]["device_seconds"]))
    return figures(traffic, machine, per_value) | {"parts": in_order}


# -- output ----------------------------------------------------------------------------------------------------------

_COUNTS = "moved, GB | TFLOP | operations | Triton launches | device, ms | host, ms"


def _cells(row: dict[str, Any]) -> str:
    return " | ".join(
        (
            f"{(row['read_bytes'] + row['written_bytes']) / 1e9:.2f}",
            f"{row['flops'] / 1e12:.3f}",
            f"{row['operations']:,}",
            f"{row['launches']:,}",
            f"{1e3 * row['device_seconds']:.2f}",
            f"{1e3 * row['host_seconds']:.2f}",
        )
    )


def _longer(row: dict[str, Any]) -> float:
    return float(max(row["device_seconds"], row["host_seconds"]))


def step_tables(model: str, rows: dict[str, Any]) -> str:
    """Markdown of one model: the steps, and the parts of those of twins."""
    lines = [f"## {model}", "", f"| network | {_COUNTS} | to {BASE} |", "| --- |" + " ---: |" * 7]
    for name, row in rows.items():
        to_base = f"{_longer(row) / _longer(rows[BASE]):.2f}" if BASE in rows else ""
        lines.append(f"| {name} | {_cells(row)} | {to_base} |")
    for name in (name for name in rows if name in TWINS):
        lines += ["", f"Parts of *{name}*:", "", f"| part | {_COUNTS} |", "| --- |" + " ---: |" * 6]
        lines += [f"| {part} | {_cells(row)} |" for part, row in rows[name]["parts"].items()]
    return "\n".join(lines)


def block_table(blocks: dict[str, Any], batch: int) -> str:
    """Markdown of the layers."""
    names = list(next(iter(blocks.values())))
    lines = [
        f"## Layers, forward and backward, batch {batch}",
        "",
        "Milliseconds of the device, and of the host in brackets.",
        "",
        f"| channels and maps, kernel | {' | '.join(names)} |",
        "| --- |" + " ---: |" * len(names),
    ]
    for shape, rows in blocks.items():
        cells = (f"{1e3 * rows[name]['device_seconds']:.2f} ({1e3 * rows[name]['host_seconds']:.2f})" for name in names)
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def assumptions(given: argparse.Namespace, machine: Machine) -> str:
    """What the seconds rest on."""
    full = machine.efficiency * machine.matmul / 1e12
    points = (
        f"Packed spectra keep {given.density:g} of their coefficients: the same in all layers, images included, and at "
        "all frequencies, without room to spare. Gradients are packed in the same patterns.",
        f"{machine.copy / 1e12:.1f} TB/s for whatever moves bytes. Nothing stays in a cache between two operations; "
        "of the chunks that a twin works on some would, and it would move less than is counted.",
        f"{full:.0f} TFLOP/s for products and convolutions in bf16, {machine.efficiency:g} of the peak, and "
        f"{machine.with_tf32().single / 1e12:.0f} in TF32. Products of a twin are in TF32.",
        "A Triton kernel moves what its contract says, or takes as long as its instructions: those of a coefficient in "
        "the first launch that `spectriton_kernels.roof` names, scaled by the taps where it loops over them.",
        "A Fourier transform is a kernel of cuFFT for each of its two dimensions (small maps may need but one), and "
        "another one for the norm; transforms to maps copy their input before.",
        f"{1e6 * machine.launch:g} µs of the host for an operator of PyTorch or a launch, nothing for a view or an "
        "allocation. A step takes what host or device takes, whichever is more.",
    )
    return "\n".join(textwrap.fill(f"* {point}", 120, subsequent_indent="  ") for point in points)


def document(stored: dict[str, Any], given: argparse.Namespace) -> str:
    """All tables."""
    sizes = f"batch {given.batch} of {given.image_size}x{given.image_size}, width {given.width:g}"
    parts = [
        f"# Steps of twins, predicted: {sizes}, density {given.density:g}",
        f"Counted for an H100; nothing is measured. A density of {given.density:g} is assumed.",
        assumptions(given, Machine()),
        *(step_tables(model, rows) for model, rows in stored["models"].items()),
    ]
    if stored["blocks"]:
        parts.append(block_table(stored["blocks"], given.block_batch))
    return "\n\n".join(parts) + "\n"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m bench.twin_step", description=(__doc__ or "").split("\n")[0])
    twins = [name for name in models.NETWORKS if not name.startswith("resnet")]
    parser.add_argument("--models", nargs="*", default=["vgg16"], choices=twins)
    parser.add_argument("--rows", nargs="+", default=[*SPATIAL, "spectral"], choices=NETWORKS, help="which networks")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--density", type=float, default=0.2, help="what packed spectra are assumed to keep")
    parser.add_argument("--blocks", action="store_true", help="single layers, too")
    parser.add_argument("--block-batch", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the figures here, and the tables beside it")
    found = parser.parse_args(given)
    if not 0 < found.density <= 1:
        parser.error(f"--density got {found.density:g}, expected more than 0 and at most 1")
    return found


def main(options: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = arguments(options)
    networks: dict[str, dict[str, Traffic]] = {model: {} for model in given.models}
    for model, rows in networks.items():
        for name in given.rows:
            rows[name] = count_network(name, model, given)
            print(f"{model}, {name}: counted", file=sys.stderr, flush=True)
    layers: dict[str, dict[str, Traffic]] = {}
    for shape in SHAPES if given.blocks else ():
        of_shape = layers[str(shape)] = {}
        for name, dtype in CONVOLUTIONS.items():
            of_shape[name] = count(partial(convolution, shape, given.block_batch, dtype), None)
        for name, kind in BLOCKS.items():
            of_shape[name] = count(partial(block, shape, given.block_batch, kind), given.density)
        print(f"{shape}: counted", file=sys.stderr, flush=True)
    machine = Machine().with_tf32()
    counted = [traffic for rows in (*networks.values(), *layers.values()) for traffic in rows.values()]
    per_value = instructions(kernels_of(counted))
    found = {
        "models": {
            model: {name: predicted(traffic, machine, per_value) for name, traffic in rows.items()}
            for model, rows in networks.items()
        },
        "blocks": {
            shape: {name: figures(traffic, machine, per_value) for name, traffic in rows.items()}
            for shape, rows in layers.items()
        },
    }
    text = document(found, given)
    if given.json is not None:
        config = {name: value for name, value in vars(given).items() if name != "json"}
        stored = found | {"measured": False, "machine": asdict(machine), "instructions_per_value": per_value}
        stored |= {"config": config, "environment": environment()}
        given.json.write_text(json.dumps(stored, indent=1) + "\n")
        given.json.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
