"""W4A4 linear in blackwell numerics: the bits of ``numerics/blackwell.py``, which defines them, on any GPU.

A group of words is one chunk of 64 columns, a quarter of it one block. The product of two blocks, scales included, has
at most 20 significant bits and comes out of the matrix unit exactly (K = 16, accumulator zero), whatever its order of
adding and however it aligns. The four of a chunk and the accumulator add exactly in float64, and clearing 29 bits
truncates the sum to float32. That is the instruction's result as long as no term is cut at 2^(E−35);
``numerics/blackwell.py`` derives when that is certain: no accumulator reaches 2^(low + 28), and no row's scales spread
too far. Both are checked after the loop. If any output of a tile fails (none does in the models at hand), the tile is
computed again in 64-bit integers with every step written out.

A step of one output costs four conversions and four additions in float64, so this wants full-rate float64 to be fast.
Conversions run at a quarter of that rate on an H200, so half of them are done by shifts and masks (a fifth less time
for 64 tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.kernels.triton.epilogue import finish
from anyfp4.kernels.triton.layout import Tiles
from anyfp4.kernels.triton.linear_packed import code_bits, half_pair

#: words in a group
WORDS = 8
#: rows of a tile
ROWS = (16, 32, 64)


@dataclass(frozen=True, eq=False)
class Blocks:
    """A weight in words, for this kernel.

    Attributes:
        words: int32 [K/64, N, 8].
        scales: int32 [K/64, N, 1], magnitudes without NaN.
        low: int32 [N], the smallest exponent of a row's nonzero scales.
        high: int32 [N], the largest.
        tiles: by rows of a tile.
        k: columns.
        alpha: float32 [N]; NaN where a scale is.
        bias: float32 [N] or None.
    """

    words: Tensor
    scales: Tensor
    low: Tensor
    high: Tensor
    tiles: Mapping[int, Tiles]
    k: int
    alpha: Tensor
    bias: Tensor | None


@triton.jit
def _block_values(w, u, block: tl.constexpr, R: tl.constexpr):
    """code × scale × 2⁻⁷ of a block: words [R, 8], scale words [R] to float16 [R, 16]; exact, if subnormal too."""
    return _scaled_block(code_bits(w, block), u, block, R)


@triton.jit
def _any_block_values(w, u, block, R: tl.constexpr):
    """As above, for a block that is known at run time only: a quarter of the code."""
    t = tl.where(block == 0, code_bits(w, 0), code_bits(w, 1))
    t = tl.where(block == 2, code_bits(w, 2), t)
    t = tl.where(block == 3, code_bits(w, 3), t)
    return _scaled_block(t, u, block, R)


@triton.jit
def _scaled_block(t, u, block, R: tl.constexpr):
    values = tl.reshape(half_pair(t), (R, 16))
    s = (((u >> (8 * block)) & 0x7F) << 7).to(tl.uint16).to(tl.float16, bitcast=True) * 32768.0
    return values * s[:, None]


@triton.jit
def _exponent(bits):
    """Exponent of E4M3 bits as int32; zero and subnormal numbers have −6."""
    return tl.maximum((bits >> 3) & 15, 1) - 7


@triton.jit
def _token_scales(p_a, blocks, live, BM: tl.constexpr):
    """(low, high, NaN) of each token's block scales, as int32 [BM]."""
    i = tl.arange(0, 64)
    lowest = tl.full((BM,), 0x7F, tl.int32)
    highest = tl.zeros((BM,), tl.int32)
    for start in range(0, blocks, 64):
        mask = live[:, None] & (start + i[None, :] < blocks)
        bits = tl.load(p_a[:, None] + start + i[None, :], mask=mask, other=0).to(tl.int32)
        highest = tl.maximum(highest, tl.max(bits, axis=1))
        lowest = tl.minimum(lowest, tl.min(tl.where(bits == 0, 0x7F, bits), axis=1))
    return _exponent(lowest), _exponent(highest), (highest == 0x7F).to(tl.int32)


@triton.jit
def _truncated(v):
    """Float64 (zero or normal in float32) truncated to 24 bits."""
    return (v.to(tl.int64, bitcast=True) & -536870912).to(tl.float64, bitcast=True)


@triton.jit
def _cut(term, shift):
    """An int64 with its ``shift`` low bits truncated toward zero."""
    magnitude = (tl.where(term < 0, -term, term) >> shift) << shift
    return tl.where(term < 0, -magnitude, magnitude)


