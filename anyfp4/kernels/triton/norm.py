# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""RMSNorm of rows that lie in one program each (short rows: several), as ``ops/norm.py`` defines it.

The sum of squares is a float64 sum of exact squares (a float32 squared fits a float64), in the order of
``elementary.sum_neighbours``, then rounded to float32. The definition is the exact sum rounded once. The float64 sum is
off by at most 17·2⁻⁵³ of itself (one rounding a level of the tree), so the two differ only if the exact sum lies that
near a rounding boundary of float32: about one row in 10⁷ whose squares have too many bits for float64. Everything else
is one IEEE operation each, so the bits are those of a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels.triton.checks import check_device, check_float, on_device, power_of_two, row_strides
from anyfp4.kernels.triton.elementary import sum_neighbours
from anyfp4.kernels.triton.numbers import rounded

#: longest row that a program holds
MAX_K = 1 << 16


@triton.jit
def inverse_root(squares, K, eps):
    """1 / √(squares / K + eps) of float64 sums of squares [R]: float32 [R]."""
    squares = squares.to(tl.float32)
    mean = tl.div_rn(squares, tl.zeros_like(squares) + K)
    root = tl.sqrt_rn(mean + eps)
    return tl.div_rn(tl.zeros_like(root) + 1.0, root)


@triton.jit
def inverse_rms(x, K, eps):
    """1 / √(mean square + eps) of each row of float32 x [R, N], which is zero from column K on: float32 [R]."""
    x64 = x.to(tl.float64)
    return inverse_root(sum_neighbours(x64 * x64), K, eps)


@triton.jit
def _rms_norm(
    p_x, p_residual, p_weight, p_y, p_total, rows, inner, outer_stride, inner_stride, K, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live = (row < rows)[:, None] & (column < K)[None, :]
    here = row[:, None] * K + column[None, :]
    weight = tl.load(p_weight + column, mask=column < K, other=0.0).to(tl.float32)
    start = (row // inner) * outer_stride + (row % inner) * inner_stride
    x = tl.load(p_x + start[:, None] + column[None, :], mask=live, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(p_residual + here, mask=live, other=0.0).to(tl.float32)
        total = rounded(x, p_total.dtype.element_ty)
        tl.store(p_total + here, total, mask=live)
        x = total.to(tl.float32)
    y = x * inverse_rms(x, K, eps)[:, None] * weight[None, :]
    tl.store(p_y + here, rounded(y, p_y.dtype.element_ty), mask=live)


def tile(k: int) -> tuple[int, int, int]:
    """(rows of a program, columns that it holds, warps) for rows of ``k``; nothing else goes into it."""
    block = power_of_two(k)
    rows = max(1, 1024 // block)
    return rows, block, min(16, max(1, rows * block // 1024))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`anyfp4.ops.norm.rms_norm`. ``x`` [..., K] may be a view with contiguous rows, such as q of q/k/v."""
    _check(x, weight)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, y, None, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`anyfp4.ops.norm.add_rms_norm`."""
    _check(x, weight)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise InvalidArgumentError(
            f"x {x.dtype} {list(x.shape)} and residual {residual.dtype} {list(residual.shape)} must be alike"
        )
    check_device(x=x, residual=residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(y)
    _launch(x, residual.contiguous(), weight, y, total, eps)
    return y, total


def _check(x: Tensor, weight: Tensor) -> None:
    check_float("x", x)
    check_float("weight", weight)
    check_device(x=x, weight=weight)
    if x.dim() == 0 or weight.shape != x.shape[-1:] or not 0 < weight.shape[0] <= MAX_K:
        raise InvalidArgumentError(
            f"weight must be [{x.shape[-1] if x.dim() else 'K'}] with 1 to {MAX_K} elements, got {list(weight.shape)}"
        )


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, y: Tensor, total: Tensor | None, eps: float) -> None:
    x, count, inner, outer_stride, inner_stride = row_strides(x)
    if count == 0:
        return
    k = x.shape[-1]
    rows, block, warps = tile(k)
    with on_device(x):
        _rms_norm[(triton.cdiv(count, rows),)](
            x, x if residual is None else residual, weight.contiguous(), y, y if total is None else total, count, inner,
            outer_stride, inner_stride, k, eps, ADD=residual is not None, ROWS=rows, BLOCK=block, num_warps=warps,
            enable_fp_fusion=False,
        )  # fmt: skip
