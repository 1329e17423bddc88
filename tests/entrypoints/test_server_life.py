"""Clients that go away, a full queue, keys, signals, an engine that dies: nothing hangs, nothing stays."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from anyfp4 import LLM, EngineConfig, SamplingParams  # noqa: E402
from tests.entrypoints.serving import MODEL, SECONDS, Running, process, serving, slow, wait_until  # noqa: E402

STEP = 0.05
BODY = {"model": MODEL, "prompt": "hello", "max_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Running]:
    """Every step takes a while, so that there is a middle to interrupt."""
    with serving(tiny_model, prepare=slow(STEP)) as running:
        yield running


def free(server: Running) -> bool:
    stats = server.stats()
    return stats.kv_blocks_used == stats.running == stats.waiting == 0


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"prompt": ["a", "b", "c"]}], ids=["one", "n", "prompts"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_goes_frees_its_blocks(server: Running, stream: bool, extra: dict[str, Any]) -> None:
    before = server.metric("anyfp4_completions_finished_total")
    body = BODY | extra | {"stream": stream}
    if stream:
        with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=SECONDS) as response:
            lines = response.iter_lines()
            while not next(lines):
                pass
            assert server.stats().kv_blocks_used > 0
            steps = server.stats().steps
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/v1/completions", json=body, timeout=httpx.Timeout(SECONDS, read=5 * STEP))
        steps = server.stats().steps
        assert steps > 0
    wait_until(lambda: free(server), "the blocks of a client that went")
    # the step in progress when the client went, and the one that its abort came too late for
    assert server.stats().steps - steps <= 2
    wait_until(lambda: server.metric("anyfp4_completions_finished_total") > before, "the count of aborted completions")
    assert 'reason="abort"' in server.get("/metrics").text


def test_others_are_not_disturbed_by_a_client_that_goes(server: Running, tiny_model: Path) -> None:
    want = LLM(tiny_model).generate("steady", SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].text
    steady = {"model": MODEL, "prompt": "steady", "temperature": 0, "max_tokens": 12, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=steady, timeout=SECONDS) as response:
        lines = response.iter_lines()
        with httpx.stream("POST", server.url + "/v1/completions", json=BODY | {"stream": True}) as gone:
            next(gone.iter_lines())
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(c["choices"][0]["text"] for c in chunks) == want


def test_the_loop_answers_while_the_engine_computes(server: Running) -> None:
    """/health during steps of 50 ms."""
    with httpx.stream("POST", server.url + "/v1/completions", json=BODY | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        with httpx.Client() as client:
            client.get(server.url + "/health")
            started = time.perf_counter()
            for _ in range(10):
                assert client.get(server.url + "/health").status_code == 200
            assert time.perf_counter() - started < 10 * STEP
    wait_until(lambda: free(server), "an idle engine")


def test_the_loop_answers_while_a_long_text_is_tokenized(server: Running) -> None:
    text = "some words that go on and on " * 20_000
    seconds: list[float] = []

    def tokenize() -> None:
        started = time.perf_counter()
        assert server.post("/tokenize", {"prompt": text}).json()["count"] == len(text)
        seconds.append(time.perf_counter() - started)

    with httpx.Client() as client:
        client.get(server.url + "/health")
        other = threading.Thread(target=tokenize)
        other.start()
        answered = 0
        while other.is_alive():
            client.get(server.url + "/health")
            answered += 1
        other.join()
    assert answered > 10 and seconds, f"{answered} answers in {seconds}"


def test_a_full_queue(tiny_model: Path) -> None:
    with serving(tiny_model, EngineConfig(max_num_seqs=1), prepare=slow(STEP), max_queue=1) as server:
        with (
            httpx.stream("POST", server.url + "/v1/completions", json=BODY | {"stream": True}) as first,
            httpx.stream("POST", server.url + "/v1/completions", json=BODY | {"stream": True, "prompt": "b"}),
        ):
            lines = first.iter_lines()  # kept: httpx closes a stream whose iterator is dropped
            next(lines)
            wait_until(lambda: server.stats().waiting == 1, "a queue")
            assert server.metric("anyfp4_sequences_waiting") == server.metric("anyfp4_sequences_running") == 1
            for stream in (False, True):
                got = server.post("/v1/completions", BODY | {"stream": stream})
                assert got.status_code == 429 and int(got.headers["retry-after"]) >= 1
                assert got.json()["error"]["code"] == "queue_full"
            client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
            with pytest.raises(openai.RateLimitError):
                client.completions.create(model=MODEL, prompt=["x", "y"], max_tokens=1)
        wait_until(lambda: free(server), "an idle engine")
        assert server.post("/v1/completions", BODY | {"max_tokens": 1}).status_code == 200


def test_a_client_that_does_not_read_delays_nobody(server: Running) -> None:
    big = BODY | {"n": 8, "logprobs": 100, "stream": True}
    with (
        httpx.stream("POST", server.url + "/v1/completions", json=big, timeout=SECONDS),
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        started = time.perf_counter()
        client.completions.create(model=MODEL, prompt="x", max_tokens=4)
        assert time.perf_counter() - started < 40 * STEP
    wait_until(lambda: free(server), "an idle engine")


def test_api_key(tiny_model: Path) -> None:
    with serving(tiny_model, api_key="s3cret") as server:
        for key in (None, "wrong", "s3cret x", "S3cret"):
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/tokenize")):
                got = httpx.request(method, server.url + path, headers=headers)
                assert got.status_code == 401 and got.headers["www-authenticate"] == "Bearer"
                assert got.json()["error"]["code"] == "invalid_api_key" and "s3cret" not in got.text
        odd = httpx.get(server.url + "/v1/models", headers={"authorization": b"Bearer s3cr\xe9t"})
        assert odd.status_code == 401
        for path in ("/", "/health", "/metrics"):
            assert server.get(path).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0).models.list()
        assert openai.OpenAI(base_url=server.url + "/v1", api_key="s3cret").models.list().data[0].id == MODEL


def test_an_engine_that_dies(tiny_model: Path) -> None:
    def prepare(llm: LLM) -> None:
        step, count = llm.engine.step, iter(range(1000))

        def fail() -> Any:
            if next(count) > 3:
                raise RuntimeError("the device is gone")
            return step()

        llm.engine.step = fail  # type: ignore[method-assign]

    with serving(tiny_model, prepare=prepare) as server:
        assert server.get("/health").status_code == 200
        got = server.post("/v1/completions", BODY)
        assert got.status_code == 503 and got.json()["error"]["code"] == "engine_stopped"
        assert server.get("/health").status_code == 503 and server.metric("anyfp4_up") == 0
        got = server.post("/v1/completions", BODY)
        assert got.status_code == 503 and got.json()["error"]["code"] == "engine_stopped"


def test_an_engine_that_dies_in_a_stream(tiny_model: Path) -> None:
    def prepare(llm: LLM) -> None:
        step, count = llm.engine.step, iter(range(1000))
        llm.engine.step = lambda: step() if next(count) < 4 else 1 / 0  # type: ignore[method-assign, assignment]

    with serving(tiny_model, prepare=prepare) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="died"):
            options = {"model": MODEL, "prompt": "x", "max_tokens": 50, "extra_body": {"ignore_eos": True}}
            list(client.completions.create(**options, stream=True))


def test_one_request_that_fails_leaves_the_others(tiny_model: Path) -> None:
    def prepare(llm: LLM) -> None:
        run = llm.engine.runner.run

        def fail(step: Any) -> Any:
            if any(item.sequence.tokens[0] == 0 for item in step):
                raise ValueError("no such luck")
            return run(step)

        llm.engine.runner.run = fail  # type: ignore[method-assign]

    with serving(tiny_model, prepare=prepare) as server:
        got = server.post("/v1/completions", BODY | {"prompt": [0, 1]})
        assert got.status_code == 500 and got.json()["error"]["code"] == "engine_error"
        assert "no such luck" in got.json()["error"]["message"]
        assert server.post("/v1/completions", BODY | {"max_tokens": 3}).status_code == 200
        assert server.get("/health").status_code == 200 and free(server)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_finishes_what_runs(tiny_model: Path, sent: signal.Signals) -> None:
    with process(tiny_model, "--served-model-name", MODEL, step_seconds=0.03) as child:
        client = openai.OpenAI(base_url=child.url + "/v1", api_key="none", max_retries=0)
        options = {"model": MODEL, "prompt": "hello", "seed": 1, "max_tokens": 60}
        stream = client.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
        chunks = [next(stream), next(stream)]
        whole: list[Any] = []
        other = threading.Thread(target=lambda: whole.append(client.completions.create(**options)))
        other.start()
        time.sleep(0.2)  # both are at work
        child.process.send_signal(sent)
        wait_until(lambda: httpx.get(child.url + "/health").status_code == 503, "the end of health")
        got = httpx.post(child.url + "/v1/completions", json=BODY)
        assert got.status_code == 503 and got.json()["error"]["code"] == "shutting_down"
        assert got.headers["retry-after"] and got.headers["connection"] == "close"
        chunks += stream
        other.join(SECONDS)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert whole and whole[0].choices[0].finish_reason in ("stop", "length")
        assert child.end() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(child.url + "/health")
    text = "".join(child.lines)
    assert "Traceback" not in text and "POST /v1/completions 200" in text and "503" in text


def test_draining_has_an_end(tiny_model: Path) -> None:
    words = ("--served-model-name", MODEL, "--drain-timeout", "0.3", "--no-log-requests")
    with process(tiny_model, *words, step_seconds=0.05) as child:
        client = openai.OpenAI(base_url=child.url + "/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model=MODEL, prompt="hello", max_tokens=240, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        child.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):  # long before its 240 tokens
            list(stream)
        assert child.end() == 0
    assert "Traceback" not in "".join(child.lines) and "POST" not in "".join(child.lines)


def test_the_key_comes_from_the_environment(tiny_model: Path) -> None:
    with process(tiny_model, ANYFP4_API_KEY="from-outside") as child:
        assert httpx.get(child.url + "/v1/models").status_code == 401
        models = openai.OpenAI(base_url=child.url + "/v1", api_key="from-outside").models.list().data
        assert [m.id for m in models] == [tiny_model.name]
        assert "127.0.0.1" in child.url
        child.process.send_signal(signal.SIGTERM)
        assert child.end() == 0
    assert "from-outside" not in "".join(child.lines)
