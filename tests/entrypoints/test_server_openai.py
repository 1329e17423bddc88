"""The server through OpenAI's own client; what it must say is computed with ``LLM`` directly."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from anyfp4 import LLM, SamplingParams  # noqa: E402
from tests.entrypoints.serving import MODEL, SECONDS, Running, serving  # noqa: E402

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "héllo"}]


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Running]:
    with serving(tiny_model) as running:
        yield running


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> LLM:
    """The model by itself."""
    return LLM(tiny_model)


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=SECONDS) as made:
        yield made


def test_models(client: Any) -> None:
    listed = client.models.list().data
    assert [m.id for m in listed] == [MODEL] and listed[0].max_model_len == 256
    assert client.models.retrieve(MODEL) == listed[0]


def test_completion(client: Any, alone: LLM) -> None:
    got = client.completions.create(model=MODEL, prompt="hello", temperature=0, max_tokens=12)
    want = alone.generate("hello", SamplingParams(temperature=0, max_tokens=12))[0].outputs[0]
    assert got.object == "text_completion" and got.model == MODEL and got.choices[0].logprobs is None
    assert got.choices[0].text == want.text and got.choices[0].finish_reason == want.finish_reason
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (5, 12, 17)


def test_defaults_are_openais(client: Any, alone: LLM) -> None:
    got = client.completions.create(model=MODEL, prompt="hello", seed=3)
    want = alone.generate("hello", SamplingParams(temperature=1, max_tokens=16, seed=3))[0].outputs[0]
    assert got.choices[0].text == want.text
    got = client.chat.completions.create(model=MODEL, messages=MESSAGES, seed=3)
    want = alone.chat(MESSAGES, SamplingParams(temperature=1, max_tokens=None, seed=3))[0].outputs[0]
    assert got.choices[0].message.content == want.text and got.usage.completion_tokens == len(want.token_ids)


@pytest.mark.parametrize(
    "prompts",
    [["one", "two"], [104, 105], [[104, 105], [97]]],
    ids=["texts", "tokens", "token lists"],
)
def test_forms_of_a_prompt(client: Any, alone: LLM, prompts: Any) -> None:
    got = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=4, n=2)
    wanted = alone.generate(prompts, SamplingParams(temperature=0, max_tokens=4, n=2))
    assert [c.index for c in got.choices] == list(range(len(wanted) * 2))
    assert [c.text for c in got.choices] == [c.text for o in wanted for c in o.outputs]


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"temperature": 0.7, "seed": 1}, {"temperature": 0.7, "seed": 1}),
        ({"top_p": 0.5, "seed": 2}, {"top_p": 0.5, "seed": 2}),
        ({"top_k": 3, "seed": 3}, {"top_k": 3, "seed": 3}),
        ({"min_p": 0.3, "seed": 4}, {"min_p": 0.3, "seed": 4}),
        (
            {"presence_penalty": 1.5, "frequency_penalty": -0.5, "seed": 5},
            {"presence_penalty": 1.5, "frequency_penalty": -0.5, "seed": 5},
        ),
        ({"repetition_penalty": 1.7, "temperature": 0}, {"repetition_penalty": 1.7, "temperature": 0}),
        ({"logit_bias": {"65": 100, "66": -3.5}, "seed": 6}, {"logit_bias": {65: 100, 66: -3.5}, "seed": 6}),
        ({"ignore_eos": True, "min_tokens": 20, "seed": 7}, {"ignore_eos": True, "min_tokens": 20, "seed": 7}),
        ({"stop_token_ids": [101, 65, 189], "seed": 8}, {"stop_token_ids": [101, 65, 189], "seed": 8}),
        ({"skip_special_tokens": False, "seed": 9, "n": 3}, {"skip_special_tokens": False, "seed": 9, "n": 3}),
    ],
    ids="-".join,
)
def test_sampling_fields_reach_the_engine(client: Any, alone: LLM, fields: dict[str, Any], params: Any) -> None:
    plain = {k: v for k, v in fields.items() if k in ("temperature", "seed", "top_p", "n", "logit_bias")}
    extra = {k: v for k, v in fields.items() if k not in plain}
    got = client.completions.create(model=MODEL, prompt="some text", max_tokens=40, extra_body=extra, **plain)
    want = alone.generate("some text", SamplingParams(max_tokens=40, **params))[0]
    assert [c.text for c in got.choices] == [c.text for c in want.outputs]
    assert [c.finish_reason for c in got.choices] == [c.finish_reason for c in want.outputs]
    assert [c.stop_reason for c in got.choices] == [c.stop_reason for c in want.outputs]


@pytest.mark.parametrize("included", [False, True])
def test_stop_strings(client: Any, alone: LLM, included: bool) -> None:
    whole = alone.generate("hello", SamplingParams(temperature=0, max_tokens=24))[0].outputs[0].text
    stop = whole[5:7]
    for stream in (False, True):
        got = client.completions.create(
            model=MODEL,
            prompt="hello",
            temperature=0,
            max_tokens=24,
            stop=["never to be seen", stop],
            stream=stream,
            extra_body={"include_stop_str_in_output": included},
        )
        chunks = list(got) if stream else [got]
        text = "".join(c.choices[0].text for c in chunks)
        assert text == whole[: whole.index(stop) + (len(stop) if included else 0)]
        assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].choices[0].stop_reason == stop


def test_n_and_seed(client: Any) -> None:
    def ask(seed: int) -> list[str]:
        got = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, n=3, seed=seed, max_completion_tokens=12, temperature=1.5
        )
        assert [c.index for c in got.choices] == [0, 1, 2]
        return [c.message.content for c in got.choices]

    first = ask(11)
    assert ask(11) == first and ask(12) != first and len(set(first)) == 3


def test_without_a_seed_answers_differ(client: Any) -> None:
    answers = {client.completions.create(model=MODEL, prompt="x", max_tokens=16).choices[0].text for _ in range(4)}
    assert len(answers) > 1


def test_text_parts_and_developer_messages(client: Any) -> None:
    same = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hé"}, {"type": "text", "text": "llo"}]},
    ]
    answers = [
        client.chat.completions.create(model=MODEL, messages=m, temperature=0, max_tokens=8).choices[0].message.content
        for m in (MESSAGES, same)
    ]
    assert answers[0] == answers[1]


def test_an_answer_can_be_sent_back(client: Any) -> None:
    first = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=4)
    conversation = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "go on"}]
    second = client.chat.completions.create(model=MODEL, messages=conversation, temperature=0, max_tokens=4)
    assert second.usage.prompt_tokens > first.usage.total_tokens


def test_streams_say_what_whole_answers_say(client: Any) -> None:
    options = {"model": MODEL, "n": 2, "seed": 5, "max_tokens": 16, "stream_options": {"include_usage": True}}
    whole = client.completions.create(**{**options, "prompt": ["a", "b"], "stream_options": openai.NOT_GIVEN})
    chunks = list(client.completions.create(**options, prompt=["a", "b"], stream=True))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert "".join(c.text for c in own) == choice.text
        assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + [choice.finish_reason]


def test_chat_streams(client: Any) -> None:
    options = {"model": MODEL, "messages": MESSAGES, "seed": 5, "max_tokens": 16, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options).choices[0]
    chunks = [c.choices[0] for c in client.chat.completions.create(**options, stream=True)]
    assert chunks[0].delta.role == "assistant" and all(c.delta.role is None for c in chunks[1:])
    assert "".join(c.delta.content or "" for c in chunks) == whole.message.content
    assert [e for c in chunks if c.logprobs for e in c.logprobs.content] == whole.logprobs.content
    assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + [whole.finish_reason]


def test_chat_logprobs(client: Any, alone: LLM) -> None:
    got = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, seed=1, max_tokens=30, logprobs=True, top_logprobs=3
    )
    want = alone.chat(MESSAGES, SamplingParams(seed=1, max_tokens=30, logprobs=3))[0].outputs[0]
    assert want.logprobs is not None
    entries = got.choices[0].logprobs.content
    assert [e.logprob for e in entries] == [lp[t].logprob for lp, t in zip(want.logprobs, want.token_ids, strict=True)]
    tops = [[t.logprob for t in e.top_logprobs] for e in entries]
    assert tops == [[e.logprob for e in list(lp.values())[:3]] for lp in want.logprobs]
    # every token of this model is one byte, and the text is those bytes
    assert all(len(e.bytes) == 1 for e in entries[:-1])
    spoken = b"".join(bytes(e.bytes) for e in entries if len(e.bytes) == 1)
    assert spoken.decode(errors="replace") == want.text
    assert any(e.token == "\ufffd" and e.bytes[0] > 127 for e in entries), "no half character came: take another seed"


def test_chat_logprobs_without_top(client: Any) -> None:
    got = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=2, logprobs=True)
    assert [e.top_logprobs for e in got.choices[0].logprobs.content] == [[], []]


def test_echo_with_logprobs(client: Any, alone: LLM) -> None:
    want = alone.generate("héllo", SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=2))[0]
    scores = [*(want.prompt_logprobs or ()), *(want.outputs[0].logprobs or ())]
    tokens = [*want.prompt_token_ids, *want.outputs[0].token_ids]
    got = client.completions.create(model=MODEL, prompt="héllo", temperature=0, max_tokens=3, logprobs=2, echo=True)
    choice = got.choices[0]
    assert choice.text == "héllo" + want.outputs[0].text
    assert choice.logprobs.token_logprobs == [
        None if own is None else own[t].logprob for own, t in zip(scores, tokens, strict=True)
    ]
    assert [None if top is None else list(top.values()) for top in choice.logprobs.top_logprobs] == [
        None if own is None else [e.logprob for e in own.values()] for own in scores
    ]
    assert choice.logprobs.tokens[:6] == ["h", "bytes:\\xc3", "bytes:\\xa9", "l", "l", "o"]
    assert choice.logprobs.text_offset[:7] == [0, 1, 1, 2, 3, 4, 5]


def test_scoring_alone(client: Any) -> None:
    """``max_tokens=0`` gives the prompt's figures and no more."""
    with_one = client.completions.create(model=MODEL, prompt="hello", max_tokens=1, logprobs=0, echo=True)
    got = client.completions.create(model=MODEL, prompt="hello", max_tokens=0, logprobs=0, echo=True)
    assert got.choices[0].text == "hello" and got.choices[0].finish_reason == "length"
    assert got.choices[0].logprobs.token_logprobs == with_one.choices[0].logprobs.token_logprobs[:5]
    assert [len(t) for t in got.choices[0].logprobs.top_logprobs[1:]] == [1] * 4
    assert got.usage.completion_tokens == 0


