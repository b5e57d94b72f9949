"""The packed format written out with loops, to hold the kernels against; nothing of spectriton is used."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch


class Packed(SimpleNamespace):
    """`bitmap`, `offsets`, `values` on one device, and the `tile` they were cut with."""

    bitmap: torch.Tensor
    offsets: torch.Tensor
    values: torch.Tensor
    tile: int


def bits_of(kept: np.ndarray, tile: int) -> np.ndarray:
    """Mask `(F, R)` to bitmap `(F, T, tile // 8)`, padding bits zero."""
    rows, length = kept.shape
    tiles = -(-length // tile)
    padded = np.zeros((rows, tiles * tile), dtype=bool)
    padded[:, :length] = kept
    return np.packbits(padded.reshape(rows, tiles, tile), axis=-1, bitorder="little")


def pack_by_hand(
    dense: torch.Tensor, kept: torch.Tensor, tile: int, dtype: torch.dtype, order: np.random.Generator | None = None
) -> Packed:
    """Packs `dense` `(F, R, 2)` where `kept` `(F, R)`; tiles stand in `values` in a random order given `order`."""
    mask = kept.cpu().numpy()
    bitmap = bits_of(mask, tile)
    rows, tiles = bitmap.shape[:2]
    places = [(row, tile_number) for row in range(rows) for tile_number in range(tiles)]
    if order is not None:
        order.shuffle(places)
    offsets = torch.zeros((rows, tiles), dtype=torch.int32)
    values = []
    used = 0
    for row, tile_number in places:
        span = slice(tile_number * tile, (tile_number + 1) * tile)
        chosen = dense[row, span].cpu()[torch.from_numpy(mask[row, span])]
        offsets[row, tile_number] = used
        used += len(chosen)
        values.append(chosen)
    return Packed(
        bitmap=torch.from_numpy(bitmap).to(dense.device),
        offsets=offsets.to(dense.device),
        values=torch.cat(values).to(dtype).to(dense.device),
        tile=tile,
    )


def padded(dense: torch.Tensor, tile: int, fill: float = 0.0) -> torch.Tensor:
    """`(F, R, 2)` to `(F, T * tile, 2)`."""
    rows, length = dense.shape[:2]
    out = dense.new_full((rows, -(-length // tile) * tile, 2), fill)
    out[:, :length] = dense
    return out


def grid_by_hand(height: int, width: int, device: torch.device, seed: int = 0) -> SimpleNamespace:
    """Independent frequencies of a real map in a random order (DC first), and where their conjugates stand."""
    half = width // 2 + 1
    stored, mirrored = [], []
    for ky in range(height):
        for kx in range(half):
            own = kx == 0 or 2 * kx == width
            (mirrored if own and ky > height // 2 else stored).append((ky, kx))
    rest = stored[1:]
    np.random.default_rng(seed).shuffle(rest)
    stored = stored[:1] + [(int(ky), int(kx)) for ky, kx in rest]
    row = {position: number for number, position in enumerate(stored)}

    def index(positions: list[tuple[int, int]]) -> torch.Tensor:
        return torch.tensor([ky * half + kx for ky, kx in positions], dtype=torch.int64, device=device)

    source = [
        row[ky, kx] if (ky, kx) in row else -1 - row[height - ky, kx] for ky in range(height) for kx in range(half)
    ]
    return SimpleNamespace(
        height=height,
        width=width,
        half_width=half,
        index=index(stored),
        mirror_index=index(mirrored),
        mirror_row=torch.tensor([row[height - ky, kx] for ky, kx in mirrored], dtype=torch.int64, device=device),
        source=torch.tensor(source, dtype=torch.int32, device=device),
    )
