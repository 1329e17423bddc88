"""The engine: queues requests, runs steps, finishes sequences.

With async scheduling a step may be under way between two calls of ``step`` (see ``ahead``). It belongs to the next
call, so callers see what they would see without it: a call brings the results of one step.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf

import torch

from anyfp4.engine import kv_cache, sampler
from anyfp4.engine.ahead import Flight, can_fly, launch
from anyfp4.engine.config import EngineConfig, SamplingParams
from anyfp4.engine.graphs import StepGraphs, why_no_graphs
from anyfp4.engine.model_runner import ModelRunner
from anyfp4.engine.outputs import FinishReason
from anyfp4.engine.results import Result, compute
from anyfp4.engine.scheduler import Scheduled, Scheduler
from anyfp4.engine.sequence import Sequence
from anyfp4.engine.stats import EngineStats
from anyfp4.errors import AnyFP4Error, InvalidArgumentError
from anyfp4.layers.attention import LayerCache
from anyfp4.models.decoder import Decoder
from anyfp4.ops import philox

__all__ = ["Engine", "EngineStats"]
_log = logging.getLogger(__name__)


class Engine:
    """Runs sequences of token ids; text is the caller's affair. To be used by one thread, but for ``check``."""

    def __init__(self, model: Decoder, config: EngineConfig, eos: Iterable[int] = ()) -> None:
        """Allocates the cache.

        Args:
            model: the decoder; its rotary table bounds the length of a sequence.
            config: sizes.
            eos: tokens that end a sequence, besides those of the model's config.

        Raises:
            InvalidArgumentError: the cache cannot be as small as that; or CUDA graphs were asked for where there are
                none.
        """
        self.model = model
        self.config = config
        self.max_model_len = config.max_model_len or model.cos_sin.shape[0]
        blocks = kv_cache.num_blocks(model, config, self.max_model_len)
        self.scheduler = Scheduler(
            blocks, config.block_size, config.max_num_seqs, config.max_step_tokens, config.enable_prefix_caching
        )
        caches = kv_cache.allocate(model, blocks, config.block_size)
        self.graphs = self._step_graphs(caches)
        self.runner = ModelRunner(model, caches, config.block_size, self.graphs)
        vocab = model.config.vocab_size
        self.eos = frozenset(token for token in (*model.config.eos_token_ids, *eos) if 0 <= token < vocab)
        wanted = config.async_scheduling
        #: whether steps are launched before the tokens of the step before them are read
        self.async_scheduling = self.graphs is not None if wanted is None else wanted
        self._flight: Flight | None = None  # launched, its tokens not read
        self._prompt_tokens = self._generated_tokens = self._steps = self._steps_ahead = self._finished = 0
        self._schedule_seconds = self._step_seconds = 0.0

    def _step_graphs(self, caches: SequenceOf[LayerCache]) -> StepGraphs | None:
        wanted, config = self.config.cuda_graphs, self.config
        reason = why_no_graphs(self.model)
        if wanted and reason is not None:
            raise InvalidArgumentError(f"cuda_graphs = True: {reason}")
        if wanted is False or reason is not None:
            return None
        blocks = min(-(-self.max_model_len // config.block_size), self.scheduler.num_blocks)
        return StepGraphs(self.model, caches, config.max_num_seqs, config.max_step_tokens, blocks)

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Runs what the first requests would wait for: compiling kernels, capturing graphs. Nothing is stored.

        Without it, all of that happens when it is first needed.

        Args:
            progress: called with (steps done, steps in all).
        """
        if self.model.device.type != "cuda":
            return
        say = progress or (lambda done, total: None)
        prompts = self.runner.padding_sizes(self.config.max_step_tokens)
        graphs = len(self.graphs.shapes) if self.graphs is not None else 0
        with self.model.ops.quiet():
            for done, tokens in enumerate(prompts, start=1):
                self.runner.run_padding(tokens)
                say(done, len(prompts) + graphs)
            if self.graphs is not None:
                self.graphs.capture_all(lambda done, total: say(len(prompts) + done, len(prompts) + total))

    def check(self, tokens: SequenceOf[int], params: SamplingParams) -> int:
        """Refuses a prompt that cannot run; safe to call from any thread.

        Returns:
            Tokens at which its sequences end.

        Raises:
            InvalidArgumentError: the prompt is empty or too long, holds an unknown token, or can never fit the cache;
                or a parameter names an unknown token.
        """
        vocab = self.model.config.vocab_size
        if not tokens:
            raise InvalidArgumentError("the prompt is empty: give at least one token")
        if min(tokens) < 0 or max(tokens) >= vocab:
            position = next(i for i, token in enumerate(tokens) if not 0 <= token < vocab)
            raise InvalidArgumentError(
                f"prompt token {tokens[position]} at position {position} is not in 0…{vocab - 1}"
            )
        for name, named in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            for token in named or ():
                if not 0 <= token < vocab:
                    raise InvalidArgumentError(f"{name}: token {token} is not in 0…{vocab - 1}")
        room = self.max_model_len - len(tokens)
        if room < (0 if params.max_tokens == 0 else 1):
            raise InvalidArgumentError(
                f"the prompt has {len(tokens)} tokens; at most {self.max_model_len - 1} leave room for a new one "
                f"(max_model_len = {self.max_model_len})"
            )
        length = len(tokens) + (room if params.max_tokens is None else min(room, params.max_tokens))
        self.scheduler.check_fits(length)
        return length

    def add(self, request_id: str, tokens: SequenceOf[int], params: SamplingParams) -> list[Sequence]:
        """Queues one prompt: ``params.n`` sequences.

        Raises:
            InvalidArgumentError: see :meth:`check`.
        """
        length = self.check(tokens, params)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        sequences = [
            Sequence(
                request_id=request_id,
                index=i,
                tokens=list(tokens),
                prompt_length=len(tokens),
                params=params,
                seed=philox.fold_seed(seed, i),
                max_length=length,
                scores_prompt=i == 0 and params.prompt_logprobs is not None,
            )
            for i in range(params.n)
        ]
        self.scheduler.add(*sequences)
        return sequences

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return self.scheduler.has_work

    def abort(self, sequence: Sequence) -> None:
        """Ends a sequence now and frees its blocks."""
        self._finish(sequence, "abort")

    def stop(self, sequence: Sequence, reason: str) -> None:
        """Ends a sequence because its text reached a stop string."""
        self._finish(sequence, "stop", reason)

    def reset_prefix_cache(self) -> None:
        """Forgets all cached prefixes; running sequences are not disturbed."""
        self.scheduler.reset_prefix_cache()

    def stats(self) -> EngineStats:
        """The figures now; safe to call from any thread."""
        s = self.scheduler
        return EngineStats(
            running=len(s.running),
            waiting=s.num_waiting,
            kv_blocks_total=s.num_blocks,
            kv_blocks_used=s.num_blocks - s.blocks.num_free,
            kv_blocks_cached=s.blocks.num_cached,
            prompt_tokens_computed=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            prefix_query_tokens=s.prefix_query_tokens,
            prefix_hit_tokens=s.prefix_hit_tokens,
            prefix_evicted_blocks=s.blocks.evictions,
            preemptions=s.preemptions,
            steps=self._steps,
            steps_ahead=self._steps_ahead,
            finished=self._finished,
            schedule_seconds=self._schedule_seconds,
            step_seconds=self._step_seconds,
        )

    def step(self) -> list[Sequence]:
        """Runs one step; returns the sequences that got a new token or ended.

        A sequence that cannot be computed (its logits hold a NaN, memory runs out) ends with ``finish_reason``
        ``error``; the others do not notice. With async scheduling the next step may be under way on return.
        """
        started = time.perf_counter()
        flight, self._flight = self._flight, None
        step: SequenceOf[Scheduled] = ()
        if flight is None or flight.over:
            flight, step = None, self.scheduler.schedule()
            self._schedule_seconds += time.perf_counter() - started
            if not step:
                return []
        self._steps_ahead += flight is not None
        with self.model.ops.quiet():
            flight = flight or self._launch(step)
            changed = self._run(step) if flight is None else self._land(flight)
        self._steps += 1
        self._step_seconds += time.perf_counter() - started
        return changed

    def _launch(self, step: SequenceOf[Scheduled], after: Flight | None = None) -> Flight | None:
        """Launches a step without waiting for its tokens; None if it has to run otherwise."""
        if not (self.async_scheduling and can_fly(self.runner, step, after)):
            return None
        try:
            return launch(self.runner, step, after)
        except torch.AcceleratorError:  # the device is lost
            raise
        except Exception as error:  # it runs when the host knows all tokens; whoever fails then is found
            _log.warning("a step of %d sequences could not be launched ahead: %s", len(step), error)
            return None

    def _launch_after(self, flight: Flight) -> Flight | None:
        started = time.perf_counter()
        step = self.scheduler.ahead(flight.step)
        self._schedule_seconds += time.perf_counter() - started
        return self._launch(step, flight) if step else None

    def _land(self, flight: Flight) -> list[Sequence]:
        """Launches the step after a flight, and then reads the flight's tokens."""
        ahead = self._launch_after(flight)
        rows = [i for i, item in enumerate(flight.step) if not item.sequence.finished]
        try:
            found = flight.chosen.get()
        except torch.AcceleratorError:
            raise
        except Exception as error:
            _log.debug("a step of %d sequences runs again: %s", len(rows), error)
            found = None
        unknown = [i for i in rows if found is not None and found[i] < 0]
        for i in unknown:
            flight.step[i].sequence.host_samples = True
        if found is None or unknown:
            # the step ahead is dropped: it changed nothing but slots that will be written again
            return self._run([flight.step[i] for i in rows])
        self._flight = ahead
        results = [Result(flight.step[i], token=found[i]) for i in rows]
        return [s for result in results if (s := self._apply(result)) is not None]

    def _run(self, step: SequenceOf[Scheduled]) -> list[Sequence]:
        try:
            results = compute(self.runner, step, self.eos)
        except torch.AcceleratorError:  # the device is lost, not a request
            raise
        except Exception as error:  # whatever it is, requests that have no part in it go on
            if len(step) == 1:
                return [self._fail(step[0].sequence, error)]
            # a step changes nothing but cache slots of its own, so it may run again: same bits, one at a time
            return [s for item in step for s in self._run([item])]
        return [s for result in results if (s := self._apply(result)) is not None]

    def _apply(self, result: Result) -> Sequence | None:
        """Notes what a step found out; the sequence if it got a token or ended."""
        item, s = result.item, result.item.sequence
        self.scheduler.commit(item)
        self._prompt_tokens += max(0, min(s.computed, s.prompt_length) - item.start)
        if s.scores_prompt:
            if not s.prompt_logprobs:
                s.prompt_logprobs.append(None)  # nothing predicts the first token
            s.prompt_logprobs += result.prompt_logprobs
        if result.token is None:
            if s.computed < s.max_length:
                return None
            self._finish(s, "length")  # max_tokens = 0: there is nothing to choose
            return s
        s.tokens.append(result.token)
        self._generated_tokens += 1
        if result.logprobs is not None:
            s.logprobs.append(result.logprobs)
        if sampler.has_penalty(s):
            s.counts[result.token] = s.counts.get(result.token, 0) + 1
        self._finish_if_done(s)
        return s

    def _finish_if_done(self, s: Sequence) -> None:
        token, p = s.tokens[-1], s.params
        # the token itself cannot come before min_tokens: its logit was −∞
        if token in self.eos and not p.ignore_eos:
            self._finish(s, "stop")
        elif token in (p.stop_token_ids or ()):
            self._finish(s, "stop", token)
        elif len(s.tokens) >= s.max_length:
            self._finish(s, "length")

    def _fail(self, s: Sequence, error: Exception) -> Sequence:
        known = isinstance(error, AnyFP4Error)
        s.error = str(error) if known else f"{type(error).__name__}: {error}"
        _log.error("request %s ends with an error: %s", s.request_id, s.error, exc_info=None if known else error)
        self._finish(s, "error")
        return s

    def _finish(self, s: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        if not s.finished:
            s.finish_reason, s.stop_reason = reason, stop_reason
            self.scheduler.finish(s)
            self._finished += 1
            if not self.scheduler.has_work:
                self._flight = None  # nobody waits for it
