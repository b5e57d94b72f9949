"""The console command: what it writes, prints and returns."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from apps_standins import tiny_network

import spectriton
from spectriton import cli, environment

pytestmark = pytest.mark.usefixtures("apps_extra")

QUICK = ["--train-limit", "40", "--test-limit", "20", "--epochs", "1", "--batch-size", "16", "--device", "cpu"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code or 0  # type: ignore[return-value]


def test_compare_writes_everything_and_prints_a_table(
    tmp_path: Path, fake_models: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x"
    arguments = ["compare", "--model", "lenet", "--data", "digits", "--threshold", "0.25", "--out", str(out), *QUICK]
    assert run(*arguments) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.png", "memory.png", "report.json", "spatial.pt", "spectral.pt",
    ]  # fmt: skip
    result = json.loads((out / "report.json").read_text())
    assert result["config"]["threshold"] == 0.25 and result["config"]["train_limit"] == 40
    printed = capsys.readouterr()
    for text in ("test accuracy", "saved for backward", "spectral / spatial", "lenet on digits", "report.json"):
        assert text in printed.out
    assert "epoch 1/1" in printed.err and "\x1b" not in printed.err + printed.out
    assert run(*arguments) == 0
    assert "already trained" in capsys.readouterr().err


def test_compare_with_compressed_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--method", "compress", "--transform", "none", "--bits", "2"]
    assert run("compare", *settings, "--out", str(tmp_path), *QUICK) == 0
    result = json.loads((tmp_path / "report.json").read_text())
    assert "QuantiseCodec(bits=2" in result["config"]["codec"] and result["compressed"]["saved_bytes"] > 0
    assert "compressed / spatial" in capsys.readouterr().out


def test_train_writes_a_checkpoint_and_a_report(tmp_path: Path, fake_models: list[dict[str, object]]) -> None:
    assert run("train", "--variant", "spectral", "--seed", "7", "--paper", "--out", str(tmp_path), *QUICK) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "report.json", "spectral.pt"]
    assert len(json.loads((tmp_path / "report.json").read_text())["spectral"]["history"]) == 1
    assert fake_models[0]["paper"] is True


def test_seeds(tmp_path: Path, fake_models: list[dict[str, object]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", "--seeds", "0,1", "--out", str(tmp_path), *QUICK) == 0
    assert len(json.loads((tmp_path / "report.json").read_text())["runs"]) == 2
    assert run("compare", "--seeds", "0;1", "--out", str(tmp_path), *QUICK) == 2
    assert "give --seeds 0,1,2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "digit"], "did you mean 'digits'"),
        (["--model", "lennet"], "did you mean 'lenet'"),
        (["--data", "fashion-mnist", "--data-dir", "/absent"], "train-images-idx3-ubyte"),
        (["--threshold", "-1"], "threshold"),
        (["--threshold", "inf"], "threshold got inf, expected a finite number"),
        (["--lr", "nan"], "--lr"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "many"], "--epochs"),
        (["--train-limit", "0"], "train_limit"),
        (["--method", "compres"], "did you mean 'compress'"),
        (["--method", "compress", "--bits", "77"], "bits"),
        (["--optimizer", "sdg"], "did you mean 'sgd'"),
        (["--value-dtype", "float23"], "did you mean 'float32'"),
        (["--device", "tpu"], "--device"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_mistakes_end_with_a_clear_message_and_status_2(
    tmp_path: Path,
    fake_models: list[dict[str, object]],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    assert run("compare", "--out", str(tmp_path / "x"), *arguments) == 2
    printed = capsys.readouterr().err
    assert said in printed and "Traceback" not in printed
    assert not (tmp_path / "x").exists()


def test_an_unwritable_folder_is_found_before_training(
    tmp_path: Path, fake_models: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run("compare", "--out", str(tmp_path / "file" / "x"), *QUICK) == 2
    printed = capsys.readouterr()
    assert "folder got" in printed.err and "choose another --out" in printed.err
    assert "epoch 1/1" not in printed.err


def test_a_truncated_file_ends_with_status_2(
    tmp_path: Path, fake_models: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{stem}-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + bytes(12))[:-4])
    out = tmp_path / "x"
    assert run("compare", "--data", "fashion-mnist", "--data-dir", str(tmp_path), "--out", str(out)) == 2
    assert "train-images-idx3-ubyte.gz" in capsys.readouterr().err


def test_a_damaged_checkpoint_ends_with_status_2_and_fresh_starts_anew(
    tmp_path: Path, fake_models: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spatial.pt").write_bytes(b"damaged")
    assert run("compare", "--out", str(tmp_path), *QUICK) == 2
    printed = capsys.readouterr().err
    assert "spatial.pt" in printed and "--fresh" in printed and "Traceback" not in printed
    assert (tmp_path / "spatial.pt").read_bytes() == b"damaged"
    assert run("compare", "--out", str(tmp_path), "--fresh", *QUICK) == 0


def test_divergence_ends_with_status_1(
    tmp_path: Path, fake_models: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "--lr", "1e38", "--out", str(tmp_path), *QUICK) == 1
    assert "diverged" in capsys.readouterr().err


def test_a_traceback_can_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="epochs"):
        cli.main(["train", "--epochs", "0", "--out", str(tmp_path)])


def test_ctrl_c_stops_at_a_step_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting(torch.nn.Sequential):
        forwards = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Interrupting.forwards += 1
            if Interrupting.forwards == 2:
                os.kill(os.getpid(), cli.signal.SIGINT)
            return super().forward(x)  # type: ignore[no-any-return]

    monkeypatch.setattr("spectriton.models.build", lambda *_, **__: Interrupting(*tiny_network()), raising=False)
    arguments = ["train", "--out", str(tmp_path), *QUICK]
    before = cli.signal.getsignal(cli.signal.SIGINT)
    assert run(*arguments) == 130
    assert "run the same command again" in capsys.readouterr().err and (tmp_path / "spectral.pt").exists()
    assert cli.signal.getsignal(cli.signal.SIGINT) is before
    assert run(*arguments) == 0
    assert "goes on after 0.667 epochs" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"spectriton {spectriton.__version__}\n"


def test_env(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECTRITON_BACKEND", "reference")
    monkeypatch.setenv("SPECTRITON_TUNING_DIR", str(tmp_path / "absent"))
    monkeypatch.setenv("SPECTRITON_WORKSPACE_MIB", "12")
    assert run("env", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == environment.collect()
    assert found["torch"] == torch.__version__ and found["backend"] == "reference" and found["workspace_mib"] == "12"
    assert {"python", "triton", "numpy", "spectriton", "gpu", "driver", "threads", "platform"} <= set(found)
    assert found["workspace_bytes"] == 12 << 20
    (tmp_path / "some-gpu.json").write_text("{}")
    monkeypatch.setenv("SPECTRITON_TUNING_DIR", str(tmp_path))
    assert environment.collect()["tuning"]["files"] == [
        {"origin": "user", "name": "some-gpu.json", "entries": 0, "problem": "schema got None, expected 1"}
    ]
    assert run("env") == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and "some-gpu.json (user): schema got None" in printed
    monkeypatch.setenv("SPECTRITON_BACKEND", "tritn")
    assert run("env") == 2
    assert "SPECTRITON_BACKEND" in capsys.readouterr().err


def test_env_tells_of_the_c_functions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECTRITON_BACKEND", "auto")
    monkeypatch.setenv("SPECTRITON_NATIVE_PORTABLE", "0")
    for reason, shown in ((None, "compiled"), ("cc failed: error: none", "cc failed: error: none")):
        monkeypatch.setattr("spectriton_native.library.why_unavailable", lambda reason=reason: reason)
        monkeypatch.setattr("spectriton_native.why_unavailable", lambda reason=reason: reason)
        found = environment.collect(torch.device("cpu"))
        assert found["native"] == shown and found["backend"] == ("reference" if reason else "native")
        assert run("env") == 0
        assert shown in capsys.readouterr().out
    monkeypatch.setattr("spectriton_native.library.why_unavailable", lambda: pytest.fail("nobody asked for them"))
    monkeypatch.setenv("SPECTRITON_BACKEND", "reference")
    assert environment.collect()["native"] is None


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("compare", "train", "tune", "env"))


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_a_package_it_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert run("env") == 2
    printed = capsys.readouterr().err
    assert package in printed and 'pip install "spectriton[apps]"' in printed


def test_digits_without_scikit_learn_name_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert run("train", "--out", str(tmp_path)) == 2
    assert 'scikit-learn is not installed; run: pip install "spectriton[apps]"' in capsys.readouterr().err


def test_importing_loads_none_of_the_optional_packages() -> None:
    code = (
        "import sys, spectriton, spectriton.cli, spectriton.compare, spectriton.plots\n"
        "print(sorted({'typer', 'rich', 'matplotlib', 'sklearn', 'datasets'} & set(sys.modules)))"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True)
    assert done.stdout.strip() == "[]"
