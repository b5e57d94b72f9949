"""Files of tuned configurations, and what the kernels take from them."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spectriton import _backend, tuning
from spectriton.tuning import Entry
from spectriton_kernels import configs

pytestmark = pytest.mark.triton
GPU = "Test GPU 80GB"
DEVICE = torch.device("cuda", 0)
SINGLE = (torch.float32,)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's directory, on a machine with a GPU of a made-up name."""
    monkeypatch.setenv(tuning.DIRECTORY, str(tmp_path / "user"))
    monkeypatch.delenv(tuning.SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    tuning.install()
    yield tmp_path / "user"
    configs.set_lookup(None)
    tuning._table.cache_clear()


def entry(sizes: int = 1024, config: dict[str, int] | None = None, kernel: str = "complex_product") -> Entry:
    chosen = config or {"block_bytes": 2048, "num_warps": 2}
    return Entry(kernel, ("float32",), (sizes,), chosen, {"seconds": 0.5})


def chosen(sizes: int = 1000, device: torch.device = DEVICE) -> Any:
    return configs.COMPLEX_PRODUCT.choose(device, SINGLE, (sizes,))


HEURISTIC, TUNED = configs.Stream(8192, 4), configs.Stream(2048, 2)


def test_what_is_saved_is_found_by_its_bucket(directory):
    assert chosen() == HEURISTIC
    path = tuning.save(GPU, [entry()])
    assert path == directory / tuning.file_name(GPU, configs.TRITON_VERSION)
    assert chosen() == HEURISTIC  # files are read once
    tuning.install()
    assert [chosen(size) for size in (513, 1000, 1024)] == [TUNED] * 3
    assert chosen(512) == chosen(1025) == HEURISTIC
    assert chosen(device=torch.device("cpu")) == HEURISTIC
    assert configs.COMPLEX_PRODUCT.choose(DEVICE, (torch.float64,), (1000,)) == configs.Stream(8192, 8)
    assert configs.SPECTRAL_ACTIVATION_BACKWARD.choose(DEVICE, SINGLE, (1000,)) == HEURISTIC
    assert tuning.read(path) == {entry().key: entry()}


def test_the_backend_looks_configurations_up(monkeypatch):
    tuning.save(GPU, [entry()])
    configs.set_lookup(None)
    assert chosen() == HEURISTIC
    monkeypatch.setenv("SPECTRITON_BACKEND", "auto")
    _backend._made.cache_clear()
    assert _backend.backend(DEVICE).name == "triton"
    assert chosen() == TUNED


def test_nothing_is_looked_up_when_switched_off(monkeypatch):
    tuning.save(GPU, [entry()])
    monkeypatch.setenv(tuning.SWITCH, "0")
    tuning.install()
    assert chosen() == HEURISTIC
    assert tuning.describe(GPU)["enabled"] is False and tuning.describe(GPU)["entries"] == 0


def test_the_users_file_goes_before_the_packages(tmp_path, monkeypatch):
    places = {"package": tmp_path / "package", "user": tmp_path / "user"}
    monkeypatch.setattr(tuning, "directories", lambda: places)
    monkeypatch.setattr(tuning, "user_directory", lambda: places["package"])
    tuning.save(GPU, [entry(), entry(2048)])
    monkeypatch.setattr(tuning, "user_directory", lambda: places["user"])
    tuning.save(GPU, [entry(config={"block_bytes": 16384, "num_warps": 8})])
    tuning.install()
    assert chosen() == configs.Stream(16384, 8)
    assert chosen(2000) == TUNED
    assert tuning.describe(GPU)["entries"] == 2
    assert [file["origin"] for file in tuning.describe(GPU)["files"]] == ["package", "user"]


def test_saving_adds_to_what_there_is(directory):
    tuning.save(GPU, [entry(), entry(2048)])
    path = tuning.save(GPU, [entry(config={"block_bytes": 16384, "num_warps": 8})])
    found = tuning.read(path)
    assert len(found) == 2
    assert found[entry().key].config == {"block_bytes": 16384, "num_warps": 8}
    assert sorted(p.suffix for p in directory.iterdir()) == [".json", ".lock"]


def test_writers_at_the_same_time_lose_nothing(directory):
    sizes = [2**power for power in range(20)]
    writers = [threading.Thread(target=tuning.save, args=(GPU, [entry(size)])) for size in sizes]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = tuning.read(directory / tuning.file_name(GPU, configs.TRITON_VERSION), GPU)
    assert sorted(key[2][0] for key in found) == sizes


def content(**changes: Any) -> str:
    """A file with a valid entry; changes of an entry's fields make a second one."""
    item = {
        "kernel": "complex_product",
        "dtypes": ["float32"],
        "sizes": [1024],
        "config": {"block_bytes": 2048, "num_warps": 2},
    }
    whole = {"schema": 1, "gpu": GPU, "triton": configs.TRITON_VERSION, "entries": [item]}
    if changes.keys() <= whole.keys():
        return json.dumps({**whole, **changes})
    return json.dumps({**whole, "entries": [item, {**item, **changes}]})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("\x00\x01", "not JSON"),
        (content()[:-20], "not JSON"),
        ("[]", "schema got None, expected 1"),
        (content(schema=2), "schema got 2, expected 1"),
        (content(gpu="Other GPU"), "gpu got 'Other GPU', expected 'Test GPU 80GB'"),
        (content(triton="2.0.0"), "triton got '2.0.0'"),
        (content(entries={}), "entries"),
        (content(entries=[3]), "entry 0"),
        (content(kernel="complex_products"), "entry 1: kernel got 'complex_products', expected one of"),
        (content(dtypes=["float33"]), "entry 1: dtypes"),
        (content(dtypes="float32"), "entry 1: dtypes"),
        (content(sizes=[1000]), "entry 1: sizes"),
        (content(sizes=[1024, 2]), "entry 1: sizes"),
        (content(sizes=[-1]), "entry 1: sizes"),
        (content(config={"block_bytes": 2048, "num_warps": 32}), "entry 1: config"),
        (content(config={"block_bytes": 2048}), "entry 1: config"),
        (content(config={"block_bytes": 2048, "num_warps": 2, "num_stages": 3}), "entry 1: config"),
        (content(config=None), "entry 1: config"),
        (content(measured=3), "entry 1: measured"),
    ],
)
def test_files_that_are_corrupt_or_foreign_are_reported_once_and_ignored(directory, text, said):
    directory.mkdir()
    path = directory / tuning.file_name(GPU, configs.TRITON_VERSION)
    path.write_text(text)
    with pytest.warns(RuntimeWarning) as caught:
        assert chosen() == HEURISTIC
    assert len(caught) == 1
    message = str(caught[0].message)
    assert said in message and str(path) in message and "spectriton tune" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(2000) == HEURISTIC
    (file,) = tuning.describe(GPU)["files"]
    assert said in file["problem"] and file["name"] == path.name
    assert str(directory) not in json.dumps(tuning.describe(GPU))
    # tuning writes it anew
    tuning.save(GPU, [entry()])
    tuning.install()
    assert chosen() == TUNED


