"""The library is compiled, kept and found, or it says why not; a small source stands in for those of the package."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import spectriton_native as native
from spectriton._backend import backend_name
from spectriton_native import Part, _call, library
from tests.native.spectra import Room, identical, spectrum

CPU = torch.device("cpu")
SOURCE = '#include "answer.h"\nint answer(void) { return ANSWER; }\ndouble half(double x) { return x / 2; }\n'
HEADER = "#ifndef ANSWER\n#define ANSWER 42\n#endif\n"
pytestmark = pytest.mark.usefixtures("afresh")


def forget() -> None:
    """As at the start of a process."""
    library._loaded.cache_clear()
    _call.forget()


@pytest.fixture
def afresh() -> Iterator[None]:
    """Every test begins so, and leaves nothing to those that come after."""
    forget()
    yield
    forget()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of kept libraries, empty, with the small source in place of those of the package."""
    sources = tmp_path / "the sources"
    sources.mkdir()
    (sources / "answer.c").write_text(SOURCE)
    (sources / "answer.h").write_text(HEADER)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(library, "SOURCES", sources)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "the cache"))
    monkeypatch.setenv("SPECTRITON_BACKEND", "auto")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv(library.PORTABLE, raising=False)
    return tmp_path / "the cache" / "spectriton" / "native"


@pytest.fixture
def real(cache: Path) -> str:
    """The path of a compiler; skips where there is none."""
    found = library.compilers()
    if not found:
        pytest.skip("there is no C compiler")
    return found[0][0]


