"""A sequence: one prompt and the tokens generated for it so far."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from anyfp4.engine.config import SamplingParams
from anyfp4.engine.outputs import FinishReason, TokenLogprobs


@dataclass(eq=False, slots=True)
class Sequence:
    """One completion in the making; the scheduler and the engine change it, nobody else.

    Attributes:
        request_id: of its request.
        index: which of the request's completions it is.
        tokens: the prompt's, then the generated ones.
        prompt_length: how many of them are the prompt's.
        params: of its request.
        seed: of this completion's random numbers.
        max_length: tokens at which it ends.
        scores_prompt: whether it collects the prompt's log-probabilities; one of a request's sequences does.
        computed: how many tokens have their keys and values in the cache.
        blocks: cache blocks held (int32), in order of position.
        digests: of the full blocks, as far as they were needed (see ``block_manager``).
        published: leading blocks that were offered to the prefix cache, or came from it.
        cached_tokens: tokens found in the prefix cache when it first ran; None before that.
        host_samples: whether the device could not choose one of its tokens (too many candidates), so that its steps
            wait for the host from then on.
        counts: how often each token was generated, where a penalty asks for it.
        logprobs: of each generated token, if asked for.
        prompt_logprobs: of each prompt token (None for the first), if asked for.
        finish_reason: why it ended; None while it has not.
        stop_reason: the stop string or stop token that ended it, if one did.
        error: what went wrong, where ``finish_reason`` is ``error``.
    """

    request_id: str
    index: int
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    seed: int
    max_length: int
    scores_prompt: bool = False
    computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    digests: list[bytes] = field(default_factory=list)
    published: int = 0
    cached_tokens: int | None = None
    host_samples: bool = False
    counts: dict[int, int] = field(default_factory=dict)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def generated(self) -> list[int]:
        """The new tokens."""
        return self.tokens[self.prompt_length :]

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None

    @property
    def skippable(self) -> int:
        """Leading tokens that need not be run where their keys and values are known.

        The last token always runs, as its logits choose the next one. Where the prompt is scored, token i + 1 needs
        the logits of token i, so everything from the first unscored token's predecessor on runs.
        """
        if self.scores_prompt and len(self.prompt_logprobs) < self.prompt_length:
            return max(len(self.prompt_logprobs) - 1, 0)
        return len(self.tokens) - 1
