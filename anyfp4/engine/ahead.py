"""Async scheduling: steps that are launched before the tokens of the step before them were read.

Between two decode steps the host reads tokens, finds out who has ended, schedules, and prepares inputs. If the device
had to wait for that, it would idle after each step. So while a step runs (a *flight*: launched, its tokens not read),
the engine launches the next one, whose input tokens go from one step to the other on the device.

What cannot be known yet is whether a token ends its sequence. If it does, its row in the step ahead was for nothing: it
wrote one slot of a block that the sequence held when the step was launched, and that was not full, so nobody else holds
or can find it. Whoever gets the block later writes its slots in a step that was launched later, before reading them.

A step flies if choosing its tokens takes nothing but logits and sampling parameters. With bias, penalties,
``min_tokens`` or log-probabilities the host has a part in it; such steps run as if there was no async scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from anyfp4.engine import sampler
from anyfp4.engine.inputs import Feed
from anyfp4.engine.model_runner import ModelRunner
from anyfp4.engine.scheduler import Scheduled
from anyfp4.ops.chosen import Chosen


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched.

    Attributes:
        step: its items; each samples.
        chosen: a token for each of them.
    """

    step: SequenceOf[Scheduled]
    chosen: Chosen

    @property
    def over(self) -> bool:
        """Whether nobody waits for its tokens any more."""
        return all(item.sequence.finished for item in self.step)


def can_fly(runner: ModelRunner, step: SequenceOf[Scheduled], after: Flight | None = None) -> bool:
    """Whether a step's tokens can be chosen without the host.

    Args:
        runner: of the model.
        step: the items, of which each is to sample.
        after: the flight that brings each item's last token; None: all tokens are known.
    """
    return (
        (after is not None or all(item.samples for item in step)) and all(map(_plain, step)) and runner.one_tile(step)
    )


def _plain(item: Scheduled) -> bool:
    s = item.sequence
    return not (
        s.host_samples
        or s.params.logprobs is not None
        or (s.scores_prompt and item.start < s.prompt_length)
        or sampler.adjusts(s, item.start + item.count)
    )


def launch(runner: ModelRunner, step: SequenceOf[Scheduled], after: Flight | None = None) -> Flight:
    """Runs the model and starts to choose tokens, without waiting; changes no sequence. Arguments as above."""
    if after is None:
        computed = runner.run(step)
    else:
        place = {item.sequence: i for i, item in enumerate(after.step)}
        rows = np.fromiter((place[item.sequence] for item in step), dtype=np.int64, count=len(step))
        computed = runner.run(step, Feed(after.chosen.tokens, rows))
    last = np.cumsum([item.count for item in step]) - 1
    (tile,) = runner.logits(computed, last.tolist())
    choices = [sampler.choice(item.sequence, item.start + item.count) for item in step]
    return Flight(step, runner.model.ops.choose(tile.values, choices, tile.best))
