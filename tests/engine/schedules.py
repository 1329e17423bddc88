"""Random schedules of an engine, and the comparison of every request with itself alone."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from anyfp4.engine import kv_cache
from anyfp4.engine.config import EngineConfig, SamplingParams
from anyfp4.engine.engine import Engine
from anyfp4.engine.outputs import TokenLogprobs
from anyfp4.engine.sequence import Sequence
from anyfp4.models.decoder import Decoder

#: steps after which a schedule counts as stuck; the longest ones here take a few hundred
MOST_STEPS = 5000


@dataclass(frozen=True)
class Case:
    """A request."""

    tokens: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Schedule:
    """When requests come, when some of them leave, and how the engine is set up.

    Attributes:
        arrivals: step -> indices of cases that come before it.
        aborts: step -> how many of the unfinished sequences are aborted before it.
        resets: steps before which the prefix cache is reset.
        threads: of the kernels.
    """

    seed: int
    config: EngineConfig
    arrivals: dict[int, list[int]]
    aborts: dict[int, int] = field(default_factory=dict)
    resets: frozenset[int] = frozenset()
    threads: int = 1


def make_cases(rng: random.Random, vocab: int, count: int, longest_prompt: int, most_new: int) -> list[Case]:
    """Requests with common beginnings and every kind of sampling parameter."""
    stems = [[rng.randrange(vocab) for _ in range(longest_prompt)] for _ in range(4)]
    cases = []
    for _ in range(count):
        length = rng.randint(1, rng.choice([8, longest_prompt]))
        stem = rng.choice(stems)[: rng.randint(0, length)]
        tokens = [*stem, *(rng.randrange(vocab) for _ in range(length - len(stem)))]
        new = rng.choice([0, 1, *range(2, most_new + 1)])
        params = SamplingParams(
            n=rng.choice([1, 1, 1, 2, 3]),
            temperature=rng.choice([0.0, 0.0, 0.7, 1.0, 1.7]),
            top_p=rng.choice([1.0, 1.0, 0.9, 0.5]),
            top_k=rng.choice([0, 0, 5, 40]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            seed=rng.getrandbits(40),
            presence_penalty=rng.choice([0.0, 0.0, 0.8]),
            frequency_penalty=rng.choice([0.0, 0.0, -0.5]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            logit_bias=rng.choice([None, None, {rng.randrange(vocab): 8.0}]),
            max_tokens=new,
            min_tokens=rng.randint(0, new) if rng.random() < 0.3 else 0,
            stop_token_ids=[rng.randrange(vocab) for _ in range(rng.choice([0, vocab // 20, vocab // 8]))],
            ignore_eos=rng.random() < 0.7,
            logprobs=rng.choice([None, 0, 1, 4]),
            prompt_logprobs=rng.choice([None, None, 0, 3]),
        )
        cases.append(Case(tuple(tokens), params))
    return cases


def make_schedule(seed: int, cases: SequenceOf[Case], block_bytes: int, most_requests: int = 9) -> Schedule:
    """A schedule of a few requests; many of them with a cache hardly larger than the largest request."""
    rng = random.Random(seed)
    chosen = [rng.randrange(len(cases)) for _ in range(rng.randint(1, most_requests))]
    if rng.random() < 0.3:  # the same request several times
        chosen += [rng.choice(chosen) for _ in range(rng.randint(1, 3))]
    block_size = rng.choice([1, 2, 3, 4, 8, 16])
    longest = max(len(cases[i].tokens) + (cases[i].params.max_tokens or 0) for i in chosen)
    least = -(-longest // block_size)
    blocks = least + rng.choice([0, 0, 0, 1, 2, 4, least, 8 * least])
    config = EngineConfig(
        max_num_seqs=rng.choice([1, 2, 3, 5, 8, 64]),
        max_step_tokens=rng.choice([1, 3, 5, 8, 17, 24, 40, 2048]),
        block_size=block_size,
        # one block's bytes are proportional to its tokens
        kv_cache_bytes=blocks * block_bytes * block_size,
        enable_prefix_caching=rng.random() < 0.75,
    )
    arrivals: dict[int, list[int]] = {}
    spread = rng.choice([0, 0, 3, 20])
    for i in chosen:
        arrivals.setdefault(rng.randint(0, spread), []).append(i)
    aborts = {rng.randint(1, 30): 1 for _ in range(rng.choice([0, 0, 1, 3]))}
    resets = frozenset(rng.randint(1, 30) for _ in range(rng.choice([0, 0, 2])))
    threads = rng.choice([1, 2])
    config = replace(config, async_scheduling=rng.random() < 0.5)
    return Schedule(seed, config, arrivals, aborts, resets, threads)


def run(decoder: Decoder, cases: SequenceOf[Case], schedule: Schedule) -> tuple[Engine, list[tuple[int, Sequence]]]:
    """Runs a schedule to its end: the engine, and every sequence with the index of its case."""
    native = getattr(decoder.ops, "native", None)
    if native is not None:
        native.set_threads(schedule.threads)
    rng = random.Random(schedule.seed + 1)
    engine = Engine(decoder, schedule.config)
    sequences: list[tuple[int, Sequence]] = []
    last = max(schedule.arrivals)
    for step in range(MOST_STEPS):
        for i in schedule.arrivals.get(step, []):
            sequences += [(i, s) for s in engine.add(str(len(sequences)), cases[i].tokens, cases[i].params)]
        open_ = [s for _, s in sequences if not s.finished]
        for s in rng.sample(open_, min(len(open_), schedule.aborts.get(step, 0))):
            engine.abort(s)
        if step in schedule.resets:
            engine.reset_prefix_cache()
        engine.step()
        if step >= last and not engine.has_work:
            return engine, sequences
    raise AssertionError(f"{schedule} is stuck: {engine.stats()}")


def alone(decoder: Decoder, case: Case) -> list[Sequence]:
    """One request in an engine of its own: whole prompt at once, no prefix cache."""
    config = EngineConfig(enable_prefix_caching=False)
    _, sequences = run(decoder, [case], Schedule(0, config, {0: [0]}))
    return [s for _, s in sequences]


def difference(got: Sequence, expected: Sequence) -> str | None:
    """The first difference in tokens or log-probabilities (by their bits), or None. An aborted one may be shorter."""
    cut = got.finish_reason == "abort"
    for name in ("tokens", "logprobs", "prompt_logprobs"):
        mine, theirs = getattr(got, name), getattr(expected, name)
        for position, (a, b) in enumerate(zip(mine, theirs, strict=False)):
            if a is b:
                continue
            if name == "tokens" or a is None or b is None:
                if a != b:
                    return f"{name}[{position}] is {a}, not {b}"
            elif bits(a) != bits(b):
                return f"{name}[{position}] is {a}, not {b}"
        if len(mine) > len(theirs) or (len(mine) < len(theirs) and not cut):
            return f"{len(mine)} {name}, not {len(theirs)}"
    mine, theirs = ((s.finish_reason, s.stop_reason, s.error) for s in (got, expected))
    return None if cut or mine == theirs else f"ended with {mine}, not {theirs}"


def bits(logprobs: TokenLogprobs) -> bytes:
    """Order, tokens, ranks and the bits of the log-probabilities."""
    return b"".join(struct.pack("<qdq", token, lp.logprob, lp.rank) for token, lp in logprobs.items())


def compare(decoder: Decoder, cases: SequenceOf[Case], references: SequenceOf[SequenceOf[Sequence]], seed: int) -> str:
    """Runs the seed's schedule; the first difference from the references, or an empty string."""
    schedule = make_schedule(seed, cases, kv_cache.block_bytes(decoder, 1))
    engine, sequences = run(decoder, cases, schedule)
    for i, s in sequences:
        found = difference(s, references[i][s.index])
        if found is not None:
            return f"seed {seed}, case {i}, completion {s.index}: {found}\n{schedule}"
    engine.scheduler.blocks.check()
    stats = engine.stats()
    if stats.kv_blocks_used or stats.running or stats.waiting:
        return f"seed {seed}: something is left: {stats}"
    return ""
