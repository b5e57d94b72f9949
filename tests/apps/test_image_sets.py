"""CIFAR-10, SVHN and ImageNet: small files as the originals are made, read, augmented and streamed."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from apps_standins import made_up_data, tiny_network
from torch import Tensor, nn

from spectriton import data as sd
from spectriton import train as st
from spectriton.images import Augmentation, StreamedImages
from spectriton.train import Checkpoint, TrainConfig, train

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

#: Columns of the images and of the labels, parts, and files of the sets on the hub.
SCHEMAS = {
    "cifar10": ("img", "label", "test", "plain_text/{part}-00000-of-00001.parquet"),
    "svhn": ("image", "label", "test", "cropped_digits/{part}-00000-of-00001.parquet"),
    "imagenet": ("image", "label", "validation", "data/{part}-00000-of-00001.parquet"),
}


def pictures(count: int, size: tuple[int, int] = (32, 32), seed: int = 0) -> np.ndarray:
    """``(N, H, W, 3)`` smooth random images, so that JPEG leaves them about as they are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)) for image in coarse]
    )


def encoded(image: np.ndarray, kind: str = "png") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def write_parquet(place: Path, name: str, images: np.ndarray, labels: Sequence[int], kind: str = "png") -> None:
    """Both parts alike, as the hub stores them: structs of bytes and path, and int64."""
    pa = pytest.importorskip("pyarrow", reason='pyarrow is not installed (extra "hub")')
    parquet = importlib.import_module("pyarrow.parquet")
    image_column, label_column, test, path = SCHEMAS[name]
    cells = [{"bytes": encoded(image, kind), "path": f"{i}.{kind}"} for i, image in enumerate(images)]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image_column: pa.array(cells, struct), label_column: pa.array(labels, pa.int64())})
    for part in ("train", test):
        file = place / path.format(part=part)
        file.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, file)


def write_folders(place: Path, images: np.ndarray, labels: Sequence[int], parts: Sequence[str]) -> None:
    for part in parts:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = place / part / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:03}.png").write_bytes(encoded(image))


