"""The engine on token ids: sampling parameters against their definitions, sharing, errors, figures."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anyfp4.engine import kv_cache
from anyfp4.engine.config import EngineConfig, SamplingParams
from anyfp4.engine.engine import Engine
from anyfp4.engine.model_runner import ModelRunner
from anyfp4.engine.sequence import Sequence
from anyfp4.errors import InvalidArgumentError
from anyfp4.models.decoder import Decoder
from anyfp4.testing.models import all_logits

PROMPT = [72, 101, 108, 108, 111, 32, 72, 101, 121, 33]
EOS = 257


def run(decoder: Decoder, *requests: tuple[list[int], dict[str, Any]], **config: Any) -> list[Sequence]:
    """Runs requests together to their end; all sequences, in order."""
    engine = Engine(decoder, EngineConfig(**config))
    sequences = [
        s for i, (tokens, options) in enumerate(requests) for s in engine.add(str(i), tokens, SamplingParams(**options))
    ]
    drain(engine)
    assert engine.stats().kv_blocks_used == 0
    return sequences


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def greedy(**options: Any) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **options}


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -2.0, "presence_penalty": 2.0},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.5, "frequency_penalty": 0.3, "presence_penalty": -0.2},
        {"repetition_penalty": 1.2, "logit_bias": {111: 4.5, 33: -100.0, 200: 3.25}},
    ],
)
def test_penalties_and_bias(decoder: Decoder, options: dict[str, Any]) -> None:
    """Token by token from the whole model's logits, one float32 operation at a time."""
    (got,) = run(decoder, (PROMPT, greedy(max_tokens=25, **options)))
    tokens = list(PROMPT)
    f = np.float32
    for _ in range(25):
        logits = all_logits(decoder, tokens)[-1].tolist()
        for token, bias in options.get("logit_bias", {}).items():
            logits[token] = f(logits[token]) + f(bias)
        generated = tokens[len(PROMPT) :]
        for token in range(len(logits)):
            value, count = f(logits[token]), generated.count(token)
            if token in tokens:
                penalty = f(options.get("repetition_penalty", 1.0))
                value = value / penalty if value > 0 else value * penalty
            value = value - f(options.get("frequency_penalty", 0.0)) * f(count)
            value = value - (f(options.get("presence_penalty", 0.0)) if count else f(0))
            logits[token] = value
        tokens.append(int(np.argmax(logits)))
    assert got.tokens == tokens
    (free,) = run(decoder, (PROMPT, greedy(max_tokens=25)))
    assert free.tokens != tokens


def test_logprobs_are_the_models_own(decoder: Decoder) -> None:
    options = greedy(max_tokens=1, logprobs=2)
    plain, biased = run(decoder, (PROMPT, options), (PROMPT, {**options, "logit_bias": {5: 100.0}, "min_tokens": 1}))
    assert biased.generated == [5]
    for token, lp in plain.logprobs[0].items():
        assert biased.logprobs[0][token] == lp
    assert biased.logprobs[0][5].rank > 2


@pytest.mark.parametrize("stop", ["eos", "token"])
def test_min_tokens(decoder: Decoder, stop: str) -> None:
    ends: dict[str, Any] = {"ignore_eos": False} if stop == "eos" else {"stop_token_ids": [EOS]}
    eager = greedy(**{**ends, "logit_bias": {EOS: 100.0}})
    at_once, later = run(decoder, (PROMPT, eager), (PROMPT, {**eager, "min_tokens": 5}))
    assert at_once.generated == [EOS]
    assert len(later.generated) == 6 and later.generated.index(EOS) == 5
    assert later.finish_reason == "stop" and later.stop_reason == (None if stop == "eos" else EOS)


def test_without_new_tokens_the_prompt_is_scored(decoder: Decoder) -> None:
    scored, one = run(
        decoder,
        (PROMPT, greedy(max_tokens=0, prompt_logprobs=2)),
        (PROMPT, greedy(max_tokens=1, prompt_logprobs=2)),
        max_step_tokens=4,
    )
    assert scored.tokens == PROMPT and scored.finish_reason == "length"
    assert scored.prompt_logprobs == one.prompt_logprobs and len(one.prompt_logprobs) == len(PROMPT)
    limit = decoder.cos_sin.shape[0]
    (whole,) = run(decoder, ([1] * limit, greedy(max_tokens=0)))
    assert whole.finish_reason == "length"


