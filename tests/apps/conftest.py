"""Fixtures for the applications."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spectriton import models
from spectriton.data import ImageData

# The stand-ins are imported by name from the tests, and from a process that one of them starts.
sys.path.insert(0, str(Path(__file__).parent))

from apps_standins import made_up_data, tiny_network


@pytest.fixture(scope="session")
def apps_extra() -> None:
    """Skips where the packages of the extra ``apps`` are missing."""
    for package in ("matplotlib", "rich", "sklearn", "typer"):
        pytest.importorskip(package, reason=f'{package} is not installed (extra "apps")')


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny networks on one thread: faster on a busy machine, and the same sums in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data() -> ImageData:
    return made_up_data()


@pytest.fixture
def fake_models(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Replaces ``models.build``; gives the list of the calls it gets."""
    calls: list[dict[str, object]] = []

    def build(name: str, *, variant: str, threshold: float, in_channels: int, num_classes: int, **rest: object):
        calls.append({"name": name, "variant": variant, "threshold": threshold, **rest})
        if name != "lenet":
            raise ValueError(f"models.build: name got {name!r}, expected one of 'lenet'; did you mean 'lenet'?")
        return tiny_network(threshold if variant == "spectral" else None, in_channels, num_classes)

    monkeypatch.setattr(models, "build", build, raising=False)
    return calls
