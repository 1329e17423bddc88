"""A thousand bodies, made from the OpenAPI description and against it: no 500, no hang, always OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("fastapi")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from anyfp4 import EngineConfig  # noqa: E402
from tests.entrypoints.serving import MODEL, SECONDS, Running, serving  # noqa: E402

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
#: no answer takes longer; a request that is taken to the letter may ask for 128 × 255 tokens
SLOWEST = 60.0


def many(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Running]:
    with serving(tiny_model, EngineConfig(max_model_len=32), max_queue=16) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=SLOWEST) as made:
        yield made


def check(response: httpx.Response) -> None:
    assert response.status_code in {200, 400, 404, 413, 415}, (response.status_code, response.text)
    if response.status_code == 200:
        if response.headers["content-type"].startswith("text/event-stream"):
            assert response.text.endswith("data: [DONE]\n\n")
        else:
            response.json()
        return
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]


def send(client: httpx.Client, path: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    check(response)
    return response


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("mode", "count"), [("POSITIVE", 40), ("NEGATIVE", 250)], ids=["good", "bad"])
def test_bodies_from_the_description(server: Running, client: httpx.Client, path: str, mode: str, count: int) -> None:
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    strategy = schema[path]["POST"].as_strategy(generation_mode=schemathesis.GenerationMode[mode])
    statuses = set()

    @many(count)
    @given(strategy)
    def run(case: Any) -> None:
        body = case.body
        if isinstance(body, dict) and "model" in body and isinstance(body["model"], str):
            body = {**body, "model": MODEL}  # or nearly every request would end at its name
        if type(body).__name__ == "NotSet":
            body = b""
        statuses.add(send(client, path, body).status_code)

    run()
    assert statuses & ({200, 400} if mode == "POSITIVE" else {400})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": MODEL, "prompt": "x", "max_tokens": 2, "n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        "min_p": 0.0, "logprobs": 1, "echo": True, "stop": ["a"], "seed": 1, "logit_bias": {"1": 2},
        "stream": False, "stop_token_ids": [1], "min_tokens": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
        "prompt_logprobs": None, "user": "u", "stream_options": None, "best_of": 1, "suffix": None,
    },
    "/v1/chat/completions": {
        "model": MODEL, "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "max_tokens": 2,
        "logprobs": True, "top_logprobs": 2, "stream": True, "stream_options": {"include_usage": True},
        "response_format": {"type": "text"}, "tools": [], "metadata": None, "temperature": 0.5,
    },
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1, 2]},
}  # fmt: skip


def mutate(draw: Any, value: Any) -> Any:
    """The value with something in it replaced, added or taken away."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        change = draw(st.sampled_from(["replace", "remove", "add", "deeper"]))
        rest = {k: v for k, v in value.items() if k != key}
        if change == "remove":
            return rest
        if change == "add":
            return {**value, draw(st.text(max_size=8)): draw(JSON)}
        return {**rest, key: draw(JSON) if change == "replace" else mutate(draw, value[key])}
    if isinstance(value, list) and value and draw(st.booleans()):
        return [*value[:-1], mutate(draw, value[-1]), *draw(st.lists(JSON, max_size=2))]
    return draw(JSON)


@many(250)
@given(data=st.data(), path=st.sampled_from(PATHS), count=st.integers(1, 3))
def test_mutated_bodies(client: httpx.Client, data: Any, path: str, count: int) -> None:
    body: Any = VALID[path]
    for _ in range(count):
        body = mutate(data.draw, body)
    send(client, path, body)


@many(120)
@given(data=st.data(), path=st.sampled_from(PATHS))
def test_broken_json(client: httpx.Client, data: Any, path: str) -> None:
    text = json.dumps(VALID[path]).encode()
    at = data.draw(st.integers(0, len(text)))
    junk = data.draw(st.binary(max_size=6))
    cut = data.draw(st.integers(0, 8))
    send(client, path, text[:at] + junk + text[at + cut :])


@many(60)
@given(method=st.sampled_from(["GET", "PUT", "DELETE", "PATCH", "POST"]), name=st.text(max_size=12), body=st.binary())
def test_other_paths_and_methods(client: httpx.Client, method: str, name: str, body: bytes) -> None:
    for path in ("/v1/", "/", "/v1/models/"):
        response = client.request(method, path + quote(name, safe=""), content=body if method != "GET" else None)
        assert response.status_code in {200, 404, 405}, (method, path, name, response.text)
    if method != "GET":
        check_status = {"POST": 415}.get(method, 405)
        assert client.request(method, "/v1/completions", content=body).status_code == check_status


def test_nothing_is_left_behind(server: Running) -> None:
    stats = server.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert server.get("/health").status_code == 200
    assert httpx.post(server.url + "/v1/completions", json=VALID["/v1/completions"], timeout=SECONDS).status_code == 200