def test_completions_share_the_prompt(decoder: Decoder) -> None:
    engine = Engine(decoder, EngineConfig(block_size=4))
    together = engine.add("0", PROMPT, SamplingParams(n=3, temperature=1.5, seed=4, max_tokens=6, ignore_eos=True))
    assert (engine.stats().waiting, engine.stats().running) == (3, 0)
    engine.step()
    engine.step()
    stats = engine.stats()
    assert (stats.waiting, stats.running) == (0, 3)
    assert stats.prompt_tokens_computed == 10 + 2 + 2
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (27, 16)
    assert stats.kv_blocks_used == 2 + 3
    drain(engine)
    alone = run(
        decoder,
        (PROMPT, {"n": 3, "temperature": 1.5, "seed": 4, "max_tokens": 6, "ignore_eos": True}),
        enable_prefix_caching=False,
    )
    assert [s.tokens for s in together] == [s.tokens for s in alone]
    assert len({tuple(s.generated) for s in together}) == 3


def test_prompt_scores_read_no_cache_but_fill_it(decoder: Decoder) -> None:
    engine = Engine(decoder, EngineConfig(block_size=4))
    (first,) = engine.add("0", PROMPT, SamplingParams(**greedy(prompt_logprobs=0)))
    drain(engine)
    (second,) = engine.add("1", PROMPT, SamplingParams(**greedy(prompt_logprobs=0)))
    (third,) = engine.add("2", PROMPT, SamplingParams(**greedy()))
    drain(engine)
    assert (first.cached_tokens, second.cached_tokens, third.cached_tokens) == (0, 0, 8)
    assert first.prompt_logprobs == second.prompt_logprobs and first.tokens == third.tokens
    engine.reset_prefix_cache()
    assert engine.stats().kv_blocks_cached == 0


def test_figures(decoder: Decoder) -> None:
    engine = Engine(decoder, EngineConfig(block_size=4, kv_cache_bytes=7 * kv_cache.block_bytes(decoder, 4)))
    sequences = [engine.add(str(i), PROMPT[i:], SamplingParams(**greedy()))[0] for i in range(3)]
    drain(engine)
    stats = engine.stats()
    assert (stats.kv_blocks_total, stats.kv_blocks_used, stats.running, stats.waiting) == (7, 0, 0, 0)
    assert stats.generated_tokens == 36 and stats.finished == 3 and stats.preemptions > 0
    assert stats.steps >= 12 and 0 < stats.schedule_seconds < stats.step_seconds
    assert all(s.finish_reason == "length" for s in sequences)


def test_evicted_blocks_are_counted(decoder: Decoder) -> None:
    engine = Engine(decoder, EngineConfig(block_size=4, kv_cache_bytes=7 * kv_cache.block_bytes(decoder, 4)))
    evicted = []
    for i in range(4):  # each takes three blocks and leaves two that can be found: of the fourth's, only one is blank
        engine.add(str(i), [i, *PROMPT[1:]], SamplingParams(**greedy(max_tokens=2)))
        drain(engine)
        evicted.append(engine.stats().prefix_evicted_blocks)
    assert evicted == [0, 0, 0, 2]
    engine.reset_prefix_cache()  # nobody needed the blocks
    assert engine.stats().prefix_evicted_blocks == 2


def with_poisoned_token(decoder: Decoder, token: int) -> Decoder:
    """The same model, but everything after ``token`` is NaN."""
    embedding = decoder.embedding.clone()
    embedding[token] = torch.nan
    return dataclasses.replace(decoder, embedding=embedding)


@pytest.mark.parametrize("options", [{}, {"prompt_logprobs": 1}, {"max_tokens": 0, "prompt_logprobs": 0}, {"n": 3}])
def test_a_request_with_nan_logits_ends_alone(decoder: Decoder, options: dict[str, Any]) -> None:
    poisoned = with_poisoned_token(decoder, 250)
    good = ([1, 2, 3], {"temperature": 0.8, "seed": 1, "max_tokens": 8, "logprobs": 2, "logit_bias": {250: -100}})
    (alone,) = run(decoder, good)
    bad = ([1, 2, 250, 4], greedy(**options))
    everyone = run(poisoned, good, bad, good, block_size=2)
    survivors = [s for s in everyone if s.request_id != "1"]
    assert [s.tokens for s in survivors] == [alone.tokens] * 2
    assert [s.logprobs for s in survivors] == [alone.logprobs] * 2
    culprits = [s for s in everyone if s.request_id == "1"]
    assert {s.finish_reason for s in culprits} == {"error"} and all("NaN" in (s.error or "") for s in culprits)


