"""LLM: results, options, invariance, errors; on a tiny NVFP4 model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from anyfp4 import LLM, EngineConfig, SamplingParams
from anyfp4.backends import registry
from anyfp4.errors import (
    BackendError,
    CheckpointFileError,
    EngineError,
    EnvironmentVariableError,
    InvalidArgumentError,
)
from anyfp4.llm import RequestOutput
from anyfp4.testing.models import all_logits

PROMPTS = ["hello", "a", "the quick brown fox jumps over the lazy dog", "12345", "\n\n", "zzzzzzzzzzzz"]


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(tiny_model)


def same(a: RequestOutput, b: RequestOutput) -> None:
    """Tokens, texts, reasons and log-probabilities are equal to the last bit (floats compare by value: no NaN here)."""
    assert a.prompt_token_ids == b.prompt_token_ids
    assert a.outputs == b.outputs
    assert a.prompt_logprobs == b.prompt_logprobs


def test_greedy_takes_the_most_likely_token_of_the_full_logits(llm: LLM) -> None:
    output = llm.generate("hello", SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True))[0]
    done = output.outputs[0]
    tokens = [*output.prompt_token_ids, *done.token_ids]
    logits = all_logits(llm.engine.model, tokens)
    expected = logits[len(output.prompt_token_ids) - 1 : -1].argmax(dim=-1).tolist()
    assert list(done.token_ids) == expected
    assert done.finish_reason == "length" and len(done.token_ids) == 12
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    assert done.logprobs is not None
    for i, candidates in enumerate(done.logprobs):
        row = logprobs[len(output.prompt_token_ids) - 1 + i]
        assert [lp.rank for lp in candidates.values()] == [1, 2, 3]
        for token, lp in candidates.items():
            assert abs(lp.logprob - row[token].item()) < 1e-4  # float32 of values up to 2⁵: 2⁻¹⁸ each step


@pytest.mark.parametrize("numerics", ["native", "blackwell"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_batch_order_and_chunks_do_not_matter(tiny_model: Path, numerics: str, temperature: float) -> None:
    params = [
        SamplingParams(
            temperature=temperature, seed=i, max_tokens=6 + i, logprobs=2, prompt_logprobs=1, top_p=0.9, ignore_eos=True
        )
        for i in range(len(PROMPTS))
    ]
    llm = LLM(tiny_model, numerics=numerics)
    alone = [llm.generate(p, q)[0] for p, q in zip(PROMPTS, params, strict=True)]
    for config in (
        EngineConfig(),
        EngineConfig(max_step_tokens=5),
        EngineConfig(max_num_seqs=2, block_size=3),
        # room for little more than one request: preemption and recomputation
        EngineConfig(kv_cache_bytes=10 * 2 * 2 * 8 * 32 * 2, block_size=8),
    ):
        other = LLM(tiny_model, numerics=numerics, config=config)
        order = list(range(len(PROMPTS) - 1, -1, -1))
        together = other.generate([PROMPTS[i] for i in order], [params[i] for i in order])
        for i, output in zip(order, together, strict=True):
            same(output, alone[i])
        assert other.engine.stats().kv_blocks_used == 0


def test_prompt_logprobs(llm: LLM) -> None:
    output = llm.generate("hello world", SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))[0]
    tokens = list(output.prompt_token_ids)
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(tokens)
    expected = torch.log_softmax(all_logits(llm.engine.model, tokens).double(), dim=-1)
    for position in range(1, len(tokens)):
        entry = output.prompt_logprobs[position]
        assert entry is not None and list(entry) == [tokens[position]]
        assert abs(entry[tokens[position]].logprob - expected[position - 1, tokens[position]].item()) < 1e-4


def test_seeds(llm: LLM) -> None:
    def draw(**options: Any) -> list[tuple[int, ...]]:
        params = SamplingParams(temperature=1.5, max_tokens=10, ignore_eos=True, **options)
        return [c.token_ids for c in llm.generate("hello", params)[0].outputs]

    assert draw(seed=1) == draw(seed=1)
    assert draw(seed=1) != draw(seed=2)
    several = draw(seed=1, n=3)
    assert several[0] == draw(seed=1)[0] and len(set(several)) == 3
    assert draw() != draw()


def test_stop_strings(llm: LLM) -> None:
    free = llm.generate("hello", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))[0].outputs[0]
    stop = free.text[5:8]
    at = free.text.find(stop)
    for include in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=20, ignore_eos=True, stop=["never this", stop], include_stop_str_in_output=include
        )
        done = llm.generate("hello", params)[0].outputs[0]
        assert done.text == free.text[: at + (len(stop) if include else 0)]
        assert (done.finish_reason, done.stop_reason) == ("stop", stop)
    streamed = [o.outputs[0].text for o in llm.stream("hello", params)]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(streamed))
    assert streamed[-1] == done.text


def test_stop_strings_wait_for_min_tokens(llm: LLM) -> None:
    options = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
    free = llm.generate("hello", SamplingParams(**options))[0].outputs[0]
    stop = free.text[2]
    done = llm.generate("hello", SamplingParams(**options, stop=stop, min_tokens=8))[0].outputs[0]
    assert len(done.token_ids) >= 8 and done.token_ids == free.token_ids[: len(done.token_ids)]
    assert (done.finish_reason == "stop") == (stop in free.text[7:])


def test_streams_side_by_side(llm: LLM) -> None:
    """Steps that one stream takes serve the other; nothing is lost, whoever is read first."""
    params = [SamplingParams(temperature=0.9, seed=i, max_tokens=12, n=2, ignore_eos=True) for i in range(2)]
    expected = [llm.generate(p, q)[0] for p, q in zip(PROMPTS, params, strict=False)]
    first, second = (llm.stream(p, q) for p, q in zip(PROMPTS, params, strict=False))
    next(first)
    next(second)
    outputs = list(second)
    assert len(outputs) <= 13
    same(outputs[-1], expected[1])
    same(llm.generate(PROMPTS[0], params[0])[0], expected[0])
    same(list(first)[-1], expected[0])
    assert not llm.engine.has_work and not llm._open and not llm._changed


def test_a_lent_engine_generates_nothing(llm: LLM) -> None:
    llm.lend("somebody")
    try:
        with pytest.raises(EngineError, match="the engine is in use by somebody"):
            llm.generate("a")
        with pytest.raises(EngineError, match="in use by somebody"):
            llm.lend("another")
    finally:
        llm.lend(None)
    stream = llm.stream("a")
    next(stream)
    with pytest.raises(EngineError, match="a running generate or stream"):
        llm.lend("somebody")
    stream.close()  # type: ignore[attr-defined]
    llm.lend("somebody")
    llm.lend(None)


def test_an_error_is_told(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise MemoryError("all used up")

    monkeypatch.setattr(llm.engine.runner, "run", failing)
    output = llm.generate("hello", SamplingParams(n=2))[0]
    assert output.finished and output.error == "MemoryError: all used up"
    assert {c.finish_reason for c in output.outputs} == {"error"}


def test_stop_tokens_and_end_of_sequence(llm: LLM) -> None:
    free = llm.generate("hello", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))[0].outputs[0]
    token = free.token_ids[4]
    first = free.token_ids.index(token)
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[token], ignore_eos=True)
    done = llm.generate("hello", params)[0].outputs[0]
    assert done.token_ids == free.token_ids[: first + 1]
    assert (done.finish_reason, done.stop_reason) == ("stop", token)


def test_streaming_adds_up(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=15, ignore_eos=True)
    steps = list(llm.stream("hello", params))
    assert len(steps) == 15 and steps[-1].finished and not steps[0].finished
    same(steps[-1], llm.generate("hello", params)[0])


def test_closing_a_stream_frees_everything(llm: LLM) -> None:
    stream = llm.stream("hello", SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_work
    assert llm.engine.stats().kv_blocks_used == 0


def test_prompt_forms(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3)
    ids = llm.tokenizer.encode("hi")
    assert llm.generate(ids, params)[0].prompt_token_ids == tuple(ids)
    chat = llm.chat([{"role": "user", "content": "hi"}], params)[0]
    text = "".join(("<|user|>", "hi", "<|end|>", "<|assistant|>"))
    assert chat.prompt_token_ids == tuple(llm.tokenizer.encode(text))
    assert len(llm.generate(["a", "b"], params)) == 2


@pytest.mark.parametrize(
    ("prompt", "options", "match"),
    [
        ("", {}, "empty"),
        ([], {}, "no prompts"),
        ([999], {}, "token 999 at position 0"),
        ("x" * 300, {}, "300 tokens; at most 255"),
        ("x", {"temperature": -1}, "temperature"),
        ("x", {"top_p": 0}, "top_p"),
        ("x", {"min_p": 1.5}, "min_p"),
        ("x", {"top_k": -2}, "top_k"),
        ("x", {"max_tokens": -1}, "max_tokens"),
        ("x", {"n": 0}, "n must be"),
        ("x", {"stop": [""]}, "stop"),
        ("x", {"logprobs": -1}, "logprobs"),
        ("x", {"seed": 2**64}, "seed"),
    ],
)
def test_bad_requests(llm: LLM, prompt: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        llm.generate(prompt, SamplingParams(**options))
    assert not llm.engine.has_work


def test_a_bad_prompt_in_a_batch_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(InvalidArgumentError):
        llm.generate(["fine", ""])
    assert not llm.engine.has_work


def test_bad_settings(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match="numerics"):
        LLM(tiny_model, numerics="fast")
    with pytest.raises(BackendError, match="unknown backend 'marlin'; there are: "):
        LLM(tiny_model, backend="marlin")
    with pytest.raises(InvalidArgumentError, match="dtype"):
        LLM(tiny_model, dtype="int8")
    with pytest.raises(InvalidArgumentError, match="model's limit is 256"):
        LLM(tiny_model, config=EngineConfig(max_model_len=1000))
    with pytest.raises(InvalidArgumentError, match="neither a folder"):
        LLM("no-such-thing")
    with pytest.raises(CheckpointFileError, match=r"config\.json"):
        LLM(tmp_path)
    monkeypatch.setenv("ANYFP4_NUMERIC", "blackwell")
    with pytest.raises(EnvironmentVariableError, match="did you mean ANYFP4_NUMERICS"):
        LLM(tiny_model)


def test_the_slow_fallback_says_so_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if registry.select(torch.device("cpu")) is registry.REFERENCE:
        pytest.skip("no compiled kernels here to fall back from")
    fast = LLM(tiny_model)
    assert not caplog.records
    for backend in registry.PREFERENCE["cpu"][:-1]:
        monkeypatch.setattr(type(backend), "why_not", lambda *_, **__: "not built")
    slow = LLM(tiny_model)
    assert [r.getMessage() for r in caplog.records] == [
        "running on the reference backend, which is slow (cpu: not built)"
    ]
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=5, logprobs=1)
    same(slow.generate("hello", params)[0], fast.generate("hello", params)[0])
    assert len(caplog.records) == 1
