"""``SpecBlock`` on packed spectra against the layers it stands for: ``conv2d`` with tanh, or with batch norm and ReLU.

Forward (with what autograd saves), backward, and both. Inputs are photograph-like; by bisection the thresholds are set
to keep 0.24 of the input and 0.09 of the output, as in trained networks. Gradients are returned, not accumulated.

Before it is timed, the block is compared with the same computation on dense tensors in double precision: result, and
gradients of taps and bias.

On a GPU the layers run in single precision, TF32 and bf16 autocast, with channels first and last (``cl``), eagerly
and compiled; cuDNN picks its fastest algorithm.

Bytes, as the contender holds its maps. Block: forward reads the packed input and the taps and writes the packed
output; backward reads the packed gradient, output and input and the taps, and writes the packed gradient of the input
and that of the taps. Layers: the same with dense maps (bf16 maps count half), for forward input, taps and output.
Chunks in the workspace and maps between the layers are not counted: a fused kernel needs none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bench.maps import independent, photograph_like, threshold_for, with_values
from bench.timing import CUDA, DEVICE, QUICK, Measure, by_size, compiled, error, generator, nbytes, precision
from spectriton import PackedSpectrum, ops
from spectriton import nn as snn

BATCH = by_size(cuda=128, cpu=128, quick=8)
DENSITY_IN, DENSITY_OUT = 0.24, 0.09
MODES = ("forward", "backward", "both")

LAYERS = {"conv2d + tanh": False, "conv2d + batch norm + ReLU": True}
BLOCKS = ("spectriton", *(("spectriton tf32", "spectriton tf32 bf16 values") if CUDA else ("spectriton reference",)))
VARIANTS = (
    (
        *(f"{layout}{numbers}" for numbers in ("fp32", "tf32", "bf16") for layout in ("", "cl ")),
        "cl tf32 torch.compile",
        "cl bf16 torch.compile",
    )
    if CUDA
    else ("fp32",)
)
# The layers with batch norm are a second baseline for the GPU alone.
CONTENDERS = [
    *BLOCKS,
    *(f"{name}, {variant}" for name, norm in LAYERS.items() if CUDA or not norm for variant in VARIANTS),
]


class Case(NamedTuple):
    """A layer: kernel size, channels in and out, height and width of the maps."""

    k: int
    inputs: int
    outputs: int
    size: int

    def __str__(self) -> str:
        return f"{self.k}x{self.k}, {self.inputs} to {self.outputs} channels, maps {self.size}x{self.size}"


CASES = [Case(5, 16, 32, 16), Case(7, 64, 64, 16), Case(3, 64, 64, 16), Case(3, 32, 32, 32)]
if CUDA:
    # Layers of VGG-16 at 224x224, those first that should be known where time is short; the largest maps would leave no
    # time for the others.
    shapes = ((3, 256, 56), (7, 64, 56), (3, 512, 14), (3, 64, 112), (3, 512, 28), (3, 128, 112), (7, 256, 56))
    CASES = [Case(k, channels, channels, size) for k, channels, size in shapes] + CASES
if QUICK:
    CASES = [Case(case.k, case.inputs // 4, case.outputs // 4, case.size) for case in CASES]

# What one contender does: leaves and outputs of a forward pass.
Forward = Callable[[Any], tuple[list[Tensor], Tensor]]


def maps(case: Case, number: int) -> Tensor:
    return photograph_like((BATCH, case.inputs, case.size, case.size), number)


def parameters(case: Case) -> nn.Conv2d:
    """The convolution that all contenders share."""
    torch.manual_seed(0)
    return nn.Conv2d(case.inputs, case.outputs, case.k, padding="same").to(DEVICE)


@lru_cache(maxsize=1)
def thresholds(case: Case) -> tuple[float, float]:
    """(of the input, of the output): what keeps the densities wanted."""
    half = torch.fft.rfft2(maps(case, 0), norm="ortho")
    first = threshold_for(independent(half, (case.size, case.size)).abs(), DENSITY_IN)
    block = snn.SpecBlock.from_conv2d(parameters(case), 0.0, "identity")
    with torch.no_grad(), precision("fp32"):
        everything = block(ops.to_spectral(maps(case, 0), threshold=first)).values
    return first, threshold_for(torch.linalg.vector_norm(everything, dim=1), DENSITY_OUT)


def spectrum(case: Case, number: int, value_dtype: torch.dtype | None = None) -> PackedSpectrum:
    packed = ops.to_spectral(maps(case, number), threshold=thresholds(case)[0], value_dtype=value_dtype)
    return packed.requires_grad_()


def random_gradient(kept: int) -> Tensor:
    return torch.randn(kept, 2, generator=generator(99), device=DEVICE)


def learnt(module: nn.Conv2d | snn.SpecBlock) -> tuple[Tensor, Tensor]:
    """(taps, bias)."""
    assert module.bias is not None
    return module.weight, module.bias


def check(case: Case, block: snn.SpecBlock, packed: PackedSpectrum, tolerance: float) -> None:
    """The block against dense tensors in double precision, given which outputs it kept."""
    size = (case.size, case.size)
    out = block(packed)
    assert abs(packed.density - DENSITY_IN) < 0.02, packed.density
    assert abs(out.density - DENSITY_OUT) < 0.02, out.density
    grad = random_gradient(out.kept)
    got = torch.autograd.grad(out.edge, learnt(block), grad)

    weight, bias = (p.detach().double().requires_grad_() for p in learnt(block))
    x = torch.fft.irfft2(packed.to_dense().detach().to(torch.complex128), s=size, norm="ortho")
    before, after = (case.k - 1) // 2, case.k // 2
    wrapped = nn.functional.pad(x, (before, after, before, after), mode="circular")
    rows = independent(torch.fft.rfft2(nn.functional.conv2d(wrapped, weight, bias), norm="ortho"), size)
    dense = torch.view_as_real(rows)
    kept = independent(with_values(out, torch.ones_like(grad)).to_dense(), size).real > 0
    threshold, moduli = thresholds(case)[1], rows.detach().abs()
    wrong = kept != (moduli >= threshold)
    wrong[..., 0] = False
    # What falls to the wrong side of the threshold lies at it.
    assert not bool((wrong & ((moduli - threshold).abs() > 10 * tolerance * threshold)).any())
    wanted = torch.tanh(dense) * kept[..., None]
    assert error(torch.view_as_real(independent(out.to_dense(), size)), wanted.detach()) < tolerance
    weights = torch.view_as_real(independent(with_values(out, grad).to_dense(), size)).double()
    for mine, reference in zip(got, torch.autograd.grad((wanted * weights).sum(), [weight, bias]), strict=True):
        assert error(mine, reference) < 2 * tolerance


def block_forward(case: Case, contender: str) -> tuple[Forward, nn.Module, Callable[[int], Any]]:
    """(forward pass, module, inputs) of ``SpecBlock``."""
    value_dtype = torch.bfloat16 if "bf16" in contender else None
    block = snn.SpecBlock.from_conv2d(parameters(case), thresholds(case)[1])
    tolerance = 2e-2 if "bf16" in contender else 5e-3 if "tf32" in contender else 1e-4
    check(case, block, spectrum(case, 0, value_dtype), tolerance)

    def forward(packed: PackedSpectrum) -> tuple[list[Tensor], Tensor]:
        return [packed.edge, *learnt(block)], block(packed).edge

    return forward, block, lambda number: spectrum(case, number, value_dtype)


@lru_cache(maxsize=1)
def layers_forward(case: Case, contender: str) -> tuple[Forward, nn.Module, Callable[[int], Any]]:
    """(forward pass, module, inputs) of the layers; kept for the modes, which share what is compiled."""
    name, _, variant = contender.partition(", ")
    memory_format = torch.channels_last if variant.startswith("cl") else torch.contiguous_format
    conv = parameters(case)
    tail = [nn.BatchNorm2d(case.outputs), nn.ReLU(inplace=True)] if LAYERS[name] else [nn.Tanh()]
    net = nn.Sequential(conv, *tail).to(DEVICE)
    net.to(memory_format=memory_format)  # type: ignore[call-overload]
    run = compiled(net) if variant.endswith("compile") else net
    leaves = list(net.parameters())

    def forward(x: Tensor) -> tuple[list[Tensor], Tensor]:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled="bf16" in variant):
            return [x, *leaves], run(x)

    def inputs(number: int) -> Tensor:
        # In bf16 a layer's input is the bf16 output of the one before it.
        dtype = torch.bfloat16 if "bf16" in variant else torch.float32
        return maps(case, number).to(dtype, memory_format=memory_format).requires_grad_()

    with torch.no_grad():
        x = inputs(0).double()
        weight, bias = (p.double() for p in learnt(conv))
        wanted = nn.functional.conv2d(x, weight, bias, padding="same")
        wanted = nn.functional.batch_norm(wanted, None, None, training=True).relu_() if LAYERS[name] else wanted.tanh_()
    tolerance = 2e-2 if "bf16" in variant else 5e-3 if "tf32" in variant else 1e-3
    assert error(forward(inputs(0))[1].detach(), wanted) < tolerance
    return forward, net, inputs


@pytest.mark.parametrize(
    ("case", "contender", "mode"),
    # Modes go fastest, so that a compiled contender is compiled once.
    [(case, contender, mode) for case in CASES for contender in CONTENDERS for mode in MODES],
    ids=str,
)
def test_spec_block(measure: Measure, case: Case, contender: str, mode: str) -> None:
    is_block = contender.startswith("spectriton")
    numbers = next((name for name in ("tf32", "bf16") if name in contender), "fp32")
    with precision(numbers):
        forward, net, inputs = (block_forward if is_block else layers_forward)(case, contender)
        first = inputs(0)
        if is_block:
            result = net(first)
            densities = {"density_in": first.density, "density_out": result.density}
            held_in, held_out = first.nbytes, result.nbytes
            # The other sets of inputs keep a few more or less.
            grads = random_gradient(2 * result.kept)
            grad_out, grad_in = 8 * result.kept, 8 * first.kept
        else:
            result = forward(first)[1].detach()
            densities = {}
            held_in, held_out = nbytes(first), nbytes(result)
            grads = torch.randn_like(result)  # strides included
            grad_out, grad_in = held_out, held_in
        taps = nbytes(net)
        moved_forward = held_in + taps + held_out
        moved_backward = grad_out + held_out + held_in + taps + grad_in + taps
        moved = {"forward": moved_forward, "backward": moved_backward, "both": moved_forward + moved_backward}[mode]
        del result

        def forward_for_backward(x: Any) -> tuple[Any, ...]:
            leaves, out = forward(x)
            return out, leaves, grads[: out.shape[0]]

        def both(x: Any) -> Any:
            leaves, out = forward(x)
            return torch.autograd.grad(out, leaves, grads[: out.shape[0]])

        calls: dict[str, Callable[..., Any]] = {"forward": forward, "backward": torch.autograd.grad, "both": both}
        taps_and_pixels = case.k**2 * case.inputs * case.outputs * BATCH * case.size**2
        measure(
            f"spec_block {case}, batch {BATCH}, {mode}",
            contender,
            calls[mode],
            lambda number: (inputs(number),),
            moved,
            prepare=forward_for_backward if mode == "backward" else None,
            state=(net, grads),
            notes=densities
            | {"direct_convolution_flops": {"forward": 2, "backward": 4, "both": 6}[mode] * taps_and_pixels},
        )
