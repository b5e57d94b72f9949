"""What codecs make of the feature maps of a trained network, and of the gradients computed from them.

    PYTHONPATH=.:kernels python -m bench.codec_quality --data fashion-mnist --data-dir DIR --out bench/results/NAME

Trains five blocks of convolution, batch norm and ReLU (channels 16, 32, 32, 64, 64; pooled after the second and the
fourth) for a few hundred steps, then stores the maps of one batch by every codec and rate. Two sites are compared: the
output of each convolution, of which normalised and rectified maps are computed anew, and the output of each ReLU.

What is reported, per layer and as the mean over layers:

* ``bits``: stored bits per value, everything included;
* ``map``: relative L2 error of the decoded map;
* ``next``: relative L2 error of the output of the next convolution, computed from it;
* ``cosine`` and ``norm``: the gradient of the next convolution's weight, computed from the decoded map, against the
  exact one: cosine of the angle, and ratio of the norms. The gradient of the output is the exact one in both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectriton import data, environment
from spectriton.codec import BlockCodec, CastCodec, Codec, QuantiseCodec, SpectrumCodec
from spectriton.reference import block_codec

CHANNELS = (16, 32, 32, 64, 64)
POOLED_AFTER = (1, 3)
FIGURES = ("bits", "map", "next", "cosine", "norm")


class Stored(NamedTuple):
    """Decoded maps, and what they cost in bits per value."""

    maps: Tensor
    bits: float


def by(codec: Codec) -> Callable[[Tensor], Stored]:
    """A contender that stores maps by a codec."""

    def store(x: Tensor) -> Stored:
        encoded = codec.encode(x, seed=0)
        return Stored(encoded.decode(), encoded.bits_per_value)

    return store


def thresholded(rate: float, mix: int) -> Callable[[Tensor], Stored]:
    """A contender with the transform of :class:`BlockCodec` and another rule.

    The largest coefficients of all are kept as 4-bit values, with one scale for each component and frequency, and a
    bitmap says which; it costs one bit a coefficient, so the rate is above 1.
    """

    def store(x: Tensor) -> Stored:
        layout = block_codec.block_layout(tuple(x.shape), rate, mix)
        change = block_codec.stored_transform(block_codec.fit(x, layout, 1 << 24), layout)
        rows = block_codec.transform(x, layout, change).transpose(0, 1).flatten(0, 1)
        scales = rows.abs().amax(1, keepdim=True) / 7
        beside = 8 * (2 * layout.shape[1] + scales.numel() + (0 if layout.mix == 1 else layout.groups * layout.mix**2))
        keep = max(0, int((rate * x.numel() - rows.numel() - beside) / 4))
        threshold = rows.abs().flatten().kthvalue(max(1, rows.numel() - keep)).values
        values = (rows / scales.clamp_min(1e-30)).round() * scales * (rows.abs() > threshold)
        coefficients = values.view(layout.components, layout.frequencies, -1)
        maps = torch.empty_like(x)
        block_codec.transform_back(coefficients, layout, change, maps)
        return Stored(maps, (rows.numel() + 4 * keep + beside) / x.numel())

    return store


def contenders(rates: tuple[float, ...]) -> dict[str, Callable[[Tensor], Stored]]:
    """Everything that is compared, by name."""
    found: dict[str, Callable[[Tensor], Stored]] = {}
    for rate in rates:
        found[f"blocks, {rate:g}"] = by(BlockCodec(bits=4 * rate))
        found[f"blocks, stochastic, {rate:g}"] = by(BlockCodec(bits=4 * rate, rounding="stochastic"))
        found[f"blocks, channels not mixed, {rate:g}"] = by(BlockCodec(bits=4 * rate, mix=1))
        if rate > 1:
            found[f"blocks, thresholded, {rate:g}"] = thresholded(rate, 64)
            found[f"blocks, thresholded, channels not mixed, {rate:g}"] = thresholded(rate, 1)
        if rate > 0.6:
            found[f"spectrum, 4-bit, {rate:g}"] = by(SpectrumCodec(density=(rate - 0.5) / 4))
    found["groups, 1-bit, stochastic"] = by(QuantiseCodec(bits=1))
    found["groups, 2-bit, stochastic"] = by(QuantiseCodec(bits=2))
    found["groups, 2-bit, nearest"] = by(QuantiseCodec(bits=2, rounding="nearest"))
    found["groups, 4-bit, stochastic"] = by(QuantiseCodec(bits=4))
    found["bfloat16"] = by(CastCodec(torch.bfloat16))
    return found


class Network(nn.Module):
    """Five blocks of convolution, batch norm and ReLU, and a linear classifier of their means."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = (channels, *CHANNELS)
        pairs = list(pairwise(widths))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o in pairs)
        self.classifier = nn.Linear(widths[-1], classes)

    def normalised(self, layer: int, x: Tensor) -> Tensor:
        """The output of a layer's ReLU, from that of its convolution."""
        return self.norms[layer](x).relu()

    def following(self, layer: int, x: Tensor) -> Tensor:
        """What the next convolution sees, from the output of a layer's ReLU."""
        return functional.max_pool2d(x, 2) if layer in POOLED_AFTER else x

    def forward(self, x: Tensor, seen: list[Tensor] | None = None) -> Tensor:
        """Logits ``(B, classes)``; outputs of the convolutions are appended to ``seen``."""
        for layer, conv in enumerate(self.convs):
            x = conv(x)
            if seen is not None:
                x.retain_grad()
                seen.append(x)
            x = self.following(layer, self.normalised(layer, x))
        return self.classifier(x.mean((2, 3)))


