"""Where the custom ops leave their Python bodies.

A dispatch mode sees an op of ``torch.library.custom_op`` as one call: what its body allocates and frees stays hidden.
Every op of the project therefore registers its body here, and :mod:`spectriton.memory` runs the body with its
mode on, so that temporaries inside an op are counted like any other storage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload

__all__ = ["op_bodies", "register_body"]

#: The body of each custom op, by overload. A body takes what the op takes and returns what the op returns.
op_bodies: dict[OpOverload, Callable[..., Any]] = {}


def register_body(opoverload: Any, fn: Callable[..., Any]) -> None:
    """Register ``fn`` as the body of a custom op.

    Args:
        opoverload: the overload (``torch.ops.namespace.name.default``), or what ``torch.library.custom_op``
            returned for it. Registering an overload again replaces its body.
        fn: the function that computes the op on plain tensors; it must be safe to call below autograd.

    Raises:
        TypeError: ``opoverload`` is neither, or ``fn`` cannot be called.
    """
    # custom_op returns a CustomOpDef that carries its overload.
    overload = getattr(opoverload, "_opoverload", opoverload)
    if not isinstance(overload, OpOverload):
        raise TypeError(
            f"register_body: opoverload got {type(opoverload).__name__}, expected an OpOverload or the result of "
            "torch.library.custom_op; pass torch.ops.<namespace>.<name>.default"
        )
    if not callable(fn):
        raise TypeError(
            f"register_body: fn got {type(fn).__name__}, expected a callable; pass the function that the op runs"
        )
    op_bodies[overload] = fn
