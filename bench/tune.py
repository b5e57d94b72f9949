"""Tunes the kernels within a time limit: ``python -m bench.tune FOLDER``.

It does what ``spectriton tune`` does, needs no extras, and writes to the folder instead of the user's cache. Cases are
taken kernel by kernel in turn, so that a short time is spent on all of them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from spectriton import tuner, tuning


def cases() -> list[tuner.Case]:
    """The default ones: the first of each kernel, then the second, and so on."""
    kernels = [list(members) for _, members in itertools.groupby(tuner.default_cases(), lambda case: case.kernel)]
    turns = itertools.zip_longest(*kernels)
    return [case for turn in turns for case in turn if case is not None]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the file of tuned configurations goes")
    parser.add_argument("--seconds", type=float, default=60, help="no case is begun after these; default: 60")
    given = parser.parse_args(arguments)
    os.environ[tuning.DIRECTORY] = str(given.folder)
    if not torch.cuda.is_available():
        parser.error("there is no GPU to tune for")
    device = torch.device("cuda", torch.cuda.current_device())
    begin = time.monotonic()
    path, chosen, done = None, cases(), 0
    print(*tuner.table([])[0], sep=" | ")
    for result in tuner.tune(chosen, device):
        path = tuning.save(torch.cuda.get_device_name(device), [result.entry()])
        print(*tuner.table([result])[1], sep=" | ", flush=True)
        for config, reason in result.failures.items():
            print(f"{result.case}: {tuner.describe(config)} was left out ({reason})")
        done += 1
        if time.monotonic() - begin > given.seconds:
            break
    print(f"{done} of {len(chosen)} cases in {time.monotonic() - begin:.0f} s: {path}")
    if path is None:
        sys.exit("nothing was tuned")


if __name__ == "__main__":
    main()
