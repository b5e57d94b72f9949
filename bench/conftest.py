"""Benchmarks: spectriton against plain PyTorch, side by side in groups.

.. code-block:: bash

    python -m pytest bench --benchmark-only                                # all
    python -m pytest bench --benchmark-only -k spec_block                  # some
    BENCH_QUICK=1 python -m pytest bench --benchmark-only                  # small and short, for shape only
    python -m pytest bench --benchmark-only --benchmark-json=bench.json    # and then
    python -m bench.report bench.json                                      # a table and a plot of it

A bare checkout needs ``PYTHONPATH=.:kernels`` and torch, triton, pytest and pytest-benchmark; nothing is installed.
Every benchmark checks its contenders before it times them. What is measured, and how bytes are counted, is in
``bench/timing.py`` and at the top of each benchmark.

======================== ===============================================================================================
``BENCH_QUICK=1``        small sizes, few rounds: the whole folder in less than a minute on two CPU cores
``BENCH_DEVICE=cpu``     not on the GPU, though there is one
``BENCH_BUDGET=0.3``     seconds of rounds for each contender (within a fewest and a most number of rounds)
``BENCH_SECONDS=200``    skip what has not begun after so many seconds, so that results are written in time
``BENCH_THREADS=2``      threads of torch; by default all there are, and one in a quick run (which other work on the
                         machine then disturbs less)
``BENCH_COMMIT=abc1234`` what to call the commit where there is no git (a copied tree)
``SPECTRITON_BACKEND``   another backend for the contenders that name none; "spectriton reference" stands beside them
======================== ===============================================================================================
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.timing import DEVICE, LIMIT, Measure, environment, out_of_time, stopwatch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rounds are timed by the stopwatch, which knows of CUDA events.

    What is compiled comes last, after the many contenders of the block: where time runs out, little is lost.
    """
    here = Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]
    for item in mine:
        item.add_marker(pytest.mark.benchmark(timer=stopwatch, disable_gc=True))
    if len(mine) == len(items):
        items.sort(key=lambda item: ("torch.compile" in item.name, "spec_block" in item.name))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """The name of the host is nobody's business."""
    machine_info.pop("node", None)


def pytest_report_header() -> str:
    return f"bench: on {DEVICE}"


@pytest.fixture(autouse=True)
def in_time() -> None:
    """Skips what begins too late."""
    if out_of_time():
        pytest.skip(f"BENCH_SECONDS={LIMIT:g} are over")


@pytest.fixture(autouse=True)
def backend_of_contender(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contender that names the reference runs on it, in its checks, too."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    default = environment()["backend"]  # noted before it is changed
    if "reference" in str(parameters.get("contender", "")).split():
        if default == "reference":
            pytest.skip("it is what runs by default here")
        monkeypatch.setenv("SPECTRITON_BACKEND", "reference")


@pytest.fixture
def measure(benchmark: Any) -> Measure:
    """Times a contender; see :class:`bench.timing.Measure`."""
    return Measure(benchmark)
