"""Frequencies that fold onto those of a smaller map come in no order: chunks of them must not be taken for ranges."""

from __future__ import annotations

import pytest
import torch

from spectriton import ops
from spectriton.reference.pattern import row_index


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([4, 5, 6], slice(4, 7)), ([7], slice(7, 8)), ([], slice(0, 0)), ([10, 4, 12, 13], None), ([2, 9, 4], None)],
)
def test_row_index(rows: list[int], expected: slice | None) -> None:
    given = torch.tensor(rows, dtype=torch.int64)
    found = row_index(given)
    assert found is given if expected is None else found == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strided_blocks_are_the_same_in_chunks_of_any_size(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRITON_BACKEND", "reference")
    generator = torch.Generator().manual_seed(0)
    packed = ops.to_spectral(torch.randn(5, 4, 3, 16, generator=generator, dtype=dtype), threshold=0.0)
    weight = torch.randn(3, 4, 1, 1, generator=generator, dtype=dtype)
    results = []
    for workspace in (1, 5_000, 10_000, 20_000, 40_000, 1 << 30):
        taps = weight.clone().requires_grad_()
        out = ops.spec_block(packed, taps, stride=(1, 2), threshold=0.1, workspace=workspace)
        maps = ops.to_spatial(out)
        (grad,) = torch.autograd.grad(maps.square().sum(), taps)
        results.append((maps.detach(), grad))
    for maps, grad in results[:-1]:
        torch.testing.assert_close(maps, results[-1][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, results[-1][1], rtol=1e-5, atol=1e-4)
