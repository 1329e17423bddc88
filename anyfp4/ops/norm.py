"""RMSNorm, alone and with the residual added first."""

from __future__ import annotations

import torch
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.ops import exact


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) × weight (Zhang and Sennrich, arXiv 1910.07467), along the last axis.

    The sum of squares is exact, rounded once; the rest is float32, one rounding an operation; one rounding to the
    type of ``x`` at the end.

    Args:
        x: [..., K] bfloat16, float16 or float32.
        weight: [K].
        eps: added to the mean square.

    Returns:
        [..., K], dtype of ``x``.

    Raises:
        InvalidArgumentError: the shapes do not fit.
    """
    if weight.shape != x.shape[-1:]:
        raise InvalidArgumentError(f"weight must be [{x.shape[-1]}], got {list(weight.shape)}")
    mean = exact.square_sum(x) / x.shape[-1]
    # torch's float32 square root is off by a unit in one value of six on x86 (MKL); float64's rounds to the right one
    inverse = 1.0 / torch.sqrt((mean + eps).to(torch.float64)).to(torch.float32)
    return (x.to(torch.float32) * inverse.unsqueeze(-1) * weight.to(torch.float32)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream's step: residual' = x + residual (rounded to its type), y = rms_norm(residual').

    Args:
        x: [..., K], the last block's output.
        residual: [..., K], same dtype.
        weight: [K].
        eps: added to the mean square.

    Returns:
        (y, residual'), both [..., K].
    """
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise InvalidArgumentError(
            f"x {x.dtype} {list(x.shape)} and residual {residual.dtype} {list(residual.shape)} must be alike"
        )
    residual = (x.to(torch.float32) + residual.to(torch.float32)).to(x.dtype)
    return rms_norm(residual, weight, eps), residual
