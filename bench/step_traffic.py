"""Bytes moved and operations of a training step, counted operation by operation without running it.

The step goes through PyTorch as on a GPU, on tensors that have shapes, types and strides, but no values. Every
operation counts as one kernel that reads each of its tensors once from memory and writes its results once; what takes
several passes is in :func:`moved`. A launch of a Triton kernel counts as its contract says, see :func:`launched`.
Views are free, and nothing is fused: this is what eager PyTorch does.

How much a packed spectrum keeps depends on values; :func:`assuming` says it in their place.

Nothing here is measured. :meth:`Traffic.seconds` is what the counts take at least on a :class:`Machine`.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import zip_longest
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from spectriton import _backend, memory
from spectriton._counts import Counts
from spectriton._registry import op_bodies
from spectriton.codec import Codec, Encoded
from spectriton.frequencies import FrequencyGrid
from spectriton.ops._room import Expected, Room
from spectriton.packed import Layout, most_kept
from spectriton.reference import bits
from spectriton_kernels import roof
from spectriton_kernels._launch import Launch
from spectriton_kernels.build import Job, compile_all, tunable_of
from spectriton_kernels.registry import examples


@dataclass(frozen=True)
class Machine:
    """What a step is predicted for; by default an H100 SXM with 80 GB.

    Attributes:
        copy: bytes a second of a device copy.
        matmul: operations a second of a bfloat16 matrix product.
        efficiency: share of it that convolutions and matrix products come to: an assumption.
        single: operations a second of a float32 matrix product: without TF32 three quarters of the 67e12 of the data
            sheet, another assumption.
        launch: seconds that the host takes for an operation: an assumption.
        issue: instructions a second that the threads of all multiprocessors execute.
        memory: bytes that a training step may allocate: of 80 GB those that PyTorch gets, less 5 % for workspaces and
            fragmentation, an assumption.
    """

    copy: float = roof.COPY_BANDWIDTH
    matmul: float = 800e12
    efficiency: float = 0.5
    single: float = 50e12
    launch: float = 5e-6
    issue: float = 32 * roof.PROCESSORS * roof.ISSUE_SLOTS * roof.ISSUE_SHARE * roof.CLOCK
    memory: float = 0.95 * 78 * 2**30

    def with_tf32(self) -> Machine:
        """The same where float32 matrix products are in TF32: at half the rate of those in bfloat16."""
        return replace(self, single=self.efficiency * self.matmul / 2)


@dataclass(frozen=True)
class Operation:
    """One kernel.

    Attributes:
        name: of the operator, or of the Triton kernel.
        part: of the step it belongs to, see :func:`part_of`.
        read, written: bytes.
        flops: of matrix products and convolutions.
        half: whether these are in sixteen bits.
        values: of maps, or coefficients, that a Triton kernel works on; 0 for operators.
        triton: whether it is a launch of a Triton kernel.
    """

    name: str
    part: str
    read: int
    written: int
    flops: int = 0
    half: bool = False
    values: int = 0
    triton: bool = False


@dataclass(frozen=True)
class Coded:
    """Maps that were encoded, or decoded, once.

    Attributes:
        shape, dtype: of the maps.
        dense, stored: bytes of the maps, and encoded.
        decoded: which of the two.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    dense: int
    stored: int
    decoded: bool


