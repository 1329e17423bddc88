"""Norms, activation, rotary embedding, cache, attention and log-softmax against the readable reference: every bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyfp4.backends.base import Backend
from anyfp4.backends.cpu import CpuBackend
from anyfp4.ops import exact
from anyfp4.ops.attention import AttentionBatch
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels import cases

REFERENCE = Backend()
SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rms_norm(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition with numpy's square root, which is the correctly rounded one; torch's may come from a library."""
    mean = exact.square_sum(x) / x.shape[-1]
    inverse = np.float32(1) / np.sqrt((mean + eps).numpy())
    return (x.float() * torch.from_numpy(inverse).unsqueeze(-1) * w.float()).to(x.dtype)


@SETTINGS
@given(
    rows=st.integers(1, 5),
    k=st.integers(1, 700),
    dtype=st.sampled_from(cases.DTYPES),
    w_dtype=st.sampled_from(cases.DTYPES),
    octaves=st.integers(0, 30),
    seed=st.integers(0, 2**32),
)
def test_rms_norm(backend: CpuBackend, rows, k, dtype, w_dtype, octaves, seed):
    g = cases.generator(seed)
    spread = torch.exp2(torch.rand(rows, k, generator=g) * octaves - octaves / 2)
    x = (torch.randn(rows, k, generator=g) * spread).to(dtype)
    residual = torch.randn(rows, k, generator=g).to(dtype)
    w = torch.randn(k, generator=g).to(w_dtype)
    assert_same_bits(backend.rms_norm(x, w, 1e-5), rms_norm(x, w, 1e-5))
    y, total = backend.add_rms_norm(x, residual, w, 1e-6)
    assert_same_bits(total, REFERENCE.add_rms_norm(x, residual, w, 1e-6)[1])
    assert_same_bits(y, rms_norm(total, w, 1e-6))


@SETTINGS
@given(
    rows=st.integers(1, 4),
    width=st.integers(1, 600),
    dtype=st.sampled_from(cases.DTYPES),
    scale=st.sampled_from((1.0, 30.0, 1000.0)),
    seed=st.integers(0, 2**32),
)
def test_silu_mul(backend: CpuBackend, rows, width, dtype, scale, seed):
    x = (torch.randn(rows, 2 * width, generator=cases.generator(seed)) * scale).to(dtype)
    assert_same_bits(backend.silu_mul(x), REFERENCE.silu_mul(x))


