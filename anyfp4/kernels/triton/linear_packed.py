"""y = x · Wᵀ with W in words (``layout.py``), unpacked in the kernel: W4A4 in native numerics, weight-only, FP8.

The weight is the left operand: its rows are the M side of the matrix instruction and tokens the N side, so a few tokens
waste little of it, and on Hopper ``wgmma`` takes the unpacked weight from registers. A half word becomes two float16
numbers by one shift and one mask, and one ``mul.f16x2`` applies the block scale. The product is code × scale × 2⁻⁷: the
factor of 2⁻¹⁴ that the codes' places bring does not fit into the scale at once. Where a block scale is subnormal such a
product may be one too, which the matrix unit would align differently, so then (``SUBNORMAL``) 2⁷ is multiplied back
before the product; otherwise after it, with the same bits.

Every tile shape gives the same bits (order over K: ``layout.py``), so tiles may depend on M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.kernels.triton.epilogue import add_segments, scaled
from anyfp4.kernels.triton.layout import SEGMENT, Tiles, segments
from anyfp4.kernels.triton.numbers import rounded

#: rows of a tile
TILE = 64


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight in words.

    Attributes:
        words: int32 [groups, N, W].
        scales: int32 [groups · W/8, N], or None for FP8.
        subnormal: whether a block scale is subnormal.
        tiles: of ``TILE`` rows.
        large_tiles: of ``gemm.BN`` rows.
        k: columns.
        alpha: float32 [N].
        bias: float32 [N] or None.
    """

    words: Tensor
    scales: Tensor | None
    subnormal: bool
    tiles: Tiles
    large_tiles: Tiles
    k: int
    alpha: Tensor
    bias: Tensor | None

    @property
    def group(self) -> int:
        """Columns of a group."""
        return self.words.shape[2] * (4 if self.scales is None else 8)

    @property
    def unit(self) -> float:
        """What sums are multiplied by."""
        if self.scales is None:
            return 256.0
        return 1.0 if self.subnormal else 128.0