@pytest.fixture
def only_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a shell script the only compiler there is."""

    def make(script: str) -> None:
        command = tmp_path / "bin" / "cc"
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", str(command.parent))

    return make


def answer() -> int:
    return int(library.function("answer", (), ctypes.c_int)())


def reason() -> str:
    """Why there is no library, which one warning says too."""
    with pytest.warns(RuntimeWarning, match="the C functions for CPUs cannot be had") as caught:
        found = library.why_unavailable()
    assert len(caught) == 1
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        assert library.why_unavailable() == found
        assert backend_name(CPU) == "reference"
    with pytest.raises(library.Unavailable):
        answer()
    assert found is not None and found in str(caught[0].message) and "\n" not in found
    assert "/" not in found, "machine paths are nobody's business"
    return found


def test_it_is_compiled_once(cache: Path, real: str, only_compiler: Callable[[str], None], tmp_path: Path) -> None:
    log = tmp_path / "log"
    only_compiler(f'echo . >> "{log}"; exec {real} "$@"')
    assert answer() == 42 and library.why_unavailable() is None
    runs = log.read_text()
    (kept,) = cache.iterdir()
    forget()
    assert answer() == 42
    assert log.read_text() == runs and list(cache.iterdir()) == [kept]
    assert not any((tmp_path / "temporary").iterdir())


def test_a_kept_library_needs_no_compiler(
    cache: Path, real: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert answer() == 42
    forget()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert library.compilers() == [] and answer() == 42


@pytest.mark.parametrize("quoted", [False, True])
def test_cc_may_have_spaces_and_arguments(
    cache: Path, real: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quoted: bool
) -> None:
    command = tmp_path / "my tools" / "my cc"
    command.parent.mkdir()
    command.symlink_to(real)
    monkeypatch.setenv("CC", f"'{command}' -DANSWER=7" if quoted else str(command))
    assert answer() == (7 if quoted else 42)


def test_cc_may_be_relative(cache: Path, real: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my-cc").symlink_to(real)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CC", "./my-cc -DANSWER=8")
    assert answer() == 8


def test_where_cc_fails_another_compiler_is_taken(
    cache: Path, real: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer() == 42
    for nothing in ("", " ", "no-such-compiler"):
        monkeypatch.setenv("CC", nothing)
        assert library.compilers()[0][0] == real


def test_quotes_that_do_not_end(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "'gcc")
    assert reason() == "what CC says is no command: No closing quotation"


def test_without_a_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This is as usual as it can be: no warning."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend_name(CPU) == "reference"
    why = library.why_unavailable()
    assert why is not None and "there is no C compiler" in why
    monkeypatch.setenv("SPECTRITON_BACKEND", "native")
    with pytest.raises(ValueError, match="SPECTRITON_BACKEND got 'native', but there is no C compiler .*; install"):
        backend_name(CPU)
    assert backend_name(torch.device("meta")) == "reference"


def test_a_compiler_that_fails(
    cache: Path, only_compiler: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    only_compiler('echo "/home/me/a b/answer.c:3:5: fatal error: no /usr/include/math.h here" >&2; exit 1')
    assert reason() == "cc failed: error: no math.h here"
    assert not any(cache.iterdir())
    monkeypatch.setenv("SPECTRITON_BACKEND", "native")
    with pytest.raises(ValueError, match="cc failed: error: no math.h here; install a C compiler"):
        backend_name(CPU)


def test_a_compiler_that_says_nothing(cache: Path, only_compiler: Callable[[str], None]) -> None:
    only_compiler("exit 3")
    assert reason() == "cc failed: it does not say why"


def test_a_compiler_that_cannot_be_run(cache: Path, only_compiler: Callable[[str], None], tmp_path: Path) -> None:
    only_compiler("")
    (tmp_path / "bin" / "cc").write_bytes(b"\x7fELF of no machine")
    assert reason().startswith("cc cannot be run: ")


def test_a_compiler_that_takes_long(
    cache: Path, only_compiler: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    only_compiler("sleep 20; true")  # what it has started ends with it
    monkeypatch.setattr(library, "_SECONDS", 0.2)
    begin = time.monotonic()
    assert reason() == "cc takes too long"
    assert time.monotonic() - begin < 5


def test_what_is_compiled_cannot_be_loaded(cache: Path, only_compiler: Callable[[str], None]) -> None:
    only_compiler('while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"')
    assert reason().startswith("the compiled library cannot be loaded: library.so: ")
    assert not any(cache.iterdir())


def test_a_symbol_is_missing(cache: Path, real: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_variants", lambda portable: [()])
    (library.SOURCES / "more.c").write_text("int elsewhere(void);\nint here(void) { return elsewhere(); }\n")
    assert reason() == "the compiled library cannot be loaded: library.so: undefined symbol: elsewhere"


def test_without_sources(cache: Path, real: str) -> None:
    for path in library.SOURCES.iterdir():
        path.unlink()
    assert "sources are missing" in reason()


def test_options_that_a_compiler_lacks_are_left_out(
    cache: Path, real: str, only_compiler: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = library._variants(portable=False)[0][0]
    only_compiler(f'for option; do [ "$option" = {refused} ] && exit 1; done; exec {real} "$@"')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer() == 42


def test_the_cache_cannot_be_written(cache: Path, real: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither made nor written, even by root: it is below a file."""
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert answer() == 42
    assert not any((tmp_path / "temporary").iterdir())
    forget()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    assert reason() == "there is no folder to compile in: Not a directory"


