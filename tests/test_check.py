"""The messages for bad input: one shape, both values, and what to do."""

from __future__ import annotations

import fractions
import math
import re

import numpy as np
import pytest
import torch

from spectriton import _check
from spectriton._registry import op_bodies, register_body

SHAPE_OF_MESSAGE = re.compile(r"^\S+: \S+ got .+, expected .+; .+")


def message(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert SHAPE_OF_MESSAGE.match(text), text
    return text


def test_fail_has_one_shape():
    with pytest.raises(ValueError) as error:
        _check.fail("pack", "size", (3, 4), "(8, 8)", "pass the size of the maps")
    assert str(error.value) == "pack: size got (3, 4), expected (8, 8); pass the size of the maps"


def test_fail_takes_the_kind_and_a_text():
    with pytest.raises(KeyError) as error:
        _check.fail("op", "x", "something odd", "another thing", "do it", KeyError)
    assert "x got something odd, expected another thing; do it" in str(error.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (1.5, "1.5"),
        ("tan", "'tan'"),
        ((1, 2), "(1, 2)"),
        (torch.float16, "torch.float16"),
        (torch.zeros(2, 3), "a float32 tensor of shape (2, 3)"),
        ([torch.zeros(1)], "a value of type list"),
        (list(range(100)), "a value of type list"),
        (object(), "a value of type object"),
    ],
)
def test_describe(value, text):
    assert _check.describe(value) == text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_real_maps_accepted(dtype):
    _check.check_real_maps("op", "x", torch.zeros(1, 2, 3, 4, dtype=dtype))


def test_real_maps_may_have_no_images():
    _check.check_real_maps("op", "x", torch.zeros(0, 2, 3, 4))


@pytest.mark.parametrize(
    ("value", "kind", "part"),
    [
        (torch.zeros(1, 1, 4, 4, dtype=torch.complex64), TypeError, "irfft2"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int64), TypeError, "int64 tensor"),
        (np.zeros((1, 1, 4, 4)), TypeError, "torch.Tensor"),
        ("maps", TypeError, "'maps'"),
        (torch.zeros(4, 4), ValueError, "(4, 4)"),
        (torch.zeros(1, 1, 1, 4, 4), ValueError, "4 dimensions"),
        (torch.zeros(1, 1, 0, 4), ValueError, "(1, 1, 0, 4)"),
        (torch.zeros(1, 1, 4, 0), ValueError, "(1, 1, 4, 0)"),
    ],
)
def test_real_maps_refused(value, kind, part):
    with pytest.raises(kind) as error:
        _check.check_real_maps("op", "x", value)
    assert part in message(error)


def test_real_maps_of_another_rank():
    _check.check_real_maps("op", "x", torch.zeros(3, 4, 4), rank=3)
    _check.check_real_maps("op", "x", torch.zeros(1, 1, 3, 4, 4), rank=None)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        _check.check_real_maps("op", "x", torch.zeros(4), rank=None)


def test_complex():
    _check.check_complex("op", "x", torch.zeros(2, dtype=torch.complex128))
    for value in (torch.zeros(2), 3j):
        with pytest.raises(TypeError) as error:
            _check.check_complex("op", "x", value)
        assert "a complex tensor" in message(error)


def test_rank():
    _check.check_rank("op", "x", torch.zeros(2, 2), 2)
    _check.check_rank("op", "x", torch.zeros(2, 2, 2), 2, at_least=True)
    with pytest.raises(ValueError, match="expected 1 dimension; remove") as error:
        _check.check_rank("op", "x", torch.zeros(2, 2), 1)
    message(error)
    with pytest.raises(ValueError, match="at least 3 dimensions; add"):
        _check.check_rank("op", "x", torch.zeros(2, 2), 3, at_least=True)
    with pytest.raises(TypeError, match="None"):
        _check.check_rank("op", "x", None, 2)


@pytest.mark.parametrize("value", [0, 0.0, 1, 0.5, math.inf, np.float32(0.5), np.int64(2), fractions.Fraction(1, 2)])
def test_threshold_accepted(value):
    got = _check.check_threshold("op", value)
    assert type(got) is float
    assert got == value


@pytest.mark.parametrize("value", [-1, -0.5, -math.inf, math.nan, np.float32("nan")])
def test_threshold_value_refused(value):
    with pytest.raises(ValueError) as error:
        _check.check_threshold("op", value)
    assert "threshold got " + repr(float(value)) in message(error)


@pytest.mark.parametrize("value", [True, False, None, "0.5", 1j, [0.5], torch.tensor(0.5)])
def test_threshold_type_refused(value):
    with pytest.raises(TypeError) as error:
        _check.check_threshold("op", value, "beta")
    assert "op: beta got" in message(error)


def test_choice():
    assert _check.check_choice("op", "kind", "tanh", ("tanh", "asinh")) == "tanh"
    assert _check.check_choice("op", "dtype", torch.int8, (torch.float32, torch.int8, "int4")) is torch.int8
    assert _check.check_choice("op", "stride", 1, iter((1, 2))) == 1


@pytest.mark.parametrize(
    ("value", "fix"),
    [("tahn", "did you mean 'tanh'?"), ("TANH", "did you mean 'tanh'?"), ("xyz", "pass one of these"), (3, "pass one")],
)
def test_choice_refused(value, fix):
    with pytest.raises(ValueError) as error:
        _check.check_choice("op", "kind", value, ["tanh", "softsign"])
    text = message(error)
    assert fix in text
    assert "one of 'tanh', 'softsign'" in text
    assert repr(value) in text


def test_choice_keeps_the_type():
    with pytest.raises(ValueError):
        _check.check_choice("op", "stride", True, [1, 2])
    with pytest.raises(ValueError):
        _check.check_choice("op", "kind", torch.zeros(2), ["tanh"])


def test_checks_do_not_read_tensors():
    # A meta tensor has no data: a check that looked at it would fail.
    _check.check_real_maps("op", "x", torch.zeros(1, 1, 4, 4, device="meta"))
    _check.check_complex("op", "x", torch.zeros(1, dtype=torch.complex64, device="meta"))


def test_register_body():
    overload = torch.ops.aten.relu.default
    try:
        register_body(overload, torch.clone)
        assert op_bodies[overload] is torch.clone
    finally:
        op_bodies.pop(overload, None)
    with pytest.raises(TypeError, match="expected an OpOverload"):
        register_body("relu", torch.clone)
    with pytest.raises(TypeError, match="expected a callable"):
        register_body(overload, None)
