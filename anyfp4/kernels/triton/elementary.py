# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""exp and log of ``ops/elementary.py``, and sums in an order that is written down.

The order in which ``tl.sum`` adds depends on how a tile lies in registers, and that on its shape, the number of warps
and even the alignment of a pointer. A sum over an axis of two has no order, so sums here are trees of such sums: the
same bits wherever the compiler puts the elements, on every target, and in the interpreter.

Kernels that use ``log`` are launched with ``enable_fp_fusion=False``: its definition rounds each product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anyfp4.kernels.triton.numbers import INTERPRETING
from anyfp4.ops import elementary

_LOG2_E = tl.constexpr(elementary.LOG2_E)
_LN2_HIGH, _LN2_LOW = tl.constexpr(elementary.LN2_HIGH), tl.constexpr(elementary.LN2_LOW)
_EXP_MIN, _EXP_MAX = tl.constexpr(elementary.EXP_MIN), tl.constexpr(elementary.EXP_MAX)
_EXP = tl.constexpr(elementary.EXP_COEFFICIENTS)
_LOG = tl.constexpr(elementary.LOG_COEFFICIENTS)
#: adding and subtracting it rounds a float64 below 2⁵¹ to an integer, ties to even
_ROUND = tl.constexpr(1.5 * 2.0**52)

#: a row's sum has at most 2 to the power of this many terms
_LEVELS = tl.constexpr(20)


@triton.jit
def _like(x, value: tl.constexpr):
    return tl.full(x.shape, value, tl.float64)


@triton.jit
def exp(x):
    """eˣ of a float32 tensor, bit for bit as ``ops.elementary.exp``.

    That rounds every product and every sum in float64; here they are fused, half as many operations. The float64
    results may differ in their last bits; the float32 ones do for none of the 2³² x (compared on an H200 and on a CPU).
    """
    # NaN stays NaN
    x = tl.minimum(x, _EXP_MAX, propagate_nan=tl.PropagateNan.ALL)
    x = tl.maximum(x, _EXP_MIN, propagate_nan=tl.PropagateNan.ALL).to(tl.float64)
    shifted = tl.fma(x, _like(x, _LOG2_E), _like(x, _ROUND))
    n = shifted - _ROUND
    r = tl.fma(n, _like(x, -_LN2_LOW), tl.fma(n, _like(x, -_LN2_HIGH), x))
    p = _like(x, _EXP[0])
    for i in tl.static_range(1, 10):
        p = tl.fma(p, r, _like(x, _EXP[i]))
    # times 2ⁿ: the low bits of the shifted number are those of n, which the upper half's exponent takes
    bits = p.to(tl.int64, bitcast=True)
    upper = (bits >> 32).to(tl.int32) + (shifted.to(tl.int64, bitcast=True).to(tl.int32) << 20)
    return ((upper.to(tl.int64) << 32) | (bits & 0xFFFFFFFF)).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def log(x):
    """ln x of a float32 tensor, bit for bit as ``ops.elementary.log`` for x ≥ 0 and NaN."""
    bits = x.to(tl.float64).to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) & 0x7FF) - 1023
    m = ((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).to(tl.float64, bitcast=True)
    high = m > 1.4142135623730951
    m = tl.where(high, m * 0.5, m)
    e = (exponent + high.to(tl.int64)).to(tl.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = tl.zeros_like(s) + _LOG[0]
    for i in tl.static_range(1, 8):
        p = p * z + _LOG[i]
    result = (e * _LN2_HIGH + (e * _LN2_LOW + s * p)).to(tl.float32)
    result = tl.where(x == 0.0, -float("inf"), result)
    return tl.where((x == x) & (x != float("inf")), result, x)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x):
    """The largest of float32 x [N]; NaN if there is one."""
    if INTERPRETING:  # which would call the reduction for each element
        best = tl.where(tl.max((x != x).to(tl.int32), axis=0) > 0, float("nan"), tl.max(x, axis=0))
    else:
        best = tl.reduce(x, 0, _larger)
    return best


@triton.jit
def sum_neighbours(x):
    """The sum of each row of x [R, N], N a power of two, as [R]: neighbours are added, then neighbouring sums, ….

    Cheap where a thread holds neighbours and warps lie side by side, as after a plain load.
    """
    R: tl.constexpr = x.shape[0]
    for _ in tl.static_range(_LEVELS):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, (R, x.shape[1] // 2, 2)), axis=2)
    return tl.reshape(x, (R,))


@triton.jit
def sum_halves(x):
    """The sum of each row of x [R, N], N a power of two, as [R]: the halves are added, then the halves of that, ….

    Cheap for the result of ``tl.dot``, whose threads hold columns far apart.
    """
    R: tl.constexpr = x.shape[0]
    for _ in tl.static_range(_LEVELS):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, (R, 2, x.shape[1] // 2)), axis=1)
    return tl.reshape(x, (R,))
