"""A chain of packed blocks never holds a dense map: every allocation is counted, torch's and NumPy's."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spectriton import PackedSpectrum, memory, ops
from spectriton._backend import backend, backend_name
from spectriton.frequencies import frequency_grid
from spectriton.ops._planes import row_chunks

WORKSPACE = 4 << 20
BATCH, CHANNELS, SIZE, BLOCKS = 256, 64, 32, 4
DENSE = BATCH * CHANNELS * SIZE * SIZE * 4
SLACK = 64 << 10  # index tensors of a few rows, gradients of biases


def smooth_maps() -> Tensor:
    """Maps with the spectrum of photographs: amplitude falls as 1 / frequency."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE, generator=generator)
    ky, kx = torch.fft.fftfreq(SIZE)[:, None], torch.fft.rfftfreq(SIZE)[None]
    falling = 1 / (ky.square() + kx.square()).sqrt().clamp_min(1 / SIZE)
    return torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho") * falling / 8, s=(SIZE, SIZE), norm="ortho")


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What a first call imports counts with no test."""
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    ops.to_spatial(ops.to_spectral(x, threshold=0.1)).sum().backward()


def allocations(step: Callable[[], object]) -> tuple[list[int], int, int]:
    """Sizes of what torch allocates during a step, the most it holds at a time beyond before, and NumPy's most."""
    tracemalloc.start()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    numpys = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sizes, live, peak = [], 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
            if event.nbytes() > 0:
                sizes.append(event.nbytes())
    return sizes, peak, numpys


@pytest.mark.parametrize("step", [1, 2, 3, 15, 16, 37, 190, 1000])
def test_chunks_of_rows(step: int):
    """They fit, are not much smaller than they may be, and their sizes are few."""
    parts = list(row_chunks(1001, 10, 10 * step + 3))
    assert [row for part in parts for row in range(1001)[part]] == list(range(1001))
    sizes = {part.stop - part.start for part in parts[:-1]}
    assert len(sizes) <= 1 and all(7 * step / 8 <= size <= step for size in sizes if step > 3)
    assert all(part.start % 2 == 0 for part in parts) or step == 1


@pytest.fixture(scope="module")
def chain() -> tuple[list[PackedSpectrum], list[Tensor], float]:
    """Packed maps with a density of about 0.2 before and after every block, and the taps between them."""
    generator = torch.Generator().manual_seed(1)
    x = smooth_maps()
    packed = [ops.to_spectral(x, density=0.2, workspace=WORKSPACE)]
    del x
    weights, threshold = [], 0.9
    for _ in range(BLOCKS):
        weight = torch.randn(CHANNELS, CHANNELS, 3, 3, generator=generator) * 1.5 / (9 * CHANNELS) ** 0.5
        # A smoothing kernel keeps the spectrum falling, as trained networks do.
        weights.append((weight + weight.mean((2, 3), keepdim=True)).requires_grad_())
        with torch.no_grad():
            packed.append(ops.spec_block(packed[-1], weights[-1], threshold=threshold, activation="softsign",
                                         workspace=WORKSPACE))  # fmt: skip
    return packed, weights, threshold


@pytest.mark.slow
def test_no_dense_map_in_forward_or_backward(chain: tuple[list[PackedSpectrum], list[Tensor], float]):
    packed, weights, threshold = chain
    densities = [p.density for p in packed]
    assert 0.1 < sum(densities) / len(densities) < 0.3, densities
    assert DENSE > 8 * WORKSPACE  # a dense map could not hide
    block_bytes = [p.nbytes for p in packed]
    gradient_bytes = [p.kept * 8 for p in packed]
    entry = packed[0].detach().requires_grad_()
    outputs: list[PackedSpectrum] = []

    def forward() -> None:
        current = entry
        for weight in weights:
            current = ops.spec_block(current, weight, threshold=threshold, activation="softsign", workspace=WORKSPACE)
        outputs.append(current)

    gc.collect()
    sizes, peak, numpys = allocations(forward)
    packed_sizes = {t.untyped_storage().nbytes() for p in packed for t in (p.values, p.bitmap, p.offsets)}
    assert [size for size in sizes if size > WORKSPACE and size not in packed_sizes] == []
    # Made here: the outputs of all blocks, alive for backward; beside them the pieces of one in the making.
    assert peak + numpys <= sum(block_bytes[1:]) + max(block_bytes) + 2 * WORKSPACE + SLACK

    grad = torch.ones(1, 1).expand(outputs[0].kept, 2)
    leaves = [entry.edge, *weights]
    sizes, peak, numpys = allocations(lambda: torch.autograd.grad(outputs[0].edge, leaves, grad))
    assert [size for size in sizes if size > WORKSPACE and size not in set(gradient_bytes)] == []
    # Gradients of a block's output and input are packed, too; those of the taps remain.
    taps = sum(w.nbytes for w in weights)
    assert peak + numpys <= 2 * max(gradient_bytes) + taps + 2 * WORKSPACE + SLACK


