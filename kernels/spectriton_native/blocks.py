"""Block transform coding: maps to records of bits and back."""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch
from torch import Tensor

from spectriton_native._call import call

#: Formats of maps, as ``csrc/blocks.c`` numbers them.
MAP_FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

_EDGE = 8
# Channels that go through at a time where there are no groups of them.
_SEPARATE = 64


class Layout(Protocol):
    """What is needed of a layout; :class:`spectriton.reference.block_codec.BlockLayout` tells what these are."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...
    @property
    def edges(self) -> tuple[int, int]: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def mix(self) -> int: ...
    @property
    def record(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def components(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def frequencies(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def separable(self) -> bool: ...


class Coding(ctypes.Structure):
    """A plan of all rows, as the C functions take it. See :meth:`Coding.of`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("basis", "bits", "deviation", "down", "across", "levels", "compander")),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "height", "width")),
        *((name, ctypes.c_int64) for name in ("edge_h", "edge_w", "blocks_down", "blocks_across")),
        *((name, ctypes.c_int64) for name in ("components", "part", "record")),
        ("rate", ctypes.c_float),
        # Of the maps; the functions fill in a copy.
        *((name, ctypes.c_void_p) for name in ("mean", "factor")),
        *((name, ctypes.c_int64) for name in ("format", "stride_b", "stride_c", "stride_y", "stride_x")),
    )

    @staticmethod
    def of(
        layout: Layout,
        basis: Tensor | None,
        bits: Tensor,
        deviation: Tensor,
        dct: tuple[Tensor, Tensor],
        levels: Tensor,
        compander: Tensor,
        rate: float,
    ) -> Coding:
        """How maps of a layout are coded; tensors are contiguous, float32 but for the bits.

        Args:
            layout: of the maps, with blocks of at most 8 positions an edge.
            basis: ``(G, g, g)``, components in the rows; None for g = 1.
            bits: ``(components * M,)`` uint8, of the field of each row.
            deviation: ``(components * M,)``, of each row.
            dct: matrices of the transforms down and across a block.
            levels: ``(512,)``, of the quantisers.
            compander: ``(9,)``, factors by width.
            rate: of the compander.
        """
        part = layout.mix if basis is not None else min(layout.components, _SEPARATE)
        return Coding._of(layout, part, (basis, bits, deviation, *dct, levels, compander), rate)

    @staticmethod
    def of_sample(layout: Layout, dct: tuple[Tensor, Tensor]) -> Coding:
        """The same without what depends on the maps."""
        part = layout.mix if layout.mix > 1 else min(layout.components, _SEPARATE)
        return Coding._of(layout, part, (None, None, None, *dct, None, None), 0.0)

    @staticmethod
    def _of(layout: Layout, part: int, held: tuple[Tensor | None, ...], rate: float) -> Coding:
        assert max(layout.edges) <= _EDGE, "blocks too large"
        assert all(t is None or t.is_contiguous() for t in held), "tables must be contiguous"
        pointers = (None if t is None else t.data_ptr() for t in held)
        sizes = (*layout.shape, *layout.edges, *layout.grid, layout.components, part, layout.record)
        coding = Coding(*pointers, *sizes, rate)
        coding.held = held  # as long as there are pointers to them
        coding.sizes = {}
        return coding

    def memory(self) -> Tensor:
        """What the functions work in."""
        threads = torch.get_num_threads()
        if threads not in self.sizes:
            self.sizes[threads] = call("memory_of_blocks", self, result=ctypes.c_int64)
        return torch.empty(self.sizes[threads], dtype=torch.uint8)


def encode_blocks(
    coding: Coding, maps: Tensor, mean: Tensor, inverse: Tensor, key: Tensor | None, records: Tensor
) -> None:
    """Writes ``records`` ``(N, L)`` uint8; bits beyond the last field are 0.

    Args:
        coding: the plan.
        maps: ``(B, C, H, W)`` of any strides, in one of :data:`MAP_FORMATS`.
        mean, inverse: ``(C,)`` float32, contiguous, mean and inverse scale of each channel.
        key: 0-dimensional int32, that of the noise of stochastic rounding; None: to the nearest.
        records: contiguous.
    """
    given = (maps, MAP_FORMATS[maps.dtype], *maps.stride(), mean, inverse)
    _check_fit(call("encode_blocks", coding, *given, key, coding.memory(), records, result=ctypes.c_int))


def decode_blocks(coding: Coding, maps: Tensor, mean: Tensor, scale: Tensor, records: Tensor) -> None:
    """Writes all ``maps`` of records ``(N, L)``, contiguous; otherwise as :func:`encode_blocks`."""
    given = (maps, MAP_FORMATS[maps.dtype], *maps.stride(), mean, scale)
    _check_fit(call("decode_blocks", coding, *given, records, coding.memory(), result=ctypes.c_int))


def _check_fit(problem: Any) -> None:
    """Check what the functions return.

    Raises:
        ValueError: fields have more bits than records.
    """
    if problem:
        raise ValueError(
            "spectriton: encoded maps got fields beyond the end of their records, expected a spectrum that fits them; "
            "they are damaged: encode them again"
        )
