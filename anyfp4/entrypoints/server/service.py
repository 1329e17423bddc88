"""What the handlers share: the model, its names, the queue, and whether new work is taken."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import TypeVar

from anyfp4.async_llm import AsyncLLM, RequestStream
from anyfp4.engine.config import SamplingParams
from anyfp4.engine.tokenizer import Tokenizer
from anyfp4.entrypoints.server.config import ServerConfig
from anyfp4.entrypoints.server.errors import ApiError
from anyfp4.entrypoints.server.metrics import Metrics
from anyfp4.entrypoints.server.protocol import GenerationBody
from anyfp4.entrypoints.server.token_text import TokenText
from anyfp4.errors import EngineStoppedError, InvalidArgumentError, QueueFullError
from anyfp4.llm import LLM

T = TypeVar("T")
#: characters or tokens that are worked on at once; more go to a thread, so that other requests go on
SHORT_TEXT = 2048
_RETRY_SECONDS = "5"
_SAMPLING_FIELDS = frozenset(f.name for f in fields(SamplingParams))


class Service:
    """One model behind HTTP.

    Attributes:
        name: what clients call the model.
        max_sequences: that can run and wait; one request can never have more.
        max_len: most tokens of prompt and completion together, as the model and the KV cache allow.
        draining: no new work is taken, because the server is about to end.
        active: HTTP requests in progress.
    """

    def __init__(self, llm: LLM, engine: AsyncLLM, name: str, config: ServerConfig) -> None:
        self.llm, self.engine, self.name, self.config = llm, engine, name, config
        self.created = int(time.time())
        llm.tokenizer.encode("")  # settles its settings; from then on threads may read it
        self.names = TokenText(llm.tokenizer)
        self.max_sequences = llm.config.max_num_seqs + config.max_queue
        self.metrics = Metrics(engine.stats, lambda: engine.healthy and not self.draining)
        blocks = engine.stats().kv_blocks_total
        self.max_len = min(llm.engine.max_model_len, blocks * llm.engine.config.block_size)
        self.draining = False
        self.active = 0
        # a tokenizer must not be used by two threads at a time, so the one thread has its own
        self._tokenizer = llm.tokenizer.copy()
        self._thread = ThreadPoolExecutor(1, "anyfp4-tokenizer")

    def check_open(self) -> None:
        """Raises :class:`ApiError` if no new work is taken."""
        if self.draining:
            headers = {"retry-after": _RETRY_SECONDS}
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers=headers)
        if not self.engine.healthy:
            raise ApiError(503, "the engine has stopped; see the server's log", code="engine_stopped")

    def check_model(self, name: str | None) -> None:
        """Raises :class:`ApiError` if ``name`` is not this model."""
        if name is not None and name != self.name:
            message = f"there is no model {name!r} here, only {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raises :class:`ApiError` if a token is not in the model's vocabulary."""
        vocab = self.llm.engine.model.config.vocab_size
        for position, token in enumerate(tokens):
            if token >= vocab:
                param = f"tokens[{position}]"
                raise ApiError(400, f"{param}: {token} is not in 0…{vocab - 1}", param=param, code="invalid_value")

    async def encode(self, text: str) -> list[int]:
        """Tokens of plain text."""
        return await self.tokenizing(len(text), lambda tokenizer: tokenizer.encode(text))

    async def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Tokens of a conversation.

        Raises:
            ApiError: the model has no chat template, or it rejects the messages.
        """
        size = sum(len(m["content"]) for m in messages)
        try:
            return await self.tokenizing(size, lambda tokenizer: tokenizer.encode_chat(messages))
        except InvalidArgumentError as error:
            raise ApiError(400, f"messages: {error}", param="messages", code="invalid_value") from error

    async def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of tokens."""
        return await self.tokenizing(len(tokens), lambda tokenizer: tokenizer.decode(tokens, skip_special_tokens))

    async def tokenizing(self, size: int, work: Callable[[Tokenizer], T]) -> T:
        """Work with a tokenizer: at once, or in a thread if it is on more than ``SHORT_TEXT`` characters or tokens."""
        if size <= SHORT_TEXT:
            return work(self.llm.tokenizer)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, self._tokenizer)

    def sampling_params(
        self, body: GenerationBody, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """The engine's parameters; what the body leaves out has OpenAI's default.

        Raises:
            ApiError: a value, or two together, are not allowed.
        """
        given = {
            name: value
            for name, value in body.model_dump(include=set(_SAMPLING_FIELDS - {"stop", "logit_bias"})).items()
            if value is not None
        }
        given |= {"max_tokens": max_tokens, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        try:
            return SamplingParams(**given, stop=body.stop_strings, logit_bias=body.bias)
        except InvalidArgumentError as error:
            raise _wrong_value(error) from error

    def check_length(self, prompt: int, max_tokens: int | None, param: str, limit_param: str = "max_tokens") -> int:
        """How many tokens may be generated.

        Args:
            prompt: its tokens.
            max_tokens: that are asked for; None: as many as there is room for.
            param: the field that holds the prompt.
            limit_param: the field that holds ``max_tokens``.

        Raises:
            ApiError: prompt and completion together are too long.
        """
        room = self.max_len - prompt
        if room < (0 if max_tokens == 0 else 1):
            message = f"{param}: {prompt} tokens; at most {self.max_len} are possible with the completion's"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        if max_tokens is not None and max_tokens > room:
            message = (
                f"{limit_param}: {prompt} tokens of the prompt and {max_tokens} new ones are more than {self.max_len}; "
                f"ask for {room} at most"
            )
            raise ApiError(400, message, param=limit_param, code="context_length_exceeded")
        return room if max_tokens is None else max_tokens

    def submit(self, prompts: Sequence[tuple[Sequence[int], SamplingParams]], param: str) -> list[RequestStream]:
        """Queues all prompts or none.

        Raises:
            ApiError: a prompt is wrong, the queue is full, or the engine has stopped.
        """
        count = sum(params.n for _, params in prompts)
        if count > self.max_sequences:
            message = f"n: {count} completions in one request; at most {self.max_sequences} are possible"
            raise ApiError(400, message, param="n", code="invalid_value")
        self.check_open()
        streams: list[RequestStream] = []
        try:
            for tokens, params in prompts:
                streams.append(self.engine.submit(tokens, params))
        except (InvalidArgumentError, QueueFullError, EngineStoppedError) as error:
            for stream in streams:
                stream.abort()
            raise _from_engine(error, param) from error
        self.metrics.prompt_tokens.inc(sum(len(tokens) for tokens, _ in prompts))
        return streams

    def close(self) -> None:
        """Ends the tokenizing thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _wrong_value(error: InvalidArgumentError, param: str | None = None) -> ApiError:
    """The engine's messages about a parameter begin with its name; the others are about ``param``."""
    first = str(error).partition(" ")[0].rstrip(":")
    if first in _SAMPLING_FIELDS:
        return ApiError(400, str(error), param=first, code="invalid_value")
    message = str(error) if param is None else f"{param}: {error}"
    return ApiError(400, message, param=param, code="invalid_value")


def _from_engine(error: Exception, param: str) -> ApiError:
    if isinstance(error, InvalidArgumentError):
        return _wrong_value(error, param)
    if isinstance(error, QueueFullError):
        headers = {"retry-after": str(error.retry_after)}
        return ApiError(429, str(error), code="queue_full", headers=headers)
    return ApiError(503, str(error), code="engine_stopped")
