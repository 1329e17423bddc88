"""The ASGI application: routes, error form, OpenAPI description."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import anyfp4
from anyfp4.entrypoints.server import chat, completions
from anyfp4.entrypoints.server.choices import Json
from anyfp4.entrypoints.server.errors import ApiError, from_validation
from anyfp4.entrypoints.server.gate import CLIENT_GONE, Gate
from anyfp4.entrypoints.server.generation import ClientGoneError
from anyfp4.entrypoints.server.metrics import CONTENT_TYPE
from anyfp4.entrypoints.server.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from anyfp4.entrypoints.server.service import Service

if TYPE_CHECKING:
    from fastapi import FastAPI

PAGE = Path(__file__).with_name("chat.html")
_JSON_ERRORS = {
    400: "a field is wrong, unknown or not supported",
    404: "there is no such model",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "the queue is full",
    500: "the request failed",
    503: "the server is shutting down, or the engine has stopped",
}


def create_app(service: Service) -> Gate:
    """The application of one service; ``.app`` is FastAPI's own."""
    from fastapi import FastAPI  # noqa: PLC0415  (comes with the extra)
    from fastapi.exceptions import RequestValidationError  # noqa: PLC0415

    app = FastAPI(
        title="anyfp4",
        version=anyfp4.__version__,
        description="OpenAI-compatible server of an NVFP4 model.",
        docs_url=None,  # these two pages load scripts from elsewhere
        redoc_url=None,
        exception_handlers={
            ApiError: _on_api_error,
            ClientGoneError: _on_client_gone,
            RequestValidationError: _on_validation_error,
            HTTPException: _on_http_error,
            Exception: _on_any_error,
        },
    )
    routes = Routes(service)
    _add_routes(app, routes)
    _describe(app)
    return Gate(app, service)


class Routes:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self.service = service
        page = PAGE.read_text(encoding="utf-8")
        self._page, self._policy = page, _content_policy(page)

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Complete prompts."""
        return await completions.handle(self.service, body, request)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        return await chat.handle(self.service, body, request)

    async def models(self) -> Response:
        """The model that is served, as a list."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, model: str) -> Response:
        """The model that is served."""
        self.service.check_model(model)
        return JSONResponse(self._model())

    async def tokenize(self, body: TokenizeBody) -> Response:
        """Tokens of a text or of a conversation."""
        self.service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt: give either prompt or messages", param="prompt", code="invalid_value")
        if body.prompt is not None:
            tokens = await self.service.encode(body.prompt)
        else:
            tokens = await self.service.encode_chat([m.for_template() for m in body.messages or ()])
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self.service.max_len})

    async def detokenize(self, body: DetokenizeBody) -> Response:
        """Text of tokens."""
        self.service.check_model(body.model)
        self.service.check_tokens(body.tokens)
        text = await self.service.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
        return JSONResponse({"prompt": text})

    async def health(self) -> Response:
        """200 while new requests are taken, else 503."""
        try:
            self.service.check_open()
        except ApiError as error:
            return JSONResponse({"status": error.code}, 503, error.headers)
        return JSONResponse({"status": "ok"})

    async def metrics(self) -> Response:
        """Figures for Prometheus."""
        return Response(self.service.metrics.render(), media_type=CONTENT_TYPE)

    async def page(self) -> Response:
        """The chat page."""
        headers = {
            "content-security-policy": self._policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }
        return Response(self._page, headers=headers, media_type="text/html")

    def _model(self) -> Json:
        service = self.service
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "anyfp4",
            "max_model_len": service.max_len,
        }


def _add_routes(app: FastAPI, routes: Routes) -> None:
    def add(method: str, path: str, handler: Callable[..., Any], errors: Sequence[int], **options: Any) -> None:
        responses: dict[int | str, dict[str, Any]] = {code: {"description": _JSON_ERRORS[code]} for code in errors}
        app.add_api_route(path, handler, methods=[method], responses=responses, response_class=Response, **options)

    posts = [code for code in _JSON_ERRORS if code != 429]
    add("POST", "/v1/completions", routes.completions, list(_JSON_ERRORS))
    add("POST", "/v1/chat/completions", routes.chat, list(_JSON_ERRORS))
    add("GET", "/v1/models", routes.models, [])
    add("GET", "/v1/models/{model:path}", routes.model, [404])
    add("POST", "/tokenize", routes.tokenize, posts)
    add("POST", "/detokenize", routes.detokenize, posts)
    add("GET", "/health", routes.health, [503])
    add("GET", "/metrics", routes.metrics, [])
    add("GET", "/", routes.page, [], include_in_schema=False)


def _describe(app: FastAPI) -> None:
    """Takes the 422 that FastAPI assumes out of its description; here a wrong body is a 400."""
    for path in app.openapi()["paths"].values():  # made here, once: it takes a tenth of a second
        for operation in path.values():
            operation["responses"].pop("422", None)


def _content_policy(page: str) -> str:
    """Allows the page its own script and style, by their digests, and requests to this server; nothing else."""

    def digests(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(b.encode()).digest()).decode() for b in blocks)
        return " ".join(f"'sha256-{h}'" for h in hashes)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    return from_validation(error.errors()).response()  # type: ignore[attr-defined]


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code, message = {
        404: ("not_found", f"there is no {request.url.path}"),
        405: ("method_not_allowed", f"{request.url.path} does not take {request.method}"),
        400: ("invalid_json", "the body cannot be read as JSON"),
    }.get(error.status_code, ("http_error", str(error.detail)))
    return ApiError(error.status_code, message, code=code, headers=error.headers or {}).response()


async def _on_any_error(request: Request, error: Exception) -> Response:
    return ApiError(500, "the server failed; see its log", code="internal_error").response()
