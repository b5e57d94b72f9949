"""How a contender is timed, and what is reported beside its time.

Time. A round is one call, measured as ``spectriton/timing.py`` says: on a GPU between CUDA events, the host ahead of
the device. Where a user would see all of the launching (a whole training step), the host's clock between two
synchronisations is taken instead.
Every round takes the next of several sets of inputs, which together are larger than the last-level cache of a GPU,
and whatever a round needs beforehand (a forward pass, cleared gradients) is done outside of the measured time.

Bytes. Each benchmark counts the bytes its op has to move: every input read once, every output written once. All
contenders of a group that compute the same from the same are given the same count, whatever they really move, so GB/s
is useful work per second. Beside it stands ``clone`` of a tensor of half as many bytes (half read, half written), timed
the same way in the same run.

Memory. ``peak_bytes`` is what one call (with its preparation, such as the forward pass before a backward one) needs at
its peak beyond its inputs and parameters, results included: from the allocator on CUDA, from
:func:`spectriton.memory.track` on the CPU.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from spectriton import PackedSpectrum, memory
from spectriton._backend import backend_name
from spectriton.timing import MOST_SETS, Stopwatch, copy_seconds, evict, input_sets

T = TypeVar("T")
Arguments = tuple[Any, ...]

QUICK = os.environ.get("BENCH_QUICK", "0") not in ("", "0")
DEVICE = torch.device(os.environ.get("BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
CUDA = DEVICE.type == "cuda"

# Seconds of rounds for each contender, and the fewest and most rounds.
BUDGET = float(os.environ.get("BENCH_BUDGET") or (0.05 if QUICK else 0.3 if CUDA else 1.0))
FEWEST, MOST = (3, 5) if QUICK else (10, 100) if CUDA else (5, 30)
if threads := os.environ.get("BENCH_THREADS", "1" if QUICK else ""):
    torch.set_num_threads(int(threads))
# Past this many seconds since the start, what is left is skipped.
LIMIT = float(os.environ.get("BENCH_SECONDS") or math.inf)

_BEGIN = time.monotonic()


def out_of_time() -> bool:
    """Whether ``BENCH_SECONDS`` are over."""
    return time.monotonic() - _BEGIN > LIMIT


def by_size(cuda: T, cpu: T, quick: T) -> T:
    """What suits the machine and the time there is."""
    return quick if QUICK else cuda if CUDA else cpu


def contenders(*everywhere: str, cuda: tuple[str, ...] = ()) -> Any:
    """Parametrises a benchmark over contenders, some of which only run on a GPU.

    "spectriton" is what runs by default, which the conditions of a table name; "spectriton reference" is the same in
    plain PyTorch: see ``backend_of_contender`` in ``bench/conftest.py``.
    """
    return pytest.mark.parametrize("contender", [*everywhere, *(cuda if CUDA else ())])


def generator(seed: int) -> torch.Generator:
    """Random numbers on the device."""
    return torch.Generator(DEVICE).manual_seed(seed)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` for fixed shapes; the benchmark is skipped where the machine cannot compile.

    The caches are cleared, so that no contender inherits another's guards.
    """
    torch.compiler.reset()
    run = torch.compile(function, dynamic=False)

    def call(*arguments: Any) -> Any:
        try:
            return run(*arguments)
        except torch._dynamo.exc.TorchDynamoException as reason:
            pytest.skip(f"torch.compile: {str(reason).strip().splitlines()[0]}")

    return call


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """``fp32``, or else TF32, in matrix products and convolutions; cuDNN picks the fastest algorithm.

    Autocast is left to the contender, call by call: nested in another one it would keep its copies of the weights.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = name != "fp32"
    cudnn.benchmark = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def error(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; NaN where anything is not finite."""
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    difference = torch.linalg.vector_norm(got.to(wide) - wanted.to(wide))
    return float((difference / torch.linalg.vector_norm(wanted.to(wide))).detach())


# -- the clock -------------------------------------------------------------------------------------------------------


STOPWATCH = Stopwatch(DEVICE)


def stopwatch() -> float:
    """The timer that pytest-benchmark is given: seconds of measured work so far."""
    return STOPWATCH.read()


