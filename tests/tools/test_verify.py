"""verify: what it says it compared is true, and it finds ops that depend on the batch."""

from __future__ import annotations

import io
import json
import random
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anyfp4 import LLM, EngineConfig, SamplingParams
from anyfp4.backends.base import Backend
from anyfp4.engine.model_runner import ModelRunner
from anyfp4.engine.outputs import Logprob
from anyfp4.errors import InvalidArgumentError
from anyfp4.tools.schedules import Arrival, Plan, Request, Schedule, from_json
from anyfp4.tools.verify import Proof, Verifier, verify
from anyfp4.tools.verify_compare import Difference, compare, float32_bits
from anyfp4.tools.verify_run import Completion, Outcome, run_schedule
from anyfp4.tools.verify_shrink import shrink
from tests.tools import broken_ops

#: small enough for the reference backend
SMALL = ("--max-prompt", "12", "--max-tokens", "5", "--batch-sizes", "4", "--trials", "4", "--shrink-seconds", "20")
PLAN = Plan(vocab_size=261, max_prompt=60, max_tokens=12, batch_sizes=(1, 3, 8), threads=(1, 2))


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(tiny_model, config=EngineConfig(max_num_seqs=1))


# --- schedules


def test_a_schedule_depends_on_seed_and_number_alone() -> None:
    assert [PLAN.schedule(i) for i in range(20)] == [PLAN.schedule(i) for i in range(20)]
    assert len({PLAN.schedule(i).to_json() for i in range(50)}) == 50


def test_schedules_survive_json() -> None:
    for i in range(60):
        schedule = PLAN.schedule(i)
        again = from_json(schedule.to_json(), "here")
        assert again == schedule and again.to_json() == schedule.to_json()
    # one that was printed before there was async scheduling
    data = json.loads(PLAN.schedule(0).to_json())
    del data["async_scheduling"]
    assert from_json(json.dumps(data), "here") == replace(PLAN.schedule(0), async_scheduling=True)


def test_schedules_stay_within_the_plan() -> None:
    schedules = [PLAN.schedule(i) for i in range(200)]
    requests = [a.request for s in schedules for a in s.arrivals]
    assert all(1 <= len(r.tokens) <= 60 and r.max_length <= PLAN.max_length for r in requests)
    assert all(0 <= t < 261 for r in requests for t in r.tokens)
    assert {len(s.arrivals) for s in schedules} == {1, 3, 8}
    assert {s.threads for s in schedules} == {1, 2}
    for s in schedules:
        assert all(a.at <= b.at for a, b in zip(s.arrivals, s.arrivals[1:], strict=False))
        assert any(a.abort_after is None for a in s.arrivals)
        if s.cache_blocks is not None:
            assert all(-(-a.request.max_length // s.block_size) <= s.cache_blocks for a in s.arrivals)
    # every kind of thing that is to be varied does vary
    assert {r.params.n for r in requests} == {1, 2, 3}
    assert {0} < {r.params.max_tokens for r in requests}
    assert any(s.resets for s in schedules) and any(s.cache_blocks for s in schedules)
    assert any(a.abort_after is not None for s in schedules for a in s.arrivals)
    assert {s.prefix_caching for s in schedules} == {s.async_scheduling for s in schedules} == {True, False}
    longest_common = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        for a, b in zip([r.tokens for r in requests[1:]], [r.tokens for r in requests], strict=False)
    ]
    assert max(longest_common) >= 16


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"arrivals": []}',
        '{"arrivals": [{"tokens": [], "params": {}, "at": 0, "abort_after": null}]}',
        '{"arrivals": [{"tokens": [1], "params": {"temprature": 1}, "at": 0, "abort_after": null}]}',
        '{"arrivals": [{"tokens": [1], "params": {}, "at": 0, "abort_after": null}], "blocksize": 3}',
    ],
)
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^--replay f"):
        from_json(text, "--replay f")


