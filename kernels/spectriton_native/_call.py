"""Calls of the C functions with tensors."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spectriton_native.library import function

#: Formats of stored values, as ``csrc/pairs.h`` numbers them.
FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.uint8: 4}


def call(name: str, *arguments: Any, result: Any = None) -> Any:
    """Call a C function: tensors (or None) as pointers to their data, numbers as int64 or float, then the threads."""
    passed = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    return _typed(name, tuple(map(type, arguments)), result)(*passed, torch.get_num_threads())


@lru_cache(maxsize=256)
def _typed(name: str, types: tuple[type, ...], result: Any) -> Any:
    """A function as it takes arguments of these types."""
    return function(name, tuple(_kind(kind) for kind in (*types, int)), result)


def _kind(kind: type) -> Any:
    if issubclass(kind, ctypes.Structure):
        return ctypes.POINTER(kind)
    return {int: ctypes.c_int64, bool: ctypes.c_int64, float: ctypes.c_float}.get(kind, ctypes.c_void_p)


def check_complete(missing: int) -> None:
    """Check what functions return that follow offsets.

    Raises:
        ValueError: values do not stand where the offsets say.
    """
    if missing:
        raise ValueError(
            "spectriton: packed spectrum got offsets beyond its values, expected offsets and values of one spectrum; "
            "it is damaged: make or load it again"
        )
