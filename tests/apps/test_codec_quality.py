"""The measurement of codecs runs, and finds what it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import codec_quality


def test_on_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("sklearn")
    options = ["--data", "digits", "--steps", "3", "--batch", "8", "--rates", "1.5", "--out", str(tmp_path)]
    report = codec_quality.main(options)
    assert json.loads((tmp_path / "codec_quality.json").read_text())["records"] == report["records"]
    assert (tmp_path / "codec_quality.md").read_text().strip() == capsys.readouterr().out.strip()
    first = {r["contender"]: r for r in report["records"] if r["site"] == "conv" and r["layer"] == 0}
    blocks, groups = first["blocks, 1.5"], first["groups, 2-bit, stochastic"]
    assert blocks["bits"] <= 1.5 and blocks["map"] < groups["map"] and blocks["cosine"] > groups["cosine"]
    assert first["blocks, thresholded, 1.5"]["bits"] == pytest.approx(1.5, abs=0.1)
