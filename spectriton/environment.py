"""What a run ran on, and the optional packages the applications need."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from types import ModuleType
from typing import Any

import torch

from spectriton._backend import backend_name

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


def collect(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, device and settings, for reports and bug reports; holds no machine path and no host name.

    Args:
        device: the one that is used; CUDA where there is one, else the CPU, where left out.

    Returns:
        A dictionary that JSON can hold: ``python``, ``torch``, ``triton``, ``numpy``, ``spectriton`` (versions,
        ``None`` where absent), ``platform``, ``gpu`` (name or ``None``), ``gpu_memory_bytes``, ``cuda`` (version of
        the torch build or ``None``), ``backend`` (what runs on the device), ``backend_setting`` and ``workspace_mib``
        (of ``SPECTRITON_BACKEND`` and ``SPECTRITON_WORKSPACE_MIB``, ``None`` where unset), ``threads``.

    Raises:
        ValueError: ``SPECTRITON_BACKEND`` is set to what is not a backend.
    """
    versions = {package: _version(package) for package in _PACKAGES}
    has_gpu = torch.cuda.is_available()
    if device is None:
        device = torch.device("cuda" if has_gpu else "cpu")
    gpu = device if device.type == "cuda" else torch.device("cuda")
    return {
        "python": platform.python_version(),
        **versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name(gpu) if has_gpu else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(gpu).total_memory if has_gpu else None,
        "cuda": torch.version.cuda,
        "backend": backend_name(device),
        "backend_setting": os.environ.get("SPECTRITON_BACKEND"),
        "workspace_mib": os.environ.get("SPECTRITON_WORKSPACE_MIB"),
        "threads": torch.get_num_threads(),
    }
