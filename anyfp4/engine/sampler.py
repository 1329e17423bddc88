"""From logits to a token and its log-probabilities: everything that sampling parameters ask of one row."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np

from anyfp4.engine.outputs import Logprob, TokenLogprobs
from anyfp4.engine.sequence import Sequence
from anyfp4.errors import InvalidArgumentError
from anyfp4.ops.sampling import Choice, Row, largest


def choice(sequence: Sequence) -> Choice:
    """How the sequence's next token is chosen; its random number depends on seed and position alone."""
    p = sequence.params
    return Choice(
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        seed=sequence.seed,
        position=len(sequence.tokens),
    )


def adjusts(sequence: Sequence) -> bool:
    """Whether :func:`adjust` would change a row."""
    p = sequence.params
    return bool(p.logit_bias) or has_penalty(sequence) or len(sequence.tokens) - sequence.prompt_length < p.min_tokens


def has_penalty(sequence: Sequence) -> bool:
    """Whether the tokens so far change the logits of the next one."""
    p = sequence.params
    return p.repetition_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0


def adjust(logits: Row, sequence: Sequence, eos: Collection[int]) -> None:
    """Applies bias, ``min_tokens`` and penalties to one row, in place; each a float32 operation, rounded once.

    Args:
        logits: float32 [V].
        sequence: whose next token is to be chosen.
        eos: tokens that end a sequence, besides its own stop tokens.
    """
    p = sequence.params
    if p.logit_bias:
        _add_bias(logits, p.logit_bias)
    if len(sequence.tokens) - sequence.prompt_length < p.min_tokens:
        ends = [*(p.stop_token_ids or ()), *(() if p.ignore_eos else eos)]
        logits[ends] = -np.inf
    if has_penalty(sequence):
        _penalize(logits, sequence)


def _add_bias(logits: Row, bias: Mapping[int, float]) -> None:
    logits[list(bias)] += np.array(list(bias.values()), dtype=np.float32)


def _penalize(logits: Row, sequence: Sequence) -> None:
    p, counts = sequence.params, sequence.counts
    generated = np.fromiter(counts, dtype=np.int64, count=len(counts))
    if p.repetition_penalty != 1:
        seen = np.unique(np.concatenate((np.array(sequence.tokens[: sequence.prompt_length]), generated)))
        penalty, values = np.float32(p.repetition_penalty), logits[seen]
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if p.frequency_penalty:
        times = np.fromiter(counts.values(), dtype=np.float32, count=len(counts))
        logits[generated] -= np.float32(p.frequency_penalty) * times
    if p.presence_penalty:
        logits[generated] -= np.float32(p.presence_penalty)


def token_logprobs(logprobs: Row, token: int, count: int) -> TokenLogprobs:
    """The ``count`` most likely tokens and the given one, most likely first, the lower id first among equals.

    Args:
        logprobs: float32 [V].
        token: always part of the result.
        count: how many of the most likely tokens.

    Raises:
        InvalidArgumentError: the row is NaN.
    """
    mine = logprobs[token]
    if math.isnan(mine):
        raise InvalidArgumentError("the log-probabilities are NaN: the model or its input is broken")
    result: TokenLogprobs = {}
    if count:
        for rank, index in enumerate(largest(logprobs, min(count, logprobs.shape[0])).tolist(), start=1):
            result[index] = Logprob(float(logprobs[index]), rank)
    if token not in result:
        rank = 1 + int(np.count_nonzero(logprobs > mine)) + int(np.count_nonzero(logprobs[:token] == mine))
        result[token] = Logprob(float(mine), rank)
    return result
