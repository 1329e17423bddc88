"""Activation quantization: x [M, K] to E2M1 codes and E4M3 block scales, bit for bit as ``formats/nvfp4.py``.

Every block of 16 is on its own, so the kernel sees x as a list of blocks. Each float32 operation is rounded once: no
product feeds an addition, so there is nothing to contract into a fused multiply-add, and the one division is
``div_rn``, as ``/`` is approximate on NVIDIA.

Two forms of result: packed codes with block scales, and the products code × block_scale in float16 (exact), which
native numerics multiplies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.kernels.triton.numbers import e2m1_code, e2m1_half, e4m3_bits, e4m3_float, float32_of, rounded

#: blocks of 16 that one program treats
_BLOCKS = 64


@triton.jit
def quantize_block(x, g):
    """Codes and scale of blocks.

    Args:
        x: float32 [B, 16].
        g: float32, 1 / input global_scale.

    Returns:
        (codes int32 [B, 16], scale bits int32 [B], scales float32 [B]).
    """
    # as integers, magnitudes are in order and NaN is the largest
    amax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    raw = g * (amax * 0.16666667163372040)
    bits = e4m3_bits(tl.where(raw > 448.0, 448.0, raw))
    s = e4m3_float(bits)
    # x · (g / s): where s = 0 the quotient is infinite, and the code zero whatever the product
    codes = e2m1_code(x * tl.div_rn(tl.zeros_like(s) + g, s)[:, None])
    return tl.where(s[:, None] == 0.0, 0, codes), bits, s


@triton.jit(do_not_specialize=["total"])
def _quantize(
    p_x, p_pre, p_g, p_out, p_scale, total, KB, x_stride, PRE: tl.constexpr, VALUES: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < total
    row, column = block // KB, (block % KB) * 16
    j = tl.arange(0, 16)
    x = tl.load(p_x + (row * x_stride + column)[:, None] + j[None, :], mask=live[:, None], other=0.0)
    if PRE:
        # rounded to the type of x, as torch multiplies
        pre = tl.load(p_pre + column[:, None] + j[None, :], mask=live[:, None], other=0.0)
        x = rounded(float32_of(x) * float32_of(pre), p_x.dtype.element_ty)
    codes, bits, s = quantize_block(float32_of(x), tl.load(p_g))
    if VALUES:
        values = e2m1_half(codes) * s.to(tl.float16)[:, None]
        tl.store(p_out + block[:, None] * 16 + j[None, :], values, mask=live[:, None])
    else:
        low, high = tl.split(tl.reshape(codes, (BLOCKS, 8, 2)))
        j8 = tl.arange(0, 8)
        tl.store(p_out + block[:, None] * 8 + j8[None, :], (low | (high << 4)).to(tl.uint8), mask=live[:, None])
    tl.store(p_scale + block, bits.to(tl.uint8), mask=live)


def quantize_values(
    x: Tensor,
    inverse_scales: Tensor,
    pre_quant_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """code × block_scale of an activation, and the block scales, once for each global scale.

    Args:
        x: [M, K] bfloat16, float16 or float32, rows of unit stride, K a multiple of 16.
        inverse_scales: float32 [Q], 1 / input global_scale of each quantization.
        pre_quant_scale: [K] in the dtype of x, or None.

    Returns:
        (float16 [Q, M, K], uint8 [Q, M, K/16]).
    """
    m, k = x.shape
    count = inverse_scales.shape[0]
    values = torch.empty((count, m, k), dtype=torch.float16, device=x.device)
    scale = torch.empty((count, m, k // 16), dtype=torch.uint8, device=x.device)
    for i, inverse in enumerate(inverse_scales):
        _launch(x, inverse, pre_quant_scale, values[i], scale[i], True)
    return values, scale


def quantize_packed(x: Tensor, inverse_scale: Tensor, pre_quant_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and block scales; arguments as :func:`quantize_values`, with one global scale.

    Returns:
        (packed uint8 [M, K/2], block_scale float8_e4m3fn [M, K/16]).
    """
    m, k = x.shape
    packed = torch.empty((m, k // 2), dtype=torch.uint8, device=x.device)
    scale = torch.empty((m, k // 16), dtype=torch.uint8, device=x.device)
    _launch(x, inverse_scale, pre_quant_scale, packed, scale, False)
    return packed, scale.view(torch.float8_e4m3fn)


def _launch(x: Tensor, g: Tensor, pre: Tensor | None, out: Tensor, scale: Tensor, values: bool) -> None:
    m, k = x.shape
    total = m * (k // 16)
    if total:
        _quantize[(triton.cdiv(total, _BLOCKS),)](
            x, g if pre is None else pre, g, out, scale, total, k // 16, x.stride(0), pre is not None, values,
            BLOCKS=_BLOCKS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
