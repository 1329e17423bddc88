"""Which sequences run in the next step, and on which tokens. Plain Python: no tensors here.

First come, first served. Each step has a budget of tokens. Every running sequence that only waits for its next token
takes one of it; running prompts take what is left, in order, and then waiting sequences join while there is budget, a
place and room for their tokens. A waiting prompt may be cut to what budget remains. Nobody joins a step whose budget is
used up, so there are never more running sequences than the budget has tokens, and none of them starves.

Blocks are taken for all of a sequence's tokens when it joins, and one by one as it grows. If none is left then, the
youngest running sequence goes back to the head of the queue, and is computed again later: the oldest one always gets
on, and it fits alone, as ``add`` refuses whatever does not.

Nothing here can change a sequence's bits: every op is batch-invariant, so any schedule gives the same tokens.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import islice

from anyfp4.engine.block_manager import BlockManager, digest
from anyfp4.engine.sequence import Sequence
from anyfp4.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence's share of a step: its tokens ``start`` … ``start + count − 1``."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether a token is chosen after this step: these are its last ones, and it may have another."""
        tokens = len(self.sequence.tokens)
        return self.start + self.count == tokens and tokens < self.sequence.max_length


class Scheduler:
    """Queues, runs and preempts sequences; a step takes time in proportion to its sequences and new blocks."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_step_tokens: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.block_size, self.num_blocks = block_size, num_blocks
        self.max_num_seqs, self.max_step_tokens = max_num_seqs, max_step_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.blocks = BlockManager(num_blocks)
        # dicts for their order and for removal in constant time
        self.running: dict[Sequence, None] = {}
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        #: first completion of a prompt -> the others, which wait until they can share its blocks
        self.followers: dict[Sequence, dict[Sequence, None]] = {}
        self._leader_of: dict[Sequence, Sequence] = {}
        #: waited at the head of the queue for blocks, of which none was released since then
        self._blocked: Sequence | None = None
        self.preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    def check_fits(self, tokens: int) -> None:
        """Refuses a sequence of up to ``tokens`` tokens that could not run even alone.

        Raises:
            InvalidArgumentError: with the figures.
        """
        need = self._blocks_for(tokens)
        if need > self.num_blocks:
            raise InvalidArgumentError(
                f"a request of up to {tokens} tokens needs {need} KV-cache blocks of {self.block_size} "
                f"tokens, and there are {self.num_blocks}: raise kv_cache_bytes, or lower max_tokens or max_model_len"
            )

    def add(self, *sequences: Sequence) -> None:
        """Queues the completions of one prompt.

        With prefix caching, all but the first wait until its prompt is computed, and then share its blocks.

        Raises:
            InvalidArgumentError: they could never fit the cache.
        """
        first, *others = sequences
        self.check_fits(first.max_length)
        self.waiting[first] = None
        if others and self.enable_prefix_caching and self._shareable(first):
            self.followers[first] = dict.fromkeys(others)
            self._leader_of.update(dict.fromkeys(others, first))
        else:
            self.waiting.update(dict.fromkeys(others))

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that are queued."""
        return len(self.waiting) + len(self._leader_of)

    def schedule(self) -> list[Scheduled]:
        """Chooses the next step's work and gives it blocks. Each item is to be committed or finished."""
        budget = self.max_step_tokens
        step: list[Scheduled] = []
        prompts: list[Sequence] = []
        for sequence in list(self.running):
            if sequence not in self.running:  # preempted by an older one in this very step
                continue
            if len(sequence.tokens) - sequence.computed > 1:
                prompts.append(sequence)
            elif self._grow(sequence):
                step.append(Scheduled(sequence, sequence.computed, 1))
        budget -= len(step)
        for sequence in prompts:
            if budget == 0:
                break
            count = min(budget, len(sequence.tokens) - sequence.computed)
            step.append(Scheduled(sequence, sequence.computed, count))
            budget -= count
        while budget and self.waiting and len(self.running) < self.max_num_seqs:
            sequence = next(iter(self.waiting))
            if not self._join(sequence):
                self._blocked = sequence
                break
            count = min(budget, len(sequence.tokens) - sequence.computed)
            step.append(Scheduled(sequence, sequence.computed, count))
            budget -= count
        return step

    def ahead(self, step: SequenceOf[Scheduled]) -> list[Scheduled] | None:
        """The step after ``step``, which still runs, where that is certain without knowing its tokens.

        So it is where all that run decode, and nobody could join. Gives them blocks for the tokens that are still to
        come, as far as there are free ones; nobody is preempted.

        Returns:
            One token, which ``step`` is to choose, of each sequence that may have another after it; None: ``step`` is
            to be committed first.
        """
        items: list[Scheduled] = []
        running = 0
        for item in step:
            s = item.sequence
            if s not in self.running:  # ended since ``step`` was launched
                continue
            running += 1
            if not item.samples or s in self.followers:  # whom ``commit`` may release
                return None
            if len(s.tokens) + 1 < s.max_length:
                items.append(Scheduled(s, len(s.tokens), 1))
        if not items or running < len(self.running) or self._could_join(len(items), leaving=running - len(items)):
            return None
        return items if all(self._extend(item.sequence, item.start + 1) for item in items) else None

    def _could_join(self, tokens: int, leaving: int) -> bool:
        """Whether a waiting sequence might join a step of so many tokens, before which ``leaving`` sequences end."""
        if not self.waiting:
            return False
        if leaving:
            return True
        place = len(self.running) < self.max_num_seqs and tokens < self.max_step_tokens
        return place and next(iter(self.waiting)) is not self._blocked

    def commit(self, item: Scheduled) -> None:
        """Notes that a step has run: its full blocks can be found from now on."""
        s = item.sequence
        s.computed = item.start + item.count
        if self.enable_prefix_caching:
            full = s.computed // self.block_size
            self._name_blocks(s, full)
            for i in range(s.published, full):
                self.blocks.publish(s.blocks[i], s.digests[i])
            s.published = full
            if s in self.followers and s.computed >= self._shareable(s):
                self._release_followers(s)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its blocks."""
        if sequence in self.running:
            del self.running[sequence]
        elif sequence in self.waiting:
            del self.waiting[sequence]
        elif sequence in self._leader_of:
            leader = self._leader_of.pop(sequence)
            del self.followers[leader][sequence]
        self._release(sequence)
        if sequence in self.followers:
            self._release_followers(sequence)

    def reset_prefix_cache(self) -> None:
        """Forgets all prefixes; running sequences keep what they hold."""
        self.blocks.reset()

    def _join(self, sequence: Sequence) -> bool:
        """Moves a waiting sequence to the running ones if there is room for all of its tokens."""
        found: list[int] = []
        if self.enable_prefix_caching:
            count = sequence.skippable // self.block_size
            self._name_blocks(sequence, count)
            found = self.blocks.find(islice(sequence.digests, count))
        total = self._blocks_for(len(sequence.tokens))
        # without a spare block for each running sequence, one of the next steps would only preempt it again
        fresh = self.blocks.take(found, total - len(found), spare=len(self.running))
        if fresh is None:
            return False
        del self.waiting[sequence]
        self.running[sequence] = None
        sequence.blocks = array("i", [*found, *fresh])
        sequence.published = len(found)
        sequence.computed = len(found) * self.block_size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
            if self.enable_prefix_caching:
                self.prefix_query_tokens += sequence.skippable
                self.prefix_hit_tokens += sequence.computed
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """Gives a running sequence room for its last token, at the cost of the youngest; False if that is itself."""
        while not self._extend(sequence, len(sequence.tokens)):
            victim = next(reversed(self.running))
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _extend(self, sequence: Sequence, tokens: int) -> bool:
        """Gives a running sequence room for so many tokens, one more than it has at most; False: no block is free."""
        if len(sequence.blocks) * self.block_size >= tokens:
            return True
        fresh = self.blocks.take((), 1)
        if fresh is None:
            return False
        sequence.blocks.extend(fresh)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self._release(sequence)
        self.waiting[sequence] = None
        self.waiting.move_to_end(sequence, last=False)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        if sequence.blocks:
            self.blocks.release(sequence.blocks)
            self._blocked = None
        sequence.blocks = array("i")
        sequence.computed = sequence.published = 0

    def _release_followers(self, leader: Sequence) -> None:
        """Moves them to the head of the queue: they came when their leader came."""
        for sequence in reversed(self.followers.pop(leader)):
            del self._leader_of[sequence]
            self.waiting[sequence] = None
            self.waiting.move_to_end(sequence, last=False)

    def _shareable(self, sequence: Sequence) -> int:
        """How many of the prompt's tokens another completion of it can find in full blocks."""
        return (sequence.prompt_length - 1) // self.block_size * self.block_size

    def _name_blocks(self, sequence: Sequence, count: int) -> None:
        """Computes the digests of at least the first ``count`` blocks, which are full."""
        known, size = sequence.digests, self.block_size
        while len(known) < count:
            i = len(known) * size
            known.append(digest(known[-1] if known else b"", sequence.tokens[i : i + size]))

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)
