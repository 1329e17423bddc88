"""Rounding by definition: the nearest value of a table, ties to the even code; fractions, one number at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np


def e2m1_magnitude(code: int) -> Fraction:
    """The value of code 0…7, from its bits: two of exponent (bias 1), one of mantissa."""
    exponent, mantissa = code >> 1, code & 1
    return Fraction(mantissa, 2) if exponent == 0 else Fraction(2 + mantissa, 2) * 2 ** (exponent - 1)


def e4m3_magnitude(code: int) -> Fraction:
    """The value of code 0…126, from its bits: four of exponent (bias 7), three of mantissa."""
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return Fraction(mantissa, 8) * Fraction(1, 64)
    return Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7)


E2M1 = [e2m1_magnitude(c) for c in range(8)]
E4M3 = [e4m3_magnitude(c) for c in range(127)]


def nearest(table: Sequence[Fraction], x: float) -> int:
    """The code of the magnitude nearest to |x|, ties to the even code, saturating."""
    magnitude = abs(Fraction(x)) if abs(x) != float("inf") else table[-1]
    if magnitude >= table[-1]:
        return len(table) - 1
    low = bisect_right(table, magnitude) - 1
    below, above = magnitude - table[low], table[low + 1] - magnitude
    if below == above:
        return low + (low & 1)
    return low if below < above else low + 1


def probes(table: Sequence[Fraction]) -> np.ndarray:
    """Each value and each midpoint of two, both float32 neighbours of each, and what saturates; both signs."""
    points = [float(v) for v in table]
    points += [float((a + b) / 2) for a, b in pairwise(table)]
    points += [float(table[-1] * f) for f in (Fraction(33, 32), Fraction(29, 28), Fraction(15, 14), 2, 1000)]
    at = np.array([*points, 1e-30, 1e-45, 3.4e38, np.inf], np.float32)
    around = np.concatenate((at, np.nextafter(at, np.float32(np.inf)), np.nextafter(at, np.float32(-np.inf))))
    return np.concatenate((around, -around))
