"""Train a classifier so that a run can be cut short anywhere and go on to the same result.

The recipe is the SpecNet paper's: SGD with batches of 128, momentum 0.95, no weight decay, a learning rate of 0.02 that
is halved every 50 epochs. Everything that decides the outcome (order of the images, random states, weights, optimiser
state) is either derived from the seed and the epoch or held in the checkpoint.

In several processes (:mod:`spectriton.distributed`) every global batch is shared out: each process computes on its
share, gradients are weighted by the shares, and figures are those of all images. So the step is that of one process on
the whole batch, but for what is drawn or normalised within a share: dropout, and the statistics of batch norm.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import random
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from spectriton import _check, distributed, ops
from spectriton.budget import BudgetController
from spectriton.images import Images
from spectriton.nn.transform import PackedOutput

OPTIMIZERS = ("sgd", "adam")
AMP_MODES = ("none", "bf16")

# Settings that may differ between the run that wrote a checkpoint and the one that goes on with it: they do not change
# what any epoch computes. The learning rate depends on the epoch alone, so a run can be extended.
_FREE_SETTINGS = frozenset({"epochs", "workers"})
_CHECKPOINT_FORMAT = 1
# Apart from one another, so that no rank of one seed draws what a rank of a neighbouring seed does.
_SEED_STRIDE = 1_000_003
# With fewer classes, five guesses say little.
_TOP5_FROM = 100


@dataclass(frozen=True)
class TrainConfig:
    """The recipe; the defaults are the paper's.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step, over all processes; their shares differ by one image at most. A last batch that
            would leave a process fewer than two images is left out (batch norm cannot use a single one).
        optimizer: ``"sgd"`` or ``"adam"`` (which ignores ``momentum``).
        lr: learning rate of the first epoch.
        lr_halve_every: epochs after which the learning rate is halved; 0 keeps it.
        momentum: of SGD, in [0, 1).
        weight_decay: L2 penalty.
        seed: of everything random in a run.
        device: ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda"`` (of several processes each takes the device
            of its local rank) or ``"cuda:1"``.
        amp: ``"bf16"`` for autocast, or ``"none"``.
        workers: threads (for streamed images, processes) of each process that fetch batches ahead of the step; 0
            fetches in line.
        augment: augment training images as their set says; off, they are what test images are.

    Raises:
        ValueError: a value out of range, or CUDA asked for where there is none.
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.02
    lr_halve_every: int = 50
    momentum: float = 0.95
    weight_decay: float = 0.0
    seed: int = 0
    device: str = "auto"
    amp: str = "none"
    workers: int = 0
    augment: bool = True

    def __post_init__(self) -> None:
        checks: list[tuple[str, bool, str]] = [
            ("epochs", self.epochs >= 1, "a whole number from 1"),
            ("batch_size", self.batch_size >= 1, "a whole number from 1"),
            ("lr", math.isfinite(self.lr) and self.lr > 0, "a finite number above 0"),
            ("lr_halve_every", self.lr_halve_every >= 0, "a whole number from 0 (never)"),
            ("momentum", 0 <= self.momentum < 1, "a number from 0 to below 1"),
            ("weight_decay", math.isfinite(self.weight_decay) and self.weight_decay >= 0, "a finite number from 0"),
            ("seed", 0 <= self.seed < 2**32, "a whole number from 0 to 2**32 - 1"),
            ("workers", 0 <= self.workers <= 64, "a whole number from 0 to 64"),
        ]
        for name, good, expected in checks:
            if not good:
                option = "--" + name.replace("_", "-")
                _check.fail("TrainConfig", name, repr(getattr(self, name)), expected, f"change {name} ({option})")
        _check.check_choice("TrainConfig", "optimizer", self.optimizer, OPTIMIZERS)
        _check.check_choice("TrainConfig", "amp", self.amp, AMP_MODES)
        self.resolve_device()

    def resolve_device(self) -> torch.device:
        """The device to run on, ``"auto"`` resolved."""
        expected = "auto, cpu, cuda or cuda:N"
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(automatic if self.device == "auto" else self.device)
        except RuntimeError:
            device = torch.device("meta")
        if device.type == "cuda" and device.index is None and distributed.world_size() > 1:
            device = torch.device("cuda", distributed.local_rank())
        if device.type not in ("cpu", "cuda"):
            _check.fail("TrainConfig", "device", repr(self.device), expected, "change device (--device)")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            _check.fail(
                "TrainConfig",
                "device",
                repr(self.device),
                f"a device of this machine for each process ({torch.cuda.device_count()} CUDA devices)",
                "start as many processes as there are devices, use --device cpu, or install a torch build with CUDA",
            )
        return device

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        return self.lr * 0.5 ** (epoch // self.lr_halve_every) if self.lr_halve_every else self.lr


class Progress(Protocol):
    """Is told how training goes. Epochs count from 0; ``title`` names the network."""

    def begin(self, title: str, epochs: int, batches: int, done: int) -> None:
        """Training starts: ``batches`` steps an epoch; ``done`` steps lie behind where a run is resumed."""

    def step(self, epoch: int, batch: int) -> None:
        """Step ``batch`` (from 0) of an epoch is over."""

    def epoch(self, record: Mapping[str, Any]) -> None:
        """An epoch is over; ``record`` is its entry of the history."""

    def end(self) -> None:
        """Training is over, or was cut short."""


class Silent:
    """A :class:`Progress` that shows nothing."""

    def begin(self, title: str, epochs: int, batches: int, done: int) -> None:
        """Nothing."""

    def step(self, epoch: int, batch: int) -> None:
        """Nothing."""

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


class Interrupted(Exception):
    """Training was asked to stop; the checkpoint (where there is one) holds everything up to here."""


class Diverged(ArithmeticError):
    """The loss of an epoch is not a finite number."""


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        loss: mean cross entropy.
        accuracy: fraction in [0, 1].
        top5_accuracy: fraction whose class is among the five with the highest scores; ``None`` below 100 classes.
        density: mean fraction of kept coefficients in [0, 1], for each block that reports one.
    """

    loss: float
    accuracy: float
    top5_accuracy: float | None
    density: dict[str, float]


@dataclass
class TrainResult:
    """What :func:`train` did.

    Attributes:
        history: one entry an epoch: ``epoch`` (from 1), ``lr``, ``train_loss``, ``train_accuracy``, ``test_loss``,
            ``test_accuracy`` (fractions in [0, 1]), ``seconds`` (training only), from 100 classes on
            ``test_top5_accuracy``, where the network has packing blocks ``density`` (of the test pass, by block), and
            with a controller ``threshold_factor``.
        resumed_epochs: whole epochs that were read from the checkpoint.
    """

    history: list[dict[str, Any]]
    resumed_epochs: int = 0

    @property
    def test_accuracy(self) -> float:
        """Fraction in [0, 1], of the last epoch."""
        return float(self.history[-1]["test_accuracy"])

    @property
    def density(self) -> dict[str, float]:
        """Of the last epoch's test pass, by block."""
        return dict(self.history[-1].get("density", {}))

    @property
    def seconds_per_epoch(self) -> float:
        """Median over the epochs, evaluation excluded."""
        return float(median(record["seconds"] for record in self.history))


@dataclass
class Checkpoint:
    """Where a run keeps its state, and what has to agree before it goes on from there.

    Attributes:
        path: the file. It is replaced in one step, so that it is whole whenever the process dies.
        identity: settings beyond the recipe that decide the outcome (model, data, ...), of plain values.
        every_seconds: how often to write within an epoch; after an epoch it is always written.
        fresh: start anew; an older file is deleted.
    """

    path: Path
    identity: dict[str, Any] = field(default_factory=dict)
    every_seconds: float = 60.0
    fresh: bool = False

    def load(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Read the state, onto the CPU; ``None`` where there is no file. Makes the folder that it is written to.

        Raises:
            ValueError: the file is damaged, or of another configuration; or the folder cannot be written to, which is
                better known before training than at the first :meth:`save`.
        """
        distributed.on_main(self._make_folder)
        if self.fresh:
            distributed.on_main(self.path.unlink, missing_ok=True)
        if not self.path.exists():
            return None
        fix = "delete the file, or start anew with --fresh (fresh=True)"
        try:
            raw = self.path.read_bytes()
            # torch.load does not look at the checksums it writes, so a flipped bit would pass for a weight.
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"checksum of {damaged}")
            state = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
            found = state["identity"]
            if state["format"] != _CHECKPOINT_FORMAT:
                raise ValueError(f"format {state['format']}")
        except (
            zipfile.BadZipFile,
            zipfile.LargeZipFile,
            pickle.UnpicklingError,
            RuntimeError,
            NotImplementedError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            EOFError,
            OSError,
        ) as error:
            _check.fail(
                "checkpoint",
                str(self.path),
                f"unreadable: {type(error).__name__}: {error}".splitlines()[0],
                "a checkpoint written by spectriton",
                fix,
            )
        different = sorted(key for key in {*found, *identity} if found.get(key) != identity.get(key))
        if different:
            _check.fail(
                "checkpoint",
                str(self.path),
                "of a run with " + ", ".join(f"{key}={found.get(key)!r}" for key in different),
                "one of this configuration: " + ", ".join(f"{key}={identity.get(key)!r}" for key in different),
                "repeat the settings of that run, choose another --out, or start anew with --fresh (fresh=True)",
            )
        return dict(state)

    def _make_folder(self) -> None:
        folder, reason = self.path.parent, "it is not writable"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return
        except OSError as error:
            reason = error.strerror or str(error)
        got = f"{folder} ({reason})"
        _check.fail("checkpoint", "folder", got, "a folder that can be written to", "choose another --out")

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state; whoever reads the file sees the old one or the new one, never a part."""
        partial = self.path.with_name(self.path.name + ".partial")
        with open(partial, "wb") as file:
            torch.save({"format": _CHECKPOINT_FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)


def seed_everything(seed: int) -> None:
    """Seed the generators of torch (every device), numpy and Python."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of a recipe, at the learning rate of the first epoch."""
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def block_densities(model: nn.Module) -> dict[str, float]:
    """Fraction of kept coefficients in each packing block's last forward, by qualified module name.

    Whatever has an attribute ``last_density`` that is not ``None`` counts as such a block.
    """
    found = {}
    for name, module in model.named_modules():
        density = getattr(module, "last_density", None)
        if density is not None:
            found[name] = float(density)
    return found


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    labels: Tensor,
    amp: str = "none",
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One step: forward, backward, update.

    Args:
        model: gives ``(B, classes)`` scores for ``inputs``.
        optimizer: of the model's parameters.
        inputs: ``(B, C, H, W)`` float.
        labels: ``(B,)`` int64.
        amp: ``"bf16"`` runs the forward under autocast.
        weight: of the gradient; of several processes, what makes up for shares of the batch that are not equal.

    Returns:
        Mean cross entropy and number of right answers, 0-dimensional tensors on the device (not waited for).
    """

    def gradients() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(inputs.device, amp):
            scores = model(inputs)
            loss = functional.cross_entropy(scores, labels)
        right = (scores.detach().argmax(1) == labels).sum()
        del scores
        loss.backward(torch.full_like(loss, weight))
        return loss.detach(), right

    packs = inputs.is_cuda and any(isinstance(module, PackedOutput) for module in model.modules())
    loss, right = ops.run_ahead(gradients, model) if packs else gradients()
    optimizer.step()
    return loss, right


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    to_input: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 128,
    amp: str = "none",
) -> Evaluation:
    """Loss, accuracy and block densities on labelled images, in evaluation mode; the model's mode is restored.

    Of several processes each may hand in other images; the figures are those of all of them.

    Args:
        model: on the device to run on.
        images: ``(N, C, H, W)``, on any device.
        labels: ``(N,)`` int64.
        to_input: makes network input of a batch on the device, such as :meth:`ImageData.to_input`; nothing where left
            out.
        batch_size: images at a time.
        amp: as in :class:`TrainConfig`.
    """
    device = _device_of(model)
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return _evaluate(model, _moved(batches, device), device, to_input or (lambda batch: batch), amp)


@torch.no_grad()
def _evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    to_input: Callable[[Tensor], Tensor],
    amp: str,
) -> Evaluation:
    """:func:`evaluate` on batches that are on the device."""
    was_training = model.training
    model.eval()
    total_loss = torch.zeros((), dtype=torch.float64, device=device)
    right = torch.zeros(2, dtype=torch.int64, device=device)  # first guess, first five guesses
    density: dict[str, float] = {}
    count, classes = 0, 0
    try:
        for images, labels in batches:
            with _autocast(device, amp):
                scores = model(to_input(images))
                total_loss += functional.cross_entropy(scores, labels, reduction="sum")
            classes = scores.shape[1]
            hits = scores.topk(min(5, classes)).indices == labels[:, None]
            right += torch.stack((hits[:, 0].sum(), hits.sum()))
            count += len(labels)
            for name, value in block_densities(model).items():
                density[name] = density.get(name, 0.0) + value * len(labels)
    finally:
        model.train(was_training)
    # Of a small set some process may have had no image.
    losses, rights, counts, numbers, densities = zip(
        *distributed.gather((float(total_loss), right.tolist(), count, classes, density)), strict=True
    )
    count = sum(counts)
    first, first_five = (sum(column) / count for column in zip(*rights, strict=True))
    return Evaluation(
        sum(losses) / count,
        first,
        first_five if max(numbers) >= _TOP5_FROM else None,
        {
            name: sum(part.get(name, 0.0) for part in densities) / count
            for name in dict.fromkeys(name for part in densities for name in part)
        },
    )


def train(
    model: nn.Module,
    data: Images,
    config: TrainConfig,
    *,
    title: str = "model",
    progress: Progress | None = None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    stop: threading.Event | None = None,
    controller: BudgetController | None = None,
) -> TrainResult:
    """Train a model in place, from its weights of now or from the checkpoint where that exists.

    On the CPU, a run that was killed and is started again ends with the same bytes as one that was not. On a GPU this
    holds as far as its kernels repeat themselves. Seeds the global generators of torch, numpy and Python.

    To be called by every process of a group alike. All read the checkpoint, the main one writes it; they go on, stop
    and fail together, with the same result.

    Args:
        model: gives ``(B, classes)`` scores for ``(B, C, H, W)`` float images; moved to the device.
        data: images and labels.
        config: the recipe.
        title: name of the network for ``progress``.
        progress: is told of steps and epochs.
        checkpoint: where to keep the state; a path is enough.
        stop: set it (from a signal handler, say; in any process) to stop at the next step, with a checkpoint.
        controller: of this model; moves its thresholds after each step, and is kept in the checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, of another configuration, further than ``config.epochs``, or not the same
            for every process; or a batch has fewer images than there are processes.
        Interrupted: ``stop`` was set.
        Diverged: the loss is no longer finite; the checkpoint still holds the last good epoch.
    """
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(Path(checkpoint))
    shown = (progress if distributed.is_main() else None) or Silent()
    device = config.resolve_device()
    processes = distributed.world_size()
    images_of_epoch = data.count("train")
    if min(config.batch_size, images_of_epoch) < processes:
        _check.fail(
            "train",
            "batch_size",
            f"{config.batch_size} of {images_of_epoch} images",
            f"at least {processes} images, one for each process",
            "raise batch_size (--batch-size), or start fewer processes",
        )
    # What is drawn in a step (dropout) is drawn for each share anew.
    seed_everything((config.seed + distributed.rank() * _SEED_STRIDE) % 2**32)
    model.to(device)
    optimizer = make_optimizer(model, config)
    identity = {
        **{key: value for key, value in asdict(config).items() if key not in _FREE_SETTINGS},
        "device": device.type,
        # One process leaves this out: so did the files that were written before there could be several.
        **({"processes": processes} if processes > 1 else {}),
        **({"controller": True} if controller is not None else {}),
        "train_images": images_of_epoch,
        "test_images": data.count("test"),
        "image_size": data.image_size,
        "data_fingerprint": data.fingerprint(),
        **(checkpoint.identity if checkpoint else {}),
    }

    history: list[dict[str, Any]] = []
    epoch, batch, seconds = 0, 0, 0.0
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    right_sum = torch.zeros((), dtype=torch.int64, device=device)
    state = checkpoint.load(identity) if checkpoint else None
    places = distributed.gather(None if state is None else (state["epoch"], state["batch"]))
    if checkpoint is not None and len(set(places)) > 1:
        _check.fail(
            "checkpoint",
            str(checkpoint.path),
            f"{len(set(places))} different states in {processes} processes",
            "one file that all processes read",
            "choose an --out in a folder that all machines share",
        )
    if state is not None:
        assert checkpoint is not None
        if state["epoch"] > config.epochs or (state["epoch"] == config.epochs and state["batch"]):
            _check.fail(
                "checkpoint",
                str(checkpoint.path),
                f"in epoch {state['epoch'] + bool(state['batch'])}",
                f"at most {config.epochs} epochs",
                f"ask for --epochs {state['epoch'] + bool(state['batch'])} or more, or start anew with --fresh",
            )
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            if controller is not None:
                controller.load_state_dict(state["controller"])
        except (RuntimeError, ValueError, KeyError) as error:
            _check.fail(
                "checkpoint",
                str(checkpoint.path),
                f"of another network: {error}",
                "the weights of this one",
                "choose another --out, or start anew with --fresh (fresh=True)",
            )
        history, epoch, batch, seconds = state["history"], state["epoch"], state["batch"], state["seconds"]
        own = [state, *state.get("other_ranks", ())][distributed.rank()]
        loss_sum, right_sum = own["loss_sum"].to(device), own["right_sum"].to(device)
        _set_random_state(own["random"], device)
    resumed = epoch
    called = distributed.parallel(model)

    def save() -> None:
        if checkpoint is None:
            return
        ranks = distributed.gather(
            {"loss_sum": loss_sum.cpu(), "right_sum": right_sum.cpu(), "random": _random_state(device)}
        )
        distributed.on_main(
            checkpoint.save,
            {
                "identity": identity,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                **({"controller": controller.state_dict()} if controller is not None else {}),
                "history": history,
                "epoch": epoch,
                "batch": batch,
                "seconds": seconds,
                **ranks[0],
                "other_ranks": ranks[1:],
            },
        )

    plan = _batch_count(images_of_epoch, config.batch_size)
    shown.begin(title, config.epochs, plan, epoch * plan + batch)
    model.train()
    try:
        while epoch < config.epochs:
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(epoch)
            clock = saved = time.perf_counter()
            for images, labels, weight in _training_batches(data, config, device, epoch, skip=batch):
                loss, right = training_step(called, optimizer, data.to_input(images), labels, config.amp, weight)
                distributed.average_buffers(model)
                if controller is not None:
                    controller.step()
                loss_sum += loss * len(labels)
                right_sum += right
                batch += 1
                shown.step(epoch, batch - 1)
                asked, due = distributed.any_rank(
                    stop is not None and stop.is_set(),
                    checkpoint is not None and time.perf_counter() - saved >= checkpoint.every_seconds,
                )
                if batch < plan and (asked or due):
                    # The clock stands still while the state is written.
                    seconds += time.perf_counter() - clock
                    save()
                    clock = saved = time.perf_counter()
                    if asked:
                        raise Interrupted(f"stopped in epoch {epoch + 1} after {batch} of {plan} steps")
            count = min(plan * config.batch_size, images_of_epoch)
            losses, rights = zip(*distributed.gather((float(loss_sum), int(right_sum))), strict=True)  # waits for all
            train_loss, train_right = sum(losses) / count, sum(rights)
            seconds = distributed.gather(seconds + time.perf_counter() - clock)[0]
            tested = _evaluate(model, _test_batches(data, config, device), device, data.to_input, config.amp)
            if not math.isfinite(train_loss + tested.loss):
                raise Diverged(
                    f"{title}: training diverged in epoch {epoch + 1} (training loss {train_loss:g}, test loss "
                    f"{tested.loss:g}); lower the learning rate (--lr, now {config.lr_at(epoch):g}) or the threshold"
                )
            record: dict[str, Any] = {
                "epoch": epoch + 1,
                "lr": config.lr_at(epoch),
                "train_loss": train_loss,
                "train_accuracy": train_right / count,
                "test_loss": tested.loss,
                "test_accuracy": tested.accuracy,
                "seconds": seconds,
            }
            if tested.top5_accuracy is not None:
                record["test_top5_accuracy"] = tested.top5_accuracy
            if tested.density:
                record["density"] = tested.density
            if controller is not None:
                record["threshold_factor"] = controller.factor
            history.append(record)
            epoch, batch, seconds = epoch + 1, 0, 0.0
            loss_sum.zero_()
            right_sum.zero_()
            save()
            shown.epoch(record)
            (asked,) = distributed.any_rank(stop is not None and stop.is_set())
            if asked and epoch < config.epochs:
                raise Interrupted(f"stopped after epoch {epoch} of {config.epochs}")
    finally:
        shown.end()
    return TrainResult(history, resumed)


def training_batch(data: Images, config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """This process's share of the first batch, as :func:`train` sees it: ``(B, C, H, W)`` float and ``(B,)`` int64."""
    images, labels, _ = next(_training_batches(data, replace(config, workers=0), device, epoch=0, skip=0))
    return data.to_input(images), labels


def _order(count: int, seed: int, epoch: int) -> Tensor:
    """Order of the images in an epoch: a function of seed and epoch alone, so that it need not be saved."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


def _batch_count(count: int, batch_size: int) -> int:
    """Steps in an epoch; a last batch of fewer than two images a process is left out, unless it is the only one."""
    whole, rest = divmod(count, batch_size)
    return max(1, whole + (rest >= 2 * distributed.world_size()))


def _training_batches(
    data: Images, config: TrainConfig, device: torch.device, epoch: int, skip: int
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """This process's share of the batches of an epoch, on the device, from batch ``skip`` on.

    Uint8 images, labels, and what to weight the gradient with, so that the mean over processes is that over the batch.
    """
    order = _order(data.count("train"), config.seed, epoch)
    size, pin = config.batch_size, device.type == "cuda"
    whole = [order[n * size : (n + 1) * size] for n in range(skip, _batch_count(len(order), size))]
    shares = [distributed.share(len(batch)) for batch in whole]
    chosen = [batch[part] for batch, part in zip(whole, shares, strict=True)]
    draws = (config.seed, epoch) if config.augment else None
    batches = _moved(data.batches("train", chosen, draws=draws, workers=config.workers, pin=pin), device)
    for number, ((images, labels), batch, part) in enumerate(zip(batches, whole, shares, strict=True), skip):
        if draws is not None:
            images = data.augment(images, (*draws, number), first=part.start, of=len(batch))
        yield images, labels, len(labels) * distributed.world_size() / len(batch)


def _test_batches(data: Images, config: TrainConfig, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    whole = torch.arange(data.count("test")).split(config.batch_size)
    shares = [batch[distributed.share(len(batch))] for batch in whole]
    chosen = [share for share in shares if len(share)]
    return _moved(data.batches("test", chosen, workers=config.workers, pin=device.type == "cuda"), device)


def _moved(batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the device; copies out of pinned memory are not waited for."""
    for images, labels in batches:
        yield images.to(device, non_blocking=images.is_pinned()), labels.to(device, non_blocking=labels.is_pinned())


def _autocast(device: torch.device, amp: str) -> AbstractContextManager[None]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp == "bf16")


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")


def _random_state(device: torch.device) -> dict[str, Any]:
    """Every generator's state, of types that a checkpoint may hold."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    kind, keys, *rest = np.random.get_state()
    state["numpy"] = (kind, [int(key) for key in keys], *rest)
    return state


def _set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    np.random.set_state(tuple(state["numpy"]))
