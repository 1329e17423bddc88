"""E2M1 and E4M3 in Triton, by comparisons and bit arithmetic: the same in the interpreter and on every target.

Triton's own fp8 type is not used: Ampere has none, and conversions to it differ between targets.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

#: Triton decides on its interpreter when kernels are defined
INTERPRETING = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def float32_of(x):
    """A 16- or 32-bit float as float32; the interpreter's own conversion loses bfloat16's subnormal numbers."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def rounded(v, dtype: tl.constexpr):
    """Float32 ``v`` in ``dtype``, to nearest even; the interpreter's own conversion to bfloat16 truncates."""
    if dtype == tl.bfloat16 and INTERPRETING:
        bits = v.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(v == v, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return v.to(dtype)


@triton.jit
def _shifted(m, least, scale):
    """m + scale × the power of two in m or in ``least``, and that product: float32 m ≥ 0, powers of two.

    Floats near the sum lie as far apart as the numbers of a format near m, so the addition rounds m to the format: to
    nearest even, subnormal numbers too. The product is exact, so it would do no harm if it were fused.
    """
    shift = tl.maximum((m.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True), least) * scale
    return m + shift, shift


@triton.jit
def e2m1_magnitude(y):
    """|y| of float32 ``y`` rounded to E2M1, as float32: ties to even, saturating; NaN is 6."""
    total, shift = _shifted(tl.minimum(tl.abs(y), 6.0), 1.0, 4194304.0)  # 2²²
    return total - shift


@triton.jit
def e2m1_code(y):
    """The code of float32 ``y`` as int32 (see ``formats/e2m1.py``): ties to even, saturating, NaN is 0."""
    total, shift = _shifted(tl.minimum(tl.abs(y), 6.0), 1.0, 4194304.0)
    # the sum's last bits count steps from zero as if the whole octave had them
    steps = total.to(tl.int32, bitcast=True) - shift.to(tl.int32, bitcast=True)
    code = ((shift.to(tl.int32, bitcast=True) - 0x4A800000) >> 22) + steps
    sign = (y.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where(y == y, code | sign, 0)


@triton.jit
def e4m3_rounded(v):
    """Float32 ``v`` in 0…448, or NaN, rounded to E4M3 (to nearest even): as float32, and its int32 bits (NaN 0x7F)."""
    total, shift = _shifted(v, 0.015625, 1048576.0)  # 2⁻⁶, 2²⁰
    steps = total.to(tl.int32, bitcast=True) - shift.to(tl.int32, bitcast=True)
    code = ((shift.to(tl.int32, bitcast=True) - 0x46800000) >> 20) + steps
    return total - shift, tl.where(v == v, code, 0x7F)


@triton.jit
def e4m3_bits(v):
    """The bits that :func:`e4m3_rounded` gives."""
    _, code = e4m3_rounded(v)
    return code


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