@triton.jit
def half_pair(t):
    """The two float16 numbers of each word, side by side: uint32 [R, W] to float16 [R, W, 2]."""
    # in this order LLVM joins the halves without swapping them on the way
    high = (t >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    low = (t & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def code_bits(w, quarter: tl.constexpr):
    """The codes of a quarter as the bits of float16 pairs, value × 2⁻¹⁴."""
    if quarter == 0:
        t = w & 0x8E008E00
    elif quarter == 1:
        t = (w << 3) & 0x8E008E00
    elif quarter == 2:
        t = ((w << 6) & 0x0E000E00) | ((w << 1) & 0x80008000)
    else:
        t = ((w << 9) & 0x0E000E00) | ((w << 2) & 0x80008000)
    return t


@triton.jit
def quarter_values(w, u, quarter: tl.constexpr, R: tl.constexpr, W: tl.constexpr, SUBNORMAL: tl.constexpr):
    """code × scale × 2⁻⁷ (or × 1) of a quarter: words [R, W], scale words [R] to float16 [R, 2·W]."""
    values = tl.reshape(half_pair(code_bits(w, quarter)), (R, 2 * W))
    # bytes read in float16's places are scale × 2⁻⁸
    if W == 32:
        even = half_pair((u << 7) & 0x7F807F80) * 32768.0
        odd = half_pair((u >> 1) & 0x7F807F80) * 32768.0
        s = tl.reshape(tl.join(even, odd), (R, 4))
    elif quarter % 2 == 0:
        s = half_pair((u << 7) & 0x7F807F80) * 32768.0
    else:
        s = half_pair((u >> 1) & 0x7F807F80) * 32768.0
    values = values * tl.reshape(tl.broadcast_to(s[:, :, None], (R, W // 8, 16)), (R, 2 * W))
    if SUBNORMAL:
        values = values * 128.0
    return values


@triton.jit
def byte_values(w, half: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """E4M3 × 2⁻⁸ of a half: words [R, W] to float16 [R, 2·W]."""
    if half == 0:
        t = w
    else:
        t = w << 8
    return tl.reshape(half_pair((t & 0x80008000) | ((t & 0x7F007F00) >> 1)), (R, 2 * W))


@triton.jit(do_not_specialize=["M"])
def _packed_linear(
    p_x, p_w, p_s, p_y, p_alpha, p_bias, p_row, p_tiles, M, N, K, GROUPS, SEGMENT_GROUPS, unit,
    BITS: tl.constexpr, W: tl.constexpr, SUBNORMAL: tl.constexpr, EVEN_K: tl.constexpr, PARTIAL: tl.constexpr,
    ROW: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = 4 if BITS == 4 else 2
    tile, segment = tl.program_id(0), tl.program_id(2)
    start, end, index = tl.load(p_tiles + 3 * tile), tl.load(p_tiles + 3 * tile + 1), tl.load(p_tiles + 3 * tile + 2)
    n = start + tl.arange(0, BN)
    # rows past the end repeat the last one: no mask on the loads
    near = tl.minimum(n, end - 1)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    live = m[:, None] < M
    column = tl.arange(0, 2 * W)
    first = segment * SEGMENT_GROUPS
    last = tl.minimum(first + SEGMENT_GROUPS, GROUPS)
    step = tl.cast(N, tl.int64) * W
    p_w += first * step + near[:, None] * W + tl.arange(0, W)[None, :]
    p_s += first * (step // 8) + near
    p_x += (index.to(tl.int64) * M + m[:, None]) * K + column[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for g in range(first, last):
        w = tl.load(p_w).to(tl.uint32, bitcast=True)
        for part in tl.static_range(PARTS):
            if BITS == 4:
                u = tl.load(p_s + (part * W // 32) * N).to(tl.uint32, bitcast=True)
                values = quarter_values(w, u, part, BN, W, SUBNORMAL)
            else:
                values = byte_values(w, part, BN, W)
            k = (g * PARTS + part) * 2 * W
            if EVEN_K:
                x = tl.load(p_x + k, mask=live, other=0.0)
            else:
                x = tl.load(p_x + k, mask=live & (column[None, :] + k < K), other=0.0)
            acc = tl.dot(values.to(x.dtype), x.T, acc)
        p_w += step
        p_s += step // 8
    written = (n[:, None] < end) & (m[None, :] < M)
    offset = m[None, :].to(tl.int64) * N + n[:, None]
    if PARTIAL:
        tl.store(p_y + segment.to(tl.int64) * M * N + offset, acc, mask=written)
    else:
        alpha = tl.load(p_alpha + near)[:, None]
        row = tl.load(p_row + m, mask=m < M, other=0.0)[None, :] if ROW else alpha
        bias = tl.load(p_bias + near)[:, None] if BIAS else alpha
        y = scaled(acc * unit, alpha, row, bias, ROW, BIAS)
        tl.store(p_y + offset, rounded(y, p_y.dtype.element_ty), mask=written)


def tokens_per_tile(m: int) -> int:
    """Tokens that one program takes; any number gives the same bits."""
    return int(max(16, min(64, triton.next_power_of_2(m))))


def packed_linear(
    x: Tensor, weight: Packed, out_dtype: torch.dtype, row: Tensor | None = None, tokens: int | None = None
) -> Tensor:
    """x · Wᵀ × alpha + bias.

    Args:
        x: [Q, M, K], one for each quantization of the activation: float16 code × block_scale; or, Q = 1, an
            unquantized activation in float16 or bfloat16, or float16 E4M3 values.
        weight: N rows.
        out_dtype: of the result.
        row: float32 [M], a factor of each token, or None.
        tokens: of a tile; by default by M.

    Returns:
        [M, N].
    """
    _, m, k = x.shape
    n, w = weight.words.shape[1:]
    y = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if m == 0:
        return y
    parts = segments(k)
    target = torch.empty((parts, m, n), dtype=torch.float32, device=x.device) if parts > 1 else y
    tokens = tokens or tokens_per_tile(m)
    alpha, bias = weight.alpha, weight.bias
    grid = (weight.tiles.table.shape[0], triton.cdiv(m, tokens), parts)
    _packed_linear[grid](
        x, weight.words, weight.words if weight.scales is None else weight.scales, target, alpha,
        alpha if bias is None else bias, alpha if row is None else row, weight.tiles.table, m, n, k,
        weight.words.shape[0],
        SEGMENT // weight.group, weight.unit, 8 if weight.scales is None else 4, w, weight.subnormal,
        k % weight.group == 0, parts > 1, row is not None, bias is not None, tokens, TILE,
        num_warps=4, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip
    if parts > 1:
        add_segments(target, y, alpha, bias, row, weight.unit)
    return y
