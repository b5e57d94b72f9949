"""What a launcher hands to Triton, as data.

A launcher plans (`Launch`) and then runs the plan. The ahead-of-time build plans the same launches on meta tensors and
compiles them instead of running them, so what is checked there is what a real call would specialise.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: number of programs along up to three axes.
        args: runtime arguments in the order of the kernel's parameters.
        meta: constexprs and compiler options (num_warps, num_stages) by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Launches the kernel on the device of its first tensor; an empty grid is no launch at all."""
        if 0 in self.grid:
            return
        with _on_device_of(self.args):
            self.kernel[self.grid](*self.args, **self.meta)


def _on_device_of(args: tuple[Any, ...]) -> contextlib.AbstractContextManager:
    # Triton launches on the current device, which need not be the one the tensors are on
    first = next(arg for arg in args if isinstance(arg, torch.Tensor))
    return torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
