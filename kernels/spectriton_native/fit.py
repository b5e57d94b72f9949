"""Statistics of maps for block transform coding, and plans of what is stored of them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from spectriton_native._call import call
from spectriton_native.blocks import MAP_FORMATS, Coding, Layout


class Classes(ctypes.Structure):
    """What classes of rows stand for. See :meth:`Classes.of`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("edges", "variance", "widths")),
        ("headroom", ctypes.c_float),
        ("nothing", ctypes.c_float),
    )

    @staticmethod
    def of(edges: Tensor, variance: Tensor, widths: Tensor, headroom: float, nothing: float) -> Classes:
        """The classes of :mod:`spectriton.reference.block_codec`.

        Args:
            edges: ``(15,)`` float32, lower edges from class 1 on, log2 of the variance over the water level.
            variance: ``(16,)`` float32, likewise.
            widths: ``(16,)`` uint8, bits.
            headroom: of the last class, log2.
            nothing: stands for the logarithm of no variance.
        """
        held = (edges, variance, widths)
        classes = Classes(*(t.data_ptr() for t in held), headroom, nothing)
        classes.held = held
        return classes


def fit_blocks(
    layout: Layout, classes: Classes, dct: tuple[Tensor, Tensor], rounds: int, maps: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales ``(2 C + 1,)`` float32, basis ``(G, g, g)`` int8 and spectrum to store.

    Args:
        layout: of these maps, with the records of all.
        classes: of rows.
        dct: matrices of the transforms down and across a block, contiguous.
        rounds: of orthogonal iteration.
        maps: ``(B, C, H, W)`` of any strides, in one of :data:`MAP_FORMATS`.
        mean: ``(C,)`` float32, contiguous, of each channel of all maps.
    """
    coding, grouped = Coding.of_sample(layout, dct), layout.mix > 1
    memory = torch.empty(call("memory_of_fit", coding, grouped, result=ctypes.c_int64), dtype=torch.uint8)
    scales = torch.empty(2 * mean.numel() + 1)
    basis = torch.empty((layout.groups, layout.mix, layout.mix) if grouped else 0, dtype=torch.int8)
    spectrum = torch.empty(_spectrum_size(layout), dtype=torch.int8 if layout.separable else torch.uint8)
    given = (maps, MAP_FORMATS[maps.dtype], *maps.stride(), mean, memory)
    call("fit_blocks", coding, classes, grouped, layout.separable, rounds, *given, scales, basis, spectrum)
    return scales, basis, spectrum


def _spectrum_size(layout: Layout) -> int:
    return layout.components + layout.frequencies if layout.separable else -(-layout.rows // 2)


def plan_blocks(
    layout: Layout, classes: Classes, scales: Tensor, basis: Tensor, spectrum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Inverse scales ``(C,)``, bits ``(rows,)`` uint8, deviations ``(rows,)``, basis ``(G, g, g)`` from what is stored.

    The last three are as :meth:`Coding.of` takes them; all that is stored is contiguous.

    Raises:
        ValueError: what is stored is not that of maps of this layout.
    """
    channels, grouped = layout.shape[1], layout.mix > 1
    expected = (2 * channels + 1, layout.groups * layout.mix**2 if grouped else 0, _spectrum_size(layout))
    got = (scales.numel(), basis.numel(), spectrum.numel())
    if got != expected:
        raise ValueError(
            f"spectriton: encoded maps got {got} scales, numbers of the basis and bytes of the spectrum, expected "
            f"{expected}; they are damaged, or of maps of another shape: encode them again"
        )
    inverse, bits = torch.empty(channels), torch.empty(layout.rows, dtype=torch.uint8)
    deviation = torch.empty(layout.rows)
    part = layout.mix if grouped else 0
    rows = torch.empty(layout.groups, part, part) if grouped else None
    memory = torch.empty(torch.get_num_threads() * 2 * part * part)
    sizes = (channels, layout.components, layout.frequencies, part, layout.separable, layout.record)
    call("plan_blocks", classes, *sizes, scales, basis, spectrum, memory, inverse, bits, deviation, rows)
    return inverse, bits, deviation, rows
