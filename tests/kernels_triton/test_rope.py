"""Rotary embedding and cache write in Triton, alone and fused, against the readable reference: every bit."""

from __future__ import annotations

import pytest
import torch

from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels.triton import kv_cache, norm, rope
from anyfp4.ops import attention as reference_attention
from anyfp4.ops import rope as reference
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels.cases import DTYPES, generator

CACHES = (*DTYPES, torch.float8_e4m3fn)


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "half"), [(1, 1, 1), (5, 3, 8), (3, 6, 40), (2, 40, 64)])
def test_rope(device: torch.device, tokens: int, heads: int, half: int, dtype: torch.dtype) -> None:
    qkv, table = rand(tokens, heads + 2, 2 * half, seed=heads, dtype=dtype), rand(50, 2, half, seed=1)
    positions = torch.randint(0, 50, (tokens,), generator=generator(2))
    on = [t.to(device) for t in (qkv, positions, table)]
    for cut in (slice(None), slice(0, heads), slice(1, None)):
        got = rope.apply_rope(on[0][:, cut], on[1], on[2])
        assert_same_bits(got.cpu(), reference.apply_rope(qkv[:, cut], positions, table))
    whole = rope.apply_rope(*on)
    for i in range(tokens):
        assert_same_bits(rope.apply_rope(on[0][i : i + 1], on[1][i : i + 1], on[2]), whole[i : i + 1])


