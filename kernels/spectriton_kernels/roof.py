"""What the machine code lets one expect of each kernel on sm_90; `build --table` writes it to docs/kernels.md.

Everything is read or derived from the code for one example launch a row: nothing is measured.
"""

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from typing import Any

import triton

from ._launch import Launch
from .build import Job, compile_all, read_cubin, tunable_of
from .configs import TUNABLES
from .registry import examples
from .sass import Instruction

# An H100 SXM: bytes a second of a device copy, multiprocessors, clock under load (1 / s), and per multiprocessor
# instructions a cycle, of which so many are thought to be had, and what it can hold.
COPY_BANDWIDTH = 3.0e12
PROCESSORS = 132
CLOCK = 1.7e9
ISSUE_SLOTS, ISSUE_SHARE = 4, 0.75
WARPS, BLOCKS, REGISTERS, SHARED = 64, 32, 65536, 228 * 1024
BLOCK_SHARED = 1024  # taken from every block
# Seconds that a dependent access takes: from memory, and from the second-level cache (atomics too).
MEMORY_LATENCY, CACHE_LATENCY = 700e-9, 300e-9

DENSITY = 0.25


@dataclass(frozen=True)
class Work:
    """What a kernel does with its coefficients.

    Attributes:
        examples: names of the example launches.
        operand: the argument that is counted, one coefficient to `reals` of its elements.
        reals: 2 for pairs, 4 for embedded weights, 1 for maps.
        read, written: bytes a coefficient that have to be moved in a launch.
        latency: seconds of accesses that wait for one another, for so many passes of the loop.
        passes: passes of a program's loop.
        in_pass: (opcodes, how many of them a program needs for a pass, or bytes it stores): tells whether the compiler
            unrolled the loop.
    """

    examples: tuple[str, ...]
    operand: int
    read: Callable[[Launch], float]
    written: Callable[[Launch], float]
    latency: Callable[[int], float] = lambda passes: MEMORY_LATENCY
    reals: float = 2
    passes: Callable[[Launch], int] = lambda launch: 0
    in_pass: Callable[[dict[str, Any]], tuple[str, int]] = lambda meta: ("", 0)


def _stream(operand: int, read: float, *names: str) -> Work:
    return Work(names, operand, lambda launch: read, lambda launch: 8)


def _maps(operand: int, read: float, written: float, *names: str) -> Work:
    return Work(names, operand, lambda launch: read, lambda launch: written, reals=1)


def _values(operand: int) -> Callable[[Launch], float]:
    """Bytes a coefficient of the values that a launch is given, and of their scales, which come next."""

    def nbytes(launch: Launch) -> float:
        values, scales = launch.args[operand : operand + 2]
        of_scale = 0 if scales is None else 4 / launch.meta["TILE"]
        return DENSITY * values.element_size() * values[:1].numel() + of_scale

    return nbytes


def _pattern(launch: Launch) -> float:
    """Bytes a coefficient of bitmap and offset."""
    return 1 / 8 + 4 / launch.meta["TILE"]


def _packed(operand: int) -> Callable[[Launch], float]:
    """Bytes a coefficient of a packed spectrum."""
    values = _values(operand)
    return lambda launch: values(launch) + _pattern(launch)