@pytest.mark.slow
def test_tracker_agrees(chain: tuple[list[PackedSpectrum], list[Tensor], float]):
    """What `memory.track` reports for the same block is what was allocated, packed data and workspace."""
    packed, weights, threshold = chain
    with memory.track("cpu") as usage:
        out = ops.spec_block(packed[0], weights[0], threshold=threshold, activation="softsign", workspace=WORKSPACE)
    assert usage.saved_bytes == packed[0].nbytes + out.nbytes
    assert usage.peak_bytes <= packed[0].nbytes + 2 * out.nbytes + 2 * WORKSPACE + weights[0].nbytes + SLACK


def test_transforms_are_bounded_beside_their_maps():
    x = smooth_maps()
    made: list[PackedSpectrum] = []
    sizes, peak, numpys = allocations(lambda: made.append(ops.to_spectral(x, threshold=0.9, workspace=WORKSPACE)))
    own = {t.untyped_storage().nbytes() for t in (made[0].values, made[0].bitmap, made[0].offsets)}
    assert [size for size in sizes if size > WORKSPACE and size not in own] == []
    assert peak + numpys <= 2 * made[0].nbytes + 2 * WORKSPACE + SLACK
    sizes, peak, numpys = allocations(lambda: ops.to_spatial(made[0], workspace=WORKSPACE))
    assert [size for size in sizes if size > WORKSPACE and size != DENSE] == []
    assert peak + numpys <= DENSE + 2 * WORKSPACE + SLACK


def test_maps_between_blocks_are_bounded():
    """Batch norm and ReLU of the maps, and a block without an activation, both ways."""
    packed = ops.to_spectral(smooth_maps()[:64], density=0.3, workspace=WORKSPACE)
    weight = torch.randn(16, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(2)) / 24
    rule = {"density": 0.3, "workspace": WORKSPACE}
    made: list[PackedSpectrum] = []
    # NumPy and torch make copies within their functions that the plain reference does not count.
    room = WORKSPACE if backend_name(torch.device("cpu")) == "native" else 2 * WORKSPACE
    for run in (
        lambda x: ops.batch_norm_relu(x, training=True, **rule)[0],
        lambda x: ops.batch_norm_relu(x, training=True, kernel_size=2, **rule)[0],
        lambda x: ops.spec_block(x, weight, activation="identity", threshold=0.5, workspace=WORKSPACE),
    ):
        made.clear()
        entry = packed.detach().requires_grad_()
        _, peak, numpys = allocations(lambda run=run, entry=entry: made.append(run(entry)))
        bits = 2 * packed.shape.numel() // 8  # signs, and where maxima stand
        assert peak + numpys <= 2 * made[0].nbytes + bits + room + SLACK
        edge, grad = made[0].edge, torch.ones(made[0].kept, 2)
        leaves = (edge, entry.edge, grad)
        _, peak, numpys = allocations(lambda leaves=leaves: torch.autograd.grad(*leaves))
        assert peak + numpys <= 8 * packed.kept + room + weight.nbytes + SLACK


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize("kernel", [1, 2])
def test_chunks_of_the_kernels_are_bounded(monkeypatch: pytest.MonkeyPatch, kernel: int):
    """What is held at a time while maps are made, pooled and packed again, but for what a GPU's transforms work in."""
    monkeypatch.setenv("SPECTRITON_BACKEND", "triton")
    cpu = torch.device("cpu")
    shape = (8, 32, 10, 10)  # a tile of planes, the least that a chunk holds
    packed = ops.to_spectral(torch.randn(shape), density=0.1).requires_grad_()
    assert packed.bitmap.shape[1:] == (1, 256 // 8)
    grid = frequency_grid(10, 10)
    chunk = backend(cpu).plane_arrays(grid, torch.float32, True) * 256 * 10 * 12 * 4
    for half in (frequency_grid(5, 5), grid):
        assert half.source.numel()  # what is made once is there
    made: list[PackedSpectrum] = []
    _, peak, _ = allocations(
        lambda: made.append(ops.spatial_relu(packed, threshold=2.0, kernel_size=kernel, workspace=1))
    )
    bits = 2 * packed.shape.numel() // 8  # signs, and where maxima stand
    assert peak <= 2 * made[0].nbytes + bits + chunk + SLACK
    leaves = (made[0].edge, packed.edge, torch.ones(made[0].kept, 2))
    _, peak, _ = allocations(lambda: torch.autograd.grad(*leaves))
    assert peak <= 8 * packed.kept + chunk + SLACK
