"""``anyfp4 serve``: loads the model, listens, and ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import anyfp4
from anyfp4.async_llm import AsyncLLM
from anyfp4.entrypoints.server.app import create_app
from anyfp4.entrypoints.server.config import ServerConfig
from anyfp4.entrypoints.server.service import Service
from anyfp4.errors import InvalidArgumentError
from anyfp4.llm import LLM

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger("anyfp4.server")
#: seconds that responses get to be sent after the engine has ended them
_FLUSH_SECONDS = 5


def listen(config: ServerConfig) -> socket.socket:
    """Binds the address before the model loads, so that a port in use is reported at once.

    Nobody can connect yet: the socket listens only once the server runs.

    Raises:
        InvalidArgumentError: the address cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise InvalidArgumentError(f"cannot listen on {config.host}, port {config.port}: {error}") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server:
    """One run of the server.

    ``ready`` is called with the URL once requests are answered.
    """

    def __init__(self, llm: LLM, config: ServerConfig, bound: socket.socket, ready: Callable[[str], None]) -> None:
        self.llm, self.config, self._bound, self._ready = llm, config, bound, ready
        self._drain: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.service: Service | None = None

    async def serve(self) -> None:
        """Serves until :meth:`stop` or a signal, then finishes what runs."""
        self._loop, self._drain = asyncio.get_running_loop(), asyncio.Event()
        engine = AsyncLLM(self.llm, max_waiting=self.config.max_queue)
        await engine.start()
        service = self.service = Service(self.llm, engine, served_name(self.llm, self.config), self.config)
        try:
            web = _uvicorn_server(create_app(service), self._on_signal)
            serving = asyncio.create_task(web.serve(sockets=[self._bound]))
            draining = asyncio.create_task(self._drain_when_told(service, web))
            while not web.started and not serving.done():
                await asyncio.sleep(0.01)
            if web.started:
                self._ready(url_of(self._bound))
            await serving
            draining.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await draining
        finally:
            service.close()
            await engine.shutdown(drain=False)

    def stop(self) -> None:
        """Begins to end; may be called from any thread or signal handler."""
        if self._loop is not None and self._drain is not None:
            self._loop.call_soon_threadsafe(self._drain.set)

    async def _drain_when_told(self, service: Service, web: uvicorn.Server) -> None:
        """Refuses new work, lets running work end, then lets the web server go."""
        assert self._drain is not None
        await self._drain.wait()
        service.draining = True
        logger.info("shutting down: finishing %d requests, for %g s at most", service.active, self.config.drain_timeout)
        await service.engine.shutdown(drain=True, timeout=self.config.drain_timeout)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_SECONDS):
                while service.active:
                    await asyncio.sleep(0.02)
        web.should_exit = True

    def _on_signal(self, web: uvicorn.Server) -> None:
        """The first signal drains, the second ends at once."""
        assert self._drain is not None
        if self._drain.is_set():
            web.should_exit = web.force_exit = True
        self.stop()


def served_name(llm: LLM, config: ServerConfig) -> str:
    """The folder's name, or the id, unless told otherwise."""
    if config.served_model_name is not None:
        return config.served_model_name
    folder = Path(llm.model).expanduser()
    return folder.resolve().name if folder.is_dir() else llm.model


def _uvicorn_server(app: Any, on_signal: Callable[[uvicorn.Server], None]) -> uvicorn.Server:
    import uvicorn  # noqa: PLC0415  (comes with the extra)

    class QuietServer(uvicorn.Server):
        """uvicorn, but a signal is ours: it would end at once, and with the signal's exit code."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            on_signal(self)

    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
        timeout_keep_alive=30,
    )
    return QuietServer(config)


def run(llm: LLM, config: ServerConfig, bound: socket.socket, how: str) -> None:
    """Serves in this process until a signal.

    Args:
        llm: the model.
        config: of the server.
        bound: where to listen; see :func:`listen`.
        how: numerics and the like, for the line that says what is served.
    """
    log_to_stderr()

    def ready(url: str) -> None:
        engine = llm.engine
        logger.info(
            "anyfp4 %s serves %s on %s (from %s, %s on %s; %d tokens at most, %d KV blocks of %d)",
            anyfp4.__version__,
            served_name(llm, config),
            url,
            llm.model,
            how,
            engine.model.device,
            engine.max_model_len,
            engine.stats().kv_blocks_total,
            engine.config.block_size,
        )
        if config.host not in ("127.0.0.1", "localhost", "::1") and config.api_key is None:
            logger.warning("anyone who reaches %s may use it: there is no API key", url)

    # a signal that arrives before uvicorn has its handler must not kill a half-started server with a traceback
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    asyncio.run(Server(llm, config, bound, ready).serve())


def log_to_stderr() -> None:
    """One line for each event: time, level, message."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("anyfp4", logging.INFO), ("uvicorn", logging.WARNING)):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(level)
