"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from anyfp4.engine.outputs import RequestOutput
from anyfp4.entrypoints.server.choices import Cursor, Json, Piece, chat_logprobs, prompt_logprobs
from anyfp4.entrypoints.server.errors import ApiError
from anyfp4.entrypoints.server.generation import EventStream, Generation, off_loop
from anyfp4.entrypoints.server.protocol import ChatBody
from anyfp4.entrypoints.server.replies import check_options, collect, envelope, note, stream_usage
from anyfp4.entrypoints.server.service import Service


async def handle(service: Service, body: ChatBody, request: Request) -> Response:
    """Answers a conversation.

    Raises:
        ApiError: the request is refused.
    """
    record = note(request, body)
    service.check_model(body.model)
    check_options(body)
    logprobs = _logprobs(body)
    max_tokens, limit_param = _max_tokens(body)
    tokens = await service.encode_chat([message.for_template() for message in body.messages])
    params = service.sampling_params(
        body,
        max_tokens=service.check_length(len(tokens), max_tokens, "messages", limit_param),
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
    )
    streams = service.submit([(tokens, params)], "messages")
    generation = Generation(streams, params.n, record, service.metrics)
    reply = _Reply(service, body, logprobs, f"chatcmpl-{record.id}")
    if body.stream:
        return EventStream(generation, reply.chunks, partial(stream_usage, reply.chunk_head, body, generation.usage))
    outputs = await collect(generation, request)
    usage = generation.usage
    size = 0 if logprobs is None else usage.generated_tokens * (logprobs + 1)
    return await off_loop(size, lambda: JSONResponse(reply.whole(outputs[0]) | {"usage": usage.to_json()}))


def _logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs", param="top_logprobs", code="invalid_value")
    return (body.top_logprobs or 0) if body.logprobs else None


def _max_tokens(body: ChatBody) -> tuple[int | None, str]:
    """The limit, and the field that holds it."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        message = "max_completion_tokens: differs from max_tokens; give one of them"
        raise ApiError(400, message, param="max_completion_tokens", code="invalid_value")
    return (old, "max_tokens") if new is None else (new, "max_completion_tokens")


@dataclass
class _Choice:
    cursor: Cursor = field(default_factory=Cursor)
    begun: bool = False
    ended: bool = False


class _Reply:
    """Builds the answer, whole or in chunks."""

    def __init__(self, service: Service, body: ChatBody, logprobs: int | None, request_id: str) -> None:
        self._service, self._body, self._logprobs = service, body, logprobs
        self._choices: dict[int, _Choice] = {}
        self.head = envelope(service, request_id, "chat.completion")
        self.chunk_head = self.head | {"object": "chat.completion.chunk"}

    def chunks(self, index: int, output: RequestOutput) -> Iterator[Json]:
        """The chunks of a new state."""
        del index  # a chat has one prompt
        for completion in output.outputs:
            state = self._choices.setdefault(completion.index, _Choice())
            if state.ended:
                continue
            piece = state.cursor.advance(completion)
            if piece.tokens or piece.finish_reason:
                if not state.begun:
                    state.begun = True
                    yield self._chunk(completion.index, {"role": "assistant", "content": ""}, None, output)
                if piece.text or (piece.tokens and self._shows_tokens):
                    yield self._chunk(completion.index, {"content": piece.text}, piece, output)
            if piece.finish_reason is not None:
                state.ended = True
                end = {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
                chunk = self._chunk(completion.index, {}, None, output)
                chunk["choices"][0] |= end
                yield chunk

    def _chunk(self, index: int, delta: Json, piece: Piece | None, output: RequestOutput) -> Json:
        choice: Json = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if piece is not None and self._logprobs is not None:
            choice["logprobs"] = chat_logprobs(piece, self._service.names, self._logprobs)
        if self._body.return_token_ids:
            choice["token_ids"] = list(piece.tokens) if piece is not None else []
            choice["prompt_token_ids"] = list(output.prompt_token_ids) if "role" in delta else None
        return self.chunk_head | {"choices": [choice]} | ({"usage": None} if self._body.include_usage else {})

    @property
    def _shows_tokens(self) -> bool:
        return self._logprobs is not None or bool(self._body.return_token_ids)

    def whole(self, output: RequestOutput) -> Json:
        """The answer without streaming."""
        names, body = self._service.names, self._body
        choices = []
        for completion in output.outputs:
            piece = Cursor().advance(completion)
            choice: Json = {
                "index": completion.index,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "logprobs": None if self._logprobs is None else chat_logprobs(piece, names, self._logprobs),
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
            }
            if body.return_token_ids:
                choice["token_ids"] = list(completion.token_ids)
                choice["prompt_token_ids"] = list(output.prompt_token_ids)
            choices.append(choice)
        answer = self.head | {"choices": choices}
        if body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(output, names, body.prompt_logprobs)
        return answer
