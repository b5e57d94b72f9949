"""The parts of the block codec against independent formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from spectriton.reference import block_codec
from spectriton.reference.block_codec import Plan, Transform

MAPS = torch.randn(3, 5, 9, 14, generator=torch.Generator().manual_seed(0))


def plan_of_widths(width: torch.Tensor, deviation: torch.Tensor) -> Plan:
    nothing = torch.empty(0)
    change = Transform(nothing, nothing, nothing, None, nothing)
    return Plan(change, torch.arange(len(width)), width, width.cumsum(0) - width, deviation)


def laplacian(count: int) -> torch.Tensor:
    """Quantiles of the Laplacian density of unit variance."""
    place = (torch.arange(count, dtype=torch.float64) + 0.5) / count - 0.5
    return (-place.sign() * torch.log1p(-2 * place.abs()) / math.sqrt(2)).float()


@pytest.mark.parametrize(
    ("size", "edge"),
    [(1, 1), (2, 2), (3, 3), (4, 4), (7, 7), (9, 5), (13, 7), (14, 7), (28, 7), (32, 8), (56, 8), (224, 8), (25, 5)],
)
def test_block_edge(size: int, edge: int):
    assert block_codec.block_edge(size) == edge


def test_dct_is_that_of_the_mirrored_signal():
    edges = (5, 8)
    matrix = block_codec.dct_matrix(edges, torch.device("cpu")).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(40).double(), rtol=0, atol=1e-6)
    # The DCT-II is the Fourier transform of a signal and its mirror image, but for half a step.
    block = torch.randn(*edges, dtype=torch.float64)
    expected = block
    for dim, n in enumerate(edges):
        spectrum = torch.fft.fft(torch.cat([expected, expected.flip(dim)], dim), dim=dim).narrow(dim, 0, n)
        k = torch.arange(n).view(-1, *[1] * (1 - dim))
        shifted = (spectrum * torch.exp(-1j * math.pi * k / (2 * n))).real / math.sqrt(2 * n)
        expected = torch.where(k == 0, shifted / math.sqrt(2), shifted)
    torch.testing.assert_close((matrix @ block.flatten()).view(edges), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mix", [1, 2, 4])
def test_transform_and_back(mix: int):
    layout = block_codec.block_layout(tuple(MAPS.shape), 8.0, mix)._replace(groups=-(-5 // mix), mix=mix)
    mean, scale = MAPS.mean((0, 2, 3)), MAPS.std((0, 2, 3))
    basis = torch.linalg.qr(torch.randn(layout.groups, mix, mix)).Q if mix > 1 else None
    dct = block_codec.dct_matrix(layout.edges, MAPS.device)
    change = Transform(mean, 1 / scale, scale, basis, dct)
    coefficients = block_codec.transform(MAPS, layout, change)
    assert coefficients.shape == (layout.frequencies, layout.components, layout.blocks)
    back = torch.empty_like(MAPS)
    block_codec.transform_back(coefficients.transpose(0, 1), layout, change, back)
    torch.testing.assert_close(back, MAPS, rtol=0, atol=1e-5)


def test_components_are_principal():
    x = torch.randn(2, 6, 1000)
    x[0, 3] = x[0, 0] + 0.1 * x[0, 3]
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    correlation = x @ x.mT / 1000
    basis = block_codec._orthonormal(block_codec._components(correlation))
    torch.testing.assert_close(basis.mT @ basis, torch.eye(6).expand(2, 6, 6), rtol=0, atol=1e-5)
    values = torch.linalg.eigvalsh(correlation[0]).flip(0)
    got = (basis[0] * (correlation[0] @ basis[0])).sum(0)
    torch.testing.assert_close(got[:1], values[:1], rtol=0.02, atol=0)
    torch.testing.assert_close(got[-1:], values[-1:], rtol=0, atol=0.02)


def error_of_width(width: int) -> float:
    samples = laplacian(100_000)[None]
    plan = plan_of_widths(torch.tensor([width]), torch.tensor([3.0]))
    codes = block_codec.quantise_rows(3 * samples, plan, None)
    records = block_codec.write_fields(codes, block_codec.field_bits(plan, 1))
    return float((block_codec.read_fields(records, plan) / 3 - samples).square().mean())


def test_quantiser_is_close_to_the_best():
    # Mean squared errors of Lloyd-Max quantisers for the Laplacian density (Jayant and Noll, 1984, table 4.4).
    for width, least in ((1, 0.5), (2, 0.1762), (3, 0.0545), (4, 0.0154)):
        assert error_of_width(width) == pytest.approx(least, rel=0.01)


@pytest.mark.parametrize("width", [2, 3, 5])
def test_compander_is_the_best_of_its_kind(monkeypatch: pytest.MonkeyPatch, width: int):
    def error(factor: float) -> float:
        values = list(compander)
        values[width - 1] *= factor
        monkeypatch.setattr(block_codec, "COMPANDER", tuple(values))
        block_codec._level_table.cache_clear()
        block_codec.quantiser_levels.cache_clear()
        return error_of_width(width)

    compander = block_codec.COMPANDER
    best = error(1.0)
    step = 1 + 0.16 / 2**width
    assert best <= error(step) and best <= error(1 / step)
    monkeypatch.undo()
    block_codec._level_table.cache_clear()
    block_codec.quantiser_levels.cache_clear()


def test_edges_of_classes_follow_from_the_errors():
    errors = [1.0, *(error_of_width(width) for width in range(1, 9))]
    gains = [math.log2((errors[0] - errors[1]) / (errors[b - 1] - errors[b])) for b in range(1, 9)]
    first = [block_codec.CLASS_EDGES[block_codec.CLASS_WIDTHS.index(b) - 1] for b in range(1, 9)]
    assert first == pytest.approx(gains, abs=0.1)
    assert all(low <= high for low, high in pairwise(block_codec.CLASS_WIDTHS))


def test_fields_of_all_widths():
    width = torch.tensor([8, 1, 3, 7, 2, 6, 5, 4, 8, 1])
    plan = plan_of_widths(width, torch.ones(10))
    codes = torch.randint(0, 256, (10, 33), dtype=torch.uint8)
    records = block_codec.write_fields(codes, block_codec.field_bits(plan, 6))
    assert records.shape == (33, 6)
    # As one big number: fields follow one another from its lowest bit.
    for n in range(33):
        number = int.from_bytes(bytes(records[n].tolist()), "little")
        for row in range(10):
            field = number >> int(plan.start[row]) & ((1 << int(width[row])) - 1)
            assert field == int(codes[row, n]) & ((1 << int(width[row])) - 1)
    values = block_codec.read_fields(records, plan)
    table = torch.from_numpy(block_codec._level_table())
    expected = table[(codes & ((1 << width) - 1)[:, None]).long() + (1 << width)[:, None]]
    torch.testing.assert_close(values, expected)


def test_stochastic_rounding_between_levels():
    values = torch.linspace(-1.2, 1.2, 9)
    width = torch.tensor([2, 4, 7])
    plan = plan_of_widths(width, torch.ones(3))
    mean = torch.zeros(3, 9)
    for step in range(500):
        noise = torch.full((3, 9), (step + 0.5) / 500)
        codes = block_codec.quantise_rows(values.expand(3, 9).clone(), plan, noise)
        mean += block_codec.read_fields(block_codec.write_fields(codes, block_codec.field_bits(plan, 2)), plan) / 500
    torch.testing.assert_close(mean, values.expand(3, 9), rtol=0, atol=5e-3)


def test_water_level_spends_all_bits():
    logs = torch.randn(500, generator=torch.Generator().manual_seed(1)) * 4
    for bits in (16, 400, 1500):
        level = block_codec._water_level(logs, bits)
        width = block_codec._lookup(block_codec.CLASS_WIDTHS, block_codec._classes(logs, level))
        assert bits - 1 <= int(width.sum()) <= bits
        # No row is paid for less than another goes without.
        assert logs[width == 0].max() <= logs[width > 0].min()


@pytest.mark.parametrize("workspace", [1, 20_000, 1 << 22])
def test_regions_cover_the_maps(workspace: int):
    layout = block_codec.block_layout((5, 3, 20, 12), 2.0, 1)
    seen = torch.zeros(5, 3, 20, 12)
    following = 0
    for part in block_codec.regions(layout, workspace):
        block_codec.maps_of(seen, layout, part).add_(1)
        assert part.n1 - part.n0 == (part.b1 - part.b0) * (part.r1 - part.r0) * layout.grid[1]
        assert part.n0 == following
        following = part.n1
    assert (seen == 1).all()


@pytest.mark.parametrize("mix", [1, 4])
def test_rows_without_bits_may_be_carried_along(mix: int):
    """As on a GPU, where the host does not wait to know how many rows have bits."""
    x = MAPS.repeat(20, 1, 1, 1) + torch.randn(60, 5, 9, 14, generator=torch.Generator().manual_seed(1))
    layout = block_codec.block_layout(tuple(x.shape), 1.5, mix)
    stored = block_codec.fit(x, layout, 1 << 22)
    decoded = []
    for compact in (True, False):
        plan = block_codec.make_plan(stored, layout, compact)
        assert compact == (len(plan.rows) < layout.rows)
        records = block_codec.encode_blocks(x, layout, plan, None, 1 << 22)
        decoded.append(block_codec.decode_blocks(records, layout, plan, torch.empty_like(x), 1 << 22))
    assert (decoded[0] - decoded[1]).norm() < 0.01 * decoded[0].norm()
    assert 0 < (decoded[0] - x).norm() < 0.7 * x.norm()
