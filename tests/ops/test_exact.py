"""ops.exact against rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyfp4.errors import InvalidArgumentError
from anyfp4.ops import exact
from anyfp4.testing.bitwise import assert_same_bits


def nearest_float32(value: Fraction) -> float:
    """Round to nearest, ties to even, subnormals included; by integer arithmetic."""
    if value == 0:
        return 0.0
    sign, value = (-1, -value) if value < 0 else (1, value)
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    if Fraction(2) ** exponent > value:
        exponent -= 1
    step = Fraction(2) ** max(exponent - 23, -149)
    quotient, rest = divmod(value, step)
    if rest * 2 > step or (rest * 2 == step and quotient % 2):
        quotient += 1
    rounded = quotient * step
    return sign * (float("inf") if rounded >= Fraction(2) ** 128 else float(rounded))


def oracle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    rows_a, rows_b = ([[Fraction(v) for v in row] for row in t.float().tolist()] for t in (a, b))
    dots = [[nearest_float32(sum(x * y for x, y in zip(r, c, strict=True))) for c in rows_b] for r in rows_a]
    return torch.tensor(dots, dtype=torch.float64).to(torch.float32)  # exact: they are float32 numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 7, 64, 576])
def test_matmul_is_the_rounded_exact_value(dtype: torch.dtype, k: int) -> None:
    g = torch.Generator().manual_seed(k)
    a = (torch.randn(5, k, generator=g) * torch.exp2(torch.randint(-8, 8, (5, k), generator=g))).to(dtype)
    b = torch.randn(9, k, generator=g).to(dtype)
    assert_same_bits(exact.matmul(a, b), oracle(a, b))


def test_cancellation_and_ties_take_the_exact_path() -> None:
    big, one = 2.0**60, 1.0
    tie = 1 + 2.0**-24  # halfway between two float32 numbers
    a = torch.tensor([[big, one, -big, 0.0], [1.0, 2.0**-24, 0.0, 0.0], [1.0, 2.0**-24, 2.0**-80, 0.0]])
    b = torch.ones(1, 4)
    assert exact.matmul(a, b).flatten().tolist() == [1.0, 1.0, 1.0 + 2.0**-23]
    assert tie != 1.0
    assert_same_bits(exact.matmul(a, b), oracle(a, b))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([1.0, -1.0, 0.5, 3.0])),
        min_size=1,
        max_size=12,
    )
)
def test_total_of_anything_finite(pairs: list[tuple[float, float]]) -> None:
    a = torch.tensor([[p[0] for p in pairs]], dtype=torch.float32)
    b = torch.tensor([[p[1] for p in pairs]], dtype=torch.float32)
    assert_same_bits(exact.matmul(a, b), oracle(a, b))


def test_order_cannot_matter() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 300, generator=g), torch.randn(4, 300, generator=g)
    reference = exact.matmul(a, b)
    for seed in range(5):
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
        assert_same_bits(exact.matmul(a[:, order], b[:, order]), reference)


def test_rows_do_not_depend_on_each_other() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(300, 96, generator=g).bfloat16(), torch.randn(33, 96, generator=g).bfloat16()
    full = exact.matmul(a, b)
    for i in (0, 1, 7, 128, 299):
        assert_same_bits(full[i : i + 1], exact.matmul(a[i : i + 1], b))
    for i in (0, 31):
        assert_same_bits(full[:, i : i + 1], exact.matmul(a, b[i : i + 1]))


def test_special_values() -> None:
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([[inf, 1.0], [inf, -inf], [nan, 1.0], [-0.0, 0.0], [3e38, 3e38]])
    got = exact.matmul(a, torch.ones(1, 2)).flatten()
    assert got[0] == inf and got[1].isnan() and got[2].isnan() and got[4] == inf
    assert_same_bits(got[3:4], torch.zeros(1))


def test_sums_and_batches() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 50, generator=g)
    flat = x.reshape(6, 50)
    assert_same_bits(exact.total(x).reshape(6, 1), oracle(flat, torch.ones(1, 50)))
    squares = torch.stack([oracle(row[None], row[None])[0, 0] for row in flat])
    assert_same_bits(exact.square_sum(x).reshape(6), squares)
    y = torch.randn(2, 4, 50, generator=g)
    assert_same_bits(exact.matmul(x, y), torch.stack([oracle(x[i], y[i]) for i in range(2)]))


def test_float8_operands() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    a, b = codes[:252].reshape(6, 42), codes[:126].reshape(3, 42)
    assert_same_bits(exact.matmul(a, b), oracle(a, b))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3)),
        (torch.zeros(2, 2, 3), torch.zeros(3, 2, 3)),
    ],
)
def test_bad_arguments(a: torch.Tensor, b: torch.Tensor) -> None:
    with pytest.raises(InvalidArgumentError):
        exact.matmul(a, b)
