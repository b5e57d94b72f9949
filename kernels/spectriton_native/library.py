"""The C functions of ``csrc/``, compiled for this processor by the system's compiler on first use, and kept.

The library goes to ``~/.cache/spectriton/native/`` (or below ``XDG_CACHE_HOME``), under a name made of the sources, the
processor and the options, so that another version or machine finds its own. Where nothing can be written or loaded
there, it is compiled anew in each process. Threads are those of the OpenMP runtime that PyTorch has loaded; without one
there is one thread.

``SPECTRITON_NATIVE_PORTABLE=1`` compiles for any processor of the machine's kind: without instructions that only some
have, by the branches of the sources that are meant for all. It is read at the first call of each function.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "csrc"
PORTABLE = "SPECTRITON_NATIVE_PORTABLE"
# The environment as Python keeps it: to find that something is not set takes a tenth of the time there, and a training
# step asks hundreds of times.
_variables: Any = getattr(os.environ, "_data", os.environ)
_PORTABLE: Any = os.environ.encodekey(PORTABLE) if _variables is not os.environ else PORTABLE
# A product and a sum are rounded one by one, as the reference rounds them.
_OPTIONS = ("-O3", "-std=c11", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
_FOR_THIS_PROCESSOR = {"x86_64": "-march=native"}.get(platform.machine(), "-mcpu=native")
# For everything that is tried.
_SECONDS = 300


class Unavailable(RuntimeError):
    """There is no compiled library; the message says why, in one line without paths."""


class Failed(Unavailable):
    """There is a compiler, but what it is needed for fails."""


def portable() -> bool:
    """Whether ``SPECTRITON_NATIVE_PORTABLE`` asks for the library that every processor can run."""
    return _PORTABLE in _variables and os.environ[PORTABLE] not in ("", "0")


def compilers() -> list[tuple[str, ...]]:
    """Commands to try: what ``CC`` says, which may have arguments, then the usual names."""
    chosen = os.environ.get("CC", "")
    try:
        commands = [[chosen] if shutil.which(chosen) else shlex.split(chosen), ["cc"], ["gcc"], ["clang"]]
    except ValueError as error:
        raise Failed(f"what CC says is no command: {error}") from error
    # In full, for they run in another folder.
    found = [(os.path.abspath(shutil.which(words[0]) or ""), *words[1:]) for words in commands if words]
    return list(dict.fromkeys(words for words in found if os.path.isfile(words[0])))


def cache_directory() -> Path | None:
    """Where compiled libraries are kept; None where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    path = Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "spectriton" / "native"
    return path if path.is_absolute() else None


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


def _variants(portable: bool) -> list[tuple[str, ...]]:
    """Further options to try, the best first."""
    processors = [()] if portable else [(_FOR_THIS_PROCESSOR,), ()]
    threads = [("-fopenmp",), ()] if _has_openmp() else [()]
    return [(*processor, *openmp) for processor in processors for openmp in threads]


def _file_name(portable: bool) -> str:
    """Of the library."""
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]"))))
    processor = platform.machine() if portable else _processor()
    key.update(repr((_OPTIONS, _variants(portable), os.environ.get("CC"), processor)).encode())
    return f"{key.hexdigest()[:24]}.so"


def _compile(compiler: tuple[str, ...], options: tuple[str, ...], directory: Path, deadline: float) -> Path:
    """Writes a library to ``directory``, with the digest of its content at its end.

    Raises:
        Failed: the compiler fails.
    """
    sources = sorted(SOURCES.glob("*.c"))
    objects = [f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: str) -> None:
        _run([*compiler, *_OPTIONS, *options, "-c", str(source), "-o", target], directory, deadline)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, sources, objects))
    made = directory / "library.so"
    # OpenMP's symbols are left open, so that they are found in the runtime that is already there.
    _run([*compiler, "-shared", *objects, "-lm", "-o", made.name], directory, deadline)
    made.write_bytes(_with_digest(made.read_bytes()))
    return made


def _with_digest(content: bytes) -> bytes:
    """What is kept: loaders pass over what follows a library."""
    return content + hashlib.sha256(content).digest()


