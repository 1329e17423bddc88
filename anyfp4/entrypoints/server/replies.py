"""What both kinds of completion share around their answers."""

from __future__ import annotations

import time
from collections.abc import Iterator

from starlette.requests import Request

import anyfp4
from anyfp4.engine.outputs import RequestOutput
from anyfp4.entrypoints.server.choices import Json, Usage
from anyfp4.entrypoints.server.errors import ApiError
from anyfp4.entrypoints.server.gate import Record
from anyfp4.entrypoints.server.generation import Generation
from anyfp4.entrypoints.server.protocol import GenerationBody
from anyfp4.entrypoints.server.service import Service


def note(request: Request, body: GenerationBody) -> Record:
    """The request's line of the log, with what the body says for it."""
    record = request.scope["anyfp4.record"]
    assert isinstance(record, Record)
    if body.stream:
        record.notes["stream"] = 1
    if body.user is not None:
        record.notes["user"] = ascii(body.user)
    return record


def check_options(body: GenerationBody) -> None:
    """Raises :class:`ApiError` for options that do not go together."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only with stream", param="stream_options", code="invalid_value")
    if body.stream and body.prompt_logprobs is not None:
        message = "prompt_logprobs: not supported with stream"
        raise ApiError(400, message, param="prompt_logprobs", code="unsupported_parameter")


def envelope(service: Service, request_id: str, kind: str) -> Json:
    """The fields around the choices."""
    return {
        "id": request_id,
        "object": kind,
        "created": int(time.time()),
        "model": service.name,
        "system_fingerprint": f"anyfp4-{anyfp4.__version__}",
    }


def stream_usage(head: Json, body: GenerationBody, usage: Usage) -> Iterator[Json]:
    """The last chunk, if it was asked for."""
    if body.include_usage:
        yield head | {"choices": [], "usage": usage.to_json()}


async def collect(generation: Generation, request: Request) -> list[RequestOutput]:
    """Runs a request to its end; one output for each prompt.

    Raises:
        ClientGoneError: nobody waits for the answer any more.
        ApiError: the engine has stopped, or failed.
    """
    outputs: dict[int, RequestOutput] = {}

    async def keep(index: int, output: RequestOutput) -> None:
        outputs[index] = output

    await generation.run(request.receive, keep)
    return [outputs[index] for index in range(len(generation.streams))]