# --- comparing


def _outcome(logprob: float = -1.0, token: int = 7, reason: str = "length", rank: int = 1) -> Outcome:
    logprobs = ({token: Logprob(logprob, rank)},)
    return Outcome((Completion((token,), reason, None, logprobs),), (None, {3: Logprob(-2.0, 1)}))


def test_comparing_sees_the_last_bit() -> None:
    before = -1.0
    after = struct.unpack("<f", struct.pack("<I", struct.unpack("<I", struct.pack("<f", before))[0] + 1))[0]
    assert compare(0, 2, _outcome(before), _outcome(before))[0] is None
    difference, _ = compare(5, 2, _outcome(before), _outcome(after))
    assert difference is not None
    assert (difference.request, difference.completion, difference.position) == (5, 0, 2)
    assert (difference.what, difference.alone, difference.batch) == ("log-probability of token 7", before, after)
    assert (float32_bits(before), float32_bits(after)) == ("0xbf800000", "0xbf800001")
    assert float32_bits(-0.0) != float32_bits(0.0)
    assert compare(0, 2, _outcome(-0.0), _outcome(0.0))[0] is not None


def test_comparing_names_what_differs() -> None:
    same = _outcome()
    for other, what, alone, batch in (
        (_outcome(token=8), "listed tokens", "[7]", "[8]"),
        (_outcome(reason="stop"), "finish reason", "length", "stop"),
        (_outcome(rank=2), "rank of token 7", 1, 2),
        (Outcome(same.completions, (None, {3: Logprob(-2.5, 1)})), "log-probability of token 3", -2.0, -2.5),
        (Outcome(same.completions, (None,)), "number of scored prompt tokens", 2, 1),
    ):
        difference, _ = compare(0, 2, same, other)
        assert difference is not None and (difference.what, difference.alone, difference.batch) == (what, alone, batch)
    shorter = Outcome((Completion((), "length", None, ()),), same.prompt_logprobs)
    difference, _ = compare(0, 2, same, shorter)
    assert difference is not None and (difference.what, difference.alone, difference.batch) == ("token", 7, None)


def test_an_aborted_request_is_compared_as_far_as_it_came() -> None:
    whole = Outcome((Completion((1, 2, 3), "length", None, ()),), ())
    assert compare(0, 1, whole, Outcome((Completion((1, 2), "abort", None, ()),), ()))[0] is None
    assert compare(0, 1, whole, Outcome((Completion((), "abort", None, ()),), ()))[0] is None
    difference, counts = compare(0, 1, whole, Outcome((Completion((1, 9), "abort", None, ()),), ()))
    assert difference is not None and (difference.position, difference.alone, difference.batch) == (2, 2, 9)
    assert counts.aborted == 1 and counts.finish_reasons == 0


# --- a model that is invariant


