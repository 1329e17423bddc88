"""``anyfp4 verify``: random requests in random batches must give the bits that each gives alone, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from anyfp4.errors import InvalidArgumentError
from anyfp4.models.decoder import Decoder
from anyfp4.tools.schedules import Plan, Request, Schedule
from anyfp4.tools.verify_compare import Compared, Difference, Pair, compare, pairs
from anyfp4.tools.verify_run import Outcome, Seen, run_alone, run_schedule, threads_restored
from anyfp4.tools.verify_shrink import shrink

#: called with (trials done, trials in all, what is happening)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Trial:
    """One schedule that was run and compared.

    Attributes:
        compared: what was compared with the requests alone.
        seen: what the engine did.
        seconds: that the schedule and its requests alone took.
    """

    number: int
    schedule: Schedule
    compared: Compared
    seen: Seen
    seconds: float


@dataclass(frozen=True)
class Failure:
    """A schedule in which a request is not what it is alone.

    Attributes:
        trial: number of the trial.
        original: its schedule, and the first difference there.
        smallest: the smallest schedule found that still fails, and the first difference there.
        repeatable: whether the original failed again when it was run again; if not, the rest is the original.
        series: log-probabilities of the differing request of the original schedule, alone and there.
    """

    trial: int
    original: Schedule
    original_difference: Difference
    smallest: Schedule
    difference: Difference
    repeatable: bool
    series: tuple[Pair, ...]


@dataclass
class Proof:
    """All that was found; grows while trials run, so that it can be shown when they are interrupted."""

    trials: list[Trial] = field(default_factory=list)
    compared: Compared = field(default_factory=Compared)
    seen: Seen = field(default_factory=Seen)
    distinct_requests: int = 0
    failure: Failure | None = None
    interrupted: bool = False
    seconds: float = 0.0


class Verifier:
    """Runs schedules on one model and compares each request with itself alone; that is computed once."""

    def __init__(self, model: Decoder, eos: Sequence[int], max_length: int) -> None:
        """Takes a model.

        Args:
            model: the decoder; engines are built on it as needed.
            eos: tokens that end a sequence, besides those of the model's config.
            max_length: most tokens of prompt and completion together.

        Raises:
            InvalidArgumentError: the model has fewer positions than that.
        """
        limit = model.cos_sin.shape[0]
        if max_length > limit:
            raise InvalidArgumentError(
                f"requests of up to {max_length} tokens do not fit the model's {limit} positions: "
                "lower --max-prompt or --max-tokens"
            )
        self.model, self.eos, self.max_length = model, tuple(eos), max_length
        self._alone: dict[str, Outcome] = {}

    def alone(self, request: Request) -> Outcome:
        """What becomes of a request by itself, on a fresh engine with default sizes."""
        key = request.key
        if key not in self._alone:
            self._alone[key] = run_alone(self.model, self.eos, request, self.max_length)
        return self._alone[key]

    def run(self, schedule: Schedule) -> tuple[Difference | None, Compared, Seen]:
        """Runs a schedule: the first difference, what was compared, what the engine did."""
        outcomes, seen = run_schedule(self.model, self.eos, schedule, self.max_length)
        compared = Compared()
        for index, (arrival, outcome) in enumerate(zip(schedule.arrivals, outcomes, strict=True)):
            difference, counts = compare(index, len(arrival.request.tokens), self.alone(arrival.request), outcome)
            compared.add(counts)
            if difference is not None:
                return difference, compared, seen
        return None, compared, seen

    def shrink(self, trial: int, schedule: Schedule, difference: Difference, seconds: float) -> Failure:
        """Looks for the smallest schedule that still fails, for at most so many seconds."""
        deadline = time.monotonic() + seconds
        again, _, _ = self.run(schedule)
        outcomes, _ = run_schedule(self.model, self.eos, schedule, self.max_length)
        request = schedule.arrivals[difference.request].request
        series = pairs(len(request.tokens), self.alone(request), outcomes[difference.request])
        smallest, found = schedule, again
        if again is not None:
            smallest = shrink(schedule, self._fails, lambda: time.monotonic() >= deadline)
            found, _, _ = self.run(smallest)
        return Failure(
            trial=trial,
            original=schedule,
            original_difference=difference,
            smallest=smallest,
            difference=found or difference,
            repeatable=found is not None,
            series=tuple(series),
        )

    def _fails(self, schedule: Schedule) -> bool:
        try:
            return self.run(schedule)[0] is not None
        except InvalidArgumentError:
            return False  # made smaller, it no longer fits its engine

    @property
    def distinct_requests(self) -> int:
        """Requests that were run alone."""
        return len(self._alone)


def verify(
    verifier: Verifier,
    schedules: Iterable[Schedule],
    proof: Proof,
    *,
    total: int,
    shrink_seconds: float = 60.0,
    progress: Progress | None = None,
) -> None:
    """Runs schedules until one fails, and shrinks that one.

    Args:
        verifier: of the model.
        schedules: what to run, in order.
        proof: filled as trials end; holds for what was done when this is interrupted.
        total: how many schedules there are.
        shrink_seconds: at most so long a search for a smaller schedule.
        progress: called before every trial and at the end.

    Raises:
        KeyboardInterrupt: was interrupted; ``proof.interrupted`` is set.
    """
    started = time.perf_counter()
    try:
        with threads_restored(verifier.model):
            for number, schedule in enumerate(schedules):
                if progress is not None:
                    progress(number, total, "running")
                began = time.perf_counter()
                difference, compared, seen = verifier.run(schedule)
                proof.trials.append(Trial(number, schedule, compared, seen, time.perf_counter() - began))
                proof.compared.add(compared)
                proof.seen.add(seen)
                proof.distinct_requests = verifier.distinct_requests
                if difference is not None:
                    if progress is not None:
                        progress(number, total, "a difference; looking for the smallest schedule that shows it")
                    # set before the search, so that an interrupt does not lose the finding
                    proof.failure = Failure(number, schedule, difference, schedule, difference, True, ())
                    proof.failure = verifier.shrink(number, schedule, difference, shrink_seconds)
                    break
            else:
                if progress is not None:
                    progress(total, total, "done")
    except KeyboardInterrupt:
        proof.interrupted = True
        raise
    finally:
        proof.seconds = time.perf_counter() - started


def plan_for(
    model: Decoder,
    *,
    max_prompt: int | None,
    max_tokens: int,
    batch_sizes: Sequence[int],
    threads: Sequence[int],
    seed: int,
) -> Plan:
    """The plan for a model.

    Args:
        model: bounds token ids and lengths.
        max_prompt: most tokens of a prompt; None: 192, or what the model's positions leave room for.
        max_tokens: most new tokens.
        batch_sizes: numbers of requests in a schedule.
        threads: numbers of threads.
        seed: of the schedules.

    Raises:
        InvalidArgumentError: a number is too small, or the model has too few positions.
    """
    limit = model.cos_sin.shape[0]
    if max_prompt is None:
        max_prompt = min(192, limit - max_tokens)
    if max_prompt < 1 or max_prompt + max_tokens > limit:
        raise InvalidArgumentError(
            f"--max-prompt {max_prompt} and --max-tokens {max_tokens} do not fit the model's {limit} positions together"
        )
    return Plan(model.config.vocab_size, max_prompt, max_tokens, tuple(batch_sizes), tuple(threads), seed)
