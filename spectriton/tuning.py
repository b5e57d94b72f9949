"""Tuned configurations of the Triton kernels: the files that hold them, and how a launch finds its own.

A file belongs to one GPU and one version of Triton and is named after both. There may be one that comes with the
package (``spectriton/tuned/``) and one of the user's (``~/.cache/spectriton/``, or below ``XDG_CACHE_HOME``), written
by ``spectriton tune``, which goes first. They are read at the first launch on a GPU of that name. What they do not
hold falls back to the heuristics of :mod:`spectriton_kernels.configs`; a file that is not as it should be is ignored as
a whole, with a warning.

==========================  =====================================================================
``SPECTRITON_TUNING=0``     look nothing up: heuristics only
``SPECTRITON_TUNING_DIR``   the user's directory, instead of ``~/.cache/spectriton/``
==========================  =====================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

SWITCH = "SPECTRITON_TUNING"
DIRECTORY = "SPECTRITON_TUNING_DIR"
#: Version of the files' format.
SCHEMA = 1

#: Kernel, dtypes by name, and sizes rounded up to powers of two.
Key = tuple[str, tuple[str, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Entry:
    """What a file says of one kernel and shape.

    Attributes:
        kernel: name of the kernel.
        dtypes: of its tensors, as names without ``torch.``.
        sizes: of the bucket; their meaning is in ``spectriton_kernels.configs``.
        config: the fields of the configuration.
        measured: figures from when it was tuned, for people to read.
    """

    kernel: str
    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]
    config: Mapping[str, int]
    measured: Mapping[str, float]

    @property
    def key(self) -> Key:
        """What it is found by."""
        return self.kernel, self.dtypes, self.sizes


def _configs() -> ModuleType:
    # Not at import: the kernels import triton, and that fixes whether it interprets.
    from spectriton_kernels import configs

    return configs


def key_of(kernel: str, dtypes: Iterable[torch.dtype], sizes: tuple[int, ...]) -> Key:
    """The key of a launch."""
    return kernel, tuple(str(dtype).removeprefix("torch.") for dtype in dtypes), _configs().bucket(sizes)


# -- files -----------------------------------------------------------------------------------------------------------


def enabled() -> bool:
    """Whether files are looked at."""
    return os.environ.get(SWITCH, "1") != "0"


def user_directory() -> Path:
    """Where ``spectriton tune`` writes."""
    if setting := os.environ.get(DIRECTORY):
        return Path(setting)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # Its specification has relative paths ignored.
    return Path(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")) / "spectriton"


def directories() -> dict[str, Path]:
    """Directories by who fills them; later ones go before earlier ones."""
    return {"package": Path(__file__).parent / "tuned", "user": user_directory()}


def file_name(gpu: str, triton: str) -> str:
    """Name of the file for a GPU and a version of Triton."""
    return re.sub(r"[^a-z0-9.+]+", "-", f"{gpu} triton {triton}".lower()).strip("-") + ".json"


def _entry(number: int, content: Any) -> Entry:
    """Raises ValueError: it is none that the kernels can take."""
    configs = _configs()

    def wrong(field: str, got: Any, expected: str) -> ValueError:
        return ValueError(f"entry {number}: {field} got {got!r}, expected {expected}")

    if not isinstance(content, dict):
        raise wrong("it", content, "an object")
    kernel, dtypes, sizes = content.get("kernel"), content.get("dtypes"), content.get("sizes")
    if not isinstance(kernel, str) or kernel not in configs.TUNABLES:
        raise wrong("kernel", kernel, f"one of {', '.join(configs.TUNABLES)}")
    tunable = configs.TUNABLES[kernel]
    if not (isinstance(dtypes, list) and all(isinstance(getattr(torch, str(d), None), torch.dtype) for d in dtypes)):
        raise wrong("dtypes", dtypes, "a list of names of dtypes")
    if not (
        isinstance(sizes, list)
        and len(sizes) == len(tunable.sizes)
        and all(type(size) is int and size >= 0 for size in sizes)
        and tuple(sizes) == configs.bucket(tuple(sizes))
    ):
        raise wrong("sizes", sizes, f"powers of two for {', '.join(tunable.sizes)}")
    config = content.get("config")
    if config not in [asdict(choice) for choice in tunable.space]:
        raise wrong("config", config, f"one of the {len(tunable.space)} configurations of {kernel}")
    measured = content.get("measured", {})
    if not isinstance(measured, dict):
        raise wrong("measured", measured, "an object")
    return Entry(kernel, tuple(dtypes), tuple(sizes), config, measured)


def read(path: Path, gpu: str | None = None, triton: str | None = None) -> dict[Key, Entry]:
    """The entries of a file.

    Args:
        path: the file.
        gpu, triton: whom it must be for; anyone where left out.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a file of this format, is for another GPU or Triton, names an unknown kernel, or a
            configuration that the kernel's space does not hold.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        got = content.get("schema") if isinstance(content, dict) else None
        raise ValueError(f"schema got {got!r}, expected {SCHEMA}")
    for field, expected in (("gpu", gpu), ("triton", triton)):
        if expected is not None and content.get(field) != expected:
            raise ValueError(f"{field} got {content.get(field)!r}, expected {expected!r}")
    if not isinstance(content.get("entries"), list):
        raise ValueError("entries got no list")
    entries = [_entry(number, item) for number, item in enumerate(content["entries"])]
    return {entry.key: entry for entry in entries}


