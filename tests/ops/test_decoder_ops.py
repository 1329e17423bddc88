"""Norm, activation, rotary, attention: against float64, and row by row by bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from anyfp4.errors import InvalidArgumentError
from anyfp4.formats import e4m3
from anyfp4.ops import activation, attention, norm, quantize, rope
from anyfp4.ops.attention import AttentionBatch
from anyfp4.testing.bitwise import assert_same_bits


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_do_not_depend_on_each_other(dtype: torch.dtype) -> None:
    x, y, w = rand(67, 96, dtype=dtype), rand(67, 96, seed=1, dtype=dtype), rand(96, seed=2, dtype=dtype)
    normed = norm.rms_norm(x, w, 1e-5)
    added, residual = norm.add_rms_norm(x, y, w, 1e-5)
    gated = activation.silu_mul(x)
    packed, scale = quantize.quantize_activation(x, torch.tensor(0.01))
    heads, positions = x.view(67, 3, 32), torch.arange(67) * 3
    table = torch.stack((torch.cos(torch.arange(300)[:, None] * 0.1 + torch.arange(16)), torch.rand(300, 16)), dim=1)
    rotated = rope.apply_rope(heads, positions, table)
    for i in range(67):
        r = slice(i, i + 1)
        assert_same_bits(norm.rms_norm(x[r], w, 1e-5), normed[r])
        one, one_residual = norm.add_rms_norm(x[r], y[r], w, 1e-5)
        assert_same_bits(one, added[r])
        assert_same_bits(one_residual, residual[r])
        assert_same_bits(activation.silu_mul(x[r]), gated[r])
        assert_same_bits(rope.apply_rope(heads[r], positions[r], table), rotated[r])
        one_packed, one_scale = quantize.quantize_activation(x[r], torch.tensor(0.01))
        assert_same_bits(one_packed, packed[r])
        assert_same_bits(one_scale, scale[r])


# --- values -------------------------------------------------------------------------------------------------------


def test_rms_norm_value() -> None:
    x, w = rand(9, 96, dtype=torch.float32), rand(96, seed=1, dtype=torch.float32)
    x64 = x.double()
    expected = x64 / torch.sqrt((x64 * x64).mean(-1, keepdim=True) + 1e-5) * w.double()
    # mean (sum and division), + eps, √, 1/·, ·x, ·w: 7 roundings of at most 2⁻²⁴ relative each (√ halves some)
    assert ((norm.rms_norm(x, w, 1e-5).double() - expected).abs() <= 7 * 2.0**-24 * expected.abs()).all()


def test_rms_norm_square_root_is_correctly_rounded() -> None:
    """numpy's square root is the processor's, which IEEE 754 requires to be right; torch's may not be."""
    x = (torch.rand(4000, 1, generator=torch.Generator().manual_seed(1)) + 0.5).to(torch.float32)
    mean = (x * x).numpy()  # K = 1: the sum is the square, rounded once
    expected = x * (1.0 / torch.from_numpy(np.sqrt(mean + np.float32(0.25))))
    assert_same_bits(norm.rms_norm(x, torch.ones(1), 0.25), expected)


def test_silu_mul_value() -> None:
    x = rand(9, 96, dtype=torch.float32) * 8
    gate, up = x.double().chunk(2, dim=-1)
    expected = gate / (1 + torch.exp(-gate)) * up
    # e⁻ᵍ, 1 + ·, /, ·: four roundings
    assert ((activation.silu_mul(x).double() - expected).abs() <= 4.1 * 2.0**-24 * expected.abs()).all()


def test_silu_mul_extremes() -> None:
    x = torch.tensor([[-200.0, 200.0, 0.0, 1.0, 1.0, 1.0]])
    assert activation.silu_mul(x).tolist() == [[-0.0, 200.0, 0.0]]


