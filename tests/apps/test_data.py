"""Data sets: the right images, and clear words for the wrong ones."""

from __future__ import annotations

import gzip
import struct
import sys
import types
from pathlib import Path

import pytest
import torch

from spectriton import data as sd

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: torch.Tensor) -> bytes:
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.to(torch.uint8).contiguous().numpy().tobytes()


def write_fashion(place: Path, count: int = 12, zipped: bool = True) -> dict[str, torch.Tensor]:
    place.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for part in ("train", "t10k"):
        images = torch.randint(0, 256, (count, 28, 28), generator=torch.Generator().manual_seed(len(part)))
        for stem, tensor in (
            (f"{part}-images-idx3-ubyte", images),
            (f"{part}-labels-idx1-ubyte", torch.arange(count) % 10),
        ):
            raw = idx(tensor)
            (place / (stem + ".gz" * zipped)).write_bytes(gzip.compress(raw) if zipped else raw)
            tensors[stem] = tensor
    return tensors


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without Fashion-MNIST."""
    monkeypatch.setattr(sd, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    monkeypatch.delenv(sd.DATA_DIR_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)


@pytest.mark.usefixtures("apps_extra")
def test_digits_are_split_by_class_and_normalised() -> None:
    data = sd.load("digits")
    assert data.train_images.shape == (1438, 1, 28, 28) and data.test_images.shape == (359, 1, 28, 28)
    assert data.train_images.dtype == torch.uint8
    counts = torch.bincount(data.test_labels, minlength=10).double() / torch.bincount(data.train_labels)
    assert ((counts - 0.25).abs() < 0.02).all()
    x = data.to_input(data.train_images)
    assert abs(float(x.mean())) < 1e-3 and abs(float(x.std()) - 1) < 1e-3
    assert data.fingerprint() == sd.load("digits").fingerprint()


@pytest.mark.usefixtures("apps_extra")
def test_digits_keep_training_and_test_images_apart() -> None:
    data = sd.load("digits")
    train = {bytes(image.numpy().tobytes()) for image in data.train_images}
    assert not any(bytes(image.numpy().tobytes()) in train for image in data.test_images)


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_from_a_directory(tmp_path: Path, zipped: bool) -> None:
    tensors = write_fashion(tmp_path, zipped=zipped)
    data = sd.load("fashion-mnist", data_dir=tmp_path)
    assert torch.equal(data.train_images[:, 0], tensors[IMAGES].to(torch.uint8))
    assert torch.equal(data.test_labels, tensors["t10k-labels-idx1-ubyte"])


@pytest.mark.parametrize("folder", ["", "fashion-mnist"])
def test_fashion_mnist_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nowhere: None, folder: str
) -> None:
    write_fashion(tmp_path / folder)
    monkeypatch.setenv(sd.DATA_DIR_VARIABLE, str(tmp_path))
    assert len(sd.load("fashion-mnist").train_images) == 12


@pytest.mark.skipif(not sd.DEBIAN_FASHION_MNIST.is_dir(), reason="package dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian() -> None:
    data = sd.load("fashion-mnist")
    assert data.train_images.shape == (60000, 1, 28, 28) and data.test_images.shape == (10000, 1, 28, 28)
    assert torch.bincount(data.train_labels).tolist() == [6000] * 10
    scaled = data.train_images.double() / 255
    assert float(scaled.mean()) == pytest.approx(data.mean[0], abs=1e-4)
    assert float(scaled.std()) == pytest.approx(data.std[0], abs=1e-4)


class FakeImage:
    def __init__(self, value: int) -> None:
        self.value = value

    def convert(self, mode: str) -> FakeImage:
        assert mode == "L"
        return self

    def tobytes(self) -> bytes:
        return bytes([self.value]) * 784


def test_fashion_mnist_from_the_hub(monkeypatch: pytest.MonkeyPatch, nowhere: None) -> None:
    part = {"image": [FakeImage(3), FakeImage(7)], "label": [1, 9]}
    asked = []

    def load_dataset(name: str) -> object:
        asked.append(name)
        return {"train": part, "test": part}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = sd.load("fashion-mnist")
    assert asked == ["zalando-datasets/fashion_mnist"]
    assert data.train_images[1].unique().tolist() == [7] and data.test_labels.tolist() == [1, 9]


def test_fashion_mnist_nowhere_names_every_way(nowhere: None) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        sd.load("fashion-mnist")
    for way in (
        "--data-dir",
        sd.DATA_DIR_VARIABLE,
        "dataset-fashion-mnist",
        'pip install "spectriton[hub]"',
        "--data digits",
    ):
        assert way in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch, nowhere: None) -> None:
    def load_dataset(name: str) -> object:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(FileNotFoundError, match="no route.*--data-dir"):
        sd.load("fashion-mnist")


def test_a_directory_with_a_file_missing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte"):
        sd.load("fashion-mnist", data_dir=tmp_path)
    monkeypatch.setenv(sd.DATA_DIR_VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte"):
        sd.load("fashion-mnist")
    with pytest.raises(FileNotFoundError, match="absent"):
        sd.load("fashion-mnist", data_dir=tmp_path / "absent")


GOOD = idx(torch.arange(2 * 28 * 28).remainder(251).view(2, 28, 28))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "header got 0 bytes"),
        (b"\x00\x00\x08", "header got 3 bytes"),
        (b"\x89PNG" + GOOD[4:], "magic number got 89 50 4e 47, expected 00 00 08 03"),
        (b"\x00\x00\x0d\x03" + GOOD[4:], "magic number"),
        (b"\x00\x00\x08\x01" + GOOD[4:], "dimensions got 1, expected 3"),
        (GOOD[:10], "header got 10 bytes, expected 16 bytes"),
        (GOOD[:4] + bytes(12), "no empty dimension"),
        (GOOD[:-1], "data got 1567 bytes, expected 1568 bytes"),
        (GOOD + b"\0", "more than 1568 bytes"),
        (GOOD[:4] + b"\xff" * 12 + GOOD[16:], "data got 1568 bytes"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_idx_files_are_refused(tmp_path: Path, raw: bytes, said: str, zipped: bool) -> None:
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    with pytest.raises(ValueError) as caught:
        sd.read_idx(path, 3)
    assert said in str(caught.value) and str(path) in str(caught.value) and ";" in str(caught.value)


@pytest.mark.parametrize("cut", [5, 15, 200, -9, -1])
def test_truncated_gzip_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(GOOD)[:cut])
    with pytest.raises(ValueError, match="gzip stream"):
        sd.read_idx(path, 3)


def test_a_flipped_bit_in_gzip_is_refused(tmp_path: Path) -> None:
    raw = bytearray(gzip.compress(GOOD))
    raw[len(raw) // 2] ^= 0x10
    (tmp_path / "images.gz").write_bytes(raw)
    with pytest.raises(ValueError):
        sd.read_idx(tmp_path / "images.gz", 3)


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        sd.read_idx(tmp_path / "absent", 1)


@pytest.mark.parametrize(
    ("stem", "tensor", "said"),
    [
        (LABELS, torch.arange(12), "label got 11, expected 0 to 9"),
        (LABELS, torch.zeros(11), "labels got 11, expected 12"),
        (IMAGES, torch.zeros(12, 28, 27), "images got (12, 28, 27)"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path: Path, stem: str, tensor: torch.Tensor, said: str) -> None:
    write_fashion(tmp_path)
    (tmp_path / f"{stem}.gz").write_bytes(gzip.compress(idx(tensor)))
    with pytest.raises(ValueError) as caught:
        sd.load("fashion-mnist", data_dir=tmp_path)
    assert said in str(caught.value) and stem in str(caught.value)


@pytest.mark.parametrize(("name", "meant"), [("digit", "digits"), ("fashion_mnist", "fashion-mnist")])
def test_an_unknown_name_gets_a_proposal(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        sd.load(name)


@pytest.mark.usefixtures("apps_extra")
@pytest.mark.parametrize("options", [{"train_limit": 0}, {"test_limit": -1}, {"image_size": 0}])
def test_limits_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        sd.load("digits", **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("apps_extra")
def test_limits_and_size(data: sd.ImageData) -> None:
    small = sd.load("digits", train_limit=20, test_limit=10, image_size=32)
    assert len(small.train_images) == 20 and len(small.test_labels) == 10
    assert small.to_input(small.test_images).shape == (10, 1, 32, 32)
    assert small.fingerprint() != sd.load("digits", train_limit=20, test_limit=10).fingerprint()


def test_own_images_are_checked() -> None:
    images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 3])

    def make(**changes: object) -> sd.ImageData:
        fields = {
            "name": "own",
            "train_images": images,
            "train_labels": labels,
            "test_images": images,
            "test_labels": labels,
            "num_classes": 4,
            "mean": (0.5,),
            "std": (0.5,),
        }
        return sd.ImageData(**{**fields, **changes})  # type: ignore[arg-type]

    assert make().image_size == 8
    for changes, said in (
        ({"train_images": images.float()}, "torch.uint8"),
        ({"train_labels": labels[:3]}, "one for each image"),
        ({"num_classes": 3}, "from 0 to 2"),
        ({"test_images": images[..., :7]}, "shape of the training images"),
        ({"std": (0.0,)}, "std above 0"),
        ({"image_size": -1}, "image_size"),
    ):
        with pytest.raises(ValueError, match=said):
            make(**changes)