class Watcher:
    """Counts what engines do, at the model runner: independent of how verify counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = self.fed = 0
        self.sequences: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()
        self.hits: dict[Any, int] = {}
        self.recomputed = 0
        last: dict[Any, int] = {}
        original = ModelRunner.run

        def run(runner: ModelRunner, step: Any, *feed: Any) -> Any:
            self.steps += 1
            self.fed += len(feed)
            self.sequences[len(step)] += 1
            self.tokens[sum(item.count for item in step)] += 1
            for item in step:
                self.hits.setdefault(item.sequence, item.start)
                self.recomputed += item.start < last.get(item.sequence, 0)
                last[item.sequence] = item.start + item.count
            return original(runner, step, *feed)

        monkeypatch.setattr(ModelRunner, "run", run)


def test_an_invariant_model_passes_and_the_figures_are_true(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = Verifier(llm.engine.model, tuple(llm.engine.eos), PLAN.max_length)
    schedules = [PLAN.schedule(i) for i in range(20)]
    for s in schedules:  # computed now, so that the watcher sees the schedules alone
        for a in s.arrivals:
            verifier.alone(a.request)
    watcher = Watcher(monkeypatch)
    proof = Proof()
    verify(verifier, schedules, proof, total=len(schedules))
    assert proof.failure is None and len(proof.trials) == 20
    # a step that was launched ahead is for nothing if all of its sequences have ended, or if it raised
    ahead = proof.seen.steps_ahead
    assert proof.seen.steps - ahead == watcher.steps - watcher.fed and 10 < ahead <= watcher.fed <= ahead + ahead // 4
    assert proof.seen.sequences == watcher.sequences and proof.seen.tokens == watcher.tokens
    assert proof.distinct_requests == len({a.request.key for s in schedules for a in s.arrivals})

    # run once more, counting in the outcomes themselves
    requests = completions = tokens = logprobs = reasons = 0
    for s in schedules:
        for outcome in run_schedule(llm.engine.model, llm.engine.eos, s, PLAN.max_length)[0]:
            requests += 1
            completions += len(outcome.completions)
            tokens += sum(len(c.tokens) for c in outcome.completions)
            logprobs += sum(len(lp) for c in outcome.completions for lp in c.logprobs)
            logprobs += sum(len(lp) for lp in outcome.prompt_logprobs if lp is not None)
            reasons += sum(c.finish_reason != "abort" for c in outcome.completions)
    compared = proof.compared
    assert (compared.requests, compared.completions, compared.tokens) == (requests, completions, tokens)
    assert (compared.logprobs, compared.finish_reasons) == (logprobs, reasons)
    assert min(requests, tokens, logprobs, reasons) > 10


def test_preemptions_and_prefix_hits_are_what_really_happened(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    rng = random.Random(0)
    stem = tuple(rng.randrange(256) for _ in range(16))
    waves = Schedule(
        tuple(Arrival(Request((*stem, i), params), at=1000 * i) for i in range(3)), block_size=8, max_num_seqs=4
    )
    watcher = Watcher(monkeypatch)
    _, seen = run_schedule(llm.engine.model, llm.engine.eos, waves, 60)
    assert seen.prefix_hit_tokens == sum(watcher.hits.values()) == 32
    assert seen.preemptions == watcher.recomputed == 0
    crowd = Schedule(
        tuple(Arrival(Request((i, i + 1), params)) for i in range(6)),
        block_size=1,
        cache_blocks=30,
        prefix_caching=False,
    )
    watcher = Watcher(monkeypatch)
    _, seen = run_schedule(llm.engine.model, llm.engine.eos, crowd, 60)
    assert seen.preemptions == watcher.recomputed > 0
    assert seen.prefix_hit_tokens == 0


def test_the_command_passes(call: Any, tiny_model: Path, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    code, out, err = call("verify", tiny_model, "--trials", 6, "--seed", 3, "--report", page)
    assert code == 0 and "bit for bit what they are alone" in out and str(page) in err
    assert "6 of 6" in out and "seed 3" in out
    text = page.read_text()
    assert "Batch invariance of" in text and "Sequences in a step" in text
    # nothing is loaded from anywhere
    assert not any(word in text.replace('xmlns="http://www.w3.org/2000/svg"', "") for word in ("http", "src=", "url("))


def test_json_says_the_same(call: Any, tiny_model: Path) -> None:
    code, out, _ = call("verify", tiny_model, "--trials", 3, "--json", "--numerics", "blackwell", "--batch-sizes", "2")
    found = json.loads(out)
    assert code == 0 and found["verdict"] == "invariant" and found["trials"] == 3
    assert found["compared"]["requests"] == 6 and found["numerics"] == "blackwell" and found["failure"] is None


def test_what_did_not_happen_is_said(call: Any, tiny_model: Path) -> None:
    code, out, _ = call("verify", tiny_model, "--trials", 1, "--batch-sizes", 1, "--threads", 1, "--max-prompt", 1)
    assert code == 0
    assert "not shown: no sequence was preempted" in out and "not shown: no prefix-cache hit" in out
    assert "not shown: the number of threads was never changed" in out
    _, out, _ = call("verify", tiny_model, "--trials", 1, "--batch-sizes", 1, "--threads", 1, "--max-tokens", 1)
    assert "not shown: no step was launched before" in out


# --- models that are not


def replayed(text: str, monkeypatch: pytest.MonkeyPatch, call: Any, *words: Any) -> int:
    """The exit code of the schedule that a failure printed, given back on stdin."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code, _, _ = call("verify", *words, "--replay", "-")
    return int(code)


