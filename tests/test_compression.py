"""Compressed networks: the same results, the gradients of what was kept, and how much that is."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import spectriton
from spectriton import memory
from spectriton.codec import Allotment, BlockCodec, CastCodec, Codec, QuantiseCodec, make_codec
from spectriton.compression import describe, gradient_report
from spectriton.nn import compressed
from spectriton.nn.compressed import _recipes
from spectriton.reference import bits

#: Keeps every value as it is: gradients must then be the original's.
IDENTITY = CastCodec(torch.float64)
COARSE = QuantiseCodec(bits=2, group=64)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class BasicBlock(nn.Module):
    """The block of a small ResNet as it is usually written: ReLU in place, one module for both; the sum in place."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]


def resnet() -> nn.Sequential:
    stem = [nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, BasicBlock(4, 4), BasicBlock(4, 6, 2), BasicBlock(6, 6), *head(6))


def vgg(norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 4), (4, 6), (6, 6)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), *([nn.BatchNorm2d(outputs)] if norm else [])]
        layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(6 * 16, 5))


def activations() -> nn.Sequential:
    """Every elementwise function, in place where it can be, each between convolutions."""
    functions = [
        nn.GELU(),
        nn.GELU(approximate="tanh"),
        nn.SiLU(inplace=True),
        nn.SiLU(),
        nn.Hardswish(inplace=True),
        nn.Mish(),
        nn.ELU(0.7, inplace=True),
        nn.ReLU6(inplace=True),
        nn.LeakyReLU(0.1, inplace=True),
        nn.LeakyReLU(-0.2),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Dropout(0.3, inplace=True),
    ]
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3, padding=1)]
    for number, function in enumerate(functions):
        norm = [nn.BatchNorm2d(4)] if number % 2 else []
        layers += [*norm, function, nn.Conv2d(4, 4, 3, padding=1)]
    return nn.Sequential(*layers, *head(4))


def pools() -> nn.Sequential:
    """Pooling behind what is kept already (batch norm) and behind what is not."""
    kinds = [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d((3, 2), (2, 1), (1, 0), (1, 2), ceil_mode=True),
        nn.MaxPool2d(5, 1, 2),
        nn.AvgPool2d(2, 1),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(2, 1, divisor_override=3),
        nn.AdaptiveAvgPool2d((11, None)),
    ]
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3, padding=1)]
    for number, kind in enumerate(kinds):
        norm = [nn.BatchNorm2d(4)] if number % 2 else []
        layers += [*norm, nn.ReLU(), kind, nn.Conv2d(4, 4, 3, padding=2)]
    return nn.Sequential(*layers, *head(4))


