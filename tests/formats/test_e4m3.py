"""E4M3: every code, every midpoint and its neighbours, saturation, NaN, and the split into parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyfp4.errors import InvalidArgumentError
from anyfp4.formats import e4m3
from anyfp4.testing.bitwise import assert_same_bits
from tests.formats import oracles

ALL = torch.arange(256, dtype=torch.uint8)
NUMBERS = ALL[(ALL & 0x7F) != 0x7F]


def code_of(x: float) -> int:
    return oracles.nearest(oracles.E4M3, x) | (128 if np.signbit(x) else 0)


def test_every_code_is_its_value() -> None:
    values = [float(oracles.e4m3_magnitude(c & 127)) * (-1.0 if c & 128 else 1.0) for c in NUMBERS.tolist()]
    decoded = NUMBERS.view(torch.float8_e4m3fn).to(torch.float32)
    assert_same_bits(decoded, torch.tensor(values))
    assert_same_bits(e4m3.encode(decoded).view(torch.uint8), NUMBERS, "the sign of zero too")
    assert max(values) == e4m3.MAX


def test_rounding_at_every_midpoint_and_its_neighbours() -> None:
    x = oracles.probes(oracles.E4M3)
    assert len(x) > 6 * (127 + 126)
    expected = torch.tensor([code_of(float(v)) for v in x], dtype=torch.uint8)
    assert_same_bits(e4m3.encode(torch.from_numpy(x)).view(torch.uint8), expected)


def test_saturation() -> None:
    x = torch.tensor([448.0, 463.9, 464.0, 480.0, 1e30, float("inf")])
    for sign in (1.0, -1.0):
        assert_same_bits(e4m3.encode(sign * x).to(torch.float32), torch.full((6,), sign * 448.0))


@given(st.floats(width=32, allow_nan=False))
def test_any_number_rounds_to_nearest_even(x: float) -> None:
    assert e4m3.encode(torch.tensor([x])).view(torch.uint8).item() == code_of(x)


def test_nan_stays_nan() -> None:
    nans = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert bool(e4m3.is_nan(e4m3.encode(nans)).all())
    assert e4m3.is_nan(ALL.view(torch.float8_e4m3fn)).nonzero().flatten().tolist() == [0x7F, 0xFF]


def test_split_of_every_code() -> None:
    significand, exponent = e4m3.split(ALL.view(torch.float8_e4m3fn))
    assert significand.dtype == exponent.dtype == torch.int32
    for code, m, e in zip(ALL.tolist(), significand.tolist(), exponent.tolist(), strict=True):
        if code & 127 == 127:
            assert (m, e) == (15, 8)
            continue
        magnitude = oracles.e4m3_magnitude(code & 127)
        assert m * 2 ** (e + 6) == magnitude * 2**9  # |x| = m × 2^(e − 3), times 2^9
        assert (m >= 8 and -6 <= e <= 8) or (m < 8 and e == -6)


def test_split_keeps_the_shape_of_views() -> None:
    x = ALL.view(16, 16).view(torch.float8_e4m3fn)
    significand, exponent = e4m3.split(x.T)
    assert_same_bits(significand, e4m3.split(x)[0].T.contiguous())
    assert_same_bits(exponent, e4m3.split(x)[1].T.contiguous())


def test_wrong_arguments() -> None:
    with pytest.raises(InvalidArgumentError, match=r"encode takes float32, got torch\.float64"):
        e4m3.encode(torch.zeros(4, dtype=torch.float64))
    with pytest.raises(InvalidArgumentError, match=r"split takes float8_e4m3fn, got torch\.float32"):
        e4m3.split(torch.zeros(4))
