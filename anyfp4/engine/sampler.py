"""From logits to a token and its log-probabilities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from anyfp4.engine.sequence import Logprob, Sequence, TokenLogprobs
from anyfp4.ops.sampling import Choice

Row = npt.NDArray[np.float32]


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


def token_logprobs(logprobs: Row, token: int, count: int) -> TokenLogprobs:
    """The ``count`` most likely tokens and the given one, most likely first, the lower id first among equals.

    On numpy and so on this thread: waking torch's thread pool for one row of a vocabulary costs more than the work.

    Args:
        logprobs: float32 [V].
        token: always part of the result.
        count: how many of the most likely tokens.
    """
    mine = logprobs[token]
    rank = 1 + int(np.count_nonzero(logprobs > mine)) + int(np.count_nonzero(logprobs[:token] == mine))
    result: TokenLogprobs = {}
    if count:
        count = min(count, logprobs.shape[0])
        # partition leaves the order of equals open: take all that reach the k-th value, then sort stably
        reach = np.flatnonzero(logprobs >= np.partition(logprobs, -count)[-count])
        order = np.argsort(-logprobs[reach], kind="stable")[:count]
        for position, index in enumerate(reach[order].tolist(), start=1):
            result[index] = Logprob(float(logprobs[index]), position)
    result.setdefault(token, Logprob(float(mine), rank))
    return result
