"""Causal attention of a batch of sequences over a paged KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.formats import e4m3
from anyfp4.ops import elementary, exact

#: query tokens whose scores are held at a time
_QUERY_TILE = 256


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """Which tokens belong to which sequence, and where the keys and values of each lie.

    The T tokens of a step are the new tokens of S sequences, one sequence after another; the last new token of
    sequence s has position ``context_len[s] − 1``.

    Attributes:
        query_start: int32 [S + 1], the first token of each sequence in the step, then T.
        context_len: int32 [S], keys of each sequence, those of this step's tokens included.
        block_table: int32 [S, B], the cache block that holds positions b·block_size … of sequence s.
        slots: int64 [T], block × block_size + offset of each token's own key and value.
    """

    query_start: Tensor
    context_len: Tensor
    block_table: Tensor
    slots: Tensor


def write_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: float, v_scale: float
) -> None:
    """Stores the keys and values of a step in the cache, in place.

    An FP8 cache holds E4M3(k × (1 / k_scale)), saturating; any other holds k itself.

    Args:
        k: [T, Hkv, D].
        v: [T, Hkv, D].
        k_cache: [blocks, block_size, Hkv, D].
        v_cache: likewise.
        slots: int64 [T].
        k_scale: multiplier of an FP8 cache's keys; 1 otherwise.
        v_scale: likewise, of the values.
    """
    for new, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if new.shape[1:] != cache.shape[2:] or new.shape[0] != slots.shape[0]:
            raise InvalidArgumentError(
                f"{list(new.shape)} with {slots.shape[0]} slots does not fit the cache {list(cache.shape)}"
            )
        flat = cache.view(-1, *cache.shape[2:])
        if cache.dtype == torch.float8_e4m3fn:
            inverse = torch.tensor(1.0, dtype=torch.float32) / torch.tensor(scale, dtype=torch.float32)
            stored = e4m3.encode(new.to(torch.float32) * inverse.to(new.device))
            flat.view(torch.uint8)[slots] = stored.view(torch.uint8)
        else:
            flat[slots] = new.to(cache.dtype)


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """softmax(q·kᵀ × scale) · v for every query token over the keys up to its own position.

    Scores, the sum of the exponentials and the weighted values are exact sums rounded once (``ops.exact``), so the
    result does not depend on how a prompt was cut into steps, nor on the cache's blocks.

    Args:
        q: [T, H, D]; query head h reads KV head h // (H / Hkv).
        k_cache: [blocks, block_size, Hkv, D], in the model's dtype or float8_e4m3fn.
        v_cache: likewise.
        batch: sequences of the step.
        scale: of the scores, usually 1/√D.
        sliding_window: a query sees this many positions, itself included; None for all.
        k_scale: multiplier of the cached keys.
        v_scale: multiplier of the cached values.

    Returns:
        [T, H, D], dtype of ``q``.

    Raises:
        InvalidArgumentError: shapes do not fit.
    """
    heads, kv_heads = q.shape[1], k_cache.shape[2]
    if q.dim() != 3 or q.shape[-1] != k_cache.shape[-1] or heads % kv_heads or k_cache.shape != v_cache.shape:
        raise InvalidArgumentError(
            f"q {list(q.shape)} does not fit caches {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    out = torch.empty_like(q)
    starts, lengths = batch.query_start.tolist(), batch.context_len.tolist()
    block_size = k_cache.shape[1]
    for s, length in enumerate(lengths):
        blocks = batch.block_table[s, : math.ceil(length / block_size)].to(torch.int64)
        # [Hkv, L, D] and [Hkv, D, L]
        k = gather(k_cache, blocks)[:length].transpose(0, 1)
        v = gather(v_cache, blocks)[:length].permute(1, 2, 0)
        begin, end = starts[s], starts[s + 1]
        for i in range(begin, end, _QUERY_TILE):
            j = min(i + _QUERY_TILE, end)
            first = length - (end - i)
            out[i:j] = _attend(q[i:j], k, v, first, scale * k_scale, sliding_window, v_scale)
    return out


def gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """The given cache blocks, one after another: [len(blocks) × block_size, Hkv, D]."""
    if cache.dtype == torch.float8_e4m3fn:  # torch cannot index float8
        return cache.view(torch.uint8)[blocks].flatten(0, 1).view(torch.float8_e4m3fn)
    return cache[blocks].flatten(0, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, first: int, scale: float, sliding_window: int | None, v_scale: float
) -> Tensor:
    """One sequence's queries [m, H, D] at positions first …, keys [Hkv, L, D], values [Hkv, D, L]: [m, H, D]."""
    m, heads, dim = q.shape
    kv_heads, length, _ = k.shape
    group = heads // kv_heads
    # query heads of one KV head become rows: [Hkv, group·m, D]
    rows = q.view(m, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, group * m, dim)
    scores = exact.matmul(rows, k) * torch.tensor(scale, dtype=torch.float32, device=q.device)
    position = torch.arange(first, first + m, device=q.device).repeat(group).unsqueeze(-1)  # [group·m, 1]
    key = torch.arange(length, device=q.device)
    hidden = key > position
    if sliding_window is not None:
        hidden |= key <= position - sliding_window
    scores.masked_fill_(hidden, -torch.inf)
    weights = elementary.exp(scores - scores.amax(dim=-1, keepdim=True))
    values = _weighted_values(weights, v, hidden) / exact.total(weights).unsqueeze(-1)
    values = values * torch.tensor(v_scale, dtype=torch.float32, device=q.device)
    return values.view(kv_heads, group, m, dim).permute(2, 0, 1, 3).reshape(m, heads, dim).to(q.dtype)


def _weighted_values(weights: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """Σ weight × value over the keys that each row sees.

    Args:
        weights: float32 [Hkv, rows, L], zero where hidden.
        v: [Hkv, D, L].
        hidden: bool [rows, L].

    Returns:
        float32 [Hkv, rows, D].
    """
    v32 = v.to(torch.float32)
    if bool(torch.isfinite(v32).all()):
        return exact.matmul(weights, v32)
    # 0 × NaN is NaN: a value that a row does not see must not reach it, so every row gets its own values
    rows = [exact.matmul(weights[:, i : i + 1], v32.masked_fill(hidden[i], 0.0)) for i in range(hidden.shape[0])]
    return torch.cat(rows, dim=1)
