"""Calls of the C functions with tensors."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from spectriton_native.library import function

#: Formats of stored values, as ``csrc/pairs.h`` numbers them.
FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.uint8: 4}


# With them, which arguments are tensors.
_functions: dict[str, tuple[Any, list[int]]] = {}


def call(name: str, *arguments: Any, result: Any = None) -> Any:
    """Call a C function: tensors (or None) and structures as pointers, numbers as int64 or float, then the threads.

    The first call says for all of what kinds the arguments are.
    """
    found = _functions.get(name)
    if found is None:
        kinds = [_kind(argument) for argument in arguments]
        tensors = [i for i, kind in enumerate(kinds) if kind is ctypes.c_void_p]
        found = _functions[name] = function(name, (*kinds, ctypes.c_int64), result), tensors
    run, tensors = found
    given = list(arguments)
    for i in tensors:
        tensor = given[i]
        if tensor is not None:
            given[i] = tensor.data_ptr()
    return run(*given, torch.get_num_threads())


def forget() -> None:
    """Look functions up anew: for those who change which library is to be used."""
    _functions.clear()


def _kind(argument: Any) -> Any:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p
    if isinstance(argument, ctypes.Structure):
        return ctypes.POINTER(type(argument))
    return ctypes.c_float if isinstance(argument, float) else ctypes.c_int64


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