def _run(command: list[str], directory: Path, deadline: float) -> None:
    name, left = Path(command[0]).name, deadline - time.monotonic()
    if left <= 0:
        raise Failed(f"{name} takes too long")
    try:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # with what it starts itself, to be ended as one
        )
    except OSError as error:
        raise Failed(f"{name} cannot be run: {error.strerror}") from error
    try:
        printed = process.communicate(timeout=left)[1]
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Failed(f"{name} takes too long") from error
        raise
    if process.returncode:
        raise Failed(f"{name} failed: {_problem(printed)}")


def _problem(printed: str) -> str:
    """The line of what a compiler printed that says what is wrong, without the paths of files."""
    lines = printed.split("\n")
    line = next((line[line.index("error") :] for line in lines if "error" in line), lines[0])
    return re.sub(r"(/[^\s/:'\"]+)+/", "", line).strip()[:200] or "it does not say why"


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    except OSError as error:
        raise Failed(f"the compiled library cannot be loaded: {str(error).replace(str(path), path.name)}") from error


def _open_kept(path: Path) -> ctypes.CDLL | None:
    """The library that was kept, if it is there and as it was: loading a part of one can end the process."""
    try:
        content = path.read_bytes()
        return _open(path) if content == _with_digest(content[:-32]) else None
    except (OSError, Unavailable):
        return None


def _compile_below(parent: Path | None, name: str, portable: bool, deadline: float) -> ctypes.CDLL:
    """The library, compiled by the first compiler and options that do; kept in ``parent`` as ``name``.

    Where ``parent`` is None it is not kept. Other processes find all of it or nothing.

    Raises:
        Failed: none does.
        OSError: nothing can be written there.
    """
    problem: Failed | None = None
    with tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True) as directory:
        for compiler in compilers():
            for options in _variants(portable):
                try:
                    made = _compile(compiler, options, Path(directory), deadline)
                    library = _open(made)
                except Failed as error:
                    problem = problem or error
                    continue
                if parent is not None:
                    os.replace(made, parent / name)
                return library
    raise problem or Failed("there is nothing to try")


def _find_or_compile(portable: bool) -> ctypes.CDLL:
    if sys.platform != "linux":  # elsewhere nobody has tried, and macOS answers a call of cc by a dialogue
        raise Unavailable(f"it is for Linux, this is {sys.platform}")
    if not any(SOURCES.glob("*.c")):
        raise Failed("its sources are missing: install spectriton again")
    name, cache = _file_name(portable), cache_directory()
    kept = None if cache is None else _open_kept(cache / name)
    if kept is not None:
        return kept
    if not compilers():
        raise Unavailable("there is no C compiler (cc, gcc, clang, or what CC says)")
    problem: Failed | None = None
    deadline = time.monotonic() + _SECONDS
    for parent in dict.fromkeys((cache, None)):
        try:
            if parent is not None:
                parent.mkdir(parents=True, exist_ok=True)
            return _compile_below(parent, name, portable, deadline)
        except OSError as error:
            problem = problem or Failed(f"there is no folder to compile in: {error.strerror}")
        except Failed as error:
            problem = error
    raise problem or Failed("there is no folder to compile in")


@lru_cache(maxsize=2)
def _loaded(portable: bool) -> ctypes.CDLL | Unavailable:
    try:
        return _find_or_compile(portable)
    except Failed as error:
        warnings.warn(
            f"spectriton: the C functions for CPUs cannot be had: {error}; plain PyTorch does their work, more slowly. "
            "Mend the compiler or set CC, or choose plain PyTorch by SPECTRITON_BACKEND=reference",
            RuntimeWarning,
            stacklevel=2,
        )
        return error
    except Unavailable as error:
        return error


def why_unavailable() -> str | None:
    """Why there is no library, in one line without paths, or None where there is one; compiles it the first time."""
    loaded = _loaded(portable())
    return str(loaded) if isinstance(loaded, Unavailable) else None


def function(name: str, arguments: tuple[Any, ...], result: Any = None) -> Any:
    """A function of the library.

    Raises:
        Unavailable: there is no library.
    """
    loaded = _loaded(portable())
    if isinstance(loaded, Unavailable):
        raise loaded
    found = loaded[name]  # not the attribute, which all callers share, whatever types they pass
    found.argtypes, found.restype = list(arguments), result
    return found
