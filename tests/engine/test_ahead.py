"""Async scheduling: the same bits as without it, whatever happens while a step flies."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anyfp4.engine import kv_cache
from anyfp4.engine.config import EngineConfig, SamplingParams
from anyfp4.engine.engine import Engine
from anyfp4.engine.inputs import Feed
from anyfp4.engine.model_runner import Computed
from anyfp4.engine.scheduler import Scheduled
from anyfp4.engine.sequence import Sequence
from anyfp4.errors import InvalidArgumentError
from anyfp4.llm import LLM
from anyfp4.models.decoder import Decoder
from anyfp4.ops.chosen import Chosen, Known
from anyfp4.ops.sampling import Choice
from tests.engine import schedules
from tests.engine.schedules import Case
from tests.engine.test_engine import PROMPT, drain, greedy, with_poisoned_token

CASES, SCHEDULES = 60, 100


def make_cases(vocab: int) -> list[Case]:
    """Mostly requests whose steps can fly, with tokens that end them at any time; some whose steps cannot."""
    rng = random.Random(2)
    cases = []
    for case in schedules.make_cases(rng, vocab, CASES, 24, 14):
        p = case.params
        plain = replace(
            p, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, logit_bias=None, logprobs=None,
            min_tokens=rng.choice([0, 0, 0, p.min_tokens]), prompt_logprobs=rng.choice([None, None, p.prompt_logprobs]),
        )  # fmt: skip
        cases.append(Case(case.tokens, p if rng.random() < 0.1 else plain))
    return cases


def test_every_request_is_what_it_is_alone_and_without(decoder: Decoder) -> None:
    cases = make_cases(decoder.config.vocab_size)
    references = [schedules.alone(decoder, case) for case in cases]
    steps = ahead = preemptions = hits = aborted = stopped = 0
    for seed in range(SCHEDULES):
        drawn = schedules.make_schedule(seed, cases, kv_cache.block_bytes(decoder, 1), most_requests=12)
        engine, sequences = schedules.run(
            decoder, cases, replace(drawn, config=replace(drawn.config, async_scheduling=True))
        )
        for i, s in sequences:
            assert schedules.difference(s, references[i][s.index]) is None, (seed, i)
            aborted += s.finish_reason == "abort"
            stopped += s.finish_reason == "stop"
        stats = engine.stats()
        assert (stats.kv_blocks_used, stats.running, stats.waiting) == (0, 0, 0) and engine._flight is None
        engine.scheduler.blocks.check()
        assert stats.generated_tokens == sum(len(s.generated) for _, s in sequences)
        steps, ahead, preemptions = steps + stats.steps, ahead + stats.steps_ahead, preemptions + stats.preemptions
        hits += stats.prefix_hit_tokens
    # what the comparison relies on happens indeed
    assert ahead > 400 and steps - ahead > 400 and preemptions > 20 and hits > 200 and aborted > 10 and stopped > 50


def plain(seed: int, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.9, "seed": seed, "max_tokens": 12, "ignore_eos": True, **options})


def run(
    decoder: Decoder, *requests: tuple[list[int], SamplingParams], on: bool = True, **config: Any
) -> tuple[Engine, list[Sequence]]:
    engine = Engine(decoder, EngineConfig(async_scheduling=on, **config))
    sequences = [s for i, (tokens, params) in enumerate(requests) for s in engine.add(str(i), tokens, params)]
    drain(engine)
    return engine, sequences


def outcome(s: Sequence) -> object:
    return s.tokens, s.logprobs, s.finish_reason, s.stop_reason, s.error


def test_a_call_brings_one_step(decoder: Decoder) -> None:
    """Callers see the same after every call, and steps fly from the first decode step on."""
    seen = []
    for on in (False, True):
        engine = Engine(decoder, EngineConfig(async_scheduling=on))
        sequences = [engine.add(str(i), PROMPT[i:], plain(i, max_tokens=4 + 3 * i))[0] for i in range(3)]
        calls = []
        while engine.has_work:
            changed = engine.step()
            calls.append([(s.request_id, list(s.tokens), s.finish_reason) for s in changed])
        seen.append((calls, [outcome(s) for s in sequences]))
        stats = engine.stats()
        assert (stats.steps, stats.generated_tokens, stats.steps_ahead) == (10, 21, 9 if on else 0)
        assert 0 < stats.schedule_seconds < stats.step_seconds
    assert seen[0] == seen[1]
    assert not Engine(decoder, EngineConfig()).async_scheduling or decoder.device.type == "cuda"


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 0}, {"logit_bias": {3: 1.0}}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1}, {"min_tokens": 12},
    ],
)  # fmt: skip
def test_what_needs_the_host_does_not_fly(decoder: Decoder, options: dict[str, Any]) -> None:
    engine, _ = run(decoder, (PROMPT, plain(0, **options)))
    assert engine.stats().steps_ahead == 0


def test_steps_fly_once_they_can(decoder: Decoder) -> None:
    # one step of the prompt, which is scored; then nothing needs the host, or only as long as it must not end
    assert run(decoder, (PROMPT, plain(0, prompt_logprobs=1)))[0].stats().steps_ahead == 10
    assert run(decoder, (PROMPT, plain(0, min_tokens=5)))[0].stats().steps_ahead == 6


def test_stop_strings_and_ends(tiny_model: Path) -> None:
    """Stop strings are found between steps, end-of-sequence tokens in the step before."""
    texts = ["hello", "a", "the quick brown fox", "12345"]
    found = []
    for on in (False, True):
        llm = LLM(tiny_model, config=EngineConfig(async_scheduling=on, max_num_seqs=3, block_size=4))
        eos = next(iter(llm.engine.eos))
        first = llm.generate(texts, plain(5, n=2, max_tokens=24, temperature=1.3))
        stops = [out.outputs[0].text[3:5] for out in first]
        params = [
            plain(5, n=2, max_tokens=24, temperature=1.3, stop=stop, stop_token_ids=[first[i].outputs[1].token_ids[7]])
            for i, stop in enumerate(stops)
        ]
        second = llm.generate(texts, params)
        found.append([[(c.text, c.token_ids, c.finish_reason, c.stop_reason) for c in out.outputs]
                      for out in (*first, *second)])  # fmt: skip
        assert eos is not None and (llm.engine.stats().steps_ahead > 20) == on
    assert found[0] == found[1]
    assert {str(c[3]) for out in found[1] for c in out} > {"None"}


def test_an_abort_while_its_step_ahead_flies(decoder: Decoder) -> None:
    """Its blocks go to a new request at once, whose bits are its own; and whoever waits gets the place."""
    late = ([5, 6, 7, 8, 9, 10, 11], plain(8))
    _, (alone,) = run(decoder, late, on=False)
    _, (other,) = run(decoder, (PROMPT, plain(1)), on=False)
    # the first two hold all blocks by then
    size = 8 * kv_cache.block_bytes(decoder, 4)
    engine = Engine(
        decoder,
        EngineConfig(block_size=4, kv_cache_bytes=size, enable_prefix_caching=False, async_scheduling=True),
    )
    (victim,), (stays,) = (engine.add(str(i), PROMPT, plain(i)) for i in range(2))
    for _ in range(6):
        engine.step()
    held = set(victim.blocks)
    assert engine._flight is not None and engine.stats().kv_blocks_used == 8
    engine.abort(victim)
    (new,) = engine.add("2", *late)
    reused: set[int] = set()
    while engine.has_work:
        assert engine.step()
        reused |= held & set(new.blocks)
    assert reused and outcome(new) == outcome(alone) and outcome(stays) == outcome(other)
    assert victim.finish_reason == "abort"

    engine = Engine(decoder, EngineConfig(max_num_seqs=1, async_scheduling=True))
    (first,), (second,) = (engine.add(str(i), PROMPT, plain(i)) for i in range(2))
    engine.step()
    assert engine._flight is not None
    engine.abort(first)
    assert engine.step() == [second]
    engine.abort(second)
    assert engine._flight is None and engine.step() == []


def test_a_broken_row_ends_its_request_alone(decoder: Decoder) -> None:
    free = run(decoder, (PROMPT, SamplingParams(**greedy())), on=False)[1][0].generated
    token = next(t for i, t in enumerate(free) if i >= 2 and free.index(t) == i)
    good = [(PROMPT[i:], plain(i)) for i in range(1, 12) if PROMPT[i:]]
    alone = [run(decoder, request, on=False)[1][0] for request in good]
    pairs = [(g, a) for g, a in zip(good, alone, strict=True) if token not in a.tokens][:3]
    assert len(pairs) == 3
    engine, (bad, *others) = run(
        with_poisoned_token(decoder, token), (PROMPT, SamplingParams(**greedy())), *(g for g, _ in pairs)
    )
    assert [outcome(s) for s in others] == [outcome(a) for _, a in pairs]
    assert bad.finish_reason == "error" and "NaN" in (bad.error or "")
    assert bad.generated == free[: free.index(token) + 1]
    assert engine.stats().steps_ahead > 5  # before the poison, and after


class Unknowing:
    """Stands for a device that cannot choose some rows: those with ``top_k`` 7."""

    def __init__(self, decoder: Decoder) -> None:
        self.ops, self.calls = decoder.ops, list[list[int]]()

    def choose(self, logits: Tensor, choices: SequenceOf[Choice], best: Any = None) -> Chosen:
        self.calls.append([c.top_k for c in choices])
        chosen: Any = type(self.ops).choose(self.ops, logits, choices, best)
        ids = [-1 if c.top_k == 7 else token for c, token in zip(choices, chosen.get(), strict=True)]
        made = Known(ids, logits.device)
        made.tokens.clamp_(min=0)
        return made


def test_rows_that_the_device_cannot_choose(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        (PROMPT, plain(0, max_tokens=6)),
        (PROMPT[3:], plain(1, top_k=7)),
        (PROMPT[5:], plain(2, max_tokens=20)),
    ]
    _, expected = run(decoder, *requests, on=False)
    stub = Unknowing(decoder)
    monkeypatch.setattr(decoder.ops, "choose", stub.choose, raising=False)
    engine, got = run(decoder, *requests)
    assert [outcome(s) for s in got] == [outcome(s) for s in expected]
    assert [s.host_samples for s in got] == [False, True, False]
    # the first step and the one ahead of it; after that, steps fly when it has ended
    assert stub.calls[:2] == [[0, 7, 0]] * 2 and set(map(tuple, stub.calls[2:])) == {(0,)}
    assert 5 <= engine.stats().steps_ahead <= 8


@pytest.mark.parametrize("when", ["always", "sometimes"])
def test_what_fails_ahead_runs_later(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    requests = [(PROMPT[i:], plain(i)) for i in range(3)]
    _, expected = run(decoder, *requests, on=False)
    engine = Engine(decoder, EngineConfig(async_scheduling=True, block_size=2))
    original, fed = engine.runner.run, 0

    def failing(step: SequenceOf[Scheduled], feed: Feed | None = None) -> Computed:
        nonlocal fed
        fed += feed is not None
        if feed is not None and (when == "always" or fed % 3 == 0):
            raise MemoryError("not now")
        return original(step, feed)

    monkeypatch.setattr(engine.runner, "run", failing)
    got = [engine.add(str(i), *request)[0] for i, request in enumerate(requests)]
    drain(engine)
    assert [outcome(s) for s in got] == [outcome(s) for s in expected]
    assert (engine.stats().steps_ahead > 0) == (when == "sometimes")
    assert {record.levelname for record in caplog.records} == {"WARNING"} and "not now" in caplog.text


@pytest.mark.parametrize("where", ["run", "get"])
def test_a_lost_device_is_not_a_requests_fault(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    engine = Engine(decoder, EngineConfig(async_scheduling=True))
    (s,) = engine.add("0", PROMPT, plain(0))
    engine.step()

    def lost(*_: object) -> None:
        raise torch.AcceleratorError("device lost")

    assert engine._flight is not None
    monkeypatch.setattr(*((engine.runner, "run") if where == "run" else (engine._flight.chosen, "get")), lost)
    with pytest.raises(torch.AcceleratorError):
        engine.step()
    assert not s.finished


def test_known_tokens(decoder: Decoder) -> None:
    """The reference's choice is made at once, and a broken row is told when tokens are read."""
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    chosen = decoder.ops.choose(logits, [Choice(0.0)] * 2)
    assert chosen.get() == [1, 0] and chosen.tokens.tolist() == [1, 0] and chosen.tokens.dtype == torch.int64
    logits[1, 2] = torch.nan
    broken = decoder.ops.choose(logits, [Choice(0.0)] * 2)
    assert all(0 <= token < 3 for token in broken.tokens.tolist())
    with pytest.raises(InvalidArgumentError, match="NaN"):
        broken.get()
