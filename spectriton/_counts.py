"""What a GPU counts of a packed spectrum that it makes, and when the host learns of it.

How much is kept is known on the GPU first. To ask for it makes the host wait until all work before has run, and leaves
the GPU without work afterwards. So the numbers are sent to the host, and waited for only by who needs them.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class Counts:
    """How many coefficients a packed spectrum keeps, and in how many frequencies; on their way to the host.

    Args:
        counts: ``(2,)`` int64: coefficients kept; frequencies before the tail at which nothing is kept.
        expected_rows: so many of these frequencies at most, on what is known already; whoever expects it has to make
            sure later. None to wait for the number.
    """

    def __init__(self, counts: Tensor, expected_rows: int | None = None) -> None:
        self._expected_rows = expected_rows
        self._numbers: tuple[int, int] | None = None
        self._arrival: torch.cuda.Event | None = None
        self._sent: Tensor | None = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=counts.is_cuda)
        self._sent.copy_(counts, non_blocking=True)
        if counts.is_cuda:
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(counts.device))

    def wait(self) -> tuple[int, int]:
        """Coefficients kept and frequencies, once they are there."""
        if self._numbers is None:
            self._numbers = self._receive()
        return self._numbers

    def _receive(self) -> tuple[int, int]:
        if self._arrival is not None:
            self._arrival.synchronize()
        assert self._sent is not None
        kept, rows = self._sent.numpy()
        self._sent = self._arrival = None
        return int(kept), int(rows)

    @property
    def kept(self) -> int:
        """Coefficients kept; waits for them."""
        return self.wait()[0]

    @property
    def rows(self) -> int:
        """Frequencies beyond which nothing is kept: as expected, or waited for."""
        return self.wait()[1] if self._expected_rows is None else self._expected_rows

    def __reduce__(self) -> tuple[Any, ...]:
        return Counts, (torch.tensor(self.wait()), self._expected_rows)


# By the storage of the bitmap, which every op that leaves the pattern alone hands on, and views share.
_counts: weakref.WeakKeyDictionary[torch.UntypedStorage, Counts] = weakref.WeakKeyDictionary()


def note_counts(bitmap: Tensor, counts: Counts) -> None:
    """Let :func:`counts_of` find the counts of the packed spectrum with this bitmap, as long as that lives."""
    _counts[bitmap.untyped_storage()] = counts


def counts_of(bitmap: Tensor) -> Counts | None:
    """What was noted of a packed spectrum. None: nothing, and ``values`` holds what is kept, without room to spare."""
    return _counts.get(bitmap.untyped_storage()) if _counts else None
