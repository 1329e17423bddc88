"""Unquantized, weight-only NVFP4 and FP8 linears against the readable reference: every bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyfp4.backends.cpu import CpuBackend
from anyfp4.formats.weights import DenseWeight, FP8Weight
from anyfp4.ops import linear
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels import cases

SETTINGS = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(backend: CpuBackend, x, weight, out_dtype=torch.float32):
    got = backend.linear(x, backend.prepare(weight), out_dtype)
    assert_same_bits(got, linear.linear(x, weight, out_dtype=out_dtype))


@SETTINGS
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 200),
    m=st.integers(1, 6),
    dtype=st.sampled_from(cases.DTYPES),
    w_dtype=st.sampled_from(cases.DTYPES),
    cancel=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_dense(backend: CpuBackend, n, k, m, dtype, w_dtype, cancel, bias, seed):
    g = cases.generator(seed)
    w = torch.randn(n, k, generator=g)
    x = torch.randn(m, k, generator=g)
    if cancel:  # sums near zero, or exactly halfway between two numbers: the exact path
        w = torch.round(w * 2) * torch.exp2(torch.randint(-12, 13, (n, k), generator=g).float())
        x = torch.round(x * 2)
        w[:, k // 2 :] = -w[:, : k - k // 2].clone()
        x[:, k // 2 :] = x[:, : k - k // 2].clone()
    weight = DenseWeight(w.to(w_dtype), torch.randn(n, generator=g) if bias else None)
    check(backend, x.to(dtype), weight)


@SETTINGS
@given(
    n=st.integers(1, 40),
    blocks=st.integers(1, 20),
    m=st.integers(1, 6),
    dtype=st.sampled_from(cases.DTYPES),
    spread=st.sampled_from(cases.SPREADS),
    shards=st.integers(1, 3),
    pre=st.sampled_from((None, torch.bfloat16)),
    seed=st.integers(0, 2**32),
)
def test_weight_only(backend: CpuBackend, n, blocks, m, dtype, spread, shards, pre, seed):
    k = 16 * blocks
    weight = cases.nvfp4_weight(n, k, spread, seed, shards=shards, weight_only=True, bias=True, pre=pre)
    x = cases.activation(m, k, spread, dtype, seed)
    check(backend, x, weight, dtype)
    check(backend, x, weight)


@SETTINGS
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 200),
    m=st.integers(1, 6),
    dtype=st.sampled_from(cases.DTYPES),
    inputs=st.sampled_from(("static", "dynamic", "weight-only")),
    per_row=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_fp8(backend: CpuBackend, n, k, m, dtype, inputs, per_row, seed):
    weight = cases.fp8_weight(n, k, seed, inputs=inputs, per_row=per_row, bias=True)
    x = torch.randn(m, k, generator=cases.generator(seed + 1)).to(dtype)
    x[0] *= 1000
    x[m - 1, k // 2 :] = 0
    check(backend, x, weight)


def test_fp8_weights_that_are_nan(backend: CpuBackend):
    codes = torch.randn(9, 200, generator=cases.generator(0)).to(torch.float8_e4m3fn)
    codes.view(torch.uint8)[2, 3], codes.view(torch.uint8)[7, 199] = 0x7F, 0xFF
    x = torch.randn(4, 200, generator=cases.generator(1)).bfloat16()
    for inputs in (torch.tensor([0.02]), None):
        weight = FP8Weight(codes, torch.tensor([0.5]), inputs)
        for m in (1, 4):
            check(backend, x[:m], weight)


def test_fp8_rows_of_next_to_nothing(backend: CpuBackend):
    """A dynamic scale whose reciprocal would be infinite: the row is zeros, not NaN."""
    x = torch.tensor([[1e-38, 0.0, -3e-39], [1e-35, 0.0, 1e-44], [0.0, 0.0, 0.0]])
    weight = FP8Weight(torch.ones(2, 3).to(torch.float8_e4m3fn), torch.ones(1))
    check(backend, x, weight)
    assert linear.linear(x, weight).isfinite().all()


@pytest.mark.parametrize("w_dtype", cases.DTYPES)
def test_halfway_sums_are_rounded_once(backend: CpuBackend, w_dtype):
    """2¹² + 2⁻¹² is halfway between two float32 numbers; a last product decides, or the even neighbour wins."""
    k = 64
    w = torch.zeros(5, k)
    w[:, 0], w[:, 1] = 2.0**12, 1.0
    w[1, 40], w[2, 40], w[3, 63], w[4, 2] = 2.0**-14, -(2.0**-14), 2.0**-20, 1.0
    x = torch.zeros(2, k)
    x[:, 0], x[:, 1], x[:, 2], x[:, 40], x[:, 63] = 1.0, 2.0**-12, 2.0**-11, 2.0**-60, 2.0**-100
    check(backend, x, DenseWeight(w.to(w_dtype)))
    check(backend, x[:1], DenseWeight(w.to(w_dtype)))


@pytest.mark.parametrize("w_dtype", cases.DTYPES)
def test_special_values(backend: CpuBackend, w_dtype):
    g = cases.generator(0)
    w = torch.randn(11, 80, generator=g).to(w_dtype)
    w[1, 3], w[2, 70], w[3, 5], w[3, 6] = torch.inf, torch.nan, torch.inf, -torch.inf
    w[4] = torch.finfo(w_dtype).smallest_normal / 2  # subnormal
    w[5] = torch.finfo(w_dtype).max
    w[6] = 0
    x = torch.randn(6, 80, generator=g)
    x[1, 7], x[2, 7], x[3] = torch.inf, torch.nan, 0
    x[4] = 2.0**-140
    x[5] = 3e38
    for m in (6, 1):
        check(backend, x[-m:], DenseWeight(w))
        check(backend, x[:m], DenseWeight(w))


def test_rows_are_the_same_in_every_batch(backend: CpuBackend):
    g = cases.generator(1)
    weight = DenseWeight(torch.randn(90, 576, generator=g).bfloat16())
    x = torch.randn(150, 576, generator=g).bfloat16()
    prepared = backend.prepare(weight)
    alone = torch.cat([backend.linear(row, prepared, torch.float32) for row in x.split(1)])
    for m in (2, 3, 4, 63, 64, 65, 150):
        assert_same_bits(backend.linear(x[:m], prepared, torch.float32), alone[:m], f"M = {m}")
    assert_same_bits(alone, linear.linear(x, weight, out_dtype=torch.float32))