def make_cache(lengths: list[int], block_size: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int = 5):  # type: ignore[no-untyped-def]
    """Keys and values of each sequence, scattered over a shuffled paged cache."""
    g = torch.Generator().manual_seed(seed)
    counts = [math.ceil(n / block_size) for n in lengths]
    order = torch.randperm(sum(counts) + 3, generator=g).tolist()
    blocks = sum(counts) + 3
    k_cache = torch.full((blocks, block_size, kv_heads, dim), float("nan")).to(dtype)
    v_cache = k_cache.clone()
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    ks, vs = [], []
    for s, n in enumerate(lengths):
        mine = [order.pop() for _ in range(counts[s])]
        table[s, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        k, v = (torch.randn(n, kv_heads, dim, generator=g).to(torch.bfloat16) for _ in range(2))
        slots = torch.tensor([mine[p // block_size] * block_size + p % block_size for p in range(n)])
        attention.write_kv(k, v, k_cache, v_cache, slots, 1.0, 1.0)
        ks.append(k)
        vs.append(v)
    return k_cache, v_cache, table, ks, vs


def run(q, caches, table, lengths, counts, **options):  # type: ignore[no-untyped-def]
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    batch = AttentionBatch(starts, torch.tensor(lengths, dtype=torch.int32), table, torch.empty(0, dtype=torch.int64))
    return attention.attention(q, *caches, batch, scale=q.shape[-1] ** -0.5, **options)


@pytest.mark.parametrize("window", [None, 5])
def test_attention_value_and_invariance(window: int | None) -> None:
    lengths, counts = [37, 5, 290], [37, 1, 3]
    k_cache, v_cache, table, ks, vs = make_cache(lengths, 8, 2, 16, torch.bfloat16)
    q = rand(sum(counts), 6, 16, seed=9)
    got = run(q, (k_cache, v_cache), table, lengths, counts, sliding_window=window)
    row = 0
    for s, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for i in range(count):
            position = length - count + i
            first = 0 if window is None else max(0, position - window + 1)
            for h in range(6):
                k, v = (t[s][first : position + 1, h // 3].double() for t in (ks, vs))
                p = torch.softmax(k @ q[row, h].double() * 0.25, dim=0)
                expected = p @ v
                # float32 inside, one rounding to bfloat16 (2⁻⁸ relative) at the end
                assert ((got[row, h].double() - expected).abs() <= 2.0**-7.9 * expected.abs() + 1e-6).all()
            # the token alone, as one decode step over a shorter context: the same bits
            alone = run(
                q[row : row + 1], (k_cache, v_cache), table[s : s + 1], [position + 1], [1], sliding_window=window
            )
            assert_same_bits(alone, got[row : row + 1], f"sequence {s} position {position}")
            row += 1


def test_attention_of_an_fp8_cache() -> None:
    k, v = rand(10, 2, 16) * 3, rand(10, 2, 16, seed=1) * 3
    k_cache, v_cache = (torch.zeros(3, 4, 2, 16).to(torch.float8_e4m3fn) for _ in range(2))
    slots = torch.arange(10)
    attention.write_kv(k, v, k_cache, v_cache, slots, 0.05, 0.04)
    inverse = 1 / torch.tensor(0.05)
    assert_same_bits(k_cache.view(torch.uint8).view(12, 2, 16)[:10], e4m3.encode(k.float() * inverse).view(torch.uint8))
    q = rand(1, 4, 16, seed=2)
    table = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    got = run(q, (k_cache, v_cache), table, [10], [1], k_scale=0.05, v_scale=0.04)
    kd, vd = k_cache.float().view(12, 2, 16)[:10].double() * 0.05, v_cache.float().view(12, 2, 16)[:10].double() * 0.04
    for h in range(4):
        expected = torch.softmax(kd[:, h // 2] @ q[0, h].double() / 4, dim=0) @ vd[:, h // 2]
        assert ((got[0, h].double() - expected).abs() <= 2.0**-7.9 * expected.abs() + 1e-6).all()


def test_attention_chunks_agree() -> None:
    """A prompt in one piece or in any two gives the same bits for every token."""
    k_cache, v_cache, table, _, _ = make_cache([40], 8, 1, 16, torch.float32)
    q = rand(40, 2, 16, seed=3, dtype=torch.float32)
    whole = run(q, (k_cache, v_cache), table, [40], [40])
    for cut in (1, 13, 39):
        first = run(q[:cut], (k_cache, v_cache), table, [cut], [cut])
        second = run(q[cut:], (k_cache, v_cache), table, [40], [40 - cut])
        assert_same_bits(torch.cat((first, second)), whole, f"cut at {cut}")


@pytest.mark.parametrize("window", [None, 6])
def test_what_a_row_does_not_see_cannot_reach_it(window: int | None) -> None:
    """A NaN among the values of a later key, or of one that left the window, changes nothing."""
    k_cache, v_cache, table, _, _ = make_cache([20], 8, 1, 16, torch.float32)
    q = rand(20, 2, 16, seed=3, dtype=torch.float32)
    clean = run(q, (k_cache, v_cache), table, [20], [20], sliding_window=window)
    block, offset = int(table[0, 1]), 4  # position 12
    v_cache[block, offset] = float("nan")
    got = run(q, (k_cache, v_cache), table, [20], [20], sliding_window=window)
    last = 20 if window is None else 12 + window
    assert_same_bits(got[:12], clean[:12])
    assert got[12:last].isnan().all()
    assert_same_bits(got[last:], clean[last:])


def test_bad_shapes() -> None:
    with pytest.raises(InvalidArgumentError, match="weight must be"):
        norm.rms_norm(torch.zeros(2, 8), torch.zeros(9), 1e-5)
    with pytest.raises(InvalidArgumentError, match="alike"):
        norm.add_rms_norm(torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(8), 1e-5)
    with pytest.raises(InvalidArgumentError, match="even"):
        activation.silu_mul(torch.zeros(2, 7))
    with pytest.raises(InvalidArgumentError, match="positions"):
        rope.apply_rope(torch.zeros(2, 1, 8), torch.zeros(3, dtype=torch.int64), torch.zeros(9, 2, 4))
    with pytest.raises(InvalidArgumentError, match="does not fit"):
        run(torch.zeros(1, 3, 8), (torch.zeros(1, 4, 2, 8),) * 2, torch.zeros(1, 1, dtype=torch.int32), [1], [1])
    with pytest.raises(InvalidArgumentError, match="global_scale"):
        quantize.quantize_activation(torch.zeros(1, 16), torch.tensor(0.0))