def test_a_step_that_raises_is_run_again_one_by_one(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original, calls = ModelRunner.run, []

    def failing(self: ModelRunner, step: Any) -> Tensor:
        calls.append(len(step))
        if any(99 in item.sequence.tokens for item in step):
            raise RuntimeError("no memory for this one")
        return original(self, step)

    good = (PROMPT, greedy(logprobs=1, logit_bias={99: -100.0}))
    (alone,) = run(decoder, good)
    monkeypatch.setattr(ModelRunner, "run", failing)
    first, bad, last = run(decoder, good, ([99, 1], greedy(n=1)), good)
    assert calls[:4] == [3, 1, 1, 1] and calls[4] == 2
    assert bad.error == "RuntimeError: no memory for this one" and bad.generated == []
    for s in (first, last):
        assert (s.tokens, s.logprobs, s.finish_reason) == (alone.tokens, alone.logprobs, "length")
    assert len(caplog.records) == 1


def test_a_lost_device_is_not_a_requests_fault(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> Tensor:
        raise torch.AcceleratorError("device lost")

    monkeypatch.setattr(ModelRunner, "run", lost)
    with pytest.raises(torch.AcceleratorError):
        run(decoder, (PROMPT, greedy()))


def test_abort_frees_blocks_at_once(decoder: Decoder) -> None:
    engine = Engine(decoder, EngineConfig(block_size=4))
    one, two = (engine.add(str(i), PROMPT, SamplingParams(**greedy(n=1 + i)))[0] for i in range(2))
    engine.step()
    used = engine.stats().kv_blocks_used
    engine.abort(one)
    assert one.finish_reason == "abort" and engine.stats().kv_blocks_used == used - 3
    engine.abort(one)  # a second time is harmless
    engine.abort(two)
    assert engine.stats().finished == 2
    assert engine.has_work  # the second completion of the other request
    drain(engine)
    assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize(
    ("tokens", "options", "match"),
    [
        ([], {}, "the prompt is empty"),
        ([3, -1], {}, "prompt token -1 at position 1 is not in 0…260"),
        ([3, 261], {}, "prompt token 261 at position 1"),
        ([1] * 256, {}, "256 tokens; at most 255 leave room"),
        ([1] * 257, {"max_tokens": 0}, "257 tokens"),
        ([1], {"stop_token_ids": [300]}, "stop_token_ids: token 300 is not in 0…260"),
        ([1], {"logit_bias": {-2: 1.0}}, "logit_bias: token -2 is not in 0…260"),
        ([1] * 20, {"max_tokens": 30}, r"up to 50 tokens needs 13 KV-cache blocks of 4 tokens, and there are 10"),
    ],
)
def test_what_can_never_run_is_refused_at_once(
    decoder: Decoder, tokens: list[int], options: dict[str, Any], match: str
) -> None:
    engine = Engine(decoder, EngineConfig(block_size=4, kv_cache_bytes=10 * kv_cache.block_bytes(decoder, 4)))
    with pytest.raises(InvalidArgumentError, match=match):
        engine.add("0", tokens, SamplingParams(**options))
    assert not engine.has_work and engine.stats().waiting == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"presence_penalty": 2.5}, r"presence_penalty must be in \[-2, 2\], got 2.5"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"logit_bias": {7: 101.0}}, r"logit_bias of token 7 must be in \[-100, 100\]"),
        ({"logit_bias": {7: float("nan")}}, "logit_bias of token 7"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens = 9 exceeds max_tokens = 8"),
        ({"max_tokens": -1}, "max_tokens must be 0 or more"),
    ],
)
def test_bad_parameters(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        SamplingParams(**options)


def test_a_cache_without_room_for_a_block_is_refused(decoder: Decoder) -> None:
    with pytest.raises(InvalidArgumentError, match=r"kv_cache_bytes = 10: one block needs \d+ bytes"):
        Engine(decoder, EngineConfig(kv_cache_bytes=10))


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys, anyfp4.engine.scheduler; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
