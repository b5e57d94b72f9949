"""Image sets to train on, held in memory as bytes.

====================  ==============================  =======================================================
name                  images (training / test)        where they come from
====================  ==============================  =======================================================
``digits``            1438 / 359, 28x28, 1 channel    scikit-learn's own 8x8 handwritten digits, no download
``fashion-mnist``     60000 / 10000, 28x28, 1 channel four IDX files, see :func:`load`
====================  ==============================  =======================================================

``digits`` are enlarged (bilinear, from 8x8) to 28x28, so that LeNet applies as it was published and its spectra have
room to be sparse. Within each class, in the order of the file, every fifth image is a test image: the split needs no
random numbers and is the same with every version of every package.

Images stay ``uint8`` on the host until a batch is wanted; :meth:`ImageData.to_input` normalises on the device. Training
data therefore take no part in what is measured as the memory of a training step.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from spectriton import _check
from spectriton.environment import require

#: Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
#: A directory to look in when none is given: the files themselves, or a folder ``fashion-mnist`` with them.
DATA_DIR_VARIABLE = "SPECTRITON_DATA_DIR"

_FASHION_FILES = {
    "train_images": ("train-images-idx3-ubyte", 3),
    "train_labels": ("train-labels-idx1-ubyte", 1),
    "test_images": ("t10k-images-idx3-ubyte", 3),
    "test_labels": ("t10k-labels-idx1-ubyte", 1),
}
_HUB_NAME = "zalando-datasets/fashion_mnist"
_IDX_UINT8 = 0x08


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
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        x = images.float().div_(255).sub_(mean).div_(std)
        if tuple(x.shape[2:]) != (self.image_size, self.image_size):
            x = functional.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", antialias=True)
        return x

    def limited(self, train: int | None = None, test: int | None = None) -> ImageData:
        """The first ``train`` training and ``test`` test images, for quick tries; ``None`` keeps all."""
        for name, limit in (("train_limit", train), ("test_limit", test)):
            if limit is not None and limit < 1:
                _check.fail("data", name, limit, "at least 1", "leave it out to use every image")
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )

    def fingerprint(self) -> str:
        """Eight hexadecimal digits that change when any image, label or the size handed to the network does."""
        crc = zlib.crc32(repr((self.mean, self.std, self.image_size, self.num_classes)).encode())
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            crc = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, crc)
        return f"{crc:08x}"


def names() -> list[str]:
    """The names :func:`load` knows."""
    return sorted(_LOADERS)


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
) -> ImageData:
    """Load a named set.

    ``fashion-mnist`` is looked for in this order; the first place that has it is used: ``data_dir`` (then nowhere
    else), the directory in the environment variable ``SPECTRITON_DATA_DIR``, Debian's package
    ``dataset-fashion-mnist``, the hub through the ``datasets`` package where that is installed.

    Args:
        name: one of :func:`names`.
        data_dir: directory with the set's own files, gzipped or plain.
        image_size: edge in pixels that the network is given; the set's own where left out.
        train_limit, test_limit: keep only the first so many images.

    Raises:
        ValueError: unknown name, a bad limit or size, or a damaged file.
        FileNotFoundError: the files are nowhere to be found.
        ImportError: scikit-learn is needed and not installed.
    """
    _check.check_choice("data.load", "name", name, names())
    data = _LOADERS[name](Path(data_dir) if data_dir is not None else None).limited(train_limit, test_limit)
    if image_size is None:
        return data
    if image_size < 1:
        _check.fail("data.load", "image_size", image_size, "a positive number of pixels", "give 32, for example")
    return replace(data, image_size=image_size)


def read_idx(path: str | os.PathLike[str], ndim: int) -> Tensor:
    """Read an IDX file of bytes, the format of MNIST, gzipped or plain.

    Args:
        path: the file; gzip is recognised by its first bytes, whatever the name.
        ndim: dimensions it has to have: 3 for images, 1 for labels.

    Returns:
        uint8 tensor of the shape the file states.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an IDX file of bytes, another number of dimensions, truncated, or longer than it states.
    """
    path = Path(path)
    again = "fetch the file again"

    def bad(what: str, got: Any, expected: str, fix: str = again) -> NoReturn:
        _check.fail("data.read_idx", f"{path}: {what}", got, expected, fix)

    if not path.is_file():
        _check.fail("data.read_idx", "path", str(path), "an existing file", "check --data-dir", kind=FileNotFoundError)
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rb") if zipped else open(path, "rb") as stream:
            header = stream.read(4)
            if len(header) < 4:
                bad("header", f"{len(header)} bytes", "at least 4 bytes")
            if header[:2] != b"\0\0" or header[2] != _IDX_UINT8:
                bad("magic number", header.hex(" "), f"00 00 08 {ndim:02x} (IDX of bytes)", "point to an IDX file")
            if header[3] != ndim:
                bad("dimensions", header[3], str(ndim), "check that images and labels are not exchanged")
            sizes = stream.read(4 * ndim)
            if len(sizes) < 4 * ndim:
                bad("header", f"{4 + len(sizes)} bytes", f"{4 + 4 * ndim} bytes")
            shape = struct.unpack(f">{ndim}I", sizes)
            expected = 1
            for size in shape:
                expected *= size
            if not expected:
                bad("shape", shape, "no empty dimension")
            # Never more than a byte too many: what a file claims about its size does not decide what is allocated.
            payload = bytearray()
            while len(payload) <= expected:
                block = stream.read(min(1 << 24, expected + 1 - len(payload)))
                if not block:
                    break
                payload += block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        bad("gzip stream", f"damaged or truncated ({error})", "a complete gzip file")
    if len(payload) < expected:
        bad("data", f"{len(payload)} bytes", f"{expected} bytes for shape {shape}")
    if len(payload) > expected:
        bad("data", f"more than {expected} bytes", f"exactly {expected} bytes for shape {shape}")
    return torch.frombuffer(payload, dtype=torch.uint8).view(shape)


def _digits(data_dir: Path | None) -> ImageData:
    bunch: Any = require("sklearn.datasets", "scikit-learn").load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).mul_(255 / 16).unsqueeze(1)
    images = functional.interpolate(images, size=(28, 28), mode="bilinear").round_().to(torch.uint8)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    seen: Counter[int] = Counter()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for position, label in enumerate(labels.tolist()):
        is_test[position] = seen[label] % 5 == 2
        seen[label] += 1
    return ImageData(
        "digits", images[~is_test], labels[~is_test], images[is_test], labels[is_test], 10, (0.3052,), (0.3244,)
    )


def _fashion_mnist(data_dir: Path | None) -> ImageData:
    tensors: dict[str, Any] | None = None
    if data_dir is not None:
        tensors = _read_fashion(data_dir)
    else:
        places = [DEBIAN_FASHION_MNIST]
        if os.environ.get(DATA_DIR_VARIABLE):
            root = Path(os.environ[DATA_DIR_VARIABLE])
            places = [root, root / "fashion-mnist", *places]
        # A place that has any of the files has to have them all, sound: to go on would hide what is wrong with it.
        for place in places:
            if any(_find(place, stem) for stem, _ in _FASHION_FILES.values()):
                tensors = _read_fashion(place)
                break
    if tensors is None:
        tensors = _fashion_from_hub()
    return ImageData("fashion-mnist", num_classes=10, mean=(0.2860,), std=(0.3530,), **tensors)


def _find(place: Path, stem: str) -> Path | None:
    return next((path for path in (place / f"{stem}.gz", place / stem) if path.is_file()), None)


def _read_fashion(place: Path) -> dict[str, Tensor]:
    tensors = {}
    for key, (stem, ndim) in _FASHION_FILES.items():
        path = _find(place, stem)
        if path is None:
            _check.fail(
                "data.load fashion-mnist",
                f"{stem}.gz",
                f"no such file in {place}",
                "the four files " + ", ".join(f"{stem}[.gz]" for stem, _ in _FASHION_FILES.values()),
                "put it there, or give another --data-dir",
                kind=FileNotFoundError,
            )
        tensor = read_idx(path, ndim)
        if ndim == 3 and tuple(tensor.shape[1:]) != (28, 28):
            _check.fail(
                "data.load fashion-mnist", f"{path}: images", tuple(tensor.shape), "(N, 28, 28)", "fetch the file again"
            )
        tensors[key] = tensor.unsqueeze(1) if ndim == 3 else tensor.to(torch.int64)
        if ndim == 1:
            images = tensors[key.replace("labels", "images")]
            if len(tensor) != len(images):
                _check.fail(
                    "data.load fashion-mnist",
                    f"{path}: labels",
                    len(tensor),
                    f"{len(images)}, one for each image",
                    "take both files from the same release",
                )
            if int(tensor.max()) > 9:
                _check.fail(
                    "data.load fashion-mnist", f"{path}: label", int(tensor.max()), "0 to 9", "fetch the file again"
                )
    return tensors


def _fashion_from_hub() -> dict[str, Tensor]:
    def nowhere(got: str) -> NoReturn:
        _check.fail(
            "data.load fashion-mnist",
            "data",
            got,
            f"the four IDX files or the data set {_HUB_NAME}",
            "give --data-dir DIRECTORY with the four files (train-images-idx3-ubyte.gz, ...), or set "
            f"{DATA_DIR_VARIABLE} to it, or install Debian's package dataset-fashion-mnist, or "
            'pip install "spectriton[hub]" to fetch it from the hub; --data digits needs no files',
            kind=FileNotFoundError,
        )

    try:
        datasets: Any = require("datasets")
    except ImportError:
        nowhere("not found on this machine, and the package datasets is not installed")
    try:
        parts = datasets.load_dataset(_HUB_NAME)
    except Exception as error:  # the hub's client raises many kinds, for one reason: the data cannot be had
        nowhere(f"not found on this machine, and the hub gave {type(error).__name__}: {error}")
    tensors = {}
    for part in ("train", "test"):
        # Column by column as raw pixels: PIL's tobytes needs neither numpy nor a dependency of ours.
        pixels = bytearray(b"".join(image.convert("L").tobytes() for image in parts[part]["image"]))
        tensors[f"{part}_images"] = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 1, 28, 28)
        tensors[f"{part}_labels"] = torch.tensor(parts[part]["label"], dtype=torch.int64)
    return tensors


_LOADERS: dict[str, Callable[[Path | None], ImageData]] = {"digits": _digits, "fashion-mnist": _fashion_mnist}
