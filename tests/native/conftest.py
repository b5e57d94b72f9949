from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spectriton_native import _call, library


@pytest.fixture(scope="session")
def mixing_by_avx(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Mixing alone, by its branch for processors with AVX and FMA but without AVX-512."""
    flags = Path("/proc/cpuinfo").read_text().split()
    if not {"avx", "fma"} <= set(flags):
        pytest.skip("no processor with AVX and FMA")
    made, deadline = tmp_path_factory.mktemp("avx"), time.monotonic() + 60
    command = [*library.compilers()[0], *library._OPTIONS, *library._variants(True)[0], "-mavx", "-mfma", "-shared"]
    library._run([*command, str(library.SOURCES / "mix.c"), "-o", "mix.so"], made, deadline)
    return ctypes.CDLL(str(made / "mix.so"))


@pytest.fixture(params=["this processor", "portable"])
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The library as it is used here, and the one of the branches that every processor can run.

    For tests of mixing, which ask for it, ``AVX`` is the branch in between.
    """
    monkeypatch.setenv(library.PORTABLE, str(int(request.param == "portable")))
    if reason := library.why_unavailable():
        pytest.skip(f"no C functions: {reason}")
    if request.param == "AVX":
        avx = request.getfixturevalue("mixing_by_avx")
        monkeypatch.setattr(library, "_loaded", lambda portable: avx)
    _call.forget()
    yield str(request.param)
    _call.forget()
