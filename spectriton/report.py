"""What a run shows and leaves behind: ``report.json``, the table at the end, progress on the way."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TextIO

import torch

from spectriton import environment
from spectriton.train import Progress

#: The networks, in the order they are trained and shown; a comparison has the first and one of the others.
VARIANTS = ("spatial", "spectral", "compressed")
#: What ``ratio`` holds, of the other network over the spatial one.
RATIO_KEYS = (
    "test_accuracy",
    "peak_bytes",
    "average_bytes",
    "saved_bytes",
    "peak_beyond_state_bytes",
    "average_beyond_state_bytes",
    "parameter_bytes",
    "seconds_per_epoch",
)

#: What ``ratio`` of a row of ``peers`` holds, over the spatial network alone.
PEER_RATIO_KEYS = (
    "peak_bytes",
    "average_bytes",
    "saved_bytes",
    "peak_beyond_state_bytes",
    "average_beyond_state_bytes",
    "seconds_per_step",
)

_ROWS = (
    ("test accuracy", "test_accuracy"),
    ("peak memory", "peak_bytes"),
    ("average memory", "average_bytes"),
    ("peak beyond state", "peak_beyond_state_bytes"),
    ("average beyond state", "average_beyond_state_bytes"),
    ("saved for backward", "saved_bytes"),
    ("parameters", "parameter_bytes"),
    ("time of an epoch", "seconds_per_epoch"),
)


def assemble(
    networks: Mapping[str, dict[str, Any]], config: dict[str, Any], device: torch.device | None = None
) -> dict[str, Any]:
    """A report of two networks' results by variant, the spatial one first, with ratios and the environment."""
    spatial, other = networks.values()
    return {
        **networks,
        "ratio": ratios(spatial, other),
        "config": config,
        "environment": environment.collect(device),
    }


def ratios(spatial: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float | None]:
    """One network's figures over another's; ``None`` where that is over zero."""
    return {key: other[key] / spatial[key] if spatial[key] else None for key in RATIO_KEYS}


def variants_of(report: Mapping[str, Any]) -> list[str]:
    """The networks that a report has."""
    return [variant for variant in VARIANTS if variant in report]


def peer_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of :func:`spectriton.peers.measure_peers` of both variants, each with ``ratio`` to the first, which is the
    spatial network alone. What could not be measured has ``None`` for every figure."""
    alone = rows[0]
    found = []
    for row in rows:
        figures = {key: row.get(key) for key in alone}
        known = row.get("saved_bytes") is not None
        ratio = {key: row[key] / alone[key] if known and alone[key] else None for key in PEER_RATIO_KEYS}
        found.append({**figures, "ratio": ratio})
    return found


def merge(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of several seeds' reports: means everywhere, ratios of the means, and the reports as ``runs``."""
    config = {**runs[0]["config"], "seeds": [run["config"]["seed"] for run in runs]}
    del config["seed"]
    merged = assemble({variant: mean_of([run[variant] for run in runs]) for variant in variants_of(runs[0])}, config)
    return {**merged, "environment": runs[0]["environment"], "runs": list(runs)}


