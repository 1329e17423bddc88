"""Runs a schedule on an engine: what became of each request, and what the engine really did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from anyfp4 import envs
from anyfp4.device import processors
from anyfp4.engine import kv_cache
from anyfp4.engine.config import EngineConfig
from anyfp4.engine.engine import Engine
from anyfp4.engine.inputs import StepInputs
from anyfp4.engine.model_runner import ModelRunner
from anyfp4.engine.outputs import TokenLogprobs
from anyfp4.engine.scheduler import Scheduled
from anyfp4.engine.sequence import Sequence as EngineSequence
from anyfp4.errors import AnyFP4Error
from anyfp4.models.decoder import Decoder
from anyfp4.tools.schedules import Request, Schedule

#: steps in a row without a new token after which a run counts as stuck; a long prompt in small chunks takes fewer
_STUCK = 10_000


@dataclass(frozen=True)
class Completion:
    """What became of one sequence.

    Attributes:
        logprobs: of each new token, if asked for.
    """

    tokens: tuple[int, ...]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        prompt_logprobs: of each prompt token (None for the first), if asked for.
    """

    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...]

    @classmethod
    def of(cls, sequences: Sequence[EngineSequence]) -> Outcome:
        """Reads it from a request's sequences; one of them scores the prompt."""
        return cls(
            tuple(
                Completion(tuple(s.tokens[s.prompt_length :]), s.finish_reason, s.stop_reason, tuple(s.logprobs))
                for s in sequences
            ),
            max((tuple(s.prompt_logprobs) for s in sequences), key=len),
        )


@dataclass
class Seen:
    """What engines did while schedules ran: counted at the model's door, and by the engine itself.

    Attributes:
        sequences: sequences of a step -> steps.
        tokens: tokens of a step -> steps.
        chunks: tokens of one sequence in a step -> times.
        starts: times a sequence's share of a step began after its first position: a later chunk, a token to decode,
            or the rest after a prefix hit.
        prefix_hit_tokens: prompt tokens that the prefix cache served.
        preemptions: sequences that lost their blocks and were computed again.
        aborted: requests that were aborted before they ended.
        graph_steps: steps that ran as CUDA graphs.
        steps_ahead: steps that were launched before the tokens of the step before them were read.
    """

    steps: int = 0
    sequences: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    chunks: Counter[int] = field(default_factory=Counter)
    starts: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    preemptions: int = 0
    aborted: int = 0
    graph_steps: int = 0
    steps_ahead: int = 0

    def add(self, other: Seen) -> None:
        """Adds what another run did."""
        self.steps += other.steps
        self.sequences += other.sequences
        self.tokens += other.tokens
        self.chunks += other.chunks
        self.starts += other.starts
        self.prefix_hit_tokens += other.prefix_hit_tokens
        self.prefix_query_tokens += other.prefix_query_tokens
        self.preemptions += other.preemptions
        self.aborted += other.aborted
        self.graph_steps += other.graph_steps
        self.steps_ahead += other.steps_ahead


def default_threads() -> int:
    """Threads that the kernels have if nobody says otherwise."""
    return envs.read().num_threads or processors()


@contextmanager
def threads_restored(model: Decoder) -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        set_threads(model, default_threads())
        torch.set_num_threads(before)


def set_threads(model: Decoder, count: int) -> None:
    """Sets the threads of the model's kernels on a CPU; 0 is the default number. Nothing to set on other devices."""
    if model.device.type != "cpu":
        return
    model.ops.set_threads(count or default_threads())


def run_alone(model: Decoder, eos: Iterable[int], request: Request, max_length: int) -> Outcome:
    """Runs one request on an engine of its own, with default sizes and the default number of threads."""
    set_threads(model, 0)
    engine = Engine(model, EngineConfig(max_model_len=max_length), eos)
    sequences = engine.add("0", request.tokens, request.params)
    _drain(engine)
    return Outcome.of(sequences)


