"""Labelled images where they lie: in parquet files, in folders of image files, on the Hugging Face hub.

A *table* is a list of rows, each the place of one image, and a tensor of labels. Images are decoded one by one when
they are asked for, so that a table may be far larger than the memory.

What is looked for in a directory:

* ``*.parquet``, at any depth, with the name or the folder starting with the part: ``train-00000-of-00002.parquet`` or
  ``train/0000.parquet``. Images are structs of ``bytes`` and ``path``, as the hub stores them.
* ``<part>/<class>/<image>``: class folders, sorted by name, are the labels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectriton import _check
from spectriton.environment import require

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class HubSet(NamedTuple):
    """A data set of the hub, and how its parts and columns are called there.

    Attributes:
        repository, config: as for ``datasets.load_dataset``; a folder named like the config is looked into first.
        image, label: columns.
        test: names of the part that is tested on; the first is the hub's.
        classes: number of classes.
    """

    repository: str
    config: str | None
    image: str
    label: str
    test: tuple[str, ...]
    classes: int


@dataclass(frozen=True, eq=False)
class ImageTable:
    """Labelled images.

    Attributes:
        rows: indexed by position; a path, or a mapping with ``bytes`` (an encoded image) or ``path``.
        labels: ``(N,)`` int64; rows beyond them do not count.
        name: for messages.
    """

    rows: Any
    labels: Tensor
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> ImageTable:
        """The first ``count`` images; all for ``None``."""
        return replace(self, labels=self.labels[:count])

    def image(self, index: int) -> Any:
        """An image as a ``PIL.Image`` in RGB.

        Raises:
            ImportError: pillow is not installed.
            ValueError: the row holds no image that can be decoded.
        """
        row = self.rows[index]
        if not isinstance(row, Path):
            row = Path(row["path"]) if row["bytes"] is None else io.BytesIO(row["bytes"])
        try:
            return _pillow().open(row).convert("RGB")
        except OSError as error:
            got = f"{type(error).__name__}: {error}"
            _check.fail(f"data {self.name}", f"image {index}", got, "an image file", "fetch the files again")


class _Column(Sequence[Any]):
    """A column of a ``datasets.Dataset``, read row by row."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index][self.name]


def from_hub(hub: HubSet, part: str) -> ImageTable:
    """A part, ``"train"`` or ``"test"``, as the hub has it.

    Raises:
        ImportError: datasets is not installed.
        Exception: whatever the hub's client raises where the data cannot be had.
    """
    split = hub.test[0] if part == "test" else part
    dataset = require("datasets", extra="hub").load_dataset(hub.repository, hub.config, split=split)
    return _of_dataset(dataset, hub, hub.repository)


def from_directory(hub: HubSet, place: Path, in_memory: bool) -> tuple[ImageTable, ImageTable, int]:
    """Training and test images in a directory, and the number of classes.

    Args:
        hub: names of parts and columns.
        place: the directory.
        in_memory: the encoded images may be read at once. Where they may not, parquet needs the package ``datasets``,
            which maps files into memory.

    Raises:
        FileNotFoundError: there are neither parquet files nor class folders of both parts.
        ImportError: what reads parquet is not installed.
        ValueError: columns or classes are missing.
    """
    if hub.config and (place / hub.config).is_dir():
        place = place / hub.config
    files = sorted(place.rglob("*.parquet"))
    of_parts = [_parts(files, ("train",)), _parts(files, hub.test)]
    if all(of_parts):
        train, test = (_of_parquet(chosen, hub, in_memory) for chosen in of_parts)
        return train, test, hub.classes
    folders = [place / "train", next((place / name for name in hub.test if (place / name).is_dir()), None)]
    if not files and folders[0] is not None and folders[0].is_dir() and folders[1] is not None:
        classes = sorted(folder.name for folder in folders[0].iterdir() if folder.is_dir())
        return _of_folder(folders[0], classes), _of_folder(folders[1], classes), len(classes)
    test_names = " or ".join(hub.test)
    _check.fail(
        "data",
        str(place),
        f"{len(files)} parquet files, not of both parts" if files else "neither parquet files nor class folders",
        f"train*.parquet and {hub.test[0]}*.parquet, or train/CLASS/*.png and {test_names}/CLASS/*.png",
        "give another --data-dir",
        FileNotFoundError,
    )


def _parts(files: Sequence[Path], names: tuple[str, ...]) -> list[Path]:
    return [path for path in files if {path.stem.split("-")[0], path.parent.name} & set(names)]


def _of_folder(place: Path, classes: Sequence[str]) -> ImageTable:
    """Class folders as a table. Classes take turns, so that the first images of a table are of all classes."""
    found: list[tuple[int, int, Path]] = []
    for folder in sorted(path for path in place.iterdir() if path.is_dir()):
        if folder.name not in classes:
            known = ", ".join(classes[:8])
            _check.fail("data", str(place), f"class {folder.name!r}", f"one of the classes {known}", "rename it")
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
        found += [(turn, classes.index(folder.name), path) for turn, path in enumerate(files)]
    if not found:
        _check.fail("data", str(place), "no image", "CLASS/*.png", "give another --data-dir", FileNotFoundError)
    found.sort()
    labels = torch.tensor([label for _, label, _ in found], dtype=torch.int64)
    return ImageTable([path for *_, path in found], labels, place.name)


def _of_parquet(files: Sequence[Path], hub: HubSet, in_memory: bool) -> ImageTable:
    paths, name = [str(path) for path in files], files[0].parent.name
    try:
        datasets = require("datasets", extra="hub")
    except ImportError:
        if not in_memory:
            raise
        table = require("pyarrow.parquet", "pyarrow", extra="hub").ParquetDataset(paths).read()
        _check_columns(table.column_names, hub, name)
        labels = torch.tensor(table[hub.label].to_pylist(), dtype=torch.int64)
        return ImageTable(table[hub.image].to_pylist(), labels, name)
    return _of_dataset(datasets.load_dataset("parquet", data_files=paths, split="train"), hub, name)


def _of_dataset(dataset: Any, hub: HubSet, name: str) -> ImageTable:
    _check_columns(dataset.column_names, hub, name)
    # Encoded bytes as they are stored: decoding is the table's business.
    undecoded = dataset.cast_column(hub.image, require("datasets", extra="hub").Image(decode=False))
    return ImageTable(_Column(undecoded, hub.image), torch.tensor(list(dataset[hub.label]), dtype=torch.int64), name)


def _check_columns(found: Sequence[str], hub: HubSet, name: str) -> None:
    if not {hub.image, hub.label} <= set(found):
        expected = f"columns {hub.image!r} and {hub.label!r}"
        _check.fail("data", name, f"columns {', '.join(found)}", expected, "point --data-dir to this data set's files")


def _pillow() -> Any:
    return require("PIL.Image", "pillow", extra="hub")
