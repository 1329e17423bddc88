# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""RMSNorm and silu × up that quantize what they compute: the step before a W4A4 product as one launch.

They round to the activation's type where the separate ops do, and then quantize, so the bits are those of ``rms_norm``
or ``silu_mul`` followed by ``quantize_values``; the rounded activation itself is never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels import room
from anyfp4.kernels.triton import norm
from anyfp4.kernels.triton.activation import gated
from anyfp4.kernels.triton.checks import check_device, check_dtype, check_float, on_device, power_of_two
from anyfp4.kernels.triton.dependency import overlapping, wait_for_inputs
from anyfp4.kernels.triton.elementary import sum_neighbours
from anyfp4.kernels.triton.numbers import float32_of, rounded
from anyfp4.kernels.triton.quantize import over, places, store_quantized, tile


@triton.jit
def _stream(p_x, p_residual, x_here, here, live, ADD: tl.constexpr):
    """x, or x + residual rounded to the type of x, in that type; zero where not ``live``."""
    x = tl.load(p_x + x_here, mask=live, other=0.0)
    if ADD:
        residual = tl.load(p_residual + here, mask=live, other=0.0)
        x = rounded(float32_of(x) + float32_of(residual), x.dtype)
    return x


@triton.jit
def _norm_quantize(
    p_x, p_residual, p_weight, p_total, p_pre, p_g, p_values, p_scale, rows, K, x_stride, eps,
    ADD: tl.constexpr, PRE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
    SCALES: tl.constexpr, OVERLAP: tl.constexpr = False,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    first = tl.program_id(0).to(tl.int64) * ROWS
    c = tl.arange(0, ROWS * BLOCKS)
    row, block = c // BLOCKS, c % BLOCKS
    live = (block * 16 < K) & (first + row < rows)
    column = places(block, False)
    here = over(row * K, column) + column
    x_here = first * x_stride + over(row.to(tl.int64) * x_stride, column) + column
    x = _stream(p_x, p_residual, x_here, first * K + here, over(live, column), ADD)
    scale_here = row * (K // 16) + block
    if PARTS > 1:
        # every program of a row sums all of it, and then takes its own part
        block = tl.program_id(1) * (BLOCKS // PARTS) + tl.arange(0, BLOCKS // PARTS)
        live = block * 16 < K
        column = places(block, False)
        here, scale_here = column, block
        part = _stream(p_x, p_residual, first * x_stride + column, first * K + column, over(live, column), ADD)
    else:
        part = x
    # loads come before the sum, which waits for all threads
    weight = float32_of(tl.load(p_weight + column, mask=over(live, column), other=0.0))
    pre = None
    if PRE:
        pre = tl.load(p_pre + column, mask=over(live, column), other=0.0)
    x64 = float32_of(x).to(tl.float64)
    squares = sum_neighbours(tl.reshape(sum_neighbours(x64 * x64), (ROWS, BLOCKS)))
    inverse = norm.inverse_root(squares, K, eps)
    if ADD:
        tl.store(p_total + first * K + here, part, mask=over(live, column))
    if PARTS > 1:
        inverse = tl.broadcast_to(inverse, (BLOCKS // PARTS,))
    else:
        inverse = tl.reshape(tl.broadcast_to(inverse[:, None], (ROWS, BLOCKS)), (ROWS * BLOCKS,))
    y = rounded(float32_of(part) * over(inverse, column) * weight, p_x.dtype.element_ty)
    store_quantized(y, pre, p_g, p_values, p_scale, first, rows, K, here, scale_here, live, SCALES)


@triton.jit
def _silu_mul_quantize(
    p_x, p_pre, p_g, p_values, p_scale, rows, width, x_stride,
    PRE: tl.constexpr, BLOCKS: tl.constexpr, WHOLE: tl.constexpr, SCALES: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    live = block * 16 < width
    column = places(block, WHOLE)
    p_gate = p_x + row * x_stride
    gate = float32_of(tl.load(p_gate + column, mask=over(live, column), other=0.0))
    up = float32_of(tl.load(p_gate + width + column, mask=over(live, column), other=0.0))
    pre = None
    if PRE:
        pre = tl.reshape(tl.load(p_pre + column, mask=over(live, column), other=0.0), (BLOCKS, 16))
    y = tl.reshape(rounded(gated(gate, up), p_x.dtype.element_ty), (BLOCKS, 16))
    store_quantized(y, pre, p_g, p_values, p_scale, row, rows, width, column, block, live, SCALES)


def norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    inverse_scales: Tensor,
    pre_quant_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    scale_dtype: torch.dtype = torch.uint8,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm (after adding to the residual stream, if there is one) and quantization.

    Args:
        x: [M, K] bfloat16, float16 or float32, rows of unit stride, K a multiple of 16.
        residual: [M, K] in the dtype of x, or None.
        weight: [K].
        eps: added to the mean square.
        inverse_scales: float32 [Q], 1 / input global_scale of each quantization.
        pre_quant_scale: [K] in the dtype of x, multiplies the norm's result before it is quantized; or None.
        dtype: of code × block_scale, float16 or bfloat16: exact in both.
        scale_dtype: of the block scales; int16 for those of ``kernels.hopper.quantize.quantize_blocks``.

    Returns:
        (code × block_scale [Q, M, K], block scales [Q, M, K/16], x + residual [M, K], or x without one).

    Raises:
        InvalidArgumentError: shapes or dtypes do not fit.
    """
    _check(x, inverse_scales, pre_quant_scale)
    check_float("weight", weight)
    check_device(x=x, weight=weight)
    m, k = x.shape
    if k > norm.MAX_K:
        raise InvalidArgumentError(f"rows of x may have at most {norm.MAX_K} elements, got {k}")
    if weight.shape != (k,) or (residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype)):
        raise InvalidArgumentError(f"weight {list(weight.shape)} must be [{k}], the residual like x {list(x.shape)}")
    values, scale = outputs(m, k, inverse_scales, dtype, scale_dtype)
    total = x if residual is None else torch.empty((m, k), dtype=x.dtype, device=x.device)
    rows, blocks, parts, warps = _norm_tile(m, k)
    if m:
        with on_device(x):
            _norm_quantize[(triton.cdiv(m, rows), parts)](
                x, x if residual is None else residual.contiguous(), weight.contiguous(), total,
                x if pre_quant_scale is None else pre_quant_scale, inverse_scales.contiguous(), values, scale, m, k,
                x.stride(0), eps, ADD=residual is not None, PRE=pre_quant_scale is not None, ROWS=rows,
                BLOCKS=blocks, PARTS=parts, SCALES=values.shape[0], num_warps=warps, enable_fp_fusion=False,
                **overlapping(x),
            )  # fmt: skip
    return values, scale, total


def _norm_tile(m: int, k: int) -> tuple[int, int, int, int]:
    """(rows of a program, blocks of a row, programs that share a row, warps)."""
    blocks = max(1, power_of_two(k) // 16)
    rows = max(1, 64 // blocks)
    # 4096 columns on an H200: 2.0 us with four programs for one row, 2.4 us with one; even at about 30 rows
    parts = 4 if m <= 16 and blocks >= 64 else 1
    return rows, blocks, parts, min(16, max(1, rows * blocks // 32))


def silu_mul_quantize(
    gate_up: Tensor,
    inverse_scales: Tensor,
    pre_quant_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    scale_dtype: torch.dtype = torch.uint8,
) -> tuple[Tensor, Tensor]:
    """silu(gate) × up and quantization.

    Args:
        gate_up: [M, 2·I] bfloat16, float16 or float32, rows of unit stride, I a multiple of 16.
        inverse_scales: float32 [Q].
        pre_quant_scale: [I] in the dtype of gate_up, or None.
        dtype: of code × block_scale, float16 or bfloat16: exact in both.
        scale_dtype: of the block scales; int16 for those of ``kernels.hopper.quantize.quantize_blocks``.

    Returns:
        (code × block_scale [Q, M, I], block scales [Q, M, I/16]).

    Raises:
        InvalidArgumentError: shapes or dtypes do not fit.
    """
    _check(gate_up, inverse_scales, pre_quant_scale, 2)
    m, width = gate_up.shape[0], gate_up.shape[1] // 2
    values, scale = outputs(m, width, inverse_scales, dtype, scale_dtype)
    if m:
        with on_device(gate_up):
            # 12288 columns on an H200: one row 1.3 us with 8 blocks a program, 1.5 with 32; 64 rows 3.4 us with 64
            blocks, warps, whole = tile(m, width // 16, 8 if m <= 4 else 32 if m <= 16 else 64)
            _silu_mul_quantize[(m, triton.cdiv(width // 16, blocks))](
                gate_up, gate_up if pre_quant_scale is None else pre_quant_scale, inverse_scales.contiguous(), values,
                scale, m, width, gate_up.stride(0), PRE=pre_quant_scale is not None, BLOCKS=blocks, WHOLE=whole,
                SCALES=values.shape[0], num_warps=warps, enable_fp_fusion=False, **overlapping(gate_up),
            )  # fmt: skip
    return values, scale


def _check(x: Tensor, inverse_scales: Tensor, pre: Tensor | None, halves: int = 1) -> None:
    check_float("x", x)
    check_dtype("inverse_scales", inverse_scales, torch.float32)
    check_device(x=x, inverse_scales=inverse_scales)
    multiple = 16 * halves
    if x.dim() != 2 or x.shape[1] == 0 or x.shape[1] % multiple or x.stride(1) != 1:
        raise InvalidArgumentError(
            f"x must be [M, a multiple of {multiple}] with rows of unit stride, got {list(x.shape)}"
        )
    if inverse_scales.dim() != 1 or not inverse_scales.shape[0]:
        raise InvalidArgumentError(f"inverse_scales must be [Q], got {list(inverse_scales.shape)}")
    width = x.shape[1] // halves
    if pre is not None and (pre.shape != (width,) or pre.dtype != x.dtype or not pre.is_contiguous()):
        raise InvalidArgumentError(
            f"pre_quant_scale must be {x.dtype} [{width}] and contiguous, got {pre.dtype} {list(pre.shape)}"
        )


def outputs(
    m: int, k: int, inverse_scales: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Memory for values [Q, M, K] and block scales [Q, M, K/16]."""
    count, device = inverse_scales.shape[0], inverse_scales.device
    values = room.empty(count, m, k, dtype, device)
    return values, torch.empty((count, m, k // 16), dtype=scale_dtype, device=device)
