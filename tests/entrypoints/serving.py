"""A real server (uvicorn on a free port) for tests: in a thread of this process, or in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from anyfp4 import LLM, EngineConfig
from anyfp4.engine.stats import EngineStats
from anyfp4.entrypoints.server.config import ServerConfig
from anyfp4.entrypoints.server.run import Server, listen

MODEL = "tiny"
SECONDS = 30.0


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    server: Server
    llm: LLM

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=SECONDS)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=SECONDS, **options)

    def stats(self) -> EngineStats:
        return self.llm.engine.stats()

    def metric(self, name: str) -> float:
        """A metric without labels, or the sum over its labels."""
        lines = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.get("/metrics").text, flags=re.MULTILINE)
        return sum(map(float, lines))


@contextlib.contextmanager
def serving(
    folder: Path, engine: EngineConfig | None = None, *, prepare: Callable[[LLM], None] | None = None, **config: Any
) -> Iterator[Running]:
    """A server in a thread; at the end it must stop by itself and leave nothing behind.

    Args:
        folder: of the checkpoint.
        engine: of the model.
        prepare: changes the model before it is served.
        config: fields of ServerConfig.
    """
    llm = LLM(folder, config=engine or EngineConfig())
    if prepare is not None:
        prepare(llm)
    settings = ServerConfig(**{"port": 0, "served_model_name": MODEL, "log_requests": False, **config})
    started, urls, failures = threading.Event(), list[str](), list[BaseException]()

    def ready(url: str) -> None:
        urls.append(url)
        started.set()

    server = Server(llm, settings, listen(settings), ready)

    def work() -> None:
        try:
            asyncio.run(server.serve())
        except BaseException as error:  # the test's thread raises it
            failures.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert started.wait(SECONDS)
        if failures:
            raise failures[0]
        yield Running(urls[0], server, llm)
    finally:
        server.stop()
        thread.join(SECONDS)
    assert not thread.is_alive(), "the server did not stop"
    if failures:
        raise failures[0]


def slow(seconds: float) -> Callable[[LLM], None]:
    """Makes every step of the engine last, so that a test can do something meanwhile."""

    def prepare(llm: LLM) -> None:
        step = llm.engine.step

        def slow_step() -> Any:
            if llm.engine.has_work:
                time.sleep(seconds)
            return step()

        llm.engine.step = slow_step  # type: ignore[method-assign]

    return prepare


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Fails if it does not come true in time."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.005)


_SLOW_SERVE = """
import sys, time
from anyfp4.engine.engine import Engine
step, seconds = Engine.step, float(sys.argv[1])
Engine.step = lambda self: (time.sleep(seconds), step(self))[1]
from anyfp4.entrypoints import cli
sys.argv = ["anyfp4", *sys.argv[2:]]
cli.main()
"""


@dataclass
class Process:
    """``anyfp4 serve`` in a process of its own."""

    url: str
    process: subprocess.Popen[str]
    lines: list[str]

    def end(self) -> int:
        """Its exit code."""
        return self.process.wait(SECONDS)


@contextlib.contextmanager
def process(folder: Path, *words: str, step_seconds: float = 0.0, **environment: str) -> Iterator[Process]:
    """The command as a user runs it, except that every step of its engine lasts ``step_seconds`` longer."""
    command = [sys.executable, "-c", _SLOW_SERVE, str(step_seconds), "serve", str(folder), "--port", "0", *words]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), **environment}
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    assert child.stderr is not None
    lines: list[str] = []
    try:
        for line in child.stderr:
            lines.append(line)
            if match := re.search(r"serves \S+ on (http://\S+)", line):
                break
        else:
            raise AssertionError("it did not start: " + "".join(lines))
        rest = threading.Thread(target=lambda: lines.extend(child.stderr or ()))
        rest.start()
        yield Process(match[1], child, lines)
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
    rest.join(SECONDS)