# -- memory ----------------------------------------------------------------------------------------------------------


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of arguments: in tuples, lists and dictionaries, packed spectra and modules."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedSpectrum):
        yield from (value.edge, value.values, value.scales, value.bitmap, value.offsets)
    elif isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def nbytes(*values: Any) -> int:
    """Bytes of storage behind tensors, packed spectra, modules and collections of them, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(values)}
    return sum(storages.values())


def peak_bytes(call: Callable[[], Any], inputs: Any) -> int:
    """Bytes that ``call`` needs at its peak beyond ``inputs``."""
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with memory.track(DEVICE) as usage:
        # Storages count from the first operation that sees them: all inputs from the beginning.
        seen = [t.detach() for t in tensors_in(inputs)]
        call()
    return max(0, usage.peak_bytes - nbytes(seen))


# -- a measurement ---------------------------------------------------------------------------------------------------


class Measure:
    """Times one contender with pytest-benchmark and notes what belongs to it; the ``measure`` fixture.

    Args:
        benchmark: pytest-benchmark's fixture.
    """

    def __init__(self, benchmark: Any) -> None:
        self.benchmark = benchmark

    def __call__(
        self,
        group: str,
        contender: str,
        call: Callable[..., Any],
        inputs: Callable[[int], Arguments],
        moved: int,
        *,
        baseline: bool | None = None,
        prepare: Callable[..., Arguments] | None = None,
        flops: int | None = None,
        state: Any = (),
        events: bool = True,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Warm up, measure the peak, run the rounds.

        Args:
            group: contenders of one group stand side by side.
            contender: who.
            call: what is timed.
            inputs: makes the arguments of set number i.
            moved: counted bytes, reads and writes.
            baseline: whether this is what users have without spectriton; by default, what does not begin so.
            prepare: turns a set of inputs into the arguments of ``call`` before each round, outside of its time.
            flops: counted floating-point operations.
            state: modules and tensors besides the inputs that are there before the call.
            events: see :meth:`Stopwatch.lap`.
            notes: go into ``extra_info``.
        """
        benchmark = self.benchmark
        benchmark.group = group
        count = input_sets(moved, DEVICE)
        sets = [inputs(number) for number in range(count)]
        turn = 0

        def arguments() -> Arguments:
            nonlocal turn
            turn += 1
            chosen = sets[turn % count]
            if prepare is not None:
                chosen = prepare(*chosen)
            if prepare is not None or count == MOST_SETS:
                evict(DEVICE)
            return chosen

        def once() -> None:
            chosen = sets[0]
            # Bound to a name until the end: arguments are held by the caller in the rounds, too.
            made = chosen if prepare is None else prepare(*chosen)
            call(*made)

        laps: list[float] = []
        warm_up = max(2, count) if CUDA else 1 if QUICK else 2
        estimate = min(STOPWATCH.lap(call, arguments(), events) for _ in range(warm_up))
        peak = peak_bytes(once, (sets[0], state))
        rounds = int(max(FEWEST, min(MOST, BUDGET / max(estimate, 1e-7))))
        gc.collect()
        benchmark.pedantic(
            lambda *args: laps.append(STOPWATCH.lap(call, args, events)),
            setup=lambda: (arguments(), {}),
            rounds=rounds,
            warmup_rounds=0,
        )
        median = statistics.median(laps)
        memcpy = copy_seconds(moved, DEVICE, FEWEST, BUDGET / 2)
        benchmark.extra_info |= {
            "contender": contender,
            "baseline": not contender.startswith("spectriton") if baseline is None else baseline,
            "median_ms": 1e3 * median,
            "p20_ms": 1e3 * quantile(laps, 0.2),
            "p80_ms": 1e3 * quantile(laps, 0.8),
            "bytes_moved": moved,
            "gb_per_s": moved / median / 1e9,
            "memcpy_gb_per_s": moved / memcpy / 1e9,
            "memcpy_fraction": memcpy / median,
            "peak_bytes": peak,
            "input_sets": count,
            **({} if flops is None else {"flops": flops, "gflop_per_s": flops / median / 1e9}),
            **(notes or {}),
            **environment(),
        }


def quantile(values: list[float], share: float) -> float:
    """The value below which ``share`` of them lie, between neighbours in proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


# -- conditions ------------------------------------------------------------------------------------------------------


def commit() -> str:
    """``BENCH_COMMIT``, or the commit of the checkout with ``-dirty`` where files differ, or ``unknown``."""
    if name := os.environ.get("BENCH_COMMIT"):
        return name
    command = ["git", "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def device_name() -> str:
    """The name of the GPU, or of the processor as far as it is known."""
    if CUDA:
        return torch.cuda.get_device_name(DEVICE)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"{platform.machine()} CPU"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """What the figures were made on and with."""
    return {
        "device": device_name(),
        "device_type": DEVICE.type,
        "backend": backend_name(DEVICE),
        "commit": commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "quick": QUICK,
    }
