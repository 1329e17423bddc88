"""Exact float64 helpers that the bit models share: powers of two, exponents, truncation to float32.

Everything works on bit patterns, so it gives the same bits on every device; library functions such as
``exp2`` and ``ldexp`` need not be exact everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BIAS = 1023
_FRACTION_BITS = 52
#: clears the 29 fraction bits that float64 has and float32 has not
_FLOAT32_MASK = -(1 << 29)
_MIN_NORMAL = 2.0**-126
_OVERFLOW = 2.0**128
#: the bit pattern of every NaN that a tensor core writes
NAN_BITS = 0x7FFFFFFF


def power_of_two(k: Tensor) -> Tensor:
    """2^k for integers k in −1022…1023: float64, shape of ``k``."""
    return ((k.to(torch.int64) + _BIAS) << _FRACTION_BITS).view(torch.float64)


def exponent(x: Tensor) -> Tensor:
    """floor(log2(abs(x))) of normal float64 numbers, and −1023 of zero: int64, shape of ``x``."""
    return ((x.view(torch.int64) >> _FRACTION_BITS) & 0x7FF) - _BIAS


def truncate_normal_(x: Tensor) -> Tensor:
    """Truncates toward zero to 24 bits, in place: to float32 if zero or in its normal range."""
    x.view(torch.int64).bitwise_and_(_FLOAT32_MASK)
    return x


def truncate_(x: Tensor) -> Tensor:
    """Truncates toward zero to float32, in place, subnormal numbers included; 2^128 and more is infinite."""
    tiny = x.abs() < _MIN_NORMAL
    subnormal = (x * 2.0**149).trunc() * 2.0**-149
    truncate_normal_(x)
    torch.where(tiny, subnormal, x, out=x)
    return x.masked_fill_(x >= _OVERFLOW, torch.inf).masked_fill_(x <= -_OVERFLOW, -torch.inf)
