# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""The paged KV cache: how keys and values are stored in it and read from it, and the kernel that stores them.

An FP8 cache is handed to kernels as bytes: they round to E4M3 by bits and widen by bits, so it works where Triton has
no such type (sm_80) and gives the same bytes everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels.triton.checks import FLOATS, check_device, check_dtype, check_float, on_device, power_of_two
from anyfp4.kernels.triton.numbers import e4m3_bits, rounded

#: elements of a token's row that a program treats at a time
_BLOCK = 1024


@triton.jit
def to_cache(x, inverse, dtype: tl.constexpr):
    """float32 x as the cache holds it: E4M3 bytes of x × inverse, saturating, or x itself rounded to ``dtype``."""
    if dtype == tl.uint8:
        scaled = x * inverse
        magnitude = tl.abs(scaled)
        code = e4m3_bits(tl.where(magnitude > 448.0, 448.0, magnitude))
        y = (code | ((scaled.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)
    else:
        y = rounded(x, dtype)
    return y


@triton.jit
def cached_rows(p_cache, row, live, column, D: tl.constexpr, DIM: tl.constexpr, ALL: tl.constexpr, dtype: tl.constexpr):
    """DIM numbers from ``column`` on of rows of D numbers: [R, DIM] of ``dtype``, zero past D; E4M3 widened exactly.

    Only the rows with live[i] are read, and the others are zero. ALL: no number lies past D.

    An FP8 cache comes as words of four bytes (:func:`as_words`). The compiler lays out operands of ``mma.sync`` by the
    width of what was loaded (and by half of it where it sees ``tl.join``): from bytes it would permute the columns
    within a step, and so the order of a sum, which it does not for ``wgmma``. From words it keeps the order of both.
    """
    row = row.to(tl.int64)[:, None]
    if p_cache.dtype.element_ty == tl.int32:
        d = column // 4 + tl.arange(0, DIM // 4)[None, :]
        mask = live[:, None] if ALL else live[:, None] & (d < D // 4)
        words = tl.load(p_cache + row * (D // 4) + d, mask=mask, other=0)
        bytes_ = (words[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]) & 0xFF
        bits = tl.reshape(bytes_, (words.shape[0], DIM))
        # in float32's places the seven low bits read as value × 2⁻¹²⁰, subnormal numbers too
        magnitude = ((bits & 0x7F) << 20) | ((bits & 0x80) << 24)
        value = magnitude.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2¹²⁰
        y = tl.where((bits & 0x7F) == 0x7F, float("nan"), value).to(dtype)
    else:
        d = column + tl.arange(0, DIM)[None, :]
        mask = live[:, None] if ALL else live[:, None] & (d < D)
        y = tl.load(p_cache + row * D + d, mask=mask, other=0.0).to(dtype)
    return y


@triton.jit
def _write_kv(
    p_k, p_v, p_k_cache, p_v_cache, p_slots, slots, width, k_stride, v_stride, k_inverse, v_inverse,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.where(column < width, tl.load(p_slots + token), -1)
    live = (slot >= 0) & (slot < slots)
    k = tl.load(p_k + token * k_stride + column, mask=live, other=0.0).to(tl.float32)
    v = tl.load(p_v + token * v_stride + column, mask=live, other=0.0).to(tl.float32)
    there = slot * width + column
    tl.store(p_k_cache + there, to_cache(k, k_inverse, p_k_cache.dtype.element_ty), mask=live)
    tl.store(p_v_cache + there, to_cache(v, v_inverse, p_v_cache.dtype.element_ty), mask=live)


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """See :func:`anyfp4.ops.attention.write_kv`. A token whose slot lies outside the cache is not stored."""
    check_caches(k_cache, v_cache)
    check_dtype("slots", slots, torch.int64)
    check_device(k=k, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots)
    for name, new in (("k", k), ("v", v)):
        check_float(name, new)
        if new.dim() != 3 or new.shape[1:] != k_cache.shape[2:] or slots.shape != new.shape[:1]:
            raise InvalidArgumentError(
                f"{name} {list(new.shape)} with slots {list(slots.shape)} does not fit the cache {list(k_cache.shape)}"
            )
    tokens, heads, dim = k.shape
    if k.numel() == 0:
        return
    width = heads * dim
    block = min(power_of_two(width), _BLOCK)
    k, v = _heads_together(k), _heads_together(v)
    with on_device(k):
        _write_kv[(tokens, triton.cdiv(width, block))](
            k, v, as_stored(k_cache), as_stored(v_cache), slots.contiguous(), k_cache.shape[0] * k_cache.shape[1],
            width, k.stride(0), v.stride(0), inverse_scale(k_scale, k_cache), inverse_scale(v_scale, v_cache),
            BLOCK=block, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    """Raises InvalidArgumentError unless both are contiguous [blocks, block_size, Hkv, D] of one cache dtype."""
    if (
        k_cache.dim() != 4
        or k_cache.shape != v_cache.shape
        or k_cache.dtype != v_cache.dtype
        or k_cache.dtype not in (*FLOATS, torch.float8_e4m3fn)
        or not (k_cache.is_contiguous() and v_cache.is_contiguous())
    ):
        raise InvalidArgumentError(
            "the caches must be contiguous [blocks, block_size, Hkv, D] in bfloat16, float16, float32 or "
            f"float8_e4m3fn, got {k_cache.dtype} {list(k_cache.shape)} and {v_cache.dtype} {list(v_cache.shape)}"
        )


def as_stored(cache: Tensor) -> Tensor:
    """The cache as kernels see it: an FP8 one as bytes."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def as_words(cache: Tensor) -> Tensor:
    """The cache as :func:`cached_rows` reads it: an FP8 one as words of four bytes."""
    return cache.view(torch.int32) if cache.dtype == torch.float8_e4m3fn else cache


def inverse_scale(scale: float, cache: Tensor) -> float:
    """1 / scale in float32 for an FP8 cache; other caches have no scale.

    Raises:
        InvalidArgumentError: the scale is not positive.
    """
    if cache.dtype != torch.float8_e4m3fn:
        return 1.0
    if not scale > 0:
        raise InvalidArgumentError(f"k_scale and v_scale must be positive, got {scale}")
    return (torch.tensor(1.0) / torch.tensor(scale, dtype=torch.float32)).item()


def _heads_together(x: Tensor) -> Tensor:
    """[T, H, D] with the heads of a token side by side in memory; a view if it can be."""
    strides = x.stride()
    if strides[2] == 1 and (strides[1] == x.shape[2] or x.shape[1] == 1):
        return x
    return x.contiguous()
