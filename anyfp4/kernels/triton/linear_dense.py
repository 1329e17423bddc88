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

from anyfp4.kernels.triton import division, workspace
from anyfp4.kernels.triton.division import Division
from anyfp4.kernels.triton.epilogue import finish, sum_of_segments
from anyfp4.kernels.triton.layout import SEGMENT, segments


@triton.jit
def _segment(
    p_x, p_w, live, segment, K, SEGMENT: tl.constexpr, FLOAT32: tl.constexpr, EVEN_K: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The sum over one segment of K: float32 [R, T]."""
    column = tl.arange(0, STEP)
    first = segment * SEGMENT
    last = tl.minimum(first + SEGMENT, K)
    acc = tl.zeros((R, T), tl.float32)
    tl.assume(last > first)
    for k in range(first, last, STEP):
        if EVEN_K:
            w = tl.load(p_w + k + column[None, :])
            x = tl.load(p_x + k + column[None, :], mask=live[:, None], other=0.0)
        else:
            inside = column[None, :] + k < K
            w = tl.load(p_w + k + column[None, :], mask=inside, other=0.0)
            x = tl.load(p_x + k + column[None, :], mask=live[:, None] & inside, other=0.0)
        if FLOAT32:
            acc = tl.dot(w, x.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(w, x.T, acc)
    return acc


@triton.jit(do_not_specialize=["M"])
def _dense_linear(
    p_x, p_w, p_y, p_alpha, p_bias, p_sums, p_counters, M, N, K, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
    SPLIT: tl.constexpr, FLOAT32: tl.constexpr, EVEN_K: tl.constexpr, BIAS: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tokens, tile = tl.program_id(0), tl.program_id(1)
    n = tile * R + tl.arange(0, R)
    m = tokens * T + tl.arange(0, T)
    p_w += tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    p_x += m[:, None].to(tl.int64) * K
    if SPLIT:
        acc = _segment(p_x, p_w, m < M, tl.program_id(2), K, SEGMENT, FLOAT32, EVEN_K, T, R, STEP)
        slot = tile * tl.num_programs(0) + tokens
        last, total = sum_of_segments(acc, p_sums, p_counters, slot, tl.program_id(2), SEGMENTS)
        if last:
            finish(total, p_y, p_alpha, p_bias, p_alpha, n, N, m, M, N, 1.0, False, BIAS)
    else:
        total = tl.zeros((R, T), tl.float32)
        for segment in range(SEGMENTS):
            total += _segment(p_x, p_w, m < M, segment, K, SEGMENT, FLOAT32, EVEN_K, T, R, STEP)
        finish(total, p_y, p_alpha, p_bias, p_alpha, n, N, m, M, N, 1.0, False, BIAS)


def dense_linear(
    x: Tensor, w: Tensor, alpha: Tensor, bias: Tensor | None, out_dtype: torch.dtype, work: Division | None = None
) -> Tensor:
    """x · wᵀ × alpha + bias.

    Args:
        x: [M, K] bfloat16, float16 or float32, contiguous.
        w: [N, K] likewise.
        alpha: float32 [N].
        bias: float32 [N] or None.
        out_dtype: of the result.
        work: how it is divided; by default by M.

    Returns:
        [M, N].
    """
    m, k = x.shape
    n = w.shape[0]
    y = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if m == 0:
        return y
    if x.dtype != w.dtype:
        x, w = x.to(torch.float32), w.to(torch.float32)
    float32 = x.dtype == torch.float32
    work = division.few(n, k, m, 16) if float32 else work or division.few(n, k, m)
    step, parts = 32 if float32 else 128, segments(k)
    rows, tokens = triton.cdiv(n, work.rows), triton.cdiv(m, work.tokens)
    work = division.fitted(work, rows * tokens, k)
    space = workspace.of(x)
    _dense_linear[(tokens, rows, parts if work.split else 1)](
        x, w, y, alpha, alpha if bias is None else bias, space.sums, space.counters, m, n, k, SEGMENT, parts,
        work.split, float32, k % step == 0, bias is not None, work.tokens, work.rows, step, num_warps=work.warps,
        num_stages=work.stages, enable_fp_fusion=float32,
    )  # fmt: skip
    return y
