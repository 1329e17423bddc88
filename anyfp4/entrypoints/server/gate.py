"""The outermost layer: what is refused before a request is even parsed, and one log line for each request."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anyfp4.entrypoints.server.errors import ApiError

if TYPE_CHECKING:
    from anyfp4.entrypoints.server.service import Service

logger = logging.getLogger("anyfp4.server")
#: paths whose POST takes a JSON body
JSON_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"})
PATHS = JSON_PATHS | {"/", "/v1/models", "/health", "/metrics", "/openapi.json"}
METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})
#: the client has gone before the response; nobody sees this status but the log and the metrics
CLIENT_GONE = 499
#: a body that is too large is read on for this long, so that its sender gets to the answer
_DISCARD_SECONDS, _DISCARD_BYTES = 5.0, 64 * 2**20


@dataclass
class Record:
    """One HTTP request as the log shows it.

    Attributes:
        id: also in the ``x-request-id`` header.
        started: on ``time.perf_counter``.
        notes: what a handler adds to the line.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.perf_counter)
    status: int | None = None
    notes: dict[str, object] = field(default_factory=dict)


class Gate:
    """ASGI middleware: API key, draining, content type, size of the body; log and count."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            return
        record = Record()
        scope["anyfp4.record"] = record
        self.service.active += 1
        try:
            await self._handle(scope, receive, _Sender(send, record))
        except Exception:  # the last resort: whatever goes wrong in one request must not be lost, nor end the others
            logger.exception("request %s failed", record.id)
            if record.status is None:
                record.status = 500
        finally:
            self.service.active -= 1
            self._report(scope, record)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        incoming = _Receiver(receive)
        try:
            self._check(scope, Headers(scope=scope))
            if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                async with asyncio.timeout(self.service.config.body_timeout):
                    await incoming.read(self.service.config.max_body_bytes)
        except TimeoutError:
            incoming.complete = True  # its sender had time enough
            await _refuse(ApiError(408, "the body did not arrive in time", code="timeout"), incoming, send)
        except ApiError as error:
            await _refuse(error, incoming, send)
        else:
            if not incoming.gone:
                await self.app(scope, incoming, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Whatever can be told before the body.

        Raises:
            ApiError: the request is refused.
        """
        path, config = scope["path"], self.service.config
        if config.api_key is not None and (path.startswith("/v1/") or path in JSON_PATHS):
            sent = headers.get("authorization", "")
            # bytes, because compare_digest takes no other characters than ASCII as text
            if not hmac.compare_digest(sent.encode(), f"Bearer {config.api_key}".encode()):
                raise ApiError(
                    401,
                    "a valid API key is required: Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        if scope["method"] != "POST" or path not in JSON_PATHS:
            return
        self.service.check_open()
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the content type must be application/json", code="unsupported_media_type")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > config.max_body_bytes:
            raise _too_large(config.max_body_bytes)

    def _report(self, scope: Scope, record: Record) -> None:
        path, method = scope["path"], scope["method"]
        status = CLIENT_GONE if record.status is None else record.status
        self.service.metrics.responses.labels(
            method if method in METHODS else "other",
            path if path in PATHS else "/v1/models/{model}" if path.startswith("/v1/models/") else "other",
            str(status),
        ).inc()
        if self.service.config.log_requests:
            notes = "".join(f" {name}={value}" for name, value in record.notes.items())
            seconds = time.perf_counter() - record.started
            client = (scope.get("client") or ("-",))[0]
            logger.info(
                "%s %s %s %d %.3fs%s id=%s", client, quote(method), quote(path), status, seconds, notes, record.id
            )


class _Sender:
    """Passes messages on, remembers the status, adds the request's id."""

    def __init__(self, send: Send, record: Record) -> None:
        self._send, self._record = send, record

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._record.id
        await self._send(message)


class _Receiver:
    """Reads the body within limits and hands it on in one message.

    Attributes:
        gone: the client has disconnected.
        complete: nothing of the body is left to come.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._body: bytes | None = None
        self.gone = self.complete = False

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        return await self._receive()

    async def read(self, limit: int) -> None:
        """Takes in the whole body.

        Raises:
            ApiError: it is larger than ``limit`` bytes.
        """
        parts: list[bytes] = []
        size = 0
        while not self.complete:
            parts.append(await self.next_part())
            size += len(parts[-1])
            if size > limit:
                raise _too_large(limit)
        self._body = b"".join(parts)

    async def next_part(self) -> bytes:
        """The next part of the body."""
        message = await self._receive()
        self.gone = message["type"] == "http.disconnect"
        self.complete = not message.get("more_body", False)
        return bytes(message.get("body", b""))


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")


async def _refuse(problem: ApiError, incoming: _Receiver, send: Send) -> None:
    """Answers and closes, reading on for a while: a connection reset would reach the sender before the answer."""
    body = problem.encoded()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **problem.headers,
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    size = 0
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            while not incoming.complete and size < _DISCARD_BYTES:
                size += len(await incoming.next_part())
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
