"""``Scheduler.ahead``: which step follows one whose tokens are not known, and when that cannot be said."""

from __future__ import annotations

from anyfp4.engine.scheduler import Scheduled, Scheduler
from anyfp4.engine.sequence import Sequence
from tests.engine.test_scheduler import check, make, sequence

Shares = list[tuple[str, int, int]]


def shares(step: list[Scheduled] | None) -> Shares | None:
    return None if step is None else [(item.sequence.request_id, item.start, item.count) for item in step]


def land(scheduler: Scheduler, step: list[Scheduled]) -> None:
    """What the engine does when it knows the tokens: here each is 1."""
    for item in step:
        s = item.sequence
        if s.finished:
            continue
        scheduler.commit(item)
        s.tokens.append(1)
        if len(s.tokens) >= s.max_length:
            s.finish_reason = "length"
            scheduler.finish(s)


def started(scheduler: Scheduler, *sequences: Sequence) -> list[Scheduled]:
    for s in sequences:
        scheduler.add(s)
    return scheduler.schedule()


def test_decode_goes_on_until_everybody_has_ended() -> None:
    scheduler = make(20, 4, 8, 64)
    a, b = sequence("a", 4, 8), sequence("b", 7, 9)
    step = started(scheduler, a, b)
    seen: list[Shares | None] = []
    while True:
        before = (list(a.tokens), a.computed, list(b.tokens), b.computed)
        ahead = scheduler.ahead(step)
        assert (list(a.tokens), a.computed, list(b.tokens), b.computed) == before
        seen.append(shares(ahead))
        check(scheduler, [s for s in (a, b) if not s.finished])
        land(scheduler, step)
        if ahead is None:
            break
        # room for the token that each item runs
        assert all(len(item.sequence.blocks) * 4 > item.start for item in ahead if not item.sequence.finished)
        step = ahead
    assert seen == [[("a", 4, 1), ("b", 7, 1)], [("a", 5, 1)], [("a", 6, 1)], None]
    assert a.finished and b.finished and not scheduler.has_work and scheduler.blocks.num_free == 20


def test_those_who_ended_meanwhile_are_left_out() -> None:
    scheduler = make(20, 4, 8, 64)
    a, b = sequence("a", 4, 12), sequence("b", 7, 12)
    step = started(scheduler, a, b)
    ahead = scheduler.ahead(step)
    assert ahead is not None
    land(scheduler, step)
    b.finish_reason = "stop"
    scheduler.finish(b)
    assert shares(scheduler.ahead(ahead)) == [("a", 5, 1)]
    scheduler.finish(a)
    assert scheduler.ahead(ahead) is None


def test_a_prompt_in_chunks_keeps_its_step() -> None:
    scheduler = make(20, 4, 8, 6)
    a, b = sequence("a", 4, 12), sequence("b", 7, 12)
    step = started(scheduler, a, b)
    assert shares(step) == [("a", 0, 4), ("b", 0, 2)] and scheduler.ahead(step) is None
    land_prompt = [item for item in step if item.sequence is a]
    land(scheduler, land_prompt)
    scheduler.commit(step[1])
    step = scheduler.schedule()
    assert shares(step) == [("a", 4, 1), ("b", 2, 5)]
    assert shares(scheduler.ahead(step)) == [("a", 5, 1), ("b", 7, 1)]
    # somebody who runs but has no part in the step
    assert scheduler.ahead(step[:1]) is None
    # the prompt alone is wanted
    scheduler = make(20, 4, 8, 64)
    assert scheduler.ahead(started(scheduler, sequence("scored", 4, 4), a)) is None


