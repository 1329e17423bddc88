"""``AsyncLLM``: the engine in a thread of its own, for one asyncio event loop; what the server is built on.

The event loop's side (``submit``, streams) and the engine's side share nothing but an inbox of commands, taken between
steps, and results handed over with ``call_soon_threadsafe``, one call for all of a step. The engine's thread sleeps on
the inbox while there is nothing to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from anyfp4.engine.config import SamplingParams
from anyfp4.engine.outputs import RequestOutput
from anyfp4.engine.stats import EngineStats
from anyfp4.engine.worker import Abort, Add, Event, Worker
from anyfp4.errors import EngineStoppedError, InvalidArgumentError, QueueFullError
from anyfp4.llm import LLM, Prompt

#: bounds of ``retry_after``, seconds
_RETRY_MIN, _RETRY_MAX = 1, 60
#: finished sequences that the rate behind ``retry_after`` is taken from
_RATE_WINDOW = 64


class RequestStream:
    """The outputs of one request, as they come: an async iterator of cumulative outputs, the last one finished.

    Outputs that came since the last one was taken are merged: the newest holds them all. Leaving ``async with``, or
    ``aclose``, ends an unfinished request, and so does dropping the stream.

    Attributes:
        request_id: names the request.
        prompt_token_ids: what the prompt was encoded to.
    """

    def __init__(self, owner: AsyncLLM, request_id: str, prompt_token_ids: tuple[int, ...]) -> None:
        self.request_id, self.prompt_token_ids = request_id, prompt_token_ids
        self._owner = owner
        self._latest: RequestOutput | None = None
        self._ended = False  # nothing comes after ``_latest``
        self._error: EngineStoppedError | None = None
        self._wake = asyncio.Event()

    def __del__(self) -> None:
        """Nobody will read the rest: ends the request if it runs."""
        if not self._ended:
            self._owner._abort_later(self.request_id)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        """The output so far, as soon as there is a new one.

        Raises:
            EngineStoppedError: the engine died.
        """
        while self._latest is None:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._wake.clear()
            with self._owner._held(self):
                await self._wake.wait()
        output, self._latest = self._latest, None
        return output

    def abort(self) -> None:
        """Ends the request if it runs; the iterator then yields its last output, with ``finish_reason`` ``abort``."""
        if not self._ended:
            self._owner._abort(self.request_id)

    async def aclose(self) -> None:
        """Ends the request if it runs; the iterator yields nothing more."""
        self.abort()
        self._end(None)
        self._latest = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _put(self, output: RequestOutput) -> None:
        if not self._ended:
            self._latest = output
            self._ended = output.finished
            self._wake.set()

    def _end(self, error: EngineStoppedError | None) -> None:
        if not self._ended:
            self._ended, self._error = True, error
            self._wake.set()


@dataclass(frozen=True, slots=True)
class _Open:
    """A request that has not ended: its stream, if anybody still has it, and its number of sequences."""

    stream: weakref.ref[RequestStream]
    count: int


class AsyncLLM:
    """Serves many requests at a time from one event loop; results are those of :class:`LLM`, bit for bit.

    ``submit``, ``stats`` and the streams belong to the event loop that ``start`` was awaited in.
    """

    def __init__(self, llm: LLM, *, max_waiting: int = 256) -> None:
        """Takes a loaded model; from ``start`` on it is not to be used otherwise.

        Args:
            llm: the model.
            max_waiting: sequences that may wait beyond the ``max_num_seqs`` that run.

        Raises:
            InvalidArgumentError: ``max_waiting`` is negative.
        """
        if max_waiting < 0:
            raise InvalidArgumentError(f"max_waiting must be 0 or more, got {max_waiting}")
        self.llm = llm
        self._limit = llm.config.max_num_seqs + max_waiting
        self._worker = Worker(llm.engine, llm.tokenizer, self._deliver)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._requests: dict[str, _Open] = {}
        self._awaited: set[RequestStream] = set()
        self._open = 0  # sequences that were submitted and whose request has not ended
        self._finished_at: deque[float] = deque(maxlen=_RATE_WINDOW)
        self._closing = False
        self._idle = asyncio.Event()  # nothing is open
        self._idle.set()
        self._stopped = asyncio.Event()  # the thread has ended
        self._ids = itertools.count()

    async def start(self) -> None:
        """Starts the engine's thread.

        Raises:
            EngineStoppedError: it was started before.
            EngineError: the model is in use otherwise.
        """
        if self._loop is not None:
            raise EngineStoppedError("this AsyncLLM was started before: make another one")
        self.llm.lend("AsyncLLM")
        self._loop = asyncio.get_running_loop()
        self._worker.start()

    async def shutdown(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Refuses new requests and ends the thread.

        Args:
            drain: let what was submitted finish first; else it ends with ``finish_reason`` ``abort``.
            timeout: seconds that draining may take; then the rest is aborted.
        """
        if self._loop is None:
            return
        self._closing = True
        if drain and not self._idle.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout)
        for request_id in self._requests:
            self._abort(request_id)
        self._worker.stop()
        await self._stopped.wait()
        self._worker.join()  # it has said its last word
        if self._worker.error is None:  # else nobody knows what state the engine is in
            self.llm.lend(None)

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread is at work, and new requests would be taken if there is room."""
        return self._loop is not None and not self._closing and self._worker.error is None

    def stats(self) -> EngineStats:
        """The engine's figures now; requests that it has yet to take count as waiting."""
        stats = self.llm.engine.stats()
        return replace(stats, waiting=stats.waiting + self._worker.pending)

    def submit(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None) -> RequestStream:
        """Encodes, checks and queues a prompt.

        Args:
            prompt: text, token ids, or chat messages.
            params: how to complete it.
            request_id: must be unique among open requests; made up if not given.

        Raises:
            InvalidArgumentError: a wrong prompt or parameter; the request could never run.
            QueueFullError: too many sequences wait already.
            EngineStoppedError: the engine was not started, was shut down or died.
        """
        self._check_running()
        if params.n > self._limit:
            raise InvalidArgumentError(f"n = {params.n}: at most {self._limit} sequences can run and wait here")
        if self._open + params.n > self._limit:
            runs = self.llm.config.max_num_seqs
            raise QueueFullError(
                f"the queue is full: {self._open} sequences run or wait, and there is room for {self._limit} "
                f"({runs} running, {self._limit - runs} waiting)",
                retry_after=self._retry_after(params.n),
            )
        text, tokens = self.llm.encode(prompt)
        self.llm.engine.check(tokens, params)
        request_id = request_id if request_id is not None else f"request-{next(self._ids)}"
        if request_id in self._requests:
            raise InvalidArgumentError(f"request_id {request_id!r} is in use")
        stream = RequestStream(self, request_id, tuple(tokens))
        self._requests[request_id] = _Open(weakref.ref(stream), params.n)
        self._open += params.n
        self._idle.clear()
        self._worker.put(Add(request_id, text, tokens, params))
        return stream

    def _check_running(self) -> None:
        if self._loop is None:
            raise EngineStoppedError("the engine was not started")
        if not self.healthy:
            raise self._stopped_error()

    def _abort(self, request_id: str) -> None:
        self._worker.put(Abort(request_id))

    def _abort_later(self, request_id: str) -> None:
        """As :meth:`_abort`, from wherever the garbage collector happens to run."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the thread ends with it
            self._loop.call_soon_threadsafe(self._abort, request_id)

    @contextlib.contextmanager
    def _held(self, stream: RequestStream) -> Iterator[None]:
        """Keeps a stream alive while a task waits for it: the event loop itself holds tasks by weak references."""
        self._awaited.add(stream)
        try:
            yield
        finally:
            self._awaited.discard(stream)

    def _retry_after(self, count: int) -> int:
        """Seconds in which about ``count`` sequences end, as they did lately."""
        times = self._finished_at
        if len(times) < 2:
            return _RETRY_MIN
        each = (time.monotonic() - times[0]) / len(times)
        return min(max(math.ceil(each * count), _RETRY_MIN), _RETRY_MAX)

    def _stopped_error(self) -> EngineStoppedError:
        cause = self._worker.error
        if cause is None:
            return EngineStoppedError("the engine was shut down")
        error = EngineStoppedError(f"the engine's thread died: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        return error

    def _deliver(self, event: Event) -> None:
        """Called in the engine's thread: hands an event to the event loop."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._receive, event)
        except RuntimeError:  # the loop is closed: nobody is left to hear, so the thread ends too
            self._worker.stop()

    def _receive(self, event: Event) -> None:
        for output in event.outputs:
            request = self._requests.get(output.request_id)
            if request is not None:
                if (stream := request.stream()) is not None:
                    stream._put(output)
                if output.finished:
                    self._forget(output.request_id)
        if event.stopped:
            for request_id, request in list(self._requests.items()):
                if (stream := request.stream()) is not None:
                    stream._end(self._stopped_error())
                self._forget(request_id)
            self._stopped.set()

    def _forget(self, request_id: str) -> None:
        count = self._requests.pop(request_id).count
        self._open -= count
        self._finished_at.extend([time.monotonic()] * count)
        if not self._requests:
            self._idle.set()