@dataclass
class Traffic:
    """What a step was seen to do."""

    operations: list[Operation] = field(default_factory=list)
    coded: list[Coded] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Read and written."""
        return sum(o.read + o.written for o in self.operations)

    @property
    def launches(self) -> int:
        """Launches of Triton kernels among the operations."""
        return sum(o.triton for o in self.operations)

    @property
    def flops(self) -> int:
        """Of matrix products and convolutions, those inside the codec's kernels left out."""
        return sum(o.flops for o in self.operations)

    def seconds(self, machine: Machine, instructions: dict[str, float]) -> float:
        """Of the device, by the slowest of memory, arithmetic and issue of each operation by itself.

        ``instructions``: those of a value, by the name of the Triton kernel.
        """
        return sum(seconds_of(o, machine, instructions) for o in self.operations)

    def parts(self) -> dict[str, Traffic]:
        """The same by part of the step, those with most bytes first."""
        found: dict[str, Traffic] = {}
        for operation in self.operations:
            found.setdefault(operation.part, Traffic()).operations.append(operation)
        return dict(sorted(found.items(), key=lambda item: -item[1].nbytes))

    def coding_bytes(self, decodes: int | None = None) -> int:
        """Bytes that encoding has to move, and decoding: as often as it was done, or each of the maps so often."""
        if decodes is None:
            return sum(c.dense + c.stored for c in self.coded)
        return (1 + decodes) * sum(c.dense + c.stored for c in self.coded if not c.decoded)


def seconds_of(operation: Operation, machine: Machine, instructions: dict[str, float]) -> float:
    """What an operation takes at least on the device."""
    rate = machine.efficiency * machine.matmul if operation.half else machine.single
    return max(
        (operation.read + operation.written) / machine.copy,
        operation.flops / rate,
        operation.values * instructions.get(operation.name, 0) / machine.issue,
    )


# -- bytes -----------------------------------------------------------------------------------------------------------

# Written without being read.
_OVERWRITTEN = {"copy_", "zero_", "fill_", "bernoulli_", "uniform_", "normal_"}
# Only as much is read of the first tensor as comes out.
_PICKED = {"index_select", "index", "gather", "embedding"}
# Only what is put there is written to the first tensor.
_PLACED = {"index_fill_", "index_put_", "index_add_", "scatter_", "scatter_add_"}
# Arguments that only give a shape.
_SHAPES = {
    "max_pool2d_with_indices_backward": ("self",),
    "avg_pool2d_backward": ("self",),
    "_adaptive_avg_pool2d_backward": ("self",),
}


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an argument or result: one, or those of lists."""
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def size_of(tensor: Tensor) -> int:
    """Bytes of the values behind a tensor: what is expanded is there once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[int, int] | None:
    """Bytes that an operator reads and writes; None where it moves nothing."""
    schema, name = func._schema, func._overloadpacket.__name__
    if func.namespace != "aten" or func.is_view or torch.Tag.inplace_view in func.tags or "empty" in name:
        return None
    read = written = 0
    inputs = set()
    given = dict(zip([a.name for a in schema.arguments], args, strict=False)) | kwargs
    changes = False
    shapes = ("self",) if name.startswith("new_") or name.endswith("_like") else _SHAPES.get(name, ())
    for argument in schema.arguments:
        found = [] if argument.name in shapes else tensors_in(given.get(argument.name))
        inputs.update(t.untyped_storage()._cdata for t in found)
        size = sum(size_of(t) for t in found)
        if argument.alias_info is not None and argument.alias_info.is_write:
            changes = True
            written += size
            if not argument.is_out and name not in _OVERWRITTEN:
                read += size
        else:
            read += size
    outputs = tensors_in(result)
    if not changes:
        if outputs and all(t.untyped_storage()._cdata in inputs for t in outputs):
            return None  # a view that does not say so
        written += sum(size_of(t) for t in outputs)
    if name in _PICKED:
        first = size_of(args[0])
        read += min(first, sum(size_of(t) for t in outputs)) - first
    elif name in ("native_batch_norm", "_native_batch_norm_legit") and given["training"]:
        read += size_of(args[0])  # statistics first, then the result
    elif name == "native_batch_norm_backward" and given["train"]:
        read += size_of(args[0]) + size_of(args[1])  # two sums first, then the result
    elif name in _PLACED:
        return _placed(name, given)
    elif name.startswith("_fft_"):
        return _transformed(name, given, result)
    elif name == "convolution_backward":
        grad, x, weight = (size_of(t) for t in args[:3])
        of_x, of_weight, of_bias = given["output_mask"]
        # A kernel for each of the three.
        read = of_x * (grad + weight) + of_weight * (grad + x) + of_bias * grad
    return read, written


