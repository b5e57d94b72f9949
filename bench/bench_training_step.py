"""A training step (forward, loss, backward, SGD with momentum) of networks and of their spectral twins.

Timed by the host's clock between synchronisations, since launching is a part of what a user waits for; gradients are
cleared before each step, outside of it. On a GPU products are in TF32 unless bf16 (autocast) is said; there the
original also runs as cuDNN likes it best, channels last.

Bytes: the images; what is saved for backward, written once and read once (measured, see :mod:`spectriton.memory`);
and seven times the parameters (read by forward and by backward; gradient written and read; momentum read and
written; parameter written). ``peak_bytes`` is beyond images, parameters and momentum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bench.maps import photograph_like
from bench.timing import CUDA, DEVICE, Measure, by_size, compiled, contenders, generator, nbytes, precision
from spectriton import memory, models, ops

THRESHOLD = 0.5
TWINS: dict[str, dict[str, Any]] = {
    "spectriton": {},
    "spectriton int8 values": {"value_dtype": "int8"},
    "spectriton as in the paper": {"paper": True},
}


# The host does not wait for packing, see spectriton.ops.run_ahead; gradients are cleared within the step then.
AHEAD = " run ahead"


class Task(NamedTuple):
    """A network and its images."""

    model: str
    batch: int
    channels: int
    size: int
    classes: int = 10
    width: float = 1.0

    def __str__(self) -> str:
        width = "" if self.width == 1 else f" (width {self.width:g})"
        return f"{self.model}{width}, {self.batch}x{self.channels}x{self.size}x{self.size}"

    def build(self, contender: str) -> nn.Module:
        """The network of a contender; all start from the same parameters."""
        torch.manual_seed(0)
        twin = TWINS.get(contender.removesuffix(AHEAD))
        options = {"variant": "spatial"} if twin is None else {"variant": "spectral", "threshold": THRESHOLD} | twin
        network = models.build(
            self.model,
            num_classes=self.classes,
            in_channels=self.channels,
            image_size=self.size,
            width=self.width,
            **options,
        ).to(DEVICE)
        return network.to(memory_format=torch.channels_last) if "channels last" in contender else network

    def images(self, number: int) -> tuple[Tensor, Tensor]:
        """(images, labels)."""
        images = photograph_like((self.batch, self.channels, self.size, self.size), number)
        return images, torch.randint(self.classes, (self.batch,), generator=generator(number), device=DEVICE)


LENET = Task("lenet", by_size(cuda=128, cpu=128, quick=32), 1, 28)
TASKS = by_size(
    cuda=[LENET, Task("vgg16_bn", 64, 3, 224, 1000), Task("vgg16_bn", 128, 1, 32), Task("densenet", 128, 1, 32)],
    cpu=[LENET, Task("vgg16_bn", 128, 1, 32, width=0.125), Task("densenet22", 128, 1, 32, width=0.5)],
    quick=[LENET, Task("vgg16_bn", 4, 1, 32, width=0.125)],
)


@pytest.mark.parametrize("task", TASKS, ids=str)
@contenders(
    "spatial",
    *TWINS,
    cuda=(
        f"spectriton{AHEAD}",
        "spatial channels last",
        "spatial bf16",
        "spatial channels last bf16",
        "spatial torch.compile",
        "spatial torch.compile bf16",
    ),
)
def test_training_step(measure: Measure, task: Task, contender: str) -> None:
    net = task.build(contender)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    is_compiled = "compile" in contender
    run: Callable[..., Any] = net
    autocast = contender.endswith("bf16")

    def backward(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(run(images), labels)
        loss.backward()
        return loss.detach()

    def repeatable(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        return backward(images, labels)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        if contender.endswith(AHEAD):
            loss = ops.run_ahead(partial(repeatable, images, labels), net)
        else:
            loss = backward(images, labels)
        optimizer.step()
        return loss

    def prepare(images: Tensor, labels: Tensor) -> tuple[Any, ...]:
        optimizer.zero_grad(set_to_none=True)
        return images, labels

    with precision("tf32" if CUDA else "fp32"):
        losses = [float(step(*prepare(*task.images(0)))) for _ in range(10)]
        assert losses[-1] < losses[0], losses
        optimizer.zero_grad(set_to_none=True)
        # Of the network as it is: what a compiled one moves is counted by what it computes.
        with memory.track(DEVICE, model=net, optimizer=optimizer) as usage:
            step(*task.images(0))
        if is_compiled:
            run = compiled(net)
        parameters = sum(4 * p.numel() for p in net.parameters())
        moved = nbytes(task.images(0)) + 2 * usage.saved_bytes + 7 * parameters
        optimizer.zero_grad(set_to_none=True)
        measure(
            f"training step of {task}",
            contender,
            step,
            task.images,
            moved,
            prepare=prepare,
            state=(net, [optimizer.state[p] for p in net.parameters()]),
            events=False,
            notes={} if is_compiled else usage.as_dict(),
        )
