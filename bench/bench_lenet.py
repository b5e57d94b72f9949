"""A training step (forward, loss, backward, SGD with momentum) of the LeNet twins: batch 128, 28x28, one channel.

Timed by the host's clock between synchronisations, since launching is a part of what a user waits for; gradients are
cleared before each step, outside of it. On a GPU products are in TF32 unless bf16 (autocast) is said.

Bytes: the images; what is saved for backward, written once and read once (measured, see :mod:`spectriton.memory`);
and seven times the parameters (read by forward and by backward; gradient written and read; momentum read and
written; parameter written). ``peak_bytes`` is beyond images, parameters and momentum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.maps import photograph_like
from bench.timing import CUDA, DEVICE, Measure, by_size, compiled, contenders, generator, nbytes, precision
from spectriton import memory, models

BATCH = by_size(cuda=128, cpu=128, quick=32)
THRESHOLD = 0.5
NETWORKS: dict[str, dict[str, Any]] = {
    "spatial": {"variant": "spatial"},
    "spectriton": {"variant": "spectral"},
    "spectriton as in the paper": {"variant": "spectral", "paper": True},
    "spectriton fp32 values": {"variant": "spectral", "value_dtype": "float32"},
}


def build(name: str) -> nn.Module:
    """A twin by its name in :data:`NETWORKS`; all start from the same parameters."""
    torch.manual_seed(0)
    options = {"num_classes": 10, "in_channels": 1, "image_size": 28, "threshold": THRESHOLD} | NETWORKS[name]
    return models.build("lenet", **options).to(DEVICE)


def batch(number: int) -> tuple[Tensor, Tensor]:
    """(images, labels)."""
    images = photograph_like((BATCH, 1, 28, 28), number)
    return images, torch.randint(10, (BATCH,), generator=generator(number), device=DEVICE)


@contenders(
    "spatial",
    "spectriton",
    "spectriton as in the paper",
    "spectriton fp32 values",
    cuda=("spatial bf16", "spatial torch.compile", "spatial torch.compile bf16"),
)
def test_training_step(measure: Measure, contender: str) -> None:
    spectral = contender.startswith("spectriton")
    net = build(contender if spectral else "spatial")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    is_compiled = "compile" in contender
    run: Callable[..., Any] = net
    autocast = not spectral and contender.endswith("bf16")

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def prepare(images: Tensor, labels: Tensor) -> tuple[Any, ...]:
        optimizer.zero_grad(set_to_none=True)
        return images, labels

    with precision("tf32" if CUDA else "fp32"):
        losses = [float(step(*prepare(*batch(0)))) for _ in range(10)]
        assert losses[-1] < losses[0], losses
        assert nbytes(net) == nbytes(build("spatial")) + sum(
            4 * p.numel() for name, p in net.named_parameters() if name.endswith("activation_scale")
        )
        optimizer.zero_grad(set_to_none=True)
        # Of the network as it is: what a compiled one moves is counted by what it computes.
        with memory.track(DEVICE, model=net, optimizer=optimizer) as usage:
            step(*batch(0))
        if is_compiled:
            run = compiled(net)
        parameters = sum(4 * p.numel() for p in net.parameters())
        moved = nbytes(batch(0)) + 2 * usage.saved_bytes + 7 * parameters
        optimizer.zero_grad(set_to_none=True)
        measure(
            f"training step of LeNet, batch {BATCH}",
            contender,
            step,
            batch,
            moved,
            prepare=prepare,
            state=(net, [optimizer.state[p] for p in net.parameters()]),
            events=False,
            notes={} if is_compiled else usage.as_dict(),
        )
