"""Runs the prompts of one HTTP request: as server-sent events or to the end, and no longer than the client stays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from anyfp4.async_llm import RequestStream
from anyfp4.engine.outputs import RequestOutput
from anyfp4.entrypoints.server.choices import Json, Usage
from anyfp4.entrypoints.server.errors import ApiError
from anyfp4.entrypoints.server.gate import Record
from anyfp4.entrypoints.server.metrics import Metrics, Watch
from anyfp4.errors import EngineError

T = TypeVar("T")
#: log-probabilities that are written in a few milliseconds
_SHORT = 1000
OnOutput = Callable[[int, RequestOutput], Awaitable[None]]


class ClientGoneError(Exception):
    """The client has disconnected; there is nobody to answer."""


class Generation:
    """The streams of one HTTP request.

    Attributes:
        usage: token counts so far.
    """

    def __init__(self, streams: Sequence[RequestStream], completions: int, record: Record, metrics: Metrics) -> None:
        """Takes over queued streams.

        Args:
            streams: one for each prompt.
            completions: of all of them together.
            record: for the log line.
            metrics: to count and time in.
        """
        self.streams, self.completions, self.record, self.metrics = streams, completions, record, metrics
        self.usage = Usage()
        self._watch = Watch(metrics, record.started)

    async def run(self, receive: Receive, on_output: OnOutput) -> None:
        """Hands on every output (index of the prompt, output so far) until all are finished.

        Raises:
            ClientGoneError: the client has gone. All is aborted then.
            ApiError: the engine has stopped, or failed.
        """
        work = asyncio.create_task(self._drive(on_output))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientGoneError
            await work
        finally:
            for stream in self.streams:
                stream.abort()  # does nothing to what is finished
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
            self._note()

    async def _drive(self, on_output: OnOutput) -> None:
        if len(self.streams) == 1:
            await self._pump(0, self.streams[0], on_output)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for index, stream in enumerate(self.streams):
                    group.create_task(self._pump(index, stream, on_output))
        except BaseExceptionGroup as group:
            raise _first(group) from None

    async def _pump(self, index: int, stream: RequestStream, on_output: OnOutput) -> None:
        try:
            async for output in stream:
                self._watch.see(index, output)
                self.usage.see(index, output)
                _check(output)
                await on_output(index, output)
        except EngineError as error:
            raise ApiError(503, str(error), code="engine_stopped") from error

    def _note(self) -> None:
        """The figures of the log line and the metrics."""
        usage, record = self.usage, self.record
        record.notes |= {
            "prompt": sum(len(s.prompt_token_ids) for s in self.streams),
            "cached": usage.cached_tokens,
            "generated": usage.generated_tokens,
        }
        if self._watch.first is not None:
            record.notes["ttft"] = f"{self._watch.first - record.started:.3f}s"
        reasons = usage.finish_reasons
        reasons += ["abort"] * (self.completions - len(reasons))
        record.notes["finish"] = ",".join(sorted(set(reasons)))
        self._watch.end(reasons)


def _first(error: BaseException) -> BaseException:
    """The first leaf of a tree of exceptions."""
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def _check(output: RequestOutput) -> None:
    """Raises :class:`ApiError` if the engine gave the request up."""
    for completion in output.outputs:
        if completion.finish_reason == "error":
            raise ApiError(500, completion.error or "the request failed", code="engine_error")
        if completion.finish_reason == "abort":
            raise ApiError(503, "the server is shutting down", code="shutting_down")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: one for each chunk, then ``[DONE]``; an error becomes an event of its own."""

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        chunks: Callable[[int, RequestOutput], Iterable[Json]],
        last: Callable[[], Iterable[Json]],
        *,
        size: int = 0,
    ) -> None:
        """Prepares the stream.

        Args:
            generation: what runs.
            chunks: makes the chunks of an output.
            last: makes what comes after all outputs.
            size: log-probabilities that one output may have, by which it is written here or in a thread.
        """
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._generation, self._chunks, self._last, self._size = generation, chunks, last, size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        one_at_a_time = asyncio.Lock()

        async def on_output(index: int, output: RequestOutput) -> None:
            data = await off_loop(self._size, lambda: _events(self._chunks(index, output)))
            if data:
                async with one_at_a_time:
                    await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            await self._generation.run(receive, on_output)
            end = _events(self._last()) + b"data: [DONE]\n\n"
        except ClientGoneError:
            return
        except ApiError as error:
            self._generation.record.notes["error"] = error.code
            end = _events([error.body()])
        await send({"type": "http.response.body", "body": end, "more_body": False})


def _events(chunks: Iterable[Json]) -> bytes:
    texts = (json.dumps(chunk, ensure_ascii=False, allow_nan=False, separators=(",", ":")) for chunk in chunks)
    return b"".join(b"data: " + text.encode() + b"\n\n" for text in texts)


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Writes so many log-probabilities at once, or in a thread if they are many, so that other requests go on."""
    return work() if size <= _SHORT else await asyncio.to_thread(work)
