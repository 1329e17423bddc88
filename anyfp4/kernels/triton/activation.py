# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""silu(gate) × up, bit for bit as ``ops/activation.py``: one element a time, exp in float64, each product rounded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels.triton.checks import check_device, check_float, on_device
from anyfp4.kernels.triton.elementary import exp
from anyfp4.kernels.triton.numbers import float32_of, rounded


@triton.jit
def gated(gate, up):
    """silu(gate) × up of float32 tensors, unrounded."""
    return tl.div_rn(gate, 1.0 + exp(gate * -1.0)) * up


@triton.jit
def _silu_mul(p_x, p_y, width, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < width
    p_gate = p_x + row * x_stride + column
    gate = float32_of(tl.load(p_gate, mask=live, other=0.0))
    up = float32_of(tl.load(p_gate + width, mask=live, other=0.0))
    tl.store(p_y + row * width + column, rounded(gated(gate, up), p_y.dtype.element_ty), mask=live)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See :func:`anyfp4.ops.activation.silu_mul`."""
    check_float("gate_up", gate_up)
    check_device(gate_up=gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise InvalidArgumentError(f"gate_up must be [..., even], got {list(gate_up.shape)}")
    width = gate_up.shape[-1] // 2
    y = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    if y.numel() == 0:
        return y
    if gate_up.dim() != 2 or gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    stride = gate_up.stride(0) if gate_up.dim() == 2 else 2 * width
    rows = y.numel() // width
    # elements are independent, so the size of a program may follow the number of rows: few rows want many programs
    block = 256 if rows < 64 else 1024
    with on_device(gate_up):
        _silu_mul[(rows, triton.cdiv(width, block))](
            gate_up, y, width, stride, BLOCK=block, num_warps=block // 256 * 2, enable_fp_fusion=False
        )
    return y