@triton.jit
def _slow_tile(p_x, p_a, p_w, p_s, N, K, chunks, live, BM: tl.constexpr, BN: tl.constexpr):
    """The tile's sums with every truncation: float64 [BN, BM]. In units of 2⁻²⁰ every term is an integer below 2⁶⁰."""
    j, zero = tl.arange(0, 16), tl.zeros((BM,), tl.int32)
    total = tl.zeros((BN, BM), tl.int64)
    for chunk in tl.range(0, chunks, num_stages=1):
        w = tl.load(p_w + chunk * tl.cast(N, tl.int64) * 8).to(tl.uint32, bitcast=True)
        u = tl.load(p_s + chunk * tl.cast(N, tl.int64)).to(tl.uint32, bitcast=True)
        # this path is long and rarely taken: not unrolled, and so not compiled for minutes
        blocks = tl.minimum(4, K // 16 - chunk * 4)
        # the exponent of the accumulator; zero has none
        exponent = ((total.to(tl.float64).to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1043
        largest = tl.where(total == 0, -139, exponent)
        for block in tl.range(0, blocks, num_stages=1):
            k = chunk * 64 + block * 16
            x = tl.load(p_x + k + j[None, :], mask=live[:, None] & (k + j[None, :] < K), other=0.0)
            a = tl.load(p_a + k // 16, mask=live & (k + zero < K), other=0).to(tl.int32)
            present = tl.dot(tl.abs(_any_block_values(w, u, block, BN)), tl.abs(x).T) > 0.0
            term = _exponent(((u >> (8 * block)) & 0x7F).to(tl.int32))[:, None] + _exponent(a)[None, :]
            largest = tl.maximum(largest, tl.where(present, term, -139))
        shift = tl.maximum(largest - 15, 0).to(tl.int64)
        total = _cut(total, shift)
        for block in tl.range(0, blocks, num_stages=1):
            k = chunk * 64 + block * 16
            x = tl.load(p_x + k + j[None, :], mask=live[:, None] & (k + j[None, :] < K), other=0.0)
            dot = tl.dot(_any_block_values(w, u, block, BN), x.T)
            dot = tl.where(dot == dot, dot, 0.0)
            total += _cut((dot.to(tl.float64) * 134217728.0).to(tl.int64), shift)
        # aligned to 2^(E−35), the sum has 48 bits at most: exact in float64
        total = _truncated(total.to(tl.float64)).to(tl.int64)
    return total.to(tl.float64) * 9.5367431640625e-07


@triton.jit
def _dot(p_x, w, u, k, block: tl.constexpr, live, K, BN: tl.constexpr, EVEN_K: tl.constexpr):
    """The product of one block, exact: float32 [BN, BM], × 2⁻⁷."""
    column = k + tl.arange(0, 16)[None, :]
    if EVEN_K:
        x = tl.load(p_x + column, mask=live[:, None], other=0.0)
    else:
        x = tl.load(p_x + column, mask=live[:, None] & (column < K), other=0.0)
    return tl.dot(_block_values(w, u, block, BN), x.T)


@triton.jit
def _widened(t):
    """Float32 ``t``, not subnormal, as float64 by its bits; 0 becomes ±2⁻¹²⁷, which no sum with a number here keeps."""
    bits = t.to(tl.int32, bitcast=True)
    high = ((bits >> 3) & -1879048193) + 0x38000000  # the sign, and 896 more in the exponent
    low = (bits << 29).to(tl.uint32, bitcast=True)
    return ((high.to(tl.int64) << 32) | low.to(tl.int64)).to(tl.float64, bitcast=True)


@triton.jit
def _finish(acc, p_y, p_alpha, p_bias, nan, n, end, m, M, N, BIAS: tl.constexpr):
    """Stores the float64 sums, or the instruction's NaN where a scale of the token is one."""
    not_a_number = tl.full(acc.shape, 0x7FFFFFFF, tl.int32).to(tl.float32, bitcast=True)
    y = tl.where(nan[None, :] != 0, not_a_number, acc.to(tl.float32))
    finish(y, p_y, p_alpha, p_bias, p_alpha, n, end, m, M, N, 1.0, False, BIAS)


@triton.jit(do_not_specialize=["M"])
def _blackwell_linear(
    p_x, p_a, p_w, p_s, p_low, p_high, p_y, p_alpha, p_bias, p_tiles, p_again, M, N, K, chunks,
    EVEN_K: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tile = p_tiles + 3 * tl.program_id(0)
    start, end, index = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    n = start + tl.arange(0, BN)
    near = tl.minimum(n, end - 1)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    live = m < M
    row = index.to(tl.int64) * M + m
    p_x += row[:, None] * K
    p_a += row * (K // 16)
    p_w += near[:, None] * 8 + tl.arange(0, 8)[None, :]
    p_s += near
    acc = tl.zeros((BN, BM), tl.float64)
    peak = tl.zeros((BN, BM), tl.int32)
    step = tl.cast(N, tl.int64)
    for chunk in range(chunks):
        w = tl.load(p_w + chunk * step * 8).to(tl.uint32, bitcast=True)
        u = tl.load(p_s + chunk * step).to(tl.uint32, bitcast=True)
        k = chunk * 64
        t0 = _dot(p_x, w, u, k, 0, live, K, BN, EVEN_K).to(tl.float64)
        t1 = _widened(_dot(p_x, w, u, k + 16, 1, live, K, BN, EVEN_K))
        t2 = _dot(p_x, w, u, k + 32, 2, live, K, BN, EVEN_K).to(tl.float64)
        t3 = _widened(_dot(p_x, w, u, k + 48, 3, live, K, BN, EVEN_K))
        # exact in any order; in this one the next chunk waits for a single addition
        acc = _truncated(acc + ((t0 + t1) + (t2 + t3)))
        # the upper words of magnitudes are in their order
        peak = tl.maximum(peak, (acc.to(tl.int64, bitcast=True) >> 32).to(tl.int32) & 0x7FFFFFFF)
    # what is left of zeros: every other sum is at least 2⁻²⁷
    acc = tl.where(tl.abs(acc) < 7.888609052210118e-31, 0.0, acc)
    low, high, nan = _token_scales(p_a, K // 16, live, BM)
    w_low, w_high = tl.load(p_low + near), tl.load(p_high + near)
    reached = (peak >> 20) - 1016  # exponent of 128 times the peak
    bad = (reached >= low[None, :] + w_low[:, None] + 28) | ((high - low)[None, :] + (w_high - w_low)[:, None] > 27)
    bad = bad & (nan == 0)[None, :]
    slot = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(p_again + slot, tl.max(tl.max(bad.to(tl.int32), axis=1), axis=0))
    _finish(acc * 128.0, p_y, p_alpha, p_bias, nan, n, end, m, M, N, BIAS)


@triton.jit(do_not_specialize=["M"])
def _blackwell_again(
    p_x, p_a, p_w, p_s, p_y, p_alpha, p_bias, p_tiles, p_again, M, N, K, chunks,
    BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tile = p_tiles + 3 * tl.program_id(0)
    start, end, index = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    n = start + tl.arange(0, BN)
    near = tl.minimum(n, end - 1)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    live = m < M
    row = index.to(tl.int64) * M + m
    p_x += row[:, None] * K
    p_a += row * (K // 16)
    p_w += near[:, None] * 8 + tl.arange(0, 8)[None, :]
    p_s += near
    if tl.load(p_again + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) != 0:
        acc = _slow_tile(p_x, p_a, p_w, p_s, N, K, chunks, live, BM, BN)
        _low, _high, nan = _token_scales(p_a, K // 16, live, BM)
        _finish(acc, p_y, p_alpha, p_bias, nan, n, end, m, M, N, BIAS)


def blackwell_linear(x: Tensor, scale: Tensor, weight: Blocks, out_dtype: torch.dtype) -> Tensor:
    """x · Wᵀ × alpha + bias.

    Args:
        x: float16 [Q, M, K], code × block_scale of each quantization of the activation.
        scale: uint8 [Q, M, K/16], its block scales.
        weight: N rows.
        out_dtype: of the result.

    Returns:
        [M, N].
    """
    _, m, k = x.shape
    chunks, n, _ = weight.words.shape
    y = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if m == 0:
        return y
    tokens, rows, warps, stages = _program(m, n)
    tiles = weight.tiles[rows].table
    grid = (tiles.shape[0], triton.cdiv(m, tokens))
    again = torch.empty(grid, dtype=torch.int32, device=x.device)
    bias, alpha = weight.bias, weight.alpha
    _blackwell_linear[grid](
        x, scale, weight.words, weight.scales, weight.low, weight.high, y, alpha, alpha if bias is None else bias,
        tiles, again, m, n, k, chunks, k % 64 == 0, bias is not None, tokens, rows, num_warps=warps, num_stages=stages,
        enable_fp_fusion=False,
    )  # fmt: skip
    _blackwell_again[grid](
        x, scale, weight.words, weight.scales, y, alpha, alpha if bias is None else bias, tiles, again, m, n, k, chunks,
        bias is not None, tokens, rows, num_warps=warps, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def _program(m: int, n: int) -> tuple[int, int, int, int]:
    """Tokens and rows of a tile, warps and stages; any gives the same bits, these were fast on an H200."""
    if m > 16:
        return 32, 64, 4, 3
    # with few programs the chain over K waits for itself: small ones; AMD's matrix units take 16 columns
    if m <= 8 or triton.cdiv(n, 16) * triton.cdiv(m, 8) <= 1100:
        return (16 if torch.version.hip else 8), 16, 1, 4
    return 16, 32, 2, 3
