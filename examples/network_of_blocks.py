"""A network of packed blocks, trained on handwritten digits, with the density of each block as it learns.

python examples/network_of_blocks.py [--steps 60] [--out densities.png]
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from spectriton import nn as snn


def network() -> nn.Sequential:
    """Feature maps are packed from the first layer to the last maximum, where the maps are 8x8."""
    block = {"threshold": 0.3, "norm": True, "activation_scale": 5.0, "value_dtype": "float16"}
    return nn.Sequential(
        snn.ToSpectral(threshold=0.0),
        snn.SpecBlock(1, 16, 3, **block),
        snn.MaxPool2d(2, threshold=0.3),
        snn.SpecBlock(16, 32, 3, **block),
        snn.GlobalMaxPool(),
        nn.Linear(32, 10),
    )


def main(steps: int, out: str) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float().div(16)[:, None], torch.from_numpy(digits.target)
    images = nn.functional.interpolate(images, size=16, mode="bilinear")
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    packing = {name: m for name, m in model.named_modules() if getattr(m, "threshold", None)}
    densities: dict[str, list[float]] = {name: [] for name in packing}
    for step in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, module in packing.items():
            densities[name].append(module.last_density)
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.3f}")
    with torch.no_grad():
        print(f"accuracy on the training images: {(model.eval()(images).argmax(1) == labels).float().mean():.1%}")
    figure, axis = plt.subplots(figsize=(6, 3.5))
    for name, values in densities.items():
        axis.plot(values, label=f"{name}: {type(packing[name]).__name__}")
    axis.set(
        xlabel="step", ylabel="fraction of coefficients kept", ylim=(0, 1), title="handwritten digits, threshold 0.3"
    )
    axis.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    print(f"plot: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="densities.png")
    given = parser.parse_args()
    main(given.steps, given.out)