def _placed(name: str, given: dict[str, Any]) -> tuple[int, int]:
    """Bytes that an operator reads and writes to put values at some places of a tensor."""
    target: Tensor = given["self"]
    source = given.get("source", given.get("src", given.get("values")))
    index = [i for i in given.get("indices", [given.get("index")]) if i is not None]
    places = torch.broadcast_shapes(*(i.shape for i in index)).numel()
    if name == "index_put_":
        places *= math.prod(n for n, i in zip_longest(target.shape, given["indices"]) if i is None)
    elif name.startswith("index_"):
        places *= target.numel() // max(1, target.shape[given["dim"]])
    written = min(places * target.element_size(), size_of(target))
    adds = "add" in name or given.get("accumulate", False)
    return sum(size_of(t) for t in tensors_in([*index, source])) + (written if adds else 0), written


def _transformed(name: str, given: dict[str, Any], result: Tensor) -> tuple[int, int]:
    """Bytes that PyTorch's Fourier transforms by cuFFT read and write: a kernel for each dimension.

    Those to real maps copy their input before, since cuFFT writes over it. Where there is a norm, the result is
    multiplied by it afterwards.
    """
    source, made, kernels = size_of(given["self"]), size_of(result), len(given["dim"])
    # What lies between two kernels is complex.
    between = kernels * source if name == "_fft_c2r" else (kernels - 1) * made
    normed = made if given.get("normalization") else 0
    return source + between + normed, made + between + normed


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Operations of a convolution or a matrix product; 0 of anything else."""
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def launched(launch: Launch) -> tuple[int, int]:
    """Bytes that a launch of a Triton kernel reads and writes.

    Each of its tensors once, all of them as read. Of packed spectra, whose values are handed over whole for each of
    their chunks, what :data:`roof.WORK` says of the chunk: the dense side once, and its share of values, bitmap and
    offsets.

    Raises:
        KeyError: a kernel takes a packed spectrum, and nothing is said of it.
    """
    if "bitmap_ptr" not in launch.kernel.arg_names:
        return sum(size_of(t) for t in tensors_in(launch.args)), 0
    work = roof.WORK[_kernel_name(launch)]
    coefficients = _worked_on(launch)
    return round(coefficients * work.read(launch)), round(coefficients * work.written(launch))


def _kernel_name(launch: Launch) -> str:
    return str(launch.kernel.__name__.removesuffix("_kernel"))


def _worked_on(launch: Launch) -> int:
    """Coefficients, or values of maps, that a launch works on; 0 where nothing is said of them."""
    work = roof.WORK.get(_kernel_name(launch))
    return 0 if work is None else int(launch.args[work.operand].numel() / work.reals)


def _by_instructions(launch: Launch) -> int:
    """The same, as many of an example of the registry as take the instructions of this launch.

    Kernels of kernel spectra loop over the taps, of which their examples have nine.
    """
    name, count = _kernel_name(launch), _worked_on(launch)
    return count * roof.WORK[name].passes(launch) // 9 if name.startswith("kernel_spectrum") else count


# -- which part of the step ------------------------------------------------------------------------------------------

#: Parts of a step by (file, qualified name of a function): the outermost one on the stack that is listed here decides.
PARTS = {
    ("block_codec.py", "fit"): "statistics of the codec",
    ("block_codec.py", "make_plan"): "tables of the codec",
    ("block_codec.py", "channel_means"): "statistics of the codec",
    ("_backend.py", "TritonBackend.ready_plan"): "tables of the codec",
    ("block_codec.py", "encode_blocks"): "encoding",
    ("block_codec.py", "decode_blocks"): "decoding",
    ("_functions.py", "Rectify.forward"): "ReLU and its bits",
    ("_functions.py", "Rectify.backward"): "backward of ReLU, from its bits",
    ("_functions.py", "Rebuild.__call__"): "batch norm and ReLU, again",
    ("_functions.py", "Rectifier.again"): "batch norm and ReLU, again",
    ("_functions.py", "MaxPool.forward"): "maximum pooling",
    ("_functions.py", "MaxPool.backward"): "maximum pooling",
    ("_functions.py", "pool_again"): "maximum pooling, again",
    ("spec_block.py", "_spec_block"): "blocks, forward",
    ("spec_block.py", "_spec_block_backward"): "blocks, backward",
    ("spatial_relu.py", "_spatial_relu"): "ReLU and pooling, forward",
    ("spatial_relu.py", "_spatial_relu_again"): "ReLU and pooling, again",
    ("pool2d.py", "pooled_gradients"): "ReLU and pooling, backward",
    ("pool2d.py", "_packed_max_pool2d"): "ReLU and pooling, forward",
    ("pool2d.py", "_packed_max_pool2d_backward"): "ReLU and pooling, backward",
    ("pool2d.py", "_repacked_pool2d"): "ReLU and pooling, forward",
    ("pool2d.py", "_max_pool2d"): "ReLU and pooling, forward",
    ("pool2d.py", "_max_pool2d_backward"): "ReLU and pooling, backward",
    ("spectral_batch_norm.py", "_map_statistics"): "batch norm, forward",
    ("spectral_batch_norm.py", "_spectral_batch_norm"): "batch norm, forward",
    ("spectral_batch_norm.py", "remake"): "batch norm, again",
    ("spectral_batch_norm.py", "norm_gradients"): "batch norm, backward",
    ("spectral_activation.py", "_packed_activation"): "activations by themselves",
    ("spectral_activation.py", "_packed_activation_backward"): "activations by themselves",
    ("pack.py", "_to_spectral"): "to and from spectra",
    ("pack.py", "_to_spectral_backward"): "to and from spectra",
    ("pack.py", "_to_spatial"): "to and from spectra",
    ("pack.py", "_to_spatial_backward"): "to and from spectra",
}
NETWORK = "network and optimiser"


def part_of() -> str:
    """The part that runs now."""
    found = NETWORK
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # Python 3.10 knows no qualified names: methods are counted with the network there.
        name = getattr(code, "co_qualname", code.co_name)
        found = PARTS.get((os.path.basename(code.co_filename), name), found)
        frame = frame.f_back
    return found


@lru_cache(maxsize=1024)
def _is_composite(func: Any) -> bool:
    """Whether an operator does nothing but call others."""
    key = "CompositeImplicitAutograd"
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


class _Counter(TorchDispatchMode):
    """Takes down what is dispatched."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        body = op_bodies.get(func)
        if body is not None:  # an op of the library: what it does is counted
            with self:
                return body(*args, **kwargs)
        if _is_composite(func):  # below autograd it comes as a whole
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        count = moved(func, args, kwargs, result)
        if count is not None:
            flops = flops_of(func, args, kwargs, result)
            half = bool(flops) and tensors_in(args)[0].element_size() == 2
            name = func._overloadpacket.__name__
            self.traffic.operations.append(Operation(name, part_of(), *count, flops, half))
        return result


