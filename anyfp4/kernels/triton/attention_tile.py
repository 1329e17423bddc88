# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""The inner part of attention: one tile of keys, one split of tiles, and merging splits. See ``attention.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from anyfp4.kernels.triton.elementary import sum_halves
from anyfp4.kernels.triton.kv_cache import cached_rows
from anyfp4.kernels.triton.numbers import rounded


@triton.jit
def attend_split(
    q, p_k_cache, p_v_cache, p_table, split, position, lowest, highest, first_key, block_size, kv_head, kv_heads,
    window, scale, D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    WINDOW: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Softmax state of rows over the keys of one split that they see.

    q is [ROWS, DIM] in QK; position int32 [ROWS], from ``lowest`` to ``highest``; ``first_key`` the first key that any
    row sees. Returns the maximum float32 [ROWS] (−∞ where a row sees nothing), the sum [ROWS] and the weighted values
    [ROWS, DIM].
    """
    m = tl.full((ROWS,), -float("inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    # tiles [begin, whole) and [whole_end, end) hide keys from some row; those between are seen whole by all rows
    begin = tl.maximum(split * SPLIT, first_key // TILE * TILE)
    end = tl.minimum(split * SPLIT + SPLIT, highest + 1)
    whole = begin
    if WINDOW:
        seen_by_all = tl.maximum(highest - window + 1, 0)
        whole = tl.minimum(tl.maximum(begin, (seen_by_all + TILE - 1) // TILE * TILE), (end + TILE - 1) // TILE * TILE)
        for start in range(begin, whole, TILE):
            m, mass, acc = _add_tile(
                q, m, mass, acc, p_k_cache, p_v_cache, p_table, start, position, highest, block_size, kv_head, kv_heads,
                window, scale, D, DIM, TILE, WINDOW, True, QK, PV, INTERPRET,
            )  # fmt: skip
    whole_end = tl.maximum(whole, tl.minimum((lowest + 1) // TILE * TILE, split * SPLIT + SPLIT))
    for start in range(whole, whole_end, TILE):
        m, mass, acc = _add_tile(
            q, m, mass, acc, p_k_cache, p_v_cache, p_table, start, position, highest, block_size, kv_head, kv_heads,
            window, scale, D, DIM, TILE, WINDOW, False, QK, PV, INTERPRET,
        )  # fmt: skip
    for start in range(whole_end, end, TILE):
        m, mass, acc = _add_tile(
            q, m, mass, acc, p_k_cache, p_v_cache, p_table, start, position, highest, block_size, kv_head, kv_heads,
            window, scale, D, DIM, TILE, WINDOW, True, QK, PV, INTERPRET,
        )  # fmt: skip
    return m, mass, acc


@triton.jit
def _add_tile(
    q, m, mass, acc, p_k_cache, p_v_cache, p_table, start, position, highest, block_size, kv_head, kv_heads, window,
    scale, D: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, HIDES: tl.constexpr,
    QK: tl.constexpr, PV: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of the recurrence; HIDES: some row may not see some key."""
    key = start + tl.arange(0, TILE)
    # no key past the last row's own is read: the cache may hold anything there
    present = key <= highest
    block = tl.load(p_table + key // block_size, mask=present, other=0)
    slot = block.to(tl.int64) * block_size + key % block_size
    at = (slot * kv_heads + kv_head) * D
    k = cached_rows(p_k_cache, at, present, D, DIM, HIDES, QK)
    v = cached_rows(p_v_cache, at, present, D, DIM, HIDES, PV)
    s = _product(q, tl.trans(k), tl.zeros((q.shape[0], TILE), tl.float32), INTERPRET)
    if HIDES:
        visible = key[None, :] <= position[:, None]
        if WINDOW:
            visible = visible & (key[None, :] > position[:, None] - window)
        s = tl.where(visible, s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
    # −∞ while a row has seen nothing
    base = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.exp2(tl.fma(s, tl.zeros_like(s) + scale, -(tl.zeros_like(s) + base[:, None])))
    alpha = tl.exp2(m - base)
    mass = mass * alpha + sum_halves(p)
    acc = acc * alpha[:, None]
    p = rounded(p, PV) if INTERPRET else p.to(PV)
    if HIDES:
        finite = tl.abs(v.to(tl.float32)) < float("inf")
        acc = _product(p, tl.where(finite, v, tl.zeros_like(v)), acc, INTERPRET)
        if tl.max(tl.max(tl.where(finite, 0, 1), axis=1), axis=0) > 0:
            acc = _add_infinite(
                p, acc, p_v_cache, p_table, start, position, highest, block_size, kv_head, kv_heads, window, D, DIM,
                TILE, WINDOW, PV,
            )  # fmt: skip
    else:
        acc = _product(p, v, acc, INTERPRET)
    return m_new, mass, acc


@triton.jit
def _add_infinite(
    p, acc, p_v_cache, p_table, start, position, highest, block_size, kv_head, kv_heads, window, D: tl.constexpr,
    DIM: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, PV: tl.constexpr,
):  # fmt: skip
    """Adds p × v for the values of a tile that are not finite, where they are visible: rare, so key by key."""
    i, one = tl.arange(0, TILE), tl.arange(0, 1)
    for key in range(start, tl.minimum(start + TILE, highest + 1)):
        slot = tl.load(p_table + key // block_size + one).to(tl.int64) * block_size + key % block_size
        v = cached_rows(p_v_cache, (slot * kv_heads + kv_head) * D, one == 0, D, DIM, True, PV).to(tl.float32)
        weight = tl.sum(tl.where((i == key - start)[None, :], p.to(tl.float32), 0.0), axis=1)
        visible = key <= position
        if WINDOW:
            visible = visible & (key > position - window)
        apart = visible[:, None] & ((tl.abs(v) < float("inf")) == 0)
        acc += tl.where(apart, weight[:, None] * v, 0.0)
    return acc


@triton.jit
def _product(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a·b on matrix units.

    The interpreter gets bfloat16 wrong, and its float32 products depend on the number of rows: it multiplies float64.
    """
    if INTERPRET:
        y = tl.dot(a.to(tl.float64), b.to(tl.float64), acc.to(tl.float64)).to(tl.float32)
    else:
        y = tl.dot(a, b, acc, input_precision="ieee")
    return y


@triton.jit
def merge(m_a, mass_a, acc_a, m_b, mass_b, acc_b):
    """The state after another split: maxima [R], sums [R], weighted values [R, DIM]."""
    m = tl.maximum(m_a, m_b)
    base = tl.where(m == -float("inf"), 0.0, m)
    alpha, beta = tl.exp2(m_a - base), tl.exp2(m_b - base)
    # a split of which a row sees nothing leaves it as it is, the sign of zero included
    seen = m_b != -float("inf")
    mass = tl.where(seen, mass_a * alpha + mass_b * beta, mass_a)
    acc = tl.where(seen[:, None], acc_a * alpha[:, None] + acc_b * beta[:, None], acc_a)
    return m, mass, acc
