"""Compares what became of a request in a batch with what becomes of it alone: equal means every bit."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from anyfp4.engine.outputs import TokenLogprobs
from anyfp4.tools.verify_run import Completion, Outcome

Value = float | int | str | None


@dataclass(frozen=True)
class Difference:
    """The first place where a request is not what it is alone.

    Attributes:
        request: its place among the arrivals of the schedule, from 0.
        completion: which of its ``n`` completions; None: the prompt.
        position: of the token in the sequence, from 0, the prompt included.
        what: such as ``log-probability of token 17``.
    """

    request: int
    completion: int | None
    position: int
    what: str
    alone: Value
    batch: Value

    def to_dict(self) -> dict[str, Any]:
        """As JSON, floats also as the bits of a float32."""
        data = asdict(self)
        for side in ("alone", "batch"):
            if isinstance(data[side], float):
                data[f"{side}_bits"] = float32_bits(data[side])
        return data


@dataclass
class Compared:
    """How much was compared.

    Attributes:
        aborted: requests of which only the part before their abort could be.
    """

    requests: int = 0
    completions: int = 0
    tokens: int = 0
    logprobs: int = 0
    finish_reasons: int = 0
    aborted: int = 0

    def add(self, other: Compared) -> None:
        """Adds another count."""
        self.requests += other.requests
        self.completions += other.completions
        self.tokens += other.tokens
        self.logprobs += other.logprobs
        self.finish_reasons += other.finish_reasons
        self.aborted += other.aborted


def float32_bits(value: float) -> str:
    """The bits of a number as a float32, in hexadecimal."""
    return f"0x{struct.unpack('<I', struct.pack('<f', value))[0]:08x}"


def show(value: Value) -> str:
    """A value as text, floats with their bits."""
    return f"{value!r} ({float32_bits(value)})" if isinstance(value, float) else str(value)


def compare(request: int, prompt_length: int, alone: Outcome, batch: Outcome) -> tuple[Difference | None, Compared]:
    """The first difference, and what was compared (up to there, if there is one).

    A request that was aborted in the batch is compared as far as it came.
    """
    counts = Compared(requests=1)
    if any(c.finish_reason == "abort" for c in batch.completions):
        counts.aborted = 1
    for difference in _differences(prompt_length, alone, batch, counts):
        if difference is not None:
            completion, position, what, a, b = difference
            return Difference(request, completion, position, what, a, b), counts
    return None, counts


_Found = tuple[int | None, int, str, Value, Value]


def _differences(prompt_length: int, alone: Outcome, batch: Outcome, counts: Compared) -> Iterator[_Found | None]:
    cut = counts.aborted > 0
    if len(alone.prompt_logprobs) != len(batch.prompt_logprobs) and not cut:
        sizes = len(alone.prompt_logprobs), len(batch.prompt_logprobs)
        yield None, min(sizes), "number of scored prompt tokens", *sizes
    for position, (a, b) in enumerate(zip(alone.prompt_logprobs, batch.prompt_logprobs, strict=False)):
        yield _candidates(None, position, a, b, counts)
    for index, (own, other) in enumerate(zip(alone.completions, batch.completions, strict=True)):
        counts.completions += 1
        yield from _completion(index, prompt_length, own, other, counts)


def _completion(index: int, start: int, a: Completion, b: Completion, counts: Compared) -> Iterator[_Found | None]:
    cut = b.finish_reason == "abort"
    scored = min(len(a.logprobs), len(b.logprobs))
    for i in range(max(len(a.tokens), len(b.tokens))):
        if cut and i >= len(b.tokens):
            return
        # a token is chosen from its log-probabilities: where both differ, these come first
        if i < scored:
            yield _candidates(index, start + i, a.logprobs[i], b.logprobs[i], counts)
        own, other = (c.tokens[i] if i < len(c.tokens) else None for c in (a, b))
        counts.tokens += 1
        yield None if own == other else (index, start + i, "token", own, other)
    if cut:
        return
    end = start + len(a.tokens)
    if len(a.logprobs) != len(b.logprobs):
        yield index, end, "number of scored tokens", len(a.logprobs), len(b.logprobs)
    counts.finish_reasons += 1
    if a.finish_reason != b.finish_reason:
        yield index, end, "finish reason", a.finish_reason, b.finish_reason
    if a.stop_reason != b.stop_reason:
        yield index, end, "stop reason", a.stop_reason, b.stop_reason


def _candidates(
    index: int | None, position: int, a: TokenLogprobs | None, b: TokenLogprobs | None, counts: Compared
) -> _Found | None:
    """Log-probabilities first, then ranks, then which tokens are listed, in which order."""
    if a is None or b is None:
        return None if a is b else (index, position, "whether the token is scored", str(bool(a)), str(bool(b)))
    counts.logprobs += len(a)
    for token in a:
        if token in b and struct.pack("<d", a[token].logprob) != struct.pack("<d", b[token].logprob):
            return index, position, f"log-probability of token {token}", a[token].logprob, b[token].logprob
    for token in a:
        if token in b and a[token].rank != b[token].rank:
            return index, position, f"rank of token {token}", a[token].rank, b[token].rank
    if list(a) != list(b):
        return index, position, "listed tokens", str(list(a)), str(list(b))
    return None


@dataclass(frozen=True)
class Pair:
    """A log-probability of the same token at the same position, alone and in the batch."""

    completion: int | None
    position: int
    token: int
    alone: float
    batch: float


def pairs(prompt_length: int, alone: Outcome, batch: Outcome) -> list[Pair]:
    """Every log-probability that both sides have, to plot how far they lie apart.

    After the first token that differs, completions are different texts: they are compared up to there.
    """
    found = [
        Pair(None, position, token, a[token].logprob, b[token].logprob)
        for position, (a, b) in enumerate(zip(alone.prompt_logprobs, batch.prompt_logprobs, strict=False))
        if a is not None and b is not None
        for token in a
        if token in b
    ]
    for index, (own, other) in enumerate(zip(alone.completions, batch.completions, strict=True)):
        for i, (a, b) in enumerate(zip(own.logprobs, other.logprobs, strict=False)):
            found += [
                Pair(index, prompt_length + i, token, a[token].logprob, b[token].logprob) for token in a if token in b
            ]
            if own.tokens[i] != other.tokens[i]:
                break
    return found
