"""Builds every kernel ahead of time, without a GPU: `python -m spectriton_kernels.build`.

Each example of the registry is compiled for NVIDIA (sm_80, sm_90, sm_100) and AMD (gfx942) and what came out is read
back from the machine code: registers, bytes of stack, instructions that touch local (spilled) memory, and 128-bit
accesses to global memory. The exit status is 1 where something spills or an access that must be wide is not.

By default each example is built in the configuration the heuristics choose. `--all` builds every example in every
configuration, which takes long; `--gate` what the tests look at: on sm_90 every example as chosen, elsewhere the core
ones as chosen, and each core one for one of the targets in the smallest and the largest blocks. `--table FILE` writes
what `spectriton_kernels.roof` makes of the builds.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._launch import Launch
from .configs import TUNABLES
from .registry import Example, examples
from .sass import Instruction, parse

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
}
ALIGNMENT = 16


@dataclass
class Built:
    """What the compiler made of one example in one configuration for one target.

    Attributes:
        example, target, kernel: names.
        config: the configuration as text; nothing for the one that the heuristics choose.
        registers: registers of a thread (vector registers on AMD).
        stack: bytes of local memory of a thread (scratch on AMD).
        spills: instructions that load from or store to local memory (spilled registers on AMD).
        shared: bytes of shared memory of a block.
        wide_loads, wide_stores: 128-bit instructions that load from or store to global memory.
        loads, stores: all instructions that do.
        problems: what is not as it must be.
    """

    example: str
    target: str
    kernel: str
    config: str
    registers: int
    stack: int
    spills: int
    shared: int
    wide_loads: int
    wide_stores: int
    loads: int
    stores: int
    problems: list[str]


def specialise(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """The source with the types, constants and hints Triton derives when it runs `launch`, and the compiler options.

    Rules of Triton's launcher: None and the integer 1 become constants; integers and addresses divisible by 16 are
    marked so; integers are 32 bits where they fit; on AMD tensors below 2 GiB are marked for buffer instructions.
    """
    kernel = launch.kernel
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, launch.args, strict=False)) | {k: v for k, v in launch.meta.items() if k in names}
    options = {k: v for k, v in launch.meta.items() if k not in names}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], list[list[Any]]] = {}
    for number, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (is_integer and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(number,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPE_NAMES[value.dtype]
            hint = [["tt.divisibility", ALIGNMENT]] if value.data_ptr() % ALIGNMENT == 0 else []
            if target.backend == "hip" and value.untyped_storage().nbytes() < 2**31:
                hint.append(["tt.pointer_range", 32])
            if hint:
                hints[(number,)] = hint
        elif is_integer:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % ALIGNMENT == 0:
                hints[(number,)] = [["tt.divisibility", ALIGNMENT]]
        else:
            assert isinstance(value, float), f"{parameter.name}: no rule for {type(value)}"
            signature[parameter.name] = parameter.annotation_type or "fp32"
    return ASTSource(kernel, signature, constants, hints), options


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_cubin(cubin: bytes) -> tuple[dict[str, int], list[Instruction]]:
    """(resources by the names of `cuobjdump -res-usage`, instructions)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(_tool("cuobjdump"), "-res-usage", file.name)
        sass = _run(_tool("nvdisasm"), "-c", file.name)
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}, parse(sass)


def _read_nvidia(asm: dict[str, Any]) -> dict[str, int]:
    resource, instructions = read_cubin(asm["cubin"])
    loads, stores = ([i for i in instructions if i.name == name] for name in ("LDG", "STG"))
    return {
        "registers": resource["REG"],
        "stack": resource["STACK"] + resource["LOCAL"],
        "spills": sum(1 for i in instructions if i.name in ("LDL", "STL")),
        "wide_loads": sum(1 for i in loads if i.nbytes == 16),
        "wide_stores": sum(1 for i in stores if i.nbytes == 16),
        "loads": len(loads),
        "stores": len(stores),
    }


def _read_amd(asm: dict[str, Any]) -> dict[str, int]:
    text = asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s+(\d+)", text, re.MULTILINE)
        assert found, f"no {name} in the metadata"
        return int(found.group(1))

    loads = re.findall(r"^\s*((?:global|buffer)_load_\w+)", text, re.MULTILINE)
    stores = re.findall(r"^\s*((?:global|buffer)_store_\w+)", text, re.MULTILINE)
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "wide_loads": sum(1 for opcode in loads if opcode.endswith("dwordx4")),
        "wide_stores": sum(1 for opcode in stores if opcode.endswith("dwordx4")),
        "loads": len(loads),
        "stores": len(stores),
    }


@dataclass(frozen=True)
class Job:
    """An example to build in a configuration, or, given None, in the one that the heuristics choose."""

    example: Example
    target: str
    config: Any = None


def tunable_of(launch: Launch) -> Any:
    """The `Tunable` of a launch's kernel."""
    return TUNABLES[launch.kernel.__name__.removesuffix("_kernel")]


