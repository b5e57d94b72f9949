"""What compressed maps cost in a training step, and what they save: ``python -m bench.compress_step [--predict]``.

A step is forward, loss, backward and SGD with momentum, on random images. *Slowdown* is against the faster of the exact
rows in bf16 autocast. *Saved* is what is held for backward at the end of forward, by :func:`spectriton.memory.track`.
*Peak* is everything alive: ``max_memory_allocated`` on CUDA, what :func:`spectriton.memory.track` sees on a CPU.
*Largest batch* (on CUDA) runs two steps; it is found by doubling, then bisection to within a sixteenth. Networks are
built, measured and freed one after another. CUDA events stand around whole steps, so what the host takes shows. In
single precision, convolutions may use TF32, as is PyTorch's default.

Before a row is measured its loss is compared with that of the exact network of the same weights, on the same images:
equal to the bit on a CPU; on CUDA within a thousandth, with cuDNN's deterministic algorithms for both.

With ``--predict`` nothing is measured: :mod:`bench.step_traffic` counts bytes and operations of the steps and says how
long an H100 would take at least; of compressed networks these are steps that take no statistics of maps. The variables
of ``bench/conftest.py`` hold for the rest.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from bench.compress_accuracy import CheckpointedSequential
from bench.step_traffic import NETWORK, Machine, Traffic, counting, instructions, tracked
from bench.timing import CUDA, DEVICE, QUICK, by_size, environment, quantile
from spectriton import _plans, memory, models
from spectriton.codec import BlockCodec
from spectriton.compression import compress


class Row(NamedTuple):
    """How the network of a row is trained.

    Attributes:
        bits: of :func:`spectriton.compress`, at its default density; None for exact maps.
        autocast: to bfloat16.
        channels_last: maps and weights stand so in memory.
        checkpointed: in about as many segments as the root of the layers.
    """

    bits: float | None = None
    autocast: bool = True
    channels_last: bool = True
    checkpointed: bool = False


EXACT = "exact bf16 channels_last"
ROWS = {
    "exact fp32": Row(autocast=False, channels_last=False),
    "exact bf16": Row(channels_last=False),
    EXACT: Row(),
    "compress 4 bits": Row(bits=4),
    "compress 6 bits": Row(bits=6),
    "compress 8 bits": Row(bits=8),
    "checkpointing": Row(checkpointed=True),
}
#: What matters most is measured first.
ORDER = (
    EXACT,
    "compress 4 bits",
    "checkpointing",
    "exact fp32",
    "exact bf16",
    "compress 8 bits",
    "compress 6 bits",
)
PREDICTED = ("exact fp32", EXACT, "compress 4 bits", "compress 8 bits")

MOST_BATCH = 1 << 14
LOSS_TOLERANCE = 1e-3 if CUDA else 0.0


class Step:
    """A training step of one row; everything is made on ``device``, after the same seed."""

    def __init__(self, row: Row, given: argparse.Namespace, model: str, batch: int, device: torch.device) -> None:
        self.row, self.device = row, device
        torch.manual_seed(0)
        with device:
            sizes = {"num_classes": given.classes, "image_size": given.image_size}
            net: nn.Module = models.build(model, "spatial", width=given.width, **sizes)
            self.images = torch.randn(batch, 3, given.image_size, given.image_size)
            self.labels = torch.randint(given.classes, (batch,))
        if row.channels_last:
            _to_channels_last(net)
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        if row.bits is not None:
            compress(net, bits=row.bits)
        if row.checkpointed:
            net.__class__ = CheckpointedSequential
        self.net = net
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, foreach=True)

    def loss(self) -> Tensor:
        """The loss of the batch, with its graph."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.row.autocast):
            return nn.functional.cross_entropy(self.net(self.images), self.labels)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()


def _to_channels_last(net: nn.Module) -> None:
    """As ``net.to(memory_format=torch.channels_last)``, which fake tensors do not take."""
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 4:
                turned = parameter.detach().contiguous(memory_format=torch.channels_last)
                setattr(module, name, nn.Parameter(turned))


