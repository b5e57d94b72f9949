"""How few Fourier coefficients a picture needs: handwritten digits packed at several densities.

python examples/packed_digits.py [--out packed_digits.png]
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from spectriton import ops

DENSITIES = (1.0, 0.5, 0.25, 0.1)


def main(out: str) -> None:
    pictures = torch.from_numpy(load_digits().images[:8]).float().div(16)[:, None]  # (8, 1, 8, 8)
    pictures = torch.nn.functional.interpolate(pictures, size=32, mode="bicubic")
    figure, axes = plt.subplots(len(DENSITIES), 1, figsize=(8, 5), squeeze=False)
    for axis, density in zip(axes.flat, DENSITIES, strict=True):
        packed = ops.to_spectral(pictures, density=density, value_dtype=torch.float16)
        again = ops.to_spatial(packed)
        error = (again - pictures).norm() / pictures.norm()
        axis.imshow(again[:, 0].permute(1, 0, 2).reshape(32, -1), cmap="gray", vmin=0, vmax=1)
        axis.set_title(
            f"{packed.density:.0%} kept, {packed.nbytes / packed.dense_nbytes:.0%} of the bytes, error {error:.1%}"
        )
        axis.axis("off")
        print(packed)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    print(f"plot: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="packed_digits.png")
    main(parser.parse_args().out)
