"""The image sets that are known by name.

====================  =================================  =====================================================
name                  images (training / test)           where they come from
====================  =================================  =====================================================
``digits``            1438 / 359, 28x28, 1 channel       scikit-learn's own 8x8 handwritten digits, no download
``fashion-mnist``     60000 / 10000, 28x28, 1 channel    four IDX files, see :func:`load`
``cifar10``           50000 / 10000, 32x32, 3 channels   parquet files, folders of images, or the hub
``svhn``              73257 / 26032, 32x32, 3 channels   the same (cropped digits, without the extra ones)
``imagenet``          1281167 / 50000, 3 channels        the same (ILSVRC 2012); tested on the validation part
====================  =================================  =====================================================

``digits`` are enlarged (bilinear, from 8x8) to 28x28, so that LeNet applies as it was published and its spectra have
room to be sparse. Within each class, in the order of the file, every fifth image is a test image: the split needs no
random numbers and is the same with every version of every package.

Training images of ``cifar10`` and ``svhn`` are shifted by up to 4 pixels, those of ``cifar10`` also mirrored at random.
``imagenet`` is streamed, see :class:`spectriton.images.StreamedImages`; the others are held in memory.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from spectriton import _check
from spectriton.environment import require
from spectriton.image_tables import HubSet, ImageTable, from_directory, from_hub
from spectriton.images import Augmentation, ImageData, Images, StreamedImages

__all__ = ["Augmentation", "ImageData", "Images", "StreamedImages", "load", "names", "read_idx"]

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


_HUB_SETS = {
    "cifar10": HubSet("uoft-cs/cifar10", None, "img", "label", ("test",), 10),
    "svhn": HubSet("ufldl-stanford/svhn", "cropped_digits", "image", "label", ("test",), 10),
    "imagenet": HubSet("ILSVRC/imagenet-1k", None, "image", "label", ("validation", "val", "test"), 1000),
}
# Of the images scaled to [0, 1].
_CONSTANTS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


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
) -> Images:
    """Load a named set.

    ``fashion-mnist`` is looked for in this order; the first place that has it is used: ``data_dir`` (then nowhere
    else), the directory in the environment variable ``SPECTRITON_DATA_DIR``, Debian's package
    ``dataset-fashion-mnist``, the hub through the ``datasets`` package where that is installed.

    ``cifar10``, ``svhn`` and ``imagenet`` are looked for in ``data_dir`` (then nowhere else), in a folder of their name
    in ``SPECTRITON_DATA_DIR``, on the hub. What may lie there is in :mod:`spectriton.image_tables`. A folder of images
    under the name ``imagenet`` may be another set: its class folders are counted.

    Args:
        name: one of :func:`names`.
        data_dir: directory with the set's own files.
        image_size: edge in pixels that the network is given; the set's own where left out.
        train_limit, test_limit: keep only the first so many images.

    Raises:
        ValueError: unknown name, a bad limit or size, or a damaged file.
        FileNotFoundError: the files are nowhere to be found.
        ImportError: a package is needed and not installed.
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
    ways = (
        "give --data-dir DIRECTORY with the four files (train-images-idx3-ubyte.gz, ...), or set "
        f"{DATA_DIR_VARIABLE} to it, or install Debian's package dataset-fashion-mnist, or "
        'pip install "spectriton[hub]" to fetch it from the hub; --data digits needs no files'
    )
    expected = f"the four IDX files or the data set {_HUB_NAME}"
    with _from_the_hub("fashion-mnist", expected, ways):
        parts = require("datasets", extra="hub").load_dataset(_HUB_NAME)
    tensors = {}
    for part in ("train", "test"):
        # Column by column as raw pixels: PIL's tobytes needs neither numpy nor a dependency of ours.
        pixels = bytearray(b"".join(image.convert("L").tobytes() for image in parts[part]["image"]))
        tensors[f"{part}_images"] = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 1, 28, 28)
        tensors[f"{part}_labels"] = torch.tensor(parts[part]["label"], dtype=torch.int64)
    return tensors


@contextmanager
def _from_the_hub(name: str, expected: str, ways: str) -> Iterator[None]:
    """Says how else a set can be had where the block cannot fetch it."""
    try:
        yield
    except Exception as error:  # the hub's client raises many kinds, for one reason: the data cannot be had
        got = f"the hub gave {type(error).__name__}: {error}"
        if isinstance(error, ImportError):
            got = "the package datasets is not installed"
        _check.fail(
            f"data.load {name}", "data", f"not found on this machine, and {got}", expected, ways, FileNotFoundError
        )


def _tables(name: str, data_dir: Path | None, in_memory: bool) -> tuple[ImageTable, ImageTable, int]:
    """Training and test images of a set of the hub, and the number of classes."""
    hub = _HUB_SETS[name]
    if data_dir is None and os.environ.get(DATA_DIR_VARIABLE):
        place = Path(os.environ[DATA_DIR_VARIABLE]) / name
        data_dir = place if place.is_dir() else None
    if data_dir is not None:
        return from_directory(hub, data_dir, in_memory)
    ways = (
        f"give --data-dir DIRECTORY with its files, or set {DATA_DIR_VARIABLE} to a directory with a folder {name}, or "
        'pip install "spectriton[hub]" to fetch it from the hub; --data digits needs no files'
    )
    with _from_the_hub(name, f"parquet files, folders of images, or the data set {hub.repository}", ways):
        return from_hub(hub, "train"), from_hub(hub, "test"), hub.classes


def _small_set(name: str, augmentation: Augmentation, data_dir: Path | None) -> ImageData:
    """A set of 32x32 images in colour, all in memory."""
    train, test, classes = _tables(name, data_dir, in_memory=True)
    mean, std = _CONSTANTS[name]
    stacks = (_stack(name, train), _stack(name, test))
    return ImageData(
        name, stacks[0], train.labels, stacks[1], test.labels, classes, mean, std, augmentation=augmentation
    )


def _stack(name: str, table: ImageTable) -> Tensor:
    images = np.empty((len(table), 32, 32, 3), dtype=np.uint8)
    for index in range(len(table)):
        image = table.image(index)
        if image.size != (32, 32):
            _check.fail(f"data.load {name}", f"image {index}", f"{image.size} pixels", "(32, 32)", "fetch it again")
        images[index] = image
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _imagenet(data_dir: Path | None) -> StreamedImages:
    return StreamedImages("imagenet", *_tables("imagenet", data_dir, in_memory=False), *_CONSTANTS["imagenet"])


_LOADERS: dict[str, Callable[[Path | None], Images]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": partial(_small_set, "cifar10", Augmentation(shift=4, flip=True)),
    "svhn": partial(_small_set, "svhn", Augmentation(shift=4)),  # a mirrored digit is none
    "imagenet": _imagenet,
}
