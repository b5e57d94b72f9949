"""Values that several consumers of a packed spectrum make again in backward: made once, and held until the last asks.

What is held is bounded, so that a network does not keep in this way what it makes again in order not to keep it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

#: Values and scales.
Fields = tuple[Tensor, Tensor]


class _Waiting:
    """How many consumers have yet to ask, and what was made for the first of them."""

    def __init__(self) -> None:
        self.consumers = 0
        self.fields: Fields | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.fields is None else sum(field.nbytes for field in self.fields)


# By the storage of the bitmap: what waits is forgotten with the graph, asked for or not.
_waiting: weakref.WeakKeyDictionary[torch.UntypedStorage, _Waiting] = weakref.WeakKeyDictionary()


def will_ask(bitmap: Tensor) -> None:
    """Say that one consumer more will ask for the values that belong to a bitmap, made for them alone."""
    if not torch.compiler.is_compiling():
        _waiting.setdefault(bitmap.untyped_storage(), _Waiting()).consumers += 1


def made_once(bitmap: Tensor, make: Callable[[], Fields], room: int) -> Fields:
    """What ``make`` gives, or gave before; held for those who will ask if all that is held takes ``room`` bytes.

    Who asks has said so by :func:`will_ask`, and does not change what it gets.
    """
    waiting = None if torch.compiler.is_compiling() else _waiting.get(bitmap.untyped_storage())
    if waiting is None:
        return make()
    waiting.consumers -= 1
    fields = waiting.fields
    if fields is None:
        fields = make()
        if waiting.consumers > 0:
            waiting.fields = fields
            if held_bytes() > room:
                waiting.fields = None
    if waiting.consumers <= 0:
        waiting.fields = None
    return fields


def held_bytes() -> int:
    """Bytes held for consumers that will ask."""
    return sum(waiting.nbytes for waiting in list(_waiting.values()))
