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


class Coding(ctypes.Structure):
    """Maps and how they are coded, as the C functions take it. See :meth:`Coding.of`."""

    _pointers = ("mean", "factor", "basis", "bits", "deviation", "down", "across", "levels", "compander")
    _numbers = (
        *("batch", "channels", "height", "width", "format"),
        *("stride_b", "stride_c", "stride_y", "stride_x"),
        *("edge_h", "edge_w", "blocks_down", "blocks_across"),
        *("components", "part", "record"),
    )
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _pointers),
        *((name, ctypes.c_int64) for name in _numbers),
        ("rate", ctypes.c_float),
    )

    @staticmethod
    def of(
        maps: Tensor,
        layout: Layout,
        mean: Tensor,
        factor: Tensor,
        basis: Tensor | None,
        bits: Tensor,
        deviation: Tensor,
        dct: tuple[Tensor, Tensor],
        levels: Tensor,
        compander: Tensor,
        rate: float,
    ) -> Coding:
        """Maps of a layout, and the plan to code them by; tensors are float32 and contiguous but where it says so.

        Args:
            maps: ``(B, C, H, W)`` of any strides, in one of :data:`MAP_FORMATS`.
            layout: theirs, with blocks of at most 8 positions an edge.
            mean: ``(C,)``, of the channels.
            factor: ``(C,)``, what values are multiplied by: the inverse of the scale in encoding, the scale in
                decoding.
            basis: ``(G, g, g)``, components in the rows; None for g = 1.
            bits: ``(components * M,)`` uint8, of the field of each row.
            deviation: ``(components * M,)``, of each row.
            dct: matrices of the transforms down and across a block.
            levels: ``(512,)``, of the quantisers.
            compander: ``(9,)``, factors by width.
            rate: of the compander.
        """
        assert max(layout.edges) <= _EDGE, "blocks too large"
        part = layout.mix if basis is not None else min(layout.components, _SEPARATE)
        held = (mean, factor, basis, bits, deviation, *dct, levels, compander)
        assert all(t is None or t.is_contiguous() for t in held), "tables must be contiguous"
        coding = Coding(
            *(None if t is None else t.data_ptr() for t in held),
            *maps.shape,
            MAP_FORMATS[maps.dtype],
            *maps.stride(),
            *layout.edges,
            *layout.grid,
            layout.components,
            part,
            layout.record,
            rate,
        )
        coding.held = held  # as long as there are pointers to them
        coding.maps = maps
        return coding

    def memory(self) -> Tensor:
        """What the functions work in."""
        size = call("memory_of_blocks", self, result=ctypes.c_int64)
        return torch.empty(size, dtype=torch.uint8)


def encode_blocks(coding: Coding, key: Tensor | None, records: Tensor) -> None:
    """Writes ``records`` ``(N, L)`` uint8; bits beyond the last field are 0.

    Args:
        coding: the maps.
        key: 0-dimensional int32, that of the noise of stochastic rounding; None: to the nearest.
        records: contiguous.
    """
    _check_fit(call("encode_blocks", coding, coding.maps, key, coding.memory(), records, result=ctypes.c_int))


def decode_blocks(coding: Coding, records: Tensor) -> None:
    """Writes all maps of records ``(N, L)``, contiguous."""
    _check_fit(call("decode_blocks", coding, records, coding.memory(), coding.maps, result=ctypes.c_int))


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
