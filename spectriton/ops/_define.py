"""How an op is defined: a ``torch.library`` custom op whose body the memory tracker can look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
        op = torch.library.custom_op(name, body, mutates_args=(), schema=schema)
        register_body(op._opoverload, body)
        return op

    return decorate
