"""The spaces of configurations, the heuristics and the way to a tuned one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import astuple, fields
from pathlib import Path

import pytest
import torch

from spectriton_kernels import configs
from spectriton_kernels.complex_product import plan_complex_product
from spectriton_kernels.configs import TUNABLES, Adjoint, Blocks, Spectrum, Stream, Tiles

pytestmark = pytest.mark.triton
KERNELS = Path(configs.__file__).parent
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_lookup() -> Iterator[None]:
    configs.set_lookup(None)
    yield
    configs.set_lookup(None)


def test_every_kernel_is_tunable():
    written = set()
    for path in KERNELS.glob("*.py"):
        written |= set(re.findall(r"^def (\w+)_kernel\(", path.read_text(), re.MULTILINE))
    assert written == set(TUNABLES)


@pytest.mark.parametrize("kernel", TUNABLES)
def test_spaces_are_small_and_hold_the_heuristics_choice(kernel):
    tunable = TUNABLES[kernel]
    assert 4 <= len(tunable.space) <= 12 and len(set(tunable.space)) == len(tunable.space)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for size in (1, 7, 64, 1000, 10**6):
            sizes = (size,) * (len(tunable.sizes) - 1) + (1024,)
            assert tunable.heuristic((dtype, dtype), sizes) in tunable.space


def test_blocks():
    assert Stream(8192, 4).row_block(64, 4) == (32, 64)
    assert Stream(8192, 4).row_block(4096, 4) == (1, 2048)
    # 1088 = 8.5 * 128: wider blocks would leave more than an eighth of their work beyond the end
    assert Stream(8192, 4).row_block(1088, 4) == (16, 128)
    assert Stream(8192, 4).row_block(5000, 4, 128) == (16, 128)
    assert Tiles(8192, 64).shape(64, 4) == (16, 4)
    assert Tiles(8192, 64).shape(1024, 4) == (1, 4)
    assert Tiles(8192, 64).shape(1024, 2) == (1, 4)  # as float32
    assert Tiles(2048, 64).shape(1024, 8) == (1, 8)
    assert Tiles(2048, 64).shape(32, 4) == (8, 1)
    assert Spectrum(8192, 8, 32, 4).shape(500, 64, 64, 4) == (8, 8, 32)
    assert Spectrum(8192, 8, 32, 4).shape(500, 3, 5, 8) == (32, 4, 8)
    assert Adjoint(16384, 16, 32, 4).shape(9, 64, 64, 4) == (16, 8, 32)
    assert Adjoint(16384, 16, 32, 4).shape(1, 2, 2, 8) == (1, 2, 2)
    assert Blocks(4096, 32).shape(4096, 1000) == (1, 4)
    assert Blocks(4096, 16).shape(1024, 1000) == (4, 8)
    assert Blocks(2048, 32).shape(256, 3) == (4, 1)


def test_small_work_gets_small_blocks():
    choose = configs.PACK_ROWS.heuristic
    assert choose((torch.float32, torch.float32), (100, 64)).block_bytes == 2048
    assert choose((torch.float32, torch.float32), (10**6, 64)).block_bytes == 8192


def test_buckets():
    assert configs.bucket((0, 1, 2, 3, 64, 65)) == (0, 1, 2, 4, 64, 128)


def test_a_lookup_goes_before_the_heuristic_and_is_asked_once_a_shape():
    asked = []
    tuned = Stream(2048, 2)

    def lookup(device, kernel, dtypes, sizes):
        asked.append((device, kernel, dtypes, sizes))
        return tuned if sizes == (1000,) else None

    dtypes = (torch.float32,)
    product = configs.COMPLEX_PRODUCT
    assert product.choose(GPU, dtypes, (1000,)) == Stream(8192, 4)
    configs.set_lookup(lookup)
    for _ in range(3):
        assert product.choose(GPU, dtypes, (1000,)) is tuned
        assert product.choose(GPU, dtypes, (1001,)) == Stream(8192, 4)
    assert asked == [(GPU, "complex_product", dtypes, sizes) for sizes in ((1000,), (1001,))]
    configs.set_lookup(None)
    assert product.choose(GPU, dtypes, (1000,)) == Stream(8192, 4)


def test_a_launch_takes_what_the_lookup_says():
    x = torch.zeros(500, dtype=torch.complex64)
    configs.set_lookup(lambda *launch: Stream(2048, 2) if launch[1:] == LAUNCH else None)
    assert plan_complex_product(x, x)[0].meta["BLOCK"] == 512
    assert plan_complex_product(x, x, config=Stream(4096, 4))[0].meta["BLOCK"] == 1024
    assert plan_complex_product(x[1:], x[1:])[0].meta["BLOCK"] == 2048


LAUNCH = ("complex_product", (torch.float32,), (1000,))


def test_the_table_in_docs_lists_every_kernel_and_configuration():
    text = (KERNELS.parent.parent / "docs" / "kernels.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    again = "run python -m spectriton_kernels.build --table docs/kernels.md"
    assert list(sections) == list(TUNABLES), again
    for kernel, tunable in TUNABLES.items():
        assert ", ".join(field.name for field in fields(tunable.space[0])) in sections[kernel], again
        cells = [
            line.split("|")[2].strip(" *") for line in sections[kernel].splitlines() if "**" in line or "%" in line
        ]
        listed = {config for cell in cells for config in cell.split("; ")}
        assert listed == {", ".join(map(str, astuple(config))) for config in tunable.space}, again