def test_whoever_could_join_is_not_kept_waiting() -> None:
    scheduler = make(40, 4, 2, 64)
    a, b, c = (sequence(name, 4, 8) for name in "abc")
    step = started(scheduler, a, b, c)
    assert shares(step) == [("a", 0, 4), ("b", 0, 4)]
    for expected in ([("a", 4, 1), ("b", 4, 1)], [("a", 5, 1), ("b", 5, 1)], [("a", 6, 1), ("b", 6, 1)]):
        ahead = scheduler.ahead(step)  # both places are taken
        assert ahead is not None and shares(ahead) == expected
        land(scheduler, step)
        step = ahead
    assert len(a.tokens) == 7 and scheduler.ahead(step) is None  # both end, and nothing is left
    a.max_length = 20
    assert scheduler.ahead(step) is None  # b ends, and c may have its place
    scheduler.finish(c)
    assert shares(scheduler.ahead(step)) == [("a", 7, 1)]
    scheduler.finish(b)
    scheduler.add(sequence("d", 4, 8))
    assert scheduler.ahead(step) is None  # there is a place, and d was never asked


def test_a_step_of_no_budget_takes_nobody_in() -> None:
    scheduler = make(40, 4, 8, 2)
    step = started(scheduler, sequence("a", 1, 8), sequence("b", 1, 8), sequence("c", 1, 8))
    assert shares(step) == [("a", 0, 1), ("b", 0, 1)]
    assert shares(scheduler.ahead(step)) == [("a", 1, 1), ("b", 1, 1)]


def test_who_waits_for_blocks_is_asked_again_when_some_are_released() -> None:
    scheduler = make(5, 4, 8, 64)
    a, b, large, small = sequence("a", 4, 14), sequence("b", 4, 14), sequence("large", 12, 14), sequence("small", 1, 2)
    step = started(scheduler, a, b, large)
    assert shares(step) == [("a", 0, 4), ("b", 0, 4)]
    ahead = scheduler.ahead(step)
    assert ahead is not None and shares(ahead) == [("a", 4, 1), ("b", 4, 1)]
    scheduler.finish(large)
    scheduler.add(small)  # another head of the queue
    assert scheduler.ahead(step) is None
    scheduler.finish(small)
    large = sequence("large", 12, 14)
    scheduler.add(large)
    land(scheduler, step)
    land(scheduler, ahead)
    step = scheduler.schedule()
    assert shares(step) == [("a", 5, 1), ("b", 5, 1)] and shares(scheduler.ahead(step)) == [("a", 6, 1), ("b", 6, 1)]
    b.finish_reason = "abort"
    scheduler.finish(b)
    assert scheduler.ahead(step) is None  # two blocks came free
    land(scheduler, step)
    assert shares(scheduler.schedule()) == [("a", 6, 1)]  # which were not enough
    assert shares(scheduler.ahead([Scheduled(a, 6, 1)])) == [("a", 7, 1)]


def test_nobody_is_preempted_for_a_step_ahead() -> None:
    scheduler = make(3, 4, 8, 64)
    a, b = sequence("a", 4, 12), sequence("b", 4, 12)
    step = started(scheduler, a, b)
    assert scheduler.ahead(step) is None  # one block is free, and both need one
    check(scheduler, [a, b])
    assert scheduler.preemptions == 0 and list(scheduler.running) == [a, b]
    land(scheduler, step)
    assert shares(scheduler.schedule()) == [("a", 4, 1)] and scheduler.preemptions == 1


def test_other_completions_of_a_prompt_join_at_once() -> None:
    scheduler = make(40, 4, 8, 64, caching=True)
    group = [sequence("g", list(range(9)), 18, index=i) for i in range(3)]
    scheduler.add(*group)
    step = scheduler.schedule()
    assert shares(step) == [("g", 0, 9)] and not scheduler.waiting
    assert scheduler.ahead(step) is None
    land(scheduler, step)
    step = scheduler.schedule()
    assert shares(step) == [("g", 9, 1), ("g", 8, 1), ("g", 8, 1)]
    assert shares(scheduler.ahead(step)) == [("g", 10, 1), ("g", 9, 1), ("g", 9, 1)]