def test_without_a_home(cache: Path, real: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is of a user that the system does not know
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert library.cache_directory() is None and answer() == 42
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("base", ["", "relative/folder"])
def test_a_cache_that_is_no_full_path_is_passed_over(
    base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert library.cache_directory() == tmp_path / ".cache" / "spectriton" / "native"


@pytest.mark.parametrize("damage", ["empty", "half", "one bit", "no digest", "a folder"])
def test_a_damaged_library_is_compiled_again(cache: Path, real: str, damage: str) -> None:
    assert answer() == 42
    (kept,) = cache.iterdir()
    content = kept.read_bytes()
    if damage == "a folder":
        kept.unlink()
        kept.mkdir()
    else:
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        written = {"empty": b"", "half": content[: len(content) // 2], "one bit": flipped, "no digest": content[:-32]}
        kept.unlink()  # it is in use
        kept.write_bytes(written[damage])
    forget()
    assert answer() == 42
    if damage != "a folder":
        assert library._open_kept(kept) is not None and list(cache.iterdir()) == [kept]


PROCESS = """
import ctypes, importlib.util, sys, types
from pathlib import Path
sys.modules["torch"] = types.ModuleType("torch")  # as far as it is needed here
spec = importlib.util.spec_from_file_location("library", sys.argv[1])
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
library.SOURCES = Path(sys.argv[2])
sys.stdin.readline()
assert library.function("answer", (), ctypes.c_int)() == 42
"""


def test_processes_at_once(cache: Path, real: str) -> None:
    command = [sys.executable, "-I", "-c", PROCESS, library.__file__, str(library.SOURCES)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:  # they have all started before the first compiles
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    (kept,) = cache.iterdir()
    assert library._open_kept(kept) is not None


def test_names_tell_sources_and_choices_apart(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [library._file_name(False), library._file_name(True)]
    for file in ("answer.c", "answer.h"):
        (library.SOURCES / file).write_text((library.SOURCES / file).read_text() + "\n")
        names.append(library._file_name(False))
    (library.SOURCES / "notes.txt").touch()
    assert library._file_name(False) == names[-1]
    monkeypatch.setenv("CC", "clang")
    names.append(library._file_name(False))
    monkeypatch.setattr(library, "_processor", lambda: "another")
    names.append(library._file_name(False))
    assert len(set(names)) == len(names)
    portable = library._file_name(True)
    monkeypatch.setattr(library, "_processor", lambda: "a third")
    assert library._file_name(True) == portable  # it may be shared


def test_both_builds_side_by_side(cache: Path, real: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer() == 42
    monkeypatch.setenv(library.PORTABLE, "1")
    assert answer() == 42
    assert len(list(cache.iterdir())) == 2
    assert not any("native" in option for options in library._variants(portable=True) for option in options)


def test_callers_pass_the_types_they_like(cache: Path, real: str) -> None:
    half = library.function("half", (ctypes.c_double,), ctypes.c_double)
    library.function("half", (ctypes.c_int64,), ctypes.c_int64)
    assert half(3.0) == 1.5


def test_threads_change_nothing() -> None:
    if why := library.why_unavailable():
        pytest.skip(f"no C functions: {why}")
    given = spectrum(9, 5000, 1024, density=0.3)  # more places than are worth a second thread
    rows, tiles = slice(0, 9), given.tiles
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            part = Part.of(given.bitmap, rows, 0, tiles, given.offsets, given.values.shape[0])
            dense, kept, sums = Room(9, tiles * 1024, 2), Room(*given.values.shape), Room(tiles * 1024, 2)
            native.expand_rows(part, given.values, given.scales, dense.tensor)
            native.store_rows(part, dense.tensor, kept.tensor)
            sums.tensor.zero_()
            native.sum_rows(part, given.values, sums.tensor)
            bitmap = given.bitmap.clone()
            starts, count = native.threshold_rows(Part.of(bitmap, rows, 0, tiles), dense.tensor, 5000, 1.0)
            finite = torch.randn(given.values.shape, generator=torch.Generator().manual_seed(0))
            steps, scales = Room(*given.values.shape, dtype=torch.int8), Room(2)
            native.quantise(finite, torch.tensor([0, 700], dtype=torch.int32), steps.tensor, scales.tensor)
            assert all(room.guarded for room in (dense, kept, sums, steps, scales))
            results.append((dense.tensor, kept.tensor, sums.tensor, bitmap, starts, steps.tensor, scales.tensor))
            assert 0 < count < given.bitmap.numel() * 8
            given.offsets[8, 1] += 1 << 30  # found by whichever thread
            with pytest.raises(ValueError, match="offsets beyond its values"):
                native.store_rows(part, dense.tensor, kept.tensor)
            given.offsets[8, 1] -= 1 << 30
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert identical(one, two)