@contextlib.contextmanager
def counting(traffic: Traffic, meta: bool = False) -> Iterator[None]:
    """Counts what the block does, with everything as on a GPU; all tensors have to be made inside.

    They are fake tensors of the CPU. With ``meta`` they have to be on the device of that name, and take the ways of a
    GPU where the library asks for the device; autocast does not know it.
    """

    def run(launch: Launch) -> None:
        name, values = _kernel_name(launch), _by_instructions(launch)
        traffic.operations.append(Operation(name, part_of(), *launched(launch), values=values, triton=True))

    encode, decode = Codec.encode, Encoded.decode

    def note(encoded: Encoded, decoded: bool) -> None:
        dense = encoded.shape.numel() * encoded.dtype.itemsize
        traffic.coded.append(Coded(tuple(encoded.shape), encoded.dtype, dense, encoded.nbytes, decoded))

    def noted_encode(codec: Codec, x: Tensor, seed: Any = None) -> Encoded:
        encoded = encode(codec, x, seed)
        note(encoded, False)
        return encoded

    def noted_decode(encoded: Encoded, dtype: torch.dtype | None = None) -> Tensor:
        note(encoded, True)
        return decode(encoded, dtype)

    with contextlib.ExitStack() as stack:
        patch: Callable[..., Any] = mock.patch.object
        stack.enter_context(patch(Launch, "run", run))
        stack.enter_context(patch(Codec, "encode", noted_encode))
        stack.enter_context(patch(Encoded, "decode", noted_decode))
        stack.enter_context(patch(_backend, "backend_name", lambda device: "triton"))
        stack.enter_context(patch(bits, "_CHUNK_OF_CPU", bits._CHUNK))
        # The default of a GPU.
        of_gpu = _backend.default_workspace
        stack.enter_context(patch(_backend, "default_workspace", lambda device_type, maps: of_gpu("cuda", maps)))
        stack.callback(_forget_constants)
        _forget_constants()
        if meta:
            stack.enter_context(patch(FrequencyGrid, "self_conjugate", property(_self_conjugate)))
        else:
            stack.enter_context(FakeTensorMode())
        stack.enter_context(_Counter(traffic))
        yield


