"""How closely two ways of computing the same thing must agree, by the dtype that limits them."""

from __future__ import annotations

from typing import TypedDict

import torch


class Tolerance(TypedDict):
    """Keywords of `torch.testing.assert_close`."""

    rtol: float
    atol: float


# A few units in the last place of the dtype, for values of order one and sums of tens of terms.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 5e-6, "atol": 2e-6},
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 8e-3, "atol": 8e-3},
    torch.complex128: {"rtol": 1e-12, "atol": 1e-13},
    torch.complex64: {"rtol": 5e-6, "atol": 2e-6},
}
