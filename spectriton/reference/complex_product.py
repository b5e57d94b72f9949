"""Elementwise complex product."""

from __future__ import annotations

from torch import Tensor


def complex_product(x: Tensor, w: Tensor, conj_w: bool = False) -> Tensor:
    """``x * w`` or ``x * conj(w)``, broadcasting; contiguous."""
    return (x * (w.conj_physical() if conj_w else w)).contiguous()
