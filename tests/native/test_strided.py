"""Tensors with gaps between their elements: C takes none, the reference does."""

from __future__ import annotations

import pytest
import torch

from spectriton import PackedSpectrum, ops

FIELDS = ("edge", "values", "scales", "bitmap", "offsets")


@pytest.mark.parametrize("field", ["scales", "bitmap", "offsets"])
@pytest.mark.parametrize("value_dtype", ["float32", "int8", "int4"])
def test_packed_spectra(build: str, monkeypatch: pytest.MonkeyPatch, value_dtype: str, field: str) -> None:
    monkeypatch.setenv("SPECTRITON_BACKEND", "native")
    x = torch.randn(2, 40, 16, 8, generator=torch.Generator().manual_seed(0))
    packed = ops.to_spectral(x, threshold=0.8, value_dtype=value_dtype)
    fields = {name: getattr(packed, name) for name in FIELDS}
    fields[field] = torch.stack([fields[field]] * 2, dim=-1)[..., 0]
    assert not fields[field].is_contiguous() or not fields[field].numel()
    apart = PackedSpectrum.of(list(fields.values()), packed.shape, packed.value_dtype)
    assert torch.equal(ops.unpack(apart), ops.unpack(packed))
    torch.testing.assert_close(ops.to_spatial(apart), ops.to_spatial(packed))
