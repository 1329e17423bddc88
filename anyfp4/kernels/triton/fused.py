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
from anyfp4.kernels.triton import norm
from anyfp4.kernels.triton.activation import gated
from anyfp4.kernels.triton.checks import check_device, check_dtype, check_float, on_device
from anyfp4.kernels.triton.numbers import e2m1_half, float32_of, rounded
from anyfp4.kernels.triton.quantize import quantize_block

#: columns of a program of the activation
_COLUMNS = 1024


@triton.jit
def _store_quantized(
    y, p_pre, p_g, p_values, p_scale, row, column, live, rows, K, PRE: tl.constexpr, SCALES: tl.constexpr
):  # fmt: skip
    """Quantizes y [R, N] once for each of SCALES global scales, and stores it at rows [R] and columns [N].

    ``y`` is in the activation's type; with PRE each column is first multiplied by its factor, and rounded, in it.
    ``live`` is bool [R, N]; whole blocks of 16 are live or not.
    """
    R: tl.constexpr = y.shape[0]
    N: tl.constexpr = y.shape[1]
    if PRE:
        pre = tl.load(p_pre + column, mask=column < K, other=0.0)
        y = rounded(float32_of(y) * float32_of(pre)[None, :], y.dtype)
    y = float32_of(y)
    blocks = tl.reshape(y, (R * N // 16, 16))
    # one column of each block stands for it
    block_live = tl.max(tl.reshape(live.to(tl.int32), (R * N // 16, 16)), axis=1) > 0
    for i in tl.static_range(SCALES):
        codes, bits, s = quantize_block(blocks, tl.load(p_g + i))
        values = tl.reshape(e2m1_half(codes) * s.to(tl.float16)[:, None], (R, N))
        here = (row + i * rows)[:, None] * K + column[None, :]
        tl.store(p_values + here, values, mask=live)
        block_here = tl.min(tl.reshape(here, (R * N // 16, 16)), axis=1) // 16
        tl.store(p_scale + block_here, bits.to(tl.uint8), mask=block_live)


@triton.jit
def _norm_quantize(
    p_x, p_residual, p_weight, p_total, p_pre, p_g, p_values, p_scale, rows, K, x_stride, eps,
    ADD: tl.constexpr, PRE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live = (row < rows)[:, None] & (column < K)[None, :]
    x = float32_of(tl.load(p_x + row[:, None] * x_stride + column[None, :], mask=live, other=0.0))
    if ADD:
        here = row[:, None] * K + column[None, :]
        x += float32_of(tl.load(p_residual + here, mask=live, other=0.0))
        total = rounded(x, p_total.dtype.element_ty)
        tl.store(p_total + here, total, mask=live)
        x = float32_of(total)
    weight = float32_of(tl.load(p_weight + column, mask=column < K, other=0.0))
    y = rounded(x * norm.inverse_rms(x, K, eps)[:, None] * weight[None, :], p_x.dtype.element_ty)
    _store_quantized(y, p_pre, p_g, p_values, p_scale, row, column, live, rows, K, PRE, SCALES)


@triton.jit
def _silu_mul_quantize(
    p_x, p_pre, p_g, p_values, p_scale, rows, width, x_stride,
    PRE: tl.constexpr, BLOCK: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = (row < rows)[:, None] & (column < width)[None, :]
    p_gate = p_x + row[:, None] * x_stride + column[None, :]
    gate = float32_of(tl.load(p_gate, mask=live, other=0.0))
    up = float32_of(tl.load(p_gate + width, mask=live, other=0.0))
    y = rounded(gated(gate, up), p_x.dtype.element_ty)
    _store_quantized(y, p_pre, p_g, p_values, p_scale, row, column, live, rows, width, PRE, SCALES)


def norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    inverse_scales: Tensor,
    pre_quant_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
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

    Returns:
        (code × block_scale [Q, M, K], block scales uint8 [Q, M, K/16], x + residual [M, K], or x without one).

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
    values, scale = _outputs(m, k, inverse_scales, dtype)
    total = x if residual is None else torch.empty((m, k), dtype=x.dtype, device=x.device)
    rows, block, warps = norm.tile(k)
    if m:
        with on_device(x):
            _norm_quantize[(triton.cdiv(m, rows),)](
                x, x if residual is None else residual.contiguous(), weight.contiguous(), total,
                x if pre_quant_scale is None else pre_quant_scale, inverse_scales.contiguous(), values, scale, m, k,
                x.stride(0), eps, ADD=residual is not None, PRE=pre_quant_scale is not None, ROWS=rows,
                BLOCK=max(16, block), SCALES=values.shape[0], num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    return values, scale, total


def silu_mul_quantize(
    gate_up: Tensor,
    inverse_scales: Tensor,
    pre_quant_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """silu(gate) × up and quantization.

    Args:
        gate_up: [M, 2·I] bfloat16, float16 or float32, rows of unit stride, I a multiple of 16.
        inverse_scales: float32 [Q].
        pre_quant_scale: [I] in the dtype of gate_up, or None.
        dtype: of code × block_scale, float16 or bfloat16: exact in both.

    Returns:
        (code × block_scale [Q, M, I], block scales uint8 [Q, M, I/16]).

    Raises:
        InvalidArgumentError: shapes or dtypes do not fit.
    """
    _check(gate_up, inverse_scales, pre_quant_scale, 2)
    m, width = gate_up.shape[0], gate_up.shape[1] // 2
    values, scale = _outputs(m, width, inverse_scales, dtype)
    if m:
        with on_device(gate_up):
            _silu_mul_quantize[(m, triton.cdiv(width, _COLUMNS))](
                gate_up, gate_up if pre_quant_scale is None else pre_quant_scale, inverse_scales.contiguous(), values,
                scale, m, width, gate_up.stride(0), PRE=pre_quant_scale is not None, BLOCK=_COLUMNS,
                SCALES=values.shape[0], num_warps=4, enable_fp_fusion=False,
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


def _outputs(m: int, k: int, inverse_scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    count, device = inverse_scales.shape[0], inverse_scales.device
    values = torch.empty((count, m, k), dtype=dtype, device=device)
    return values, torch.empty((count, m, k // 16), dtype=torch.uint8, device=device)
