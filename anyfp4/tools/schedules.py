"""Random schedules for ``anyfp4 verify``: which requests, when they arrive and leave, on what engine.

A schedule is a value: it can be drawn from (seed, number), made smaller, written as JSON and run again. There are no
tensors and no engine here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from anyfp4.engine.config import SamplingParams
from anyfp4.errors import InvalidArgumentError

#: prompts that many requests begin with
_STEMS = 3
#: steps between two waves; an idle engine does not wait for them, so a later wave finds the cache warm
_WAVE = 1000


@dataclass(frozen=True)
class Request:
    """What a user sends: token ids, and how to go on."""

    tokens: tuple[int, ...]
    params: SamplingParams

    @property
    def max_length(self) -> int:
        """Most tokens it can reach."""
        return len(self.tokens) + (self.params.max_tokens or 0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; parameters that have their default are left out."""
        default = SamplingParams()
        params = {
            f.name: _plain(getattr(self.params, f.name))
            for f in fields(SamplingParams)
            if getattr(self.params, f.name) != getattr(default, f.name)
        }
        return {"tokens": list(self.tokens), "params": params}

    @property
    def key(self) -> str:
        """Equal for equal requests."""
        return json.dumps(self.to_dict(), sort_keys=True)


@dataclass(frozen=True)
class Arrival:
    """A request in a schedule.

    Attributes:
        at: it is added before this step of the engine; an engine without work goes straight to the next arrival.
        abort_after: steps after its arrival at which it is aborted; None: never.
    """

    request: Request
    at: int = 0
    abort_after: int | None = None


@dataclass(frozen=True)
class Schedule:
    """Requests over time, on an engine of certain sizes.

    Attributes:
        arrivals: in the order in which they are added.
        cache_blocks: blocks of the KV cache; None: as many as the engine would take.
        resets: steps before which the prefix cache is emptied.
        threads: of the device's kernels; 0: as many as the process may use.
        cuda_graphs: run steps as CUDA graphs, where the device can.
        async_scheduling: launch steps before the tokens of the step before them are read.
    """

    arrivals: tuple[Arrival, ...]
    max_num_seqs: int = 64
    max_step_tokens: int = 2048
    block_size: int = 16
    cache_blocks: int | None = None
    prefix_caching: bool = True
    resets: tuple[int, ...] = ()
    threads: int = 0
    cuda_graphs: bool = True
    async_scheduling: bool = True

    def to_json(self) -> str:
        """One line of JSON that :func:`from_json` reads."""
        data = asdict(self)
        data["resets"] = list(self.resets)
        data["arrivals"] = [{**a.request.to_dict(), "at": a.at, "abort_after": a.abort_after} for a in self.arrivals]
        return json.dumps(data)


def from_json(text: str, where: str) -> Schedule:
    """Reads what :meth:`Schedule.to_json` wrote.

    Raises:
        InvalidArgumentError: it is not such a text; ``where`` names its source.
    """
    try:
        data = json.loads(text)
        arrivals = tuple(_arrival(a) for a in data.pop("arrivals"))
        schedule = Schedule(arrivals, **{**data, "resets": tuple(data.get("resets", ()))})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidArgumentError(f"{where}: not a schedule as `anyfp4 verify` prints it: {error}") from error
    if not arrivals or any(not a.request.tokens for a in arrivals):
        raise InvalidArgumentError(f"{where}: every schedule has a request, every request a token")
    return schedule


