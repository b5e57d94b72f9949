from __future__ import annotations

from collections.abc import Iterator

import pytest

from spectriton_native import _call, library


@pytest.fixture(params=["this processor", "portable"])
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The library as it is used here, and the one of the branches that every processor can run."""
    monkeypatch.setenv(library.PORTABLE, str(int(request.param == "portable")))
    if reason := library.why_unavailable():
        pytest.skip(f"no C functions: {reason}")
    _call.forget()
    yield str(request.param)
    _call.forget()
