"""VGG-16 and DenseNet on Fashion-MNIST with their spectral twins: accuracy against memory, with nothing installed.

    PYTHONPATH=.:kernels python -m bench.networks_accuracy --data-dir DIR --out FOLDER --seconds 540

The full networks at batch 128 unless options say otherwise: a sweep as ``spectriton sweep`` makes it, without its
plots. It stops after so many seconds; the same command goes on from there, even within an epoch.
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

from spectriton.compare import CompareConfig
from spectriton.report import PlainProgress
from spectriton.sweep import sweep
from spectriton.train import Interrupted, TrainConfig


def main() -> None:
    """Train what is missing, and write ``sweep.md``, ``sweep.csv`` and ``sweep.json``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["vgg16_bn", "densenet"])
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--threshold", type=float, default=0.03)
    parser.add_argument("--value-dtype", default="int8")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--train-limit", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    options = parser.parse_args()
    config = CompareConfig(
        data=options.data,
        data_dir=options.data_dir,
        image_size=32,
        width=options.width,
        value_dtype=options.value_dtype,
        train_limit=options.train_limit,
        train=TrainConfig(
            epochs=options.epochs, batch_size=options.batch_size, lr_halve_every=1, device=options.device
        ),
    )
    stop = threading.Event()
    timer = threading.Timer(min(options.seconds, threading.TIMEOUT_MAX), stop.set)
    timer.daemon = True
    timer.start()
    try:
        sweep(
            config,
            options.out,
            models=options.models,
            thresholds=[options.threshold],
            seeds=options.seeds,
            progress=PlainProgress(),
            stop=stop,
            plots=False,
        )
    except Interrupted as stopped:
        print(f"out of time: {stopped}; run the same command again to go on")
    written = options.out / "sweep.md"
    if written.exists():
        print(written.read_text())


if __name__ == "__main__":
    main()
