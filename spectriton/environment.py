"""What a run ran on, and the optional packages the applications need."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from spectriton import tuning
from spectriton._backend import backend_name, workspace_bytes

_PACKAGES = ("torch", "triton", "numpy", "spectriton")


def require(module: str, package: str | None = None, extra: str = "apps") -> ModuleType:
    """Import an optional module on first use.

    Args:
        module: dotted name, such as ``"matplotlib.figure"``.
        package: what to call it in the message; the first part of ``module`` where left out.
        extra: of this project, which brings it.

    Raises:
        ImportError: it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module.split(".")[0]
        raise ImportError(f'{name} is not installed; run: pip install "spectriton[{extra}]"') from error


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # A bare checkout on PYTHONPATH carries no metadata, and knows its own version.
        module = importlib.import_module(package) if package == "spectriton" else None
        return getattr(module, "__version__", None)


def _driver() -> str | None:
    """Version of the GPU's driver, as far as the system tells."""
    for file, pattern in (
        ("/proc/driver/nvidia/version", r"Kernel Module.*?\s(\d+(?:\.\d+)+)"),
        ("/sys/module/amdgpu/version", r"(\S+)"),
    ):
        try:
            found = re.search(pattern, Path(file).read_text())
        except OSError:
            continue
        if found:
            return found.group(1)
    return None


def _native(device: torch.device | None) -> str | None:
    if os.environ.get("SPECTRITON_BACKEND", "auto") not in ("auto", "native"):
        return None
    if device is not None and device.type != "cpu":
        return None
    from spectriton_native import library

    return library.why_unavailable() or ("compiled for any processor" if library.portable() else "compiled")


def collect(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, device and settings, for reports and bug reports; holds no machine path and no host name.

    Args:
        device: the one that is used; CUDA where there is one, else the CPU, where left out.

    Returns:
        A dictionary that JSON can hold: ``python``, ``torch``, ``triton``, ``numpy``, ``spectriton`` (versions,
        ``None`` where absent), ``platform``, ``gpu`` (name or ``None``), ``gpu_memory_bytes``, ``driver`` (version of
        the GPU's, where the system tells it), ``cuda`` (version of the torch build or ``None``), ``backend`` (what
        runs on the device), ``native`` (whether the C functions are compiled, see below), ``backend_setting`` and
        ``workspace_mib`` (of ``SPECTRITON_BACKEND`` and ``SPECTRITON_WORKSPACE_MIB``, ``None`` where unset),
        ``workspace_bytes`` (the bound on the device), ``threads``, ``tuning`` (see
        :func:`spectriton.tuning.describe`).

        ``native`` is ``"compiled"``, ``"compiled for any processor"`` or why they are not; it is ``None``, and nothing
        is compiled to find out, where ``SPECTRITON_BACKEND`` asks for others or ``device`` is a GPU.

    Raises:
        ValueError: ``SPECTRITON_BACKEND`` or ``SPECTRITON_WORKSPACE_MIB`` is set to what it cannot be.
    """
    versions = {package: _version(package) for package in _PACKAGES}
    versions["torch"] = str(torch.__version__)  # with the build, which the metadata of some wheels lack
    native = _native(device)
    has_gpu = torch.cuda.is_available()
    if device is None:
        device = torch.device("cuda" if has_gpu else "cpu")
    gpu = device if device.type == "cuda" else torch.device("cuda")
    gpu_name = torch.cuda.get_device_name(gpu) if has_gpu else None
    return {
        "python": platform.python_version(),
        **versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "gpu": gpu_name,
        "gpu_memory_bytes": torch.cuda.get_device_properties(gpu).total_memory if has_gpu else None,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "backend": backend_name(device),
        "native": native,
        "backend_setting": os.environ.get("SPECTRITON_BACKEND"),
        "workspace_mib": os.environ.get("SPECTRITON_WORKSPACE_MIB"),
        "workspace_bytes": workspace_bytes(None, device),
        "threads": torch.get_num_threads(),
        "tuning": tuning.describe(gpu_name),
    }
