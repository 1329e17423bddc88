"""Decode steps as CUDA graphs: one launch for all kernels of a step in which every sequence has one new token.

A graph is captured for each padded number of sequences when that number is first needed, or by ``capture_all``. Rows
that pad a step belong to sequences of no keys whose slots lie outside the cache: they store nothing, and since no row
depends on another, nothing shows. A step's inputs go to the GPU in one copy, and nothing in a graph waits for the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from anyfp4.engine.inputs import StepInputs
from anyfp4.layers.attention import LayerCache
from anyfp4.models.decoder import Decoder
from anyfp4.ops.attention import AttentionBatch

#: sequences of the largest graph: beyond, kernels run for so long that launching them costs nothing
MOST_SEQUENCES = 512
_LOG = logging.getLogger(__name__)


def sizes(most: int) -> list[int]:
    """The padded numbers of sequences, at most ``most`` and at most :data:`MOST_SEQUENCES`."""
    most = min(most, MOST_SEQUENCES)
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, MOST_SEQUENCES + 1, 32)]
    return [*(size for size in steps if size < most), most]


def why_no_graphs(model: Decoder) -> str | None:
    """Why a model's decode steps cannot run as CUDA graphs; None if they can."""
    if model.device.type != "cuda":
        return f"a {model.device.type} has no CUDA graphs"
    if model.fused is None:
        return f"the {model.ops.name} backend runs this model's layers op by op"
    return None


class Replays(Protocol):
    """A captured graph."""

    def replay(self) -> None:
        """Runs it again."""
        ...


@dataclass(frozen=True)
class _Graph:
    """A captured step and where it leaves its results: hidden [P, H], logits float32 [P, V], best (ids, values) [P]."""

    graph: Replays
    hidden: Tensor
    logits: Tensor
    best: tuple[Tensor, Tensor] | None


class DecodeGraphs:
    """The graphs of one model over one cache."""

    def __init__(
        self, model: Decoder, caches: Sequence[LayerCache], block_size: int, max_num_seqs: int, max_blocks: int
    ) -> None:
        """Allocates the inputs that the graphs read.

        Args:
            model: on a GPU.
            caches: of each layer.
            block_size: tokens of a block.
            max_num_seqs: sequences of a step at most.
            max_blocks: blocks of a sequence at most.
        """
        self.model, self.caches, self.block_size = model, caches, block_size
        self.sizes = sizes(max_num_seqs)
        most = self.sizes[-1]
        self._layout = _Layout(most, max_blocks)
        self._host = torch.zeros(self._layout.nbytes, dtype=torch.uint8, pin_memory=model.device.type == "cuda")
        self._device = torch.zeros(self._layout.nbytes, dtype=torch.uint8, device=model.device)
        self._host_views, self._views = self._layout.views(self._host), self._layout.views(self._device)
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=model.device)
        self._graphs: dict[int, _Graph] = {}
        self._pool: Any = None

    def capture_all(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Captures every size now, the largest first, so that the others share its memory.

        Args:
            progress: called with (graphs captured, graphs in all).
        """
        for done, size in enumerate(reversed(self.sizes), start=1):
            self._graph(size)
            if progress is not None:
                progress(done, len(self.sizes))

    def covers(self, inputs: StepInputs) -> bool:
        """Whether a step can run as a graph: one new token for each sequence, and not too many of them."""
        return inputs.sequences == len(inputs.tokens) <= self.sizes[-1]

    def run(self, inputs: StepInputs) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Runs a step that is covered.

        Returns:
            hidden [S, H], logits float32 [S, V], and their best (ids int64 [S], values float32 [S]) if the backend
            finds them on the device. All are overwritten by the next call.
        """
        count = inputs.sequences
        size = next(s for s in self.sizes if s >= count)
        graph = self._graph(size)
        self._fill(inputs, size)
        graph.graph.replay()
        best = None if graph.best is None else (graph.best[0][:count], graph.best[1][:count])
        return graph.hidden[:count], graph.logits[:count], best

    def _fill(self, inputs: StepInputs, size: int) -> None:
        count, views = inputs.sequences, self._host_views
        for name, padding in _PADDING.items():
            views[name][:count] = torch.from_numpy(getattr(inputs, name))
            views[name][count:size] = padding
        table = torch.from_numpy(inputs.block_table)
        views["block_table"][:count, : table.shape[1]] = table
        used = self._layout.used(count)
        # the previous step's copy is done: its tokens came back
        self._device[:used].copy_(self._host[:used], non_blocking=True)

    def _graph(self, size: int) -> _Graph:
        if size not in self._graphs:
            # what runs before the first replay stores nothing
            for name, padding in _PADDING.items():
                self._views[name][:size] = padding
            self._graphs[size] = self._capture(size)
        return self._graphs[size]

    def _step(self, size: int) -> Callable[[], tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]]:
        """What a graph of ``size`` sequences does: the model on the first rows of the inputs."""
        views = self._views
        batch = AttentionBatch(
            query_start=self._starts[: size + 1],
            context_len=views["context_len"][:size],
            block_table=views["block_table"][:size],
            slots=views["slots"][:size],
        )

        def step() -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
            hidden = self.model.forward(views["tokens"][:size], views["positions"][:size], self.caches, batch)
            logits = self.model.logits(hidden)
            return hidden, logits, self.model.ops.greedy(logits)

        return step

    def _capture(self, size: int) -> _Graph:
        _LOG.debug("capturing the decode step of %d sequences", size)
        step = self._step(size)
        stream = torch.cuda.Stream(self.model.device)
        stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(stream):
            step()  # compiles what was never launched before; that must not happen while capturing
        stream.synchronize()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            results = step()
        return _Graph(graph, *results)


#: what a row that pads a step holds
_PADDING = {"tokens": 0, "positions": 0, "slots": -1, "context_len": 0}


class _Layout:
    """Where a step's inputs lie in one piece of memory, the block table last."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.width = rows, width
        self._table = rows * (3 * 8 + 4)
        # the table's rows begin at a multiple of 16 bytes
        self._table += -self._table % 16
        self.nbytes = self._table + 4 * rows * width

    def used(self, rows: int) -> int:
        """Bytes up to the end of the table's first rows."""
        return self._table + 4 * rows * self.width

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """Tensors over ``memory``: int64 [rows] tokens, positions, slots; int32 context_len; int32 block_table."""
        found, start = {}, 0
        for name in ("tokens", "positions", "slots"):
            found[name] = memory[start : start + 8 * self.rows].view(torch.int64)
            start += 8 * self.rows
        found["context_len"] = memory[start : start + 4 * self.rows].view(torch.int32)
        found["block_table"] = memory[self._table :].view(torch.int32).view(self.rows, self.width)
        return found