def test_silu_mul_of_every_bfloat16(backend: CpuBackend):
    gate = torch.arange(0x10000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate[~gate.isnan()]
    x = torch.cat((gate, torch.ones_like(gate)))
    got, expected = backend.silu_mul(x), REFERENCE.silu_mul(x)
    # −∞ / (1 + e^∞) is a NaN, whose sign IEEE 754 leaves open
    assert torch.equal(got.isnan(), expected.isnan())
    assert_same_bits(got[~got.isnan()], expected[~expected.isnan()])


@SETTINGS
@given(
    tokens=st.integers(1, 6),
    heads=st.integers(1, 4),
    half=st.integers(1, 70),
    dtype=st.sampled_from(cases.DTYPES),
    seed=st.integers(0, 2**32),
)
def test_rope(backend: CpuBackend, tokens, heads, half, dtype, seed):
    g = cases.generator(seed)
    qkv = torch.randn(tokens, heads + 2, 2 * half, generator=g).to(dtype)
    table = torch.randn(50, 2, half, generator=g)
    positions = torch.randint(0, 50, (tokens,), generator=g)
    for x in (qkv, qkv[:, :heads], qkv[:, 1:]):
        assert_same_bits(backend.apply_rope(x, positions, table), REFERENCE.apply_rope(x, positions, table))


@SETTINGS
@given(
    rows=st.integers(1, 3), n=st.integers(1, 3000), scale=st.sampled_from((0.1, 5.0, 80.0)), seed=st.integers(0, 2**32)
)
def test_log_softmax(backend: CpuBackend, rows, n, scale, seed):
    x = torch.randn(rows, n, generator=cases.generator(seed)) * scale
    assert_same_bits(backend.log_softmax(x), REFERENCE.log_softmax(x))


def make_batch(fresh: list[int], lengths: list[int], block_size: int, g: torch.Generator) -> tuple[AttentionBatch, int]:
    """Sequences with their blocks scattered over the cache; and how many blocks the cache has."""
    needed = [math.ceil(n / block_size) for n in lengths]
    blocks = sum(needed) + 3
    order = torch.randperm(blocks, generator=g).tolist()
    table = torch.zeros(len(lengths), max(needed) + 1, dtype=torch.int32)
    slots = []
    for s, count in enumerate(needed):
        mine = [order.pop() for _ in range(count)]
        table[s, :count] = torch.tensor(mine, dtype=torch.int32)
        slots += [mine[p // block_size] * block_size + p % block_size for p in range(lengths[s] - fresh[s], lengths[s])]
    starts = torch.tensor([0, *torch.tensor(fresh).cumsum(0).tolist()], dtype=torch.int32)
    batch = AttentionBatch(starts, torch.tensor(lengths, dtype=torch.int32), table, torch.tensor(slots))
    return batch, blocks


@settings(SETTINGS, max_examples=25)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=3),
    group=st.sampled_from((1, 3, 8)),
    kv_heads=st.integers(1, 3),
    dim=st.sampled_from((8, 20, 64, 80)),
    block_size=st.sampled_from((1, 16)),
    dtype=st.sampled_from(cases.DTYPES),
    fp8=st.booleans(),
    window=st.sampled_from((None, 1, 20)),
    scale=st.sampled_from((0.125, 3.0)),
    seed=st.integers(0, 2**32),
)
def test_attention(backend: CpuBackend, sequences, group, kv_heads, dim, block_size, dtype, fp8, window, scale, seed):
    g = cases.generator(seed)
    fresh, lengths = [f for f, _ in sequences], [f + old for f, old in sequences]
    batch, blocks = make_batch(fresh, lengths, block_size, g)
    shape = (blocks, block_size, kv_heads, dim)
    caches = [torch.randn(shape, generator=g) for _ in range(2)]
    caches = [c.to(dtype if not fp8 else torch.float8_e4m3fn) for c in caches]
    k_scale, v_scale = (0.7, 1.3) if fp8 else (1.0, 1.0)
    q, k, v = (torch.randn(sum(fresh), h, dim, generator=g).to(dtype) for h in (group * kv_heads, kv_heads, kv_heads))
    copies = [c.clone() for c in caches]
    backend.write_kv(k, v, *caches, batch.slots, k_scale, v_scale)
    REFERENCE.write_kv(k, v, *copies, batch.slots, k_scale, v_scale)
    for cache, copy in zip(caches, copies, strict=True):
        assert_same_bits(cache, copy)
    options = {"scale": scale, "sliding_window": window, "k_scale": k_scale, "v_scale": v_scale}
    got, expected = (b.attention(q, *caches, batch, **options) for b in (backend, REFERENCE))
    assert_same_bits(got, expected)


@pytest.mark.parametrize("cut", [1, 7, 64])
def test_attention_does_not_depend_on_how_a_prompt_is_cut(backend: CpuBackend, cut):
    g = cases.generator(3)
    n, heads, dim = 130, 6, 64
    q, k, v = (torch.randn(n, h, dim, generator=g).bfloat16() for h in (heads, 2, 2))

    def run(step: int) -> torch.Tensor:
        blocks = math.ceil(n / 16)
        caches = torch.zeros(2, blocks, 16, 2, dim, dtype=torch.bfloat16)
        table = torch.arange(blocks, dtype=torch.int32).unsqueeze(0)
        parts = []
        for i in range(0, n, step):
            j = min(i + step, n)
            batch = AttentionBatch(
                torch.tensor([0, j - i], dtype=torch.int32),
                torch.tensor([j], dtype=torch.int32),
                table,
                torch.arange(i, j),
            )
            backend.write_kv(k[i:j], v[i:j], caches[0], caches[1], batch.slots)
            parts.append(backend.attention(q[i:j], caches[0], caches[1], batch, scale=0.125))
        return torch.cat(parts)

    assert_same_bits(run(cut), run(n))


def test_attention_with_values_that_are_not_finite(backend: CpuBackend):
    g = cases.generator(4)
    batch, blocks = make_batch([1, 1], [40, 25], 16, g)
    k, v = (torch.randn(blocks, 16, 1, 16, generator=g) for _ in range(2))
    q = torch.randn(2, 2, 16, generator=g)
    q[0, 0, 3] = torch.inf
    slot = int(batch.block_table[1, 0])
    v[slot, 2, 0, 5] = torch.inf
    v[slot, 2, 0, 6] = torch.nan
    got, expected = (b.attention(q, k, v, batch, scale=0.25) for b in (backend, REFERENCE))
    assert torch.equal(got.isnan(), expected.isnan())
    assert_same_bits(got[~got.isnan()], expected[~expected.isnan()])
