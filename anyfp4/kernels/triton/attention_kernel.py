# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""The kernel of attention: which rows and tiles a program has, and who merges. See ``attention.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from anyfp4.kernels.triton.attention_tile import finished, merge, product, rows_of_tile, scores, visible_values, weights
from anyfp4.kernels.triton.dependency import wait_for_inputs
from anyfp4.kernels.triton.kv_cache import cached_rows
from anyfp4.kernels.triton.quantize import store_quantized

#: integers that need no kernel of their own for some of their values
_COUNTS = ("every", "SEQUENCES", "kv_heads", "tiles", "window", "table_stride")
#: tiles whose states the merging program loads at a time; many, then few
_MANY, _FEW = tl.constexpr(16), tl.constexpr(4)


@triton.jit
def _first_place(start, s, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The first place of sequence ``s``, whose first token is ``start``: enough for the rows of those before it.

    Where every sequence has one token, a sequence is a place.
    """
    return tl.minimum(start * ((GROUP + ROWS - 1) // ROWS), start * GROUP // ROWS + s)


@triton.jit
def _sequence_of(p_start, p_length, place, SEQUENCES, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The sequence to which ``place`` belongs: its number, first token, the token after its last, its keys.

    It is guessed first, right in a step of decode and for a single sequence: one round trip to memory.
    """
    s = tl.minimum(place // ((GROUP + ROWS - 1) // ROWS), SEQUENCES - 1)
    begin, end, length = tl.load(p_start + s), tl.load(p_start + s + 1), tl.load(p_length + s)
    after = (s + 1 < SEQUENCES) & (_first_place(end, s + 1, GROUP, ROWS) <= place)
    if after | (_first_place(begin, s, GROUP, ROWS) > place):
        count = 0
        for i in range(0, SEQUENCES, 128):
            j = i + tl.arange(0, 128)
            start = tl.load(p_start + j, mask=j < SEQUENCES, other=0)
            count += tl.sum(((j < SEQUENCES) & (_first_place(start, j, GROUP, ROWS) <= place)).to(tl.int32), axis=0)
        s = count - 1
        begin, end, length = tl.load(p_start + s), tl.load(p_start + s + 1), tl.load(p_length + s)
    return s, begin, end, length


@triton.jit(do_not_specialize=_COUNTS)
def attend(
    p_q, p_k_cache, p_v_cache, p_start, p_length, p_table, p_out, p_m, p_mass, p_acc, p_arrived, p_values, p_scale,
    p_g, p_pre, every, SEQUENCES, table_stride, q_token, q_head, kv_heads, tiles, window, scale, v_scale,
    GROUP: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    SUMS: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SHARED: tl.constexpr, MERGED: tl.constexpr,
    DELAY: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, INTERPRET: tl.constexpr, SCALES: tl.constexpr = 0,
    PRE: tl.constexpr = False, OVERLAP: tl.constexpr = False,
):  # fmt: skip
    """Attention of the rows at a place, for one head of keys; a place is ROWS rows (tokens × GROUP) of a sequence.

    Program (place and head, i) takes the tiles i, i + programs, … of those that its rows see. SHARED: there are several
    such programs; each stores the states of its tiles, and the last to arrive merges. SCALES: results are quantized by
    so many global scales at p_g, into p_values and p_scale, for ``every`` token of the step; p_out has but their type.
    """
    wait_for_inputs(OVERLAP)
    # the last rows of a prompt see most keys: they go first
    place = (tl.num_programs(0) - 1 - tl.program_id(0)) // kv_heads
    kv_head = tl.program_id(0) % kv_heads
    sequence, begin, end, length = _sequence_of(p_start, p_length, place, SEQUENCES, GROUP, ROWS)
    tokens = end - begin
    first_row = (place - _first_place(begin, sequence, GROUP, ROWS)) * ROWS
    if first_row >= tokens * GROUP:
        return
    lowest = length - tokens + first_row // GROUP
    highest = length - tokens + tl.minimum((first_row + ROWS - 1) // GROUP, tokens - 1)
    first = 0
    if WINDOW:
        first = tl.maximum(lowest - window + 1, 0) // TILE
    count = (highest + TILE) // TILE - first
    if SHARED and tl.program_id(1) >= tl.maximum(count, 1):
        return
    p_table += sequence.to(tl.int64) * table_stride

    row = first_row + tl.arange(0, ROWS)
    live = row < tokens * GROUP
    token = tl.minimum(row // GROUP, tokens - 1)
    position = length - tokens + token  # [ROWS]
    head = kv_head * GROUP + row % GROUP
    d = tl.arange(0, DIM)
    p_row = p_q + (begin + token).to(tl.int64) * q_token + head * q_head
    q = tl.load(p_row[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0).to(QK)
    out_row = (begin + token).to(tl.int64) * (kv_heads * GROUP) + head

    m = tl.full((ROWS,), -float("inf"), tl.float32)
    mass = tl.zeros((ROWS, SUMS), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    # with DELAY a tile is merged while the next one's scores are computed
    m_t, mass_t, acc_t = m, mass, acc
    # SHARED: NaN from the first value on that is not finite
    broken = acc
    step = tl.num_programs(1)
    start = (first + tl.program_id(1)) * TILE
    rows = rows_of_tile(p_table, start, highest, kv_head, kv_heads, TILE, BLOCK_SIZE)
    for tile in range(first + tl.program_id(1), first + count, step):
        start = tile * TILE
        present = start + tl.arange(0, TILE) <= highest
        k = cached_rows(p_k_cache, rows, present, 0, D, DIM, D == DIM, QK)
        v = cached_rows(p_v_cache, rows, present, 0, D, DIM, D == DIM, PV)
        # a tile ahead: were they looked up in the same round, the compiler could not copy k and v ahead of their use
        rows = rows_of_tile(p_table, start + step * TILE, highest, kv_head, kv_heads, TILE, BLOCK_SIZE)
        s = scores(q, k, start, position, lowest, highest, window, TILE, WINDOW, INTERPRET)
        if DELAY:
            m, mass, acc = merge(m, mass, acc, m_t, mass_t, acc_t)
        m_t, mass_t, p = weights(s, scale, SUMS, PV, INTERPRET)
        # a value that is not finite reaches all rows here, also those that do not see it
        acc_t = product(p, v, INTERPRET)
        if SHARED:
            _store_state(p_m, p_mass, p_acc, out_row * tiles + (tile - first), live, m_t, mass_t, acc_t)
            broken = tl.fma(acc_t, tl.zeros_like(acc_t), broken)
        elif not DELAY:
            m, mass, acc = merge(m, mass, acc, m_t, mass_t, acc_t)
    if not SHARED:
        if DELAY:
            m, mass, acc = merge(m, mass, acc, m_t, mass_t, acc_t)
        y = finished(mass, acc, v_scale, p_out.dtype.element_ty)
        _store_results(
            y, p_out, p_values, p_scale, p_g, p_pre, out_row, 0, live, every, kv_heads * GROUP * D, D, SCALES, PRE
        )
        broken = acc
    if tl.max(tl.max(tl.where(tl.abs(broken) < float("inf"), 0, 1), axis=1), axis=0) > 0:
        # other threads than the first time may store a number
        tl.debug_barrier()
        _attend_to_visible(
            q, p_k_cache, p_v_cache, p_table, p_out, p_acc, p_values, p_scale, p_g, p_pre, every, out_row, live,
            position, first, count, lowest, highest, kv_head, kv_heads, tiles, window, scale, v_scale, GROUP, D, DIM,
            TILE, SUMS, BLOCK_SIZE, WINDOW, SHARED, QK, PV, INTERPRET, SCALES, PRE,
        )  # fmt: skip
    if SHARED:
        # every thread's states are stored before one thread says so
        tl.debug_barrier()
        needed = tl.minimum(step, count)
        if needed > 1:
            p_arrived += tl.program_id(0)
            if tl.atomic_add(p_arrived, 1, sem="acq_rel", scope="gpu") < needed - 1:
                return
            # ready for the next launch
            tl.store(p_arrived, 0)
        for row_ in range(first_row, tl.minimum(first_row + ROWS, tokens * GROUP), MERGED):
            _merge_tiles(
                p_out, p_m, p_mass, p_acc, p_values, p_scale, p_g, p_pre, every, row_, tokens * GROUP, begin, kv_head,
                kv_heads, tiles, count, v_scale, GROUP, D, DIM, SUMS, MERGED, SCALES, PRE,
            )  # fmt: skip


@triton.jit
def _store_state(p_m, p_mass, p_acc, here, live, m, mass, acc):
    """Stores the state of a tile for rows [R] that are live."""
    sums, d = tl.arange(0, mass.shape[1])[None, :], tl.arange(0, acc.shape[1])[None, :]
    tl.store(p_m + here, m, mask=live)
    tl.store(p_mass + here[:, None] * mass.shape[1] + sums, mass, mask=live[:, None])
    tl.store(p_acc + here[:, None] * acc.shape[1] + d, acc, mask=live[:, None])


@triton.jit
def _attend_to_visible(
    q, p_k_cache, p_v_cache, p_table, p_out, p_acc, p_values, p_scale, p_g, p_pre, every, out_row, live, position,
    first, count, lowest, highest, kv_head, kv_heads, tiles, window, scale, v_scale, GROUP: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, SUMS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SHARED: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, INTERPRET: tl.constexpr,
    SCALES: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """Does the program's work again where a value is not finite; a few columns at a time, which saves registers."""
    COLUMNS: tl.constexpr = DIM if DIM < 32 else 32
    for column in range(0, D, COLUMNS):
        d = column + tl.arange(0, COLUMNS)[None, :]
        m = tl.full((q.shape[0],), -float("inf"), tl.float32)
        mass = tl.zeros((q.shape[0], SUMS), tl.float32)
        acc = tl.zeros((q.shape[0], COLUMNS), tl.float32)
        for tile in tl.range(first + tl.program_id(1), first + count, tl.num_programs(1), num_stages=1):
            start = tile * TILE
            present = start + tl.arange(0, TILE) <= highest
            rows = rows_of_tile(p_table, start, highest, kv_head, kv_heads, TILE, BLOCK_SIZE)
            k = cached_rows(p_k_cache, rows, present, 0, D, DIM, D == DIM, QK)
            s = scores(q, k, start, position, lowest, highest, window, TILE, WINDOW, INTERPRET)
            m_t, mass_t, p = weights(s, scale, SUMS, PV, INTERPRET)
            acc_t = visible_values(
                p, p_v_cache, p_table, column, rows, present, start, position, highest, kv_head, kv_heads, window, D,
                COLUMNS, TILE, BLOCK_SIZE, WINDOW, PV, INTERPRET,
            )  # fmt: skip
            if SHARED:
                here = out_row * tiles + (tile - first)
                tl.store(p_acc + here[:, None] * DIM + d, acc_t, mask=live[:, None] & (d < D))
            else:
                m, mass, acc = merge(m, mass, acc, m_t, mass_t, acc_t)
        if not SHARED:
            y = finished(mass, acc, v_scale, p_out.dtype.element_ty)
            _store_results(
                y, p_out, p_values, p_scale, p_g, p_pre, out_row, column, live, every, kv_heads * GROUP * D, D, SCALES,
                PRE,
            )  # fmt: skip


@triton.jit
def _merge_tiles(
    p_out, p_m, p_mass, p_acc, p_values, p_scale, p_g, p_pre, every, first_row, rows, begin, kv_head, kv_heads, tiles,
    count, v_scale, GROUP: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, SUMS: tl.constexpr, MERGED: tl.constexpr,
    SCALES: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """Merges the stored states of up to MERGED rows and writes their results."""
    row = first_row + tl.arange(0, MERGED)
    live = row < rows
    out_row = (begin + row // GROUP).to(tl.int64) * (kv_heads * GROUP) + kv_head * GROUP + row % GROUP
    here = out_row * tiles
    m = tl.full((MERGED,), -float("inf"), tl.float32)
    mass = tl.zeros((MERGED, SUMS), tl.float32)
    acc = tl.zeros((MERGED, DIM), tl.float32)
    many = count // _MANY * _MANY
    for i in range(0, many, _MANY):
        m, mass, acc = _merge_stored(p_m, p_mass, p_acc, here + i, live, _MANY, m, mass, acc, _MANY)
    for i in range(many, count, _FEW):
        m, mass, acc = _merge_stored(p_m, p_mass, p_acc, here + i, live, count - i, m, mass, acc, _FEW)
    y = finished(mass, acc, v_scale, p_out.dtype.element_ty)
    _store_results(
        y, p_out, p_values, p_scale, p_g, p_pre, out_row, 0, live, every, kv_heads * GROUP * D, D, SCALES, PRE
    )


@triton.jit
def _store_results(
    y, p_out, p_values, p_scale, p_g, p_pre, out_row, first, live, every, width, D: tl.constexpr, SCALES: tl.constexpr,
    PRE: tl.constexpr,
):  # fmt: skip
    """Stores y [R, C], columns from ``first`` on of rows (token and head) ``out_row`` int64 [R], or quantizes it."""
    d = first + tl.arange(0, y.shape[1])[None, :]
    here = out_row[:, None] * D + d
    if SCALES == 0:
        tl.store(p_out + here, y, mask=live[:, None] & (d < D))
    else:
        BLOCKS: tl.constexpr = y.shape[0] * y.shape[1] // 16
        # blocks of a head: the heads of a token are one row of ``width`` columns
        i = first // 16 + tl.arange(0, y.shape[1] // 16)[None, :]
        block = tl.reshape(out_row[:, None] * (D // 16) + i, (BLOCKS,))
        present = tl.reshape(live[:, None] & (i * 16 < D), (BLOCKS,))
        column = tl.reshape(here, (BLOCKS, 16))
        pre = None
        if PRE:
            pre = tl.load(p_pre + column % width, mask=present[:, None], other=0.0)
        store_quantized(
            tl.reshape(y, (BLOCKS, 16)), pre, p_g, p_values, p_scale, 0, every, width, column, block, present, SCALES
        )


@triton.jit
def _merge_stored(p_m, p_mass, p_acc, here, live, count, m, mass, acc, AT_ONCE: tl.constexpr):
    """Merges AT_ONCE stored states of rows [R], of which the first ``count`` exist, in order."""
    sums, d = tl.arange(0, mass.shape[1])[None, :], tl.arange(0, acc.shape[1])[None, :]
    for i in tl.static_range(AT_ONCE):
        there = here + i
        present = live & (there - here < count)
        # past the first-level cache, which other programs' stores do not reach
        m_t = tl.load(p_m + there, mask=present, other=-float("inf"), cache_modifier=".cg")
        p_sums = p_mass + there[:, None] * mass.shape[1] + sums
        mass_t = tl.load(p_sums, mask=present[:, None], other=0.0, cache_modifier=".cg")
        p_values = p_acc + there[:, None] * acc.shape[1] + d
        acc_t = tl.load(p_values, mask=present[:, None], other=0.0, cache_modifier=".cg")
        m, mass, acc = merge(m, mass, acc, m_t, mass_t, acc_t)
    return m, mass, acc
