"""How an op is defined: a ``torch.library`` custom op whose body the memory tracker can look into.

The dispatcher of custom ops written in Python takes as long as a small op does. Where it would do nothing but run the
body and record it for backward, a call does just that; everything else, from ``torch.compile`` to subclasses of
tensors, is left to the dispatcher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DispatchKey, DispatchKeySet
from torch._C._autograd import _profiler_enabled
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad

from spectriton._check import fail
from spectriton._registry import register_body

#: In schemas: the tensors of a packed spectrum as arguments (its edge comes first, apart), and as results.
PACKED_FIELDS = "Tensor values, Tensor scales, Tensor bitmap, Tensor offsets"
PACKED_RESULT = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


def define_op(schema: str) -> Callable[[Callable[..., Any]], Op]:
    """Define ``spectriton::<function name>`` with the decorated function as its body on every device.

    The name of the op is that of the function without its leading underscores; ``schema`` gives arguments and results.
    """
    return lambda body: Op(body, schema)


class Op:
    """An op of ``torch.ops.spectriton``; to be called with all of its arguments, in their order.

    Attributes:
        body: what it does, as the dispatcher would run it.
        setup, backward: as :func:`torch.library.register_autograd` takes them; None where there is no rule.
        tensors, lists: which arguments are tensors, which are lists of tensors.
    """

    def __init__(self, body: Callable[..., Any], schema: str) -> None:
        name = body.__name__.lstrip("_")
        run = _as_is(body)
        self._library = torch.library.custom_op(f"spectriton::{name}", run, mutates_args=(), schema=schema)
        self._overload = self._library._opoverload
        register_body(self._overload, run)
        self.body = _disable_dynamo(run)
        self.setup: Callable[..., None] | None = None
        self.backward: Callable[..., Any] | None = None
        kinds = [str(argument.type) for argument in self._overload._schema.arguments]
        self.tensors = [i for i, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]")]
        self.lists = [i for i, kind in enumerate(kinds) if kind == "List[Tensor]"]
        self._floats = [i for i, kind in enumerate(kinds) if kind == "float"]
        self._sequences = [i for i, kind in enumerate(kinds) if kind.startswith("List")]

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """See :func:`torch.library.register_fake`."""
        return self._library.register_fake(fake)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """See :func:`torch.library.register_autograd`."""
        self._library.register_autograd(backward, setup_context=setup_context)
        self.setup, self.backward = setup_context, backward

    def __call__(self, *args: Any) -> Any:
        """As ``torch.ops.spectriton.<name>``."""
        if torch.compiler.is_compiling():
            return self._overload(*args)
        tensors = [args[i] for i in self.tensors if args[i] is not None]
        for i in self.lists:
            tensors += args[i]
        recorded = _is_recording() and any(t.requires_grad for t in tensors)
        if (recorded and self.backward is None) or not _is_plain(tensors):
            return self._overload(*args)
        given = list(args)  # converted as the dispatcher does it
        for i in self._floats:
            given[i] = float(given[i])
        for i in self._sequences:
            given[i] = list(given[i])
        return _Recorded.apply(self, given, *tensors) if recorded else self.body(*given)


class _Recorded(torch.autograd.Function):
    """A call that backward will ask for: of an op with arguments, the tensors among them given once more."""

    @staticmethod
    def forward(ctx: Any, op: Op, args: list[Any], *tensors: Tensor) -> Any:
        ctx.op, ctx.single = op, [i for i in op.tensors if args[i] is not None]
        ctx.several = [(i, len(args[i])) for i in op.lists]
        # The op's functions know the arguments only: they are given, and give, one entry for each.
        needs = iter(ctx.needs_input_grad[2:])
        by_argument: list[Any] = [False] * len(args)
        for i in ctx.single:
            by_argument[i] = next(needs)
        for i, count in ctx.several:
            by_argument[i] = [next(needs) for _ in range(count)]
        ctx.needs_input_grad = tuple(by_argument)
        output = op.body(*args)
        assert op.setup is not None
        op.setup(ctx, tuple(args), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = ctx.op.backward(ctx, *grads)
        if not isinstance(found, tuple):
            found = (found,)
        flat = [found[i] for i in ctx.single]
        for i, count in ctx.several:
            flat += [None] * count if found[i] is None else found[i]
        return None, None, *flat


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


def _keys(*keys: DispatchKey) -> int:
    """Dispatch keys as a set of bits."""
    bits = 0
    for key in keys:
        bits |= DispatchKeySet(key).raw_repr()
    return bits


# Keys of tensors that no subclass, lazy conjugation, transform of functions or the like stands around,
_PLAIN = _keys(
    *(DispatchKey.CPU, DispatchKey.CUDA, DispatchKey.AutogradCPU, DispatchKey.AutogradCUDA),
    *(DispatchKey.AutocastCPU, DispatchKey.AutocastCUDA, DispatchKey.ADInplaceOrView),
)
# and those that every call has where no mode is active.
_ALWAYS = _keys(DispatchKey.BackendSelect, DispatchKey.ADInplaceOrView)
_AUTOGRAD = _keys(DispatchKey.AutogradFunctionality)
_TYPES = (Tensor, nn.Parameter)


def _is_recording() -> bool:
    """Whether calls are recorded for backward at all."""
    return torch.is_grad_enabled() and not torch._C._dispatch_tls_local_exclude_set().raw_repr() & _AUTOGRAD


def _is_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether the dispatcher would do no more with an op on tensors than run its body, and record it."""
    if torch._C._dispatch_tls_local_include_set().raw_repr() & ~_ALWAYS:
        return False
    if torch._C._len_torch_function_stack() or _profiler_enabled():
        return False
    keys = torch._C._dispatch_keys
    for t in tensors:  # a generator takes longer
        if type(t) not in _TYPES or keys(t).raw_repr() & ~_PLAIN:
            return False
    return True