def test_echo_streams_with_every_n(client: Any, alone: LLM) -> None:
    end = alone.tokenizer.eos_token_ids[0]
    options = {
        "model": MODEL,
        "prompt": [alone.tokenizer.encode("ab"), [*alone.tokenizer.encode("cd"), end]],
        "echo": True,
        "logprobs": 1,
        "n": 2,
        "max_tokens": 5,
    }
    whole = client.completions.create(**options, seed=4)
    chunks = [c.choices[0] for c in client.completions.create(**options, seed=4, stream=True)]
    assert [c.text[:2] for c in whole.choices] == ["ab", "ab", "cd", "cd"]
    assert whole.choices[2].text.startswith("cd<|end|>")
    for choice in whole.choices:
        own = [c for c in chunks if c.index == choice.index]
        assert "".join(c.text for c in own) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [v for c in own for v in getattr(c.logprobs, name)] == getattr(choice.logprobs, name)


def test_offsets_point_at_the_tokens(client: Any) -> None:
    got = client.completions.create(model=MODEL, prompt="some text", max_tokens=30, logprobs=0, echo=True, seed=2)
    choice = got.choices[0]
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        if not token.startswith("bytes:") and token != "<|end|>":
            assert choice.text[offset : offset + len(token)] == token
    assert choice.logprobs.text_offset[-1] in (len(choice.text), len(choice.text) - 1)


