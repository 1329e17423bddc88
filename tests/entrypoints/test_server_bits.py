"""Concurrent clients get the bits that each would get alone."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from anyfp4 import LLM, EngineConfig, SamplingParams  # noqa: E402
from tests.entrypoints.serving import MODEL, SECONDS, serving  # noqa: E402

CLIENTS, ROUNDS = 32, 3
#: small steps and few blocks, so that prompts are cut, prefixes shared and sequences preempted
ENGINE = EngineConfig(max_num_seqs=24, max_step_tokens=48, kv_cache_bytes=2 * 2 * 2 * 16 * 16 * 2 * 24)


def _requests(seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    shared = "".join(rng.choices("abcdefgh ", k=64))
    wanted = []
    for _ in range(CLIENTS):
        text = rng.choice(["", shared[: rng.randrange(65)]]) + "".join(rng.choices("xyzé☕ ", k=rng.randrange(1, 40)))
        wanted.append(
            {
                "kind": rng.choice(["completion", "chat", "echo"]),
                "text": text,
                "stream": rng.random() < 0.5,
                "temperature": rng.choice([0.0, 0.8, 1.3]),
                "seed": rng.randrange(2**31),
                "max_tokens": rng.randrange(1, 80),
                "top_p": rng.choice([1.0, 0.9]),
            }
        )
    return wanted


async def _ask(client: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Text, log-probabilities and their alternatives, streamed or not."""
    options = {k: request[k] for k in ("stream", "temperature", "seed", "max_tokens", "top_p")}
    if request["kind"] == "chat":
        messages = [{"role": "user", "content": request["text"]}]
        got = await client.chat.completions.create(
            model=MODEL, messages=messages, logprobs=True, top_logprobs=3, **options
        )
        choices = [c.choices[0] async for c in got] if request["stream"] else [got.choices[0]]
        entries = [e for c in choices if c.logprobs for e in c.logprobs.content]
        return {
            "text": "".join((c.delta if request["stream"] else c.message).content or "" for c in choices),
            "logprobs": [e.logprob for e in entries],
            "top": [[t.logprob for t in e.top_logprobs] for e in entries],
            "finish": choices[-1].finish_reason,
        }
    got = await client.completions.create(
        model=MODEL, prompt=request["text"], echo=request["kind"] == "echo", logprobs=3, **options
    )
    choices = [c.choices[0] async for c in got] if request["stream"] else [got.choices[0]]
    return {
        "text": "".join(c.text for c in choices),
        "logprobs": [v for c in choices for v in c.logprobs.token_logprobs],
        "top": [None if t is None else list(t.values()) for c in choices for t in c.logprobs.top_logprobs],
        "finish": choices[-1].finish_reason,
    }


def _alone(llm: LLM, request: dict[str, Any]) -> dict[str, Any]:
    """The same from the model by itself, one request at a time, without a prefix cache."""
    echo = request["kind"] == "echo"
    params = SamplingParams(
        temperature=request["temperature"],
        seed=request["seed"],
        max_tokens=request["max_tokens"],
        top_p=request["top_p"],
        logprobs=3,
        prompt_logprobs=3 if echo else None,
    )
    prompt = [{"role": "user", "content": request["text"]}] if request["kind"] == "chat" else request["text"]
    output = llm.generate(prompt, params)[0]
    completion = output.outputs[0]
    tokens = [*(output.prompt_token_ids if echo else ()), *completion.token_ids]
    scores = [*(output.prompt_logprobs or ()), *(completion.logprobs or ())]
    top = 3 if request["kind"] == "chat" else 4
    return {
        "text": (request["text"] if echo else "") + completion.text,
        "logprobs": [None if own is None else own[t].logprob for own, t in zip(scores, tokens, strict=True)],
        "top": [None if own is None else [e.logprob for e in own.values()][:top] for own in scores],
        "finish": completion.finish_reason,
    }


def test_32_clients_get_the_bits_of_one(tiny_model: Path) -> None:
    alone = LLM(tiny_model, config=EngineConfig(enable_prefix_caching=False, max_num_seqs=1))
    with serving(tiny_model, ENGINE) as server:

        async def together(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
            async with openai.AsyncOpenAI(
                base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=SECONDS
            ) as client:
                return await asyncio.gather(*(_ask(client, r) for r in requests))

        for seed in range(ROUNDS):
            requests = _requests(seed)
            for request, got in zip(requests, asyncio.run(together(requests)), strict=True):
                want = _alone(alone, request)
                for name, value in want.items():
                    assert got[name] == value, f"round {seed}, {request}: {name}"
        stats = server.stats()
        assert stats.preemptions > 0 and stats.prefix_hit_tokens > 0, "the schedule was too easy"
        assert stats.kv_blocks_used == 0 and stats.running == stats.waiting == 0
