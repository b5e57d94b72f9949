"""Running a test on both implementations of the primitives."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reference, and the Triton kernels (in the interpreter where there is no GPU)."""
    monkeypatch.setenv("SPECTRITON_BACKEND", request.param)
    return request.param
