"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from anyfp4.engine.config import SamplingParams
from anyfp4.engine.outputs import CompletionOutput, RequestOutput
from anyfp4.engine.tokenizer import Tokenizer
from anyfp4.entrypoints.server.choices import CompletionLogprobs, Cursor, Json, joined, prompt_logprobs
from anyfp4.entrypoints.server.errors import ApiError
from anyfp4.entrypoints.server.generation import EventStream, Generation, off_loop
from anyfp4.entrypoints.server.protocol import CompletionBody
from anyfp4.entrypoints.server.replies import check_options, collect, envelope, note, stream_usage
from anyfp4.entrypoints.server.service import Service


@dataclass(frozen=True)
class _Prompt:
    """One prompt: its tokens, and the text that ``echo`` gives back."""

    tokens: list[int]
    text: str
    params: SamplingParams


async def handle(service: Service, body: CompletionBody, request: Request) -> Response:
    """Completes one prompt or several.

    Raises:
        ApiError: the request is refused.
    """
    record = note(request, body)
    service.check_model(body.model)
    check_options(body)
    _check_best_of(body)
    prompts = [_checked(service, body, tokens, text) for tokens, text in await _encoded(service, body)]
    streams = service.submit([(p.tokens, p.params) for p in prompts], "prompt")
    generation = Generation(streams, len(prompts) * (body.n or 1), record, service.metrics)
    reply = _Reply(service, body, prompts, f"cmpl-{record.id}")
    if body.stream:
        last = partial(stream_usage, reply.head, body, generation.usage)
        return EventStream(generation, reply.chunks, last, size=_size(body, sum(len(p.tokens) for p in prompts)))
    outputs = await collect(generation, request)
    usage = generation.usage
    size = _size(body, usage.prompt_tokens + usage.generated_tokens)
    return await off_loop(size, lambda: JSONResponse(reply.whole(outputs) | {"usage": usage.to_json()}))


def _size(body: CompletionBody, tokens: int) -> int:
    """Log-probabilities to write for so many tokens."""
    return 0 if body.logprobs is None else tokens * (body.logprobs + 1)


def _check_best_of(body: CompletionBody) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        message = "best_of: not supported other than equal to n"
        raise ApiError(400, message, param="best_of", code="unsupported_parameter")


def _prompts(body: CompletionBody) -> list[str | list[int]]:
    """The prompts, each as text or tokens."""
    if isinstance(body.prompt, str):
        return [body.prompt]
    if isinstance(body.prompt[0], int):
        return [body.prompt]
    return list(body.prompt)


async def _encoded(service: Service, body: CompletionBody) -> list[tuple[list[int], str]]:
    """Tokens of each prompt, and its text if that is to be given back."""
    prompts = _prompts(body)

    def work(tokenizer: Tokenizer) -> list[tuple[list[int], str]]:
        done = []
        for prompt in prompts:
            if isinstance(prompt, str):
                done.append((tokenizer.encode(prompt), prompt if body.echo else ""))
            else:
                # special tokens that a client sent as ids are shown, like all else that it sent
                done.append((prompt, tokenizer.decode(prompt, False) if body.echo else ""))
        return done

    return await service.tokenizing(sum(map(len, prompts)), work)


def _checked(service: Service, body: CompletionBody, tokens: list[int], text: str) -> _Prompt:
    wanted = 16 if body.max_tokens is None else body.max_tokens
    scores = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        scores = max(body.logprobs, scores or 0)
    params = service.sampling_params(
        body,
        max_tokens=service.check_length(len(tokens), wanted, "prompt"),
        logprobs=body.logprobs,
        prompt_logprobs=scores,
    )
    return _Prompt(tokens, text, params)


@dataclass
class _Choice:
    """What was said of one choice so far."""

    cursor: Cursor = field(default_factory=Cursor)
    begun: bool = False
    ended: bool = False
    logprobs: CompletionLogprobs | None = None


class _Reply:
    """Builds the answer, whole or in chunks."""

    def __init__(self, service: Service, body: CompletionBody, prompts: list[_Prompt], request_id: str) -> None:
        self._service, self._body, self._prompts = service, body, prompts
        self._choices: dict[tuple[int, int], _Choice] = {}
        self.head = envelope(service, request_id, "text_completion")

    def chunks(self, index: int, output: RequestOutput) -> Iterator[Json]:
        """The chunks of a new state of one prompt."""
        for completion in output.outputs:
            choice = self._choice(index, output, completion)
            if choice is not None:
                yield self.head | {"choices": [choice]} | ({"usage": None} if self._body.include_usage else {})

    def whole(self, outputs: list[RequestOutput]) -> Json:
        """The answer without streaming."""
        choices = [self._choice(i, output, c) for i, output in enumerate(outputs) for c in output.outputs]
        return self.head | {"choices": choices}

    def _choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> Json | None:
        """The choice as far as it is new; None if nothing is."""
        body, prompt = self._body, self._prompts[index]
        state = self._choices.setdefault((index, completion.index), _Choice())
        if state.ended or not (completion.token_ids or completion.finish_reason):
            return None
        if prompt.params.prompt_logprobs is not None and len(output.prompt_logprobs or ()) < len(prompt.tokens):
            return None  # another completion of this prompt scores it, and is behind
        piece = state.cursor.advance(completion)
        first, state.begun, state.ended = not state.begun, True, piece.finish_reason is not None
        if not (first or piece.text or piece.finish_reason or (piece.tokens and self._shows_tokens)):
            return None
        text, parts = piece.text, []
        if first and body.echo:
            text = prompt.text + text
            if body.logprobs is not None:
                parts.append(self._prompt_part(prompt, output))
        if body.logprobs is not None:
            if state.logprobs is None:
                state.logprobs = self._logprobs(len(prompt.text), prompt.params.skip_special_tokens)
            parts.append(state.logprobs.add(piece.tokens, piece.logprobs))
        choice: Json = {
            "index": index * (body.n or 1) + completion.index,
            "text": text,
            "logprobs": joined(parts) if body.logprobs is not None else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = list(piece.tokens)
            choice["prompt_token_ids"] = prompt.tokens if first else None
        if body.prompt_logprobs is not None:
            service = self._service
            choice["prompt_logprobs"] = prompt_logprobs(output, service.names, body.prompt_logprobs)
        return choice

    @property
    def _shows_tokens(self) -> bool:
        return self._body.logprobs is not None or bool(self._body.return_token_ids)

    def _prompt_part(self, prompt: _Prompt, output: RequestOutput) -> Json:
        """The prompt's share of ``logprobs``, its offsets counted in the text that is given back."""
        # a special token is part of the text if the client wrote it, and is not if the tokenizer added it
        names = self._service.names
        shown = any(token in names.special and names.text_of(token) in prompt.text for token in prompt.tokens)
        return self._logprobs(0, not shown).add(prompt.tokens, output.prompt_logprobs or ())

    def _logprobs(self, offset: int, skip_special_tokens: bool) -> CompletionLogprobs:
        return CompletionLogprobs(
            self._service.names,
            top=self._body.logprobs or 0,
            offset=offset,
            skip_special_tokens=skip_special_tokens,
        )