def release() -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# -- measuring -------------------------------------------------------------------------------------------------------


def first_loss(row: Row, given: argparse.Namespace, model: str) -> float:
    """The loss before any training, by deterministic algorithms."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    try:
        step = Step(row, given, model, given.batch, DEVICE)
        torch.manual_seed(1)  # of dropout
        return float(step.loss().detach())
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before


def check_loss(row: Row, exact: float, given: argparse.Namespace, model: str) -> float:
    """Compare the loss with that of the exact network; returns the relative difference.

    Raises:
        AssertionError: it is larger than it may be.
    """
    difference = abs(first_loss(row, given, model) - exact) / abs(exact)
    assert difference <= LOSS_TOLERANCE, f"{model}, {row}: the loss is off by {difference:.2e}"
    return difference


def lap(step: Step) -> float:
    """Seconds of one step."""
    if not CUDA:
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(row: Row, given: argparse.Namespace, model: str) -> dict[str, Any]:
    """Seconds and bytes of a step."""
    step = Step(row, given, model, given.batch, DEVICE)
    # cuDNN tries its algorithms, Triton compiles, the optimiser makes its state.
    for _ in range(by_size(cuda=3, cpu=1, quick=1)):
        step()
    laps = [lap(step) for _ in range(by_size(cuda=3, cpu=3, quick=1))]
    rounds = min(30, int(given.row_seconds / max(statistics.median(laps), 1e-6)))
    laps += [lap(step) for _ in range(rounds - len(laps))]
    figures: dict[str, Any] = {"seconds": statistics.median(laps)}
    figures |= {"seconds_p20": quantile(laps, 0.2), "seconds_p80": quantile(laps, 0.8), "rounds": len(laps)}
    step.optimizer.zero_grad(set_to_none=True)
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        step.optimizer.zero_grad(set_to_none=True)
    with memory.track(DEVICE, model=step.net, optimizer=step.optimizer) as usage:
        step()
    return figures | {"saved_bytes": usage.saved_bytes, "peak_bytes": peak if CUDA else usage.peak_bytes}


def largest(fits: Callable[[int], bool], first: int, in_time: Callable[[], bool]) -> tuple[int, bool]:
    """The largest batch that fits, to within a sixteenth, and whether there was time to find it.

    From ``first`` it is doubled until it does not fit (at the most :data:`MOST_BATCH`), and bisected then.
    """
    low, high, bounded = 0, first, False
    while not bounded or high - low > max(1, low // 16):
        if high > MOST_BATCH or not in_time():
            return low, False
        batch = (low + high) // 2 if bounded else high
        if not fits(batch):
            high, bounded = batch, True
        elif bounded:
            low = batch
        else:
            low, high = batch, 2 * batch
    return low, True


def fits(row: Row, given: argparse.Namespace, model: str, batch: int, reasons: list[str]) -> bool:
    """Whether two steps find the memory they need; if they fail for another reason, that is added to the reasons."""
    failed = False
    try:
        step = Step(row, given, model, batch, DEVICE)
        step()
        step()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        failed = True
    except RuntimeError as error:
        # A library that takes no larger maps, or does not get its workspace.
        failed = True
        reasons.append(f"batch {batch}: {str(error).strip().splitlines()[0][:200]}")
    step = None  # type: ignore[assignment]
    # Only now is the error gone, and with it the frames that hold tensors.
    release()
    return not failed


def measure_all(given: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """The figures of every model and row; written to the file after each, so that nothing is lost."""
    begin = time.monotonic()

    def left() -> float:
        return given.seconds - (time.monotonic() - begin)

    torch.backends.cudnn.benchmark = True
    found: dict[str, dict[str, dict[str, Any]]] = {model: {} for model in given.models}
    for model in given.models:
        exact = None
        for name in sorted(given.rows, key=ORDER.index):
            row = ROWS[name]
            # Two rows at least, for a table.
            if left() < 0 and not (model == given.models[0] and len(found[model]) < 2):
                print(f"{model}, {name}: no time left", file=sys.stderr)
                continue
            if exact is None:
                exact = first_loss(ROWS[EXACT], given, model)
                release()
            same_arithmetic = name != EXACT and row.autocast and row.channels_last
            figures = {"loss_difference": check_loss(row, exact, given, model)} if same_arithmetic else {}
            release()
            found[model][name] = figures | measure(row, given, model)
            print(f"{model}, {name}: {1e3 * found[model][name]['seconds']:.1f} ms", file=sys.stderr, flush=True)
            write(found, given)
    release()
    for model, rows in found.items() if CUDA and not QUICK else ():
        for name, figures in rows.items():
            if left() < 10:
                continue
            reasons: list[str] = []
            batch, certain = largest(
                lambda batch, name=name, model=model, reasons=reasons: fits(ROWS[name], given, model, batch, reasons),
                given.batch,
                lambda: left() > 0,
            )
            figures |= {"largest_batch": batch, "largest_batch_certain": certain, "largest_batch_errors": reasons}
            print(f"{model}, {name}: batch {batch}", file=sys.stderr, flush=True)
            write(found, given)
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown of one model."""
    halves = ("exact bf16", EXACT)
    half = [rows[name] for name in halves if name in rows]
    fastest = min((r["seconds"] for r in half), default=None)
    peaks = [rows["exact fp32"]["peak_bytes"] if "exact fp32" in rows else None]
    peaks.append(min((r["peak_bytes"] for r in half), default=None))
    lines = [
        "| network | step, ms | p20 to p80 | slowdown | saved, MiB | peak, MiB | peak to fp32 | to bf16 "
        "| largest batch |",
        "| --- |" + " ---: |" * 8,
    ]
    for name in (name for name in ROWS if name in rows):
        row = rows[name]
        slower = None if fastest is None or name in ("exact fp32", *halves) else row["seconds"] / fastest - 1
        batch = row.get("largest_batch")
        cells = (
            name,
            f"{1e3 * row['seconds']:.1f}",
            f"{1e3 * row['seconds_p20']:.1f} to {1e3 * row['seconds_p80']:.1f}",
            "" if slower is None else f"{slower:+.1%}",
            f"{row['saved_bytes'] / 2**20:,.1f}",
            f"{row['peak_bytes'] / 2**20:,.1f}",
            *("" if peak is None else f"{row['peak_bytes'] / peak:.1%}" for peak in peaks),
            "" if batch is None else f"{'' if row['largest_batch_certain'] else 'at least '}{batch}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# -- predicting ------------------------------------------------------------------------------------------------------


class Counted(NamedTuple):
    """What was counted.

    Attributes:
        traffic: what a step moves and computes.
        usage: what it holds.
        first: operations of the first step: it takes statistics of all maps, as one in ``refresh`` does.
    """

    traffic: Traffic
    usage: memory.Usage
    first: int


def count(row: Row, given: argparse.Namespace, model: str, batch: int) -> Counted:
    """Counts a step that takes no statistics of maps, for which two come before where there are such."""
    traffic = Traffic()
    with counting(traffic), mock.patch.object(_plans, "is_due", lambda use, refresh: use == 1):
        step = Step(row, given, model, batch, torch.device("cpu"))
        for parameter in step.net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        step.optimizer.step()  # makes its state
        step.optimizer.zero_grad(set_to_none=True)
        traffic.operations.clear()
        first = 0
        # With the second step the allotment of bits settles.
        for _ in range(0 if row.bits is None else 2):
            step()
            first = first or len(traffic.operations)
        traffic.operations.clear()
        traffic.coded.clear()
        with tracked(step.net, step.optimizer) as usage:
            step()
    return Counted(traffic, usage, first or len(traffic.operations))


def predict(given: argparse.Namespace, model: str, machine: Machine, per_value: dict[str, float]) -> dict[str, Any]:
    """The predicted figures of a model's rows."""
    found: dict[str, Any] = {}
    for name in (name for name in ROWS if name in given.rows):
        traffic, usage, first = count(ROWS[name], given, model, given.batch)
        half = max(1, given.batch // 2)
        of_half = count(ROWS[name], given, model, half).usage
        each = (usage.peak_bytes - of_half.peak_bytes) / (given.batch - half)
        fixed = usage.peak_bytes - each * given.batch
        found[name] = {
            "read_bytes": sum(o.read for o in traffic.operations),
            "written_bytes": sum(o.written for o in traffic.operations),
            "flops": traffic.flops,
            "operations": len(traffic.operations),
            "first_operations": first,
            "saved_bytes": usage.saved_bytes,
            "peak_bytes": usage.peak_bytes,
            "largest_batch": int((machine.memory - fixed) / each),
            "parts": {
                part: {
                    "bytes": of_part.nbytes,
                    "operations": len(of_part.operations),
                    "seconds": of_part.seconds(machine, per_value),
                    "operators": operators(of_part),
                }
                for part, of_part in traffic.parts().items()
            },
            "maps": coded_maps(traffic),
            "coding_bytes": traffic.coding_bytes(),
            "coding_bytes_decoded_once": traffic.coding_bytes(decodes=1),
        }
        if ROWS[name].autocast:  # in single precision it depends on TF32
            found[name]["device_seconds"] = traffic.seconds(machine, per_value)
            found[name]["host_seconds"] = len(traffic.operations) * machine.launch
        print(f"{model}, {name}: counted", file=sys.stderr, flush=True)
    return found


def operators(traffic: Traffic) -> dict[str, dict[str, int]]:
    """Calls and bytes of each operator, most bytes first."""
    calls, nbytes = Counter(o.name for o in traffic.operations), Counter[str]()
    for o in traffic.operations:
        nbytes[o.name] += o.read + o.written
    return {name: {"calls": calls[name], "bytes": size} for name, size in nbytes.most_common()}


def coded_maps(traffic: Traffic) -> list[dict[str, Any]]:
    """All maps that were encoded or decoded, by shape and dtype."""
    kinds = Counter((c.shape, str(c.dtype).removeprefix("torch."), c.dense, c.stored, c.decoded) for c in traffic.coded)
    return [
        {"shape": shape, "dtype": dtype, "bytes": dense, "stored_bytes": stored}
        | {"encoded": times, "decoded": kinds[shape, dtype, dense, stored, True]}
        for (shape, dtype, dense, stored, decoded), times in kinds.items()
        if not decoded
    ]


def predicted_tables(model: str, rows: dict[str, Any], machine: Machine) -> str:
    """Markdown of one model: the steps, and the parts of those with compressed maps."""
    timed = {name: row for name, row in rows.items() if "device_seconds" in row}
    exact = timed[EXACT]
    lines = [
        f"## {model}",
        "",
        "| network | moved, GB | TFLOP | operations | device, ms | host, ms | slowdown of the device | with the host "
        "| saved, MiB | saved to bf16 | peak, MiB | largest batch |",
        "| --- |" + " ---: |" * 11,
    ]
    for name, row in rows.items():
        times: tuple[str, ...] = ("",) * 4
        if name in timed:
            device, host = row["device_seconds"], row["host_seconds"]
            base = exact["device_seconds"], max(exact["device_seconds"], exact["host_seconds"])
            times = (f"{1e3 * device:.1f}", f"{1e3 * host:.1f}")
            times += (
                ("", "")
                if name == EXACT
                else (f"{device / base[0] - 1:+.0%}", f"{max(device, host) / base[1] - 1:+.0%}")
            )
        cells = (
            name,
            f"{(row['read_bytes'] + row['written_bytes']) / 1e9:.1f}",
            f"{row['flops'] / 1e12:.2f}",
            f"{row['operations']:,}",
            *times,
            f"{row['saved_bytes'] / 2**20:,.0f}",
            f"{row['saved_bytes'] / exact['saved_bytes']:.1%}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{row['largest_batch']:,}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    for name, row in timed.items():
        if name == EXACT or not row["maps"]:
            continue
        base = exact["device_seconds"]
        lines += [
            "",
            f"Parts of *{name}*; shares are of the exact step's {1e3 * base:.1f} ms. In one of {BlockCodec().refresh} "
            f"steps statistics are taken: {row['first_operations']:,} operations.",
            "",
            "| part | moved, GB | operations | device, ms | share |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        parts = [(part, p["bytes"], f"{p['operations']:,}", p["seconds"]) for part, p in row["parts"].items()]
        original = exact["parts"][NETWORK]
        parts.append(("*exact step*", original["bytes"], f"{original['operations']:,}", base))
        for what, nbytes in (
            ("*coding at least, maps decoded as often as now*", row["coding_bytes"]),
            ("*coding at least, maps decoded once*", row["coding_bytes_decoded_once"]),
        ):
            parts.append((what, nbytes, "", nbytes / machine.copy))
        for part, nbytes, operations, seconds in parts:
            lines.append(f"| {part} | {nbytes / 1e9:.2f} | {operations} | {1e3 * seconds:.2f} | {seconds / base:.0%} |")
    return "\n".join(lines)


# -- output ----------------------------------------------------------------------------------------------------------


def write(found: dict[str, Any], given: argparse.Namespace, **more: Any) -> None:
    """The figures as JSON, and the tables beside it."""
    if given.json is None:
        return
    config = {name: vars(given)[name] for name in ("image_size", "batch", "width", "classes", "row_seconds")}
    stored = {"models": found, "config": config, "environment": environment(), **more}
    given.json.write_text(json.dumps(stored, indent=1) + "\n")
    given.json.with_suffix(".md").write_text(document(found, given))


def document(found: dict[str, Any], given: argparse.Namespace) -> str:
    """All tables."""
    sizes = f"batch {given.batch} of {given.image_size}x{given.image_size}, width {given.width:g}"
    if given.predict:
        parts = [f"# Training steps, predicted: {sizes}", "Counted for an H100; nothing was measured."]
        parts += [predicted_tables(model, rows, Machine()) for model, rows in found.items()]
    else:
        where = environment()
        losses = f"within {LOSS_TOLERANCE:g} of" if LOSS_TOLERANCE else "to the bit"
        parts = [
            f"# Training steps with compressed maps: {sizes}",
            f"{where['device']}, torch {where['torch']}, triton {where['triton']}, commit {where['commit']}. "
            f"First losses of compressed and checkpointed networks are those of the exact one {losses}.",
        ]
        parts += [f"## {model}\n\n{table(rows)}" for model, rows in found.items()]
    return "\n\n".join(parts) + "\n"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, small sizes where there is no GPU to measure."""
    parser = argparse.ArgumentParser(prog="python -m bench.compress_step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--predict", action="store_true", help="count, do not measure")
    parser.add_argument("--models", nargs="+", default=["resnet50", "vgg16_bn"], choices=list(models.NETWORKS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="which networks")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--width", type=float)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=1e6, help="begin nothing new later than this")
    parser.add_argument("--row-seconds", type=float, default=by_size(cuda=2.0, cpu=1.0, quick=0.2), help="of timing")
    parser.add_argument("--json", type=Path, help="write the figures here, and the tables beside it")
    found = parser.parse_args(given)
    small = not (found.predict or (CUDA and not QUICK))
    found.image_size = found.image_size or (64 if small else 224)
    found.batch = found.batch or (2 if small else 64)
    found.width = found.width or (0.125 if small else 1.0)
    found.rows = found.rows or (PREDICTED if found.predict else ORDER[:3] if QUICK else ORDER)
    if found.predict and EXACT not in found.rows:
        parser.error(f"--predict compares with {EXACT!r}: add it to --rows")
    return found


def main(options: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = arguments(options)
    if given.predict:
        machine, per_value = Machine(), instructions()
        found = {model: predict(given, model, machine, per_value) for model in given.models}
        write(found, given, machine=asdict(machine), instructions_per_value=per_value)
    else:
        found = measure_all(given)
    print(document(found, given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
