"""Steps as CUDA graphs: one launch for all kernels of a step, where launching them one by one would take longer.

A graph is captured for a padded number of tokens and of sequences when that pair is first needed, or by
``capture_all``. There are two kinds: decode steps, in which every sequence has one token, for fine steps of their
number; and mixed steps (prompts, beside sequences that decode), for coarse steps of the number of tokens. What pads a
step belongs to sequences of no keys and to slots outside the cache: it stores nothing, and since no row depends on
another, nothing shows. A step's inputs go to the GPU in one copy, and nothing in a graph waits for the host.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from anyfp4.engine.graph_inputs import GraphInputs
from anyfp4.engine.inputs import Feed, StepInputs
from anyfp4.layers.attention import LayerCache
from anyfp4.models.decoder import Decoder
from anyfp4.ops.attention import AttentionBatch

#: tokens, and so sequences, of the largest graph: beyond, kernels run for longer than it takes to launch them
MOST_TOKENS = 512
#: sequences of mixed steps: few, or as many as the engine runs
_FEW_SEQUENCES = 8
#: collecting garbage is a matter of the whole process: one thread captures at a time
_CAPTURES = threading.Lock()
_LOG = logging.getLogger(__name__)


class Shape(NamedTuple):
    """What a graph was captured for; a mixed step has one sequence more than it can hold, for tokens that pad it."""

    tokens: int
    sequences: int


def decode_shapes(most: int) -> list[Shape]:
    """The padded numbers of sequences that decode, at most ``most`` and at most :data:`MOST_TOKENS`."""
    most = min(most, MOST_TOKENS)
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, MOST_TOKENS + 1, 32)]
    return [Shape(size, size) for size in (*(size for size in steps if size < most), most)]


def mixed_shapes(max_tokens: int, max_sequences: int) -> list[Shape]:
    """The padded sizes of steps with prompts."""
    most = min(max_tokens, MOST_TOKENS)
    tokens = [size for size in (8, 16, 32, 64, 128, 192, 256, 384) if size < most]
    sequences = sorted({min(_FEW_SEQUENCES, max_sequences), min(max_sequences, MOST_TOKENS)})
    pairs = [(t, min(s, t) + 1) for t in (*tokens, most) for s in sequences if s == sequences[0] or s <= t]
    # as many sequences as tokens would be a decode step
    return [Shape(t, s + (s == t)) for t, s in pairs]


def why_no_graphs(model: Decoder) -> str | None:
    """Why a model's steps cannot run as CUDA graphs; None if they can."""
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
class Results:
    """What a step leaves behind, until the next step.

    Attributes:
        hidden: [T, H] of all tokens.
        logits: float32 [S, V] of each sequence's last token.
        best: (ids int64 [S], values float32 [S]) of the largest logits, if the backend finds them on the device.
    """

    hidden: Tensor
    logits: Tensor
    best: tuple[Tensor, Tensor] | None

    def first(self, tokens: int, sequences: int) -> Results:
        """Without what pads it."""
        best = None if self.best is None else (self.best[0][:sequences], self.best[1][:sequences])
        return Results(self.hidden[:tokens], self.logits[:sequences], best)


class StepGraphs:
    """The graphs of one model over one cache."""

    def __init__(
        self,
        model: Decoder,
        caches: Sequence[LayerCache],
        max_sequences: int,
        max_tokens: int,
        max_blocks: int,
    ) -> None:
        """Allocates the inputs that the graphs read.

        Args:
            model: on a GPU.
            caches: of each layer.
            max_sequences: of a step.
            max_tokens: of a step.
            max_blocks: blocks of a sequence at most.
        """
        self.model, self.caches = model, caches
        self.decode = decode_shapes(min(max_sequences, max_tokens))
        self.mixed = mixed_shapes(max_tokens, max_sequences)
        largest = (*self.decode, *self.mixed)
        self.inputs = GraphInputs(
            max(shape.tokens for shape in largest), max(shape.sequences for shape in largest), max_blocks, model.device
        )
        self._captured: dict[Shape, tuple[Replays, Results]] = {}
        self._pool: Any = None

    @property
    def shapes(self) -> list[Shape]:
        """All that can be captured, the largest first, so that the others share its memory."""
        return sorted((*self.decode, *self.mixed), reverse=True)

    def capture_all(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Captures every graph now.

        Args:
            progress: called with (graphs captured, graphs in all).
        """
        shapes = self.shapes
        for done, shape in enumerate(shapes, start=1):
            self._graph(shape)
            if progress is not None:
                progress(done, len(shapes))

    def shape_of(self, inputs: StepInputs) -> Shape | None:
        """The smallest graph that a step fits; None if it fits none."""
        return self.smallest(len(inputs.tokens), inputs.sequences)

    def smallest(self, tokens: int, sequences: int) -> Shape | None:
        """:meth:`shape_of` a step of so many tokens and sequences."""
        if tokens == sequences:
            return next((shape for shape in self.decode if shape.tokens >= tokens), None)
        return next((shape for shape in self.mixed if shape.tokens >= tokens and shape.sequences > sequences), None)

    def run(self, inputs: StepInputs, shape: Shape, feed: Feed | None = None) -> Results:
        """Runs a step as the graph of a shape that it fits.

        Args:
            inputs: the step.
            shape: that it fits.
            feed: its tokens, if the host does not know them. They may be part of the results of the step before: they
                are taken before the graph overwrites them.
        """
        graph, results = self._graph(shape)
        self.inputs.fill(inputs, shape.tokens, shape.sequences, feed)
        graph.replay()
        return results.first(len(inputs.tokens), inputs.sequences)

    def _graph(self, shape: Shape) -> tuple[Replays, Results]:
        if shape not in self._captured:
            _LOG.debug("capturing steps of %d tokens and %d sequences", *shape)
            # what runs before the first replay stores nothing
            self.inputs.fill(None, shape.tokens, shape.sequences)
            self._captured[shape] = self._capture(self._step(shape))
        return self._captured[shape]

    def _step(self, shape: Shape) -> Callable[[], Results]:
        """What a graph does: the model on the first tokens and sequences of the inputs."""
        tokens, sequences = shape
        i = self.inputs.on_device
        batch = AttentionBatch(
            query_start=i.query_start[: sequences + 1],
            context_len=i.context_len[:sequences],
            block_table=i.block_table[:sequences],
            slots=i.slots[:tokens],
        )

        def step() -> Results:
            hidden = self.model.forward(i.tokens[:tokens], i.positions[:tokens], self.caches, batch)
            logits = self.model.logits(hidden if tokens == sequences else hidden[i.last[:sequences]])
            return Results(hidden, logits, self.model.ops.greedy(logits))

        return step

    def _capture(self, step: Callable[[], Results]) -> tuple[Replays, Results]:
        device = self.model.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            step()  # compiles what was never launched before; that must not happen while capturing
        stream.synchronize()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with (
            _garbage_kept(),
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
        ):
            results = step()
        return graph, results


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Keeps Python from collecting garbage: were it the graphs of another engine, freeing them would end a capture."""
    with _CAPTURES:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()
