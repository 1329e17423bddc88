# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""The inner part of attention: the state of one tile of keys, and merging tiles. See ``attention.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from anyfp4.kernels.triton.elementary import sum_halves
from anyfp4.kernels.triton.kv_cache import cached_rows
from anyfp4.kernels.triton.numbers import rounded

#: a tile has 2 to the power of this many keys at most
_LEVELS = tl.constexpr(10)


@triton.jit
def rows_of_tile(p_table, start, highest, kv_head, kv_heads, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Rows of the cache with the keys of the tile at ``start``: int32 [TILE], up to the key ``highest``.

    No key past that is read: the cache and the table may hold anything there.
    """
    i = tl.arange(0, TILE)
    present = start + i <= highest
    if TILE % BLOCK_SIZE == 0:
        block = tl.load(p_table + start // BLOCK_SIZE + i // BLOCK_SIZE, mask=present, other=0)
        inside = i % BLOCK_SIZE
    else:
        block = tl.load(p_table + (start + i) // BLOCK_SIZE, mask=present, other=0)
        inside = (start + i) % BLOCK_SIZE
    return (block * BLOCK_SIZE + inside) * kv_heads + kv_head


@triton.jit
def scores(
    q, k, start, position, lowest, highest, window, TILE: tl.constexpr, WINDOW: tl.constexpr, INTERPRET: tl.constexpr
):
    """q·k, float32 [ROWS, TILE]; −∞ where a row may not look.

    q is [ROWS, DIM], k [TILE, DIM]; position int32 [ROWS], from ``lowest`` to ``highest``.
    """
    s = product(q, tl.trans(k), INTERPRET)
    hides = start + TILE > lowest + 1
    if WINDOW:
        hides = hides | (start <= highest - window)
    if hides:
        key = start + tl.arange(0, TILE)
        visible = key[None, :] <= position[:, None]
        if WINDOW:
            visible = visible & (key[None, :] > position[:, None] - window)
        s = tl.where(visible, s, -float("inf"))
    return s


@triton.jit
def weights(s, scale, SUMS: tl.constexpr, PV: tl.constexpr, INTERPRET: tl.constexpr):
    """(maximum, sums of the weights, weights in PV) of a tile: float32 [ROWS], [ROWS, SUMS], [ROWS, TILE]."""
    m = tl.max(s, axis=1) * scale
    p = tl.exp2(tl.fma(s, tl.zeros_like(s) + scale, -(tl.zeros_like(s) + _base(m)[:, None])))
    mass = p
    for _ in tl.static_range(_LEVELS):
        if mass.shape[1] > SUMS:
            # in the result of tl.dot a thread has the numbers of a pair, until few columns are left
            mass = tl.sum(tl.reshape(mass, (mass.shape[0], 2, mass.shape[1] // 2)), axis=1)
    return m, mass, rounded(p, PV) if INTERPRET else p.to(PV)


@triton.jit
def visible_values(
    p, p_v_cache, p_table, column, rows, present, start, position, highest, kv_head, kv_heads, window,
    D: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    PV: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """p·v for some columns, float32 [ROWS, COLUMNS]: what is not finite is added key by key, to rows that see it."""
    v = cached_rows(p_v_cache, rows, present, column, D, COLUMNS, False, PV)
    finite = tl.abs(v.to(tl.float32)) < float("inf")
    acc = product(p, tl.where(finite, v, tl.zeros_like(v)), INTERPRET)
    if tl.max(tl.max(tl.where(finite, 0, 1), axis=1), axis=0) > 0:
        i, one = tl.arange(0, TILE), tl.arange(0, 1)
        for key in range(start, tl.minimum(start + TILE, highest + 1)):
            row = (tl.load(p_table + key // BLOCK_SIZE + one) * BLOCK_SIZE + key % BLOCK_SIZE) * kv_heads + kv_head
            v_key = cached_rows(p_v_cache, row, one == 0, column, D, COLUMNS, False, PV).to(tl.float32)
            apart = (tl.abs(v_key) < float("inf")) == 0
            if tl.max(tl.max(apart.to(tl.int32), axis=1), axis=0) > 0:
                weight = tl.sum(tl.where((i == key - start)[None, :], p.to(tl.float32), 0.0), axis=1)
                visible = key <= position
                if WINDOW:
                    visible = visible & (key > position - window)
                acc += tl.where(visible[:, None] & apart, weight[:, None] * v_key, 0.0)
    return acc


@triton.jit
def product(a, b, INTERPRET: tl.constexpr):
    """a·b on matrix units, float32.

    The interpreter gets bfloat16 wrong, and its float32 products depend on the number of rows: it multiplies float64.
    """
    if INTERPRET:
        y = tl.dot(a.to(tl.float64), b.to(tl.float64)).to(tl.float32)
    else:
        y = tl.dot(a, b, input_precision="ieee")
    return y


@triton.jit
def merge(m_a, mass_a, acc_a, m_b, mass_b, acc_b):
    """The state after another tile: maxima [R], sums [R, SUMS], weighted values [R, DIM]; b is the later one.

    A tile that a row does not see (m_b = −∞, all else 0) leaves its numbers as they are, but for the sign of a zero.
    """
    m = tl.maximum(m_a, m_b)
    base = _base(m)
    alpha, beta = tl.exp2(m_a - base)[:, None], tl.exp2(m_b - base)[:, None]
    mass = tl.fma(mass_b, tl.zeros_like(mass_b) + beta, mass_a * alpha)
    acc = tl.fma(acc_b, tl.zeros_like(acc_b) + beta, acc_a * alpha)
    return m, mass, acc


@triton.jit
def finished(mass, acc, v_scale, dtype: tl.constexpr):
    """acc / Σ mass × v_scale in the output's type; a NaN is always the same NaN, a row that saw no key is zero."""
    total = sum_halves(mass)
    y = tl.div_rn(acc, tl.zeros_like(acc) + tl.where(total == 0.0, 1.0, total)[:, None]) * v_scale
    # tiles of which a row sees nothing may change the sign of a zero
    y = tl.where(y == 0.0, 0.0, y)
    return rounded(tl.where(y == y, y, float("nan")), dtype)


@triton.jit
def _base(m):
    """−∞ while a row has seen nothing, and then not to be subtracted."""
    return tl.where(m == -float("inf"), 0.0, m)
