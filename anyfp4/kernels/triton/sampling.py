# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Choosing tokens on the GPU, as ``ops/sampling.py`` defines it: by integers, so every sum is exact in any order.

Only the chosen tokens go to the host. Without a filter, or with ``min_p`` alone, the weights of a row are summed by
pieces of 4096, and those of the piece that holds the chosen place once more. ``top_k`` and ``top_p`` look at the
heaviest tokens of a row, at most ``CANDIDATES`` of them; the rare row that needs more is chosen on the host, by the
reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels.triton.checks import on_device, power_of_two
from anyfp4.kernels.triton.elementary import exp
from anyfp4.kernels.triton.softmax import greedy
from anyfp4.ops import sampling as reference
from anyfp4.ops.philox import uniform64
from anyfp4.ops.sampling import Choice

#: heaviest tokens of a row that ``top_k`` and ``top_p`` look at
CANDIDATES = 1024
_PIECE = 4096
_ID_BITS = tl.constexpr(22)
_MAX_ID = tl.constexpr((1 << 22) - 1)
_WEIGHT_ONE = tl.constexpr(2.0**40)
#: adding and subtracting it rounds a float64 below 2⁵¹ to an integer, ties to even
_ROUND = tl.constexpr(1.5 * 2.0**52)
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def _weights(p_x, p_best, p_choices, i, column, V, row_stride, COUNT):
    """int64 weights of row ``choices[0, i]`` of the logits, 0 past the end."""
    row = tl.load(p_choices + i)
    live = column < V
    x = tl.load(p_x + row * row_stride + column, mask=live, other=-float("inf"))
    temperature = tl.load(p_choices + COUNT + i).to(tl.int32).to(tl.float32, bitcast=True)
    e = exp(tl.div_rn(x - tl.load(p_best + row), tl.zeros_like(x) + temperature))
    w = (e.to(tl.float64) * _WEIGHT_ONE + _ROUND) - _ROUND
    return tl.where(live, w, 0.0).to(tl.int64)


@triton.jit
def _sum_pieces(p_x, p_best, p_choices, p_sums, V, row_stride, COUNT, pieces, PIECE: tl.constexpr):
    i, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    w = _weights(p_x, p_best, p_choices, i, piece * PIECE + tl.arange(0, PIECE), V, row_stride, COUNT)
    w = tl.where(w >= tl.load(p_choices + 2 * COUNT + i), w, 0)
    tl.store(p_sums + i * pieces + piece, tl.sum(w, axis=0))


@triton.jit
def _place(total, p_choices, i, COUNT):
    """random × total / 2⁶⁴, rounded down."""
    random = tl.load(p_choices + 3 * COUNT + i)
    return tl.umulhi(random.to(tl.uint64, bitcast=True), total.to(tl.uint64, bitcast=True)).to(tl.int64, bitcast=True)


@triton.jit
def _draw(
    p_x, p_best, p_choices, p_sums, p_tokens, V, row_stride, COUNT, pieces, PIECE: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, PIECES)
    sums = tl.load(p_sums + i * pieces + each, mask=each < pieces, other=0)
    place = _place(tl.sum(sums, axis=0), p_choices, i, COUNT)
    piece = tl.sum((tl.cumsum(sums, axis=0) <= place).to(tl.int32), axis=0)
    place -= tl.sum(tl.where(each < piece, sums, 0), axis=0)
    w = _weights(p_x, p_best, p_choices, i, piece * PIECE + tl.arange(0, PIECE), V, row_stride, COUNT)
    w = tl.where(w >= tl.load(p_choices + 2 * COUNT + i), w, 0)
    token = piece * PIECE + tl.sum((tl.cumsum(w, axis=0) <= place).to(tl.int32), axis=0)
    tl.store(p_tokens + tl.load(p_choices + i), token.to(tl.int64))