def jobs(chosen: Iterable[Example], targets: Sequence[str], every_config: bool = False) -> list[Job]:
    """Builds to make of examples: as chosen, or besides in every configuration."""
    found = []
    for example in chosen:
        space = tunable_of(example.plan(None)).space if every_config else ()
        found += [Job(example, target, config) for target in targets for config in (None, *space)]
    return found


def gate() -> list[Job]:
    """What the tests look at."""
    every = examples()
    core = [example for example in every if example.core]
    found = jobs(every, ["sm_90"]) + jobs(core, [target for target in TARGETS if target != "sm_90"])
    for example, target in zip(core, itertools.cycle(TARGETS), strict=False):
        space = tunable_of(example.plan(None)).space
        found += [Job(example, target, config) for config in (space[0], space[-1])]
    return found


def compile_all(wanted: Sequence[Job]) -> list[tuple[Job, Launch, Any]]:
    """Compiles, in parallel, whatever comes to code of its own: (job, its launch, what triton.compile returned)."""
    distinct: dict[tuple[Any, ...], tuple[Job, Launch, ASTSource, dict[str, Any]]] = {}
    for job in wanted:
        launch = job.example.plan(job.config)
        source, options = specialise(launch, TARGETS[job.target])
        key = (job.target, source.hash(), tuple(sorted(options.items())))
        distinct.setdefault(key, (job, launch, source, options))

    def one(item: tuple[Job, Launch, ASTSource, dict[str, Any]]) -> tuple[Job, Launch, Any]:
        job, launch, source, options = item
        return job, launch, triton.compile(source, target=TARGETS[job.target], options=options)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, distinct.values()))


def build_all(wanted: Sequence[Job]) -> list[Built]:
    """Compiles and reads the machine code; jobs that come to the same code are built, and reported, once."""
    made = compile_all(wanted)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda item: _read(*item), made))


def _read(job: Job, launch: Launch, compiled: Any) -> Built:
    example = job.example
    is_nvidia = TARGETS[job.target].backend == "cuda"
    found = _read_nvidia(compiled.asm) if is_nvidia else _read_amd(compiled.asm)
    problems = []
    if found["spills"] or found["stack"]:
        problems.append("spills")
    if is_nvidia and example.wide_loads and not found["wide_loads"]:
        problems.append("no 128-bit load")
    if is_nvidia and example.wide_stores and not found["wide_stores"]:
        problems.append("no 128-bit store")
    return Built(
        example=example.name,
        target=job.target,
        kernel=launch.kernel.__name__,
        config=describe(job.config),
        shared=compiled.metadata.shared,
        problems=problems,
        **found,
    )


def describe(config: Any) -> str:
    """A configuration as text: its numbers in order; nothing for None."""
    return "" if config is None else " ".join(str(value) for value in asdict(config).values())


def table(builds: Sequence[Built]) -> str:
    """One line a build, as text."""
    head = ("example", "config", "target", "regs", "stack", "spills", "shared", "ld.128", "st.128", "problems")
    lines = [
        (
            b.example,
            b.config or "(chosen)",
            b.target,
            str(b.registers),
            str(b.stack),
            str(b.spills),
            str(b.shared),
            f"{b.wide_loads}/{b.loads}",
            f"{b.wide_stores}/{b.stores}",
            ", ".join(b.problems),
        )
        for b in builds
    ]
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    texts = (3, 9)  # the rest are numbers, to the right
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < texts[0] or column == texts[1] else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [head, *lines]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m spectriton_kernels.build", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="may be repeated; default: all")
    parser.add_argument("--only", default="", metavar="TEXT", help="only examples whose name contains TEXT")
    parser.add_argument("--core", action="store_true", help="only the examples that stand for their kernels")
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--all", action="store_true", help="in every configuration, not only the one chosen")
    scope.add_argument("--gate", action="store_true", help="what the tests look at, whatever the other options say")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="write a table of the kernels on sm_90, nothing else"
    )
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    begin = time.perf_counter()
    if given.table is not None:
        from .roof import document

        given.table.write_text(document())
        print(f"{given.table} written in {time.perf_counter() - begin:.0f} s")
        return 0
    chosen = [e for e in examples() if given.only in e.name and (e.core or not given.core)]
    wanted = gate() if given.gate else jobs(chosen, given.target or list(TARGETS), given.all)
    builds = build_all(wanted)
    seconds = time.perf_counter() - begin
    if given.json:
        report = {"triton": triton.__version__, "seconds": round(seconds, 1), "builds": [asdict(b) for b in builds]}
        print(json.dumps(report, indent=1))
    else:
        print(table(builds))
        print(f"{len(builds)} builds in {seconds:.0f} s with triton {triton.__version__}")
    return 1 if any(b.problems for b in builds) else 0


if __name__ == "__main__":
    sys.exit(main())