def run_schedule(model: Decoder, eos: Iterable[int], schedule: Schedule, max_length: int) -> tuple[list[Outcome], Seen]:
    """Runs a schedule on an engine of its own.

    Returns:
        The outcome of each arrival, in order, and what the engine did.

    Raises:
        InvalidArgumentError: a request does not fit the engine.
        AnyFP4Error: the engine makes no progress.
    """
    seen = Seen()
    set_threads(model, schedule.threads)
    engine = Engine(model, _config(model, schedule, max_length), eos)
    _watch(engine.runner, seen)
    waiting = list(enumerate(schedule.arrivals))
    running: list[tuple[int, list[EngineSequence]]] = []  # (step of its abort, sequences)
    results: dict[int, list[EngineSequence]] = {}
    resets = sorted(schedule.resets)
    step = idle = 0
    while waiting or engine.has_work:
        if not engine.has_work:
            step = max(step, waiting[0][1].at)
        while waiting and waiting[0][1].at <= step:
            index, arrival = waiting.pop(0)
            results[index] = engine.add(str(index), arrival.request.tokens, arrival.request.params)
            if arrival.abort_after is not None:
                running.append((step + arrival.abort_after, results[index]))
        while resets and resets[0] <= step:
            engine.reset_prefix_cache()
            resets.pop(0)
        seen.aborted += sum(_abort(engine, sequences) for at, sequences in running if at == step)
        idle = 0 if engine.step() else idle + 1
        if idle > _STUCK:
            raise AnyFP4Error(f"the engine is stuck: no new token in {_STUCK} steps; schedule: {schedule.to_json()}")
        step += 1
    stats = engine.stats()
    seen.steps, seen.steps_ahead = stats.steps, stats.steps_ahead
    seen.prefix_hit_tokens, seen.prefix_query_tokens = stats.prefix_hit_tokens, stats.prefix_query_tokens
    seen.preemptions = stats.preemptions
    return [Outcome.of(results[i]) for i in range(len(schedule.arrivals))], seen


def _abort(engine: Engine, sequences: Sequence[EngineSequence]) -> bool:
    unfinished = [s for s in sequences if not s.finished]
    for sequence in unfinished:
        engine.abort(sequence)
    return bool(unfinished)


def _config(model: Decoder, schedule: Schedule, max_length: int) -> EngineConfig:
    size = None
    if schedule.cache_blocks is not None:
        size = schedule.cache_blocks * kv_cache.block_bytes(model, schedule.block_size)
    return EngineConfig(
        max_model_len=max_length,
        max_num_seqs=schedule.max_num_seqs,
        max_step_tokens=schedule.max_step_tokens,
        block_size=schedule.block_size,
        kv_cache_bytes=size,
        enable_prefix_caching=schedule.prefix_caching,
        cuda_graphs=None if schedule.cuda_graphs else False,
        async_scheduling=schedule.async_scheduling,
    )


def _drain(engine: Engine) -> None:
    idle = 0
    while engine.has_work:
        idle = 0 if engine.step() else idle + 1
        if idle > _STUCK:
            raise AnyFP4Error(f"the engine is stuck: no new token in {_STUCK} steps of a request alone")


def _watch(runner: ModelRunner, seen: Seen) -> None:
    """Counts the inputs of every step that a runner is given."""
    inputs_of = runner.inputs

    def counted(step: Sequence[Scheduled]) -> StepInputs:
        inputs = inputs_of(step)
        counts = np.diff(inputs.query_start)
        seen.sequences[inputs.sequences] += 1
        seen.tokens[int(counts.sum())] += 1
        seen.chunks.update(counts.tolist())
        seen.starts += int(np.count_nonzero(inputs.context_len > counts))
        seen.graph_steps += runner.graphs is not None and runner.graphs.shape_of(inputs) is not None
        return inputs

    runner.inputs = counted  # type: ignore[method-assign]
