"""The C functions of ``csrc/``, compiled for this processor by the system's compiler on first use, and kept.

The library goes to ``~/.cache/spectriton/native/`` (or below ``XDG_CACHE_HOME``), under a name made of the sources, the
processor and the options, so that another version or machine finds its own. Where the folder cannot be written, it is
compiled anew in each process. Threads are those of the OpenMP runtime that PyTorch has loaded; without one there is
one thread.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "csrc"
_OPTIONS = ("-O3", "-std=c11", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_FOR_THIS_PROCESSOR = {"x86_64": "-march=native"}.get(platform.machine(), "-mcpu=native")
_SECONDS = 300


class Unavailable(RuntimeError):
    """There is no compiled library; the message says why."""


def compilers() -> list[str]:
    """Commands to try, ``CC`` first."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    return list(dict.fromkeys(name for name in names if name and shutil.which(name.split()[0])))


def cache_directory() -> Path:
    """Where compiled libraries are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spectriton" / "native"


def _processor() -> str:
    """What a library for this processor may not be used without."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(named)))


def _has_openmp() -> bool:
    """Whether this process has the OpenMP runtime that GCC calls, as PyTorch brings it."""
    import torch  # noqa: F401  which loads it

    return hasattr(ctypes.CDLL(None), "GOMP_parallel")


def _variants() -> list[tuple[str, ...]]:
    """Further options to try, the best first."""
    threads = [("-fopenmp",)] if _has_openmp() else []
    return [(_FOR_THIS_PROCESSOR, *openmp) for openmp in (*threads, ())] + [()]


def _compile(compiler: str, options: tuple[str, ...], target: Path) -> None:
    """Write a library to ``target``; all of it, or nothing.

    Raises:
        Unavailable: the compiler fails, or what it makes cannot be loaded.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        objects, made = [], Path(directory) / target.name
        for source in sorted(SOURCES.glob("*.c")):
            objects.append(str(Path(directory) / f"{source.stem}.o"))
            _run([*compiler.split(), *_OPTIONS, *options, "-c", str(source), "-o", objects[-1]])
        # OpenMP's symbols are left open, so that they are found in the runtime that is already there.
        _run([*compiler.split(), "-shared", *objects, "-lm", "-o", str(made)])
        _open(made)
        os.replace(made, target)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} could not be run: {error}") from error
    if done.returncode:
        raise Unavailable(f"{command[0]} failed: {done.stderr.strip()[-500:]}")


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    except OSError as error:
        raise Unavailable(f"the compiled library cannot be loaded: {error}") from error


def _find_or_compile() -> ctypes.CDLL:
    if sys.platform != "linux":
        raise Unavailable(f"it is for Linux, this is {sys.platform}")
    candidates = compilers()
    text = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    key = hashlib.sha256(text)
    key.update(repr((_OPTIONS, _variants(), candidates, _processor())).encode())
    kept = cache_directory() / f"{key.hexdigest()[:24]}.so"
    if kept.exists():
        try:
            return _open(kept)
        except Unavailable:  # damaged: compiled again
            pass
    if not candidates:
        raise Unavailable("there is no C compiler (cc, gcc, clang, or CC)")
    problem: Unavailable | None = None
    for compiler in candidates:
        for options in _variants():
            try:
                return _compiled(compiler, options, kept)
            except Unavailable as error:
                problem = problem or error
    raise problem or Unavailable("it could not be compiled")


def _compiled(compiler: str, options: tuple[str, ...], kept: Path) -> ctypes.CDLL:
    try:
        _compile(compiler, options, kept)
        return _open(kept)
    except OSError:  # the folder cannot be written
        with tempfile.TemporaryDirectory() as directory:
            _compile(compiler, options, Path(directory) / kept.name)
            return _open(Path(directory) / kept.name)


@lru_cache(maxsize=1)
def _loaded() -> ctypes.CDLL | Unavailable:
    try:
        return _find_or_compile()
    except Unavailable as error:
        return error


def why_unavailable() -> str | None:
    """Why there is no library, or None where there is one; compiles it the first time."""
    loaded = _loaded()
    return str(loaded) if isinstance(loaded, Unavailable) else None


def function(name: str, arguments: tuple[Any, ...], result: Any = None) -> Any:
    """A function of the library.

    Raises:
        Unavailable: there is no library.
    """
    loaded = _loaded()
    if isinstance(loaded, Unavailable):
        raise loaded
    found = getattr(loaded, name)
    found.argtypes, found.restype = list(arguments), result
    return found
