"""A sequence: one prompt and the tokens generated for it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from anyfp4.engine.config import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Logprob:
    """One candidate at one position.

    Attributes:
        logprob: natural logarithm of its probability under the model, before temperature and filters.
        rank: 1 for the most likely token.
    """

    logprob: float
    rank: int


#: token id -> its log-probability, most likely first; the chosen token is always there
TokenLogprobs = dict[int, Logprob]


@dataclass(eq=False)
class Sequence:
    """One completion in the making; the scheduler and the engine change it, nobody else.

    Attributes:
        tokens: the prompt's, then the generated ones.
        seed: of this completion's random numbers.
        max_length: tokens at which it ends.
        computed: how many tokens have their keys and values in the cache.
        blocks: cache blocks held, in order of position.
        logprobs: of each generated token, if asked for.
        prompt_logprobs: of each prompt token (None for the first), if asked for.
    """

    request_id: str
    index: int
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    seed: int
    max_length: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def generated(self) -> list[int]:
        """The new tokens."""
        return self.tokens[self.prompt_length :]

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None
