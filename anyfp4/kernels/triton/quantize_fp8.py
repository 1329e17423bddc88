"""Activations of FP8 layers: E4M3 values, held in float16, with one scale for the tensor or for each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.kernels.triton.numbers import e4m3_bits, e4m3_float, float32_of

_BLOCK = 1024


@triton.jit
def _quantize_fp8(p_x, p_scale, p_out, p_row, K, x_stride, STATIC: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    if STATIC:
        scale = tl.load(p_scale)
    else:
        # as integers, magnitudes are in order and NaN is the largest
        largest = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, K, BLOCK):
            x = float32_of(tl.load(p_x + row * x_stride + start + i, mask=start + i < K, other=0.0))
            largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        amax = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
        # 2^-117, as in ops/linear.py: below it the reciprocal would not be finite
        scale = tl.where(amax < 6.018531076210112e-36, 1.0, tl.div_rn(amax, amax * 0.0 + 448.0))
        scale = tl.where(amax == float("inf"), amax, scale)
    tl.store(p_row + row, scale)
    inverse = tl.div_rn(scale * 0.0 + 1.0, scale)
    inverse = tl.where(scale == float("inf"), 0.0, inverse)
    for start in range(0, K, BLOCK):
        inside = start + i < K
        v = float32_of(tl.load(p_x + row * x_stride + start + i, mask=inside, other=0.0)) * inverse
        magnitude = tl.abs(v)
        value = e4m3_float(e4m3_bits(tl.where(magnitude > 448.0, 448.0, magnitude)))
        value = tl.where(v < 0.0, -value, value)
        tl.store(p_out + row * K + start + i, value.to(tl.float16), mask=inside)


def quantize_fp8(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x / scale rounded to E4M3.

    Args:
        x: [M, K] bfloat16, float16 or float32, rows of unit stride.
        scale: float32 [1]; None takes amax / 448 of each row (1 where amax < 2⁻¹¹⁷).

    Returns:
        (float16 [M, K], float32 [M]).
    """
    m, k = x.shape
    out = torch.empty((m, k), dtype=torch.float16, device=x.device)
    row = torch.empty((m,), dtype=torch.float32, device=x.device)
    if m:
        _quantize_fp8[(m,)](
            x, row if scale is None else scale, out, row, k, x.stride(0), scale is not None, _BLOCK, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out, row
