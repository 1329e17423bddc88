"""Native numerics on a Hopper GPU, by the bit model: the orders over K that ``docs/gpu.md`` gives."""

from __future__ import annotations

import torch
from torch import Tensor

from anyfp4.formats.nvfp4 import dequantize_blocks, quantize_blocks
from anyfp4.formats.weights import DenseWeight, FP8Weight, LinearWeight, NVFP4Weight
from anyfp4.kernels.triton.layout import GROUP, SEGMENT
from anyfp4.numerics import hopper
from anyfp4.ops import linear as reference
from tests.kernels_triton.linears import fp8_activation, values


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """float32 [M, N]; ``x`` in float16 or bfloat16, one input scale for all shards."""
    y = _product(x, weight)
    return y if weight.bias is None else y + weight.bias.float()


def _product(x: Tensor, weight: LinearWeight) -> Tensor:
    if isinstance(weight, DenseWeight):
        return in_segments(x, weight.weight)
    if isinstance(weight, NVFP4Weight):
        w, alpha = values(weight), reference.alpha(weight)
        if weight.input_global_scale is None:
            return in_segments(x, w.to(x.dtype)) * alpha
        return (
            in_segments(dequantize_blocks(*quantize_blocks(x, weight.input_global_scale[:1])).half(), w.half()) * alpha
        )
    if weight.block_wise:
        return _in_blocks(x, weight)
    if weight.weight_only:
        return in_segments(x, weight.weight.to(x.dtype)) * weight.weight_scale
    codes, scale = fp8_activation(x, weight)
    return in_segments(codes.half(), weight.weight.half()) * (scale[:, :1] * weight.weight_scale)


def in_segments(a: Tensor, w: Tensor) -> Tensor:
    """One chain for each segment, added in order."""
    parts = [
        hopper.matmul(a[:, i : i + SEGMENT].contiguous(), w[:, i : i + SEGMENT].contiguous())
        for i in range(0, a.shape[1], SEGMENT)
    ]
    return in_order(parts)


def _in_blocks(x: Tensor, weight: FP8Weight) -> Tensor:
    n, k = weight.shape
    a, w, scale = x, weight.weight.to(x.dtype), None
    if not weight.weight_only:
        codes, scale = fp8_activation(x, weight)
        a, w = codes.half(), weight.weight.half()
    segments = []
    for start in range(0, k, SEGMENT):
        total = torch.zeros(x.shape[0], n)
        for i in range(start, min(start + SEGMENT, k), GROUP):
            factor = weight.weight_scale[:, i // GROUP].repeat_interleave(GROUP)[:n]
            if scale is not None:
                factor = scale[:, i : i + 1] * factor
            total = total + hopper.matmul(a[:, i : i + GROUP].contiguous(), w[:, i : i + GROUP].contiguous()) * factor
        segments.append(total)
    return in_order(segments)


def in_order(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
