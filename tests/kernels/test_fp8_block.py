"""Block-wise FP8 linears against the readable reference: every bit, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyfp4.backends.cpu import CpuBackend
from anyfp4.formats.weights import FP8Weight
from anyfp4.ops import linear
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels import cases

F8 = torch.float8_e4m3fn
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = st.one_of(st.integers(1, 40), st.integers(120, 140), st.integers(1, 400))


def check(backend: CpuBackend, x, weight, out_dtype=torch.float32):
    got = backend.linear(x, backend.prepare(weight), out_dtype)
    assert_same_bits(got, linear.linear(x, weight, out_dtype=out_dtype))


@SETTINGS
@given(
    n=SIZES,
    k=SIZES,
    m=st.integers(1, 6),
    dtype=st.sampled_from(cases.DTYPES),
    spread=st.sampled_from(cases.SPREADS),
    weight_only=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_random(backend: CpuBackend, n, k, m, dtype, spread, weight_only, bias, seed):
    weight = cases.fp8_block_weight(n, k, spread, seed, weight_only=weight_only, bias=bias)
    x = torch.randn(m, k, generator=cases.generator(seed + 1))
    if spread != "tame":  # groups of 128 as far apart as the dtype lets them
        x *= torch.exp2(torch.randint(-30, 15, (m, -(-k // 128)), generator=cases.generator(seed + 2)).float())[
            :, torch.arange(k) // 128
        ]
    x[m - 1, k // 2 :] = 0
    check(backend, x.to(dtype), weight, dtype)
    check(backend, x.to(dtype), weight)


@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize("k", [64, 128, 576, 640])
def test_rows_are_the_same_in_every_batch(backend: CpuBackend, weight_only: bool, k: int):
    weight = cases.fp8_block_weight(150, k, "tame", 1, weight_only=weight_only, bias=True)
    x = torch.randn(150, k, generator=cases.generator(2)).bfloat16()
    prepared = backend.prepare(weight)
    alone = torch.cat([backend.linear(row, prepared, torch.float32) for row in x.split(1)])
    for m in (2, 3, 4, 63, 64, 65, 129, 150):
        assert_same_bits(backend.linear(x[:m], prepared, torch.float32), alone[:m], f"M = {m}")
    assert_same_bits(alone, linear.linear(x, weight, out_dtype=torch.float32))


@pytest.mark.parametrize("m", [1, 5])
def test_sums_that_float64_cannot_decide(backend: CpuBackend, m: int):
    """Weight-only: 2¹² + 2⁻¹² is halfway between two float32 numbers, and what decides lies far below."""
    weight = torch.zeros(6, 200)
    weight[:, 0], weight[:, 1] = 64.0, 1.0
    weight[1, 40], weight[2, 40], weight[3, 63] = 1.0, -1.0, 448.0
    weight[4, :3], weight[5, 130:133] = torch.tensor([448.0, -448.0, 2.0**-9]), torch.tensor([448.0, -448.0, 1.0])
    x = torch.zeros(m, 200)
    x[:, 0], x[:, 1], x[:, 40], x[:, 63] = 64.0, 2.0**-12, 2.0**-100, -(2.0**-120)
    x[:, 130], x[:, 131], x[:, 132] = 2.0**60, 2.0**60, 2.0**-70
    x[m - 1, :3] = torch.tensor([3e38, 3e38, 1e-40])
    weight = FP8Weight(weight.to(F8), torch.tensor([[1.0, 0.5]]), weight_only=True)
    check(backend, x, weight)


@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize("m", [2, 7])
def test_special_values(backend: CpuBackend, weight_only: bool, m: int):
    weight = cases.fp8_block_weight(13, 300, "wide", 3, weight_only=weight_only, bias=True)
    codes = weight.weight.view(torch.uint8)
    codes[2, 3], codes[7, 299] = 0x7F, 0xFF
    codes[12] = 0
    assert weight.bias is not None
    weight.bias[5] = torch.nan
    for columns in ([(0, torch.inf)], [(290, torch.nan)], [(1, torch.inf), (200, -torch.inf)], [(3, 3e38), (4, 3e38)]):
        x = torch.randn(m, 300, generator=cases.generator(4))
        for column, value in columns:
            x[0, column] = value
        x[1] = 0
        check(backend, x, weight)
        check(backend, x[:1], weight)


def test_groups_of_next_to_nothing(backend: CpuBackend):
    """A group whose scale has no finite reciprocal becomes zeros; the others count."""
    x = torch.ones(3, 300)
    x[0, :128], x[1, 128:256], x[2, 256:] = 1e-38, 2.0**-118, 2.0**-117
    x[0, 5] = 0
    weight = cases.fp8_block_weight(5, 300, "tame", 5, weight_only=False)
    check(backend, x, weight)
    assert linear.linear(x, weight).isfinite().all()


def test_scales_that_underflow_and_overflow(backend: CpuBackend):
    """fl32(s_x s_w) rounds once, to a subnormal number or to infinity."""
    grid = torch.tensor([[1e-45, 3e38, 1.5e-38], [3e38, 2.0**-149, 1.0]])
    codes = torch.randn(130, 300, generator=cases.generator(6)).to(F8)
    x = torch.randn(3, 300, generator=cases.generator(7)) * torch.tensor([[1e-3], [1e6], [1e30]])
    for weight_only in (False, True):
        check(backend, x, FP8Weight(codes, grid, weight_only=weight_only))


def test_views_and_leading_axes(backend: CpuBackend):
    weight = cases.fp8_block_weight(260, 260, "tame", 8, weight_only=False)
    part = FP8Weight(weight.weight[4:250, 2:258], weight.weight_scale[:2, 1:])
    check(backend, torch.randn(2, 3, 256, generator=cases.generator(9)).bfloat16(), part)
    assert backend.prepare(part).nbytes >= 246 * 256 + 4 * 4
    assert backend.linear(torch.zeros(0, 256), backend.prepare(part)).shape == (0, 246)
