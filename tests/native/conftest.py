from __future__ import annotations

import pytest

from spectriton_native import library


@pytest.fixture(params=["this processor", "portable"])
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library as it is used here, and the one of the branches that every processor can run."""
    monkeypatch.setenv(library.PORTABLE, str(int(request.param == "portable")))
    if reason := library.why_unavailable():
        pytest.skip(f"no C functions: {reason}")
    return str(request.param)
