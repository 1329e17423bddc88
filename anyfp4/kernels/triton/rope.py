# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Rotary embedding, bit for bit as ``ops/rope.py``; alone, and fused with the norms of q and k and the cache write.

The fused form reads q/k/v as the projection left them and writes rotated queries and the cache: one launch instead of
five, and every number moves once. It rounds where the separate ops round, so its bits are theirs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels.triton.checks import check_device, check_dtype, check_float, on_device, power_of_two, row_strides
from anyfp4.kernels.triton.dependency import overlapping, wait_for_inputs
from anyfp4.kernels.triton.elementary import sum_neighbours
from anyfp4.kernels.triton.kv_cache import as_stored, check_caches, inverse_scale, to_cache
from anyfp4.kernels.triton.norm import inverse_root
from anyfp4.kernels.triton.numbers import float32_of, rounded

#: elements of half heads that a program of the rotation alone holds
_TILE = 2048


@triton.jit
def _angles(p_positions, p_cos_sin, token, j, limit, HALF):
    """cos and sin of a token at columns j; NaN for a position outside the table, so that it shows."""
    position = tl.where(j < HALF, tl.load(p_positions + token), -1)
    inside = (position >= 0) & (position < limit)
    p_cos = p_cos_sin + position * 2 * HALF + j
    return tl.load(p_cos, mask=inside, other=float("nan")), tl.load(p_cos + HALF, mask=inside, other=float("nan"))