def _self_conjugate(grid: FrequencyGrid) -> Tensor:
    """As large as the frequencies' tensor of that name, which is made from values."""
    return grid.index.new_empty((2 - grid.height % 2) * (2 - grid.width % 2))


@contextlib.contextmanager
def assuming(density: float) -> Iterator[None]:
    """Within it packed spectra without values keep this share of their coefficients, spread over all frequencies.

    For steps in which the host does not wait for packing, see :func:`spectriton.ops.deferred_packing`. Layers expect
    what is said, without room to spare, and find it so. Of :func:`launched` the packed side is that large, too.
    """

    def expect(room: Room, sizes: Layout) -> Expected:
        return Expected(most_kept(density, sizes), sizes.frequencies)

    def send(counts: Counts, numbers: Tensor, expected_rows: int | None = None) -> None:
        counts._expected_rows, counts._numbers = expected_rows, (0, 0)  # no more than was expected

    patch: Callable[..., Any] = mock.patch.object
    with patch(Room, "expect", expect), patch(Counts, "__init__", send), patch(roof, "DENSITY", density):
        yield


def tracked(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> contextlib.AbstractContextManager[memory.Usage]:
    """:func:`spectriton.memory.track` of fake tensors: their storages are on the device ``meta``."""
    return memory._Tracker(torch.device("meta"), model, optimizer)


def _forget_constants() -> None:
    """Clears caches that hold tensors: those from inside the block are fake, those from before it are not."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("spectriton", "spectriton_kernels"):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


#: Kernels that a step with compressed maps launches.
OF_MAPS = ("encode_blocks", "decode_blocks", "rectify", "clear_outside", "rebuild", "pool_maxima", "spread_maxima")


def instructions(kernels: Sequence[str] = OF_MAPS) -> dict[str, float]:
    """Instructions that threads execute for a value of maps or a coefficient, by kernel, as compiled for an H100.

    Of the launch that :data:`roof.WORK` names first; empty where Triton interprets and so cannot compile.
    """
    if triton.knobs.runtime.interpret:
        return {}
    by_name = {example.name: example for example in examples()}
    jobs = [Job(by_name[roof.WORK[name].examples[0]], "sm_90", None) for name in kernels]
    rows = [(tunable_of(launch).kernel, roof.row(job, launch, compiled)) for job, launch, compiled in compile_all(jobs)]
    return {kernel: row.instructions for kernel, row in rows}
