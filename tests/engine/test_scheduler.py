"""The scheduler by itself: budgets, blocks, preemption. No tensors."""

from __future__ import annotations

import random

import pytest

from anyfp4.engine.config import SamplingParams
from anyfp4.engine.scheduler import Scheduler
from anyfp4.engine.sequence import Sequence
from anyfp4.errors import InvalidArgumentError


def sequence(name: str, prompt: int, total: int) -> Sequence:
    return Sequence(name, 0, [1] * prompt, prompt, SamplingParams(), 0, total)


def advance(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """Runs one step of a model that always generates token 1."""
    step = scheduler.schedule()
    done = [(i.sequence.request_id, i.start, i.count) for i in step]
    for item in step:
        s = item.sequence
        assert len(s.blocks) * scheduler.block_size >= item.start + item.count
        samples = item.samples
        s.computed = item.start + item.count
        if samples:
            s.tokens.append(1)
            if len(s.tokens) >= s.max_length:
                scheduler.finish(s)
    return done


def test_chunks_and_decodes_share_a_step() -> None:
    scheduler = Scheduler(num_blocks=20, block_size=4, max_num_seqs=8, max_step_tokens=6)
    scheduler.add(sequence("a", 4, 8))
    scheduler.add(sequence("b", 7, 9))
    assert advance(scheduler) == [("a", 0, 4), ("b", 0, 2)]
    assert advance(scheduler) == [("a", 4, 1), ("b", 2, 5)]
    assert advance(scheduler) == [("a", 5, 1), ("b", 7, 1)]


def test_too_large_a_request_is_refused_at_once() -> None:
    scheduler = Scheduler(num_blocks=3, block_size=4, max_num_seqs=8, max_step_tokens=64)
    with pytest.raises(InvalidArgumentError, match=r"needs 4 KV-cache blocks.*there are 3"):
        scheduler.add(sequence("a", 4, 13))
    assert not scheduler.has_work


def test_preemption_takes_the_youngest_and_everything_ends() -> None:
    scheduler = Scheduler(num_blocks=5, block_size=2, max_num_seqs=8, max_step_tokens=64)
    for name in "abc":
        scheduler.add(sequence(name, 2, 8))
    for _ in range(60):
        advance(scheduler)
    assert not scheduler.has_work
    assert sorted(scheduler.free_blocks) == list(range(5))


def test_blocks_are_accounted_for_in_any_storm() -> None:
    rng = random.Random(0)
    scheduler = Scheduler(num_blocks=12, block_size=4, max_num_seqs=5, max_step_tokens=17)
    alive: list[Sequence] = []
    for i in range(3000):
        if rng.random() < 0.2:
            prompt = rng.randint(1, 25)
            s = sequence(str(i), prompt, rng.randint(prompt + 1, 48))
            scheduler.add(s)
            alive.append(s)
        if alive and rng.random() < 0.05:
            victim = alive.pop(rng.randrange(len(alive)))
            scheduler.finish(victim)
        advance(scheduler)
        held = [b for s in scheduler.running for b in s.blocks]
        assert len(held) == len(set(held))
        assert sorted(held + scheduler.free_blocks) == list(range(12))
        assert all(not s.blocks for s in scheduler.waiting)
        alive = [s for s in alive if s in scheduler.running or s in scheduler.waiting]
    while scheduler.has_work:
        advance(scheduler)
    assert sorted(scheduler.free_blocks) == list(range(12))