WORK = {
    "complex_product": _stream(2, 16, "complex_product fp32"),
    "complex_product_broadcast": _stream(2, 8, "complex_product fp32 (C, 1, 1)"),
    "spectral_activation": _stream(2, 8, "spectral_activation fp32 tanh", "spectral_activation fp32 tanh scale maps"),
    "spectral_activation_backward": _stream(2, 16, "spectral_activation_backward fp32 tanh"),
    "spectral_activation_scale_backward": _stream(3, 16, "spectral_activation_backward fp32 tanh scale maps"),
    "pack_rows": Work(
        (
            "pack_rows fp32 to fp32 tanh",
            "pack_rows fp32 to fp32 tanh tile 32",
            "pack_rows fp32 to int8 tanh",
            "pack_rows fp32 to int4 tanh",
            "pack_rows fp32 to int8 tanh stochastic",
        ),
        0,
        lambda launch: 8,
        _packed(6),
        lambda passes: MEMORY_LATENCY + CACHE_LATENCY,  # the atomic waits for the data
    ),
    "gather_rows": Work(
        ("gather_rows fp32", "gather_rows fp32 tile 32", "gather_rows fp32 to int8", "gather_rows fp32 to int4"),
        0,
        lambda launch: 8 + _pattern(launch),
        _values(4),
        lambda passes: CACHE_LATENCY + MEMORY_LATENCY,  # the row number before the bitmap
    ),
    "unpack_rows": Work(
        (
            "unpack_rows fp32 to fp32",
            "unpack_rows fp32 to fp32 tile 32",
            "unpack_rows int8 to fp32",
            "unpack_rows int4 to fp32",
        ),
        5,
        _packed(0),
        lambda launch: 8,
        lambda passes: CACHE_LATENCY + 2 * MEMORY_LATENCY,  # row number, bitmap and offset, values
    ),
    "unpack_gradient_rows": Work(
        (
            "unpack_gradient_rows fp32 to fp32 tanh scale",
            "unpack_gradient_rows fp32 to fp32 tanh",
            "unpack_gradient_rows int8 to fp32 tanh scale",
        ),
        7,
        lambda launch: 8 * DENSITY + _values(1)(launch) + _pattern(launch),
        lambda launch: 8 + (4 / launch.meta["ROWS"] if launch.meta["HAS_SCALE"] else 0),
        lambda passes: max(1, passes) * (CACHE_LATENCY + 2 * MEMORY_LATENCY),
        passes=lambda launch: launch.meta["ROWS"],
        in_pass=lambda meta: ("STG", 8 * meta["TILE"] * meta["TILES"]),
    ),
    "sum_kept": Work(
        ("sum_kept fp32 to fp32", "sum_kept fp32 to fp32 gradients"),
        3,
        lambda launch: _packed(0)(launch) + (8 * DENSITY if launch.meta["HAS_GRAD"] else 0),
        lambda launch: 4 / launch.meta["ROWS"],
        lambda passes: max(1, passes) * 2 * MEMORY_LATENCY,
        reals=1 / 8,  # a byte of the bitmap stands for eight
        passes=lambda launch: launch.meta["ROWS"],
        in_pass=lambda meta: ("FMUL", meta["TILE"] * meta["TILES"]),
    ),
    "combine_kept": Work(
        ("combine_kept fp32 to fp32", "combine_kept int8 to fp32"),
        3,
        lambda launch: _packed(0)(launch) + 8 * DENSITY,
        lambda launch: 8 * DENSITY,
        lambda passes: max(1, passes) * 2 * MEMORY_LATENCY,
        reals=1 / 8,
        passes=lambda launch: launch.meta["ROWS"],
        in_pass=lambda meta: ("STG", 8 * meta["TILE"] * meta["TILES"]),
    ),
    "unpack_planes": Work(
        ("unpack_planes fp32 to fp32", "unpack_planes int8 to fp32", "unpack_planes int4 to fp32"),
        6,
        _packed(0),
        lambda launch: 8,
        # source and offset, then in each pass a piece of the bitmap and the values
        lambda passes: CACHE_LATENCY + MEMORY_LATENCY + passes * (CACHE_LATENCY + MEMORY_LATENCY),
        passes=lambda launch: launch.meta["TILE"] // launch.meta["BLOCK_P"],
        in_pass=lambda meta: ("STG", 8 * meta["BLOCK_P"] * meta["BLOCK_S"]),
    ),
    "rows_of_half": _stream(3, 8, "rows_of_half fp32 row_scale"),
    "gather_planes": Work(
        ("gather_planes fp32 to fp32", "gather_planes fp32 to fp32 tile 32"),
        0,
        lambda launch: 8 + _pattern(launch),
        lambda launch: 8 * DENSITY,
        lambda passes: CACHE_LATENCY + MEMORY_LATENCY,  # the source before the bitmap
    ),
    "kernel_spectrum": Work(
        ("kernel_spectrum fp32 to fp32 3x3",),
        2,
        lambda launch: 0,  # the taps come from the caches
        lambda launch: 16,
        lambda passes: passes * CACHE_LATENCY,
        reals=4,
        passes=lambda launch: launch.meta["TAPS"],
        in_pass=lambda meta: ("FFMA", 2 * meta["BLOCK_F"] * meta["BLOCK_I"] * meta["BLOCK_O"]),
    ),
    "kernel_spectrum_adjoint": Work(
        ("kernel_spectrum_adjoint fp32 from fp32 3x3",),
        0,
        lambda launch: 16,
        lambda launch: 0,
        lambda passes: passes * MEMORY_LATENCY,
        reals=4,
        passes=lambda launch: launch.args[8],
        in_pass=lambda meta: ("FFMA", 2 * meta["BLOCK_K"] * meta["BLOCK_I"] * meta["BLOCK_O"]),
    ),
    "decode_blocks": Work(
        ("decode_blocks bf16 64 channels 8x8 channels last", "decode_blocks bf16 64 channels 8x8"),
        9,
        lambda launch: 1 / 8,
        lambda launch: 2,
        lambda passes: CACHE_LATENCY + MEMORY_LATENCY + CACHE_LATENCY,  # start, record, level
        reals=1,
    ),
    "encode_blocks": Work(
        ("encode_blocks bf16 64 channels 8x8 channels last", "encode_blocks bf16 64 channels 8x8"),
        0,
        lambda launch: 2,
        lambda launch: 1 / 8,
        lambda passes: MEMORY_LATENCY + (1 + passes) * CACHE_LATENCY,  # maps, ends of the slice, rows of the bits
        reals=1,
        passes=lambda launch: launch.args[13].shape[1] // launch.meta["BYTES"],
        in_pass=lambda meta: ("STG", meta["BLOCKS"] * meta["BYTES"]),
    ),
    "rectify": _maps(0, 2, 2 + 1 / 8, "rectify bf16"),
    "clear_outside": _maps(0, 2 + 1 / 8, 2, "clear_outside bf16"),
    "rebuild": _maps(0, 2 + 1 / 8, 2, "rebuild bf16"),
    # A quarter as many maxima, with codes of 2 or 4 bits.
    "pool_maxima": _maps(0, 2, 2 / 4 + 1 / 8, "pool_maxima bf16 3x3", "pool_maxima bf16 2x2"),
    "spread_maxima": _maps(2, 2 / 4 + 1 / 8, 2, "spread_maxima bf16 3x3", "spread_maxima bf16 2x2"),
    # Of 1x1 windows bits alone.
    "pool_planes": _maps(0, 4, 4 / 4 + 3 / 32, "pool_planes fp32 2x2"),
    "spread_planes": _maps(3, 4 / 4 + 3 / 32, 4, "spread_planes fp32 2x2"),
}


