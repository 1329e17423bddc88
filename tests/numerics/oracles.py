"""Scalar oracles for the bit models: Python integers and fractions, one output at a time, no torch arithmetic."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from fractions import Fraction

NAN_BITS = 0x7FFFFFFF


def floor_log2(x: Fraction) -> int:
    """floor(log2(|x|)), x not zero."""
    n, d = abs(x.numerator), x.denominator
    e = n.bit_length() - d.bit_length()
    return e if Fraction(2) ** e <= abs(x) else e - 1


def truncate(x: Fraction, unit: Fraction) -> Fraction:
    """Toward zero, to a multiple of ``unit``."""
    return int(x / unit) * unit


def truncate_to_float32(x: Fraction) -> float:
    """Toward zero, to float32, subnormal numbers included; infinite from 2^128 on."""
    if x == 0:
        return 0.0
    x = truncate(x, Fraction(2) ** (max(floor_log2(x), -126) - 23))
    if abs(x) >= 2**128:
        return math.copysign(math.inf, x)
    return float(x)


def float32_bits(x: float) -> int:
    """The pattern of a float32 value; the one NaN of tensor cores for any NaN."""
    if math.isnan(x):
        return NAN_BITS
    return int.from_bytes(struct.pack("<f", x), "little")


def e2m1(code: int) -> Fraction:
    """The value of a code, from its bits."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    magnitude = Fraction(mantissa, 2) if exponent == 0 else Fraction(2 + mantissa, 2) * 2 ** (exponent - 1)
    return -magnitude if sign else magnitude


def e4m3(byte: int) -> tuple[Fraction, int] | None:
    """Significand and exponent of a scale's magnitude, from its bits; None if NaN."""
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return None
    if exponent == 0:
        return Fraction(mantissa, 8), -6
    return Fraction(8 + mantissa, 8), exponent - 7


def blackwell(a: Sequence[int], sa: Sequence[int], b: Sequence[int], sb: Sequence[int], align: bool = True) -> int:
    """One output of the NVFP4 instruction, as bits.

    Args:
        a: codes of a row, K of them.
        sa: its scales, K/16 bytes.
        b: codes of a column.
        sb: its scales.
        align: False leaves out the truncation of the terms, to see where it matters.
    """
    scales = [(e4m3(x), e4m3(y)) for x, y in zip(sa, sb, strict=True)]
    products = [e2m1(x) * e2m1(y) for x, y in zip(a, b, strict=True)]
    acc = Fraction(0)
    for start in range(0, len(scales), 4):
        terms = []
        exponents = []
        for j in range(start, min(start + 4, len(scales))):
            x, y = scales[j]
            if x is None or y is None:
                return NAN_BITS
            block = products[16 * j : 16 * j + 16]
            if x[0] == 0 or y[0] == 0 or not any(block):
                continue
            exponents.append(x[1] + y[1])
            terms.append(sum(block) * x[0] * y[0] * Fraction(2) ** exponents[-1])
        if acc:
            exponents.append(floor_log2(acc))
            terms.append(acc)
        if align and terms:
            unit = Fraction(2) ** (max(exponents) - 35)
            terms = [truncate(t, unit) for t in terms]
        acc = Fraction(truncate_to_float32(sum(terms, Fraction(0))))
    return float32_bits(float(acc))


def hopper(acc: float, a: Sequence[float], b: Sequence[float], smallest: int) -> float:
    """One instruction for one output: ``acc`` plus 16 products.

    Args:
        acc: a float32 value.
        a: values of a row, at most 16.
        b: values of a column.
        smallest: the smallest exponent of the inputs' format.
    """
    ieee = [x * y for x, y in zip(a, b, strict=True) if not (math.isfinite(x) and math.isfinite(y))]
    if ieee or not math.isfinite(acc):
        return sum(ieee) + (acc if not math.isfinite(acc) else 0.0)  # ∞ − ∞ and NaN make NaN
    exponents, terms = [-133], []
    for x, y in zip(a, b, strict=True):
        if x and y:
            p, q = Fraction(x), Fraction(y)
            exponents.append(max(floor_log2(p), smallest) + max(floor_log2(q), smallest))
            terms.append(p * q)
    if acc:
        exponents.append(max(floor_log2(Fraction(acc)), -126))
        terms.append(Fraction(acc))
    unit = Fraction(2) ** (max(exponents) - 25)
    return truncate_to_float32(sum((truncate(t, unit) for t in terms), Fraction(0)))
