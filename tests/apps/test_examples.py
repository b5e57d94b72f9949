"""The examples run as they stand and draw their plots."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    plot = tmp_path / "plot.png"
    options = ["--steps", "3"] if "--steps" in example.read_text() else []
    monkeypatch.setattr(sys, "argv", [str(example), "--out", str(plot), *options])
    runpy.run_path(str(example), run_name="__main__")
    assert plot.stat().st_size > 5000


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3