@triton.jit
def _apply_rope(
    p_x, p_positions, p_cos_sin, p_y, heads, limit, token_stride, head_stride, HALF,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, j = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    cos, sin = _angles(p_positions, p_cos_sin, token, j, limit, HALF)
    live = (head < heads)[:, None] & (j < HALF)[None, :]
    here = token * token_stride + head[:, None] * head_stride + j[None, :]
    a = tl.load(p_x + here, mask=live, other=0.0).to(tl.float32)
    b = tl.load(p_x + here + HALF, mask=live, other=0.0).to(tl.float32)
    there = (token * heads + head)[:, None] * (2 * HALF) + j[None, :]
    y = p_y.dtype.element_ty
    tl.store(p_y + there, rounded(a * cos[None, :] - b * sin[None, :], y), mask=live)
    tl.store(p_y + there + HALF, rounded(b * cos[None, :] + a * sin[None, :], y), mask=live)


def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """See :func:`anyfp4.ops.rope.apply_rope`. A position outside the table gives NaN (nothing is read there)."""
    half = _check(x, positions, cos_sin)
    tokens, heads, dim = x.shape
    y = torch.empty((tokens, heads, dim), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = row_strides(x)[0]
    block = power_of_two(half)
    at_once = min(power_of_two(heads), max(1, _TILE // block))
    with on_device(x):
        _apply_rope[(tokens, triton.cdiv(heads, at_once))](
            x, positions.contiguous(), cos_sin.contiguous(), y, heads, cos_sin.shape[0], x.stride(0), x.stride(1), half,
            HEADS=at_once, BLOCK=block, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return y


@triton.jit
def _store_cache(p_cache, slot, slots, head, heads, j, HALF, a, b, inverse, live):
    """Halves of heads [HEADS, BLOCK] into a token's place in a cache."""
    slots_of = tl.where(live, slot, -1)
    live = (slots_of >= 0) & (slots_of < slots)
    there = slot * heads * (2 * HALF) + head * (2 * HALF) + j
    tl.store(p_cache + there, to_cache(a, inverse, p_cache.dtype.element_ty), mask=live)
    tl.store(p_cache + there + HALF, to_cache(b, inverse, p_cache.dtype.element_ty), mask=live)


@triton.jit
def _squares(a, b, p_row, whole, live, EVEN: tl.constexpr):
    """Sums of the squares of whole heads [HEADS]; if their halves are no powers of two, heads are read once more."""
    if EVEN:
        a, b = a.to(tl.float64), b.to(tl.float64)
        squares = sum_neighbours(a * a) + sum_neighbours(b * b)
    else:
        x = float32_of(tl.load(p_row + whole, mask=live, other=0.0)).to(tl.float64)
        squares = sum_neighbours(x * x)
    return squares


@triton.jit
def _rope_and_write(
    p_qkv, p_positions, p_cos_sin, p_q_norm, p_k_norm, p_q, p_k_cache, p_v_cache, p_slots, heads, kv_heads, limit,
    slots, token_stride, HALF, k_inverse, v_inverse, eps,
    NORM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr = False,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position, slot = tl.load(p_positions + token), tl.load(p_slots + token)
    q_groups, kv_groups = tl.cdiv(heads, HEADS), tl.cdiv(kv_heads, HEADS)
    # a program has heads of one kind
    is_q, is_v = group < q_groups, group >= q_groups + kv_groups
    before = tl.where(is_q, 0, tl.where(is_v, heads + kv_heads, heads))
    group -= tl.where(is_q, 0, tl.where(is_v, q_groups + kv_groups, q_groups))
    head, j = group * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    present = head < tl.where(is_q, heads, kv_heads)
    live, dim = present & (j < HALF), 2 * HALF
    p_row = p_qkv + token * token_stride + (before + head) * dim
    a = float32_of(tl.load(p_row + j, mask=live, other=0.0))
    b = float32_of(tl.load(p_row + HALF + j, mask=live, other=0.0))
    if is_v:
        _store_cache(p_v_cache, slot, slots, head, kv_heads, j, HALF, a, b, v_inverse, live)
    else:
        x_dtype: tl.constexpr = p_qkv.dtype.element_ty
        if NORM:
            p_weight = tl.where(is_q, p_q_norm, p_k_norm) + j + head * 0
            weight_a = float32_of(tl.load(p_weight, mask=live, other=0.0))
            weight_b = float32_of(tl.load(p_weight + HALF, mask=live, other=0.0))
        # NaN for a position outside the table, so that it shows
        positions = tl.where(live, position, -1)
        inside = (positions >= 0) & (positions < limit)
        p_cos = p_cos_sin + position * dim + j + head * 0
        cos = tl.load(p_cos, mask=inside, other=float("nan"))
        sin = tl.load(p_cos + HALF, mask=inside, other=float("nan"))
        if NORM:
            whole = tl.arange(0, 2 * BLOCK)[None, :]
            squares = _squares(a, b, p_row, whole, present & (whole < dim), EVEN)
            inverse = inverse_root(squares, dim, eps)[:, None]
            a = float32_of(rounded(a * inverse * weight_a, x_dtype))
            b = float32_of(rounded(b * inverse * weight_b, x_dtype))
        first = rounded(a * cos - b * sin, x_dtype)
        second = rounded(b * cos + a * sin, x_dtype)
        if is_q:
            p_out = p_q + token * heads * dim + head * dim + j
            tl.store(p_out, first, mask=live)
            tl.store(p_out + HALF, second, mask=live)
        else:
            a, b = float32_of(first), float32_of(second)
            _store_cache(p_k_cache, slot, slots, head, kv_heads, j, HALF, a, b, k_inverse, live)


def rope_and_write(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Norm of q and k (if there are weights), rotation, and cache write of a step, from the fused projection.

    Args:
        qkv: [T, H + 2·Hkv, D], queries, keys and values side by side; rows of heads contiguous.
        positions: int64 [T].
        cos_sin: float32 [P, 2, D/2].
        k_cache: [blocks, block_size, Hkv, D].
        v_cache: likewise.
        slots: int64 [T]; a token whose slot lies outside the cache is not stored.
        q_norm: [D] or None.
        k_norm: [D] in the dtype of ``q_norm``, or None with it.
        eps: of the norms.
        k_scale: multiplier of an FP8 cache's keys.
        v_scale: likewise, of the values.

    Returns:
        The rotated queries, [T, H, D]: with the caches, the bits of ``rms_norm``, ``apply_rope`` and ``write_kv``.

    Raises:
        InvalidArgumentError: shapes or dtypes do not fit.
    """
    half = _check(qkv, positions, cos_sin)
    check_caches(k_cache, v_cache)
    check_dtype("slots", slots, torch.int64)
    check_device(qkv=qkv, k_cache=k_cache, v_cache=v_cache, slots=slots)
    tokens, every, dim = qkv.shape
    kv_heads = k_cache.shape[2]
    heads = every - 2 * kv_heads
    if heads < 1 or heads % kv_heads or k_cache.shape[3] != dim or slots.shape != positions.shape:
        raise InvalidArgumentError(
            f"qkv {list(qkv.shape)} with slots {list(slots.shape)} does not fit caches {list(k_cache.shape)}"
        )
    if (q_norm is None) != (k_norm is None):
        raise InvalidArgumentError("q_norm and k_norm must be given together")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_float(name, weight)
            check_device(qkv=qkv, **{name: weight})
            if weight.shape != (dim,) or weight.dtype != (q_norm.dtype if q_norm is not None else None):
                raise InvalidArgumentError(f"{name} must be [{dim}] in the dtype of q_norm, got {list(weight.shape)}")
    q = torch.empty((tokens, heads, dim), dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return q
    if qkv.stride(2) != 1 or qkv.stride(1) != dim:
        qkv = qkv.contiguous()
    block = power_of_two(half)
    # few tokens want many programs
    tile, warps = (256, 4) if tokens < 64 else (512, 2)
    at_once = min(power_of_two(heads), max(1, tile // block))
    groups = triton.cdiv(heads, at_once) + 2 * triton.cdiv(kv_heads, at_once)
    with on_device(qkv):
        _rope_and_write[(tokens, groups)](
            qkv, positions.contiguous(), cos_sin.contiguous(), qkv if q_norm is None else q_norm.contiguous(),
            qkv if k_norm is None else k_norm.contiguous(), q, as_stored(k_cache), as_stored(v_cache),
            slots.contiguous(), heads, kv_heads, cos_sin.shape[0], k_cache.shape[0] * k_cache.shape[1], qkv.stride(0),
            half, inverse_scale(k_scale, k_cache), inverse_scale(v_scale, v_cache), eps,
            NORM=q_norm is not None, HEADS=at_once, BLOCK=block, EVEN=block == half, num_warps=warps,
            enable_fp_fusion=False, **overlapping(qkv),
        )  # fmt: skip
    return q


def _check(x: Tensor, positions: Tensor, cos_sin: Tensor) -> int:
    """Checks what both forms take; returns half the size of a head."""
    check_float("x", x)
    check_dtype("positions", positions, torch.int64)
    check_dtype("cos_sin", cos_sin, torch.float32)
    check_device(x=x, positions=positions, cos_sin=cos_sin)
    half = cos_sin.shape[-1]
    if cos_sin.dim() != 3 or cos_sin.shape[1] != 2 or half == 0:
        raise InvalidArgumentError(f"cos_sin must be [P, 2, D/2], got {list(cos_sin.shape)}")
    if x.dim() != 3 or x.shape[-1] != 2 * half or positions.shape != x.shape[:1]:
        raise InvalidArgumentError(
            f"x {list(x.shape)} must be [T, H, {2 * half}] and positions {list(positions.shape)} [T]"
        )
    return half
