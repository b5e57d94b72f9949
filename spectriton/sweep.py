"""Thresholds against memory and accuracy: the figures and tables of the paper, on the data and the machine at hand.

A sweep is made of *cells*, each one network trained from one seed: the spatial network once for each seed, its spectral
twin once for each seed and threshold. Every cell has a folder with its checkpoint and, when it is done, its result in
``cell.json``; a sweep that was cut short anywhere and is started again goes on from there and ends with the same
table. Tables are written after every cell, from the cells that are done.

======================  =============================================================================================
``sweep.json``          settings, environment, the table, and every cell with its history
``sweep.csv``           the table: a row for each network and threshold, means over seeds, fractions and bytes
``sweep.md``            the same to read, in percent, with the paper's figures where network and data are the paper's
``fig1.png``            relative average and peak memory, and error rate, against the threshold
``fig2.png``            training curves
======================  =============================================================================================
"""

from __future__ import annotations

import csv
import io
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from spectriton import _check, distributed, environment, report
from spectriton.compare import CompareConfig, build_network, train_variant
from spectriton.images import Images
from spectriton.measure import release_memory
from spectriton.plots import draw_sweep_curves, draw_thresholds
from spectriton.train import Progress

#: The paper's.
THRESHOLDS = (0.5, 0.75, 1.0, 1.25, 1.5)

#: What the paper (arXiv 1905.10915) prints of a network on a data set, as fractions: memory relative to the original,
#: accuracy and what it changes by.
PUBLISHED: dict[tuple[str, str], dict[str, float]] = {
    ("vgg16", "cifar10"): {"peak_ratio": 0.370, "test_accuracy": 0.918},
    ("densenet", "cifar10"): {"peak_ratio": 0.370, "test_accuracy": 0.925},
    ("alexnet", "imagenet"): {
        "peak_ratio": 0.481, "average_ratio": 0.493, "accuracy_change": -0.030, "top5_accuracy_change": -0.005,
    },
    ("vgg16", "imagenet"): {
        "peak_ratio": 0.424, "average_ratio": 0.467, "accuracy_change": -0.021, "top5_accuracy_change": -0.002,
    },
    ("densenet169", "imagenet"): {
        "peak_ratio": 0.366, "average_ratio": 0.408, "accuracy_change": -0.016, "top5_accuracy_change": -0.002,
    },
}  # fmt: skip

_NOT_BRIEF = ("seeds", "top-5 change, points", "average, %", "kept, %", "seconds an epoch")
_RATIOS = ("saved", "average", "peak", "average_beyond_state", "peak_beyond_state")


@dataclass(frozen=True)
class Cell:
    """One training run of a sweep.

    Attributes:
        model: name of the network.
        threshold: of the spectral twin; ``None`` for the spatial network.
        seed: of everything random.
    """

    model: str
    threshold: float | None
    seed: int

    @property
    def variant(self) -> str:
        """``"spatial"`` or ``"spectral"``."""
        return "spatial" if self.threshold is None else "spectral"

    @property
    def folder(self) -> Path:
        """Where it is kept, from the folder of the sweep on."""
        kind = "spatial" if self.threshold is None else f"threshold-{self.threshold:g}"
        return Path(self.model) / f"{kind}-seed-{self.seed}"

    def __str__(self) -> str:
        kind = "spatial" if self.threshold is None else f"threshold {self.threshold:g}"
        return f"{self.model}, {kind}, seed {self.seed}"

    def config(self, base: CompareConfig) -> CompareConfig:
        """The settings of this run. What only spectral networks have is left at its default for the spatial one."""
        run = replace(base, model=self.model, train=replace(base.train, seed=self.seed))
        if self.threshold is not None:
            return replace(run, threshold=self.threshold)
        default = CompareConfig()
        spectral = ("threshold", "value_dtype", "activation", "paper")
        return replace(run, **{name: getattr(default, name) for name in spectral})


@dataclass(frozen=True)
class Row:
    """A row of the table: means over seeds. Ratios and changes are to the spatial network of the same seeds.

    Attributes:
        network: its name.
        variant: ``"spatial"``, ``"spectral"``, or ``"published"`` for what the paper prints.
        threshold: of a spectral network.
        seeds: number of runs.
        test_accuracy, test_accuracy_sd: fraction, and its standard deviation over seeds (from two on).
        accuracy_change, top5_accuracy_change: fraction; top five from 100 classes on.
        saved_ratio, average_ratio, peak_ratio: of what is held for backward, and of everything alive.
        average_beyond_state_ratio, peak_beyond_state_ratio: without parameters, gradients and optimiser state.
        saved_bytes, average_bytes, peak_bytes, average_beyond_state_bytes, peak_beyond_state_bytes, parameter_bytes:
            of one training step.
        density: fraction of coefficients kept, as the mean over blocks.
        seconds_per_epoch: of training.
    """

    network: str
    variant: str
    threshold: float | None = None
    seeds: int | None = None
    test_accuracy: float | None = None
    test_accuracy_sd: float | None = None
    accuracy_change: float | None = None
    top5_accuracy_change: float | None = None
    saved_ratio: float | None = None
    average_ratio: float | None = None
    peak_ratio: float | None = None
    average_beyond_state_ratio: float | None = None
    peak_beyond_state_ratio: float | None = None
    saved_bytes: float | None = None
    average_bytes: float | None = None
    peak_bytes: float | None = None
    average_beyond_state_bytes: float | None = None
    peak_beyond_state_bytes: float | None = None
    parameter_bytes: float | None = None
    density: float | None = None
    seconds_per_epoch: float | None = None


