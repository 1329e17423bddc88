"""Perplexity of a text under a model, in windows without overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anyfp4.engine.config import SamplingParams
from anyfp4.errors import InvalidArgumentError
from anyfp4.llm import LLM


@dataclass(frozen=True)
class Perplexity:
    """The result.

    Attributes:
        perplexity: exp of the mean negative log-likelihood, natural logarithm.
        predictions: how many tokens were scored.
        tokens: how many tokens the text has.
    """

    perplexity: float
    predictions: int
    tokens: int


def perplexity(
    llm: LLM,
    tokens: Sequence[int],
    *,
    window: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Scores a text in windows of ``window`` tokens; the first token of each window has no prediction.

    Args:
        llm: the model.
        tokens: the text.
        window: tokens of a window; the last one may be shorter.
        progress: called with (tokens done, tokens in all).

    Raises:
        InvalidArgumentError: fewer than two tokens, or a window longer than the model's limit.
    """
    if len(tokens) < 2 or window < 2:
        raise InvalidArgumentError(f"perplexity needs two tokens, got {len(tokens)} in windows of {window}")
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    total, count = 0.0, 0
    for start in range(0, len(tokens), window):
        piece = list(tokens[start : start + window])
        if len(piece) < 2:
            break
        output = llm.generate(piece, params)[0]
        for token, entry in zip(piece, output.prompt_logprobs or (), strict=True):
            if entry is not None:
                total -= entry[token].logprob
                count += 1
        if progress is not None:
            progress(start + len(piece), len(tokens))
    return Perplexity(math.exp(total / count), count, len(tokens))
