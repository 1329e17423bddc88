"""Runs the model on a scheduled step, and hands back the logits of the rows that need them."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from anyfp4.engine.graphs import StepGraphs
from anyfp4.engine.inputs import Feed, StepInputs, gather
from anyfp4.engine.scheduler import Scheduled
from anyfp4.layers.attention import LayerCache
from anyfp4.models.decoder import Decoder
from anyfp4.ops.attention import AttentionBatch

#: rows of logits that are held at a time
LOGITS_TILE = 64


@dataclass(frozen=True)
class Computed:
    """What a step computed; from a CUDA graph, it lives until the next step.

    Attributes:
        hidden: [T, hidden].
        last: each sequence's last row, if a graph computed the logits of these too.
        logits: float32 [S, V] of the last rows.
        best: (ids, values) [S] of their largest logits, if the graph found them.
    """

    hidden: Tensor
    last: SequenceOf[int] | None = None
    logits: Tensor | None = None
    best: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Logits:
    """Logits of some rows of a step.

    Attributes:
        rows: which.
        values: float32 [len(rows), V].
        best: (ids, values) [len(rows)] of the largest, if they are known.
    """

    rows: SequenceOf[int]
    values: Tensor
    best: tuple[Tensor, Tensor] | None = None


class ModelRunner:
    """Runs the model over the paged cache."""

    def __init__(
        self,
        model: Decoder,
        caches: SequenceOf[LayerCache],
        block_size: int,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.model, self.caches, self.block_size, self.graphs = model, caches, block_size, graphs

    def run(self, step: SequenceOf[Scheduled], feed: Feed | None = None) -> Computed:
        """Runs all tokens of a step.

        Args:
            step: what to run.
            feed: its tokens, where the host does not know them yet.
        """
        inputs = self.inputs(step)
        shape = None if self.graphs is None else self.graphs.shape_of(inputs)
        if self.graphs is not None and shape is not None:
            results = self.graphs.run(inputs, shape, feed)
            last = (inputs.query_start[1:] - 1).tolist()
            return Computed(results.hidden, last, results.logits, results.best)
        tokens, positions, batch = inputs.on(self.model.device)
        if feed is not None:
            tokens = feed.tokens.index_select(0, torch.from_numpy(feed.rows).to(self.model.device))
        return Computed(self.model.forward(tokens, positions, self.caches, batch))

    def padding_sizes(self, most: int) -> list[int]:
        """Numbers of tokens, up to ``most``, that between them use every kernel which a prompt can."""
        return sorted({min(most, tokens) for tokens in (2, 16, 48, 128, 512, most)})

    def run_padding(self, tokens: int) -> None:
        """Runs one sequence of so many tokens that are stored nowhere and see no keys."""
        device, places = self.model.device, torch.arange(tokens)
        batch = AttentionBatch(
            query_start=torch.tensor([0, tokens], dtype=torch.int32, device=device),
            context_len=torch.zeros(1, dtype=torch.int32, device=device),
            block_table=torch.zeros((1, 1), dtype=torch.int32, device=device),
            slots=torch.full((tokens,), -1, device=device),
        )
        positions = (places % self.model.cos_sin.shape[0]).to(device)
        self.model.logits(self.model.forward(torch.zeros_like(positions), positions, self.caches, batch)[:1])

    def inputs(self, step: SequenceOf[Scheduled]) -> StepInputs:
        """A step's tokens, their positions, and which belongs to which sequence."""
        return gather(step, self.block_size)

    def one_tile(self, step: SequenceOf[Scheduled]) -> bool:
        """Whether :meth:`logits` gives those of each sequence's last row at once."""
        if len(step) <= LOGITS_TILE:
            return True
        return self.graphs is not None and self.graphs.smallest(sum(item.count for item in step), len(step)) is not None

    def logits(self, computed: Computed, rows: SequenceOf[int]) -> Iterator[Logits]:
        """The logits of some rows of a step, some at a time."""
        if not rows:
            return
        if computed.last is not None and computed.logits is not None:
            if list(rows) == computed.last:
                yield Logits(rows, computed.logits, computed.best)
                return
            place = {row: i for i, row in enumerate(computed.last)}
            if all(row in place for row in rows):
                yield Logits(rows, computed.logits[self._index([place[row] for row in rows])])
                return
        for i in range(0, len(rows), LOGITS_TILE):
            tile = rows[i : i + LOGITS_TILE]
            yield Logits(tile, self.model.logits(computed.hidden[self._index(tile)]))

    def _index(self, rows: SequenceOf[int]) -> Tensor:
        return torch.tensor(rows, device=self.model.device)