@pytest.fixture(params=["datasets", "pyarrow"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """What reads parquet: the package datasets, or pyarrow where that is missing."""
    pytest.importorskip(request.param, reason=f'{request.param} is not installed (extra "hub")')
    if request.param == "datasets":
        module = importlib.import_module("datasets")
        monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    else:
        monkeypatch.setitem(sys.modules, "datasets", None)
    return request.param


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_small_sets_from_parquet(tmp_path: Path, reader: str, name: str) -> None:
    images, labels = pictures(6), [3, 0, 9, 1, 1, 7]
    write_parquet(tmp_path / "files", name, images, labels)
    data = sd.load(name, data_dir=tmp_path / "files", test_limit=2)
    assert isinstance(data, sd.ImageData) and data.num_classes == 10 and data.image_size == 32
    assert np.array_equal(data.train_images.permute(0, 2, 3, 1).numpy(), images)
    assert data.train_labels.tolist() == labels and data.test_labels.tolist() == labels[:2]
    assert data.augmentation == Augmentation(4, flip=name == "cifar10")


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_small_sets_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    images, labels = pictures(6), [0, 0, 0, 1, 1, 2]
    write_folders(tmp_path / name, images, labels, ("train", "test"))
    monkeypatch.setenv(sd.DATA_DIR_VARIABLE, str(tmp_path))
    data = sd.load(name)
    # Classes take turns, so that a limited set has all of them.
    assert data.train_labels.tolist() == [0, 1, 2, 0, 1, 0]
    assert np.array_equal(data.train_images.permute(0, 2, 3, 1).numpy(), images[[0, 3, 5, 1, 4, 2]])


def test_parquet_of_another_set_is_refused(tmp_path: Path, reader: str) -> None:
    write_parquet(tmp_path, "svhn", pictures(2), [0, 1])
    with pytest.raises(ValueError, match="columns image, label, expected columns 'img' and 'label'"):
        sd.load("cifar10", data_dir=tmp_path)


def test_imagenet_from_parquet_is_not_decoded_before_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason='datasets is not installed (extra "hub")')
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    images = pictures(3, (60, 50))
    write_parquet(tmp_path / "files", "imagenet", images, [0, 999, 5], "jpeg")
    data = sd.load("imagenet", data_dir=tmp_path / "files", image_size=28)
    assert isinstance(data, StreamedImages) and data.num_classes == 1000 and data.count("test") == 3
    ((crops, labels),) = data.batches("test", [torch.tensor([1, 2])])
    assert crops.shape == (2, 3, 28, 28) and crops.dtype == torch.uint8 and labels.tolist() == [999, 5]
    assert abs(crops[0].float().mean() - images[1][8:52, 3:47].mean()) < 2


class FakeDataset:
    """What is used of a ``datasets.Dataset``."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.column_names = list(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]

    def cast_column(self, name: str, feature: Any) -> FakeDataset:
        assert name == "img" and feature == {"decode": False}
        return self


def test_the_hub_is_asked_for_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sd.DATA_DIR_VARIABLE, raising=False)
    images, asked = pictures(2), []

    def load_dataset(name: str, config: str | None, split: str) -> FakeDataset:
        asked.append((name, config, split))
        return FakeDataset([{"img": {"bytes": encoded(i), "path": None}, "label": n} for n, i in enumerate(images)])

    fake = types.SimpleNamespace(load_dataset=load_dataset, Image=lambda **options: options)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data = sd.load("cifar10")
    assert asked == [("uoft-cs/cifar10", None, "train"), ("uoft-cs/cifar10", None, "test")]
    assert np.array_equal(data.test_images.permute(0, 2, 3, 1).numpy(), images) and data.test_labels.tolist() == [0, 1]


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_a_set_that_is_nowhere_names_every_way(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv(sd.DATA_DIR_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError) as caught:
        sd.load(name)
    for way in ("--data-dir", sd.DATA_DIR_VARIABLE, 'pip install "spectriton[hub]"', "--data digits"):
        assert way in str(caught.value)


def test_parquet_without_a_reader_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "test"):
        (tmp_path / f"{part}.parquet").write_bytes(b"")
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("cifar10", "imagenet"):
        with pytest.raises(ImportError, match=r'pip install "spectriton\[hub\]"'):
            sd.load(name, data_dir=tmp_path)


@pytest.mark.parametrize("files", [[], ["train/0/a.png"], ["train.parquet"], ["test.parquet", "train/0/a.png"]])
def test_directories_without_both_parts_are_refused(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(pictures(1)[0]))
    with pytest.raises(FileNotFoundError, match=r"train\*\.parquet and test\*\.parquet, or train/CLASS.*--data-dir"):
        sd.load("cifar10", data_dir=tmp_path)


def test_files_that_are_wrong_are_named(tmp_path: Path) -> None:
    write_folders(tmp_path, pictures(2), [0, 1], ("train", "test"))
    (tmp_path / "test" / "class1" / "001.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="image 1 got UnidentifiedImageError"):
        sd.load("cifar10", data_dir=tmp_path)
    (tmp_path / "test" / "class1" / "001.png").write_bytes(encoded(pictures(1, (32, 31))[0]))
    with pytest.raises(ValueError, match=r"image 1 got \(31, 32\) pixels"):
        sd.load("cifar10", data_dir=tmp_path)
    (tmp_path / "test" / "class1").rename(tmp_path / "test" / "cat")
    with pytest.raises(ValueError, match="class 'cat', expected one of the classes class0, class1"):
        sd.load("cifar10", data_dir=tmp_path)


# -- augmentation on the device --------------------------------------------------------------------------------------


def shifted(image: Tensor, shift: int) -> list[Tensor]:
    """Every image that a shift can make of this one."""
    height, width = image.shape[1:]
    padded = torch.zeros(image.shape[0], height + 2 * shift, width + 2 * shift, dtype=image.dtype)
    padded[:, shift : shift + height, shift : shift + width] = image
    steps = range(2 * shift + 1)
    return [padded[:, y : y + height, x : x + width] for y in steps for x in steps]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 2])
def test_images_are_shifted_and_mirrored(shift: int, flip: bool, device: torch.device) -> None:
    images = torch.randint(0, 256, (200, 2, 5, 6), dtype=torch.uint8)
    done = Augmentation(shift, flip).apply(images.to(device), (0, 1, 2)).cpu()
    kinds = set()
    for before, after in zip(images, done, strict=True):
        candidates = shifted(before, shift)
        if flip:
            candidates += [candidate.flip(2) for candidate in candidates]
        kinds.add(next(kind for kind, candidate in enumerate(candidates) if torch.equal(candidate, after)))
    assert len(kinds) > 0.9 * (2 * shift + 1) ** 2 * (1 + flip)


def test_augmentation_follows_from_its_draws() -> None:
    images, augmentation = torch.randint(0, 256, (20, 1, 6, 6), dtype=torch.uint8), Augmentation(2, True)
    first = augmentation.apply(images, (0, 0, 0))
    assert torch.equal(first, augmentation.apply(images, (0, 0, 0)))
    assert not any(torch.equal(first, augmentation.apply(images, draws)) for draws in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))


def streamed(place: Path) -> StreamedImages:
    if not place.exists():
        write_folders(place, pictures(20, (24, 20)), [n % 4 for n in range(20)], ("train", "val"))
    data = sd.load("imagenet", data_dir=place, image_size=8)
    assert isinstance(data, StreamedImages)
    return data


def network(channels: int) -> nn.Module:
    torch.manual_seed(0)
    return tiny_network(threshold=0.3, channels=channels)


@pytest.mark.parametrize("kind", ["in memory", "streamed"])
def test_a_run_with_augmentation_goes_on_to_the_same_bytes(tmp_path: Path, kind: str) -> None:
    data = (
        streamed(tmp_path / "images")
        if kind == "streamed"
        else dataclasses.replace(made_up_data(), augmentation=Augmentation(1, True))
    )
    config = TrainConfig(epochs=2, batch_size=8, device="cpu", workers=0)

    class Kill(st.Silent):
        def step(self, epoch: int, batch: int) -> None:
            if (epoch, batch) == (1, 1):
                raise KeyboardInterrupt

    whole = network(data.channels)
    expected = train(whole, data, config)
    plain = train(network(data.channels), data, dataclasses.replace(config, augment=False))
    assert plain.history[0]["train_loss"] != expected.history[0]["train_loss"]
    checkpoint = Checkpoint(tmp_path / "run.pt", every_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        train(network(data.channels), data, config, checkpoint=checkpoint, progress=Kill())
    torch.manual_seed(99)
    cut = network(data.channels)
    # Two workers go on where none was: they do not change what is computed.
    result = train(cut, data, dataclasses.replace(config, workers=2), checkpoint=checkpoint)
    assert [r["test_loss"] for r in result.history] == [r["test_loss"] for r in expected.history]
    assert all(torch.equal(a, b) for a, b in zip(cut.state_dict().values(), whole.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="augment=False"):
        train(cut, data, dataclasses.replace(config, augment=False), checkpoint=checkpoint)


# -- streaming -------------------------------------------------------------------------------------------------------


def test_streaming_depends_on_seed_epoch_and_image_alone(tmp_path: Path) -> None:
    data = streamed(tmp_path / "images")
    assert data.num_classes == 4 and data.count("train") == 20
    chosen = [torch.tensor([3, 1, 4]), torch.tensor([15, 9])]
    state = torch.get_rng_state()
    batches = list(data.batches("train", chosen, draws=(0, 0)))
    apart = [next(iter(data.batches("train", [positions], draws=(0, 0)))) for positions in chosen]
    with_workers = list(data.batches("train", chosen, draws=(0, 0), workers=2))
    for others in (apart, with_workers):
        assert all(
            torch.equal(a, b) for one, two in zip(batches, others, strict=True) for a, b in zip(one, two, strict=True)
        )
    assert torch.equal(state, torch.get_rng_state())
    assert [labels.tolist() for _, labels in batches] == [[3, 1, 0], [3, 1]]
    for draws in ((1, 0), (0, 1), None):
        assert not torch.equal(batches[0][0], next(iter(data.batches("train", chosen, draws=draws)))[0])


def test_a_test_image_is_the_middle(tmp_path: Path) -> None:
    """As if the shorter side were reduced to 256 and the middle 224 pixels were taken."""
    ramp = np.repeat(np.linspace(0, 250, 128)[None, :, None], 64, 0).repeat(3, 2).astype(np.uint8)
    write_folders(tmp_path, np.stack([ramp]), [0], ("train", "val"))
    data = sd.load("imagenet", data_dir=tmp_path, image_size=56)
    ((crops, _),) = data.batches("test", [torch.tensor([0])])
    middle = torch.from_numpy(ramp[4:60, 36:92].copy()).permute(2, 0, 1)
    assert (crops[0].int() - middle.int()).abs().max() <= 1


def test_a_training_image_is_a_part_of_the_area_and_ratio_asked_for(tmp_path: Path) -> None:
    """The two colour ramps of an image tell where a crop comes from."""
    y, x = np.mgrid[0:200, 0:240]
    ramps = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)
    write_folders(tmp_path, np.stack([ramps]), [0], ("train", "val"))
    data = sd.load("imagenet", data_dir=tmp_path, image_size=32)
    areas, mirrored = [], 0
    for epoch in range(60):
        ((crops, _),) = data.batches("train", [torch.tensor([0])], draws=(0, epoch))
        crop = crops[0].float()
        across, down = crop[0].mean(0), crop[1].mean(1)
        mirrored += int(across[0] > across[-1])
        width, height = (abs(float(line[-1] - line[0])) * 32 / 31 for line in (across, down))
        areas.append(width * height / (200 * 240))
        assert 0.7 < width / height < 1.4
    assert 0.05 < min(areas) < 0.2 and 0.8 < max(areas) <= 1.05 and 15 < mirrored < 45


def test_narrow_images_give_a_square_of_the_middle(tmp_path: Path) -> None:
    image = np.zeros((4, 400, 3), np.uint8)
    image[:, 198:202] = 255
    write_folders(tmp_path, np.stack([image]), [0], ("train", "val"))
    data = sd.load("imagenet", data_dir=tmp_path, image_size=4)
    ((crops, _),) = data.batches("train", [torch.tensor([0])], draws=(0, 0))
    assert (crops == 255).all()


def test_streamed_sets_are_checked_and_limited(tmp_path: Path) -> None:
    data = streamed(tmp_path / "images")
    small = data.limited(train=8, test=4)
    assert small.count("train") == 8 and small.count("test") == 4 and small.test.labels.tolist() == [0, 1, 2, 3]
    assert small.fingerprint() != data.fingerprint() == streamed(tmp_path / "images").fingerprint()
    with pytest.raises(ValueError, match="train_limit"):
        data.limited(train=0)
    with pytest.raises(ValueError, match="values from 0 to 2"):
        dataclasses.replace(data, num_classes=3)


def test_top_five_is_counted_from_a_hundred_classes_on() -> None:
    scores = torch.zeros(4, 100)
    scores[:, :6] = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    labels = torch.tensor([0, 4, 5, 50])

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return scores[:, : int(x[0, 0, 0, 0])]

    found = st.evaluate(Constant(), torch.full((4, 1, 1, 1), 100), labels)
    assert (found.accuracy, found.top5_accuracy) == (0.25, 0.5)
    assert st.evaluate(Constant(), torch.full((4, 1, 1, 1), 99), labels).top5_accuracy is None