def train(network: Network, images: Tensor, labels: Tensor, steps: int, batch: int, seed: int) -> list[float]:
    """Train by stochastic gradient descent; returns the losses."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(0, images.shape[0], (batch,), generator=generator)
        loss = functional.cross_entropy(network(images[chosen]), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def error(got: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    return float((got - expected).norm() / expected.norm())


def measure(network: Network, images: Tensor, labels: Tensor, rates: tuple[float, ...]) -> list[dict[str, Any]]:
    """One record for each contender, site and layer. ``next``, ``cosine`` and ``norm`` lack for the last layer."""
    seen: list[Tensor] = []
    functional.cross_entropy(network(images, seen), labels).backward()
    records = []
    with torch.no_grad():
        for layer, output in enumerate(seen):
            rectified = network.normalised(layer, output)
            # Normalised by the statistics of the exact map, as a backward pass would.
            variance, mean = torch.var_mean(output, (0, 2, 3), unbiased=False)
            norm = network.norms[layer]

            def normalised(maps: Tensor, mean: Tensor = mean, variance: Tensor = variance, norm: Any = norm) -> Tensor:
                return functional.batch_norm(maps, mean, variance, norm.weight, norm.bias).relu()

            for site, exact in (("conv", output), ("relu", rectified)):
                for name, store in contenders(rates).items():
                    maps, bits = store(exact.detach())
                    record = {"contender": name, "site": site, "layer": layer, "bits": bits, "map": error(maps, exact)}
                    if layer + 1 < len(seen):
                        conv, grad = network.convs[layer + 1], seen[layer + 1].grad
                        inputs = [
                            network.following(layer, normalised(m) if site == "conv" else m) for m in (maps, exact)
                        ]
                        record["next"] = error(conv(inputs[0]), conv(inputs[1]))
                        got, expected = (
                            nn.grad.conv2d_weight(i, conv.weight.shape, grad, padding=1).flatten() for i in inputs
                        )
                        record["cosine"] = float(functional.cosine_similarity(got, expected, dim=0))
                        record["norm"] = float(got.norm() / expected.norm())
                    records.append(record)
    return records


def table(records: list[dict[str, Any]], site: str) -> str:
    """A Markdown table of means over layers."""
    lines = ["| codec, bits asked for | bits | map | next | 1 - cosine | norm |", "|" + " --- |" * 6]
    for name in dict.fromkeys(record["contender"] for record in records):
        chosen = [record for record in records if record["contender"] == name and record["site"] == site]
        mean = {f: statistics.fmean(record[f] for record in chosen if f in record) for f in FIGURES}
        lines.append(
            f"| {name} | {mean['bits']:.2f} | {mean['map']:.4f} | {mean['next']:.4f} | {1 - mean['cosine']:.5f} | "
            f"{mean['norm']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, measure, and write ``codec_quality.json`` and ``codec_quality.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=data.names(), default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rates", default="0.5,1,1.5,2", help="bits per value")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    images = data.load(options.data, data_dir=options.data_dir, train_limit=20_000, test_limit=2_000)
    if not isinstance(images, data.ImageData):
        parser.error(f"--data: {options.data} does not fit in memory")
    torch.manual_seed(options.seed)
    network = Network(images.channels, images.num_classes)
    inputs = images.to_input(images.train_images)
    begin = time.perf_counter()
    losses = train(network, inputs, images.train_labels, options.steps, options.batch, options.seed)
    seconds = time.perf_counter() - begin
    network.eval()
    with torch.no_grad():
        right = network(images.to_input(images.test_images)).argmax(1) == images.test_labels
    network.train()
    rates = tuple(float(rate) for rate in options.rates.split(","))
    batch = slice(0, options.batch)
    records = measure(network, inputs[batch], images.train_labels[batch], rates)
    report = {
        "config": {
            "data": options.data,
            "steps": options.steps,
            "batch": options.batch,
            "seed": options.seed,
            "rates": rates,
            "channels": CHANNELS,
        },
        "training": {
            "last_loss": statistics.fmean(losses[-10:]),
            "test_accuracy": float(right.float().mean()),
            "seconds": seconds,
        },
        "environment": {**environment.collect(torch.device("cpu")), "cpus": os.cpu_count()},
        "records": records,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "codec_quality.json").write_text(json.dumps(report, indent=1))
    text = [
        f"# Codecs on the maps of a network of five convolutions, {options.data}\n",
        f"After {options.steps} steps of batch {options.batch} (seed {options.seed}, test accuracy "
        f"{report['training']['test_accuracy']:.3f}); one batch of {options.batch}; torch "
        f"{report['environment']['torch']}, {os.cpu_count()} CPUs. Means over layers; what the figures are is told in "
        "`bench/codec_quality.py`.\n",
    ]
    for site, what in (("conv", "Outputs of convolutions"), ("relu", "Outputs of ReLU")):
        text += [f"## {what}\n", table(records, site)]
    (options.out / "codec_quality.md").write_text("\n".join(text))
    print("\n".join(text))
    return report


if __name__ == "__main__":
    main()
