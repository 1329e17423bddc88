"""Errors as OpenAI's clients know them: ``{"error": {"message", "type", "param", "code"}}`` with an HTTP status."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from anyfp4.entrypoints.server.protocol import TAGS
from anyfp4.errors import AnyFP4Error

if TYPE_CHECKING:
    from starlette.responses import Response

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
#: pydantic's kinds of error that have a code of their own; the rest is invalid_value
_CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    "unsupported_parameter": "unsupported_parameter",
    "json_invalid": "invalid_json",
}


class ApiError(AnyFP4Error):
    """An answer other than 200.

    Attributes:
        status: of HTTP.
        param: the field at fault, if one is.
        code: a word for programs.
        headers: to send besides.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def encoded(self) -> bytes:
        """The JSON text; ASCII, because a message may quote what cannot be encoded."""
        return json.dumps(self.body()).encode("ascii")

    def response(self) -> Response:
        """The HTTP response."""
        from starlette.responses import Response  # noqa: PLC0415  (comes with the extra)

        return Response(self.encoded(), self.status, self.headers, "application/json")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's complaints about a body."""
    error = errors[0]
    kind, where = str(error["type"]), [part for part in error["loc"][1:] if part not in TAGS]
    if kind == "json_invalid":
        detail = error.get("ctx", {}).get("error", "")
        at = f" at character {where[0]}" if where else ""
        return ApiError(400, f"the body is not JSON: {detail}{at}", code="invalid_json")
    if not where:
        return ApiError(400, "the body must be a JSON object", code="invalid_json")
    param = _name(where)
    message = {
        "extra_forbidden": "unknown field; this server does not support it",
        "missing": "required",
    }.get(kind, str(error["msg"]))
    return ApiError(400, f"{param}: {message}", param=param, code=_CODES.get(kind, "invalid_value"))


def _name(where: Sequence[str | int]) -> str:
    """``messages[0].content`` from ("messages", 0, "content")."""
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text if len(text) <= 100 else text[:100] + "…"
