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

from anyfp4.kernels.triton.checks import power_of_two
from anyfp4.kernels.triton.numbers import e2m1_code, e2m1_magnitude, e4m3_rounded, float32_of, rounded

#: elements that programs can reach in one row
_FLAT = 65535 * 64 * 16
#: below it, a finite g / s
_LARGE = tl.constexpr(2.0**116)


@triton.jit
def places(block, WHOLE: tl.constexpr):
    """Columns of blocks [B]: [B, 2, 8] if a thread shall hold whole blocks, [B, 16] if two threads shall share one.

    Loads of 16 bytes a thread put neighbours of the last axis in one thread, and the first axis across threads (Triton
    3.6; 3.9 lets two threads share a block either way). Only for at least as many blocks as threads: with fewer, halves
    of a block lie in lanes far apart, and 3.6 reduces them wrongly.
    """
    if WHOLE:
        column = (block * 16)[:, None, None] + (tl.arange(0, 2) * 8)[None, :, None] + tl.arange(0, 8)[None, None, :]
    else:
        column = (block * 16)[:, None] + tl.arange(0, 16)[None, :]
    return column


@triton.jit
def over(v, column):
    """v [B] with the axes of ``column`` [B, …]."""
    if len(column.shape) == 3:
        v = v[:, None, None]
    else:
        v = v[:, None]
    return v


@triton.jit
def block_scales(x, g):
    """What :func:`products` and :func:`codes` need of each block.

    Args:
        x: float32 [B, 16].
        g: float32, 1 / input global_scale.

    Returns:
        (scale bits int32 [B], scales float32 [B], x · (g / s) float32 [B, 16], zeros where s = 0).
    """
    # as integers, magnitudes are in order and NaN is the largest
    amax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    raw = g * (amax * 0.16666667163372040)
    s, bits = e4m3_rounded(tl.where(raw > 448.0, 448.0, raw))
    quotient = tl.where(s == 0.0, 0.0, tl.div_rn(tl.zeros_like(s) + g, s))[:, None]
    if g < _LARGE:
        y = x * quotient
    else:
        # the quotient may be infinite
        y = tl.where(x == 0.0, x, x * quotient)
    return bits, s, y


@triton.jit
def products(y, s):
    """code × block_scale as float16, exact; arguments as :func:`block_scales` gives them."""
    # a block of scale zero has no signs
    sign = tl.where(s == 0.0, 0, -0x80000000)[:, None]
    magnitude = (e2m1_magnitude(y) * s[:, None]).to(tl.int32, bitcast=True)
    return (magnitude | (y.to(tl.int32, bitcast=True) & sign)).to(tl.float32, bitcast=True).to(tl.float16)


@triton.jit
def store_quantized(
    y, pre, p_g, p_values, p_scale, first, rows, K, column, block, live, SCALES: tl.constexpr
):  # fmt: skip
    """Quantizes y [B, 16] once for each of SCALES global scales, and stores values at column and scales at block.

    ``y`` is in the activation's type; ``pre``, if not None, are factors by which it is first multiplied, and rounded.
    Columns and blocks are counted from the row ``first``; ``live`` is bool [B]. Scales are bytes or, as
    ``kernels.hopper.quantize.quantize_blocks`` describes them, int16.
    """
    if pre is not None:
        y = rounded(float32_of(y) * float32_of(pre), y.dtype)
    y = float32_of(y)
    for i in tl.static_range(SCALES):
        bits, s, scaled = block_scales(y, tl.load(p_g + i))
        row = first + i * rows
        values = tl.reshape(products(scaled, s), column.shape)
        tl.store(p_values + row * K + column, values, mask=over(live, column))
        if p_scale.dtype.element_ty == tl.int16:
            magnitude = e2m1_magnitude(scaled)
            # the sum, of multiples of a quarter, is at most 576
            quarter = tl.ceil(tl.sum(magnitude * magnitude, axis=1) * 0.25).to(tl.int32)
            bits |= tl.where(s > 0.0, quarter, 0) << 8
        tl.store(p_scale + row * (K // 16) + block, bits.to(p_scale.dtype.element_ty), mask=live)


@triton.jit
def _quantize(
    p_x, p_pre, p_g, p_out, p_scale, KB, x_stride, PRE: tl.constexpr, VALUES: tl.constexpr,
    BLOCKS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = places(block, WHOLE)
    live_all = column < KB * 16
    g = tl.load(p_g)
    x = tl.load(p_x + row * x_stride + column, mask=live_all, other=0.0)
    if PRE:
        # rounded to the type of x, as torch multiplies
        pre = tl.load(p_pre + column, mask=live_all, other=0.0)
        x = rounded(float32_of(x) * float32_of(pre), p_x.dtype.element_ty)
    bits, s, y = block_scales(tl.reshape(float32_of(x), (BLOCKS, 16)), g)
    if VALUES:
        tl.store(p_out + row * KB * 16 + column, tl.reshape(products(y, s), column.shape), mask=live_all)
    else:
        # none in a block whose scale is zero or NaN
        codes = tl.where(s[:, None] > 0.0, e2m1_code(y), 0)
        low, high = tl.split(tl.reshape(codes, (BLOCKS, 8, 2)))
        there = (block * 8)[:, None] + tl.arange(0, 8)[None, :]
        tl.store(p_out + row * KB * 8 + there, (low | (high << 4)).to(tl.uint8), mask=there < KB * 8)
    tl.store(p_scale + row * KB + block, bits.to(tl.uint8), mask=block < KB)


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


def tile(rows: int, blocks: int, few: int) -> tuple[int, int, bool]:
    """(blocks of a program, warps, WHOLE) for rows of so many blocks, ``few`` a program where there are few in all."""
    if rows * blocks >= 1 << 16:
        # 4096 x 12288 on an H200: 50 us, and 52 us where two threads share a block
        return 128, 4, True
    return min(few, power_of_two(blocks)), 4, False


def _launch(x: Tensor, g: Tensor, pre: Tensor | None, out: Tensor, scale: Tensor, values: bool) -> None:
    m, k = x.shape
    if pre is None and x.is_contiguous() and m * k <= _FLAT:
        # one row: blocks know nothing of rows
        m, k = 1, m * k
    if m and k:
        at_once, warps, whole = tile(m, k // 16, 64)
        _quantize[(m, triton.cdiv(k // 16, at_once))](
            x, g if pre is None else pre, g, out, scale, k // 16, x.stride(0), pre is not None, values,
            BLOCKS=at_once, WHOLE=whole, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