def sweep(
    config: CompareConfig,
    out_dir: str | os.PathLike[str],
    *,
    models: Sequence[str] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    seeds: Sequence[int] | None = None,
    data: Images | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    stop: threading.Event | None = None,
    plots: bool = True,
) -> dict[str, Any]:
    """Train every cell that is not done, and write tables and figures to ``out_dir``.

    Args:
        config: everything but network, threshold and seed.
        out_dir: directory for cells and results; made where missing.
        models: networks by name; the config's where left out.
        thresholds: for the spectral networks, moduli of the ortho spectrum.
        seeds: repeat everything for each of these; the config's own seed where left out.
        data: images of your own instead of ``config.data``.
        progress, stop: as in :func:`spectriton.train.train`.
        fresh: start anew.
        plots: draw the figures, which needs matplotlib.

    Returns:
        What ``sweep.json`` holds: ``config``, ``environment``, ``rows`` (see :class:`Row`) and ``cells``.

    Raises:
        ValueError: bad settings, or a checkpoint that is damaged or of another configuration.
        ImportError: ``plots`` without matplotlib.
        spectriton.train.Interrupted: ``stop`` was set.
    """
    if plots:
        environment.require("matplotlib.figure")  # missing, it should say so now, not after hours of training
    networks = _distinct("models", [config.model] if models is None else models)
    levels = sorted(_distinct("thresholds", thresholds))
    chosen_seeds = _distinct("seeds", [config.train.seed] if seeds is None else seeds)
    # Seeds come last, so that a sweep that is not finished has something to say about every network.
    cells = [Cell(model, level, seed) for seed in chosen_seeds for model in networks for level in (None, *levels)]
    configs = {cell: cell.config(config) for cell in cells}
    data = data if data is not None else config.load_data()
    with torch.device("meta"):  # settings that the last network refuses should not cost the first one's hours
        for cell in cells[: len(networks) * (1 + len(levels))]:
            build_network(configs[cell], data, cell.variant)

    out = Path(out_dir)
    described = {
        **{key: value for key, value in config.describe().items() if key not in ("model", "threshold", "seed")},
        "data": data.name,
        "models": networks,
        "thresholds": levels,
        "seeds": chosen_seeds,
    }
    result: dict[str, Any] = {}
    done: dict[Cell, dict[str, Any]] = {}
    for number, cell in enumerate(cells, 1):
        done[cell] = _run(
            cell, configs[cell], out / cell.folder, data, f"{number}/{len(cells)} {cell}", progress, fresh, stop
        )
        result = {
            "config": described,
            "environment": environment.collect(config.train.resolve_device()),
            "rows": [asdict(row) for row in table(done, data.name)],
            "cells": [{**asdict(cell), "variant": cell.variant, **entry} for cell, entry in done.items()],
        }
        distributed.on_main(_write, result, out)
    if plots:
        distributed.on_main(draw_thresholds, result, out / "fig1.png")
        distributed.on_main(draw_sweep_curves, result, out / "fig2.png")
    return result


def _distinct(name: str, values: Sequence[Any]) -> list[Any]:
    if not values:
        _check.fail("sweep", name, "none", "at least one", f"give --{name}, or leave it out")
    return list(dict.fromkeys(values))


def _run(
    cell: Cell,
    config: CompareConfig,
    place: Path,
    data: Images,
    title: str,
    progress: Progress | None,
    fresh: bool,
    stop: threading.Event | None,
) -> dict[str, Any]:
    """The result of a cell, from its file where that is of the same settings and images."""
    path = place / "cell.json"
    key = {"variant": cell.variant, "images": data.fingerprint(), "config": config.describe()}
    if fresh:
        distributed.on_main(path.unlink, missing_ok=True)
    found = distributed.on_main(_finished, path, key)
    if found is not None:
        return found
    entry = train_variant(
        config, cell.variant, place, data=data, title=title, progress=progress, fresh=fresh, stop=stop
    )
    release_memory()
    distributed.on_main(report.write_json, {"key": key, "result": entry}, path)
    return entry