def mean_of(values: Sequence[Any]) -> Any:
    """Mean of numbers, through dictionaries and lists of one structure."""
    first = values[0]
    if isinstance(first, dict):
        return {key: mean_of([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [mean_of(column) for column in zip(*values, strict=True)]
    return first if all(value == first for value in values) else mean(values)


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write strict JSON (no NaN), in one step: a reader sees the old file or the new one."""
    write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a file in one step: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def networks(config: Mapping[str, Any]) -> str:
    """The names of the networks of a report's settings."""
    return ", ".join(config.get("models") or [config["model"]])


def conditions(report: Mapping[str, Any]) -> str:
    """Under what conditions a report's numbers were found, in two lines."""
    config, env = report["config"], report["environment"]
    kept = f"{config['value_dtype']} values"
    if "threshold" in config:
        kept = f"threshold {config['threshold']:g}, {kept}"
    if "activation" in config:
        kept = f"{config['activation']}, {kept}"
    if "budget" in config:
        kept = f"saved bytes held to {config['budget']}, from {kept}"
    if config.get("method") == "compress":
        kept = f"maps compressed by {config['codec']}"
    seeds = config.get("seeds")
    parts = [
        f"{networks(config)} on {config['data']}",
        kept + (", as in the paper" if config["paper"] else ""),
        f"{config['epochs']} epoch{'' if config['epochs'] == 1 else 's'}",
        f"batch {config['batch_size']}",
        f"{config['optimizer']}, lr {config['lr']:g}",
        f"seeds {', '.join(map(str, seeds))}" if seeds else f"seed {config['seed']}",
    ]
    if config["amp"] != "none":
        parts.append(f"autocast {config['amp']}")
    if config.get("processes", 1) > 1:
        parts.append(f"{config['processes']} processes, memory of one")
    if config["width"] != 1:
        parts.append(f"width {config['width']:g}")
    if config["image_size"]:
        parts.append(f"resized to {config['image_size']}x{config['image_size']}")
    for part in ("train", "test"):
        if config[f"{part}_limit"]:
            parts.append(f"first {config[f'{part}_limit']} {part} images")
    device = env["gpu"] if config["device"] == "cuda" else f"CPU, {env['threads']} threads"
    versions = ", ".join(f"{name} {env[name]}" for name in ("spectriton", "torch", "triton") if env[name])
    return "; ".join(parts) + f"\n{device}; {env['backend']} backend; {versions}"


def format_bytes(count: float) -> str:
    """``1.5 MiB``; three significant digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1000 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"


def _format_seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _cell(key: str, report: Mapping[str, Any], variant: str) -> str:
    value = report[variant][key]
    if key == "test_accuracy":
        runs = report.get("runs", ())
        spread = f" ± {100 * stdev(run[variant][key] for run in runs):.2f}" if len(runs) > 1 else ""
        return f"{100 * value:.2f}{spread} %"
    return format_bytes(value) if key.endswith("bytes") else _format_seconds(value)


def rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The final table as text, its header first: what, each network, and, where both are, the one over the other."""
    variants = variants_of(report)
    both = len(variants) == 2
    table: list[tuple[str, ...]] = [("", *variants, *([f"{variants[1]} / spatial"] if both else []))]
    for title, key in _ROWS:
        row = [title, *(_cell(key, report, variant) for variant in variants)]
        if both and key == "test_accuracy":
            row.append(f"{100 * (report[variants[1]][key] - report['spatial'][key]):+.2f} points")
        elif both:
            ratio = report["ratio"][key]
            row.append("" if ratio is None else f"{100 * ratio:.1f} %")
        table.append(tuple(row))
    density = report.get("spectral", {}).get("density")
    if density:
        kept = f"{100 * mean(density.values()):.1f} %"
        table.append(("coefficients kept", *(["", kept, ""] if both else [kept])))
    return table


def peer_table(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of ``peers`` as text, the header first; percentages are of the spatial network alone."""
    columns = {
        "saved, %": "saved_bytes",
        "average\nbeyond\nstate, %": "average_beyond_state_bytes",
        "peak\nbeyond\nstate, %": "peak_beyond_state_bytes",
        "time, %": "seconds_per_step",
    }
    table: list[tuple[str, ...]] = [("one training step", *columns, "gradient\ndiffers by")]
    for row in rows:
        cells = ["" if row["ratio"][key] is None else f"{100 * row['ratio'][key]:.1f}" for key in columns.values()]
        difference = "" if row["gradient_difference"] is None else f"{row['gradient_difference']:.1e}"
        table.append((peer_name(row), *cells, difference))
    return table


def peer_name(row: Mapping[str, Any]) -> str:
    """``spatial + checkpoint``, say."""
    return str(row["variant"]) if row["peer"] == "none" else f"{row['variant']} + {row['peer']}"


def peer_notes(rows: Sequence[Mapping[str, Any]]) -> str:
    """How to read the table of peers, and what is special about a row."""
    lines = ["% of the spatial network alone; gradients against the same network alone, over their largest entry"]
    lines += [f"{peer_name(row)}: {row['note']}" for row in rows if row["note"]]
    return "\n".join(lines)


def print_report(report: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print the final table and its conditions, and before them the table of peers where the report has one.

    Raises:
        ImportError: rich is not installed.
    """
    if "peers" in report:
        print_table(peer_table(report["peers"]), peer_notes(report["peers"]), stream)
    print_table(rows(report), conditions(report), stream)


def print_table(rows: Iterable[tuple[str, ...]], note: str, stream: TextIO | None = None) -> None:
    """Print rows of text, their header first, with a note below.

    Raises:
        ImportError: rich is not installed.
    """
    console = environment.require("rich.console").Console(file=stream or sys.stdout)
    header, *body = rows
    table = environment.require("rich.table").Table(
        box=environment.require("rich.box").SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for position, title in enumerate(header):
        table.add_column(title, justify="right" if position else "left", no_wrap=True)
    for row in body:
        table.add_row(*row)
    console.print(table)
    console.print(note, style="dim", highlight=False, soft_wrap=True)


class PlainProgress:
    """Progress as lines, for logs: one an epoch, and one every half minute within long ones.

    Args:
        stream: where to write; standard error where left out, which leaves standard output to results.
        every_seconds: at least so long between lines within an epoch.
    """

    def __init__(self, stream: TextIO | None = None, every_seconds: float = 30.0) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._every = every_seconds
        self._title, self._epochs, self._batches, self._done, self._begun_at = "", 0, 0, 0, 0
        self._start = self._last = 0.0

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
        self._last = time.monotonic()

    def _left(self, done: int) -> str:
        fresh = done - self._begun_at
        left = self._epochs * self._batches - done
        if not fresh or not left:
            return ""
        return f"  about {_format_seconds((time.monotonic() - self._start) / fresh * left)} left"

    def begin(self, title: str, epochs: int, batches: int, done: int) -> None:
        """Training starts."""
        self._title, self._epochs, self._batches, self._begun_at = title, epochs, batches, done
        self._start = self._last = time.monotonic()
        if done >= epochs * batches:
            self._line(f"{title:<9} already trained for {epochs} epochs")
        elif done:
            self._line(f"{title:<9} goes on after {done / batches:.3g} epochs")

    def step(self, epoch: int, batch: int) -> None:
        """A step is over."""
        if time.monotonic() - self._last >= self._every:
            done = epoch * self._batches + batch + 1
            self._line(
                f"{self._title:<9} epoch {epoch + 1}/{self._epochs}  step {batch + 1}/{self._batches}{self._left(done)}"
            )

    def epoch(self, record: Mapping[str, Any]) -> None:
        """An epoch is over."""
        self._line(
            f"{self._title:<9} epoch {record['epoch']}/{self._epochs}  {_summary(record)}  "
            f"{_format_seconds(record['seconds'])}{self._left(record['epoch'] * self._batches)}"
        )

    def end(self) -> None:
        """Training is over."""


class BarProgress:
    """Progress as a bar with the time left, for terminals.

    Raises:
        ImportError: rich is not installed.
    """

    def __init__(self) -> None:
        self._rich = environment.require("rich.progress")
        self._console = environment.require("rich.console").Console(stderr=True)
        self._bar: Any = None
        self._task: Any = None
        self._title, self._epochs, self._batches = "", 0, 0

    def begin(self, title: str, epochs: int, batches: int, done: int) -> None:
        """Training starts."""
        rich = self._rich
        self._title, self._epochs, self._batches = title, epochs, batches
        self._bar = rich.Progress(
            rich.TextColumn("[bold]{task.fields[title]:<9}"),
            rich.TextColumn("epoch {task.fields[epoch]}"),
            rich.BarColumn(bar_width=None),
            rich.TaskProgressColumn(),
            rich.TextColumn("[dim]left"),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.fields[summary]}"),
            console=self._console,
            expand=True,
        )
        total = epochs * batches
        epoch = min(done // batches + 1, epochs)
        self._task = self._bar.add_task(
            "", total=total, completed=done, title=title, epoch=f"{epoch}/{epochs}", summary=""
        )
        self._bar.start()

    def step(self, epoch: int, batch: int) -> None:
        """A step is over."""
        self._bar.update(self._task, completed=epoch * self._batches + batch + 1, epoch=f"{epoch + 1}/{self._epochs}")

    def epoch(self, record: Mapping[str, Any]) -> None:
        """An epoch is over."""
        self._bar.update(self._task, summary=_summary(record))

    def end(self) -> None:
        """Training is over."""
        self._bar.stop()


def _summary(record: Mapping[str, Any]) -> str:
    return (
        f"loss {record['train_loss']:.4f}  train {100 * record['train_accuracy']:.2f} %  "
        f"test {100 * record['test_accuracy']:.2f} %"
    )


def progress_for_terminal() -> Progress:
    """A bar where standard error is a terminal, lines elsewhere."""
    return BarProgress() if sys.stderr.isatty() else PlainProgress()
