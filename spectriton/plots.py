"""Figures of a run, with the conditions they were found under. Colours are told apart by the colour-blind."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from spectriton import environment
from spectriton.report import conditions, networks, variants_of

# Okabe and Ito's blue and vermillion; line style and hatching tell the two apart in grey as well. The dashed line lies
# on top, so that both are seen where they agree.
_STYLE = {
    "spatial": {"color": "#0072B2", "linestyle": "--", "marker": "s", "zorder": 4},
    "spectral": {"color": "#D55E00", "linestyle": "-", "marker": "o", "zorder": 3},
    "compressed": {"color": "#009E73", "linestyle": "-", "marker": "^", "zorder": 3},
}
# Okabe and Ito's others, and markers that go with them, for networks beside one another.
_NETWORKS = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
    ("#8C564B", "*"),
)
_GREY = "#555555"
_MIB = float(1 << 20)
_PEER_PANELS = (
    ("saved, % of spatial alone", "saved_bytes"),
    ("average beyond state, %", "average_beyond_state_bytes"),
    ("peak beyond state, %", "peak_beyond_state_bytes"),
)
_KINDS = (("average", "-"), ("peak", "--"))


def _figure(width: float, height: float) -> Any:
    # A Figure of its own: pyplot would choose a backend for the whole process and keep the figure alive.
    return environment.require("matplotlib.figure").Figure(figsize=(width, height), dpi=150, layout="constrained")


def _finish(figure: Any, title: str, report: Mapping[str, Any], path: Path) -> None:
    config = report["config"]
    figure.suptitle(f"{title}: {networks(config)} on {config['data']}", fontsize=12, fontweight="bold")
    # Some 17 characters an inch.
    lines = (textwrap.fill(line, int(17 * figure.get_figwidth())) for line in conditions(report).splitlines())
    figure.supxlabel("\n".join(lines), fontsize=7, color=_GREY)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _tidy(axes: Any, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def draw_curves(report: Mapping[str, Any], path: Path) -> None:
    """Accuracy and loss against the epoch, for whichever networks the report has.

    Test curves are full, training curves faint. With several seeds the single runs are thin lines behind their mean.

    Args:
        report: as :func:`spectriton.compare.compare` returns it; one of the two networks may be missing.
        path: PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(8.0, 3.9)
    panels = figure.subplots(1, 2)
    ticker = environment.require("matplotlib.ticker")
    for axes, quantity, scale, label in (
        (panels[0], "accuracy", 100.0, "accuracy (%)"),
        (panels[1], "loss", 1.0, "cross entropy"),
    ):
        for variant, style in _STYLE.items():
            if variant not in report:
                continue
            for run in report.get("runs", ()):
                history = run[variant]["history"]
                axes.plot(
                    [record["epoch"] for record in history],
                    [scale * record[f"test_{quantity}"] for record in history],
                    color=style["color"],
                    linewidth=0.6,
                    alpha=0.5,
                )
            history = report[variant]["history"]
            epochs = [record["epoch"] for record in history]
            axes.plot(
                epochs,
                [scale * record[f"train_{quantity}"] for record in history],
                color=style["color"],
                linestyle=":",
                linewidth=1.2,
                zorder=style["zorder"],
                label=f"{variant}, training",
            )
            axes.plot(
                epochs,
                [scale * record[f"test_{quantity}"] for record in history],
                label=f"{variant}, test",
                linewidth=1.8,
                markersize=4,
                markevery=max(1, len(epochs) // 12),
                **style,
            )
        axes.set_xlabel("epoch")
        axes.set_title(label, loc="left", fontsize=10)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        _tidy(axes, "both")
    panels[1].set_ylim(0, 1.05 * panels[1].get_ylim()[1])
    panels[1].legend(fontsize=8, frameon=False, handlelength=3.5)
    _finish(figure, "Training", report, path)


def draw_memory(report: Mapping[str, Any], path: Path) -> None:
    """Memory of one training step of both networks, and the density of each packing block; below, peers if any.

    Args:
        report: as :func:`spectriton.compare.compare` returns it.
        path: PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    other = variants_of(report)[1]
    density = report[other].get("density", {})
    height = max(3.9, 2.2 + 0.22 * len(density))
    if "peers" in report:
        figure = _figure(9.0, height + 3.2)
        upper, lower = figure.subfigures(2, 1, height_ratios=(height, 3.2))
        _draw_peers(report["peers"], lower)
    else:
        figure = upper = _figure(9.0, height)
    panels = upper.subplots(1, 2, width_ratios=(3, 2), squeeze=False)[0] if density else [upper.subplots()]
    left = panels[0]
    bars = (
        ("saved for\nbackward", "saved_bytes"),
        ("average\nbeyond state", "average_beyond_state_bytes"),
        ("peak\nbeyond state", "peak_beyond_state_bytes"),
        ("average", "average_bytes"),
        ("peak", "peak_bytes"),
    )
    for offset, variant in ((-0.2, "spatial"), (0.2, other)):
        heights = [report[variant][key] / _MIB for _, key in bars]
        drawn = left.bar(
            [position + offset for position in range(len(bars))],
            heights,
            width=0.38,
            color=_STYLE[variant]["color"],
            hatch="//" if variant == "spatial" else None,
            edgecolor="white",
            linewidth=0,
            label=variant,
        )
        if variant == other:
            ratios = [report["ratio"][key] for _, key in bars]
            left.bar_label(
                drawn, ["" if ratio is None else f"{100 * ratio:.0f} %" for ratio in ratios], padding=2, fontsize=8
            )
    left.set_xticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    left.set_title("memory of one training step (MiB; % of spatial)", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8, loc="upper left")
    left.margins(y=0.12)
    _tidy(left)

    for right in panels[1:]:
        names = list(density)
        values = [100 * value for value in density.values()]
        drawn = right.barh(range(len(names)), values, color=_STYLE["spectral"]["color"], height=0.7)
        right.bar_label(drawn, fmt="%.0f %%", padding=2, fontsize=8)
        right.set_yticks(range(len(names)), names, fontsize=8)
        right.set_ylim(max(len(names), 5) - 0.5, -0.5)
        right.set_xlim(0, 115)
        right.set_xticks(range(0, 101, 25))
        right.set_title("coefficients kept (%)", loc="left", fontsize=10)
        _tidy(right, "x")
    _finish(figure, "Memory", report, path)


def _draw_peers(rows: Sequence[Mapping[str, Any]], figure: Any) -> None:
    """Memory of both networks alone and with each peer that could be measured, in percent of the spatial one alone."""
    measured = [row for row in rows if row["saved_bytes"] is not None]
    peers = list(dict.fromkeys(row["peer"] for row in measured))
    variants = dict.fromkeys(row["variant"] for row in measured)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (title, key) in zip(panels, _PEER_PANELS, strict=True):
        for offset, variant in zip((-0.2, 0.2), variants, strict=True):
            shown = [row for row in measured if row["variant"] == variant and row["ratio"][key] is not None]
            drawn = axes.barh(
                [peers.index(row["peer"]) + offset for row in shown],
                [100 * row["ratio"][key] for row in shown],
                height=0.38,
                color=_STYLE[variant]["color"],
                hatch="//" if variant == "spatial" else None,
                edgecolor="white",
                linewidth=0,
            )
            axes.bar_label(drawn, fmt="%.0f", padding=2, fontsize=7)
        axes.set_yticks(range(len(peers)), ["alone" if peer == "none" else f"+ {peer}" for peer in peers], fontsize=8)
        axes.set_title(title, loc="left", fontsize=9)
        axes.margins(x=0.12)
        _tidy(axes, "x")
    panels[0].invert_yaxis()


def draw_gradients(gradients: Mapping[str, Any], path: Path, title: str = "Gradients from compressed maps") -> None:
    """Cosine and norm ratio of every weight's gradient against the exact one, from the first layer to the last.

    Args:
        gradients: as :meth:`spectriton.compression.GradientReport.to_dict` gives it.
        path: PNG to write.
        title: of the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = [*gradients["layers"], {**gradients["total"], "name": "all parameters"}]
    figure = _figure(9.0, max(3.0, 1.4 + 0.17 * len(rows)))
    places = range(len(rows))
    panels = figure.subplots(1, 2, sharey=True)
    colours = (_STYLE["spatial"]["color"], _STYLE["spectral"]["color"])
    panels[0].barh(places, [row["cosine"] for row in rows], color=colours[0], height=0.7)
    panels[0].plot([row["worst_cosine"] for row in rows], places, "k|", markersize=6, label="worst batch")
    panels[0].set_title("cosine", loc="left", fontsize=10)
    panels[0].legend(frameon=False, fontsize=8, loc="lower left")
    panels[1].barh(places, [row["norm_ratio"] for row in rows], color=colours[1], height=0.7)
    panels[1].set_title("norm over exact norm", loc="left", fontsize=10)
    panels[0].set_yticks(places, [row["name"] for row in rows], fontsize=7)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    for axes in panels:
        axes.axvline(1, color="black", linewidth=0.8)
        _tidy(axes, "x")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    figure.supxlabel(f"{gradients['codec']}; {gradients['batches']} batches", fontsize=7, color=_GREY)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_thresholds(result: Mapping[str, Any], path: Path) -> None:
    """Fig. 1 of the paper: memory relative to the spatial network, and error rate, against the threshold.

    Means over seeds; bars are standard deviations, from two seeds on. *State* is parameters, gradients and optimiser.

    Args:
        result: as :func:`spectriton.sweep.sweep` returns it.
        path: PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(12.0, 4.1)
    everything, beyond, errors = figure.subplots(1, 3)
    line = environment.require("matplotlib.lines").Line2D
    spread = len(result["config"]["seeds"]) > 1
    for (colour, marker), model in zip(_NETWORKS * 2, result["config"]["models"], strict=False):
        rows = [row for row in result["rows"] if row["network"] == model]
        twins = [row for row in rows if row["variant"] == "spectral"]
        levels = [row["threshold"] for row in twins]
        for axes, kind in ((everything, ""), (beyond, "_beyond_state")):
            for quantity, style in _KINDS:
                ratios = [100 * row[f"{quantity}{kind}_ratio"] for row in twins]
                axes.plot(levels, ratios, style, color=colour, marker=marker, markersize=4, linewidth=1.5)
        deviations = [100 * (row["test_accuracy_sd"] or 0) for row in twins]
        rates = [100 * (1 - row["test_accuracy"]) for row in twins]
        errors.errorbar(
            levels, rates, deviations if spread else None, color=colour, marker=marker, markersize=4, linewidth=1.5,
            capsize=3, label=model,
        )  # fmt: skip
        for row in rows:
            if row["variant"] == "spatial":
                errors.axhline(100 * (1 - row["test_accuracy"]), color=colour, linestyle=":", linewidth=1.2)
    everything.set_title("memory, everything alive (% of spatial)", loc="left", fontsize=10)
    beyond.set_title("memory beyond state (% of spatial)", loc="left", fontsize=10)
    errors.set_title("test error (%)", loc="left", fontsize=10)
    top = max(everything.get_ylim()[1], beyond.get_ylim()[1], 105)
    for axes in (everything, beyond):
        axes.axhline(100, color=_GREY, linewidth=0.8)
        axes.set_ylim(top=top)
    styles = (*_KINDS, ("spatial", ":"))
    proxies = [line([], [], color=_GREY, linestyle=style, label=name) for name, style in styles]
    handles = [*errors.get_legend_handles_labels()[0], *proxies]
    figure.legend(handles=handles, fontsize=8, frameon=False, loc="outside right center")
    for axes in (everything, beyond, errors):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("threshold (modulus of the ortho spectrum)", fontsize=9)
        axes.set_xticks(result["config"]["thresholds"])
        _tidy(axes, "both")
    _finish(figure, "Memory and error against the threshold", result, path)


def draw_sweep_curves(result: Mapping[str, Any], path: Path) -> None:
    """Fig. 2 of the paper: test accuracy and training loss against the epoch, a column for each network.

    Means over seeds; the spatial network is dashed, thresholds run from dark to light.

    Args:
        result: as :func:`spectriton.sweep.sweep` returns it.
        path: PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    config = result["config"]
    figure = _figure(2.2 + max(4.5, 3.4 * len(config["models"])), 6.0)
    panels = figure.subplots(2, len(config["models"]), sharex=True, squeeze=False)
    ticker = environment.require("matplotlib.ticker")
    shades = environment.require("matplotlib").colormaps["plasma"]
    levels = [None, *config["thresholds"]]
    for column, model in enumerate(config["models"]):
        for number, level in enumerate(levels):
            histories = [c["history"] for c in result["cells"] if (c["model"], c["threshold"]) == (model, level)]
            style = {"color": "black", "linestyle": "--", "zorder": 3}
            if level is not None:
                style = {"color": shades(0.85 * (number - 1) / max(1, len(levels) - 2)), "linestyle": "-"}
            epochs = [record["epoch"] for record in histories[0]]
            marker = "o" if len(epochs) == 1 else None
            for row, (quantity, scale) in enumerate((("test_accuracy", 100.0), ("train_loss", 1.0))):
                curves = zip(*([scale * record[quantity] for record in history] for history in histories), strict=True)
                panels[row, column].plot(
                    epochs, [mean(values) for values in curves], marker=marker, linewidth=1.5,
                    label="spatial" if level is None else f"threshold {level:g}", **style,
                )  # fmt: skip
        panels[0, column].set_title(model, loc="left", fontsize=10)
        panels[1, column].set_xlabel("epoch")
        panels[1, column].set_ylim(0, 1.05 * panels[1, column].get_ylim()[1])
        panels[1, column].xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    panels[0, 0].set_ylabel("test accuracy (%)")
    panels[1, 0].set_ylabel("training loss (cross entropy)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside right center")
    for axes in panels.flat:
        _tidy(axes, "both")
    _finish(figure, "Training", result, path)
