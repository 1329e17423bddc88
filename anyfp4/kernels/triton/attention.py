# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Causal attention over the paged cache, in prefill and decode, by one order of operations.

What is computed for one query row. The keys are cut at fixed absolute positions into splits of 256, and those into
tiles of 64 (fewer for wide heads). A split goes through its tiles in order with a running maximum m, sum of weights
(mass) and weighted values acc, in float32:

    s = q·k                           matrix units, columns in order
    m' = max(m, max(s) · scale)
    p = 2^(s · scale − m')            one fma, one exp2; scale includes log2(e)
    mass = mass · 2^(m − m') + Σ p    the sum by halves (``elementary.sum_halves``)
    acc = acc · 2^(m − m') + p·v      matrix units, keys in order; p rounded to the type of v (float16 for FP8)

and the splits are merged in order by the same rescaling. Where a tile hides all its keys from a row, m' = m and every
p is 0, so the row's state keeps its bits; hence it does not matter which tiles other rows of a program need, and a
token gives the same bits in a prompt of any chunking as alone. Nothing depends on how many rows a program holds but the
choice of matrix instruction: on NVIDIA before sm_100 all are one in their bits (K = 16 at a time), on AMD the launcher
asks for the 16-wide ones, and on sm_100 decode uses programs as large as prefill.

A hidden value must not reach a row: 0 × NaN is NaN. Tiles that every row of a program sees whole need no care. In the
others, values that are not finite are taken out of the product and added where they are visible.

Two ways through the splits, with the same bits: a program does all of them (prefill, many sequences), or programs share
them and a second kernel merges (few sequences).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.device import architecture
from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels.triton.attention_tile import attend_split, merge
from anyfp4.kernels.triton.checks import (
    check_device,
    check_dtype,
    check_float,
    interpreting,
    on_device,
    power_of_two,
    row_strides,
)
from anyfp4.kernels.triton.kv_cache import as_words, check_caches, write_kv
from anyfp4.kernels.triton.numbers import rounded
from anyfp4.ops.attention import AttentionBatch

__all__ = ["attention", "write_kv"]

#: keys of a split; part of the definition
SPLIT = 256
#: programs below which the splits of a sequence are shared among several
_FEW_PROGRAMS = 512
#: bytes that the partial results may take
MAX_SCRATCH = 256 << 20
_LOG2_E = 1.4426950408889634
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _sequence_of(p_start, place, SEQUENCES, GROUP, ROWS: tl.constexpr):
    """The last sequence s whose programs begin at or before ``place``.

    With ROWS = 1 and GROUP = 1 these are tokens; else sequence s has its first program at start · GROUP // ROWS + s,
    which leaves every sequence at least as many as it needs.
    """
    count = 0
    for i in range(0, SEQUENCES, 128):
        s = i + tl.arange(0, 128)
        start = tl.load(p_start + s, mask=s < SEQUENCES, other=0)
        if ROWS > 1:
            start = start * GROUP // ROWS + s
        count += tl.sum(((s < SEQUENCES) & (start <= place)).to(tl.int32), axis=0)
    return count - 1


@triton.jit
def _attend(
    p_q, p_k_cache, p_v_cache, p_start, p_length, p_table, p_out, p_m, p_mass, p_acc,
    SEQUENCES, table_stride, block_size, q_token, q_head, kv_heads, splits, window, scale, v_scale,
    GROUP: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr, PARTIAL: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    place, kv_head = tl.program_id(0), tl.program_id(1)
    s = _sequence_of(p_start, place, SEQUENCES, GROUP, ROWS)
    begin, length = tl.load(p_start + s), tl.load(p_length + s)
    tokens = tl.load(p_start + s + 1) - begin
    first_row = (place - (begin * GROUP // ROWS + s)) * ROWS
    if first_row >= tokens * GROUP:
        return
    row = first_row + tl.arange(0, ROWS)
    live = row < tokens * GROUP
    token = tl.minimum(row // GROUP, tokens - 1)
    position = length - tokens + token  # [ROWS]
    head = kv_head * GROUP + row % GROUP
    d = tl.arange(0, DIM)
    p_row = p_q + (begin + token).to(tl.int64) * q_token + head * q_head
    q = tl.load(p_row[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0).to(QK)

    lowest = length - tokens + first_row // GROUP
    highest = length - tokens + tl.minimum((first_row + ROWS - 1) // GROUP, tokens - 1)
    first_key = 0
    if WINDOW:
        first_key = tl.maximum(lowest - window + 1, 0)
    total_m = tl.full((ROWS,), -float("inf"), tl.float32)
    total_mass = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, DIM), tl.float32)
    out_row = (begin + token).to(tl.int64) * (kv_heads * GROUP) + head
    for split in range(first_key // SPLIT + tl.program_id(2), highest // SPLIT + 1, tl.num_programs(2)):
        m, mass, acc = attend_split(
            q, p_k_cache, p_v_cache, p_table + s.to(tl.int64) * table_stride, split, position, lowest, highest,
            first_key, block_size, kv_head, kv_heads, window, scale, D, DIM, ROWS, TILE, SPLIT, WINDOW, QK, PV,
            INTERPRET,
        )  # fmt: skip
        if PARTIAL:
            here = out_row * splits + split
            tl.store(p_m + here, m, mask=live)
            tl.store(p_mass + here, mass, mask=live)
            tl.store(p_acc + here[:, None] * DIM + d[None, :], acc, mask=live[:, None])
        else:
            total_m, total_mass, total = merge(total_m, total_mass, total, m, mass, acc)
    if not PARTIAL:
        y = _finished(total_mass, total, v_scale, p_out.dtype.element_ty)
        tl.store(p_out + out_row[:, None] * D + d[None, :], y, mask=live[:, None] & (d < D)[None, :])


@triton.jit
def _finished(mass, acc, v_scale, dtype: tl.constexpr):
    """acc / mass × v_scale in the output's type; a NaN is always the same NaN, a row that saw no key is zero."""
    y = tl.div_rn(acc, tl.zeros_like(acc) + tl.where(mass == 0.0, 1.0, mass)[:, None]) * v_scale
    return rounded(tl.where(y == y, y, float("nan")), dtype)


@triton.jit
def _merge_splits(
    p_start, p_length, p_m, p_mass, p_acc, p_out, SEQUENCES, heads, splits, window, v_scale,
    D: tl.constexpr, DIM: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    s = _sequence_of(p_start, token, SEQUENCES, 1, 1)
    position = tl.load(p_length + s) - tl.load(p_start + s + 1) + token
    first_key = 0
    if WINDOW:
        first_key = tl.maximum(position - window + 1, 0)
    one, d = tl.arange(0, 1), tl.arange(0, DIM)[None, :]
    row = token.to(tl.int64) * heads + head
    total_m = tl.full((1,), -float("inf"), tl.float32)
    total_mass = tl.zeros((1,), tl.float32)
    total = tl.zeros((1, DIM), tl.float32)
    for split in range(first_key // SPLIT, position // SPLIT + 1):
        here = row * splits + split + one
        acc = tl.load(p_acc + here[:, None] * DIM + d)
        total_m, total_mass, total = merge(total_m, total_mass, total, tl.load(p_m + here), tl.load(p_mass + here), acc)
    y = _finished(total_mass, total, v_scale, p_out.dtype.element_ty)
    tl.store(p_out + (row + one)[:, None] * D + d, y, mask=d < D)


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
    """See :func:`anyfp4.ops.attention.attention`; the order of operations is at the top of this module.

    Grids follow from the shapes alone, and nothing is copied to the host: safe to capture in a CUDA graph, whose
    replays may change the contents of ``batch``. A sequence may have no tokens (padding); a token that sees no key
    (context_len 0) gives zeros.
    """
    _check(q, k_cache, v_cache, batch, scale * k_scale, sliding_window)
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    sequences = batch.context_len.shape[0]
    if out.numel() == 0 or sequences == 0:
        return out
    q = row_strides(q)[0]
    block_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    group, padded = heads // kv_heads, max(16, power_of_two(dim))
    qk, pv = _operands(q.dtype, k_cache.dtype)
    splits = triton.cdiv(batch.block_table.shape[1] * block_size, SPLIT)
    arch = architecture(q.device)
    rows, options = program(arch, padded, qk.itemsize, tokens * group <= 16 * sequences)
    places = tokens * group // rows + sequences
    shared = 1
    if tokens * group <= 16 * sequences and tokens * heads * splits * (padded + 2) * 4 <= MAX_SCRATCH:
        shared = max(1, min(splits, triton.cdiv(_FEW_PROGRAMS, places * kv_heads)))
    size = tokens * heads * splits if shared > 1 else 0
    p_acc = torch.empty(size * padded, dtype=torch.float32, device=q.device) if size else out
    p_m, p_mass = torch.empty((2, size), dtype=torch.float32, device=q.device) if size else (out, out)
    window, table = sliding_window or 0, batch.block_table
    with on_device(q):
        _attend[(places, kv_heads, shared)](
            q, as_words(k_cache), as_words(v_cache), batch.query_start, batch.context_len, table, out, p_m, p_mass,
            p_acc, sequences, table.stride(0), block_size, q.stride(0), q.stride(1), kv_heads, splits, window,
            scale * k_scale * _LOG2_E, v_scale,
            GROUP=group, D=dim, DIM=padded, ROWS=rows, TILE=tile(padded, qk.itemsize), SPLIT=SPLIT,
            WINDOW=window > 0, PARTIAL=shared > 1, QK=_TYPES[qk], PV=_TYPES[pv], INTERPRET=interpreting(), **options,
        )  # fmt: skip
        if shared > 1:
            _merge_splits[(tokens, heads)](
                batch.query_start, batch.context_len, p_m, p_mass, p_acc, out, sequences, heads, splits, window,
                v_scale, D=dim, DIM=padded, SPLIT=SPLIT, WINDOW=window > 0, num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def tile(padded_dim: int, itemsize: int) -> int:
    """Keys of a tile, part of the definition: 64 where a row of keys has at most 256 bytes, fewer beyond."""
    return max(16, min(64, 64 * 256 // (padded_dim * itemsize)))


def program(arch: str, padded_dim: int, itemsize: int, few_rows: bool) -> tuple[int, dict[str, int | bool]]:
    """(rows of a program, launch options). ``few_rows``: the sequences of the step have 16 rows or fewer on average."""
    hip, same_size = arch.startswith("gfx"), arch.startswith(("sm_100", "sm_103"))
    options: dict[str, int | bool] = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
    if hip:
        options["matrix_instr_nonkdim"] = 16
    if few_rows and not same_size:
        if arch in ("sm_80", "sm_90"):
            options["num_stages"] = 3
        return 16, options
    if hip or same_size or itemsize == 4:
        return 64, options
    # as many rows as columns of values, or warps on Ampere would share rows and pass p through memory
    options["num_warps"] = 8
    return (128 if padded_dim <= 128 else 64), options


def _operands(q: torch.dtype, cache: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """The types in which q·k and p·v are multiplied; every operand but p is exact in its type."""
    if cache == torch.float8_e4m3fn:
        return q, torch.float32 if q == torch.float32 else torch.float16
    return (q if q == cache else torch.float32), cache


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, sliding_window: int | None
) -> None:
    check_float("q", q)
    check_caches(k_cache, v_cache)
    tensors = {name: getattr(batch, name) for name in ("query_start", "context_len", "block_table")}
    check_device(q=q, k_cache=k_cache, v_cache=v_cache, **tensors)
    for name, x in tensors.items():
        check_dtype(name, x, torch.int32)
        if not x.is_contiguous() and (name != "block_table" or x.stride(-1) != 1):
            raise InvalidArgumentError(f"{name} must have contiguous rows")
    if k_cache.dtype == torch.float8_e4m3fn and k_cache.shape[3] % 4:
        raise InvalidArgumentError(f"the head size of an FP8 cache must be a multiple of 4, got {list(k_cache.shape)}")
    if q.dim() != 3 or q.shape[2] != k_cache.shape[3] or not k_cache.shape[2] or q.shape[1] % k_cache.shape[2]:
        raise InvalidArgumentError(f"q {list(q.shape)} does not fit caches {list(k_cache.shape)}")
    sequences = batch.context_len.shape[0]
    if (
        batch.query_start.shape != (sequences + 1,)
        or batch.block_table.dim() != 2
        or batch.block_table.shape[0] != sequences
    ):
        raise InvalidArgumentError(
            f"query_start {list(batch.query_start.shape)} and block_table {list(batch.block_table.shape)} must be "
            f"[{sequences + 1}] and [{sequences}, B], as context_len is [{sequences}]"
        )
    if not 0 < scale < float("inf"):
        raise InvalidArgumentError(f"scale × k_scale must be positive and finite, got {scale}")
    if sliding_window is not None and sliding_window < 1:
        raise InvalidArgumentError(f"sliding_window must be at least 1, got {sliding_window}")
