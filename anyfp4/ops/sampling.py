"""Log-probabilities, and choosing a token, the same for a row whatever rows stand beside it.

How a token is drawn is defined by integers. With x = (logit − largest logit) / temperature in float32, a token's weight
is eˣ (``elementary.exp``, 1 for the most likely token) times 2⁴⁰, rounded to an integer. Filters keep some tokens;
the random number picks a place in the sum of their weights. Integer sums are exact, so no order of summation can show.

Nobody needs the weights of a whole vocabulary for that, as a rule: the filters keep few tokens, and without filters a
float32 estimate with a known bound on its error shows which token lies at the chosen place. Where the bound leaves a
doubt, all weights are computed. Everything runs on numpy and so on the calling thread: waking torch's thread pool for
one row of a vocabulary costs more than the work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, float32

from anyfp4.errors import InvalidArgumentError
from anyfp4.ops import elementary, exact
from anyfp4.ops.philox import uniform64

Row = npt.NDArray[np.float32]
_Ids = npt.NDArray[np.int64]

#: the most likely token's weight; a token 2⁴¹ times less likely weighs nothing
_WEIGHT_BITS = 40
_WEIGHT_ONE = 1 << _WEIGHT_BITS
#: a weight and an id together fit an int64
_ID_BITS = 22
_MAX_ID = (1 << _ID_BITS) - 1
#: elements of a row in one group, where groups are looked at before elements
_GROUP = 64
#: elements summed in float32 at a time, and weights computed at a time (so that temporaries stay in the cache)
_SUM, _CHUNK = 128, 8192
#: relative error of the estimate: numpy's float32 exp is within 4 units in the last place, counted here as 2⁻²⁰; the
#: exact weight's own rounding 2⁻²⁴; a sum of 128 terms at most 127·2⁻²⁴ in any order
_ESTIMATE_ERROR = 2.0**-16
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Choice:
    """How one row's token is chosen.

    Attributes:
        temperature: 0 takes the most likely token (the lowest id among equals).
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the most likely tokens that together have at least this probability.
        min_p: only tokens at least this fraction as likely as the most likely one.
        seed: 64-bit key of the random numbers.
        position: counter of the random numbers: the absolute position of the token to be chosen.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0


def log_softmax(logits: Tensor) -> Tensor:
    """(x − max) − ln Σ e^(x − max), the sum exact and rounded once: float32 [M, V] to float32 [M, V].

    Raises:
        InvalidArgumentError: ``logits`` is not float32.
    """
    if logits.dtype != float32:
        raise InvalidArgumentError(f"logits must be float32, got {logits.dtype}")
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return shifted - elementary.log(exact.total(elementary.exp(shifted))).unsqueeze(-1)


def sample(logits: Tensor, choices: Sequence[Choice]) -> list[int]:
    """Chooses a token for every row; see :func:`sample_row`.

    Args:
        logits: float32 [M, V].
        choices: one for each row.

    Returns:
        M token ids.

    Raises:
        InvalidArgumentError: wrong dtype or count, or a broken row.
    """
    if logits.dtype != float32 or logits.dim() != 2 or logits.shape[0] != len(choices):
        raise InvalidArgumentError(
            f"logits must be float32 [{len(choices)}, V], got {logits.dtype} {list(logits.shape)}"
        )
    return [sample_row(row, choice) for row, choice in zip(logits.cpu().numpy(), choices, strict=True)]


def sample_row(row: Row, choice: Choice) -> int:
    """Chooses one token.

    Filters apply in the order top_k, top_p, min_p, on the probabilities after the temperature. "Most likely" goes by
    weight, and among equal weights the lower id comes first.

    Args:
        row: float32 [V].
        choice: how.

    Raises:
        InvalidArgumentError: the row holds a NaN or +∞, or nothing but −∞.
    """
    token = int(np.argmax(row))  # a NaN, if there is one
    best = float(row[token])
    if not math.isfinite(best):
        refuse_broken(best, token)
    temperature = float32_temperature(choice)
    if temperature == 0:
        return token
    with np.errstate(over="ignore", under="ignore"):
        scaled = _Scaled(row, best, temperature)
        random = uniform64(choice.seed, choice.position)
        smallest = smallest_weight(choice)
        if choice.top_k:
            ids, weights = _top_k(scaled, choice.top_k)
            if choice.top_p < 1:
                ids, weights = _cut(ids, weights, int(choice.top_p * int(weights.sum())))
        elif choice.top_p < 1:
            ids, weights = _top_p(scaled, choice.top_p)
        elif choice.min_p > 0:
            ids = scaled.at_least(smallest)
            weights = scaled.weights(ids)
        else:
            return _draw_any(scaled, random)
        return int(ids[_draw(np.where(weights >= smallest, weights, 0), random)])


