"""exp and log against 60-digit decimals, and the same bits wherever an element stands."""

from __future__ import annotations

import decimal
from decimal import Decimal
from fractions import Fraction

import pytest
import torch

from anyfp4.ops import elementary
from anyfp4.testing.bitwise import assert_same_bits

decimal.getcontext().prec = 60


def ulp(value: float) -> Fraction:
    """Distance of float32 numbers near a positive value."""
    t = torch.tensor(value, dtype=torch.float32)
    return Fraction(float(torch.nextafter(t, torch.tensor(torch.inf)) - t))


@pytest.mark.parametrize("seed", range(3))
def test_exp_within_half_a_unit(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.cat((torch.empty(1500).uniform_(-103, 88.7, generator=g), torch.randn(500, generator=g)))
    for argument, got in zip(x.tolist(), elementary.exp(x).tolist(), strict=True):
        error = abs(Fraction(got) - Fraction(Decimal(argument).exp()))
        assert error <= Fraction(501, 1000) * ulp(got), argument


@pytest.mark.parametrize("exponent", range(-149, 128, 9))
def test_log_within_half_a_unit(exponent: int) -> None:
    g = torch.Generator().manual_seed(exponent + 200)
    x = (1 + torch.rand(40, generator=g)) * torch.tensor(2.0, dtype=torch.float64) ** exponent
    x32 = x.to(torch.float32)
    for argument, got in zip(x32.tolist(), elementary.log(x32).tolist(), strict=True):
        if argument == 1.0:
            assert got == 0.0
            continue
        error = abs(Fraction(got) - Fraction(Decimal(argument).ln()))
        assert error <= Fraction(501, 1000) * ulp(abs(got)), argument


def test_special_values() -> None:
    inf, nan = float("inf"), float("nan")
    got = elementary.exp(torch.tensor([0.0, -0.0, inf, -inf, nan, 89.0, -104.0]))
    assert got[:4].tolist() == [1.0, 1.0, inf, 0.0] and got[4].isnan() and got[5:].tolist() == [inf, 0.0]
    got = elementary.log(torch.tensor([1.0, 0.0, -0.0, inf, -1.0, nan]))
    assert got[:4].tolist() == [0.0, -inf, -inf, inf] and got[4:].isnan().all()


@pytest.mark.parametrize("function", [elementary.exp, elementary.log])
def test_position_does_not_matter(function: object) -> None:
    assert callable(function)
    x = torch.rand(67, generator=torch.Generator().manual_seed(0)) * 5 + 0.01
    whole = function(x)
    for i in range(67):
        assert_same_bits(function(x[i : i + 1]), whole[i : i + 1])
        assert_same_bits(function(x[i:]), whole[i:])
