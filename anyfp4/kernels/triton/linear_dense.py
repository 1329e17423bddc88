"""y = x · Wᵀ with an unquantized weight, for few tokens or any types; the order over K of ``layout.py``.

Operands of one 16-bit type go to the matrix units as they are. Otherwise both are float32 and multiplied by ordinary
multiply-adds, in order. A mixture of types is widened in memory first: for sm_100 Triton 3.6 multiplies in TF32 where
it sees an operand widened in the kernel, whatever ``input_precision`` says.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.kernels.triton.epilogue import add_segments, scaled
from anyfp4.kernels.triton.layout import SEGMENT, segments
from anyfp4.kernels.triton.linear_packed import tokens_per_tile
from anyfp4.kernels.triton.numbers import rounded

_TILE = 64


@triton.jit(do_not_specialize=["M"])
def _dense_linear(
    p_x, p_w, p_y, p_alpha, p_bias, M, N, K, SEGMENT: tl.constexpr, FLOAT32: tl.constexpr, EVEN_K: tl.constexpr,
    PARTIAL: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(2)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    near = tl.minimum(n, N - 1).to(tl.int64)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    live = m[:, None] < M
    column = tl.arange(0, BK)
    p_w += near[:, None] * K + column[None, :]
    p_x += m[:, None].to(tl.int64) * K + column[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(segment * SEGMENT, tl.minimum(K, (segment + 1) * SEGMENT), BK):
        if EVEN_K:
            w = tl.load(p_w + k)
            x = tl.load(p_x + k, mask=live, other=0.0)
        else:
            inside = column[None, :] + k < K
            w = tl.load(p_w + k, mask=inside, other=0.0)
            x = tl.load(p_x + k, mask=live & inside, other=0.0)
        if FLOAT32:
            acc = tl.dot(w, x.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(w, x.T, acc)
    written = (n[:, None] < N) & (m[None, :] < M)
    offset = m[None, :].to(tl.int64) * N + n[:, None]
    if PARTIAL:
        tl.store(p_y + segment.to(tl.int64) * M * N + offset, acc, mask=written)
    else:
        alpha = tl.load(p_alpha + near)[:, None]
        bias = tl.load(p_bias + near)[:, None] if BIAS else alpha
        y = scaled(acc, alpha, alpha, bias, False, BIAS)
        tl.store(p_y + offset, rounded(y, p_y.dtype.element_ty), mask=written)


def dense_linear(
    x: Tensor, w: Tensor, alpha: Tensor, bias: Tensor | None, out_dtype: torch.dtype, tokens: int | None = None
) -> Tensor:
    """x · wᵀ × alpha + bias.

    Args:
        x: [M, K] bfloat16, float16 or float32, contiguous.
        w: [N, K] likewise.
        alpha: float32 [N].
        bias: float32 [N] or None.
        out_dtype: of the result.
        tokens: of a tile; by default by M.

    Returns:
        [M, N].
    """
    m, k = x.shape
    n = w.shape[0]
    y = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if m == 0:
        return y
    parts = segments(k)
    target = torch.empty((parts, m, n), dtype=torch.float32, device=x.device) if parts > 1 else y
    if x.dtype != w.dtype:
        x, w = x.to(torch.float32), w.to(torch.float32)
    float32 = x.dtype == torch.float32
    block = 32 if float32 else 128
    tokens = 16 if float32 else tokens or tokens_per_tile(m)
    _dense_linear[(triton.cdiv(n, _TILE), triton.cdiv(m, tokens), parts)](
        x, w, target, alpha, alpha if bias is None else bias, m, n, k, SEGMENT, float32, k % block == 0, parts > 1,
        bias is not None, tokens, _TILE, block, num_warps=4, num_stages=3, enable_fp_fusion=float32,
    )  # fmt: skip
    if parts > 1:
        add_segments(target, y, alpha, bias, None, 1.0)
    return y
