"""exp and log from additions, multiplications and divisions alone.

A library's ``exp`` may give other bits in a vector's tail than in its body, and other bits on another processor.
These are built from IEEE operations, one rounding each, on float64, so every element has the same bits wherever it
stands and whatever computes it. Both are within 0.501 units in the last place of float32 (tested on every exponent).
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634
# ln 2 in two parts; the first has 32 trailing zero bits, so that n × LN2_HIGH is exact for |n| < 2³²... ≤ 151
LN2_HIGH = 0.6931471803691238
LN2_LOW = 1.9082149292705877e-10
#: exp(x) for x below is 0 and above is infinity in float32
EXP_MIN, EXP_MAX = -104.0, 89.0
#: 1/k!, k = 9 … 0: on |r| ≤ ln(2)/2 the first term left out is below 2⁻³⁷
EXP_COEFFICIENTS = (
    1 / 362880, 1 / 40320, 1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0,
)  # fmt: skip
#: 2/(2k+1), k = 7 … 0: log(m) = Σ 2 s^(2k+1)/(2k+1), s = (m−1)/(m+1), |s| ≤ 0.1716
LOG_COEFFICIENTS = (2 / 15, 2 / 13, 2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0)


def exp(x: Tensor) -> Tensor:
    """eˣ: float32, any shape, to float32."""
    x64 = x.clamp(EXP_MIN, EXP_MAX).to(torch.float64)
    n = torch.round(x64 * LOG2_E)
    r = (x64 - n * LN2_HIGH) - n * LN2_LOW
    p = torch.full_like(r, EXP_COEFFICIENTS[0])
    for c in EXP_COEFFICIENTS[1:]:
        p = p * r + c
    # NaN has no integer; the multiplication below carries it on through p
    power = (torch.nan_to_num(n).to(torch.int64) + 1023) << 52
    return (p * power.view(torch.float64)).to(torch.float32)


def log(x: Tensor) -> Tensor:
    """ln x: float32, any shape, to float32; −∞ at 0, NaN below."""
    x64 = x.to(torch.float64)
    bits = x64.view(torch.int64)
    exponent = ((bits >> 52) & 0x7FF) - 1023
    m = ((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).view(torch.float64)  # 1 ≤ m < 2
    high = m > 1.4142135623730951
    m = torch.where(high, m * 0.5, m)
    e = (exponent + high).to(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = torch.full_like(s, LOG_COEFFICIENTS[0])
    for c in LOG_COEFFICIENTS[1:]:
        p = p * z + c
    result = (e * LN2_HIGH + (e * LN2_LOW + s * p)).to(torch.float32)
    result = torch.where(x == 0, torch.full_like(result, -torch.inf), result)
    result = torch.where(x == torch.inf, x, result)
    return torch.where((x < 0) | torch.isnan(x), torch.full_like(result, torch.nan), result)