def convolutions() -> nn.Sequential:
    """Groups, stride, dilation, every way of padding, with bias and without."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(4, 4, (2, 4), padding="same", dilation=(1, 3)),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, padding="valid", groups=4, bias=False),
        nn.BatchNorm2d(8, affine=False),
        nn.Conv2d(8, 8, 3, padding=(2, 1), dilation=2, groups=8),
        nn.BatchNorm2d(8, momentum=None),
        nn.Conv2d(8, 6, (3, 5), stride=(2, 1), padding=(1, 2), padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect", bias=False),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.Conv2d(6, 6, 4, padding="same", padding_mode="replicate"),
        nn.Conv2d(6, 6, 1),
        *head(6),
    )


class Shared(nn.Module):
    """One convolution, one norm and one activation, used three times, and one output that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.head = nn.Sequential(*head(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.act(self.norm(self.conv(x))) + 0.1 * self.conv(x)
        return self.head(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": resnet,
    "vgg": lambda: vgg(False),
    "vgg_bn": lambda: vgg(True),
    "activations": activations,
    "pools": pools,
    "convolutions": convolutions,
    "shared": Shared,
}


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    network = NETWORKS[name]().to(dtype)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return network


def images(dtype: torch.dtype = torch.float64, size: int = 32, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


class Step:
    """One forward and backward: everything that may be compared."""

    def __init__(self, network: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> None:
        torch.manual_seed(2)
        network.zero_grad()
        self.output = (run or network)(x)
        loss = functional.cross_entropy(self.output.float(), torch.arange(len(x)) % 5)
        if loss.requires_grad:
            loss.backward()
        self.output = self.output.detach()
        self.gradients = {name: p.grad for name, p in network.named_parameters()}
        self.buffers = {name: b.clone() for name, b in network.named_buffers()}
        self.random = torch.get_rng_state()

    def assert_same_forward(self, other: Step) -> None:
        assert torch.equal(self.output, other.output)
        assert self.buffers.keys() == other.buffers.keys()
        assert all(torch.equal(self.buffers[name], other.buffers[name]) for name in self.buffers)
        assert torch.equal(self.random, other.random)

    def assert_close_gradients(self, other: Step, error: float = 1e-12) -> None:
        assert self.gradients.keys() == other.gradients.keys()
        for name, mine in self.gradients.items():
            theirs = other.gradients[name]
            assert (mine is None) == (theirs is None), name
            if mine is not None:
                # To the size of all of a parameter's gradient: single values may be sums that cancel.
                scale = max(float(theirs.abs().max()), 1e-2)
                assert float((mine - theirs).abs().max()) <= error * scale, name


def pair(name: str, codec: Codec = IDENTITY, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    network = build(name, dtype)
    return network, spectriton.compress(copy.deepcopy(network), codec=codec)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_with_an_exact_codec_everything_is_the_originals(name: str, mode: str):
    original, ours = pair(name)
    original.train(mode == "train")
    ours.train(mode == "train")
    x = images()
    expected, found = Step(original, x), Step(ours, x)
    found.assert_same_forward(expected)
    found.assert_close_gradients(expected)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_with_a_coarse_codec_the_forward_is_exact_and_the_gradient_is_not(name: str):
    original, ours = pair(name, COARSE, torch.float32)
    x = images(torch.float32)
    expected, found = Step(original, x), Step(ours, x)
    found.assert_same_forward(expected)
    with pytest.raises(AssertionError):
        found.assert_close_gradients(expected, 1e-4)
    # What does not pass through encoded maps on its way back is exact: the last layers, and the first bias behind them.
    last = [name for name, _ in ours.named_parameters()][-2:]
    assert all(torch.equal(found.gradients[name], expected.gradients[name]) for name in last)


def test_biases_next_to_exact_gradients_are_exact():
    """The gradient of a bias, of a convolution or a batch norm, is a sum of the gradient behind it."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for network, name in ((original, "1.bias"), (original[:1], "0.bias")):
        ours = spectriton.compress(copy.deepcopy(network), codec=COARSE)
        x = images()[:, :, :12, :12].float()
        gradients = []
        for model in (network, ours):
            model.zero_grad()
            (model(x).flatten(1) * torch.arange(1.0, 4.0)[:, None]).sin().sum().backward()
            gradients.append(dict(model.named_parameters())[name].grad)
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet", "activations", "pools"])
def test_channels_last(name: str):
    original, ours = (network.to(memory_format=torch.channels_last) for network in pair(name))
    x = images().to(memory_format=torch.channels_last)
    expected, found = Step(original, x), Step(ours, x)
    found.assert_same_forward(expected)
    found.assert_close_gradients(expected)
    if name == "activations":
        maps = ours[:3](x)
        assert maps.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resnet", "vgg_bn", "convolutions", "activations"])
def test_autocast(name: str):
    original, ours = pair(name, CastCodec(torch.float32), torch.float32)
    x = images(torch.float32)

    def under_autocast(network: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return network(x)

        return run

    expected = Step(original, x, under_autocast(original))
    found = Step(ours, x, under_autocast(ours))
    found.assert_same_forward(expected)
    assert found.output.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in found.gradients.values())
    found.assert_close_gradients(expected, 0.1)


def test_backward_under_autocast_is_the_same():
    gradients = []
    for autocast in (False, True):
        maps = spectriton.compress(build("pools", torch.float32)[:-3], codec=COARSE)
        loss = maps(images(torch.float32)).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss.backward()
        gradients.append([p.grad for p in maps.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("codec", [IDENTITY, COARSE])
def test_checkpoint(codec: Codec, reentrant: bool, tracked: bool):
    """Also of parts, whose inputs carry notes the first time and none when they are run again."""
    original, ours = pair("resnet", codec)
    x = images().requires_grad_()

    def in_parts(network: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            for part in (network[:3], network[3], network[4], network[5], network[6:]):
                x = checkpoint(part, x, use_reentrant=reentrant)
            return x

        return run

    expected = Step(original, x, in_parts(original))
    x.grad = None
    if tracked:
        with memory.track(model=ours) as usage:
            found = Step(ours, x, in_parts(ours))
        assert usage.saved_bytes > 0
    else:
        found = Step(ours, x, in_parts(ours))
    assert torch.equal(found.output, expected.output)
    if codec is IDENTITY:
        found.assert_close_gradients(expected)


@pytest.mark.parametrize("name", ["resnet", "pools"])
def test_offloading(name: str):
    original, ours = pair(name)
    x = images()

    def offloaded(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return ours(x)

    Step(ours, x, offloaded).assert_close_gradients(Step(original, x))


def test_distributed_data_parallel(tmp_path: Path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        original, ours = pair("resnet")
        x = images()
        expected = Step(original, x)
        found = Step(ours, x, nn.parallel.DistributedDataParallel(ours))
        found.assert_same_forward(expected)
        found.assert_close_gradients(expected)
    finally:
        torch.distributed.destroy_process_group()


def test_backward_twice_and_input_gradients():
    original, ours = pair("resnet")
    gradients = []
    for network in (original, ours):
        x = images().requires_grad_()
        loss = network(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append((x.grad, *(p.grad for p in network.parameters())))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["vgg_bn", "activations", "pools"])
def test_second_derivatives_are_refused(name: str):
    _, ours = pair(name)
    x = images().requires_grad_()
    with pytest.raises(RuntimeError, match=r"create_graph=True.*spectriton\.decompress"):
        torch.autograd.grad(ours(x).sum(), x, create_graph=True)


def test_gradcheck():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(3),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 2, padding="same"),
        nn.AvgPool2d(2, 1),
    ]
    ours = spectriton.compress(nn.Sequential(*layers).double(), codec=IDENTITY)
    x = torch.randn(2, 2, 8, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: ours(x), (x, *ours.parameters()))


@pytest.mark.parametrize("channels", [8, 24])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 2)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (3, 0)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_convolutions_with_few_channels(
    channels: int, kernel: tuple[int, int], padding: tuple[int, int], layout: torch.memory_format
):
    """With fewer than 16 channels the gradient of the input comes of kernels turned round."""
    torch.manual_seed(0)
    conv = nn.Conv2d(5, channels, kernel, padding=padding).to(memory_format=layout)
    x = torch.randn(2, 5, 9, 7).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(conv(x).shape)
    expected = torch.autograd.grad(conv(x), [x, *conv.parameters()], grad)
    spectriton.compress(conv, codec=IDENTITY)
    for got, exact in zip(torch.autograd.grad(conv(x), [x, *conv.parameters()], grad), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-4)


class Counting(Codec):
    """Counts what is encoded."""

    def __init__(self) -> None:
        object.__setattr__(self, "encoded", [])

    def encode(self, x: Tensor, seed: int | Tensor | None = None):
        assert not torch.is_grad_enabled() and not x.requires_grad
        self.encoded.append(tuple(x.shape))
        return CastCodec(torch.float64).encode(x)


def test_each_convolutions_output_is_encoded_once_and_nothing_else():
    codec = Counting()
    _, ours = pair("resnet", codec)
    ours(images())
    stem, first, second = (3, 4, 16, 16), (3, 4, 8, 8), (3, 6, 4, 4)
    # A block: both convolutions; the second also its shortcut. Sums are made of these, and of what the stem made.
    assert sorted(codec.encoded) == sorted([stem, *[first] * 2, *[second] * 3, *[second] * 2])


class Residual(nn.Module):
    """A sum of two branches, written in one of several ways, and a convolution behind it."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.right = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3), *head(4))
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        return self.last(self.add(left, right))


def change_first(left: Tensor, right: Tensor) -> Tensor:
    with torch.no_grad():
        left.mul_(2)
    return left + right


def change_later(left: Tensor, right: Tensor) -> Tensor:
    total = left + right
    right.mul_(2)
    return total


def change_sum(left: Tensor, right: Tensor) -> Tensor:
    total = left + right
    with torch.no_grad():
        total.mul_(2)
    return total


SUMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "out of place": (lambda left, right: left + right, True),
    "in place": (lambda left, right: left.add_(right), True),
    "of the same": (lambda left, right: left + left, True),
    "scaled": (lambda left, right: torch.add(left, right, alpha=2), False),
    "broadcast": (lambda left, right: left + right[:1], False),
    "difference": (lambda left, right: left - right, False),
    "changed first": (change_first, False),
    "changed later": (change_later, False),
    "changed afterwards": (change_sum, False),
    "changed again": (lambda left, right: left.add_(right).mul_(2), False),
    "with a constant": (lambda left, right: left + 1, False),
}


@pytest.mark.parametrize("way", list(SUMS))
def test_sums_are_rebuilt_from_their_parts(way: str):
    add, rebuilt = SUMS[way]
    torch.manual_seed(0)
    original = Residual(add).double()
    codec = Counting()
    ours = spectriton.compress(copy.deepcopy(original), codec=codec)
    x = images(size=10)
    expected, found = Step(original, x), Step(ours, x)
    found.assert_same_forward(expected)
    found.assert_close_gradients(expected)
    # The output of both convolutions, and the sum where it has to be.
    assert len(codec.encoded) == 3 - rebuilt


def test_sums_of_many_parts_are_encoded_anew():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)) for _ in range(6)
            )

        def forward(self, x: Tensor) -> Tensor:
            sums = [self.blocks[0](x)]
            for block in self.blocks[1:]:
                branch = block(sums[-1])
                sums.append(sums[-1] + branch)
            return sums[-1].mean((2, 3))

    torch.manual_seed(0)
    original = Chain().double()
    codec = Counting()
    ours = spectriton.compress(copy.deepcopy(original), codec=codec)
    x = images(size=10)
    Step(ours, x).assert_close_gradients(Step(original, x))
    # Six convolutions. The sum of four of them is one too many for the convolution behind it.
    assert len(codec.encoded) == 6 + 1


def test_nothing_is_encoded_where_nothing_is_asked_for():
    codec = Counting()
    _, ours = pair("resnet", codec)
    x = images()
    with torch.no_grad():
        ours(x)
    with torch.inference_mode():
        ours(x)
    ours.requires_grad_(False)
    ours(x)
    assert not codec.encoded
    # A gradient of the input only: frozen batch norm and convolutions need no maps.
    gradients = []
    for network in (network.eval().requires_grad_(False) for network in pair("resnet", codec)):
        leaf = x.clone().requires_grad_()
        with memory.track(model=network) as usage:
            network(leaf).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    bits_of_maps = 3 * (4 * 16 * 16 + 2 * 4 * 8 * 8 + 4 * 6 * 4 * 4)
    assert usage.saved_bytes < bits_of_maps / 8 + 3 * 4 * 8 * 8 / 2 + 100


def test_frozen_parts_and_the_map_behind_them():
    """The first trainable convolution's input was computed, though nothing before it needs a gradient."""
    codec = Counting()
    original, ours = pair("resnet", codec)
    for network in (original, ours):
        network[:5].requires_grad_(False)
    x = images()
    expected, found = Step(original, x), Step(ours, x)
    found.assert_same_forward(expected)
    found.assert_close_gradients(expected)
    assert codec.encoded[0] == (3, 4, 8, 8)


def test_maps_changed_in_place_are_encoded_anew():
    """Whatever changes maps without a module leaves a stale note behind."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.a(x))
            x *= 2
            x[:, 0] += 1
            return self.b(x).mean((2, 3))

    torch.manual_seed(0)
    original = InPlace().double()
    ours = spectriton.compress(copy.deepcopy(original), codec=IDENTITY)
    expected, found = (torch.autograd.grad(net(images()).square().sum(), net.b.weight) for net in (original, ours))
    torch.testing.assert_close(found, expected)


# -- how much is kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_conv_norm_relu_keeps_one_copy_and_one_bit(inplace: bool, channels_last: bool):
    """Counted by hand: two blocks and the convolution behind them."""
    torch.manual_seed(0)
    blocks = [[nn.Conv2d(c, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace)] for c in (4, 8)]
    network = nn.Sequential(*blocks[0], *blocks[1], nn.Conv2d(8, 1, 3))
    x = torch.randn(2, 4, 16, 24)
    if channels_last:
        network, x = (thing.to(memory_format=torch.channels_last) for thing in (network, x))
    spectriton.compress(network, codec=COARSE)
    with memory.track(model=network) as usage:
        loss = network(x).sum()
    values = 2 * 8 * 16 * 24
    encoded = values * 2 // 8 + values // 64 * 8
    statistics = 2 * 8 * 4
    assert usage.saved_bytes == x.numel() * 4 + 2 * (encoded + values // 8 + statistics)
    with memory.track(model=network) as usage:
        loss.backward()
    assert usage.saved_bytes == 0


def test_pooling_keeps_codes_and_shares_what_is_kept():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 16, 16)
    values = x.numel()
    encoded = values * 2 // 8 + values // 64 * 8

    def saved(*layers: nn.Module) -> int:
        network = spectriton.compress(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), *layers), codec=COARSE)
        with memory.track(model=network) as usage:
            loss = network(x).sum()
        del loss
        return usage.saved_bytes - x.numel() * 4

    conv = nn.Conv2d(8, 8, 1)
    # With batch norm the whole maps are kept: pooled ones are gathered from them.
    norm = [nn.BatchNorm2d(8), nn.ReLU()]
    assert saved(*norm, nn.MaxPool2d(2), conv) == encoded + 64 + values // 8 + values // 4 * 2 // 8
    assert saved(*norm, nn.MaxPool2d(3, 2, 1), conv) == encoded + 64 + values // 8 + values // 4 * 4 // 8
    assert saved(*norm, nn.AvgPool2d(2), conv) == encoded + 64 + values // 8
    # Without, only a bit a value of them is: the pooled ones are encoded.
    assert saved(nn.ReLU(), nn.MaxPool2d(2), conv) == encoded // 4 + values // 8 + values // 4 * 2 // 8
    assert saved(nn.MaxPool2d(2)) == values // 4 * 2 // 8
    assert saved(nn.AdaptiveAvgPool2d(4)) == saved(nn.AvgPool2d(3, 2)) == 0
    assert saved(nn.Dropout(0.5)) == values // 8


def test_activations_keep_one_copy():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 16, 16)
    network = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(inplace=True), nn.Conv2d(8, 8, 1))
    spectriton.compress(network, codec=COARSE)
    with memory.track(model=network) as usage:
        loss = network(x).sum()
    assert loss.requires_grad
    assert usage.saved_bytes == x.numel() * 4 + x.numel() * 2 // 8 + x.numel() // 64 * 8 + 64


def test_a_resnet_keeps_a_fraction():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), BasicBlock(16, 16), BasicBlock(16, 32, 2), *head(32))
    x = torch.randn(4, 3, 32, 32)
    figures = []
    for model in (network, spectriton.compress(copy.deepcopy(network), codec=COARSE)):
        with memory.track(model=model) as usage:
            Step(model, x)
        figures.append(usage)
    images_kept = x.numel() * 4
    # 2 bits and 1 for a scale each, for every output of a convolution and every sum; a bit for every ReLU.
    assert figures[1].saved_bytes - images_kept < 0.09 * (figures[0].saved_bytes - images_kept)


def test_what_is_kept_is_gone_with_the_graph():
    _, ours = pair("resnet", COARSE, torch.float32)
    with memory.track(model=ours) as usage:
        loss = ours(images(torch.float32)).sum()
        before = usage._ledger.saved_bytes
        del loss
        assert before > 0 == usage._ledger.saved_bytes


# -- swapping ---------------------------------------------------------------------------------------------------------


def test_compress_changes_classes_and_nothing_else():
    network = build("resnet")
    parameters, state = list(network.parameters()), {k: v.clone() for k, v in network.state_dict().items()}
    calls: list[str] = []
    network[0].register_forward_hook(lambda *_: calls.append("hook"))
    types = [type(module) for module in network.modules()]
    dictionaries = [set(vars(module)) for module in network.modules()]
    assert spectriton.compress(network, codec=COARSE) is network
    assert isinstance(network[0], nn.Conv2d) and type(network[0]) is compressed.CompressedConv2d
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    network.load_state_dict(state)
    network(images())
    assert calls == ["hook"]
    spectriton.compress(network, codec=IDENTITY)
    assert network[0].codec is IDENTITY and network[4].bn1.codec is IDENTITY
    assert spectriton.decompress(network) is network
    assert [type(module) for module in network.modules()] == types
    assert [set(vars(module)) for module in network.modules()] == dictionaries
    spectriton.decompress(network)


def test_settings():
    network = spectriton.compress(vgg(True), density=0.5, bits=3)
    assert network[0].codec == make_codec("dct", density=0.5, bits=3)
    assert spectriton.compress(network)[0].codec == make_codec("dct")
    assert spectriton.compress(network, bits=8, transform="none", rounding="nearest")[0].codec == QuantiseCodec(
        8, rounding="nearest"
    )


def test_subclasses_are_left_alone_and_named():
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    network = nn.Sequential(Own(3, 3, 3), nn.Conv2d(3, 3, 3), nn.SyncBatchNorm(3), nn.Tanh())
    spectriton.compress(network, codec=COARSE)
    assert type(network[0]) is Own and type(network[1]) is compressed.CompressedConv2d
    text = describe(network)
    assert [line.split()[2] for line in text.splitlines() if "not compressed" in line] == [
        "Own",
        "SyncBatchNorm",
        "Tanh",
    ]
    assert "QuantiseCodec(bits=2" in text.splitlines()[0]


def test_the_projects_own_networks():
    """Their convolutions with batch norm are one module."""
    from spectriton import models

    torch.manual_seed(0)
    network = models.build("vgg16_bn", "spatial", 5, 3, 32, width=0.0625).double()
    ours = spectriton.compress(copy.deepcopy(network), codec=IDENTITY)
    expected, found = Step(network, images()), Step(ours, images())
    found.assert_same_forward(expected)
    found.assert_close_gradients(expected, 1e-9)
    assert "NormConv2d" in describe(ours).split("not compressed")[0]
    assert type(spectriton.decompress(ours).conv1_1) is models._describe.NormConv2d


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies(how: str):
    _, ours = pair("resnet", COARSE, torch.float32)
    x = images(torch.float32)
    if how == "pickle":
        other = pickle.loads(pickle.dumps(ours))
    elif how == "deepcopy":
        other = copy.deepcopy(ours)
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    first, second = Step(ours, x), Step(other, x)
    assert all(torch.equal(second.gradients[name], gradient) for name, gradient in first.gradients.items())
    assert type(other[0]) is compressed.CompressedConv2d and other[0].codec == COARSE


def test_maps_with_a_note_can_be_saved():
    _, ours = pair("vgg_bn", COARSE, torch.float32)
    maps = ours[:3](images(torch.float32))
    assert vars(maps)
    file = io.BytesIO()
    torch.save(maps, file)
    file.seek(0)
    loaded = torch.load(file)
    assert torch.equal(loaded, maps)
    ours[3:5](loaded).sum().backward()


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: spectriton.compress("resnet18"), TypeError, r"compress: model got .*torch\.nn\.Module"),
        (lambda: spectriton.compress(nn.Linear(2, 2), codec=COARSE), ValueError, "modules of types Linear"),
        (lambda: spectriton.compress(vgg(True), codec="dct"), TypeError, "codec got dct"),
        (lambda: spectriton.decompress(None), TypeError, "decompress: model"),
        (lambda: gradient_report(vgg(True), []), ValueError, r"spectriton\.compress\(model\)"),
        (lambda: gradient_report(pair("vgg")[1], []), ValueError, "batches got none"),
        (lambda: gradient_report(pair("vgg")[1].requires_grad_(False), []), ValueError, "trainable"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        call()


def test_what_is_no_batch_of_maps_takes_the_way_of_the_original():
    torch.manual_seed(0)
    network = spectriton.compress(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)), codec=COARSE)
    x = images(torch.float32)[0]
    assert network(x).shape == (4, 15, 15)
    network(x).sum().backward()
    assert network(torch.empty(0, 3, 32, 32)).shape == (0, 4, 15, 15)
    pool = spectriton.compress(nn.MaxPool2d(2, return_indices=True), codec=COARSE)
    maxima, index = pool(images().requires_grad_())
    assert maxima.requires_grad and index.dtype == torch.int64
    norm = spectriton.compress(nn.BatchNorm2d(3), codec=COARSE)
    with pytest.raises(ValueError, match="more than 1 value"):
        norm(torch.randn(1, 3, 1, 1))
    with pytest.raises(ValueError, match="4D"):
        norm(torch.randn(2, 3))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1001])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_bits(width: int, count: int):
    values = torch.randint(0, 1 << width, (count,), dtype=torch.uint8)
    packed = bits.pack(values.bool() if width == 1 else values, width)
    assert packed.dtype == torch.uint8 and packed.numel() == math.ceil(count * width / 8)
    assert torch.equal(bits.unpack(packed, width, count), values)


@pytest.mark.parametrize("count", [1, 9, 100, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_clearing_by_bits(dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch):
    """Over several chunks, as large maps are; NaN goes too."""
    monkeypatch.setattr(bits, "_CHUNK_OF_CPU", 64)
    x = torch.randn(count).to(dtype)
    x[::7] = math.nan
    outside = torch.rand(count) > 0.5
    expected = x.masked_fill(outside, 0)
    bits.clear(x, bits.pack(outside, 1))
    assert torch.equal(x.nan_to_num(nan=5), expected.nan_to_num(nan=5))


# -- the quality of gradients -----------------------------------------------------------------------------------------


def test_gradient_report_of_an_exact_codec_and_of_a_coarse_one():
    _, ours = pair("activations")
    state = {k: v.clone() for k, v in ours.state_dict().items()}
    random = torch.get_rng_state()
    batches = [(images(), torch.arange(3)), (images() + 1, torch.arange(3))]
    exact = gradient_report(ours, batches)
    assert exact.batches == 2 and exact.total.size == sum(p.numel() for p in ours.parameters())
    for row in (*exact.layers, exact.total):
        assert row.cosine == pytest.approx(1) and row.norm_ratio == pytest.approx(1) and row.relative_error < 1e-6
    assert all(torch.equal(v, state[k]) for k, v in ours.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in ours.parameters()) and type(ours[0]) is compressed.CompressedConv2d
    spectriton.compress(ours, codec=COARSE)
    coarse = gradient_report(ours, batches)
    assert 0 < coarse.total.worst_cosine <= coarse.total.cosine < 0.999
    assert 0 < coarse.total.bias <= coarse.total.relative_error
    # In front of a batch norm, a bias does nothing.
    norms = [number for number, module in enumerate(ours) if isinstance(module, nn.BatchNorm2d)]
    idle = {f"{number - 1}.bias" for number in norms}
    assert [row.name for row in coarse.layers] == [name for name, _ in ours.named_parameters() if name not in idle]
    lines = str(coarse).splitlines()
    assert len(lines) == 3 + len(coarse.layers) and lines[-1].startswith("all")
    assert coarse.to_dict()["total"]["cosine"] == coarse.total.cosine


def test_gradient_report_by_hand():
    """A convolution without anything behind it: its gradient is linear in the decoded input."""

    class Halving(CastCodec):
        def encode(self, x: Tensor, seed: int | Tensor | None = None):
            return super().encode(x / 2)

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 3, bias=False)).double()
    spectriton.compress(network, codec=Halving(torch.float64))
    result = gradient_report(network, [(images(), None)], loss=lambda y, _: y.square().sum())
    rows = {row.name: row for row in result.layers}
    assert rows["1.weight"].norm_ratio == pytest.approx(0.5) and rows["1.weight"].cosine == pytest.approx(1)
    assert rows["1.weight"].relative_error == pytest.approx(0.5) == rows["1.weight"].bias
    assert rows["0.weight"].relative_error == pytest.approx(0, abs=1e-12)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_on_a_gpu(name: str, channels_last: bool):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    original, ours = (network.cuda().to(memory_format=layout) for network in pair(name))
    x = images().cuda().to(memory_format=layout)

    def on_cpu(network: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: network(x).cpu()

    expected, found = Step(original, x, on_cpu(original)), Step(ours, x, on_cpu(ours))
    torch.testing.assert_close(found.output, expected.output)
    found.assert_close_gradients(expected, 1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_gpu_drops():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1), BasicBlock(64, 64), BasicBlock(64, 64), *head(64)).cuda()
    x, labels = torch.randn(32, 3, 64, 64).cuda(), torch.zeros(32, dtype=torch.long).cuda()
    peaks = []
    for model in (network, spectriton.compress(copy.deepcopy(network), codec=COARSE)):
        for _ in range(2):
            with memory.track("cuda", model=model) as usage:
                functional.cross_entropy(model(x), labels).backward()
        peaks.append(usage.peak_beyond_state_bytes)
    assert peaks[1] < 0.7 * peaks[0]


class CountingDecodes(CastCodec):
    """Counts what is decoded."""

    def __init__(self) -> None:
        super().__init__(torch.float64)
        object.__setattr__(self, "decoded", [])

    def _decode(self, tensors: tuple[Tensor, ...], out: Tensor) -> None:
        self.decoded.append(tuple(out.shape))
        super()._decode(tensors, out)


def test_maps_are_decoded_once_for_a_batch_norm_and_the_convolution_behind_it():
    codec = CountingDecodes()
    original, ours = pair("vgg_bn", codec)
    x = images()
    Step(ours, x).assert_close_gradients(Step(original, x))
    assert sorted(codec.decoded) == [(3, 4, 32, 32), (3, 6, 8, 8), (3, 6, 16, 16)]


def test_decoded_maps_do_not_outlive_a_backward_that_needs_only_some():
    codec = CountingDecodes()
    _, ours = pair("vgg_bn", codec)
    loss = ours(images()).sum()
    # The batch norm in front of the convolution would want the same maps.
    torch.autograd.grad(loss, ours[4].weight, retain_graph=True)
    assert _recipes._thread.last.dense is None and len(codec.decoded) == 3
    loss.backward()
    assert _recipes._thread.last.dense is None and len(codec.decoded) == 3 + 3


def test_maps_with_fewer_values_get_more_bits_of_the_same_budget():
    network = nn.Sequential(*build("vgg_bn", torch.float32)[:12], *head(6))
    ours = spectriton.compress(network, codec=BlockCodec(density=0.5, bits=3))
    codec = ours[0].codec
    assert codec == BlockCodec(density=0.5, bits=3) and codec.allotment is ours[3].codec.allotment
    x = images(torch.float32, batch=64)

    def saved() -> int:
        with memory.track(model=ours) as usage:
            Step(ours, x)
        return usage.saved_bytes

    even = saved()
    assert not codec.allotment.settled
    allotted = saved()
    assert codec.allotment.settled
    rates = codec.allotment.rates(1.5)
    sizes = [4 * 32 * 32, 6 * 16 * 16, 6 * 8 * 8]
    assert sorted(rates, reverse=True) == sizes
    assert sum(n * rates[n] for n in sizes) == pytest.approx(1.5 * sum(sizes))
    assert rates[sizes[2]] - rates[sizes[1]] == pytest.approx(2 / 3 * math.log2(4))
    # Records are whole bytes.
    assert abs(allotted - even) < 0.02 * even
    assert saved() == allotted
    # Images of another size are counted anew.
    x = images(torch.float32, size=16, batch=64)
    saved()
    assert not codec.allotment.settled
    saved()
    assert sorted(codec.allotment.rates(1.5), reverse=True) == [n // 4 for n in sizes]
    again = pickle.loads(pickle.dumps(ours))
    assert again[0].codec.allotment is again[3].codec.allotment


def test_no_budget_is_exceeded_or_left_to_nothing():
    allotment = Allotment()
    allotment.counts.update({1 << 20: 1, 1 << 10: 1, 16: 5})
    rates = allotment.rates(0.25)
    assert rates[1 << 20] >= 0.125 and rates[16] <= 8
    assert sum(n * rates[n] * count for n, count in allotment.counts.items()) <= 0.25 * ((1 << 20) + (1 << 10) + 80)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_meets_the_same_allotment_twice(reentrant: bool):
    _, ours = pair("vgg_bn", BlockCodec(), torch.float32)
    x = images(torch.float32).requires_grad_()
    for _ in range(3):
        Step(ours, x, lambda x: ours[6:](checkpoint(ours[:6], x, use_reentrant=reentrant)))
