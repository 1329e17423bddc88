"""Turns a scheduled step into tensors, runs the model, and hands back the logits of the rows that need them."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

import numpy as np
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
        tokens, positions, batch = self.inputs(step)
        return self.model.forward(tokens, positions, self.caches, batch)

    def inputs(self, step: SequenceOf[Scheduled]) -> tuple[Tensor, Tensor, AttentionBatch]:
        """A step's tokens (int64 [T]), their positions (int64 [T]), and which belongs to which sequence."""
        counts = np.array([item.count for item in step], dtype=np.int64)
        first = np.array([item.start for item in step], dtype=np.int64)
        starts = np.zeros(len(step) + 1, dtype=np.int64)
        np.cumsum(counts, out=starts[1:])
        owner = np.repeat(np.arange(len(step)), counts)  # [T]: which item of the step each token belongs to
        positions = np.arange(starts[-1]) - starts[owner] + first[owner]

        table = np.zeros((len(step), max(len(item.sequence.blocks) for item in step)), dtype=np.int32)
        tokens: list[int] = []
        for row, item in zip(table, step, strict=True):
            blocks = item.sequence.blocks
            row[: len(blocks)] = np.frombuffer(blocks, dtype=np.int32)
            tokens += item.sequence.tokens[item.start : item.start + item.count]
        slots = table[owner, positions // self.block_size] * np.int64(self.block_size) + positions % self.block_size

        batch = AttentionBatch(
            query_start=self._tensor(starts.astype(np.int32)),
            context_len=self._tensor((first + counts).astype(np.int32)),
            block_table=self._tensor(table),
            slots=self._tensor(slots),
        )
        return self._tensor(np.array(tokens, dtype=np.int64)), self._tensor(positions), batch

    def _tensor(self, values: np.ndarray[tuple[int, ...], np.dtype[np.int32 | np.int64]]) -> Tensor:
        return torch.from_numpy(values).to(self.model.device)

    def logits(self, hidden: Tensor, rows: SequenceOf[int]) -> Iterator[tuple[SequenceOf[int], Tensor]]:
        """The logits of some rows of ``hidden``, a tile at a time: (rows, float32 [len(rows), vocab])."""
        for i in range(0, len(rows), LOGITS_TILE):
            tile = rows[i : i + LOGITS_TILE]
            yield tile, self.model.logits(hidden[torch.tensor(tile, device=hidden.device)])
