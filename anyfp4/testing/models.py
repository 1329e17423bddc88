"""Running a decoder outside the engine: all logits of one sequence, in any chunks."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from anyfp4.engine import kv_cache
from anyfp4.engine.config import SamplingParams
from anyfp4.engine.model_runner import ModelRunner
from anyfp4.engine.scheduler import Scheduled
from anyfp4.engine.sequence import Sequence as EngineSequence
from anyfp4.models.decoder import Decoder


def all_logits(
    decoder: Decoder, tokens: Sequence[int], *, chunks: Sequence[int] | None = None, block_size: int = 16
) -> Tensor:
    """The logits after every token of a sequence.

    Args:
        decoder: the model.
        tokens: the sequence.
        chunks: sizes of the steps it is cut into; one step by default.
        block_size: tokens of one cache block.

    Returns:
        float32 [len(tokens), vocab].
    """
    count = -(-len(tokens) // block_size)
    runner = ModelRunner(decoder, kv_cache.allocate(decoder, count, block_size), block_size)
    sequence = EngineSequence(
        request_id="0",
        index=0,
        tokens=list(tokens),
        prompt_length=len(tokens),
        params=SamplingParams(),
        seed=0,
        max_length=len(tokens) + 1,
        blocks=array("i", range(count)),
    )
    parts, start = [], 0
    for size in chunks or [len(tokens)]:
        computed = runner.run([Scheduled(sequence, start, size)])
        parts += [logits.values for logits in runner.logits(computed, range(size))]
        start += size
    return torch.cat(parts)