def check_failure(out: str) -> dict[str, Any]:
    """What every failure tells."""
    found: dict[str, Any] = json.loads(out)
    assert found["verdict"] == "not invariant"
    failure: dict[str, Any] = found["failure"]
    assert failure["repeatable"] and failure["alone"] != failure["batch"]
    if isinstance(failure["alone"], float):
        assert failure["alone_bits"] == float32_bits(failure["alone"]) != failure["batch_bits"]
    return failure


def test_a_linear_whose_order_depends_on_m(call: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("verify", tiny_model, "--backend", "reference", *SMALL)
    right = Backend.linear
    monkeypatch.setattr(Backend, "linear", broken_ops.linear_by_rows)
    code, out, _ = call(*words, "--json")
    assert code == 1
    failure = check_failure(out)
    schedule = from_json(failure["schedule"], "")
    assert len(schedule.arrivals) <= 2 < failure["original_requests"]
    assert all(len(a.request.tokens) <= 3 for a in schedule.arrivals)
    # the schedule that is printed shows it, and with the right op it does not
    model = (tiny_model, "--backend", "reference")
    assert replayed(failure["schedule"], monkeypatch, call, *model) == 1
    monkeypatch.setattr(Backend, "linear", right)
    assert replayed(failure["schedule"], monkeypatch, call, *model) == 0


def test_the_finding_in_words(call: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backend, "linear", broken_ops.linear_by_rows)
    page = tmp_path / "f.html"
    code, out, _ = call("verify", tiny_model, "--backend", "reference", *SMALL, "--report", page)
    assert code == 1
    assert "NOT batch-invariant: in trial" in out and "first difference: request" in out and "position" in out
    lines = out.splitlines()
    alone = next(line for line in lines if line.startswith("  alone: "))
    batch = next(line for line in lines if line.startswith("  in the batch: "))
    assert "(0x" in alone and "(0x" in batch and alone.split("(")[1] != batch.split("(")[1]
    command = next(line for line in lines if line.startswith("  echo '"))
    assert command.endswith(f"| anyfp4 verify {tiny_model} --backend reference --replay -")
    from_json(command.partition("echo '")[2].rpartition("' |")[0], "")
    assert "log-probabilities that differ" in page.read_text()


def test_attention_whose_splits_depend_on_the_batch(
    call: Any, dense_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # without quantized activations: their 4-bit codes hide most changes of a last bit
    monkeypatch.setattr(Backend, "attention", broken_ops.attention_by_batch)
    code, out, _ = call("verify", dense_model, "--backend", "reference", *SMALL, "--dtype", "float32", "--json")
    assert code == 1
    schedule = from_json(check_failure(out)["schedule"], "")
    # alone there is one sequence and so one split: it takes two
    assert len(schedule.arrivals) == 2 or schedule.arrivals[0].request.params.n == 2


def test_a_prefix_cache_with_bits_from_elsewhere(call: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelRunner, "run", broken_ops.flip_a_bit_of_a_hit(ModelRunner.run))
    code, out, _ = call("verify", tiny_model, "--trials", 40, "--json", "--shrink-seconds", 15)
    assert code == 1
    failure = check_failure(out)
    schedule = from_json(failure["schedule"], "")
    assert schedule.prefix_caching and len(schedule.arrivals) <= 2
    if len(schedule.arrivals) == 2:  # the first one fills the cache, the second one hits it
        a, b = (x.request.tokens for x in schedule.arrivals)
        assert a[: schedule.block_size] == b[: schedule.block_size]


def test_a_difference_that_does_not_come_back(call: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = Verifier.run, iter(range(10**6))

    def once(self: Verifier, schedule: Schedule) -> Any:
        difference, compared, seen = original(self, schedule)
        if next(calls) == 0:
            difference = Difference(0, 0, 4, "token", 1, 2)
        return difference, compared, seen

    monkeypatch.setattr(Verifier, "run", once)
    code, out, _ = call("verify", tiny_model, "--trials", 2)
    assert code == 1 and "the model does not repeat itself" in out and "echo" not in out


def test_shrinking_keeps_failing_and_stops_in_time() -> None:
    schedule = next(s for s in (PLAN.schedule(i) for i in range(100)) if len(s.arrivals) == 8)
    culprit = schedule.arrivals[5].request.tokens[0]

    def fails(s: Schedule) -> bool:
        return any(culprit in a.request.tokens for a in s.arrivals)

    smallest = shrink(schedule, fails, lambda: False)
    assert [a.request.tokens for a in smallest.arrivals] == [(culprit,)]
    assert (smallest.cache_blocks, smallest.prefix_caching, smallest.block_size) == (None, False, 16)
    assert not smallest.async_scheduling and not smallest.cuda_graphs
    assert smallest.arrivals[0].at == 0 and smallest.arrivals[0].request.params.max_tokens in (0, 1)
    runs = iter(range(10**6))
    shrink(schedule, lambda s: fails(s) and next(runs) >= 0, lambda: next(runs) > 20)
    assert next(runs) < 60
    assert shrink(schedule, fails, lambda: True) is schedule


# --- flags, interrupts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trials", "-1"], "--trials must be 0 or more"),
        (["--trials", "0"], "--trials 0 leaves nothing to do without --layers"),
        (["--batch-sizes", "1,x"], "--batch-sizes 1,x: expected numbers"),
        (["--batch-sizes", "0"], "--batch-sizes 0: expected numbers"),
        (["--threads", ""], "--threads : expected numbers"),
        (["--threads", "9999"], "--threads: at most 1024"),
        (["--max-tokens", "0"], "--max-tokens must be 1 or more"),
        (["--max-prompt", "0"], "--max-prompt must be 1 or more"),
        (["--max-prompt", "250", "--max-tokens", "10"], "do not fit the model's 256 positions"),
        (["--max-tokens", "256"], "do not fit the model's 256 positions"),
        (["--shrink-seconds", "-1"], "--shrink-seconds must be 0 or more"),
        (["--shrink-seconds", "nan"], "--shrink-seconds must be 0 or more"),
        (["--report", "out.pdf"], "must end in .html"),
        (["--report", "/no/such/folder/out.html"], "no folder /no/such/folder"),
        (["--replay", "/no/such/file"], "--replay /no/such/file"),
        (["--dtype", "int8"], "dtype must be auto or one of"),
        (["--backend", "marlin"], "unknown backend 'marlin'"),
    ],
)
def test_bad_flags_are_one_error(call: Any, tiny_model: Path, words: list[str], message: str) -> None:
    code, out, err = call("verify", tiny_model, *words)
    assert code == 1 and out == "" and err.startswith("error: ") and message in err and "Traceback" not in err


def test_an_interrupt_shows_what_was_compared(call: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = Verifier.run, iter(range(10**6))

    def run(self: Verifier, schedule: Schedule) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(self, schedule)

    monkeypatch.setattr(Verifier, "run", run)
    code, out, _ = call("verify", tiny_model, "--trials", 5)
    assert code == 130 and "2 of 5" in out and "interrupted; so far" in out


@pytest.fixture(autouse=True)
def _threads_are_put_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before
