"""What a step finds out about its sequences, where the host waits for it: tokens and log-probabilities."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anyfp4.engine import sampler
from anyfp4.engine.model_runner import Logits, ModelRunner
from anyfp4.engine.outputs import TokenLogprobs
from anyfp4.engine.scheduler import Scheduled
from anyfp4.ops import sampling


@dataclass(slots=True)
class Result:
    """What a step found out about one sequence.

    Attributes:
        item: its share of the step.
        prompt_logprobs: of the tokens of the prompt that the step scored.
        token: the new one, if one was chosen.
        logprobs: of the new one, if asked for.
    """

    item: Scheduled
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    token: int | None = None
    logprobs: TokenLogprobs | None = None


#: whose a row of logits is, and the position that it predicts
_Owner = tuple[Result, int]


def compute(runner: ModelRunner, step: SequenceOf[Scheduled], eos: Collection[int]) -> list[Result]:
    """Runs the model and chooses tokens; changes no sequence.

    Args:
        runner: of the model.
        step: what to run.
        eos: tokens that end a sequence, besides its own stop tokens.
    """
    computed = runner.run(step)
    results = [Result(item) for item in step]
    owners = _wanted_rows(results)
    for tile in runner.logits(computed, list(owners)):
        _choose(runner, tile, [owners[row] for row in tile.rows], eos)
    return results


def _wanted_rows(results: SequenceOf[Result]) -> dict[int, _Owner]:
    """Rows of the hidden states whose logits matter."""
    owners: dict[int, _Owner] = {}
    offset = 0
    for result in results:
        item, s = result.item, result.item.sequence
        end = item.start + item.count
        if s.scores_prompt:
            # after a preemption the prompt's rows may run again, but are scored already
            first = max(item.start + 1, len(s.prompt_logprobs), 1)
            for position in range(first, min(end + 1, s.prompt_length)):
                owners[offset + position - 1 - item.start] = (result, position)
        if item.samples:
            owners[offset + item.count - 1] = (result, end)
        offset += item.count
    return owners


def _choose(runner: ModelRunner, tile: Logits, owners: SequenceOf[_Owner], eos: Collection[int]) -> None:
    """Log-probabilities and tokens from some rows of logits [len(owners), V], which are changed."""
    logits, ops = tile.values, runner.model.ops
    scored = [i for i, owner in enumerate(owners) if _candidates(*owner) is not None]
    logprobs = ops.log_softmax(_rows(logits, scored)) if scored else None
    chosen = [i for i, (result, position) in enumerate(owners) if position >= result.item.sequence.prompt_length]
    tokens = {i: result.item.sequence.tokens[position] for i, (result, position) in enumerate(owners)
              if position < result.item.sequence.prompt_length}  # fmt: skip
    if chosen:
        positions = {i: owners[i][1] for i in chosen}
        sequences = {i: owners[i][0].item.sequence for i in chosen}
        adjusted = {i: s for i, s in sequences.items() if sampler.adjusts(s, positions[i])}
        sampler.adjust(logits, adjusted, eos)
        best = tile.best if not adjusted and len(chosen) == len(owners) else None
        choices = [sampler.choice(s, positions[i]) for i, s in sequences.items()]
        tokens.update(zip(chosen, ops.sample(_rows(logits, chosen), choices, best), strict=True))
    found: dict[int, TokenLogprobs] = {}
    if logprobs is not None:
        most = max(_candidates(*owners[i]) or 0 for i in scored)
        ranked = sampling.rank(logprobs, [tokens[i] for i in scored], most)
        for i, row in zip(scored, ranked, strict=True):
            found[i] = sampler.token_logprobs(row, tokens[i], _candidates(*owners[i]) or 0)
    for i, (result, position) in enumerate(owners):
        if position < result.item.sequence.prompt_length:
            result.prompt_logprobs.append(found[i])
        else:
            result.token, result.logprobs = tokens[i], found.get(i)


def _rows(logits: Tensor, rows: SequenceOf[int]) -> Tensor:
    """Some rows of ``logits``: itself if these are all."""
    return logits if len(rows) == logits.shape[0] else logits[torch.tensor(rows, device=logits.device)]


def _candidates(result: Result, position: int) -> int | None:
    """How many most likely tokens are wanted at a position; None: no log-probabilities at all."""
    s = result.item.sequence
    return s.params.prompt_logprobs if position < s.prompt_length else s.params.logprobs
