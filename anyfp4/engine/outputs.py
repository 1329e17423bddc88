"""What a caller gets: log-probabilities, completions, requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate at one position.

    Attributes:
        logprob: natural logarithm of its probability under the model, before temperature, penalties and filters.
        rank: 1 for the most likely token.
    """

    logprob: float
    rank: int


#: token id -> its log-probability, most likely first; the token that stands there is always among them
TokenLogprobs = dict[int, Logprob]


@dataclass(frozen=True)
class CompletionOutput:
    """One completion.

    Attributes:
        index: which of the request's ``n`` completions.
        text: so far, without what may still become a stop string or half a character.
        token_ids: so far.
        finish_reason: ``stop`` (end of sequence, stop string or stop token), ``length``, ``abort``, ``error``; None
            while running.
        stop_reason: the stop string or stop token that ended it, if one did.
        logprobs: of each new token, if asked for.
        error: what went wrong, where ``finish_reason`` is ``error``.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: str | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum of the chosen tokens' log-probabilities, if they were asked for."""
        if self.logprobs is None:
            return None
        return sum(lp[token].logprob for lp, token in zip(self.logprobs, self.token_ids, strict=True))


@dataclass(frozen=True)
class RequestOutput:
    """What became of one prompt.

    Attributes:
        request_id: names the request.
        prompt: the text, if the prompt was text.
        prompt_token_ids: its tokens.
        outputs: one for each of the ``n`` completions.
        prompt_logprobs: of each prompt token (None for the first), if asked for; as many as are known so far.
        cached_tokens: prompt tokens whose keys and values came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(o.finish_reason is not None for o in self.outputs)

    @property
    def error(self) -> str | None:
        """What went wrong, if a completion ended with an error."""
        return next((o.error for o in self.outputs if o.error is not None), None)