def test_token_ids_and_prompt_logprobs(client: Any, alone: LLM) -> None:
    extra = {"return_token_ids": True, "prompt_logprobs": 1}
    want = alone.generate("hello", SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1))[0]
    got = client.completions.create(model=MODEL, prompt="hello", temperature=0, max_tokens=3, extra_body=extra)
    choice = got.choices[0].model_dump()
    assert choice["token_ids"] == list(want.outputs[0].token_ids)
    assert choice["prompt_token_ids"] == list(want.prompt_token_ids)
    scores = [
        None if own is None else {str(t): {"logprob": e.logprob, "rank": e.rank} for t, e in own.items()}
        for own in want.prompt_logprobs or ()
    ]
    shown = [
        None if own is None else {t: {k: e[k] for k in ("logprob", "rank")} for t, e in own.items()}
        for own in choice["prompt_logprobs"]
    ]
    assert shown == scores
    chat = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1, extra_body=extra)
    assert len(chat.model_dump()["prompt_logprobs"]) == chat.usage.prompt_tokens


def test_cached_tokens_are_reported(client: Any) -> None:
    prompt = "a prompt that is longer than two blocks of the cache"
    counts = []
    for _ in range(2):
        got = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
        counts.append(got.usage.prompt_tokens_details.cached_tokens)
    assert counts == [0, len(prompt) // 16 * 16]


def test_values_that_ask_for_nothing_are_accepted(client: Any) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=1,
        n=1,
        store=False,
        metadata={},
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        service_tier="auto",
        user="somebody",
    )
    client.completions.create(model=MODEL, prompt="x", max_tokens=1, best_of=1, suffix="", logit_bias={}, stop=[])


def test_async_client(server: Running, alone: LLM) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            whole = await client.completions.create(model=MODEL, prompt="hello", temperature=0, max_tokens=8)
            stream = await client.completions.create(
                model=MODEL, prompt="hello", temperature=0, max_tokens=8, stream=True
            )
            return whole.choices[0].text, "".join([c.choices[0].text async for c in stream])

    want = alone.generate("hello", SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text
    assert asyncio.run(ask()) == (want, want)


def test_tokenize_and_back(server: Running, alone: LLM) -> None:
    got = server.post("/tokenize", {"prompt": "héllo"}).json()
    assert got == {"tokens": alone.tokenizer.encode("héllo"), "count": 6, "max_model_len": 256}
    assert server.post("/detokenize", {"tokens": got["tokens"], "model": MODEL}).json() == {"prompt": "héllo"}
    chat = server.post("/tokenize", {"messages": MESSAGES}).json()
    assert chat["tokens"] == alone.tokenizer.encode_chat(MESSAGES)
    assert server.post("/detokenize", {"tokens": [257]}).json() == {"prompt": "<|end|>"}
    assert server.post("/detokenize", {"tokens": [257], "skip_special_tokens": True}).json() == {"prompt": ""}