@dataclass(frozen=True)
class Row:
    """A kernel in one configuration.

    Attributes:
        example: the launch.
        config: its configuration as text, and those that come to the same code.
        chosen: whether the heuristics choose it.
        registers: of a thread.
        shared: bytes of a program.
        programs: that a multiprocessor holds at once.
        occupancy: their warps, of what it can hold.
        instructions: that threads execute a coefficient; both ways of a branch are counted.
        loaded, stored: bytes a coefficient that the instructions move, were no lane masked.
        needed: bytes a coefficient that have to be moved.
        share: of the copy bandwidth, as predicted.
        bound: what the prediction is bounded by.
    """

    example: str
    config: str
    chosen: bool
    registers: int
    shared: int
    programs: int
    occupancy: float
    instructions: float
    loaded: float
    stored: float
    needed: float
    share: float
    bound: str


def resident(registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor holds at once."""
    of_warp = -(-32 * registers // 256) * 256
    of_block = -(-shared // 128) * 128 + BLOCK_SHARED
    return min(BLOCKS, WARPS // warps, REGISTERS // (of_warp * warps), SHARED // of_block)


def repeats(instructions: list[Instruction], work: Work, launch: Launch, threads: int) -> float:
    """How often the instructions of a kernel's loop are executed.

    Raises:
        ValueError: it has a loop that it should not have, or none that it should.
    """
    loop = [instruction for instruction in instructions if instruction.in_loop]
    passes = work.passes(launch)
    if not passes:
        if loop:
            raise ValueError(f"{launch.kernel.__name__} has a loop")
        return 0
    name, needed = work.in_pass(launch.meta)
    counted = [instruction for instruction in loop if instruction.name == name]
    done = threads * sum(instruction.nbytes if name == "STG" else 1 for instruction in counted)
    if not done:
        if passes == 1:
            return 0  # unrolled away
        raise ValueError(f"{launch.kernel.__name__} has no loop")
    return passes * needed / done


def row(job: Job, launch: Launch, compiled: Any) -> Row:
    """What the machine code of a launch says."""
    tunable = tunable_of(launch)
    work = WORK[tunable.kernel]
    alike = [config for config in tunable.space if job.example.plan(config).meta == launch.meta]
    resources, instructions = read_cubin(compiled.asm["cubin"])
    warps = launch.meta["num_warps"]
    threads = 32 * warps
    coefficients = launch.args[work.operand].numel() / work.reals
    per_program = coefficients / math.prod(launch.grid)
    passes = repeats(instructions, work, launch, threads)

    def executed(weight: Callable[[Instruction], float]) -> float:
        """A coefficient, over all instructions."""
        total = sum(weight(i) * (passes if i.in_loop else 1) for i in instructions)
        return total * threads / per_program

    needed = work.read(launch) + work.written(launch)
    programs = resident(resources["REG"], compiled.metadata.shared, warps)
    count = executed(lambda i: 1)
    seconds = {
        "memory": needed / COPY_BANDWIDTH,
        "issue": count / (32 * PROCESSORS * ISSUE_SLOTS * ISSUE_SHARE * CLOCK),
        "latency": work.latency(work.passes(launch)) / (programs * PROCESSORS * per_program),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return Row(
        job.example.name,
        "; ".join(", ".join(map(str, astuple(config))) for config in alike),
        job.config is None,
        resources["REG"],
        compiled.metadata.shared,
        programs,
        programs * warps / WARPS,
        count,
        executed(lambda i: i.nbytes if i.name == "LDG" else 0),
        executed(lambda i: i.nbytes if i.name == "STG" else 0),
        needed,
        seconds["memory"] / seconds[bound],
        bound,
    )


def rows() -> dict[str, list[Row]]:
    """By kernel: its examples in every configuration, the one chosen first."""
    by_name = {example.name: example for example in examples()}
    wanted = []
    for kernel, work in WORK.items():
        for name in work.examples:
            wanted += [Job(by_name[name], "sm_90", config) for config in (None, *TUNABLES[kernel].space)]
    found: dict[str, list[Row]] = {kernel: [] for kernel in TUNABLES}
    for job, launch, compiled in compile_all(wanted):
        found[tunable_of(launch).kernel].append(row(job, launch, compiled))
    return found


_HEAD = (
    "launch",
    "configuration",
    "registers",
    "shared bytes",
    "occupancy",
    "instructions",
    "bytes loaded",
    "bytes stored",
    "bytes needed",
    "of the roof",
    "bound by",
)

_PREFACE = f"""# The kernels, from their machine code

Written by `python -m spectriton_kernels.build --table docs/kernels.md` with triton {triton.__version__}; nothing is
measured. Each row is one launch of the registry, compiled for sm_90 in one configuration of its kernel's space (or
several that come to the same code); the one that the heuristics choose is bold.