@dataclass(frozen=True, slots=True)
class Ranked:
    """Where a token stands among the elements of its row, and the largest of them.

    Attributes:
        own: the token's element.
        rank: from 1 on; among equals the lower id comes first.
        ids: of the largest elements, largest first.
        values: the largest elements.
    """

    own: float
    rank: int
    ids: list[int]
    values: list[float]


def rank(rows: Tensor, tokens: Sequence[int], count: int) -> list[Ranked]:
    """Ranks one token in each row; on a GPU nothing but the result is copied to the host.

    Args:
        rows: float32 [M, V].
        tokens: M of them.
        count: how many of the largest elements of each row.
    """
    count = min(count, rows.shape[1])
    if not rows.is_cpu:
        return rank_on_device(rows, tokens, count)
    found = []
    for row, token in zip(rows.numpy(), tokens, strict=True):
        own = row[token]
        place = 1 + int(np.count_nonzero(row > own)) + int(np.count_nonzero(row[:token] == own))
        ids = largest(row, count) if count else np.empty(0, dtype=np.int64)
        found.append(Ranked(float(own), place, ids.tolist(), row[ids].tolist()))
    return found


def rank_on_device(rows: Tensor, tokens: Sequence[int], count: int) -> list[Ranked]:
    """:func:`rank` by torch's ops, for at most V elements of each row; arguments as there."""
    token = torch.tensor(tokens, device=rows.device).unsqueeze(1)
    ids = torch.arange(rows.shape[1], device=rows.device)
    own = rows.gather(1, token)
    place = 1 + (rows > own).sum(dim=1) + ((rows == own) & (ids < token)).sum(dim=1)
    # one integer holds both keys: floats in order (−0 as 0), and among equals the lower id above the higher
    bits = (rows + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    best = 0x7FFFFFFF - (((ordered << 32) | (0x7FFFFFFF - ids)).topk(count, dim=1).values & 0xFFFFFFFF)
    values = torch.cat((own, rows.gather(1, best)), dim=1).cpu().tolist()
    places = torch.cat((place.unsqueeze(1), best), dim=1).cpu().tolist()
    return [Ranked(v[0], p[0], p[1:], v[1:]) for v, p in zip(values, places, strict=True)]


def float32_temperature(choice: Choice) -> float:
    """The temperature as it divides: rounded to float32, and finite."""
    return min(float(np.float32(min(choice.temperature, _FLOAT32_MAX))), _FLOAT32_MAX)


def smallest_weight(choice: Choice) -> int:
    """The least weight of a token that may be chosen."""
    return int(choice.min_p * _WEIGHT_ONE) if choice.min_p > 0 else 1


def refuse_broken(best: float, token: int) -> NoReturn:
    """Raises InvalidArgumentError for a row whose largest logit is not a number one can sample by."""
    what = "NaN" if math.isnan(best) else best
    raise InvalidArgumentError(f"the largest logit is {what} (token {token}): the model or its input is broken")


def largest(row: Row, count: int) -> _Ids:
    """The ids of the ``count`` largest elements, largest first, the lower id first among equals."""
    reach = np.flatnonzero(row >= _reach(row, count))
    return reach[np.argsort(-row[reach], kind="stable")[:count]]


def _reach(row: Row, count: int) -> np.float32:
    """A value that at least ``count`` elements reach, and not many more."""
    groups = row.shape[0] // _GROUP
    if count > groups:
        return np.float32(np.partition(row, -min(count, row.shape[0]))[-min(count, row.shape[0])])
    # the best of each of these groups reaches the count-th of the groups' maxima
    maxima = row[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
    return np.float32(np.partition(maxima, -count)[-count])


@dataclass(frozen=True, slots=True)
class _Scaled:
    """A row of logits with its maximum and the temperature: x = (row − best) / temperature, in float32."""

    row: Row
    best: float
    temperature: float

    def x(self, ids: _Ids | slice) -> Row:
        return (self.row[ids] - np.float32(self.best)) / np.float32(self.temperature)

    def weights(self, ids: _Ids | slice) -> _Ids:
        """The exact weights of some tokens: int64."""
        return np.rint(_exp(self.x(ids)).astype(np.float64) * _WEIGHT_ONE).astype(np.int64)

    def at_least(self, weight: int) -> _Ids:
        """The ids of all tokens whose weight may be ``weight`` or more (1 or more, if it is 0), in order.

        A weight of w or more needs eˣ ≥ (w − ½)·2⁻⁴⁰ up to 2⁻²⁴ of itself, and x is off by less than 2⁻²² of itself.
        """
        x = math.log((max(weight, 1) - 0.5) / _WEIGHT_ONE) - 2.0**-20
        limit = max(self.best + self.temperature * x * (1 + 2.0**-20), -_FLOAT32_MAX)
        return np.flatnonzero(self.row >= np.nextafter(np.float32(limit), np.float32(-np.inf)))

    def estimate(self) -> tuple[Row, npt.NDArray[np.float64]]:
        """eˣ of all tokens in float32, and the sums of each 128 of them."""
        x = self.x(slice(None))
        np.exp(x, out=x)
        return x, np.add.reduceat(x, np.arange(0, x.shape[0], _SUM)).astype(np.float64)

    def total(self) -> int:
        """The exact sum of all weights."""
        starts = range(0, self.row.shape[0], _CHUNK)
        return sum(int(self.weights(slice(i, i + _CHUNK)).sum()) for i in starts)


def _exp(x: Row) -> Row:
    """``elementary.exp`` on numpy: the same operations, and so the same bits. Without NaN."""
    x64 = np.clip(x, elementary.EXP_MIN, elementary.EXP_MAX).astype(np.float64)
    n = np.rint(x64 * elementary.LOG2_E)
    r = (x64 - n * elementary.LN2_HIGH) - n * elementary.LN2_LOW
    p = np.full_like(r, elementary.EXP_COEFFICIENTS[0])
    for c in elementary.EXP_COEFFICIENTS[1:]:
        p *= r
        p += c
    power = (n.astype(np.int64) + 1023) << 52
    p *= power.view(np.float64)
    return p.astype(np.float32)


def _top_k(scaled: _Scaled, k: int) -> tuple[_Ids, _Ids]:
    """The k heaviest tokens and their weights, heaviest first."""
    k = min(k, scaled.row.shape[0])
    reached = _Scaled(np.array([_reach(scaled.row, k)]), scaled.best, scaled.temperature)
    # logits that differ may have equal weights, of which the lowest ids count
    ids, weights = _by_weight(scaled, scaled.at_least(int(reached.weights(slice(None))[0])))
    return ids[:k], weights[:k]


def _top_p(scaled: _Scaled, top_p: float) -> tuple[_Ids, _Ids]:
    """The heaviest tokens that together have ``top_p`` of all weight, and their weights, heaviest first."""
    p, sums = scaled.estimate()
    total, size = float(sums.sum()), p.shape[0]
    rest = (1 - top_p) * total
    if rest < size * 2.0 ** (2 - _WEIGHT_BITS):  # so close to 1 that rounded weights count
        ids, weights = _by_weight(scaled, scaled.at_least(1))
        return _cut(ids, weights, int(top_p * int(weights.sum())))
    # tokens below half the average of the rest cannot make up the rest, so none of them is kept
    ids, weights = _by_weight(scaled, np.flatnonzero(p >= np.float32(rest / size / 2)))
    error = total * _ESTIMATE_ERROR + size * 2.0**-_WEIGHT_BITS
    low, high = (_cut(ids, weights, int(top_p * int(t * _WEIGHT_ONE))) for t in (total - error, total + error))
    if low[0].shape == high[0].shape:
        return low
    return _cut(ids, weights, int(top_p * scaled.total()))


def _by_weight(scaled: _Scaled, ids: _Ids) -> tuple[_Ids, _Ids]:
    """Tokens and their weights, heaviest first, the lower id first among equals."""
    weights = scaled.weights(ids)
    if scaled.row.shape[0] > _MAX_ID:
        order = np.argsort(-weights, kind="stable")
        return ids[order], weights[order]
    # one integer holds both keys: sorting plain integers is several times as fast as a stable sort of indices
    keys = np.sort((weights << _ID_BITS) | (_MAX_ID - ids))[::-1]
    return _MAX_ID - (keys & _MAX_ID), keys >> _ID_BITS


def _cut(ids: _Ids, weights: _Ids, enough: int) -> tuple[_Ids, _Ids]:
    """The tokens before which there is less than ``enough`` weight; at least one."""
    before = np.cumsum(weights) - weights
    count = max(1, int(np.searchsorted(before, enough, side="left")))
    return ids[:count], weights[:count]


def _draw(weights: _Ids, random: int) -> int:
    """The index of the token at the random place."""
    cumulative = np.cumsum(weights)
    target = (random * int(cumulative[-1])) >> 64
    return int(np.searchsorted(cumulative, target, side="right"))


def _draw_any(scaled: _Scaled, random: int) -> int:
    """A token of the whole vocabulary: by the estimate if the place is well inside a token, else exactly."""
    p, sums = scaled.estimate()
    ends = np.cumsum(sums)
    place = random / 2.0**64 * float(ends[-1])
    block = int(np.searchsorted(ends, place, side="right"))
    if block < ends.shape[0]:
        inner = p[block * _SUM : (block + 1) * _SUM].astype(np.float64)
        inner_ends = np.cumsum(inner) + (ends[block - 1] if block else 0.0)
        index = int(np.searchsorted(inner_ends, place, side="right"))
        if index < inner.shape[0]:
            # the place and the ends around it are each off by at most this
            error = float(inner_ends[index]) * _ESTIMATE_ERROR + p.shape[0] * 2.0**-_WEIGHT_BITS
            begin = inner_ends[index] - inner[index]
            if begin + 2 * error < place < inner_ends[index] - 2 * error:
                return block * _SUM + index
    ids = scaled.at_least(1)
    return int(ids[_draw(scaled.weights(ids), random)])
