"""The engine's thread: takes commands between steps, runs steps, and hands on what came out."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from anyfp4.engine.config import SamplingParams
from anyfp4.engine.engine import Engine
from anyfp4.engine.outputs import RequestOutput
from anyfp4.engine.requests import Request
from anyfp4.engine.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Add:
    """Queue a request that was checked."""

    request_id: str
    prompt: str | None
    tokens: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class Abort:
    """End a request, if it is still there."""

    request_id: str


@dataclass(frozen=True)
class Event:
    """What a step brought.

    Attributes:
        outputs: of the requests that changed.
        stopped: the thread ends after this one.
    """

    outputs: tuple[RequestOutput, ...] = ()
    stopped: bool = False


class Worker:
    """Runs an engine in a daemon thread.

    Attributes:
        error: what the thread died of, if it did.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, deliver: Callable[[Event], None]) -> None:
        """Prepares the thread; ``start`` runs it.

        Args:
            engine: not to be used by anyone else from then on.
            tokenizer: is copied, as one tokenizer must not encode in one thread and decode in another.
            deliver: called in the thread.
        """
        self.error: BaseException | None = None
        self._engine, self._tokenizer, self._deliver = engine, tokenizer, deliver
        self._requests: dict[str, Request] = {}
        self._inbox: deque[Add | Abort] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="anyfp4-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._tokenizer = self._tokenizer.copy()
        self._thread.start()

    def put(self, command: Add | Abort) -> None:
        """Leaves a command, to be taken before the next step; from any thread."""
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def stop(self) -> None:
        """Ends the thread after the step that runs; what is unfinished is aborted."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def join(self) -> None:
        """Waits for the thread's end."""
        self._thread.join()

    @property
    def pending(self) -> int:
        """Sequences that were added and not taken yet; from any thread."""
        with self._wake:
            return sum(c.params.n for c in self._inbox if isinstance(c, Add))

    def _run(self) -> None:
        try:
            while self._take():
                outputs = self._step()
                if outputs:
                    self._deliver(Event(outputs))
        except BaseException as error:  # whatever it was, those who wait must hear of it
            _log.exception("the engine's thread died")
            self.error = error
        else:
            for request in self._requests.values():
                request.abort(self._engine)
        self._deliver(Event(stopped=True))

    def _take(self) -> bool:
        """Waits for something to do and takes all commands; False: end."""
        with self._wake:
            while not (self._inbox or self._stopping or self._engine.has_work):
                self._wake.wait()
            commands, stopping = list(self._inbox), self._stopping
            self._inbox.clear()
        aborted = []
        for command in commands:
            if isinstance(command, Add):
                sequences = self._engine.add(command.request_id, command.tokens, command.params)
                self._requests[command.request_id] = Request(command.prompt, sequences, self._tokenizer)
            else:
                request = self._requests.pop(command.request_id, None)
                if request is not None:
                    request.abort(self._engine)
                    aborted.append(request.output())
        if aborted:
            self._deliver(Event(tuple(aborted)))
        return not stopping

    def _step(self) -> tuple[RequestOutput, ...]:
        changed: dict[str, Request] = {}
        for sequence in self._engine.step():
            request = self._requests[sequence.request_id]
            request.update(sequence, self._engine)
            changed[sequence.request_id] = request
        for request_id, request in changed.items():
            if request.finished:
                del self._requests[request_id]
        return tuple(request.output() for request in changed.values())
