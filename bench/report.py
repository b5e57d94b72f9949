"""Stored results as a Markdown table and a plot: ``python -m bench.report results.json [more.json ...]``.

Reads what ``pytest bench --benchmark-json=results.json`` wrote; several files are put one after another. The table is
printed and written beside the first file (``results.md``); where matplotlib is installed, a bar plot for each set of
conditions goes next to it (``results.png``).

A group's contenders come fastest first. GB/s counts the bytes that the op has to move; "of memcpy" compares that with
a ``clone`` of as many bytes in the same run; peak is what one call needs beyond its inputs; speed-up is against the
fastest contender of the group that is not spectriton's. See ``bench/timing.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD = ("contender", "median ms", "p20 to p80 ms", "GB/s", "of memcpy", "peak MiB", "speed-up")
OURS, THEIRS = "#c2410c", "#94a3b8"


@dataclass(frozen=True)
class Row:
    """A contender in a group; figures that a file does not hold are None.

    Attributes:
        conditions: what it was measured on and with.
        group, contender: who, and in what.
        baseline: not spectriton's.
        median, p20, p80: milliseconds.
        rate, share: GB/s, and that over a memcpy's.
        peak: bytes.
    """

    conditions: str
    group: str
    contender: str
    baseline: bool
    median: float
    p20: float | None
    p80: float | None
    rate: float | None
    share: float | None
    peak: int | None


def conditions_of(info: dict[str, Any]) -> str:
    """One line: device, versions, commit."""
    parts = [
        str(info.get("device", "unknown device")),
        f"{info.get('backend', 'unknown')} backend",
        *(f"{name} {info[name]}" for name in ("torch", "triton", "python") if name in info),
        *([f"{info['threads']} CPU thread{'s' * (info['threads'] != 1)}"] if "threads" in info else []),
        f"commit {info.get('commit', 'unknown')}",
        *(["QUICK RUN, for shape only"] if info.get("quick") else []),
    ]
    return ", ".join(parts)


def read(path: Path) -> list[Row]:
    """The rows of a file of pytest-benchmark.

    Raises:
        ValueError: it is not one.
    """
    stored = json.loads(path.read_text())
    if not isinstance(stored, dict) or "benchmarks" not in stored:
        raise ValueError(f"bench.report: {path.name} got no benchmarks; pass a file of pytest --benchmark-json")
    rows = []
    for entry in stored["benchmarks"]:
        info, stats = entry.get("extra_info", {}), entry["stats"]
        contender = info.get("contender", entry["name"])
        rows.append(
            Row(
                conditions_of(info),
                entry.get("group") or "(no group)",
                contender,
                bool(info.get("baseline", not contender.startswith("spectriton"))),
                info.get("median_ms", 1e3 * stats["median"]),
                info.get("p20_ms"),
                info.get("p80_ms"),
                info.get("gb_per_s"),
                info.get("memcpy_fraction"),
                info.get("peak_bytes"),
            )
        )
    return rows


def grouped(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows by conditions and group in the order they came, contenders fastest first."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row.conditions, {}).setdefault(row.group, []).append(row)
    for of_group in groups.values():
        for members in of_group.values():
            members.sort(key=lambda row: row.median)
    return groups


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits without an exponent; nothing for None."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def markdown(rows: Sequence[Row]) -> str:
    """All tables."""
    lines = ["# Benchmarks"]
    for conditions, groups in grouped(rows).items():
        lines += ["", f"{conditions}."]
        for group, members in groups.items():
            baselines = [row.median for row in members if row.baseline]
            lines += ["", f"## {group}", "", f"| {' | '.join(HEAD)} |", f"| --- |{' ---: |' * (len(HEAD) - 1)}"]
            for row in members:
                cells = (
                    row.contender if row.baseline else f"**{row.contender}**",
                    number(row.median),
                    "" if row.p20 is None else f"{number(row.p20)} to {number(row.p80)}",
                    number(row.rate),
                    "" if row.share is None else f"{100 * row.share:.{1 if row.share < 0.1 else 0}f} %",
                    "" if row.peak is None else number(row.peak / 2**20),
                    f"{min(baselines) / row.median:.2f}" if baselines else "",
                )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(groups: dict[str, list[Row]], conditions: str, path: Path) -> bool:
    """Bars of median times with the range from p20 to p80, one panel a group; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    columns = min(3, len(groups))
    panels = list(groups.items())
    heights = [
        max(len(members) for _, members in panels[first : first + columns]) for first in range(0, len(panels), columns)
    ]
    # Inches: a bar, and title and axis of a panel.
    height = sum(0.24 * bars + 0.85 for bars in heights) + 0.4
    figure = Figure(figsize=(6.2 * columns, height), layout="constrained")
    axes = figure.subplots(
        len(heights), columns, squeeze=False, gridspec_kw={"height_ratios": [0.24 * bars + 0.2 for bars in heights]}
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (group, members) in zip(axes.flat, panels, strict=False):
        medians = [row.median for row in members]
        whiskers = [
            [max(0.0, row.median - (row.p20 if row.p20 is not None else row.median)) for row in members],
            [max(0.0, (row.p80 if row.p80 is not None else row.median) - row.median) for row in members],
        ]
        axis.barh(
            [row.contender for row in members],
            medians,
            xerr=whiskers,
            color=[THEIRS if row.baseline else OURS for row in members],
            error_kw={"elinewidth": 0.8, "capsize": 2},
        )
        axis.invert_yaxis()
        axis.set_title(group, fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
        axis.set_xlabel("ms", fontsize=7, loc="right", labelpad=1)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"{conditions}. Median, whiskers from p20 to p80.", fontsize=8)
    figure.savefig(path, dpi=120)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="files of pytest --benchmark-json")
    parser.add_argument("--out", type=Path, help="the Markdown file; default: beside the first file")
    given = parser.parse_args(arguments)
    out = given.out or given.results[0].with_suffix(".md")
    rows = [row for path in given.results for row in read(path)]
    text = markdown(rows)
    out.write_text(text)
    print(text)
    for place, (conditions, groups) in enumerate(grouped(rows).items()):
        picture = out.with_name(f"{out.stem}{f'-{place + 1}' if place else ''}.png")
        if not plot(groups, conditions, picture):
            print("no plot: matplotlib is not installed", file=sys.stderr)
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
