# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Log-probabilities and the most likely token of rows of logits.

A row is cut at fixed places into pieces of 4096, each the work of one program, so that a single row of a large
vocabulary fills a GPU. A piece's exponentials (``elementary.exp``) are summed in float64 by neighbours, the pieces'
sums likewise, and the total is rounded to float32. The definition (``ops/sampling.py``) is the exact sum rounded once;
a tree of float64 sums is off by at most 22·2⁻⁵³ of itself (one rounding a level), so the two differ only if the exact
sum lies that near a rounding boundary of float32: about one row in 10⁷. The largest of some numbers has no order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels.triton.checks import check_device, check_dtype, on_device, power_of_two
from anyfp4.kernels.triton.elementary import exp, largest, log, sum_neighbours

#: elements of a piece; part of the order of the sum
_PIECE = 4096


def _options(rows: int) -> dict[str, object]:
    """Few rows want more threads: a row of 151936 takes 6.5 us with 8 warps and 7.3 us with 4, 64 rows 51 and 49 us."""
    return {"num_warps": 4 if rows >= 16 else 8, "enable_fp_fusion": False}


@triton.jit
def _key(x, column):
    """int64 that orders logits as argmax does: NaN above all, and among equals the lower column above the higher."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # −0 is 0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(x == x, ordered, 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def _best_of_pieces(p_x, p_keys, V, pieces, row_stride, PIECE: tl.constexpr):
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(p_x + row * row_stride + column, mask=column < V, other=-float("inf"))
    best = largest(x)
    # the first of the largest; what lies past the end comes after a live −∞
    if best == best:
        first = tl.min(tl.where(x == best, column, 0x7FFFFFFF), axis=0)
    else:
        first = tl.min(tl.where(x != x, column, 0x7FFFFFFF), axis=0)
    tl.store(p_keys + row * pieces + piece, _key(best, first))


@triton.jit
def _best(p_keys, row, pieces, PIECES: tl.constexpr):
    """The largest logit of a row (−0 as 0), and its column."""
    piece = tl.arange(0, PIECES)
    key = tl.max(tl.load(p_keys + row * pieces + piece, mask=piece < pieces, other=-0x7FFFFFFFFFFFFFFF), axis=0)
    ordered = (key >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True), 0x7FFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def _shifted(p_x, p_keys, row, column, V, pieces, row_stride, PIECES: tl.constexpr):
    """x − the largest x of the row; −∞ past the end."""
    x = tl.load(p_x + row * row_stride + column, mask=column < V, other=-float("inf"))
    best, _ = _best(p_keys, row, pieces, PIECES)
    return (x - best) + 0.0  # −0 − 0 is −0


@triton.jit
def _sum_pieces(p_x, p_keys, p_sums, V, pieces, row_stride, PIECE: tl.constexpr, PIECES: tl.constexpr):
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = piece * PIECE + tl.arange(0, PIECE)
    e = exp(_shifted(p_x, p_keys, row, column, V, pieces, row_stride, PIECES)).to(tl.float64)
    e = tl.where(column < V, e, 0.0)
    tl.store(p_sums + row * pieces + piece + tl.arange(0, 1), sum_neighbours(tl.reshape(e, (1, PIECE))))


@triton.jit
def _log_softmax(
    p_x, p_keys, p_sums, p_y, V, pieces, row_stride, PIECE: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = piece * PIECE + tl.arange(0, PIECE)
    each = tl.arange(0, PIECES)
    x = _shifted(p_x, p_keys, row, column, V, pieces, row_stride, PIECES)
    sums = tl.load(p_sums + row * pieces + each, mask=each < pieces, other=0.0)
    logarithm = log(sum_neighbours(tl.reshape(sums, (1, PIECES))).to(tl.float32))
    tl.store(p_y + row * V + column, x - logarithm, mask=column < V)


@triton.jit
def _greedy(p_x, p_keys, p_ids, p_best, pieces, row_stride, PIECES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    _, place = _best(p_keys, row, pieces, PIECES)
    tl.store(p_ids + row, place)
    tl.store(p_best + row, tl.load(p_x + row * row_stride + place))


def log_softmax(logits: Tensor) -> Tensor:
    """See :func:`anyfp4.ops.sampling.log_softmax`: float32 [..., V] to float32 [..., V]."""
    _check(logits)
    y = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if y.numel() == 0:
        return y
    x, keys = _keys(logits)
    rows, pieces = keys.shape
    v, stride = x.shape[1], x.stride(0)
    sums = torch.empty(keys.shape, dtype=torch.float64, device=x.device)
    every = power_of_two(pieces)
    with on_device(x):
        _sum_pieces[(rows, pieces)](x, keys, sums, v, pieces, stride, PIECE=_PIECE, PIECES=every, **_options(rows))
        _log_softmax[(rows, pieces)](x, keys, sums, y, v, pieces, stride, PIECE=_PIECE, PIECES=every, **_options(rows))
    return y


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely token of each row, the lowest id among equals; a NaN counts as the largest.

    Args:
        logits: float32 [M, V].

    Returns:
        (ids int64 [M], their logits float32 [M], by which the caller can see a NaN or an infinity).

    Raises:
        InvalidArgumentError: wrong dtype or shape.
    """
    _check(logits)
    if logits.dim() != 2:
        raise InvalidArgumentError(f"logits must be [M, V], got {list(logits.shape)}")
    m = logits.shape[0]
    ids = torch.empty(m, dtype=torch.int64, device=logits.device)
    best = torch.empty(m, dtype=torch.float32, device=logits.device)
    if m:
        x, keys = _keys(logits)
        pieces = keys.shape[1]
        with on_device(x):
            _greedy[(m,)](x, keys, ids, best, pieces, x.stride(0), PIECES=power_of_two(pieces), num_warps=1)
    return ids, best


def _check(logits: Tensor) -> None:
    check_dtype("logits", logits, torch.float32)
    check_device(logits=logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise InvalidArgumentError(f"logits must be [..., V] with V at least 1, got {list(logits.shape)}")


def _keys(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits as rows [M, V] of unit stride, and the best key of each of their pieces, int64 [M, pieces]."""
    x = logits if logits.dim() == 2 and logits.stride(1) == 1 else logits.reshape(-1, logits.shape[-1]).contiguous()
    rows, v = x.shape
    pieces = triton.cdiv(v, _PIECE)
    keys = torch.empty((rows, pieces), dtype=torch.int64, device=x.device)
    with on_device(x):
        _best_of_pieces[(rows, pieces)](x, keys, v, pieces, x.stride(0), PIECE=_PIECE, **_options(rows))
    return x, keys
