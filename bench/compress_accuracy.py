"""Accuracy against bytes saved for backward, for several ways to save them, by training the same network.

    PYTHONPATH=.:kernels python -m bench.compress_accuracy --data-dir DIR --out bench/results/NAME

Each cell (a row of the table and a seed) is one training run of :func:`spectriton.train.train`: the same initial
weights, the same order of images. Finished cells are kept as JSON in the output directory and cut runs in ``--runs``,
so that the command goes on where it was stopped; several may fill one directory (``--seeds 0`` here, ``--rows dct``
there). Table and figure are made of the cells that are there.

*dct*, *fft*, *quantise* and *cast* are :func:`spectriton.compress` with these transforms, at so many bits per value.
*checkpointing* runs the network in about as many segments as the root of its layers, which is what saves most; where it
runs batch norm a second time, running statistics are updated a second time. *bf16* is autocast.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spectriton import environment, models
from spectriton.codec import make_codec
from spectriton.compare import measure_step
from spectriton.compression import compress
from spectriton.data import load
from spectriton.images import Images
from spectriton.train import Checkpoint, TrainConfig, seed_everything, train


class Row(NamedTuple):
    """How the network of a row is trained.

    Attributes:
        codec: arguments of :func:`spectriton.codec.make_codec`; None for exact maps.
        amp: as in :class:`spectriton.train.TrainConfig`.
        checkpointed: run in segments.
    """

    codec: dict[str, Any] | None = None
    amp: str = "none"
    checkpointed: bool = False


def _blocks(bits_per_value: float) -> dict[str, Any]:
    return {"transform": "dct", "density": 0.25, "bits": 4 * bits_per_value}


#: Rows by name: the kind, and its bits per value.
ROWS = {
    "exact": Row(),
    "bf16": Row(amp="bf16"),
    "checkpointing": Row(checkpointed=True),
    **{f"dct {bits:g}": Row(_blocks(bits)) for bits in (2, 1.75, 1.5, 1, 0.5)},
    "dct+bf16 1": Row(_blocks(1), amp="bf16"),
    "fft 1.5": Row({"transform": "fft", "density": 0.25, "bits": 4}),
    **{f"quantise {bits}": Row({"transform": "none", "bits": bits}) for bits in (4, 2, 1)},
    "cast 16": Row({"transform": "cast", "bits": 16}),
}
BYTES = ("saved_bytes", "average_beyond_state_bytes", "peak_beyond_state_bytes")


class CheckpointedSequential(nn.Sequential):
    """``nn.Sequential`` that keeps the inputs of segments only, and runs all but the last again in backward."""

    def segments(self) -> Iterator[nn.Sequential]:
        # What works in place must not come first: it would change what the segment before it keeps.
        parts: list[list[nn.Module]] = []
        for module in self:
            if parts and getattr(module, "inplace", False):
                parts[-1].append(module)
            else:
                parts.append([module])
        length = math.ceil(len(parts) / round(math.sqrt(len(parts))))
        for first in range(0, len(parts), length):
            yield nn.Sequential(*(module for part in parts[first : first + length] for module in part))

    def forward(self, input: Tensor) -> Tensor:
        *segments, last = self.segments()
        for segment in segments:
            input = checkpoint(segment, input, use_reentrant=False) if self.training else segment(input)
        output: Tensor = last(input)
        return output


def run_cell(name: str, seed: int, data: Images, recipe: TrainConfig, network: dict[str, Any], runs: Path) -> Any:
    """Train and measure one cell, going on from where it was cut short."""
    row = ROWS[name]
    recipe = dataclasses.replace(recipe, seed=seed, amp=row.amp)
    seed_everything(seed)
    model = models.build(
        variant="spatial",
        num_classes=data.num_classes,
        in_channels=data.channels,
        image_size=data.image_size,
        **network,
    )
    if row.codec is not None:
        compress(model, codec=make_codec(**row.codec))
    if row.checkpointed:
        model.__class__ = CheckpointedSequential
    identity = {**network, "codec": json.dumps(row.codec), "checkpointed": row.checkpointed}
    path = runs / f"{cell_name(name, seed)}.pt"
    result = train(model, data, recipe, title=name, checkpoint=Checkpoint(path, identity))
    figures = {
        "test_accuracy": result.test_accuracy,
        "seconds_per_epoch": result.seconds_per_epoch,
        "history": result.history,
        **measure_step(model, data, recipe),
    }
    del model
    gc.collect()
    return figures


def cell_name(row: str, seed: int | str) -> str:
    """Of the files of a cell."""
    return f"{row.replace(' ', '-')}-seed{seed}"


def read_cells(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The finished cells of each row, by seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in ROWS:
        for file in sorted(folder.glob(f"{cell_name(row, '*')}.json")):
            cell = json.loads(file.read_text())
            found.setdefault(row, {})[cell["seed"]] = cell
    return found


def changes(cells: dict[int, dict[str, Any]], exact: dict[int, dict[str, Any]]) -> list[float]:
    """Points of accuracy to the exact network of the same seed."""
    return [100 * (cells[seed]["test_accuracy"] - exact[seed]["test_accuracy"]) for seed in cells if seed in exact]


def _with_spread(values: list[float], digits: str) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{digits}}{spread}"


def table(found: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Markdown: means over seeds, ± standard deviations; bytes are of one training step."""
    exact = found.get("exact", {})
    lines = [
        "| method | seeds | accuracy, % | to exact, points | saved, KiB | saved | average | peak | time |",
        "| --- |" + " ---: |" * 8,
    ]
    for row, cells in found.items():
        of_row = list(cells.values())
        means = {key: statistics.fmean(c[key] for c in of_row) for key in (*BYTES, "seconds_per_epoch")}
        ratios = [""] * 4
        if exact:
            base = {key: statistics.fmean(c[key] for c in exact.values()) for key in means}
            ratios = [f"{means[key] / base[key]:.1%}" for key in means]
        columns = (
            row,
            str(len(of_row)),
            _with_spread([100 * c["test_accuracy"] for c in of_row], ".2f"),
            "" if row == "exact" else _with_spread(changes(cells, exact), "+.2f"),
            f"{means['saved_bytes'] / 1024:,.0f}",
            *ratios,
        )
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, dict[int, dict[str, Any]]], path: Path, conditions: str) -> None:
    """Accuracy against saved bytes, both to the exact network; bars are standard deviations over seeds."""
    figure = environment.require("matplotlib.figure").Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.subplots()
    exact = found["exact"]
    base = statistics.fmean(cell["saved_bytes"] for cell in exact.values())
    styles = {
        "dct": ("o-", "#0072b2", "compress, dct of blocks"),
        "dct+bf16": ("o", "#56b4e9", "the same under bf16 autocast"),
        "fft": ("D", "#009e73", "compress, fft of maps"),
        "quantise": ("s-", "#d55e00", "compress, quantised only"),
        "cast": ("P", "#000000", "compress, bfloat16"),
        "bf16": ("^", "#cc79a7", "bf16 autocast"),
        "checkpointing": ("v", "#e69f00", "checkpointing"),
    }
    for kind, (style, colour, label) in styles.items():
        points = []
        for row, cells in found.items():
            name, _, setting = row.partition(" ")
            gaps = changes(cells, exact)
            if name == kind and gaps:
                share = 100 * statistics.fmean(cell["saved_bytes"] for cell in cells.values()) / base
                deviation = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
                points.append((share, statistics.fmean(gaps), deviation, setting))
        if points:
            shares, gaps, errors, settings = zip(*sorted(points), strict=True)
            axes.errorbar(shares, gaps, errors, fmt=style, color=colour, capsize=3, label=label)
            for share, gap, setting in zip(shares, gaps, settings, strict=True):
                axes.annotate(setting, (share, gap), textcoords="offset points", xytext=(6, 5), fontsize=8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("saved for backward, % of the exact network (numbers: bits per value)")
    axes.set_ylabel("accuracy, points to the exact network")
    # From a few to a hundred percent: the small shares are of interest.
    axes.set_xscale("log")
    axes.set_xticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.supxlabel(conditions, fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Fill what is missing, then write ``table.md``, ``curve.png`` and ``environment.json``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/compress-accuracy"), help="where cut runs are kept")
    parser.add_argument("--model", default="resnet18", help="a name that spectriton.models.build knows")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--train-limit", type=int)
    parser.add_argument("--test-limit", type=int)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--lr-halve-every", type=int, default=50, help="epochs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", help=f"only rows whose name contains this; all: {', '.join(ROWS)}")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    limits = {"train_limit": options.train_limit, "test_limit": options.test_limit}
    data = load(options.data, data_dir=options.data_dir, image_size=options.image_size, **limits)
    recipe = TrainConfig(
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        lr_halve_every=options.lr_halve_every,
        device=options.device,
    )
    network = {"name": options.model, "width": options.width}
    config = {**network, "data": options.data, **limits, **dataclasses.asdict(recipe), "image_size": data.image_size}
    del config["seed"], config["amp"]
    for seed in (int(s) for s in options.seeds.split(",")):
        for row in ROWS:
            name = cell_name(row, seed)
            file = options.out / f"{name}.json"
            if options.rows and options.rows not in row:
                continue
            if file.exists():
                if json.loads(file.read_text())["config"] != config:
                    parser.error(f"{file} is of another configuration; choose another --out")
                continue
            cell = run_cell(row, seed, data, recipe, network, options.runs)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps({"row": row, "seed": seed, "config": config, **cell}, indent=1) + "\n")
            partial.replace(file)
            print(f"{name}: {cell['test_accuracy']:.4f}, {cell['saved_bytes']} bytes saved", flush=True)
    found, where = read_cells(options.out), environment.collect(recipe.resolve_device())
    (options.out / "table.md").write_text(table(found))
    (options.out / "environment.json").write_text(json.dumps(where, indent=1) + "\n")
    if "exact" in found and len(found) > 1:
        conditions = (
            f"{options.model}, width {options.width:g}, {options.data} at {data.image_size}x{data.image_size}, "
            f"{recipe.epochs} epochs, batch {recipe.batch_size}, lr {recipe.lr:g}, up to {len(found['exact'])} seeds "
            f"(bars: standard deviation); {where['gpu'] or 'CPU'}, torch {where['torch']}"
        )
        draw(found, options.out / "curve.png", conditions)
    print(table(found))


if __name__ == "__main__":
    main()
