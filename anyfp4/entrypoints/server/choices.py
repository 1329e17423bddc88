"""From the engine's outputs to the objects of OpenAI's API: choices, logprobs, token counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from anyfp4.engine.outputs import CompletionOutput, FinishReason, RequestOutput, TokenLogprobs
from anyfp4.entrypoints.server.token_text import Offsets, TokenText

Json = dict[str, Any]
#: stands for minus infinity, which JSON cannot say
_NEVER = -9999.0


@dataclass(frozen=True)
class Piece:
    """What is new of a completion.

    Attributes:
        logprobs: of the new tokens, if asked for.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None


@dataclass
class Cursor:
    """Follows one completion from output to output."""

    _text: int = 0
    _tokens: int = 0

    def advance(self, completion: CompletionOutput) -> Piece:
        """What came since the last call."""
        piece = Piece(
            text=completion.text[self._text :],
            tokens=completion.token_ids[self._tokens :],
            logprobs=(completion.logprobs or ())[self._tokens :],
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
        self._text, self._tokens = len(completion.text), len(completion.token_ids)
        return piece


class CompletionLogprobs:
    """The ``logprobs`` object of ``/v1/completions``, part by part."""

    def __init__(self, names: TokenText, *, top: int, offset: int, skip_special_tokens: bool) -> None:
        """Starts at a place in the text.

        Args:
            names: of the model's tokens.
            top: show this many most likely tokens, and the one that stands there.
            offset: characters of the choice's text before the first token.
            skip_special_tokens: they are no part of the text.
        """
        self._names, self._top_count = names, top
        self._offsets = Offsets(names, offset, skip_special_tokens=skip_special_tokens)

    def add(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> Json:
        """The object for these tokens; None stands for a prompt's first token, which nothing predicts."""
        return {
            "tokens": [self._names.name_of(token) for token in tokens],
            "token_logprobs": [
                None if own is None else number(own[token].logprob) for token, own in zip(tokens, logprobs, strict=True)
            ],
            "top_logprobs": [
                None if own is None else self._top(most_likely(own, token, self._top_count))
                for token, own in zip(tokens, logprobs, strict=True)
            ],
            "text_offset": [self._offsets.add(token) for token in tokens],
        }

    def _top(self, logprobs: TokenLogprobs) -> Json:
        top: Json = {}
        for token, entry in logprobs.items():
            # of two tokens with the same text the likelier one stays
            top.setdefault(self._names.name_of(token), number(entry.logprob))
        return top


def most_likely(logprobs: TokenLogprobs, token: int, count: int) -> TokenLogprobs:
    """The ``count`` most likely tokens, and ``token``."""
    kept = set(list(logprobs)[:count]) | {token}
    return {t: entry for t, entry in logprobs.items() if t in kept}


def joined(parts: Iterable[Json]) -> Json:
    """Several parts of a ``logprobs`` object as one."""
    whole: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for part in parts:
        for name, values in part.items():
            whole[name] += values
    return whole


def chat_logprobs(piece: Piece, names: TokenText, top: int) -> Json:
    """The ``logprobs`` object of ``/v1/chat/completions``."""

    def entry(token: int, own: TokenLogprobs) -> Json:
        data = names.bytes_of(token)
        return {
            "token": names.text_of(token),
            "logprob": number(own[token].logprob),
            "bytes": None if data is None else list(data),
        }

    content = [
        {**entry(token, own), "top_logprobs": [entry(other, own) for other in list(own)[:top]]}
        for token, own in zip(piece.tokens, piece.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(output: RequestOutput, names: TokenText, count: int) -> list[Json | None]:
    """vLLM's ``prompt_logprobs``: for each prompt token, token id → logprob, rank and text."""

    def entry(token: int, own: TokenLogprobs) -> Json:
        return {
            str(t): {"logprob": number(e.logprob), "rank": e.rank, "decoded_token": names.name_of(t)}
            for t, e in most_likely(own, token, count).items()
        }

    scores = output.prompt_logprobs or ()
    return [
        None if own is None else entry(token, own) for token, own in zip(output.prompt_token_ids, scores, strict=True)
    ]


def number(value: float) -> float | None:
    """A log-probability in JSON: −9999 for minus infinity, null for NaN."""
    if math.isfinite(value):
        return value
    return None if math.isnan(value) else _NEVER


@dataclass
class Usage:
    """Token counts over the prompts of one HTTP request."""

    _outputs: dict[int, RequestOutput] = field(default_factory=dict)

    def see(self, index: int, output: RequestOutput) -> None:
        """Takes the newest state of one prompt."""
        self._outputs[index] = output

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once however many completions it has."""
        return sum(len(o.prompt_token_ids) for o in self._outputs.values())

    @property
    def cached_tokens(self) -> int:
        """Those of them that came from the prefix cache."""
        return sum(o.cached_tokens for o in self._outputs.values())

    @property
    def generated_tokens(self) -> int:
        """New tokens of all completions."""
        return sum(len(c.token_ids) for o in self._outputs.values() for c in o.outputs)

    @property
    def finish_reasons(self) -> list[str]:
        """Of all completions that ended."""
        return [c.finish_reason for o in self._outputs.values() for c in o.outputs if c.finish_reason is not None]

    def to_json(self) -> Json:
        """OpenAI's ``usage`` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated_tokens,
            "total_tokens": self.prompt_tokens + self.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
