"""Labelled images to train on: in memory, or decoded when they are wanted.

:class:`ImageData` and :class:`StreamedImages` offer the same. Images stay ``uint8`` on the host until a batch is wanted
and are normalised on the device: training data take no part in what is measured as the memory of a training step.

Training images are augmented at random, those in memory on the device, streamed ones by the workers that decode. All of
it follows from the seed, the epoch and the position, so that a run that is cut short goes on with the same images.
"""

from __future__ import annotations

import signal
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from spectriton import _check
from spectriton.environment import require
from spectriton.image_tables import ImageTable

# Images are tested on the middle of what they are reduced to: 224 of 256 pixels.
_CENTRE = 224 / 256
# What a random part of an image is: its share of the area, and its ratio of width to height.
_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Augmentation:
    """What may be done to a training image without changing its class.

    Attributes:
        shift: pixels it may move in each direction; zeros come in at the edges.
        flip: whether left and right may be exchanged.
    """

    shift: int = 0
    flip: bool = False

    def apply(self, images: Tensor, draws: tuple[int, ...], *, first: int = 0, of: int | None = None) -> Tensor:
        """Shift and flip each image of a batch, or of a part of one, at random, on the device it is on.

        Args:
            images: ``(B, C, H, W)``, of any dtype.
            draws: whole numbers that the random numbers follow from.
            first: position of these images in the batch; each has the same done to it in whatever part it comes.
            of: number of images in the batch; these alone where left out.
        """
        random = np.random.default_rng(draws)
        count, channels, height, width = images.shape
        whole, part = count if of is None else of, slice(first, first + count)
        top, left = torch.from_numpy(random.integers(0, 2 * self.shift + 1, (2, whole))[:, part]).to(images.device)
        mirrored = torch.from_numpy(random.random(whole)[part] < 0.5).to(images.device) & self.flip
        rows = top[:, None] + torch.arange(height, device=images.device)
        columns = left[:, None] + torch.arange(width, device=images.device)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        number = torch.arange(count, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[:, None, None]
        return functional.pad(images, [self.shift] * 4)[number, channel, rows[:, None, :, None], columns[:, None, None]]


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled set of images, split into training and test. Your own images work as well as the named sets.

    Attributes:
        name: what to call it in reports.
        train_images, test_images: ``(N, C, H, W)`` uint8 on the CPU.
        train_labels, test_labels: ``(N,)`` int64 in ``[0, num_classes)``.
        num_classes: number of classes.
        mean, std: one number a channel, of the training images scaled to [0, 1].
        image_size: edge in pixels that the network is given; :meth:`to_input` resizes (bilinear) where it is not the
            stored one. 0 stands for the stored height.
        augmentation: of training images.

    Raises:
        ValueError: shapes, dtypes, label range or constants do not fit together.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int = 0
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images: Tensor = getattr(self, f"{part}_images")
            labels: Tensor = getattr(self, f"{part}_labels")
            if images.dtype != torch.uint8 or images.ndim != 4 or not images.numel():
                _check.fail(
                    f"data {self.name}",
                    f"{part}_images",
                    f"{tuple(images.shape)} of {images.dtype}",
                    "(N, C, H, W) of torch.uint8, not empty",
                    "scale images to 0..255 and convert them with .to(torch.uint8)",
                )
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                _check.fail(
                    f"data {self.name}",
                    f"{part}_labels",
                    f"{tuple(labels.shape)} of {labels.dtype}",
                    f"({images.shape[0]},) of torch.int64, one for each image",
                    "give one class number for each image",
                )
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                _check.fail(
                    f"data {self.name}",
                    f"{part}_labels",
                    f"values from {low} to {high}",
                    f"values from 0 to {self.num_classes - 1}",
                    "number the classes from 0, or raise num_classes",
                )
        channels = self.train_images.shape[1]
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            _check.fail(
                f"data {self.name}",
                "test_images",
                f"images of {tuple(self.test_images.shape[1:])}",
                f"the shape of the training images, {tuple(self.train_images.shape[1:])}",
                "resize one of the two",
            )
        if len(self.mean) != channels or len(self.std) != channels or not all(s > 0 for s in self.std):
            _check.fail(
                f"data {self.name}",
                "mean and std",
                f"{self.mean} and {self.std}",
                f"{channels} numbers each, std above 0",
                "give one mean and one standard deviation for each channel",
            )
        if not self.image_size:
            object.__setattr__(self, "image_size", self.train_images.shape[2])
        if self.image_size < 1:
            _check.fail(
                f"data {self.name}",
                "image_size",
                self.image_size,
                "a positive number of pixels",
                "give 28, for example",
            )

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train_images.shape[1]

    def to_input(self, images: Tensor) -> Tensor:
        """Normalise (and resize where needed) a batch, on the device it is on.

        Args:
            images: ``(B, C, H, W)`` uint8.

        Returns:
            ``(B, C, image_size, image_size)`` float32 of about zero mean and unit variance.
        """
        x = _normalised(images, self.mean, self.std)
        if tuple(x.shape[2:]) != (self.image_size, self.image_size):
            x = functional.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", antialias=True)
        return x

    def count(self, part: str) -> int:
        """Number of images of a part, ``"train"`` or ``"test"``."""
        return len(self.train_images if part == "train" else self.test_images)

    def batches(
        self,
        part: str,
        chosen: Iterable[Tensor],
        *,
        draws: tuple[int, int] | None = None,
        workers: int = 0,
        pin: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``(B, C, H, W)`` uint8 and ``(B,)`` int64 on the host.

        Args:
            part: ``"train"`` or ``"test"``.
            chosen: positions of the images of each batch.
            draws: nothing is drawn here, see :meth:`augment`.
            workers: threads that fetch batches ahead; 0 fetches in line.
            pin: into pinned memory.
        """
        images, labels = (
            (self.test_images, self.test_labels) if part == "test" else (self.train_images, self.train_labels)
        )

        def fetch(positions: Tensor) -> tuple[Tensor, Tensor]:
            batch = images.index_select(0, positions), labels.index_select(0, positions)
            return (batch[0].pin_memory(), batch[1].pin_memory()) if pin else batch

        if not workers:
            yield from map(fetch, chosen)
            return
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[Future[tuple[Tensor, Tensor]]] = deque()
            for positions in chosen:
                waiting.append(pool.submit(fetch, positions))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def augment(self, images: Tensor, draws: tuple[int, ...], *, first: int = 0, of: int | None = None) -> Tensor:
        """Training images ``(B, C, H, W)`` uint8, augmented at random: see :meth:`Augmentation.apply`."""
        return images if self.augmentation is None else self.augmentation.apply(images, draws, first=first, of=of)

    def limited(self, train: int | None = None, test: int | None = None) -> ImageData:
        """The first ``train`` training and ``test`` test images, for quick tries; ``None`` keeps all."""
        _check_limits(train, test)
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )

    def fingerprint(self) -> str:
        """Eight hexadecimal digits that change when any image, label or the size handed to the network does."""
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        return _checksum((self.mean, self.std, self.image_size, self.num_classes, self.augmentation), tensors)


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """A labelled set of images of any size that are decoded when they are wanted, in the processes of a ``DataLoader``.

    Offers what :class:`ImageData` offers.

    Attributes:
        name: what to call it in reports.
        train, test: where the images are.
        num_classes: number of classes.
        mean, std: one number a channel, of the training images scaled to [0, 1].
        image_size: edge in pixels that the network is given. A training image is a random part of an image (8 to 100 %
            of its area, ratio 3/4 to 4/3), mirrored at random; a test image the middle 224/256 of its shorter side.
    """

    name: str
    train: ImageTable
    test: ImageTable
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int = 224

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            labels = getattr(self, part).labels
            if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
                got = f"values from {int(labels.min())} to {int(labels.max())}" if len(labels) else "none"
                expected = f"values from 0 to {self.num_classes - 1}"
                _check.fail(f"data {self.name}", f"{part} labels", got, expected, "use a part that has labels")

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return 3

    def count(self, part: str) -> int:
        """Number of images of a part, ``"train"`` or ``"test"``."""
        return len(self.train if part == "train" else self.test)

    def batches(
        self,
        part: str,
        chosen: Iterable[Tensor],
        *,
        draws: tuple[int, int] | None = None,
        workers: int = 0,
        pin: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``(B, 3, image_size, image_size)`` uint8 and ``(B,)`` int64 on the host.

        Args:
            part: ``"train"`` or ``"test"``.
            chosen: positions of the images of each batch.
            draws: whole numbers that, with an image's position, its random part follows from; the middle for ``None``.
            workers: processes that decode ahead; 0 decodes in line.
            pin: into pinned memory.
        """
        return iter(
            DataLoader(
                _Crops(self.train if part == "train" else self.test, self.image_size, draws),
                batch_sampler=[positions.tolist() for positions in chosen],
                num_workers=workers,
                pin_memory=pin,
                worker_init_fn=_leave_signals_to_the_parent,
                # Its own: the global one must be where it would be had the run not been cut short.
                generator=torch.Generator(),
            )
        )

    def augment(self, images: Tensor, draws: tuple[int, ...], *, first: int = 0, of: int | None = None) -> Tensor:
        """The images as they are: :meth:`batches` has augmented them."""
        return images

    def to_input(self, images: Tensor) -> Tensor:
        """Normalise a batch ``(B, 3, H, W)`` uint8 on the device it is on; float32."""
        return _normalised(images, self.mean, self.std)

    def limited(self, train: int | None = None, test: int | None = None) -> StreamedImages:
        """The first ``train`` training and ``test`` test images, for quick tries; ``None`` keeps all."""
        _check_limits(train, test)
        return replace(self, train=self.train.first(train), test=self.test.first(test))

    def fingerprint(self) -> str:
        """Eight hexadecimal digits that change when a label or the size does; the images are not looked at."""
        constants = (self.mean, self.std, self.image_size, self.num_classes)
        return _checksum(constants, (self.train.labels, self.test.labels))


class _Crops(Dataset[tuple[Tensor, int]]):
    """Images of a table, cut to one size."""

    def __init__(self, table: ImageTable, size: int, draws: tuple[int, int] | None) -> None:
        self.table, self.size, self.draws = table, size, draws

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.table.image(index)
        random = None if self.draws is None else np.random.default_rng((*self.draws, index))
        box = _centre_box(*image.size) if random is None else _random_box(image.size, random)
        pixels = np.array(image.resize((self.size, self.size), require("PIL.Image").Resampling.BILINEAR, box))
        if random is not None and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), int(self.table.labels[index])


def _centre_box(width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the middle of an image."""
    side = min(width, height) * _CENTRE
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(size: tuple[int, int], random: np.random.Generator) -> tuple[float, float, float, float]:
    """A part of random area, ratio and place, or the largest square of the middle where none of ten tries fits."""
    width, height = size
    for _ in range(10):
        area = width * height * random.uniform(*_AREA)
        ratio = np.exp(random.uniform(*np.log(_RATIO)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; only the parent knows how to stop between two steps."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Bytes to float32 of about zero mean and unit variance, on the device they are on."""
    mean_of, std_of = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
    return images.float().div_(255).sub_(mean_of).div_(std_of)


def _check_limits(train: int | None, test: int | None) -> None:
    for name, limit in (("train_limit", train), ("test_limit", test)):
        if limit is not None and limit < 1:
            _check.fail("data", name, limit, "at least 1", "leave it out to use every image")


def _checksum(constants: tuple[Any, ...], tensors: Iterable[Tensor]) -> str:
    """Eight hexadecimal digits of constants and of the bytes of tensors."""
    crc = zlib.crc32(repr(constants).encode())
    for tensor in tensors:
        crc = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


#: What can be trained on.
Images = ImageData | StreamedImages
