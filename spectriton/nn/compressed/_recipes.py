"""How a tensor that backward needs is rebuilt, and how that knowledge travels from one module to the next.

A recipe names a stored copy of some maps (:class:`Stored`, or :class:`Exact` for a tensor that is alive anyway) and the
steps that lead from them to the tensor (:class:`Derived`). A module that makes a tensor with a recipe leaves a note on
it; the next module finds the recipe there and keeps the same storage instead of a copy of its own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spectriton.codec import plainly

if TYPE_CHECKING:
    from spectriton.codec import Codec, Encoded

__all__ = ["Derived", "Exact", "Recipe", "Stored", "keep", "kept", "known_recipe", "leave_note", "recipe_of"]

#: Maps with fewer values than this take :meth:`Codec.for_small_maps`: of 3x3 frequencies there is nothing to leave out.
SMALLEST_MAP = 16

#: A residual sum is rebuilt from at most so many encoded copies, else encoded itself: each costs time to decode.
MOST_COPIES = 3

_NOTE = "_spectriton_note"


class Exact:
    """A tensor that is kept as it is."""

    held = True
    copies = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensors: tuple[Tensor, ...] = (tensor,)

    def with_tensors(self, tensors: Sequence[Any]) -> Exact:
        return Exact(tensors[0])

    def hold(self) -> None:
        pass

    def decode(self, dtype: torch.dtype) -> Tensor:
        return self.take(dtype)[0]

    def take(self, dtype: torch.dtype) -> tuple[Tensor, bool]:
        given = self.tensors[0].detach()
        dense = given.to(dtype)
        return dense, dense is not given


class _Uses:
    """How many nodes of the graph hold some maps, and how many of them are still to come in this backward."""

    __slots__ = ("count", "left")

    def __init__(self) -> None:
        self.count = self.left = 0


class _Last:
    """The dense maps that were decoded last, while other nodes are to use them in the same backward."""

    __slots__ = ("dense", "key")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.key: tuple[_Uses, torch.dtype, int] | None = None
        self.dense: Tensor | None = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.last = _Last()


_thread = _Thread()


class Stored:
    """Maps that a codec has encoded.

    A batch norm decodes what the convolution behind it has decoded just before: dense maps stay until the last node
    that holds their encoded form has had them, others are decoded, or backward ends.

    Attributes:
        held: some node of the graph keeps them until backward, so that using them again costs no storage.
    """

    copies = 1

    def __init__(self, encoded: Encoded, uses: _Uses | None = None) -> None:
        self.encoded = encoded
        self.uses = uses or _Uses()

    @property
    def held(self) -> bool:
        return self.uses.count > 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.encoded.tensors)

    def with_tensors(self, tensors: Sequence[Any]) -> Stored:
        return Stored(self.encoded.with_tensors(tuple(tensors)), self.uses)

    def hold(self) -> None:
        self.uses.count += 1

    def decode(self, dtype: torch.dtype) -> Tensor:
        return self.take(dtype)[0]

    def take(self, dtype: torch.dtype) -> tuple[Tensor, bool]:
        last, uses, backward = _thread.last, self.uses, torch._C._current_graph_task_id()
        key = (uses, dtype, backward)
        dense = last.dense if last.key == key else None
        if dense is None:
            last.clear()
            dense = self.encoded.decode(dtype)
            uses.left = uses.count
        uses.left -= 1
        if uses.left <= 0 or backward < 0:
            last.clear()
            return dense, True
        if last.key is None:
            last.key, last.dense = key, dense
            # For nodes that are not run in this backward.
            torch.autograd.Variable._execution_engine.queue_callback(last.clear)
        return dense, False


class Derived:
    """What a module made of a tensor that has a recipe.

    Args:
        source: recipe of the module's input.
        step: function of (input, ``own``, ``inplace``) that gives the output. It may write into the input only with
            ``inplace``, and must hold no tensor.
        own: tensors that the step needs.
    """

    def __init__(
        self, source: Recipe, step: Callable[[Tensor, tuple[Tensor, ...], bool], Tensor], own: Sequence[Tensor] = ()
    ) -> None:
        self.source = source
        self.step = step
        self.own = tuple(own)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.source.tensors + self.own

    @property
    def held(self) -> bool:
        return self.source.held

    @property
    def copies(self) -> int:
        return self.source.copies

    def with_tensors(self, tensors: Sequence[Any]) -> Derived:
        count = len(tensors) - len(self.own)
        return Derived(self.source.with_tensors(tensors[:count]), self.step, tensors[count:])

    def hold(self) -> None:
        self.source.hold()

    def decode(self, dtype: torch.dtype) -> Tensor:
        return self.take(dtype)[0]

    def take(self, dtype: torch.dtype) -> tuple[Tensor, bool]:
        dense, own = self.source.take(dtype)
        return self.step(dense, self.own, own), True


class Added:
    """The sum of two tensors that have recipes.

    Args:
        first, second: their recipes; what is decoded last may be wanted again soon, see :class:`Stored`.
    """

    def __init__(self, first: Recipe, second: Recipe) -> None:
        self.first = first
        self.second = second

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.first.tensors + self.second.tensors

    @property
    def held(self) -> bool:
        return self.first.held and self.second.held

    @property
    def copies(self) -> int:
        return self.first.copies + self.second.copies

    def with_tensors(self, tensors: Sequence[Any]) -> Added:
        count = len(self.first.tensors)
        return Added(self.first.with_tensors(tensors[:count]), self.second.with_tensors(tensors[count:]))

    def hold(self) -> None:
        self.first.hold()
        self.second.hold()

    def decode(self, dtype: torch.dtype) -> Tensor:
        return self.take(dtype)[0]

    def take(self, dtype: torch.dtype) -> tuple[Tensor, bool]:
        total, own = self.first.take(dtype)
        other = self.second.decode(dtype)
        return (total.add_(other) if own else total + other), True


#: All four have ``tensors`` (flat, for ``save_for_backward``), ``with_tensors`` (the same around other tensors),
#: ``hold`` and ``held``, ``copies`` (how many have to be decoded), and ``decode(dtype)``, which gives the dense tensor;
#: ``take`` also tells whether it may be written to.
Recipe = Exact | Stored | Derived | Added


class _Note:
    """What is known of a tensor, and when: in which version, under which saved-tensor hooks.

    A recipe of None says only that modules computed the tensor, so that nobody else keeps it alive.
    """

    __slots__ = ("__weakref__", "recipe", "scope", "shape", "tensor", "version")

    def __init__(self, x: Tensor, recipe: Recipe | None) -> None:
        self.recipe = recipe
        self.tensor = weakref.ref(x)
        self.version = x._version
        self.shape = x.shape
        hooks = _hooks()
        # Weakly: the hooks of a checkpoint hold the inputs of what it will compute again.
        self.scope = None if hooks is None else weakref.ref(hooks)

    def holds_for(self, x: Tensor) -> bool:
        return self.version == x._version and self.shape == x.shape and self.in_scope()

    def in_scope(self) -> bool:
        """Whether it was made under the present saved-tensor hooks."""
        # Checkpointing runs the same modules twice, once with noted inputs and once without, and wants the same tensors
        # saved both times: what was noted under other hooks than the present ones does not count.
        hooks = _hooks()
        return hooks is None if self.scope is None else hooks is not None and self.scope() is hooks

    def __reduce__(self) -> tuple[Any, ...]:
        # A tensor that is saved to a file takes its attributes along. The note is of no use there, and an empty set is
        # something that torch.load accepts.
        return (set, ())


def _hooks() -> Callable[[Tensor], Any] | None:
    """The pack hook in force."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def _metadata(node: Any) -> dict[str, Any]:
    """What Python may attach to a node of the graph."""
    attached: dict[str, Any] = node.metadata
    return attached


