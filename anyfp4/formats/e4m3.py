"""E4M3: the 8-bit floating-point numbers of NVFP4's block scales and of FP8 tensors.

One sign bit, four exponent bits (bias 7), three mantissa bits, no infinity, one NaN per sign (0x7F, 0xFF), largest
448 (Micikevicius et al., *FP8 Formats for Deep Learning*, arXiv 2209.05433). ``torch.float8_e4m3fn`` is this format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyfp4.errors import InvalidArgumentError

MAX = 448.0
#: exponent of the subnormal numbers and of the smallest normal ones
MIN_EXPONENT = -6
MANTISSA_BITS = 3
#: bit pattern of the (positive) NaN
NAN = 0x7F


def encode(x: Tensor) -> Tensor:
    """Rounds to the nearest E4M3 number, ties to even, saturating at ±448; NaN stays NaN.

    torch's own cast rounds to nearest even but turns what overflows into NaN, hence the clamp.

    Args:
        x: float32, any shape.

    Returns:
        float8_e4m3fn, shape of ``x``.
    """
    if x.dtype != torch.float32:
        raise InvalidArgumentError(f"e4m3.encode takes float32, got {x.dtype}")
    return x.clamp(-MAX, MAX).to(torch.float8_e4m3fn)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Significand and exponent of the magnitude: |x| = significand × 2^(exponent − 3).

    Subnormal numbers and zero keep the exponent −6, with a significand below 8. The sign is ignored, as NVFP4's
    unsigned block scales want it; a NaN reads as 15 × 2^5 (test for it apart).

    Args:
        x: float8_e4m3fn, any shape.

    Returns:
        (significand int32 in 0…15, exponent int32 in −6…8), shape of ``x``.
    """
    if x.dtype != torch.float8_e4m3fn:
        raise InvalidArgumentError(f"e4m3.split takes float8_e4m3fn, got {x.dtype}")
    bits = x.view(torch.uint8).to(torch.int32)
    field = (bits >> MANTISSA_BITS) & 0xF
    mantissa = bits & 0x7
    normal = field > 0
    significand = torch.where(normal, mantissa | 0x8, mantissa)
    exponent = torch.where(normal, field - 7, MIN_EXPONENT)
    return significand, exponent


def is_nan(x: Tensor) -> Tensor:
    """Where ``x`` (float8_e4m3fn) is NaN: bool, shape of ``x``."""
    return (x.view(torch.uint8) & 0x7F) == NAN
