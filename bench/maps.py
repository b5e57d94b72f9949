"""Inputs that look like what networks hold: maps with the spectrum of photographs, and thresholds for a density."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.timing import DEVICE, generator
from spectriton import PackedSpectrum, reference
from spectriton.frequencies import frequency_grid
from spectriton.packed import QUANTISED, VALUE_DTYPES, Layout, layout

Shape = tuple[int, int, int, int]


def photograph_like(shape: Shape, seed: int = 0) -> Tensor:
    """Random maps ``(B, C, H, W)`` of unit variance whose amplitudes fall as one over the frequency."""
    height, width = shape[2:]
    noise = torch.fft.rfft2(torch.randn(shape, generator=generator(seed), device=DEVICE), norm="ortho")
    ky = torch.fft.fftfreq(height, 1 / height, device=DEVICE)[:, None]
    kx = torch.fft.rfftfreq(width, 1 / width, device=DEVICE)[None, :]
    noise /= torch.hypot(ky, kx).clamp_(min=1)
    maps = torch.fft.irfft2(noise, s=(height, width), norm="ortho")
    return maps / maps.std()


def threshold_for(moduli: Tensor, density: float) -> float:
    """By bisection, a threshold between two moduli below which all but ``density`` of them lie."""
    low, high = 0.0, float(moduli.max())
    for _ in range(40):
        middle = (low + high) / 2
        if float((moduli >= middle).double().mean()) > density:
            low = middle
        else:
            high = middle
    # Not on a modulus: which side that falls to would depend on rounding.
    above = moduli[moduli >= high].min() if float(moduli.max()) >= high else moduli.max()
    below = moduli[moduli < above].max() if float(moduli.min()) < float(above) else above
    return float(above + below) / 2


def decided(z: Tensor, threshold: float) -> Tensor:
    """Where the modulus is not so close to the threshold that rounding decides which side it falls to."""
    return (z.abs() - threshold).abs() > 1e-5 * threshold


def independent(half: Tensor, size: tuple[int, int]) -> Tensor:
    """The stored frequencies of half spectra: ``(B, C, H, Wh)`` to ``(B, C, F)``."""
    return half.flatten(2)[..., frequency_grid(*size, half.device).index]


def spectrum_rows(shape: Shape, seed: int = 0) -> Tensor:
    """Photograph-like spectra as the primitives take them: pairs ``(F, P, 2)``, rows padded to whole tiles."""
    sizes = layout(shape)
    half = torch.fft.rfft2(photograph_like(shape, seed), norm="ortho")
    rows = independent(half, shape[2:]).flatten(0, 1).T
    y = torch.zeros(sizes.frequencies, sizes.padded_row, 2, device=DEVICE)
    torch.view_as_complex(y)[:, : sizes.row] = rows
    return y


def empty_packed(
    sizes: Layout, room: int, value_dtype: str = "float32"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(bitmap, offsets, values, cursor, scales)`` for ``pack_rows``, with room for so many coefficients."""
    tiles = sizes.frequencies, sizes.tiles
    pairs = () if value_dtype == "int4" else (2,)
    return (
        torch.zeros(sizes.bitmap_shape, dtype=torch.uint8, device=DEVICE),
        torch.zeros(tiles, dtype=torch.int32, device=DEVICE),
        torch.empty(room, *pairs, dtype=VALUE_DTYPES[value_dtype], device=DEVICE),
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        torch.zeros(tiles if value_dtype in QUANTISED else 0, device=DEVICE),
    )


def packed_rows(
    y: Tensor, sizes: Layout, threshold: float, value_dtype: str = "float32"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(values, scales, bitmap, offsets)`` of pairs ``(F, P, 2)``, in order, by the reference."""
    bitmap, offsets, values, cursor, scales = empty_packed(sizes, y.shape[0] * y.shape[1], value_dtype)
    rows = torch.arange(sizes.frequencies, device=DEVICE)
    reference.pack_rows(y, sizes.row, threshold, rows, 0, bitmap, offsets, values, cursor, scales=scales)
    return values[: int(cursor)].clone(), scales, bitmap, offsets


def packed_nbytes(kept: int, sizes: Layout) -> int:
    """Bytes of a packed spectrum with float32 values: pairs, one bit a coefficient, an offset a tile."""
    bits = sizes.frequencies * sizes.tiles * (sizes.tile // 8)
    return 8 * kept + bits + 4 * sizes.frequencies * sizes.tiles


def with_values(packed: PackedSpectrum, values: Tensor) -> PackedSpectrum:
    """The same pattern with other values ``(N, 2)``."""
    return PackedSpectrum(
        packed.edge, values, packed.scales[:0], packed.bitmap, packed.offsets, packed.shape, "float32"
    )
