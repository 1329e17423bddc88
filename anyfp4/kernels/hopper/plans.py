"""Which plan a product takes: by shape and tokens, from measurements on an H200. No plan changes a bit.

Microseconds of the product alone, K columns read as 9/16 byte each (TB/s), CUDA graphs, weights larger than the L2:

    rows × columns      1 token      16 tokens    64 tokens    128    256
    57344 × 8192        67 (3.9)     76 (3.5)     120
    24576 × 4096        18 (3.1)     20 (2.8)     26           49     82
    8192 × 8192         13 (2.9)     15 (2.5)     22           32     50
    4096 × 12288        12 (2.4)     12 (2.3)     21           34     45
    6144 × 4096         7.2 (2.0)    8.7 (1.6)    12           18     25
    4096 × 4096         6.3 (1.5)    6.7 (1.4)    8.7          12     19

Many rows: the row tiles that a multiprocessor gets are taken side by side and share x. Few rows: the segments of K are
taken side by side, by the warpgroups of a block and by the blocks of a cluster.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from anyfp4.kernels.hopper.plan import SEGMENT, Plan

#: shared memory of a block, bytes; and for two of them on a multiprocessor
MOST, HALF = 227 << 10, 112 << 10
#: registers of a computing thread, by warpgroups, where the compiler's share would not do; all of them come out of
#: what the launch gives the block
REGISTERS = {2: 232, 3: 152, 4: 104}
#: chunks of 64 columns in a stage, and most stages
_STEP, _STAGES = 2, 12
#: microseconds that 64 columns of K take for the plan of a block (tokens, row tiles, parts), where a multiprocessor has
#: one item, and where it has several in turn
_MICROSECONDS = {
    (64, 1, 1): (0.175, 0.18), (64, 1, 2): (0.31, 0.33), (64, 3, 1): (0.38, 0.38), (128, 1, 1): (0.245, 0.275),
    (128, 2, 1): (0.4, 0.43),
}  # fmt: skip


@lru_cache(maxsize=4096)
def choose(n: int, k: int, m: int, processors: int, float16: bool = False) -> Plan:
    """The plan for m tokens and N × K weights on a GPU of so many multiprocessors.

    Args:
        n: rows.
        k: columns.
        m: tokens, from 1 on.
        processors: of the GPU.
        float16: type of the activation; otherwise bfloat16.
    """
    tiles, segments = math.ceil(n / 64), math.ceil(k / SEGMENT)
    if m <= 32:
        plan = _few(tiles, segments, k, 8 if m <= 8 else 16 if m <= 16 else 32, processors)
    elif m <= 64:
        plan = _middle(tiles, segments, k, processors)
    else:
        plan = _many(tiles, segments, k, m, processors)
    return replace(plan, float16=int(float16))


def time(plan: Plan, n: int, k: int, m: int, processors: int) -> float:
    """Microseconds of a product as ``gemm.packed_time`` counts them, for plans that 65 tokens and more may take."""
    rounds = math.ceil(
        math.ceil(math.ceil(n / 64) / plan.row_tiles) * math.ceil(m / plan.tokens) * plan.cluster / processors
    )
    each = _MICROSECONDS[plan.tokens, plan.row_tiles, plan.parts][rounds > 1]
    return rounds * each * min(plan.segments_each(k) * SEGMENT, k) / 64


def _few(tiles: int, segments: int, k: int, tokens: int, processors: int) -> Plan:
    """By ``mma.sync``: many warps, up to seven warpgroups in a block."""
    most = 7 if tokens < 32 else 4
    if tiles > processors:
        rows = _side_by_side(tiles, range(2, most + 1), processors)
        step = 4 if tokens < 32 and rows > 2 else _STEP
        whole, halves = (Plan(tokens, rows, parts, 1, 0, step, sync=1) for parts in (1, 2))
        split = rows == 2 and segments > 1 and halves.shared(k, stages=2) <= MOST
        return _fit(halves if split else whole, k, MOST)
    cluster = _cluster(tiles, segments, processors)
    each = math.ceil(math.ceil(segments / cluster) / min(most, 6))
    for parts in range(math.ceil(math.ceil(segments / cluster) / each), 0, -1):
        plan = Plan(tokens, 1, parts, cluster, 0, _STEP, sync=1)
        if plan.shared(k, stages=2) <= MOST:
            best = _fit(plan, k, HALF if parts <= 4 else MOST)
            if best.stages > 2:
                return best
            # two short stages are too few
            longer = replace(plan, step=2 * _STEP)
            return _fit(longer if longer.shared(k, stages=2) <= MOST else plan, k, MOST)
    return _fit(Plan(tokens, 1, 1, 1, 0, _STEP, sync=1), k, MOST)


def _middle(tiles: int, segments: int, k: int, processors: int) -> Plan:
    """By ``wgmma`` with 64 tokens a tile, of which there is one."""
    if tiles > processors:
        rows = _side_by_side(tiles, (2, 3, 4), processors)
        registers = 0 if rows == 2 else REGISTERS[rows]
        return _fit(Plan(64, rows, 1, 1, 0, _STEP, 1 if rows == 4 else 2, registers), k, MOST)
    plan = _split(tiles, segments, k, processors)
    # so many segments that their sums would fill the shared memory
    return plan if plan.shared(k) <= MOST else _few(tiles, segments, k, 32, processors)


def _many(tiles: int, segments: int, k: int, m: int, processors: int) -> Plan:
    """By ``wgmma`` with 64 or 128 tokens a tile: what ends first, by the measured times."""
    plans = [
        _split(tiles * math.ceil(m / 64), segments, k, processors),
        _fit(Plan(64, 3, 1, 1, 0, _STEP, 2, REGISTERS[3]), k, MOST),
        _fit(Plan(128, 1, 1, 1, 0, _STEP, 2), k, MOST),
        _fit(Plan(128, 2, 1, 1, 0, _STEP, 2, REGISTERS[2]), k, MOST),
    ]
    return min((p for p in plans if p.shared(k) <= MOST), key=lambda p: time(p, 64 * tiles, k, m, processors))


def _split(items: int, segments: int, k: int, processors: int) -> Plan:
    """Tiles of 64 rows × 64 tokens, whose segments are shared by as many blocks as there are multiprocessors for, and
    by two warpgroups of a block, if three stages fit beside their sums.
    """
    cluster = _cluster(items, segments, processors)
    if segments > cluster:
        plan = _fit(Plan(64, 1, 2, cluster, 0, _STEP), k, MOST)
        if plan.stages > 2:
            return plan
    return _fit(Plan(64, 1, 1, cluster, 0, _STEP, 2), k, MOST)


def _side_by_side(tiles: int, candidates: range | tuple[int, ...], processors: int) -> int:
    """Row tiles of a block: as few tiles in turn on a multiprocessor as can be, then as many at once."""
    return min(candidates, key=lambda rows: (math.ceil(math.ceil(tiles / rows) / processors) * rows, -rows))


def _cluster(tiles: int, segments: int, processors: int) -> int:
    """Blocks that share a row tile."""
    return max(c for c in (1, 2, 4) if c == 1 or (c * tiles <= processors and c <= segments))


def _fit(plan: Plan, k: int, limit: int) -> Plan:
    """The plan with as many stages as fit, at least two."""
    stages = _STAGES
    while stages > 2 and plan.shared(k, stages) > limit:
        stages -= 1
    return replace(plan, stages=stages)
