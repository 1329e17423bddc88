"""The compiled W4A4 linear against the readable reference: every bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyfp4.backends.cpu import CpuBackend
from anyfp4.ops import linear
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels import cases

SETTINGS = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the fixture sets the same state for all examples
)


@SETTINGS
@given(
    n=st.integers(1, 70),
    blocks=st.integers(1, 40),
    m=st.integers(1, 9),
    spread=st.sampled_from(cases.SPREADS),
    x_spread=st.sampled_from(cases.SPREADS),
    dtype=st.sampled_from(cases.DTYPES),
    out_dtype=st.sampled_from(cases.DTYPES),
    shards=st.integers(1, 3),
    bias=st.booleans(),
    pre=st.sampled_from((None, torch.bfloat16, torch.float32)),
    seed=st.integers(0, 2**32),
)
def test_equals_reference(
    backend: CpuBackend, n, blocks, m, spread, x_spread, dtype, out_dtype, shards, bias, pre, seed
):
    k = 16 * blocks
    weight = cases.nvfp4_weight(n, k, spread, seed, shards=shards, bias=bias, pre=pre)
    x = cases.activation(m, k, x_spread, dtype, seed)
    expected = linear.linear(x, weight, out_dtype=out_dtype)
    assert_same_bits(backend.linear(x, backend.prepare(weight), out_dtype), expected)


@pytest.mark.parametrize(("n", "k"), [(8, 16), (33, 48), (40, 576), (17, 1536)])
@pytest.mark.parametrize("spread", ["tame", "normal", "extreme"])
def test_each_row_is_the_same_in_every_batch(backend: CpuBackend, n, k, spread):
    weight = cases.nvfp4_weight(n, k, spread, seed=n)
    prepared = backend.prepare(weight)
    x = cases.activation(300, k, spread, torch.bfloat16, seed=k)
    alone = torch.cat([backend.linear(row, prepared, torch.float32) for row in x.split(1)])
    assert_same_bits(alone, linear.linear(x, weight, out_dtype=torch.float32))
    for m in (*range(2, 20), 63, 64, 65, 127, 128, 129, 255, 300):
        assert_same_bits(backend.linear(x[:m], prepared, torch.float32), alone[:m], f"M = {m}")


def test_slow_path_is_reached_and_equal(backend: CpuBackend):
    """Exponents 28 apart: a large accumulator first, then terms whose low bits fall under the truncation."""
    k, n = 4096, 48
    weight = cases.nvfp4_weight(n, k, "wide", seed=5)
    bits = torch.full((n, k // 16), 0x7E, dtype=torch.uint8)
    bits[:, 128:] = torch.randint(1, 9, (n, 128), generator=cases.generator(6), dtype=torch.uint8)
    weight.weight.block_scale.view(torch.uint8).copy_(bits)
    weight.weight.packed[:, : k // 4] = 0x77  # the largest code: the accumulator grows
    x = torch.full((3, k), 6.0 * 448 * 0.011)
    x[:, k // 2 :] = 0.011 * torch.randn(3, k // 2, generator=cases.generator(7)) * 0.01
    before = backend.native.slow_outputs()
    got = backend.linear(x, backend.prepare(weight), torch.float32)
    assert backend.native.slow_outputs() > before
    assert_same_bits(got, linear.linear(x, weight, out_dtype=torch.float32))


def test_tame_operands_never_take_the_slow_path(backend: CpuBackend):
    weight = cases.nvfp4_weight(64, 2048, "tame", seed=1)
    before = backend.native.slow_outputs()
    backend.linear(cases.activation(40, 2048, "tame", torch.bfloat16, 2), backend.prepare(weight))
    assert backend.native.slow_outputs() == before


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("m", [1, 5])
def test_nan_and_infinity(backend: CpuBackend, dtype, m):
    weight = cases.nvfp4_weight(37, 96, "tame", seed=3, bias=True)
    weight.weight.block_scale.view(torch.uint8)[4, 2] = 0x7F
    weight.weight.block_scale.view(torch.uint8)[9, 1] = 0xFF
    weight.weight.block_scale.view(torch.uint8)[11] |= 0x80  # the sign of a scale is ignored
    x = cases.activation(m, 96, "tame", dtype, seed=4)
    x[0, 17], x[m - 1, 40] = torch.inf, -torch.inf
    if m > 1:
        x[2, 50] = torch.nan
        x[3] = 0
    for out_dtype in cases.DTYPES:
        expected = linear.linear(x, weight, out_dtype=out_dtype)
        assert_same_bits(backend.linear(x, backend.prepare(weight), out_dtype), expected)


def test_views_and_empty(backend: CpuBackend):
    weight = cases.nvfp4_weight(24, 64, "tame", seed=8)
    prepared = backend.prepare(weight)
    storage = cases.activation(9, 128, "tame", torch.bfloat16, seed=9)
    for view in (storage[:, 1:65], storage[::2, 64:], storage[:8, :64].view(2, 4, 64), storage.T[:64].T):
        assert_same_bits(backend.linear(view, prepared), linear.linear(view, weight))
    odd = torch.empty(2 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 64).copy_(storage[:2, :64])  # unaligned
    assert_same_bits(backend.linear(odd, prepared), linear.linear(odd, weight))
    assert backend.linear(storage[:0, :64], prepared).shape == (0, 24)


def test_strided_weight(backend: CpuBackend):
    whole = cases.nvfp4_weight(64, 128, "tame", seed=10).weight
    part = type(whole)(whole.packed[::2, :32], whole.block_scale[::2, :4], whole.global_scale)
    weight = type(cases.nvfp4_weight(1, 16, "tame", seed=0))(part, torch.tensor([0.01]))
    x = cases.activation(3, 64, "tame", torch.float32, seed=11)
    assert_same_bits(backend.linear(x, backend.prepare(weight)), linear.linear(x, weight))


def test_prepared_weight_is_as_small_as_the_checkpoint(backend: CpuBackend):
    weight = cases.nvfp4_weight(1024, 2048, "tame", seed=12)
    assert backend.prepare(weight).nbytes < 1.03 * weight.nbytes
