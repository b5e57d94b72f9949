"""How an op is defined: a ``torch.library`` custom op whose body the memory tracker can look into."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.autograd import forward_ad

from spectriton._check import fail
from spectriton._registry import register_body

#: In schemas: the tensors of a packed spectrum as arguments (its edge comes first, apart), and as results.
PACKED_FIELDS = "Tensor values, Tensor scales, Tensor bitmap, Tensor offsets"
PACKED_RESULT = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


def define_op(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Define ``spectriton::<function name>`` with the decorated function as its body on every device.

    The name of the op is that of the function without its leading underscores; ``schema`` gives arguments and results.
    """

    def decorate(body: Callable[..., Any]) -> Any:
        name = f"spectriton::{body.__name__.lstrip('_')}"
        body = _as_is(body)
        op = torch.library.custom_op(name, body, mutates_args=(), schema=schema)
        register_body(op._opoverload, body)
        return op

    return decorate


def _as_is(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body on tensors as they are: it picks its precisions itself, and autocast to bfloat16 refuses float16.

    Raises:
        NotImplementedError: called under forward-mode differentiation.
    """

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0:  # PyTorch would take the tangents of custom ops for zero
            got, fix = "a call within it", "use backward(), or call the op outside of the dual level"
            fail(body.__name__.lstrip("_"), "forward-mode AD", got, "none: it has no rule", fix, NotImplementedError)
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return body(*args, **kwargs)

    return run
