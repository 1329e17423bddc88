"""What follows a sum over K: scales, bias, one rounding; and the sum of the segments.

    y = round((sum × alpha) + bias)

with alpha float32 of the output row, or (FP8) the product of the token's scale and the row's. Launched with
``enable_fp_fusion=False``: a fused multiply-add would round once where the definition rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from anyfp4.kernels.triton.numbers import rounded

_BLOCK = 1024


@triton.jit
def scaled(acc, alpha, row, bias, ROW: tl.constexpr, BIAS: tl.constexpr):
    """The result in float32; ``alpha``, ``row`` and ``bias`` broadcast against ``acc``."""
    if ROW:
        acc = acc * (row * alpha)
    else:
        acc = acc * alpha
    if BIAS:
        acc = acc + bias
    return acc


@triton.jit(do_not_specialize=["total"])
def _add_segments(
    p_part, p_y, p_alpha, p_bias, p_row, total, N, unit, SEGMENTS: tl.constexpr, ROW: tl.constexpr, BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < total
    m, n = i // N, i % N
    acc = tl.load(p_part + i, mask=live, other=0.0)
    for s in tl.static_range(1, SEGMENTS):
        acc = acc + tl.load(p_part + s * tl.cast(total, tl.int64) + i, mask=live, other=0.0)
    alpha = tl.load(p_alpha + n, mask=live, other=0.0)
    row = tl.load(p_row + m, mask=live, other=0.0) if ROW else alpha
    bias = tl.load(p_bias + n, mask=live, other=0.0) if BIAS else alpha
    y = scaled(acc * unit, alpha, row, bias, ROW, BIAS)
    tl.store(p_y + i, rounded(y, p_y.dtype.element_ty), mask=live)


def add_segments(parts: Tensor, y: Tensor, alpha: Tensor, bias: Tensor | None, row: Tensor | None, unit: float) -> None:
    """Adds the segments' sums in order and finishes the result.

    Args:
        parts: float32 [S, M, N].
        y: [M, N], written.
        alpha: float32 [N].
        bias: float32 [N] or None.
        row: float32 [M] or None.
        unit: power of two that the sums are multiplied by first.
    """
    total = y.numel()
    _add_segments[(triton.cdiv(total, _BLOCK),)](
        parts, y, alpha, alpha if bias is None else bias, alpha if row is None else row, total, y.shape[1], unit,
        parts.shape[0], row is not None, bias is not None, _BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
