"""The scheduler and the block manager by themselves: budgets, blocks, sharing, preemption. No tensors."""

from __future__ import annotations

import random
from array import array

import pytest

from anyfp4.engine.block_manager import BlockManager, digest
from anyfp4.engine.config import SamplingParams
from anyfp4.engine.scheduler import Scheduler
from anyfp4.engine.sequence import Sequence
from anyfp4.errors import InvalidArgumentError


def sequence(name: str, prompt: int | list[int], total: int, index: int = 0) -> Sequence:
    tokens = [1] * prompt if isinstance(prompt, int) else list(prompt)
    return Sequence(name, index, tokens, len(tokens), SamplingParams(), 0, total)


def make(num_blocks: int, block_size: int, max_num_seqs: int, max_step_tokens: int, caching: bool = False) -> Scheduler:
    return Scheduler(num_blocks, block_size, max_num_seqs, max_step_tokens, caching)


class Model:
    """A model whose only state is the cache: a slot holds a hash of all tokens up to its own.

    A token's slot is computed from the slot before it, as the cache has it, so a wrong, lost or overwritten block
    changes everything after it. The next token is a function of the last slot.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.slots: dict[int, int] = {}

    @staticmethod
    def after(state: int, token: int) -> int:
        return hash((state, token))

    @staticmethod
    def next_token(state: int) -> int:
        return state % 3

    def step(self) -> list[tuple[str, int, int]]:
        step = self.scheduler.schedule()
        done = [(i.sequence.request_id, i.start, i.count) for i in step]
        size = self.scheduler.block_size
        assert sum(count for _, _, count in done) <= self.scheduler.max_step_tokens
        assert len({id(i.sequence) for i in step}) == len(step) <= self.scheduler.max_num_seqs
        for item in step:
            s = item.sequence
            for position in range(item.start, item.start + item.count):
                slot = s.blocks[position // size] * size + position % size
                before = 0
                if position:
                    before = self.slots[s.blocks[(position - 1) // size] * size + (position - 1) % size]
                self.slots[slot] = self.after(before, s.tokens[position])
        for item in step:
            s, samples = item.sequence, item.samples
            self.scheduler.commit(item)
            if samples:
                last = len(s.tokens) - 1
                s.tokens.append(self.next_token(self.slots[s.blocks[last // size] * size + last % size]))
            if s.computed >= s.max_length or len(s.tokens) >= s.max_length > s.prompt_length:
                self.scheduler.finish(s)
                s.finish_reason = "length"
        return done

    @classmethod
    def alone(cls, s: Sequence) -> list[int]:
        tokens, state = s.tokens[: s.prompt_length], 0
        for token in tokens:
            state = cls.after(state, token)
        while len(tokens) < s.max_length:
            tokens.append(cls.next_token(state))
            state = cls.after(state, tokens[-1])
        return tokens


def check(scheduler: Scheduler, alive: list[Sequence]) -> None:
    """Every block is in one place, with as many references as holders; every sequence is in one place."""
    scheduler.blocks.check()
    holders = [0] * scheduler.num_blocks
    for s in alive:
        for block in s.blocks:
            holders[block] += 1
        places = (s in scheduler.running) + (s in scheduler.waiting) + any(s in f for f in scheduler.followers.values())
        assert places == 1
        assert bool(s.blocks) == (s in scheduler.running)
    assert holders == scheduler.blocks._references
    assert len(scheduler.running) + scheduler.num_waiting == len(alive)


def test_chunks_and_decodes_share_a_step() -> None:
    model = Model(make(20, 4, 8, 6))
    model.scheduler.add(sequence("a", 4, 8))
    model.scheduler.add(sequence("b", 7, 9))
    assert model.step() == [("a", 0, 4), ("b", 0, 2)]
    assert model.step() == [("a", 4, 1), ("b", 2, 5)]
    assert model.step() == [("a", 5, 1), ("b", 7, 1)]


def test_a_long_prompt_does_not_hold_up_those_who_generate() -> None:
    model = Model(make(100, 4, 8, 8))
    model.scheduler.add(sequence("long", 60, 61))
    assert model.step() == [("long", 0, 8)]
    model.scheduler.add(sequence("a", 2, 30))
    for _ in range(6):
        model.step()
    assert model.step() == [("long", 56, 4), ("a", 0, 2)]
    model.scheduler.add(sequence("late", 60, 61))
    for i in range(8):
        assert model.step() == [("a", 2 + i, 1), ("late", 7 * i, 7)]


def test_nobody_starves_when_the_budget_is_smaller_than_the_queue() -> None:
    model = Model(make(100, 4, 64, 3))
    for name in "abcdefgh":
        model.scheduler.add(sequence(name, 5, 12))
    seen: set[str] = set()
    for _ in range(60):
        seen |= {name for name, _, _ in model.step()}
        assert len(model.scheduler.running) <= 3
    assert seen == set("abcdefgh") and not model.scheduler.has_work


def test_too_large_a_request_is_refused_at_once() -> None:
    scheduler = make(3, 4, 8, 64)
    with pytest.raises(InvalidArgumentError, match=r"up to 13 tokens needs 4 KV-cache blocks of 4 tokens.*there are 3"):
        scheduler.add(sequence("a", 4, 13))
    assert not scheduler.has_work


def test_preemption_takes_the_youngest_and_everything_ends() -> None:
    model = Model(make(6, 2, 8, 64))
    requests = [sequence(name, 2, 8) for name in "abc"]
    for s in requests:
        model.scheduler.add(s)
    order = [[name for name, _, _ in model.step()] for _ in range(60)]
    assert order[0] == ["a", "b", "c"]
    assert next(names for names in order if len(names) < 3) == ["a", "b"]
    assert model.scheduler.preemptions > 0
    assert not model.scheduler.has_work and model.scheduler.blocks.num_free == 6
    assert requests[0].finished and all(s.tokens == Model.alone(s) for s in requests)


def test_a_prefix_is_found_once_it_is_computed() -> None:
    model = Model(make(40, 4, 8, 64, caching=True))
    prompt = list(range(14))
    first, same_step = sequence("first", prompt, 20), sequence("same step", prompt, 16)
    model.scheduler.add(first)
    model.scheduler.add(same_step)
    model.step()
    assert (first.cached_tokens, same_step.cached_tokens) == (0, 0)
    later, longer, other = sequence("later", prompt, 16), sequence("longer", [*prompt, 7], 16), sequence("o", 14, 16)
    whole = sequence("whole blocks", prompt[:12], 16)
    for s in (later, longer, other, whole):
        model.scheduler.add(s)
    model.step()
    assert (later.cached_tokens, longer.cached_tokens, other.cached_tokens) == (12, 12, 0)
    assert later.blocks[:3] == first.blocks[:3] and later.blocks[3] != first.blocks[3]
    # the last token of a prompt always runs: there would be no logits otherwise
    assert whole.cached_tokens == 8
    while model.scheduler.has_work:
        model.step()
    assert model.scheduler.blocks.num_free == 40 and model.scheduler.blocks.num_cached > 0
    again = sequence("again", prompt, 16)
    model.scheduler.add(again)
    model.step()
    assert again.cached_tokens == 12
    model.scheduler.finish(again)
    model.scheduler.reset_prefix_cache()
    assert model.scheduler.blocks.num_cached == 0
    after = sequence("after", prompt, 16)
    model.scheduler.add(after)
    model.step()
    assert after.cached_tokens == 0


def test_completions_of_one_prompt_share_its_blocks() -> None:
    model = Model(make(40, 4, 8, 64, caching=True))
    group = [sequence("g", list(range(13)), 18, index=i) for i in range(3)]
    model.scheduler.add(*group)
    assert model.scheduler.num_waiting == 3
    assert model.step() == [("g", 0, 13)]
    assert model.step() == [("g", 13, 1), ("g", 12, 1), ("g", 12, 1)]
    assert all(s.blocks[:3] == group[0].blocks[:3] for s in group)
    assert len({block for s in group for block in s.blocks}) == 3 + 3
    while model.scheduler.has_work:
        model.step()
    assert all(s.tokens == Model.alone(s) for s in group)


@pytest.mark.parametrize("leader_runs", [False, True])
def test_completions_go_on_without_the_first(leader_runs: bool) -> None:
    model = Model(make(40, 4, 8, 5, caching=True))
    group = [sequence("g", list(range(13)), 18, index=i) for i in range(3)]
    model.scheduler.add(*group)
    if leader_runs:
        model.step()
    model.scheduler.finish(group[0])
    model.scheduler.finish(group[2])
    while model.scheduler.has_work:
        model.step()
    assert group[1].tokens == Model.alone(group[1]) and model.scheduler.blocks.num_free == 40


def test_prompt_scores_keep_a_sequence_from_skipping_rows() -> None:
    s = sequence("a", 10, 20)
    assert s.skippable == 9
    s.scores_prompt = True
    assert s.skippable == 0
    s.prompt_logprobs = [None, *[{}] * 4]  # five of ten are known: token 4's logits give the next one
    assert s.skippable == 4
    s.prompt_logprobs = [None, *[{}] * 9]
    s.tokens += [1, 1]
    assert s.skippable == 11


def test_block_manager_evicts_the_oldest_and_the_last_of_a_chain_first() -> None:
    blocks = BlockManager(4)
    names = [digest(b"", [1]), digest(b"x", [2]), digest(b"", [3])]
    first = blocks.take((), 2)
    assert first == [0, 1]
    second = blocks.take((), 1)
    assert second == [2] and blocks.take((), 2) is None and blocks.take((), 1, spare=1) is None
    for block, name in zip([*first, *second], names, strict=True):
        blocks.publish(block, name)
    blocks.release(first)
    blocks.release(second)
    blocks.check()
    assert (blocks.num_free, blocks.num_cached) == (4, 3)
    assert blocks.find(names[:2]) == [0, 1] and blocks.find([b"unknown", names[0]]) == []
    assert blocks.take((), 1) == [3]  # nothing is forgotten while a blank block is left
    assert blocks.evictions == 0
    assert blocks.take((), 1) == [1]
    assert blocks.find(names[:2]) == [0]
    assert blocks.take([0], 2) is None  # only block 2 is left beside it
    assert blocks.take([0], 1) == [2]
    assert blocks.evictions == 2
    blocks.check()


def test_digests_stand_for_all_tokens_before() -> None:
    one = digest(b"", [1, 2])
    assert one == digest(b"", array("q", [1, 2])) and len(one) == 32
    assert len({one, digest(b"", [2, 1]), digest(one, [1, 2]), digest(b"", [1, 2 + (1 << 32)])}) == 4


@pytest.mark.parametrize("seed", range(8))
def test_blocks_are_accounted_for_in_any_storm(seed: int) -> None:
    """2,000 random operations each; the oracle is a model that reads what the cache really holds."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4])
    num_blocks = rng.choice([10, 14, 60])
    model = Model(make(num_blocks, block_size, rng.choice([2, 5, 8]), rng.choice([3, 17, 100]), caching=seed % 4 > 0))
    scheduler = model.scheduler
    stems = [[rng.randrange(3) for _ in range(30)] for _ in range(3)]
    most = num_blocks * block_size
    alive: list[Sequence] = []
    finished = 0
    for i in range(2000):
        action = rng.random()
        if action < 0.15 and len(alive) < 30:
            prompt = rng.choice(stems)[: rng.randint(1, min(30, most))]
            prompt = [*prompt, *(rng.randrange(3) for _ in range(rng.randint(0, min(4, most - len(prompt)))))]
            total = rng.randint(len(prompt), min(most, len(prompt) + 20))
            group = [sequence(str(i), prompt, total, index) for index in range(rng.choice([1, 1, 2, 4]))]
            scheduler.add(*group)
            alive += group
        elif action < 0.20 and alive:
            victim = rng.choice(alive)
            victim.finish_reason = "abort"
            scheduler.finish(victim)
        elif action < 0.21:
            scheduler.reset_prefix_cache()
        else:
            had_work = scheduler.has_work
            assert bool(model.step()) == had_work
        for s in alive:
            if s.finish_reason == "length":
                assert s.tokens == Model.alone(s)
                finished += 1
            assert not (s.finished and s.blocks)
        alive = [s for s in alive if not s.finished]
        check(scheduler, alive)
    for _ in range(5000):
        if not scheduler.has_work:
            break
        model.step()
    assert not scheduler.has_work and not scheduler.followers and scheduler.num_waiting == 0
    assert scheduler.blocks.num_free == num_blocks and all(s.tokens == Model.alone(s) for s in alive)
    scheduler.blocks.check()
    assert finished > 20
