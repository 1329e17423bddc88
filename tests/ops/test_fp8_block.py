"""The block-wise FP8 linear against rational arithmetic, step by step, and row by row."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyfp4.formats.weights import FP8Weight, fp8_grid
from anyfp4.ops.linear import linear
from anyfp4.testing.bitwise import assert_same_bits
from tests.formats.oracles import E4M3, nearest
from tests.ops.test_exact import nearest_float32

F8 = torch.float8_e4m3fn


def nearest_e4m3(value: Fraction) -> Fraction:
    magnitude = E4M3[nearest(E4M3, float(value))]  # exact: the value is a float32 number
    return magnitude if value > 0 else -magnitude


def f32(value: Fraction) -> Fraction:
    return Fraction(nearest_float32(value))


def oracle(x: Tensor, weight: FP8Weight) -> Tensor:
    """Every float32 operation as a fraction, rounded by integer arithmetic."""
    codes, scales = weight.weight.float().tolist(), weight.weight_scale.tolist()
    n, k = weight.shape
    out = []
    for row in x.float().tolist():
        line = []
        for i in range(n):
            acc = Fraction(0)
            for block, start in enumerate(range(0, k, 128)):
                xs, factor = row[start : start + 128], Fraction(scales[i // 128][block])
                if not weight.weight_only:
                    amax = max(abs(v) for v in xs)
                    scale = f32(Fraction(amax) / 448) if amax >= 2.0**-117 else Fraction(1)
                    inverse = f32(1 / scale)
                    xs = [nearest_e4m3(f32(Fraction(v) * inverse)) for v in xs]
                    factor = f32(scale * factor)
                dot = f32(
                    sum(Fraction(a) * Fraction(b) for a, b in zip(xs, codes[i][start : start + 128], strict=True))
                )
                acc = f32(acc + f32(dot * factor))
            line.append(float(acc))
        out.append(line)
    return torch.tensor(out, dtype=torch.float64).to(torch.float32)


def make(n: int, k: int, seed: int, weight_only: bool, bias: bool = False) -> FP8Weight:
    g = torch.Generator().manual_seed(seed)
    return FP8Weight(
        (torch.randn(n, k, generator=g) * 80).to(F8),
        torch.rand(*fp8_grid(n, k), generator=g) * 0.01 + 1e-4,
        None,
        torch.randn(n, generator=g) if bias else None,
        weight_only,
    )


@settings(max_examples=80, deadline=None)
@given(
    n=st.sampled_from((1, 3, 130)),
    k=st.sampled_from((1, 100, 128, 129, 300)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    weight_only=st.booleans(),
    exponent=st.integers(-8, 6),
    seed=st.integers(0, 2**32),
)
def test_against_fractions(n, k, dtype, weight_only, exponent, seed):
    weight = make(n, k, seed, weight_only)
    weight = FP8Weight(weight.weight[-3:], weight.weight_scale[-1:], weight_only=weight_only)  # few rows: it is slow
    x = torch.randn(2, k, generator=torch.Generator().manual_seed(seed + 1))
    x[1] *= torch.exp2(torch.tensor(exponent) * (torch.arange(k) // 128))
    assert_same_bits(linear(x.to(dtype), weight, out_dtype=torch.float32), oracle(x.to(dtype), weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_of_activations(dtype: torch.dtype) -> None:
    """The identity shows the codes; dividing instead would change about twenty of these in bfloat16."""
    x = torch.randn(300, 128, generator=torch.Generator().manual_seed(11)).to(dtype)
    got = linear(x, FP8Weight(torch.eye(128).to(F8), torch.ones(1, 1)), out_dtype=torch.float32)
    for row, y in zip(x.float().tolist(), got.tolist(), strict=True):
        scale = f32(Fraction(max(abs(v) for v in row)) / 448)
        codes = [nearest_e4m3(f32(Fraction(v) * f32(1 / scale))) for v in row]
        assert y == [float(f32(code * scale)) for code in codes]


@pytest.mark.parametrize("weight_only", [False, True])
def test_each_row_of_blocks_has_its_scale(weight_only: bool) -> None:
    weight = make(300, 200, 0, weight_only)
    x = torch.randn(2, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = linear(x, weight, out_dtype=torch.float32)
    for row in (0, 127, 128, 255, 256, 299):
        one = FP8Weight(weight.weight[row : row + 1], weight.weight_scale[row // 128][None], None, None, weight_only)
        assert_same_bits(got[:, row : row + 1], oracle(x, one), f"row {row}")


@pytest.mark.parametrize("weight_only", [False, True])
def test_bias_and_output_type_come_last(weight_only: bool) -> None:
    weight = make(4, 300, 2, weight_only, bias=True)
    assert weight.bias is not None
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(3)).bfloat16()
    plain = FP8Weight(weight.weight, weight.weight_scale, weight_only=weight_only)
    assert_same_bits(linear(x, weight), (oracle(x, plain) + weight.bias).bfloat16())


@pytest.mark.parametrize("weight_only", [False, True])
def test_rows_do_not_depend_on_each_other(weight_only: bool) -> None:
    weight = make(140, 300, 4, weight_only, bias=True)
    x = torch.randn(70, 300, generator=torch.Generator().manual_seed(5)).bfloat16()
    x[5] = 0
    full = linear(x, weight)
    for i in range(70):
        assert_same_bits(full[i : i + 1], linear(x[i : i + 1], weight), f"row {i}")


def test_nothing_but_zeros_is_plus_zero() -> None:
    weight = make(3, 200, 6, False)
    assert_same_bits(linear(-torch.zeros(2, 200), weight), torch.zeros(2, 3))


def test_nan_and_infinity_show_in_their_row_only() -> None:
    weight = make(3, 300, 7, False)
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(8))
    clean = linear(x, weight)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[1, 140] = bad
        got = linear(x, weight)
        assert_same_bits(got[1], torch.full((3,), torch.nan))
        assert_same_bits(got[[0, 2]], clean[[0, 2]])


def test_a_group_of_next_to_nothing_is_zeros() -> None:
    weight = make(3, 256, 9, False)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(10))
    x[0, :128], x[0, 0] = 1e-38, 0.0
    rest = x.clone()
    rest[0, :128] = 0
    assert_same_bits(linear(x, weight), linear(rest, weight))