def leave_note(x: Tensor, recipe: Recipe | None) -> None:
    """Let whoever gets ``x`` next know how it can be rebuilt."""
    note = _Note(x, recipe)
    setattr(x, _NOTE, note)
    if x.grad_fn is not None:
        # Weakly: the graph may outlive what is kept for backward.
        _metadata(x.grad_fn)[_NOTE] = weakref.ref(note)


def _note(x: Tensor) -> _Note | None:
    note = getattr(x, _NOTE, None)
    return note if isinstance(note, _Note) and note.holds_for(x) else None


def known_recipe(x: Tensor) -> Recipe | None:
    """The recipe that was noted for ``x``, unless ``x`` has been changed in place since."""
    note = _note(x)
    return None if note is None else note.recipe


def recipe_of(x: Tensor, codec: Codec, module: nn.Module, *, overwritten: bool = False) -> Recipe:
    """The recipe of maps ``(B, C, H, W)``; where there is none, they are encoded now, once for all who will ask.

    Args:
        x: maps. Inputs of the network are not encoded: whoever computed them has them still.
        codec: what encodes.
        module: the one that asks.
        overwritten: ``x`` will be changed in place.
    """
    note = _note(x)
    recipe = _recipe_of_sum(x) if note is None else note.recipe
    if recipe is not None:
        return recipe
    is_input = x.is_leaf and note is None
    if is_input or not x.numel():
        return Exact(x.detach().clone() if overwritten else x if x.is_leaf else x.detach())
    small = x.shape[-2] * x.shape[-1] < SMALLEST_MAP
    codec = codec.for_small_maps() if small else codec.for_module(module)
    with plainly(x.device):
        stored = Stored(codec.encode(x.detach()))
    leave_note(x, stored)
    return stored


def _recipe_of_sum(x: Tensor) -> Recipe | None:
    """The recipe of a sum of two tensors that have recipes and are alive, as residual blocks make it."""
    node = x.grad_fn
    if node is None or node.name() != "AddBackward0" or getattr(node, "_saved_alpha", None) != 1:
        return None
    terms, changes = [], 0
    for term, output in node.next_functions:
        if term is None or output:
            return None
        reference = _metadata(term).get(_NOTE)
        note: _Note | None = None if reference is None else reference()
        tensor = None if note is None else note.tensor()
        if note is None or tensor is None or note.recipe is None or tensor.shape != x.shape or not note.in_scope():
            return None
        if tensor is x:
            # The sum in place is one change.
            changes = note.version + 1
        elif not note.holds_for(tensor):
            return None
        terms.append((term._sequence_nr(), note.recipe))
    if len(terms) != 2 or x._version != changes or sum(recipe.copies for _, recipe in terms) > MOST_COPIES:
        return None
    # What was made last comes first in backward.
    terms.sort(key=lambda term: term[0])
    recipe = Added(terms[0][1], terms[1][1])
    leave_note(x, recipe)
    return recipe


def keep(ctx: Any, recipe: Recipe | None, *tensors: Tensor | None) -> None:
    """``save_for_backward`` of tensors and of a recipe."""
    stored: tuple[Tensor, ...] = ()
    ctx.recipe = None
    if recipe is not None:
        recipe.hold()
        stored = recipe.tensors
        ctx.recipe = recipe.with_tensors((None,) * len(stored))
    ctx.save_for_backward(*tensors, *stored)


def kept(ctx: Any, count: int) -> tuple[tuple[Any, ...], Recipe | None]:
    """The ``count`` tensors and the recipe that :func:`keep` was given."""
    saved = ctx.saved_tensors
    return saved[:count], None if ctx.recipe is None else ctx.recipe.with_tensors(saved[count:])