def test_a_position_outside_the_table_shows(device: torch.device) -> None:
    x, table = rand(3, 2, 16, seed=3).to(device), rand(10, 2, 8, seed=4).to(device)
    y = rope.apply_rope(x, torch.tensor([9, 10, -1], device=device), table)
    assert y[0].isfinite().all()
    assert y[1:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", CACHES)
def test_write_kv(device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    k, v = (rand(7, 3, 20, seed=s) * 100 for s in (5, 6))
    k[0, 0, :6] = torch.tensor([1e30, -1e30, 0.0, -0.0, 0.0009, 50.0])
    k, v = k.to(dtype), v.to(dtype)
    shape = (4, 8, 3, 20)
    expected, got = ([torch.zeros(shape).to(cache_dtype) for _ in range(2)] for _ in range(2))
    got = [c.to(device) for c in got]
    slots = torch.randperm(32, generator=generator(7))[:7]
    reference_attention.write_kv(k, v, *expected, slots, 0.3, 0.07)
    kv_cache.write_kv(k.to(device), v.to(device), *got, slots.to(device), 0.3, 0.07)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(as_bytes(a), as_bytes(b))


def test_every_midpoint_of_an_fp8_cache(device: torch.device) -> None:
    """All finite E4M3 numbers, what lies halfway between neighbours, and the float32 numbers beside it."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (codes[1:] + codes[:-1]) / 2
    inf = torch.tensor(torch.inf)
    x = torch.cat((codes, middle, middle.nextafter(inf), middle.nextafter(-inf), torch.tensor([464.0, 1e9, torch.inf])))
    x = torch.cat((x, -x, torch.tensor([torch.nan])))
    k = torch.cat((x, torch.zeros(-x.numel() % 8))).view(-1, 1, 8)
    slots = torch.arange(k.shape[0])
    expected, got = (torch.zeros(k.shape[0], 1, 1, 8).to(torch.float8_e4m3fn) for _ in range(2))
    reference_attention.write_kv(k, k, expected, expected.clone(), slots, 1.0, 1.0)
    got = got.to(device)
    kv_cache.write_kv(k.to(device), k.to(device), got, got.clone(), slots.to(device))
    assert torch.equal(got.cpu().float().isnan(), expected.float().isnan())
    kept = ~expected.float().isnan()
    assert_same_bits(as_bytes(got)[kept], as_bytes(expected)[kept])


def test_a_slot_outside_the_cache_is_not_stored(device: torch.device) -> None:
    k = torch.ones(3, 1, 8, device=device)
    caches = [torch.zeros(2, 4, 1, 8, device=device) for _ in range(2)]
    kv_cache.write_kv(k, k, *caches, torch.tensor([-1, 3, 8], device=device))
    for cache in caches:
        assert cache.sum().item() == 8
        assert cache.view(8, 8)[3].tolist() == [1.0] * 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (6, 1, 80), (40, 8, 64)])
def test_fused(
    device: torch.device, heads: int, kv_heads: int, dim: int, with_norm: bool, cache_dtype: torch.dtype | None,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    tokens = 5
    qkv = rand(tokens, heads + 2 * kv_heads, dim, seed=dim, dtype=dtype).to(device)
    positions = torch.randint(0, 30, (tokens,), generator=generator(8)).to(device)
    table = rand(30, 2, dim // 2, seed=9).to(device)
    slots = torch.randperm(16, generator=generator(10))[:tokens].to(device)
    shape = (2, 8, kv_heads, dim)
    expected, got = ([torch.zeros(shape).to(cache_dtype or dtype).to(device) for _ in range(2)] for _ in range(2))
    norms = [rand(dim, seed=s, dtype=dtype).to(device) for s in (11, 12)] if with_norm else [None, None]
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    if norms[0] is not None and norms[1] is not None:
        q, k = norm.rms_norm(q, norms[0], 1e-5), norm.rms_norm(k, norms[1], 1e-5)
    q, k = rope.apply_rope(q, positions, table), rope.apply_rope(k, positions, table)
    kv_cache.write_kv(k, v, *expected, slots, 0.3, 0.7)

    def fused(i: slice, caches: list[torch.Tensor]) -> torch.Tensor:
        return rope.rope_and_write(
            qkv[i], positions[i], table, *caches, slots[i], q_norm=norms[0], k_norm=norms[1], eps=1e-5, k_scale=0.3,
            v_scale=0.7,
        )  # fmt: skip

    assert_same_bits(fused(slice(None), got).cpu(), q.cpu())
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(as_bytes(a), as_bytes(b))
    alone = [torch.zeros_like(c) for c in got]
    for i in range(tokens):
        assert_same_bits(fused(slice(i, i + 1), alone).cpu(), q[i : i + 1].cpu())
    for a, b in zip(alone, expected, strict=True):
        assert_same_bits(as_bytes(a), as_bytes(b))


def test_bad_arguments(device: torch.device) -> None:
    x, table = torch.zeros(2, 6, 8, device=device), torch.zeros(9, 2, 4, device=device)
    positions = torch.zeros(2, dtype=torch.int64, device=device)
    cache = torch.zeros(2, 4, 2, 8, device=device)
    with pytest.raises(InvalidArgumentError, match=r"must be \[T, H, 8\]"):
        rope.apply_rope(x[:, :, :6], positions, table)
    with pytest.raises(InvalidArgumentError, match=r"positions must be torch\.int64"):
        rope.apply_rope(x, positions.int(), table)
    with pytest.raises(InvalidArgumentError, match=r"k .* does not fit"):
        kv_cache.write_kv(x, x, cache, cache, positions)
    with pytest.raises(InvalidArgumentError, match="the caches must be"):
        kv_cache.write_kv(x, x, cache, cache[:, :, :1], positions)
    with pytest.raises(InvalidArgumentError, match="must be positive"):
        kv_cache.write_kv(x[:, :2], x[:, :2], *(cache.to(torch.float8_e4m3fn),) * 2, positions, 0.0, 1.0)
    with pytest.raises(InvalidArgumentError, match=r"qkv .* does not fit"):
        rope.rope_and_write(x[:, :4], positions, table, cache, cache, positions)
    with pytest.raises(InvalidArgumentError, match="together"):
        rope.rope_and_write(x, positions, table, cache, cache, positions, q_norm=torch.zeros(8, device=device))
