"""Checks of what users pass in, with one shape of message.

Every message reads ``{op}: {argument} got {got}, expected {expected}; {fix}``, so that it names the call, both values
and what to do about it. The checks look at shapes, dtypes and Python numbers only: none of them reads tensor data,
so none makes a GPU wait.
"""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = [
    "check_choice",
    "check_complex",
    "check_rank",
    "check_real_maps",
    "check_threshold",
    "describe",
    "fail",
]

# Of the repr of a list in a message, in characters: nested lists are long.
_LONGEST = 120


def describe(value: Any) -> str:
    """A short text for a value: dtype and shape of a tensor, ``repr`` of what is short, else the type."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)):
        return repr(value)
    if isinstance(value, (tuple, list)) and len(value) <= 8 and not any(isinstance(item, Tensor) for item in value):
        text = repr(value)
        if len(text) <= _LONGEST:
            return text
    return f"a value of type {type(value).__name__}"


def fail(op: str, argument: str, got: Any, expected: str, fix: str, kind: type[Exception] = ValueError) -> NoReturn:
    """Raise ``kind`` with the message ``{op}: {argument} got {got}, expected {expected}; {fix}``.

    Args:
        op: the function or class the user called.
        argument: the argument that is wrong.
        got: what was passed. A string stands in the message as it is; anything else goes through :func:`describe`.
        expected: what would have been accepted.
        fix: what to do, as an imperative.
        kind: the exception class, ``ValueError`` or ``TypeError`` as a rule.
    """
    text = got if isinstance(got, str) else describe(got)
    raise kind(f"{op}: {argument} got {text}, expected {expected}; {fix}")


def _check_tensor(op: str, name: str, tensor: Any, expected: str) -> None:
    if not isinstance(tensor, Tensor):
        packed = hasattr(tensor, "to_dense")
        fix = "unpack it: ops.to_spatial gives maps, .to_dense() a spectrum" if packed else "pass a torch.Tensor"
        fail(op, name, describe(tensor), expected, fix, TypeError)


def check_rank(op: str, name: str, tensor: Tensor, rank: int, *, at_least: bool = False) -> None:
    """Check the number of dimensions of a tensor.

    Args:
        op: the function or class the user called.
        name: the argument that is checked.
        tensor: the argument.
        rank: the number of dimensions expected.
        at_least: accept more dimensions than ``rank`` too.

    Raises:
        TypeError: not a tensor.
        ValueError: another number of dimensions.
    """
    expected = f"{'at least ' if at_least else ''}{rank} dimension{'' if rank == 1 else 's'}"
    _check_tensor(op, name, tensor, f"a tensor with {expected}")
    if tensor.dim() == rank or (at_least and tensor.dim() > rank):
        return
    fix = "add the missing dimensions with unsqueeze" if tensor.dim() < rank else "remove dimensions with flatten"
    fail(op, name, tensor, expected, fix)


def check_real_maps(op: str, name: str, tensor: Tensor, *, rank: int | None = 4) -> None:
    """Check real feature maps: a floating-point tensor of shape ``(B, C, H, W)`` with nothing of size zero in (H, W).

    Args:
        op: the function or class the user called.
        name: the argument that is checked.
        tensor: the argument.
        rank: the number of dimensions, 4 by default; None accepts two and more.

    Raises:
        TypeError: not a tensor, or not of a real floating-point dtype.
        ValueError: another number of dimensions, or an empty height or width.
    """
    expected = "real floating-point feature maps (B, C, H, W)" if rank == 4 else "a real floating-point tensor"
    _check_tensor(op, name, tensor, expected)
    if not tensor.is_floating_point():
        fix = (
            "pass the real maps, not their spectrum (torch.fft.irfft2 turns it back)"
            if tensor.is_complex()
            else "convert them with .float()"
        )
        fail(op, name, tensor, expected, fix, TypeError)
    check_rank(op, name, tensor, 2 if rank is None else rank, at_least=rank is None)
    if tensor.shape[-1] == 0 or tensor.shape[-2] == 0:
        fail(op, name, tensor, "a height and a width of at least 1", "pass maps that are not empty")


def check_complex(op: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor is complex (a spectrum).

    Raises:
        TypeError: not a tensor, or not of a complex dtype.
    """
    _check_tensor(op, name, tensor, "a complex tensor")
    if not tensor.is_complex():
        fix = "pass a spectrum (torch.fft.rfft2 makes one), or torch.view_as_complex of interleaved pairs"
        fail(op, name, tensor, "a complex tensor", fix, TypeError)


def check_threshold(
    op: str, value: Any, name: str = "threshold", fix: str = "pass 0 to keep every coefficient"
) -> float:
    """Check a threshold on the modulus of coefficients, or another number that is not negative; returns a float.

    Of thresholds zero keeps everything, infinity keeps only the zero frequency. ``fix`` is what to do about a number
    out of range.

    Raises:
        TypeError: not a real number (booleans and tensors are refused too).
        ValueError: negative or NaN.
    """
    expected = "a number that is not negative"
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        convert = "take the number out with .item()" if isinstance(value, Tensor) else "pass an int or a float"
        fail(op, name, describe(value), expected, convert, TypeError)
    number = float(value)
    # Written so that NaN, which compares false, is refused as well.
    if not number >= 0:
        fail(op, name, repr(number), expected, fix)
    return number


def check_choice(op: str, name: str, value: Any, choices: Iterable[Any]) -> Any:
    """Check that a value is one of ``choices`` and return it.

    The message lists the choices and proposes the nearest one where a string looks like a misspelling.

    Raises:
        ValueError: the value is not among the choices.
    """
    options = list(choices)
    for option in options:
        # 1 == True == 1.0: a choice is meant to be of its type, too.
        if type(option) is type(value) and option == value:
            return option
    strings = [option for option in options if isinstance(option, str)]
    near = difflib.get_close_matches(value.lower(), strings, n=1, cutoff=0.5) if isinstance(value, str) else []
    fix = f"did you mean {near[0]!r}?" if near else "pass one of these"
    fail(op, name, describe(value), "one of " + ", ".join(repr(option) for option in options), fix)
