"""Every kernel compiles ahead of time for NVIDIA and AMD, spills nothing and streams in 128-bit accesses.

Compiling needs a process without TRITON_INTERPRET, so each test reads what a subprocess reports.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
OTHER_TARGETS = ("sm_80", "sm_100", "gfx942")
NVIDIA = ("sm_80", "sm_90", "sm_100")

pytestmark = [pytest.mark.triton, pytest.mark.slow]


def run(cache: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"PYTHONPATH": f"{ROOT / 'kernels'}", "TRITON_CACHE_DIR": str(cache), **variables}
    # a triton that was put before the installed one stays there
    environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def report(cache: Path, *arguments: str) -> list[dict[str, Any]]:
    done = run(cache, "-m", "spectriton_kernels.build", "--json", *arguments)
    assert done.stdout.startswith("{"), done.stderr
    return json.loads(done.stdout)["builds"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def builds(cache: Path) -> list[dict[str, Any]]:
    """All examples for sm_90, the core ones for the other targets, and these in the smallest and the largest blocks."""
    return report(cache, "--gate")


def test_every_kernel_is_built_for_every_target(builds):
    kernels = set()
    for path in (ROOT / "kernels" / "spectriton_kernels").glob("*.py"):
        kernels |= set(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert len(kernels) >= 10
    for target in ("sm_90", *OTHER_TARGETS):
        assert {build["kernel"] for build in builds if build["target"] == target} == kernels
    # and besides, in other blocks than those chosen
    others = [build for build in builds if build["config"]]
    assert {build["kernel"] for build in others} == kernels
    assert {build["target"] for build in others} == {"sm_90", *OTHER_TARGETS}


def test_names_of_examples_are_unique(builds):
    keys = [(build["example"], build["config"], build["target"]) for build in builds]
    assert len(keys) == len(set(keys))


def test_nothing_spills(builds):
    spilled = [build for build in builds if build["spills"] or build["stack"]]
    assert [(build["example"], build["config"], build["target"]) for build in spilled] == []


def test_registers_are_within_what_a_thread_has(builds):
    for build in builds:
        assert 0 < build["registers"] <= (512 if build["target"] == "gfx942" else 255), build


def test_streaming_kernels_use_128_bit_accesses(builds):
    """By kernel, not by what the registry asks for: an example that asks for nothing would pass otherwise."""
    loads = {
        "complex_product_kernel",
        "spectral_activation_kernel",
        "spectral_activation_backward_kernel",
        "spectral_activation_scale_backward_kernel",
        "pack_rows_kernel",
        "gather_rows_kernel",
    }
    stores = loads - {"pack_rows_kernel", "gather_rows_kernel"} | {"unpack_rows_kernel"}
    seen = set()
    for build in builds:
        if build["target"] not in NVIDIA:
            continue
        if build["kernel"] in loads:
            assert build["wide_loads"] > 0, build
            seen.add((build["kernel"], "load"))
        if build["kernel"] in stores:
            assert build["wide_stores"] > 0, build
            seen.add((build["kernel"], "store"))
    assert seen == {(kernel, "load") for kernel in loads} | {(kernel, "store") for kernel in stores}


def test_elementwise_kernels_use_nothing_but_128_bit_accesses(builds):
    elementwise = ("complex_product_kernel", "spectral_activation_backward_kernel")
    found = [build for build in builds if build["kernel"] in elementwise and build["target"] in NVIDIA]
    assert found
    for build in found:
        assert (build["wide_loads"], build["wide_stores"]) == (build["loads"], build["stores"]), build


def test_no_problem_is_reported(builds):
    assert [build for build in builds if build["problems"]] == []


CONTROLS = """
import dataclasses, json, torch
from spectriton_kernels.build import Job, build_all
from spectriton_kernels.complex_product import plan_complex_product
from spectriton_kernels.registry import Example

def complex_product(numbers, **meta):
    # real tensors: the address says whether it is aligned
    launch = plan_complex_product(numbers, numbers)[0]
    return dataclasses.replace(launch, meta={**launch.meta, **meta})

aligned = torch.zeros(4097, dtype=torch.complex64)
examples = {
    "good": lambda config: complex_product(aligned[:4096]),
    "shifted": lambda config: complex_product(aligned[1:]),
    "odd": lambda config: complex_product(aligned[:4095]),
    "huge": lambda config: complex_product(aligned[:4096], BLOCK=16384, num_warps=1),
}
jobs = [Job(Example(name, plan, wide_loads=True, wide_stores=True), "sm_90") for name, plan in examples.items()]
print(json.dumps({built.example: dataclasses.asdict(built) for built in build_all(jobs + jobs[:1])}))
"""


def test_the_check_finds_narrow_accesses_and_spills(cache):
    done = run(cache, "-c", CONTROLS)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["good"]["problems"] == []
    assert made["shifted"]["problems"] == ["no 128-bit load"]  # the result is aligned
    assert made["odd"]["problems"] == ["no 128-bit load", "no 128-bit store"]
    assert "spills" in made["huge"]["problems"] and made["huge"]["spills"] > 100


SPECIALISATION = """
import torch
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from spectriton_kernels.build import TARGETS, specialise
from spectriton_kernels.registry import examples

compared = 0
for target in TARGETS.values():
    backend = make_backend(target)
    for example in examples():
        if not example.core:
            continue
        launch = example.plan(None)
        kernel = launch.kernel
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        names = [parameter.name for parameter in kernel.params]
        args = [torch.empty(8, dtype=arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in launch.args]
        _, real, _ = bind(*args, **{name: value for name, value in launch.meta.items() if name in names})
        source, _ = specialise(launch, target)
        for number, (name, (kind, hint)) in enumerate(zip(names, real, strict=True)):
            mine = source.signature[name]
            assert mine == kind, (example.name, name, mine, kind)
            if kind == "constexpr":
                continue
            hints = backend.parse_attr(hint) if hint else []
            if not kind.startswith("*"):  # the tensors here are small, sizes decide on pointer_range
                assert source.attrs.get((number,), []) == hints, (example.name, name, hints)
            else:
                assert ["tt.divisibility", 16] in hints and ["tt.divisibility", 16] in source.attrs[(number,)]
            compared += 1
print(compared)
"""


def test_specialisation_is_tritons_own(cache):
    """Types and hints of the ahead-of-time builds are those Triton's launcher derives."""
    done = run(cache, "-c", SPECIALISATION)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200


def test_refuses_to_build_in_the_interpreter(cache):
    done = run(cache, "-m", "spectriton_kernels.build", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr


def test_prints_a_table(cache):
    done = run(cache, "-m", "spectriton_kernels.build", "--target", "sm_90", "--only", "gather_rows fp16")
    assert done.returncode == 0, done.stderr
    head, line, total = done.stdout.strip().split("\n")
    columns = ["example", "config", "target", "regs", "stack", "spills", "shared", "ld.128", "st.128", "problems"]
    assert head.split() == columns
    assert line.split()[:4] == ["gather_rows", "fp16", "(chosen)", "sm_90"]
    assert total.startswith("1 builds")


def test_builds_every_configuration(cache):
    """Those that come to the same code are built once."""
    built = report(cache, "--all", "--target", "sm_90", "--only", "unpack_rows fp32 to fp32 tile 32")
    configs = [build["config"] for build in built]
    assert configs == ["", "2048 64", "4096 128", "8192 64", "8192 128", "16384 128"]
