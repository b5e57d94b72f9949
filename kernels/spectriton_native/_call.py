"""Calls of the C functions with tensors."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from spectriton_native.library import function

#: Formats of stored values, as ``csrc/pairs.h`` numbers them.
FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.uint8: 4}


def call(name: str, *arguments: Any, result: Any = None) -> Any:
    """Call a C function: tensors (or None) as pointers to their data, numbers as int64 or float, then the threads."""
    kinds, passed = [], []
    for argument in (*arguments, torch.get_num_threads()):
        if isinstance(argument, Tensor):
            kinds.append(ctypes.c_void_p)
            passed.append(argument.data_ptr())
        elif isinstance(argument, ctypes.Structure):
            kinds.append(ctypes.c_void_p)
            passed.append(ctypes.addressof(argument))
        else:
            kinds.append(_KINDS[type(argument)])
            passed.append(argument)
    return function(name, tuple(kinds), result)(*passed)


_KINDS: dict[type, Any] = {
    type(None): ctypes.c_void_p,
    int: ctypes.c_int64,
    bool: ctypes.c_int64,
    float: ctypes.c_float,
}


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
