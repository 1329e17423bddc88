"""Activations of FP8 layers: E4M3 values, held in float16.

They have one scale for the tensor, for each token, or for each 128 columns of a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.formats.weights import FP8_BLOCK_SIZE
from anyfp4.kernels.triton.numbers import e4m3_bits, e4m3_float, float32_of

_BLOCK = 1024
#: blocks of 128 columns that one program treats
_BLOCKS = 8


@triton.jit
def _dynamic_scale(largest):
    """amax / 448 from the bits of amax; 1 below 2⁻¹¹⁷, as in ops/linear.py: the reciprocal would not be finite."""
    amax = largest.to(tl.float32, bitcast=True)
    scale = tl.where(amax < 6.018531076210112e-36, 1.0, tl.div_rn(amax, amax * 0.0 + 448.0))
    return tl.where(amax == float("inf"), amax, scale)


@triton.jit
def _inverse(scale):
    inverse = tl.div_rn(scale * 0.0 + 1.0, scale)
    return tl.where(scale == float("inf"), 0.0, inverse)


@triton.jit
def _e4m3(v):
    """Float32 ``v`` rounded to E4M3, saturating, as float16."""
    magnitude = tl.abs(v)
    value = e4m3_float(e4m3_bits(tl.where(magnitude > 448.0, 448.0, magnitude)))
    return tl.where(v < 0.0, -value, value).to(tl.float16)


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
        scale = _dynamic_scale(tl.max(largest, axis=0))
    tl.store(p_row + row, scale)
    inverse = _inverse(scale)
    for start in range(0, K, BLOCK):
        inside = start + i < K
        x = float32_of(tl.load(p_x + row * x_stride + start + i, mask=inside, other=0.0))
        tl.store(p_out + row * K + start + i, _e4m3(x * inverse), mask=inside)


@triton.jit
def _quantize_fp8_blocks(p_x, p_out, p_scale, K, blocks, x_stride, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = float32_of(tl.load(p_x + row * x_stride + column, mask=column < K, other=0.0))
    scale = _dynamic_scale(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1))
    tl.store(p_scale + row * blocks + block, scale, mask=block < blocks)
    tl.store(p_out + row * K + column, _e4m3(x * _inverse(scale)[:, None]), mask=column < K)


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


def quantize_fp8_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`quantize_fp8`, with a scale for each 128 columns of a row.

    Returns:
        (float16 [M, K], float32 [M, ⌈K/128⌉]).
    """
    m, k = x.shape
    blocks = triton.cdiv(k, FP8_BLOCK_SIZE)
    out = torch.empty((m, k), dtype=torch.float16, device=x.device)
    scale = torch.empty((m, blocks), dtype=torch.float32, device=x.device)
    if m:
        _quantize_fp8_blocks[(m, triton.cdiv(blocks, _BLOCKS))](
            x, out, scale, k, blocks, x.stride(0), _BLOCKS, FP8_BLOCK_SIZE, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out, scale
