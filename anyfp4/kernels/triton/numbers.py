"""E2M1 and E4M3 in Triton, by comparisons and bit arithmetic: the same in the interpreter and on every target.

Triton's own fp8 type is not used: Ampere has none, and conversions to it differ between targets.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def float32_of(x):
    """A 16- or 32-bit float as float32; the interpreter's own conversion loses bfloat16's subnormal numbers."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def rounded(v, dtype: tl.constexpr):
    """Float32 ``v`` in ``dtype``, to nearest even; the interpreter's own conversion to bfloat16 truncates."""
    if dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(v == v, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return v.to(dtype)


@triton.jit
def e2m1_code(y):
    """The code of float32 ``y`` as int32 (see ``formats/e2m1.py``): ties to even, saturating, NaN is 0."""
    m = tl.abs(y)
    code = (m > 0.25).to(tl.int32) + (m >= 0.75).to(tl.int32) + (m > 1.25).to(tl.int32) + (m >= 1.75).to(tl.int32)
    code += (m > 2.5).to(tl.int32) + (m >= 3.5).to(tl.int32) + (m > 5.0).to(tl.int32)
    sign = (y.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where(y == y, code | sign, 0)


@triton.jit
def e2m1_rounded(y):
    """Float32 ``y`` rounded to E2M1, as float32: to nearest even, saturating, NaN is +0."""
    m = tl.minimum(tl.abs(y), 6.0)
    # above 2²² times the step (a half of m's power of two, at least of 1) a float32 has no finer bits: adding rounds
    power = tl.maximum(m.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    magic = (power + 0x0B000000).to(tl.float32, bitcast=True)
    value = ((m + magic) - magic).to(tl.int32, bitcast=True) | (y.to(tl.int32, bitcast=True) & -2147483648)
    return tl.where(y == y, value.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def e4m3_bits(v):
    """E4M3 of float32 ``v`` in 0…448, to nearest even, as int32 bits; NaN is 0x7F."""
    bits = v.to(tl.int32, bitcast=True)
    # the carry of rounding runs into the exponent, as it should; 120 = difference of the biases
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # below 2⁻⁶: a multiple of 2⁻⁹; an addition of floats would do, but could be fused with a product before it
    significand = (bits & 0x7FFFFF) | 0x800000
    shift = tl.minimum(tl.maximum(141 - (bits >> 23), 1), 25)
    subnormal = (significand + (1 << (shift - 1)) - 1 + ((significand >> shift) & 1)) >> shift
    code = tl.where(bits < 0x3C800000, subnormal, normal)  # 2⁻⁶
    return tl.where(v == v, code, 0x7F)


@triton.jit
def e4m3_float(code):
    """The float32 value of int32 E4M3 bits 0…255: exact, NaN included."""
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where((code & 0x80) != 0, -value, value)


@triton.jit
def e4m3_half(code):
    """The float16 value of int32 E4M3 bits 0…255: exact, NaN included."""
    # in float16's places the seven low bits read as value × 2⁻⁸, subnormal numbers too
    bits = ((code & 0x7F) << 7) | ((code & 0x80) << 8)
    value = bits.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)
