"""How a product's work is divided among programs. Every division gives the same bits, so the fastest may be taken.

A program takes a tile of rows and tokens, and either all segments of K in turn, or (``split``) one of them. The times
were seen on an H200 (132 multiprocessors); they grow with the number of programs of that kind that one multiprocessor
takes in turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from anyfp4.kernels.triton import workspace
from anyfp4.kernels.triton.layout import segments


@dataclass(frozen=True)
class Division:
    """One kind of program.

    Attributes:
        rows: of a tile.
        tokens: of a tile.
        split: whether a program takes one segment, and not all in turn.
        warps: of a program.
        stages: copies under way at once, and one more.
        registers: of a thread, at most; 0 for any number.
    """

    rows: int
    tokens: int
    split: bool
    warps: int = 4
    stages: int = 3
    registers: int = 0


def few(n: int, k: int, m: int, tokens: int | None = None) -> Division:
    """For an unpacked weight of any type; by default up to 64 tokens in a tile."""
    tokens = tokens or max(16, min(64, 1 << (m - 1).bit_length()))
    split = Division(64, tokens, True, registers={16: 80, 32: 128}.get(tokens, 168))
    return fitted(split, math.ceil(n / 64) * math.ceil(m / tokens), k)


def packed(n: int, k: int, m: int, multiprocessors: int) -> Division | None:
    """For a packed weight; None: it is best dequantized first and multiplied by ``gemm.py``."""
    if m <= 32:
        return few(n, k, m)
    candidates: list[tuple[float, Division | None]] = [
        (_in_turn(n, k, m, division, multiprocessors), division)
        for division in (Division(64, 64, False), Division(64, 128, False), Division(128, 128, False, warps=8))
    ]
    split = few(n, k, m)
    if split.split:
        programs = math.ceil(n / 64) * math.ceil(m / 64) * segments(k)
        candidates.append((3.5 + 3.7 * programs / multiprocessors, split))
    rows = gemm_rows(n, m, multiprocessors)
    dequantization = n * k * 0.69e-6 * 132 / multiprocessors
    candidates.append((dequantization + segments(k) * _gemm_time(n, m, rows, multiprocessors), None))
    return min(candidates, key=lambda c: c[0])[1]


def gemm_rows(n: int, m: int, multiprocessors: int) -> int:
    """Rows of a tile of ``gemm.py``."""
    return min((128, 256), key=lambda rows: _gemm_time(n, m, rows, multiprocessors))


def _in_turn(n: int, k: int, m: int, division: Division, multiprocessors: int) -> float:
    """Microseconds where a program takes all segments."""
    load = math.ceil(n / division.rows) * math.ceil(m / division.tokens) / multiprocessors
    if division.tokens == 64:
        # three such programs run together
        time = 9.4 * math.ceil(load / 3) if load > 3 else {1: 5.1, 2: 6.9}.get(math.ceil(load), 9.6)
    else:
        time = (6.4 if division.rows == 64 else 9.1) * math.ceil(load)
    return segments(k) * time


def _gemm_time(n: int, m: int, rows: int, multiprocessors: int) -> float:
    """Microseconds for each segment."""
    programs = math.ceil(n / rows) * math.ceil(m / 128)
    return (6.6 if rows == 128 else 11.9) * math.ceil(programs / multiprocessors)


def fitted(work: Division, tiles: int, k: int) -> Division:
    """``work``, or without the split where its sums have no room or there is but one segment."""
    parts = segments(k)
    if work.split and (parts == 1 or not workspace.fits(tiles, parts * work.rows * work.tokens)):
        return replace(work, split=False, registers=0)
    return work