@triton.jit
def _write_keys(p_x, p_best, p_choices, p_keys, p_sums, V, row_stride, COUNT, pieces, PIECE: tl.constexpr):
    """Weight and id in one integer, which orders tokens by weight and equals by the lower id."""
    i, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = piece * PIECE + tl.arange(0, PIECE)
    w = _weights(p_x, p_best, p_choices, i, column, V, row_stride, COUNT)
    tl.store(p_sums + i * pieces + piece, tl.sum(w, axis=0))
    tl.store(p_keys + i * V + column, (w << _ID_BITS) | (-column + _MAX_ID).to(tl.int64), mask=column < V)


@triton.jit
def _draw_heaviest(
    p_keys, p_choices, p_sums, p_tokens, count, COUNT, pieces, PIECES: tl.constexpr, CANDIDATES: tl.constexpr
):  # fmt: skip
    """Filters the sorted keys of a row, and draws; token −1 where more candidates would be needed."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, CANDIDATES)
    key = tl.load(p_keys + i * count + j, mask=j < count, other=0)
    each = tl.arange(0, PIECES)
    total = tl.sum(tl.load(p_sums + i * pieces + each, mask=each < pieces, other=0), axis=0)
    top_k, top_p = tl.load(p_choices + 4 * COUNT + i), tl.load(p_choices + 5 * COUNT + i)
    limit = tl.where(top_k > 0, top_k, CANDIDATES)
    w = tl.where((j < limit) & (j < count), key >> _ID_BITS, 0)
    found = tl.sum(w, axis=0)
    total = tl.where(top_k > 0, found, total)
    share = top_p.to(tl.float64, bitcast=True)
    enough = tl.where(share < 1.0, (total.to(tl.float64) * share).to(tl.int64), total)
    w = tl.where((tl.cumsum(w, axis=0) - w < enough) | (j == 0), w, 0)
    kept = tl.where(w >= tl.load(p_choices + 2 * COUNT + i), w, 0)
    cumulative = tl.cumsum(kept, axis=0)
    chosen = tl.sum((cumulative <= _place(tl.sum(kept, axis=0), p_choices, i, COUNT)).to(tl.int32), axis=0)
    token = tl.sum(tl.where(j == chosen, -(key & _MAX_ID) + _MAX_ID, 0), axis=0)
    tl.store(p_tokens + tl.load(p_choices + i), tl.where(found < enough, -1, token))


class Chosen:
    """Tokens that the GPU chooses, on their way to pinned memory; see :class:`anyfp4.ops.chosen.Chosen`."""

    def __init__(self, tokens: Tensor, packed: Tensor, beyond: Sequence[int]) -> None:
        """Starts the only copy to the host.

        Args:
            tokens: int64 [M], ids of the vocabulary.
            packed: int64 [3, M]: tokens or −1, the most likely tokens, the bits of their logits.
            beyond: rows that no kernel was asked to choose.
        """
        self.tokens, self._beyond = tokens, beyond
        self._host = torch.empty(packed.shape, dtype=torch.int64, pin_memory=packed.is_cuda)
        self._host.copy_(packed, non_blocking=True)
        self._copied = None
        if packed.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(packed.device))

    def get(self) -> list[int]:
        """See :meth:`anyfp4.ops.chosen.Chosen.get`."""
        if self._copied is not None:
            self._copied.synchronize()
        found = self._host.numpy()
        values = found[2].astype(np.int32).view(np.float32)
        if not np.isfinite(values).all():
            i = int(np.flatnonzero(~np.isfinite(values))[0])
            reference.refuse_broken(float(values[i]), int(found[1, i]))
        tokens: list[int] = found[0].tolist()
        for i in self._beyond:
            tokens[i] = -1
        return tokens


def sample(logits: Tensor, choices: Sequence[Choice], best: tuple[Tensor, Tensor] | None = None) -> list[int]:
    """See :func:`anyfp4.ops.sampling.sample`; arguments and errors as :func:`choose` has them.

    Returns:
        M token ids.
    """
    return [
        token if token >= 0 else reference.sample_row(logits[i].cpu().numpy(), choices[i])
        for i, token in enumerate(choose(logits, choices, best).get())
    ]


def choose(logits: Tensor, choices: Sequence[Choice], best: tuple[Tensor, Tensor] | None = None) -> Chosen:
    """Launches the choice of a token for each row, and waits for nothing.

    Args:
        logits: float32 [M, V].
        choices: M of them.
        best: what :func:`anyfp4.kernels.triton.softmax.greedy` gives for these logits, if it is known. Where every
            temperature is 0 its ids are the result's ``tokens``, not a copy of them.

    Returns:
        M token ids; −1 for rows whose filters need more candidates than the kernels look at. A broken row is refused
        when they are read.

    Raises:
        InvalidArgumentError: wrong dtype or count.
    """
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.shape[0] != len(choices):
        raise InvalidArgumentError(
            f"logits must be float32 [{len(choices)}, V], got {logits.dtype} {list(logits.shape)}"
        )
    ids, largest = best or greedy(logits)
    rows = [i for i, c in enumerate(choices) if reference.float32_temperature(c) > 0]
    tokens, beyond = ids, []
    with on_device(logits):
        if rows:
            tokens = ids.clone()
            beyond = _sample_rows(logits, largest, tokens, rows, choices)
        packed = torch.stack((tokens, ids, largest.view(torch.int32).to(torch.int64)))
        # a row that could not be chosen has −1, a broken one may have anything; what reads embeddings takes neither
        return Chosen(tokens.clamp(0, logits.shape[1] - 1) if rows else tokens, packed, beyond)


def _sample_rows(
    logits: Tensor, best: Tensor, tokens: Tensor, rows: Sequence[int], choices: Sequence[Choice]
) -> list[int]:  # fmt: skip
    """Puts a token for each of ``rows`` into ``tokens``, but for those that are returned."""
    v = logits.shape[1]
    filtered = [i for i in rows if choices[i].top_k or choices[i].top_p < 1]
    beyond = {i for i in filtered if choices[i].top_k > CANDIDATES or v > _MAX_ID.value}
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    with_filter = set(filtered)
    plain = [i for i in rows if i not in with_filter]
    filtered = [i for i in filtered if i not in beyond]
    pieces = triton.cdiv(v, _PIECE)
    for group in (plain, filtered):
        if not group:
            continue
        count = len(group)
        table = _table(group, choices, logits.device)
        sums = torch.empty((count, pieces), dtype=torch.int64, device=logits.device)
        if group is plain:
            _sum_pieces[(count, pieces)](
                logits, best, table, sums, v, logits.stride(0), count, pieces, PIECE=_PIECE, **_OPTIONS
            )
            _draw[(count,)](
                logits, best, table, sums, tokens, v, logits.stride(0), count, pieces, PIECE=_PIECE,
                PIECES=power_of_two(pieces), **_OPTIONS,
            )  # fmt: skip
        else:
            keys = torch.empty((count, v), dtype=torch.int64, device=logits.device)
            _write_keys[(count, pieces)](
                logits, best, table, keys, sums, v, logits.stride(0), count, pieces, PIECE=_PIECE, **_OPTIONS
            )
            heaviest = keys.topk(min(v, CANDIDATES), dim=1).values
            _draw_heaviest[(count,)](
                heaviest, table, sums, tokens, heaviest.shape[1], count, pieces, PIECES=power_of_two(pieces),
                CANDIDATES=CANDIDATES, **_OPTIONS,
            )  # fmt: skip
    return sorted(beyond)


def _table(rows: Sequence[int], choices: Sequence[Choice], device: torch.device) -> Tensor:
    """int64 [6, R]: row, bits of the temperature, smallest weight, random number, top_k, bits of top_p."""
    picked = [choices[i] for i in rows]
    # from pageable memory a copy would wait for all that the device has to do
    memory = torch.empty((6, len(rows)), dtype=torch.int64, pin_memory=device.type == "cuda")
    table = memory.numpy()
    table[0] = rows
    table[1] = np.array([reference.float32_temperature(c) for c in picked], dtype=np.float32).view(np.int32)
    table[2] = [reference.smallest_weight(c) for c in picked]
    table[3] = np.array([uniform64(c.seed, c.position) for c in picked], dtype=np.uint64).view(np.int64)
    table[4] = [c.top_k for c in picked]
    table[5] = np.array([c.top_p if c.top_p < 1 else math.inf for c in picked], dtype=np.float64).view(np.int64)
    return memory.to(device, non_blocking=True)