def save(gpu: str, entries: Iterable[Entry]) -> Path:
    """Add entries to the user's file for a GPU and the Triton in use, in place of earlier ones for the same keys.

    A reader sees the old file or the new one; several processes may do this at the same time.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    triton = _configs().TRITON_VERSION
    path = user_directory() / file_name(gpu, triton)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        merged: dict[Key, Entry] = {}
        with contextlib.suppress(OSError, ValueError):  # what is not there, or not valid, is written anew
            merged = read(path, gpu, triton)
        merged |= {entry.key: entry for entry in entries}
        ordered = [asdict(merged[key]) for key in sorted(merged)]
        content = {"schema": SCHEMA, "gpu": gpu, "triton": triton, "entries": ordered}
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1, allow_nan=False)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other writers out, where the system knows how to; without, the last of two at once wins."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- at a launch -----------------------------------------------------------------------------------------------------


def lookup(device: torch.device, kernel: str, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...]) -> Any:
    """The tuned configuration of a launch, or None; what :func:`install` gives to the kernels."""
    if device.type != "cuda":
        return None
    return _table(torch.cuda.get_device_name(device)).get(key_of(kernel, dtypes, sizes))


@lru_cache(maxsize=8)
def _table(gpu: str) -> dict[Key, Any]:
    """Configurations for a GPU from all of its files."""
    if not enabled():
        return {}
    configs = _configs()
    found: dict[Key, Any] = {}
    for directory in directories().values():
        path = directory / file_name(gpu, configs.TRITON_VERSION)
        try:
            entries = read(path, gpu, configs.TRITON_VERSION)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            warnings.warn(
                f"spectriton: the tuned configurations in {path} are ignored: {error}; remove the file, or write it "
                "anew with: spectriton tune",
                RuntimeWarning,
                stacklevel=2,
            )
            continue
        for key, entry in entries.items():
            space = configs.TUNABLES[entry.kernel].space
            found[key] = next(config for config in space if asdict(config) == entry.config)
    return found


def install() -> None:
    """Have the kernels look here for their configurations, and read the files anew at the next launch."""
    _table.cache_clear()
    _configs().set_lookup(lookup)


def describe(gpu: str | None) -> dict[str, Any]:
    """What there is, for bug reports; holds no path.

    Args:
        gpu: name of the GPU, None where there is none.

    Returns:
        ``enabled``; ``files``, a list of ``{"origin", "name", "entries", "problem"}``, the problem None where a file is
        valid; ``entries``, how many shapes are tuned for this GPU and the Triton in use.
    """
    files: list[dict[str, Any]] = []
    used: set[Key] = set()
    for origin, directory in directories().items():
        for path in sorted(directory.glob("*.json")):
            entries: dict[Key, Entry] = {}
            problem = None
            try:
                triton = _configs().TRITON_VERSION
                own = gpu is not None and path.name == file_name(gpu, triton)
                entries = read(path, gpu, triton) if own else read(path)
                used |= entries.keys() if own else set()
            except (OSError, ValueError, ImportError) as error:
                problem = error.strerror if isinstance(error, OSError) else str(error)
            files.append({"origin": origin, "name": path.name, "entries": len(entries), "problem": problem})
    return {"enabled": enabled(), "files": files, "entries": len(used) if enabled() else 0}
