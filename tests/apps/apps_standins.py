"""Stand-ins for the networks: what the applications do is tested apart from what the networks compute."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from spectriton.data import ImageData


class FakeBlock(nn.Module):
    """Passes its input on and reports a density, as the packing blocks do."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.last_density: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last_density = float((x.detach().abs() >= self.threshold).float().mean())
        return x


def tiny_network(threshold: float | None = None, channels: int = 1, classes: int = 10, size: int = 8) -> nn.Sequential:
    """Convolution, batch norm, dropout and a linear layer: every kind of state a checkpoint has to hold."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()]
    if threshold is not None:
        layers.append(FakeBlock(threshold))
    layers += [nn.AdaptiveAvgPool2d(4), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, classes)]
    return nn.Sequential(*layers)


def made_up_data(train: int = 70, test: int = 30, size: int = 8) -> ImageData:
    """Images whose class is where they are bright."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(train + test) % 10
    images = torch.randint(0, 60, (train + test, 1, size, size), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, label % size, label // size : label // size + 4] = 250
    images = images.to(torch.uint8)
    return ImageData("made-up", images[:train], labels[:train], images[train:], labels[train:], 10, (0.15,), (0.2,))


def run_and_kill(script: str, argument: Path, line: str) -> None:
    """Run a script of Python in a process of its own, and kill that once it prints ``line``.

    The script gets ``argument`` and the folder of these tests.
    """
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(argument), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
        env=environ,
    )
    assert process.stdout is not None
    with process, process.stdout:
        for printed in process.stdout:
            if printed.strip() == line:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