* *Registers* are a thread's, *shared bytes* a program's; *occupancy* is what follows from them.
* *Instructions* are those that threads execute for a coefficient, loops counted as often as they run and both ways of
  a branch counted.
* *Bytes loaded* and *stored* are the widths of the global loads and stores among them, as if no lane were masked: what
  exceeds *bytes needed* is masked (a quarter of the coefficients is kept), or comes from a cache.
* *Bytes needed* count what has to be moved once, with a quarter of the coefficients kept.
* *Of the roof* predicts the bandwidth as a share of {COPY_BANDWIDTH / 1e12:.1f} TB/s (a device copy on an H100 SXM).
  It is the smallest of three bounds. Memory: that itself. Issue: {ISSUE_SHARE * ISSUE_SLOTS:g} instructions a cycle on
  each of {PROCESSORS} multiprocessors at {CLOCK / 1e9:g} GHz. Latency: the programs at work, times what each handles,
  over the time of accesses that wait for one another ({1e9 * MEMORY_LATENCY:.0f} ns from memory,
  {1e9 * CACHE_LATENCY:.0f} ns from the second-level cache, an atomic too).

A coefficient is a complex number of the dense side, or a complex weight of a kernel spectrum; for the block codec
(at one bit), ReLU and pooling a value of the maps. What tensor cores need for its products is not among the bounds; see
`spectriton_kernels/block_codec.py`.

Without tuning the heuristics of `spectriton_kernels/configs.py` choose, by shapes and dtypes alone. `spectriton tune`
measures each kernel's space on the GPU at hand and writes the fastest to the user's cache; see `spectriton/tuning.py`.
"""


def document() -> str:
    """docs/kernels.md."""
    parts = [_PREFACE]
    for kernel, members in rows().items():
        tunable = TUNABLES[kernel]
        names = ", ".join(field.name for field in fields(tunable.space[0]))
        parts.append(f"\n## {kernel}\n\nConfigurations are ({names}).\n\n| {' | '.join(_HEAD)} |")
        parts.append("| --- | --- |" + " ---: |" * (len(_HEAD) - 3) + " --- |")
        for member in members:
            cells = (
                member.example,
                f"**{member.config}**" if member.chosen else member.config,
                str(member.registers),
                str(member.shared),
                f"{100 * member.occupancy:.0f} %",
                f"{member.instructions:.0f}",
                f"{member.loaded:.1f}",
                f"{member.stored:.1f}",
                f"{member.needed:.1f}",
                f"{100 * member.share:.0f} %",
                member.bound,
            )
            parts.append(f"| {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"
