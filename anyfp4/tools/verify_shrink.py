"""Makes a failing schedule smaller while it still fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from anyfp4.engine.config import SamplingParams
from anyfp4.tools.schedules import Arrival, Request, Schedule


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool], out_of_time: Callable[[], bool]) -> Schedule:
    """The smallest schedule found that still fails: fewer requests first, then simpler ones on a plainer engine.

    Args:
        schedule: one that fails.
        fails: runs a schedule.
        out_of_time: asked before every run; the best so far is returned then.
    """
    tried: set[str] = set()
    improved = True
    while improved:
        improved = False
        for candidate in _simpler(schedule):
            if out_of_time():
                return schedule
            key = candidate.to_json()
            if key in tried:
                continue
            tried.add(key)
            if fails(candidate):
                schedule, improved = candidate, True
                break
    return schedule


def _simpler(s: Schedule) -> Iterator[Schedule]:
    yield from _fewer_requests(s)
    yield from _plainer_times(s)
    yield from _plainer_engine(s)
    for i, arrival in enumerate(s.arrivals):
        for request in _simpler_requests(arrival.request):
            yield _with(s, i, replace(arrival, request=request))


def _fewer_requests(s: Schedule) -> Iterator[Schedule]:
    """Without all but one, without halves, quarters …, without each one."""
    n = len(s.arrivals)
    if n > 1:
        for arrival in s.arrivals:
            yield replace(s, arrivals=(arrival,))
    size = n // 2
    while size:
        for i in range(0, n, size):
            rest = s.arrivals[:i] + s.arrivals[i + size :]
            if rest:
                yield replace(s, arrivals=rest)
        size //= 2


def _plainer_times(s: Schedule) -> Iterator[Schedule]:
    if s.resets:
        yield replace(s, resets=())
    plain = tuple(replace(a, at=0, abort_after=None) for a in s.arrivals)
    if plain != s.arrivals:
        yield replace(s, arrivals=plain)
    for i, arrival in enumerate(s.arrivals):
        if arrival.abort_after is not None:
            yield _with(s, i, replace(arrival, abort_after=None))
    for i, arrival in enumerate(s.arrivals):
        if i == 0 and arrival.at:
            yield replace(s, arrivals=tuple(replace(a, at=a.at - arrival.at) for a in s.arrivals))
        elif i and arrival.at != s.arrivals[i - 1].at:
            later = arrival.at - s.arrivals[i - 1].at
            yield replace(s, arrivals=s.arrivals[:i] + tuple(replace(a, at=a.at - later) for a in s.arrivals[i:]))


def _plainer_engine(s: Schedule) -> Iterator[Schedule]:
    for plain in (
        replace(s, cache_blocks=None),
        replace(s, prefix_caching=False),
        replace(s, threads=1),
        replace(s, cuda_graphs=False),
        replace(s, async_scheduling=False),
        replace(s, max_num_seqs=64),
        replace(s, max_step_tokens=2048),
        replace(s, block_size=16, cache_blocks=None),
    ):
        if plain != s:
            yield plain


def _simpler_requests(r: Request) -> Iterator[Request]:
    p, default = r.params, SamplingParams()
    plain = SamplingParams(
        temperature=0,
        seed=0,
        max_tokens=p.max_tokens,
        ignore_eos=True,
        logprobs=p.logprobs,
        prompt_logprobs=p.prompt_logprobs,
    )
    simpler = [plain, replace(p, n=1)]
    limit = p.max_tokens or 0
    simpler += [replace(p, max_tokens=m, min_tokens=0) for m in dict.fromkeys((1, limit // 2, limit - 1)) if m >= 1]
    simpler += [replace(p, logprobs=0), replace(p, prompt_logprobs=default.prompt_logprobs)]
    for params in simpler:
        if params != p and (params.max_tokens or 0) <= limit:
            yield replace(r, params=params)
    n = len(r.tokens)
    for tokens in (r.tokens[: n // 8], r.tokens[: n // 2], r.tokens[n // 2 :], r.tokens[: n - 1], r.tokens[1:]):
        if 0 < len(tokens) < n:
            yield replace(r, tokens=tokens)


def _with(s: Schedule, index: int, arrival: Arrival) -> Schedule:
    return replace(s, arrivals=(*s.arrivals[:index], arrival, *s.arrivals[index + 1 :]))
