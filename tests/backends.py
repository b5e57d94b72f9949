"""Running a test on all implementations of the primitives."""

from __future__ import annotations

import pytest

from spectriton._backend import why_not_native


@pytest.fixture(params=["reference", "native", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reference, the C functions, and the Triton kernels (in the interpreter where there is no GPU)."""
    if request.param == "native" and why_not_native() is not None:
        pytest.skip(f"no C functions: {why_not_native()}")
    monkeypatch.setenv("SPECTRITON_BACKEND", request.param)
    return request.param