def _finished(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result in a cell's file; ``None`` where there is none, or one of other settings."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return dict(found["result"]) if found["key"] == key else None
    except (OSError, ValueError, LookupError, TypeError):
        return None  # missing, or no cell: the checkpoint decides


def table(done: Mapping[Cell, Mapping[str, Any]], data_name: str) -> list[Row]:
    """The table of the cells that are done: for each network the spatial one, its twins, and what the paper prints."""
    rows: list[Row] = []
    for model in dict.fromkeys(cell.model for cell in done):
        spatial = {cell.seed: entry for cell, entry in done.items() if (cell.model, cell.threshold) == (model, None)}
        for level in dict.fromkeys(cell.threshold for cell in done if cell.model == model):
            runs = {cell.seed: entry for cell, entry in done.items() if (cell.model, cell.threshold) == (model, level)}
            rows.append(_row(model, level, runs, {seed: spatial[seed] for seed in runs}))
        published = PUBLISHED.get((model.removesuffix("_bn"), data_name))
        if published:
            rows.append(Row(model, "published", **published))  # type: ignore[arg-type]
    return rows


def _row(
    model: str, level: float | None, runs: Mapping[int, Mapping[str, Any]], spatial: Mapping[int, Mapping[str, Any]]
) -> Row:
    means, base = (report.mean_of(list(entries.values())) for entries in (runs, spatial))
    accuracies = [entry["test_accuracy"] for entry in runs.values()]
    top5 = [entries["history"][-1].get("test_top5_accuracy") for entries in (means, base)]
    ratios = report.ratios(base, means)
    return Row(
        model,
        "spatial" if level is None else "spectral",
        threshold=level,
        seeds=len(runs),
        test_accuracy=means["test_accuracy"],
        test_accuracy_sd=stdev(accuracies) if len(accuracies) > 1 else None,
        accuracy_change=means["test_accuracy"] - base["test_accuracy"],
        top5_accuracy_change=None if top5[0] is None else top5[0] - top5[1],
        density=mean(means["density"].values()) if means.get("density") else None,
        seconds_per_epoch=means["seconds_per_epoch"],
        parameter_bytes=means["parameter_bytes"],
        **{f"{kind}_ratio": ratios[f"{kind}_bytes"] for kind in _RATIOS},
        **{f"{kind}_bytes": means[f"{kind}_bytes"] for kind in _RATIOS},
    )


def _write(result: Mapping[str, Any], out: Path) -> None:
    report.write_json(result, out / "sweep.json")
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(result["rows"])
    report.write_text(stream.getvalue(), out / "sweep.csv")
    report.write_text(_markdown(result), out / "sweep.md")


def _percent(value: float | None, form: str) -> str:
    return "" if value is None else format(100 * value, form)


def text_rows(result: Mapping[str, Any], brief: bool = False) -> Iterator[tuple[str, ...]]:
    """The table in words and percent, its header first; columns that stay empty are left out.

    Args:
        result: as :func:`sweep` returns it.
        brief: only what fits a terminal of 80 characters, with the header in lines.
    """
    rows = result["rows"]
    accuracies = [_percent(row["test_accuracy"], ".2f") for row in rows]
    spreads = ["" if row["test_accuracy_sd"] is None else f" ± {100 * row['test_accuracy_sd']:.2f}" for row in rows]
    seconds = [row["seconds_per_epoch"] for row in rows]
    columns = {
        "network": [row["network"] for row in rows],
        "threshold": [row["variant"] if row["threshold"] is None else f"{row['threshold']:g}" for row in rows],
        "seeds": ["" if row["seeds"] is None else str(row["seeds"]) for row in rows],
        "accuracy, %": [accuracy + spread for accuracy, spread in zip(accuracies, spreads, strict=True)],
        "change, points": [_percent(row["accuracy_change"], "+.2f") for row in rows],
        "top-5 change, points": [_percent(row["top5_accuracy_change"], "+.2f") for row in rows],
        **{f"{kind.replace('_', ' ')}, %": [_percent(row[f"{kind}_ratio"], ".1f") for row in rows] for kind in _RATIOS},
        "kept, %": [_percent(row["density"], ".1f") for row in rows],
        "seconds an epoch": ["" if value is None else f"{value:.3g}" for value in seconds],
    }
    if brief:
        columns = {"\n".join(title.split()): cells for title, cells in columns.items() if title not in _NOT_BRIEF}
    return zip(*((title, *cells) for title, cells in columns.items() if any(cells)), strict=True)


def _markdown(result: Mapping[str, Any]) -> str:
    header, *body = text_rows(result)
    lines = [header, ("---",) * len(header), *body]
    written = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    note = (
        "Memory is of one training step, in percent of the spatial network: *saved* for backward; *average* and *peak* "
        "of everything alive; *beyond state* without parameters, gradients and optimiser state."
    )
    if any(row["variant"] == "published" for row in result["rows"]):
        note += " *Published* figures are those of arXiv 1905.10915, as printed there."
    return f"{written}\n\n{note}\n\n" + report.conditions(result).replace("\n", "  \n") + "\n"
