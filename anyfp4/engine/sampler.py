"""From logits to a token and its log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from anyfp4.engine.sequence import Logprob, Sequence, TokenLogprobs
from anyfp4.ops.sampling import Choice


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


def token_logprobs(logprobs: Tensor, token: int, count: int) -> TokenLogprobs:
    """The ``count`` most likely tokens and the given one, most likely first, the lower id first among equals.

    Args:
        logprobs: float32 [V].
        token: always part of the result.
        count: how many of the most likely tokens.
    """
    mine = logprobs[token]
    ids = torch.arange(logprobs.shape[0], device=logprobs.device)
    rank = 1 + int(((logprobs > mine) | ((logprobs == mine) & (ids < token))).sum())
    result: TokenLogprobs = {}
    if count:
        # topk leaves the order of equals open: take all that reach the k-th value, then sort stably
        kth = torch.topk(logprobs, min(count, logprobs.shape[0])).values[-1]
        reach = (logprobs >= kth).nonzero().flatten()
        order = torch.sort(logprobs[reach], descending=True, stable=True).indices[:count]
        for position, index in enumerate(reach[order].tolist(), start=1):
            result[index] = Logprob(float(logprobs[index]), position)
    result.setdefault(token, Logprob(float(mine), rank))
    return result