def _arrival(data: Mapping[str, Any]) -> Arrival:
    params = dict(data["params"])
    if params.get("logit_bias") is not None:  # JSON has no integer keys
        params["logit_bias"] = {int(k): float(v) for k, v in params["logit_bias"].items()}
    request = Request(tuple(int(t) for t in data["tokens"]), SamplingParams(**params))
    return Arrival(request, int(data["at"]), data["abort_after"])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): v for k, v in sorted(value.items())}
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Plan:
    """What schedules are drawn from; the n-th is a function of these fields and n alone.

    Attributes:
        vocab_size: token ids are drawn from 0 … vocab_size − 1.
        max_prompt: most tokens of a prompt.
        max_tokens: most new tokens of a request.
        batch_sizes: numbers of requests in a schedule.
        threads: numbers of threads to run with.
    """

    vocab_size: int
    max_prompt: int
    max_tokens: int
    batch_sizes: tuple[int, ...]
    threads: tuple[int, ...]
    seed: int = 0

    @property
    def max_length(self) -> int:
        """Most tokens of prompt and completion together."""
        return self.max_prompt + self.max_tokens

    def request(self, number: int) -> Request:
        """The request of that number: a random prompt, often with a beginning that others share.

        Every third has a short prompt and goes on for long: such requests outgrow a small cache.
        """
        rng = random.Random(f"{self.seed}/request/{number}")
        if number % 3 == 0:
            tokens = self._tokens(rng, rng.randint(1, min(6, self.max_prompt)))
            limit = rng.randint((self.max_tokens + 1) // 2, self.max_tokens)
            params = replace(self._params(rng), max_tokens=limit, min_tokens=0, ignore_eos=True, stop_token_ids=None)
            return Request(tuple(tokens), params)
        shares = rng.random() < 0.6
        # log-uniform: as many prompts between 2 and 4 tokens as between 64 and 128
        low = min(8 if shares else 1, self.max_prompt)
        length = round(low * (self.max_prompt / low) ** rng.random())
        tokens = self._tokens(rng, length)
        if shares:
            stem = self._tokens(random.Random(f"{self.seed}/stem/{rng.randrange(_STEMS)}"), self.max_prompt)
            common = rng.randint(1, length)
            tokens = stem[:common] + tokens[common:]
        return Request(tuple(tokens), self._params(rng))

    def _tokens(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(self.vocab_size) for _ in range(count)]

    def _params(self, rng: random.Random) -> SamplingParams:
        greedy = rng.random() < 0.4
        prompt_logprobs = rng.choice((None, None, 0, 3))
        # nothing to generate is a request, too: the prompt alone is scored
        least = 0 if prompt_logprobs is not None and rng.random() < 0.3 else 1
        max_tokens = rng.randint(least, self.max_tokens) if least else 0
        biased = rng.random() < 0.2
        return SamplingParams(
            n=rng.choice((1, 1, 1, 2, 3)),
            temperature=0.0 if greedy else round(rng.uniform(0.2, 1.6), 2),
            top_p=rng.choice((1.0, 1.0, 0.95, 0.6)),
            top_k=rng.choice((0, 0, 1, 20)),
            min_p=rng.choice((0.0, 0.0, 0.05)),
            seed=rng.randrange(2**31),
            max_tokens=max_tokens,
            min_tokens=rng.randint(0, max_tokens) if rng.random() < 0.2 else 0,
            stop_token_ids=self._tokens(rng, 8) if rng.random() < 0.2 else None,
            ignore_eos=rng.random() < 0.7,
            logprobs=rng.choice((None, 0, 1, 5, 20)),
            prompt_logprobs=prompt_logprobs,
            presence_penalty=rng.choice((0.0, 0.0, 0.0, 0.6)),
            frequency_penalty=rng.choice((0.0, 0.0, 0.0, -0.4)),
            repetition_penalty=rng.choice((1.0, 1.0, 1.0, 1.2)),
            logit_bias={t: float(rng.randint(-5, 5)) for t in self._tokens(rng, 4)} if biased else None,
        )

    def schedule(self, number: int) -> Schedule:
        """The schedule of that number. Later ones draw from more requests, and meet earlier requests again."""
        rng = random.Random(f"{self.seed}/schedule/{number}")
        count = rng.choice(self.batch_sizes)
        limit = 6 + 3 * number
        tight = rng.random() < 0.5
        numbers = [
            rng.randrange(0, limit, 3) if tight and rng.random() < 0.8 else rng.randrange(limit) for _ in range(count)
        ]
        requests = [self.request(i) for i in numbers]
        block_size = rng.choice((1, 3, 8) if tight else (1, 3, 8, 16, 32))
        schedule = Schedule(
            self._arrivals(rng, requests),
            max_num_seqs=rng.choice((5, 64, 64, 64) if tight else (1, 2, 5, 64, 64, 64)),
            max_step_tokens=rng.choice((5, 16, 33, 64, 200, 2048)),
            block_size=block_size,
            cache_blocks=_small_cache(rng, requests, block_size) if tight else None,
            prefix_caching=rng.random() < 0.75,
            resets=(rng.randint(1, 30),) if rng.random() < 0.15 else (),
            threads=rng.choice(self.threads),
            cuda_graphs=rng.random() < 0.7,
            async_scheduling=rng.random() < 0.7,
        )
        if schedule.async_scheduling and rng.random() < 0.35:
            # a step is only launched ahead if no request of it needs the host, so here none does
            arrivals = tuple(replace(a, request=_device_alone(a.request)) for a in schedule.arrivals)
            return replace(schedule, arrivals=arrivals)
        return schedule

    def _arrivals(self, rng: random.Random, requests: Sequence[Request]) -> tuple[Arrival, ...]:
        pattern = rng.choice(("together", "together", "spread", "waves"))
        if pattern == "together":
            steps = [0] * len(requests)
        elif pattern == "spread":
            steps = sorted(rng.randint(0, 2 * len(requests)) for _ in requests)
        else:
            steps = sorted(_WAVE * rng.randint(0, 2) + rng.randint(0, 4) for _ in requests)
        aborts = [rng.randint(0, self.max_tokens) if rng.random() < 0.15 else None for _ in requests]
        if None not in aborts:  # a schedule of nothing but aborts would compare next to nothing
            aborts[0] = None
        return tuple(Arrival(r, at, a) for r, at, a in zip(requests, steps, aborts, strict=True))


def _device_alone(request: Request) -> Request:
    """The request without what needs the host to choose a token or to read log-probabilities."""
    return replace(
        request,
        params=replace(
            request.params,
            logprobs=None,
            min_tokens=0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            logit_bias=None,
        ),
    )


def _small_cache(rng: random.Random, requests: Sequence[Request], block_size: int) -> int:
    """Room for each request, but not for all of them: prefixes are evicted, growing sequences preempted."""
    needs = [max(-(-r.max_length // block_size), 1) for r in requests]
    wanted = sum(need * r.params.n for need, r in zip(needs, requests, strict=True))
    return max(*needs, round(wanted * rng.uniform(0.2, 0.7)))
