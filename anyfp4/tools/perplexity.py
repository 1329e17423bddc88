"""Perplexity of a text under a model, in windows without overlap: what ``anyfp4 eval`` prints, for a loaded ``LLM``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anyfp4.llm import LLM
from anyfp4.tools.evaluate import evaluate


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
    score = evaluate(llm.engine.model, tokens, context=window, progress=progress)
    return Perplexity(score.perplexity, len(score.losses), len(tokens))