def test_a_file_that_cannot_be_read_is_reported(directory):
    (directory / tuning.file_name(GPU, configs.TRITON_VERSION)).mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="ignored"):
        assert chosen() == HEURISTIC
    assert tuning.describe(GPU)["files"][0]["problem"]


def test_files_for_others_are_left_alone(directory):
    directory.mkdir()
    (directory / tuning.file_name("Other GPU", configs.TRITON_VERSION)).write_text(content(gpu="Other GPU"))
    (directory / tuning.file_name(GPU, "2.0.0")).write_text(content(triton="2.0.0"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == HEURISTIC
    found = tuning.describe(GPU)
    assert [file["problem"] for file in found["files"]] == [None, None] and found["entries"] == 0
    assert tuning.describe(None)["entries"] == 0


def test_names_of_files():
    assert tuning.file_name("NVIDIA H100 80GB HBM3", "3.7.1") == "nvidia-h100-80gb-hbm3-triton-3.7.1.json"
    assert "/" not in tuning.file_name("a/b", "3.7.1+git")


def test_the_users_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert tuning.user_directory().name == "user"
    monkeypatch.delenv(tuning.DIRECTORY)
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/x")
    assert tuning.user_directory() == Path("/var/cache/x/spectriton")
    for ignored in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert tuning.user_directory() == Path("/home/someone/.cache/spectriton")
