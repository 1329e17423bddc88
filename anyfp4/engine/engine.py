"""The engine: queues requests, runs steps, finishes sequences."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from anyfp4.engine import kv_cache, sampler
from anyfp4.engine.config import EngineConfig, SamplingParams
from anyfp4.engine.model_runner import ModelRunner
from anyfp4.engine.scheduler import Scheduled, Scheduler
from anyfp4.engine.sequence import Sequence
from anyfp4.errors import InvalidArgumentError
from anyfp4.models.decoder import Decoder
from anyfp4.ops import sampling


class Engine:
    """Runs sequences of token ids; text is the caller's affair."""

    def __init__(self, model: Decoder, config: EngineConfig, eos: Iterable[int] = ()) -> None:
        """Allocates the cache.

        Args:
            model: the decoder; its rotary table bounds the length of a sequence.
            config: sizes.
            eos: tokens that end a sequence, besides those of the model's config.
        """
        self.model = model
        self.config = config
        self.max_model_len = config.max_model_len or model.cos_sin.shape[0]
        blocks = kv_cache.num_blocks(model, config, self.max_model_len)
        self.scheduler = Scheduler(blocks, config.block_size, config.max_num_seqs, config.max_step_tokens)
        self.runner = ModelRunner(model, kv_cache.allocate(model, blocks, config.block_size), config.block_size)
        self.eos = frozenset((*model.config.eos_token_ids, *eos))

    def add(self, request_id: str, tokens: SequenceOf[int], params: SamplingParams) -> list[Sequence]:
        """Queues one prompt: ``params.n`` sequences.

        Raises:
            InvalidArgumentError: the prompt is empty or too long, holds an unknown token, or can never fit the cache.
        """
        vocab = self.model.config.vocab_size
        if not tokens:
            raise InvalidArgumentError("the prompt is empty: give at least one token")
        for position, token in enumerate(tokens):
            if not 0 <= token < vocab:
                raise InvalidArgumentError(f"prompt token {token} at position {position} is not in 0…{vocab - 1}")
        if len(tokens) >= self.max_model_len:
            raise InvalidArgumentError(
                f"the prompt has {len(tokens)} tokens; at most {self.max_model_len - 1} leave room for a new one "
                f"(max_model_len = {self.max_model_len})"
            )
        seed = secrets.randbits(63) if params.seed is None else params.seed
        length = self.max_model_len
        if params.max_tokens is not None:
            length = min(length, len(tokens) + params.max_tokens)
        sequences = [
            Sequence(
                request_id=request_id,
                index=i,
                tokens=list(tokens),
                prompt_length=len(tokens),
                params=params,
                seed=sampling.fold_seed(seed, i),
                max_length=length,
            )
            for i in range(params.n)
        ]
        for sequence in sequences:
            self.scheduler.add(sequence)
        return sequences

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return self.scheduler.has_work

    def abort(self, sequence: Sequence) -> None:
        """Ends a sequence now and frees its blocks."""
        if not sequence.finished:
            sequence.finish_reason = "abort"
            self.scheduler.finish(sequence)

    def stop(self, sequence: Sequence, reason: str) -> None:
        """Ends a sequence because its text reached a stop string."""
        if not sequence.finished:
            sequence.finish_reason, sequence.stop_reason = "stop", reason
            self.scheduler.finish(sequence)

    def step(self) -> list[Sequence]:
        """Runs one step; returns the sequences that got a new token or ended."""
        step = self.scheduler.schedule()
        if not step:
            return []
        with self.model.ops.quiet():
            return self._run(step)

    def _run(self, step: SequenceOf[Scheduled]) -> list[Sequence]:
        hidden = self.runner.run(step)
        rows = self._rows(step)
        changed = []
        for tile, logits in self.runner.logits(hidden, sorted(rows)):
            need = [row for row in tile if self._needs_logprobs(*rows[row])]
            logprobs = self.model.ops.log_softmax(logits).cpu().numpy() if need else None
            chosen = [row for row in tile if self._is_last(*rows[row])]
            index = {row: i for i, row in enumerate(tile)}
            picked = sampling.sample(
                logits[[index[row] for row in chosen]],
                [sampler.choice(rows[row][0].sequence) for row in chosen],
            )
            tokens = dict(zip(chosen, picked, strict=True))
            for row in tile:
                item, position = rows[row]
                own = logprobs[index[row]] if logprobs is not None and row in need else None
                s, p = item.sequence, item.sequence.params
                if position + 1 < s.prompt_length and p.prompt_logprobs is not None and own is not None:
                    s.prompt_logprobs.append(sampler.token_logprobs(own, s.tokens[position + 1], p.prompt_logprobs))
                if row in tokens:
                    if p.logprobs is not None and own is not None:
                        s.logprobs.append(sampler.token_logprobs(own, tokens[row], p.logprobs))
                    s.tokens.append(tokens[row])
                    changed.append(s)
        for item in step:
            item.sequence.computed = item.start + item.count
        for s in changed:
            self._finish_if_done(s)
        return changed

    def _rows(self, step: SequenceOf[Scheduled]) -> dict[int, tuple[Scheduled, int]]:
        """Rows of the hidden states whose logits matter, with the position of each row's token."""
        rows: dict[int, tuple[Scheduled, int]] = {}
        offset = 0
        for item in step:
            s = item.sequence
            if s.params.prompt_logprobs is not None and not s.prompt_logprobs:
                s.prompt_logprobs.append(None)  # nothing predicts the first token
            for i in range(item.count):
                position = item.start + i
                # after a preemption the prompt's rows run again, but are already scored
                scored = len(s.prompt_logprobs) > position + 1
                wanted = s.params.prompt_logprobs is not None and position + 1 < s.prompt_length and not scored
                if wanted or position + 1 == len(s.tokens):
                    rows[offset + i] = (item, position)
            offset += item.count
        return rows

    @staticmethod
    def _is_last(item: Scheduled, position: int) -> bool:
        return position + 1 == len(item.sequence.tokens)

    @staticmethod
    def _needs_logprobs(item: Scheduled, position: int) -> bool:
        p = item.sequence.params
        if position + 1 < item.sequence.prompt_length:
            return p.prompt_logprobs is not None
        return p.logprobs is not None

    def _finish_if_done(self, s: Sequence) -> None:
        token = s.tokens[-1]
        if token in (s.params.stop_token_ids or ()) or (token in self.eos and not s.params.ignore_eos):
            s.finish_reason = "stop"
            s.stop_reason = token if token not in self.eos else None
        elif len(s.tokens) >= s.max_length:
            s.finish_reason = "length"
        if s.finished:
            self.scheduler.finish(s)
