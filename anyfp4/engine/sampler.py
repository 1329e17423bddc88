"""From logits to a token and its log-probabilities: everything that sampling parameters ask of one row."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anyfp4.engine.outputs import Logprob, TokenLogprobs
from anyfp4.engine.sequence import Sequence
from anyfp4.errors import InvalidArgumentError
from anyfp4.ops.sampling import Choice, Ranked


def choice(sequence: Sequence, position: int) -> Choice:
    """How the sequence's token at a position is chosen; its random number depends on seed and position alone."""
    p = sequence.params
    return Choice(
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        seed=sequence.seed,
        position=position,
    )


def adjusts(sequence: Sequence, position: int) -> bool:
    """Whether :func:`adjust` would change the row of the token at a position."""
    p = sequence.params
    return bool(p.logit_bias) or has_penalty(sequence) or position - sequence.prompt_length < p.min_tokens


def has_penalty(sequence: Sequence) -> bool:
    """Whether the tokens so far change the logits of the next one."""
    p = sequence.params
    return p.repetition_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0


def adjust(logits: Tensor, sequences: Mapping[int, Sequence], eos: Collection[int]) -> None:
    """Applies bias, ``min_tokens`` and penalties to rows of logits, in place; each a float32 operation, rounded once.

    Args:
        logits: float32 [M, V], on any device; nothing is copied from it.
        sequences: row -> whose next token is to be chosen.
        eos: tokens that end a sequence, besides its own stop tokens.
    """
    bias, banned, repeated, frequent, present = _Edits(), _Edits(), _Edits(), _Edits(), _Edits()
    for row, s in sequences.items():
        p = s.params
        if p.logit_bias:
            bias.add(row, list(p.logit_bias), list(p.logit_bias.values()))
        if len(s.tokens) - s.prompt_length < p.min_tokens:
            banned.add(row, sorted({*(p.stop_token_ids or ()), *(() if p.ignore_eos else eos)}), -np.inf)
        generated = np.fromiter(s.counts, dtype=np.int64, count=len(s.counts))
        if p.repetition_penalty != 1:
            seen = np.unique(np.concatenate((np.array(s.tokens[: s.prompt_length]), generated)))
            repeated.add(row, seen, p.repetition_penalty)
        if p.frequency_penalty:
            times = np.fromiter(s.counts.values(), dtype=np.float32, count=len(s.counts))
            frequent.add(row, generated, np.float32(p.frequency_penalty) * times)
        if p.presence_penalty:
            present.add(row, generated, p.presence_penalty)
    bias.apply(logits, lambda old, b: old + b)
    banned.apply(logits, lambda old, b: b)
    repeated.apply(logits, lambda old, p: torch.where(old > 0, old / p, old * p))
    for penalties in (frequent, present):
        penalties.apply(logits, lambda old, p: old - p)


class _Edits:
    """Elements of logits, each at most once, and a number for each."""

    def __init__(self) -> None:
        self._parts: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]] = []

    def add(self, row: int, columns: npt.ArrayLike, values: npt.ArrayLike) -> None:
        """Elements of one row; one number for all of them, or one for each."""
        ids = np.asarray(columns, dtype=np.int64)
        self._parts.append(
            (np.full_like(ids, row), ids, np.broadcast_to(np.asarray(values, dtype=np.float32), ids.shape))
        )

    def apply(self, logits: Tensor, edit: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Puts edit(old element, its number) in the place of every element."""
        if not self._parts:
            return
        rows, columns, values = (torch.from_numpy(np.concatenate(part)) for part in zip(*self._parts, strict=True))
        where = (rows.to(logits.device), columns.to(logits.device))
        logits[where] = edit(logits[where], values.to(logits.device))


def token_logprobs(ranked: Ranked, token: int, count: int) -> TokenLogprobs:
    """The most likely tokens and the given one, most likely first, the lower id first among equals.

    Args:
        ranked: of the row.
        token: always part of the result.
        count: how many of the most likely tokens.

    Raises:
        InvalidArgumentError: the row is NaN.
    """
    if math.isnan(ranked.own):
        raise InvalidArgumentError("the log-probabilities are NaN: the model or its input is broken")
    pairs = zip(ranked.ids[:count], ranked.values[:count], strict=True)
    result: TokenLogprobs = {index: Logprob(value, rank) for rank, (index, value) in enumerate(pairs, start=1)}
    result.setdefault(token, Logprob(ranked.own, ranked.rank))
    return result
