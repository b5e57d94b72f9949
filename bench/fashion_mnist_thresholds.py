"""The LeNet twins on Fashion-MNIST over thresholds: accuracy against bytes saved for backward.

    PYTHONPATH=.:kernels python -m bench.fashion_mnist_thresholds --data-dir DIR --out bench/results/NAME

Every cell is the recipe of ``spectriton compare`` (same seeds, same order of images). Finished cells are kept in the
output directory, so that a run that was cut short goes on, and several may fill one directory at a time
(``--seeds 0`` here, ``--seeds 1`` there). The table is written from the cells that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from spectriton import environment
from spectriton.compare import CompareConfig, train_variant
from spectriton.train import TrainConfig

THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)

#: Name of a row: variant, and settings that differ from the defaults.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "spatial": ("spatial", {}),
    "paper 0.5": ("spectral", {"threshold": 0.5, "paper": True}),
    **{f"int8 {t:g}": ("spectral", {"threshold": t, "value_dtype": "int8"}) for t in (0.25, 0.5)},
    **{f"default {t:g}": ("spectral", {"threshold": t}) for t in THRESHOLDS},
}
FIGURES = ("test_accuracy", "saved_bytes", "average_beyond_state_bytes", "peak_beyond_state_bytes", "seconds_per_epoch")


def read_cells(cells: Path) -> dict[str, list[dict[str, Any]]]:
    """The finished runs of each row, by its name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in ROWS:
        files = sorted(cells.glob(f"{row.replace(' ', '-')}-seed*.json"))
        if files:
            found[row] = [json.loads(file.read_text()) for file in files]
    return found


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table of the means over seeds; ratios are to the spatial network."""
    means = {row: {f: statistics.fmean(run[f] for run in runs) for f in FIGURES} for row, runs in found.items()}
    base = means.get("spatial")
    lines = [
        "| network | threshold | seeds | accuracy, % | to spatial | saved, KiB | saved | average | peak | density |",
        "|" + " --- |" * 10,
    ]
    for row, mean in means.items():
        runs = found[row]
        accuracies = [100 * run["test_accuracy"] for run in runs]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
        densities = [statistics.fmean(run["density"].values()) for run in runs if run.get("density")]
        name, _, threshold = row.partition(" ")
        ratios = ["", "", "", ""]
        if base is not None:
            ratios = [f"{100 * (mean['test_accuracy'] - base['test_accuracy']):+.2f}"]
            ratios += [f"{mean[f] / base[f]:.1%}" for f in FIGURES[1:4]]
        cells_of_row = [
            name,
            threshold,
            str(len(runs)),
            f"{statistics.fmean(accuracies):.2f}{spread}",
            ratios[0],
            f"{mean['saved_bytes'] / 1024:.0f}",
            *ratios[1:],
            f"{statistics.fmean(densities):.3f}" if densities else "",
        ]
        lines.append("| " + " | ".join(cells_of_row) + " |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, list[dict[str, Any]]], path: Path, conditions: str) -> None:
    """Accuracy against saved bytes, both relative to the spatial network; one point a row, bars over seeds."""
    figure = environment.require("matplotlib.figure").Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    spatial = found["spatial"]
    saved = statistics.fmean(run["saved_bytes"] for run in spatial)
    accuracy = statistics.fmean(run["test_accuracy"] for run in spatial)
    styles = {
        "default": ("o-", "#0072b2"),
        "paper": ("s", "#d55e00"),
        "int8": ("^-", "#cc79a7"),
    }
    labels = {"default": "default (learnt scale, float16)", "paper": "plain paper block (float32)"}
    for kind, (style, colour) in styles.items():
        points = []
        for row, runs in found.items():
            name, _, threshold = row.partition(" ")
            if name == kind:
                gaps = [100 * (run["test_accuracy"] - accuracy) for run in runs]
                share = 100 * statistics.fmean(run["saved_bytes"] for run in runs) / saved
                points.append(
                    (share, statistics.fmean(gaps), statistics.stdev(gaps) if len(gaps) > 1 else 0, threshold)
                )
        if points:
            shares, gaps, errors, thresholds = zip(*points, strict=True)
            axes.errorbar(
                shares,
                gaps,
                errors,
                fmt=style,
                color=colour,
                capsize=3,
                label=labels.get(kind, f"learnt scale, {kind}"),
            )
            for share, gap, threshold in zip(shares, gaps, thresholds, strict=True):
                axes.annotate(threshold, (share, gap), textcoords="offset points", xytext=(6, 5), fontsize=8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axhline(-1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("saved for backward, % of the spatial network (numbers: threshold)")
    axes.set_ylabel("accuracy, points to the spatial network")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.supxlabel(conditions, fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Fill what is missing, then write ``table.md`` and ``environment.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", help="only rows whose name contains this")
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion-mnist"), help="where checkpoints go")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    base = CompareConfig(
        data="fashion-mnist", data_dir=options.data_dir, train=TrainConfig(epochs=options.epochs, device="cpu")
    )
    data = base.load_data()
    for seed in (int(s) for s in options.seeds.split(",")):
        for row, (variant, settings) in ROWS.items():
            name = f"{row.replace(' ', '-')}-seed{seed}"
            cell = options.out / f"{name}.json"
            if cell.exists() or (options.rows and options.rows not in row):
                continue
            config = dataclasses.replace(base, train=dataclasses.replace(base.train, seed=seed), **settings)
            result = train_variant(config, variant, options.runs / name, data=data)
            cell.write_text(json.dumps({**result, "config": config.describe()}, indent=1))
            print(f"{name}: {result['test_accuracy']:.4f}, {result['saved_bytes']} bytes saved", flush=True)
    found, where = read_cells(options.out), environment.collect(base.train.resolve_device())
    (options.out / "table.md").write_text(table(found))
    (options.out / "environment.json").write_text(json.dumps(where, indent=1))
    if "spatial" in found:
        recipe = base.train
        conditions = (
            f"LeNet-5, Fashion-MNIST, {recipe.epochs} epochs, batch {recipe.batch_size}, lr {recipe.lr}, momentum "
            f"{recipe.momentum}, up to {len(found['spatial'])} seeds (bars: standard deviation), CPU, "
            f"torch {where['torch']}"
        )
        draw(found, options.out / "curve.png", conditions)
    print(table(found))


if __name__ == "__main__":
    main()
