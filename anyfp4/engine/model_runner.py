"""Turns a scheduled step into tensors, runs the model, and hands back the logits of the rows that need them."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from anyfp4.engine.scheduler import Scheduled
from anyfp4.layers.attention import LayerCache
from anyfp4.models.decoder import Decoder
from anyfp4.ops.attention import AttentionBatch

#: rows of logits that are held at a time
LOGITS_TILE = 64


class ModelRunner:
    """Runs the model over the paged cache."""

    def __init__(self, model: Decoder, caches: SequenceOf[LayerCache], block_size: int) -> None:
        self.model, self.caches, self.block_size = model, caches, block_size

    def run(self, step: SequenceOf[Scheduled]) -> Tensor:
        """Runs a step and returns the hidden states of all its tokens: [T, hidden]."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for item in step:
            s = item.sequence
            span = range(item.start, item.start + item.count)
            tokens += s.tokens[item.start : item.start + item.count]
            positions += span
            slots += [s.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in span]
            starts.append(len(tokens))
        device = self.model.device
        width = max(len(item.sequence.blocks) for item in step)
        table = [item.sequence.blocks + [0] * (width - len(item.sequence.blocks)) for item in step]
        batch = AttentionBatch(
            query_start=torch.tensor(starts, dtype=torch.int32, device=device),
            context_len=torch.tensor([i.start + i.count for i in step], dtype=torch.int32, device=device),
            block_table=torch.tensor(table, dtype=torch.int32, device=device),
            slots=torch.tensor(slots, dtype=torch.int64, device=device),
        )
        return self.model.forward(
            torch.tensor(tokens, dtype=torch.int64, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
            self.caches,
            batch,
        )

    def logits(self, hidden: Tensor, rows: SequenceOf[int]) -> Iterator[tuple[SequenceOf[int], Tensor]]:
        """The logits of some rows of ``hidden``, a tile at a time: (rows, float32 [len(rows), vocab])."""
        for i in range(0, len(rows), LOGITS_TILE):
            tile = rows[i : i + LOGITS_TILE]
            yield tile, self.model.logits(hidden[torch.tensor(tile, device=hidden.device)])
