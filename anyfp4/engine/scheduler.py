"""Which sequences run in the next step, and which cache blocks they own. Plain Python: no tensors here."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from anyfp4.engine.sequence import Sequence
from anyfp4.errors import InvalidArgumentError


@dataclass(frozen=True)
class Scheduled:
    """A sequence's share of a step: its tokens ``start`` … ``start + count − 1``.

    The step chooses a new token for it if these are the last ones it has.
    """

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether a token is chosen after this step."""
        return self.start + self.count == len(self.sequence.tokens)


class Scheduler:
    """First come, first served, with chunked prefill and preemption by recomputation.

    Nothing here can change a sequence's bits: every op is batch-invariant, so any schedule gives the same tokens.
    """

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int, max_step_tokens: int) -> None:
        self.block_size, self.num_blocks = block_size, num_blocks
        self.max_num_seqs, self.max_step_tokens = max_num_seqs, max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.free_blocks: list[int] = list(range(num_blocks - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence.

        Raises:
            InvalidArgumentError: it could never fit the cache.
        """
        need = self._blocks_for(sequence.max_length)
        if need > self.num_blocks:
            raise InvalidArgumentError(
                f"a request of up to {sequence.max_length} tokens needs {need} KV-cache blocks of {self.block_size} "
                f"tokens, and there are {self.num_blocks}: raise kv_cache_bytes, or lower max_tokens or max_model_len"
            )
        self.waiting.append(sequence)

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def schedule(self) -> list[Scheduled]:
        """Chooses the next step's work and gives it blocks."""
        budget = self.max_step_tokens
        step: list[Scheduled] = []
        for sequence in list(self.running):
            if budget == 0:
                break
            if sequence not in self.running:  # preempted by an older one in this very step
                continue
            count = min(budget, len(sequence.tokens) - sequence.computed)
            while not self._reserve(sequence, sequence.computed + count):
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                step.append(Scheduled(sequence, sequence.computed, count))
                budget -= count
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            count = min(budget, len(sequence.tokens))
            if not self._reserve(sequence, count):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            step.append(Scheduled(sequence, 0, count))
            budget -= count
        return step

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out and frees its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.free_blocks.extend(reversed(sequence.blocks))
        sequence.blocks = []
        sequence.computed = 0

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        need = self._blocks_for(tokens) - len(sequence.blocks)
        if need > len(self.free_blocks):
            return False
        sequence.blocks.extend(self.free_blocks.pop() for _ in range(need))
        return True

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)
