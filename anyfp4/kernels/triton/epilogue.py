"""What follows a sum over K: the sum of the segments, scales, bias, one rounding.

    y = round((sum × alpha) + bias)

with alpha float32 of the output row, or (FP8) the product of the token's scale and the row's. Launched with
``enable_fp_fusion=False``: a fused multiply-add would round once where the definition rounds twice.

Where the segments of a tile are the work of several programs, each leaves its sum in memory and counts itself; the one
that finds all others counted adds the sums in order. So the order is that of one program, in the same launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anyfp4.kernels.triton.numbers import rounded


@triton.jit
def scaled(acc, alpha, row, bias, ROW: tl.constexpr, BIAS: tl.constexpr):
    """The result in float32; ``alpha``, ``row`` and ``bias`` broadcast against ``acc``."""
    if ROW:
        acc = acc * (row * alpha)
    else:
        acc = acc * alpha
    if BIAS:
        acc = acc + bias
    return acc


@triton.jit
def finish(total, p_y, p_alpha, p_bias, p_row, n, end, m, M, N, unit, ROW: tl.constexpr, BIAS: tl.constexpr):
    """Scales the sums [R, T] of rows ``n`` before ``end`` and tokens ``m``, and stores them in y [M, N]."""
    near = tl.minimum(n, end - 1)
    alpha = tl.load(p_alpha + near)[:, None]
    row = tl.load(p_row + m, mask=m < M, other=0.0)[None, :] if ROW else alpha
    bias = tl.load(p_bias + near)[:, None] if BIAS else alpha
    y = scaled(total * unit, alpha, row, bias, ROW, BIAS)
    here = m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(p_y + here, rounded(y, p_y.dtype.element_ty), mask=(n[:, None] < end) & (m[None, :] < M))


@triton.jit
def sum_of_segments(acc, p_sums, p_counters, slot, segment, SEGMENTS: tl.constexpr):
    """One program's part of a tile that SEGMENTS programs share.

    Args:
        acc: float32 [R, T], the sum of this program's segment.
        p_sums: float32, SEGMENTS · R · T for each slot.
        p_counters: int32, one for each slot; zero before and after.
        slot: of the tile.
        segment: of this program.
        SEGMENTS: how many there are.

    Returns:
        (whether this program came last, and then the sum of all segments, float32 [R, T]).
    """
    R: tl.constexpr = acc.shape[0]
    T: tl.constexpr = acc.shape[1]
    p = p_sums + slot * (SEGMENTS * R * T) + tl.arange(0, R)[:, None] * T + tl.arange(0, T)[None, :]
    tl.store(p + segment * (R * T), acc)
    # every thread has stored before one of them counts the program
    tl.debug_barrier()
    last = tl.atomic_add(p_counters + slot, 1, sem="acq_rel") == SEGMENTS - 1
    if last:
        # past the first-level cache, which other programs' stores do not reach
        acc = tl.load(p, cache_modifier=".cg")
        for s in tl.static_range(1, SEGMENTS):
            acc = acc + tl.load(p + s * (R * T), cache_modifier=".cg")
        tl.store(p_counters + slot, 0)
    return last, acc
