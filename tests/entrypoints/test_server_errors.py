"""Every refusal has its status and OpenAI's form, and names the field."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from tests.entrypoints.serving import MODEL, SECONDS, Running, serving  # noqa: E402

LIMIT = 64 * 1024


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Running]:
    with serving(tiny_model, max_body_bytes=LIMIT, body_timeout=1.0, max_queue=8) as running:
        yield running


def check(response: httpx.Response, status: int, param: str | None, code: str, words: str = "") -> None:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["param"], body["error"]["code"]) == (param, code), body
    assert words in body["error"]["message"]
    assert param is None or param in body["error"]["message"]
    assert response.headers["x-request-id"]


COMPLETION = {"model": MODEL, "prompt": "x", "max_tokens": 1}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
BOTH = [
    ({"model": None}, "model", "invalid_value"),
    ({"model": 5}, "model", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"n": 100}, "n", "invalid_value"),  # more than can ever run and wait here
    ({"n": True}, "n", "invalid_value"),
    ({"n": "2"}, "n", "invalid_value"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_p": 1.1}, "top_p", "invalid_value"),
    ({"top_k": -2}, "top_k", "invalid_value"),
    ({"min_p": 2}, "min_p", "invalid_value"),
    ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"100000": 1}}, "logit_bias", "invalid_value"),
    ({"seed": 1.5}, "seed", "invalid_value"),
    ({"seed": 2**64}, "seed", "invalid_value"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"stop": 7}, "stop", "invalid_value"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "invalid_value"),
    ({"stop_token_ids": [100000]}, "stop_token_ids", "invalid_value"),
    ({"min_tokens": 2}, "min_tokens", "invalid_value"),  # more than max_tokens
    ({"prompt_logprobs": 101}, "prompt_logprobs", "invalid_value"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "unsupported_parameter"),
    ({"max_tokens": -1}, "max_tokens", "invalid_value"),
    ({"max_tokens": 256}, "max_tokens", "context_length_exceeded"),
    ({"stream": "yes"}, "stream", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
    ({"store": True}, "store", "unsupported_parameter"),
    ({"metadata": {"a": "b"}}, "metadata", "unsupported_parameter"),
    ({"service_tier": "flex"}, "service_tier", "unsupported_parameter"),
    ({"user": 3}, "user", "invalid_value"),
    ({"guided_json": {}}, "guided_json", "unknown_parameter"),
    ({"use_beam_search": False}, "use_beam_search", "unknown_parameter"),
]
COMPLETIONS = [
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt[0]", "invalid_value"),
    ({"prompt": ["a", ""]}, "prompt", "invalid_value"),
    ({"prompt": ["a", 5]}, "prompt[1]", "invalid_value"),
    ({"prompt": [5, "a"]}, "prompt[1]", "invalid_value"),
    ({"prompt": [1, -1]}, "prompt[1]", "invalid_value"),
    ({"prompt": [100000]}, "prompt", "invalid_value"),
    ({"prompt": {"a": 1}}, "prompt", "invalid_value"),
    ({"prompt": "x" * 256}, "prompt", "context_length_exceeded"),
    ({"prompt": ["a"] * 73}, "n", "invalid_value"),
    ({"best_of": 2}, "best_of", "unsupported_parameter"),
    ({"suffix": "end"}, "suffix", "unsupported_parameter"),
    ({"logprobs": 101}, "logprobs", "invalid_value"),
    ({"logprobs": True}, "logprobs", "invalid_value"),
    ({"echo": 1}, "echo", "invalid_value"),
    ({"messages": []}, "messages", "unknown_parameter"),
]
CHATS = [
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "hi"}, "messages", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name", "unsupported_parameter"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
        "invalid_value",
    ),
    ({"messages": [{"role": "user", "content": "x" * 256}], "max_tokens": None}, "messages", "context_length_exceeded"),
    ({"max_completion_tokens": 2}, "max_completion_tokens", "invalid_value"),
    ({"max_completion_tokens": 999, "max_tokens": None}, "max_completion_tokens", "context_length_exceeded"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": 2}, "logprobs", "invalid_value"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls", "unsupported_parameter"),
    ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
    ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
    ({"prompt": "x"}, "prompt", "unknown_parameter"),
    ({"echo": True}, "echo", "unknown_parameter"),
]


@pytest.mark.parametrize(
    ("path", "base", "change", "param", "code"),
    [
        *[("/v1/completions", COMPLETION, *case) for case in BOTH + COMPLETIONS],
        *[("/v1/chat/completions", CHAT, *case) for case in BOTH + CHATS],
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) and v not in (COMPLETION, CHAT) else "",
)
def test_wrong_fields(server: Running, path: str, base: dict[str, Any], change: Any, param: str, code: str) -> None:
    check(server.post(path, base | change), 400, param, code)


def test_half_a_surrogate_pair(server: Running) -> None:
    for body in (b'{"model": "tiny", "prompt": "\\ud800"}', b'{"model": "tiny", "prompt": "x", "stop": ["a\\udfff"]}'):
        got = httpx.post(server.url + "/v1/completions", content=body, headers={"content-type": "application/json"})
        assert got.status_code == 400 and "surrogate" in got.json()["error"]["message"]
    body = b'{"model": "tiny", "prompt": "\\ud83d\\ude00", "max_tokens": 1}'  # a whole pair
    got = httpx.post(server.url + "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert got.status_code == 200
    body = b'{"model": "tiny", "prompt": "x", "\\ud800": 1}'
    got = httpx.post(server.url + "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert got.status_code == 400 and got.json()["error"]["message"]


def test_missing_fields(server: Running) -> None:
    for field in ("model", "prompt"):
        body = {k: v for k, v in COMPLETION.items() if k != field}
        check(server.post("/v1/completions", body), 400, field, "missing_required_parameter")


def test_the_model_must_be_the_one_served(server: Running) -> None:
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        check(server.post(path, body | {"model": "other"}), 404, "model", "model_not_found", "'other'")
    check(server.get("/v1/models/other"), 404, "model", "model_not_found")
    check(server.post("/tokenize", {"model": "other", "prompt": "x"}), 404, "model", "model_not_found")


def test_the_clients_own_exceptions(server: Running) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model=MODEL, prompt="x", temperature=-1, stream=True)
    assert wrong.value.param == "temperature"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"null", b'"text"', b"[" * 30_000, b'{"model": \xff}', b"1" * 5000, b'{"a":' * 5000],
    ids=["empty", "cut", "list", "null", "text", "deep list", "not UTF-8", "huge number", "deep object"],
)
def test_bodies_that_are_not_json_objects(server: Running, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        got = httpx.post(server.url + path, content=body, headers={"content-type": "application/json"})
        check(got, 400, None, "invalid_json")


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_content_type(server: Running, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    got = httpx.post(server.url + "/v1/completions", content=b'{"model": "tiny"}', headers=headers)
    check(got, 415, None, "unsupported_media_type")


def test_content_type_with_parameters(server: Running) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert server.post("/v1/completions", COMPLETION, headers=headers).status_code == 200


@pytest.mark.parametrize("size", [LIMIT + 1, 40 * LIMIT])
def test_large_bodies(server: Running, size: int) -> None:
    body = b'{"prompt": "' + b"x" * size

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(body), 4096):
            yield body[start : start + 4096]

    for content in (body, chunks()):  # with a Content-Length, and without
        headers = {"content-type": "application/json"}
        got = httpx.post(server.url + "/v1/completions", content=content, headers=headers, timeout=SECONDS)
        check(got, 413, None, "body_too_large", str(LIMIT))


def test_a_body_of_the_limit_is_read(server: Running) -> None:
    body = b'{"model": "tiny", "prompt": "x", "max_tokens": 1}'.ljust(LIMIT)
    got = httpx.post(server.url + "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert got.status_code == 200


def test_a_body_that_never_comes(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        got = connection.makefile("rb").read()  # to the end: the server closes
    assert got.startswith(b"HTTP/1.1 408 ") and b'"code": "timeout"' in got


def test_unknown_paths_and_methods(server: Running) -> None:
    check(server.get("/v1/embeddings"), 404, None, "not_found", "/v1/embeddings")
    for method, path in (("GET", "/v1/completions"), ("PUT", "/v1/chat/completions"), ("POST", "/v1/models")):
        got = httpx.request(method, server.url + path)
        check(got, 405, None, "method_not_allowed")
        assert got.headers["allow"]
    assert httpx.head(server.url + "/health").status_code == 405


def test_tokenize_errors(server: Running) -> None:
    check(server.post("/tokenize", {}), 400, "prompt", "invalid_value")
    check(server.post("/tokenize", {"prompt": "x", "messages": CHAT["messages"]}), 400, "prompt", "invalid_value")
    check(server.post("/tokenize", {"text": "x"}), 400, "text", "unknown_parameter")
    check(server.post("/detokenize", {"tokens": [1, 261]}), 400, "tokens[1]", "invalid_value")
    check(server.post("/detokenize", {}), 400, "tokens", "missing_required_parameter")


def test_a_model_without_a_chat_template(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with serving(tmp_path) as bare:
        assert bare.post("/v1/completions", COMPLETION).status_code == 200
        check(bare.post("/v1/chat/completions", CHAT), 400, "messages", "invalid_value", "chat template")


def test_nothing_is_left_behind(server: Running) -> None:
    stats = server.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
