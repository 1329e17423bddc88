"""y = x · Wᵀ with FP8 weights that have a scale for each block of 128 × 128.

A group of words is a block's columns. Its product comes out of the matrix units as one chain of 128 columns, starting
from zero; it is multiplied by the scale (of the weight's block, times that of the token's 128 columns where activations
are quantized) and added to the sum of the segment, each operation rounded once to float32. Segments are added in order:

    y = round(((Σ p·f) + (Σ p·f) + …) × alpha + bias)

with alpha 1, or NaN for a row with a NaN among its weights. A tile's rows lie within one block of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.formats.weights import FP8_BLOCK_SIZE
from anyfp4.kernels.triton import division, gemm, workspace
from anyfp4.kernels.triton.division import Division
from anyfp4.kernels.triton.epilogue import finish, sum_of_segments
from anyfp4.kernels.triton.layout import GROUP, SEGMENT, segments
from anyfp4.kernels.triton.linear_packed import group_values

assert GROUP == FP8_BLOCK_SIZE


@dataclass(frozen=True, eq=False)
class Fp8Blocks:
    """A weight in words.

    Attributes:
        words: int32 [⌈K/128⌉, N, 32].
        scale: float32 [⌈N/128⌉, ⌈K/128⌉].
        k: columns.
        alpha: float32 [N], 1 or NaN.
        bias: float32 [N] or None.
    """

    words: Tensor
    scale: Tensor
    k: int
    alpha: Tensor
    bias: Tensor | None


@triton.jit
def _segment(
    p_x, p_token_scale, p_w, p_scale, near, live, segment, N, K, groups,
    SCALED: tl.constexpr, EVEN_K: tl.constexpr, T: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
    SEGMENT_GROUPS: tl.constexpr,
):  # fmt: skip
    """The sum over one segment of K: float32 [R, T]."""
    column = tl.arange(0, GROUP)
    first = segment * SEGMENT_GROUPS
    last = tl.minimum(first + SEGMENT_GROUPS, groups)
    total = tl.zeros((R, T), tl.float32)
    tl.assume(last > first)
    for g in range(first, last):
        values = group_values(p_w, p_w, near, g, N, 8, False, R, GROUP // 4)
        if EVEN_K:
            x = tl.load(p_x + g * GROUP + column[None, :], mask=live[:, None], other=0.0)
        else:
            inside = live[:, None] & (g * GROUP + column[None, :] < K)
            x = tl.load(p_x + g * GROUP + column[None, :], mask=inside, other=0.0)
        product = tl.dot(values.to(x.dtype), x.T)
        factor = tl.load(p_scale + g)
        if SCALED:
            factor = (tl.load(p_token_scale + g, mask=live, other=0.0) * factor)[None, :]
        total = total + product * factor
    return total


@triton.jit(do_not_specialize=["M", "groups"])
def _fp8_block_linear(
    p_x, p_token_scale, p_w, p_scale, p_y, p_alpha, p_bias, p_sums, p_counters, M, N, K, groups,
    SEGMENTS: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr, EVEN_K: tl.constexpr, BIAS: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr, SEGMENT_GROUPS: tl.constexpr,
):  # fmt: skip
    tokens, tile = tl.program_id(0), tl.program_id(1)
    n = tile * R + tl.arange(0, R)
    near = tl.minimum(n, N - 1)
    m = tokens * T + tl.arange(0, T)
    p_x += m[:, None].to(tl.int64) * K
    p_token_scale += m.to(tl.int64) * groups
    p_scale += (tile * R // GROUP).to(tl.int64) * groups
    if SPLIT:
        acc = _segment(
            p_x, p_token_scale, p_w, p_scale, near, m < M, tl.program_id(2), N, K, groups, SCALED, EVEN_K, T, R, GROUP,
            SEGMENT_GROUPS,
        )  # fmt: skip
        slot = tile * tl.num_programs(0) + tokens
        last, total = sum_of_segments(acc, p_sums, p_counters, slot, tl.program_id(2), SEGMENTS)
        if last:
            finish(total, p_y, p_alpha, p_bias, p_alpha, n, N, m, M, N, 1.0, False, BIAS)
    else:
        total = tl.zeros((R, T), tl.float32)
        for segment in range(SEGMENTS):
            total += _segment(
                p_x, p_token_scale, p_w, p_scale, near, m < M, segment, N, K, groups, SCALED, EVEN_K, T, R, GROUP,
                SEGMENT_GROUPS,
            )  # fmt: skip
        finish(total, p_y, p_alpha, p_bias, p_alpha, n, N, m, M, N, 1.0, False, BIAS)


def fp8_block_linear(
    x: Tensor, token_scale: Tensor | None, weight: Fp8Blocks, out_dtype: torch.dtype, work: Division | None = None
) -> Tensor:
    """The product of :mod:`anyfp4.kernels.triton.linear_fp8_block`.

    Args:
        x: [M, K] float16 E4M3 values; weight-only: the activation in float16 or bfloat16.
        token_scale: float32 [M, ⌈K/128⌉], or None: weight-only.
        weight: N rows.
        out_dtype: of the result.
        work: how it is divided; by default by M.

    Returns:
        [M, N].
    """
    m, k = x.shape
    groups, n, _ = weight.words.shape
    y = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if m == 0:
        return y
    work = work or division.few(n, k, m)
    parts, rows, tokens = segments(k), triton.cdiv(n, work.rows), triton.cdiv(m, work.tokens)
    work = division.fitted(work, rows * tokens, k)
    space, alpha, bias = workspace.of(x), weight.alpha, weight.bias
    _fp8_block_linear[(tokens, rows, parts if work.split else 1)](
        x, alpha if token_scale is None else token_scale, weight.words, weight.scale, y, alpha,
        alpha if bias is None else bias, space.sums, space.counters, m, n, k, groups, parts, work.split,
        token_scale is not None, k % GROUP == 0, bias is not None, work.rows, work.tokens, GROUP, SEGMENT // GROUP,
        num_warps=work.warps, num_stages=work.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def dequantize(weight: Fp8Blocks) -> Tensor:
    """E4M3 value × scale, rounded once: float32 [N, K]. For float32 activations, which take no matrix unit."""
    n = weight.words.shape[1]
    out = torch.empty((n, weight.k), dtype=torch.float32, device=weight.words.device)
    gemm.launch_dequantize(weight.words, None, out, 0)
    scale = weight.scale.repeat_interleave(GROUP, 0)[:n].repeat_interleave(GROUP, 1)[:, : weight.k]
    return out.mul_(scale)
