"""An ordinary network with compressed feature maps: what a step saves, and how good its gradients are.

python examples/compress_a_network.py [--out gradients.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import spectriton
from spectriton import compression, memory
from spectriton.plots import draw_gradients


def network() -> nn.Sequential:
    """Nothing of spectriton in here."""
    layers: list[nn.Module] = []
    channels = 1
    for width in (16, 32, 32):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def main(out: str) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = (
        torch.from_numpy(digits.images[:128]).float().div(16)[:, None],
        torch.from_numpy(digits.target[:128]),
    )
    images = nn.functional.interpolate(images, size=32, mode="bilinear")
    model = network()

    def step() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()

    with memory.track("cpu", model=model) as before:
        step()
    spectriton.compress(model, density=0.25, bits=6)
    with memory.track("cpu", model=model) as after:
        step()
    print(compression.describe(model))
    print(f"saved for backward: {before.saved_bytes:,} bytes before, {after.saved_bytes:,} after")
    report = compression.gradient_report(model, [(images, labels)])
    print(report)
    draw_gradients(report.to_dict(), Path(out))
    print(f"plot: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="gradients.png")
    main(parser.parse_args().out)
