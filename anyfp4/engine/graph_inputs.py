"""The inputs of CUDA graphs: fixed places on the GPU, filled by one copy from pinned memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anyfp4.engine.inputs import Feed, StepInputs

_Array = TypeVar("_Array", Tensor, npt.NDArray[Any])


@dataclass(frozen=True)
class Places(Generic[_Array]):
    """A step's inputs side by side in one piece of memory, the block table last.

    Attributes:
        tokens: int64 [T].
        positions: int64 [T].
        slots: int64 [T].
        source: int64 [T], which token of the step before each token is, where the host does not know it.
        last: int64 [S], the last token of each sequence.
        query_start: int32 [S + 1].
        context_len: int32 [S].
        block_table: int32 [S, B].
    """

    tokens: _Array
    positions: _Array
    slots: _Array
    source: _Array
    last: _Array
    query_start: _Array
    context_len: _Array
    block_table: _Array


class GraphInputs:
    """Memory on the GPU, and two pieces of pinned memory that take turns, so that none is written while it is read."""

    def __init__(self, tokens: int, sequences: int, blocks: int, device: torch.device) -> None:
        """Allocates for so many tokens, sequences, and blocks of a sequence."""
        cuda = device.type == "cuda"
        counts = [tokens, tokens, tokens, tokens, sequences, sequences + 1, sequences, sequences * blocks]
        types = [np.dtype(np.int64)] * 5 + [np.dtype(np.int32)] * 3
        # each begins at a multiple of 16 bytes, as kernels may expect of their arguments
        sizes = [-(-count * kind.itemsize // 16) * 16 for count, kind in zip(counts, types, strict=True)]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._head, self._row = starts[-1], 4 * blocks
        memory = [torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
        self._hosts: list[tuple[Tensor, Places[npt.NDArray[Any]], Any]] = []
        for piece in memory:
            data = piece.numpy()
            views = [
                data[start : start + count * kind.itemsize].view(kind)
                for start, count, kind in zip(starts, counts, types, strict=True)
            ]
            views[-1] = views[-1].reshape(sequences, blocks)
            self._hosts.append((piece, Places(*views), torch.cuda.Event() if cuda else None))
        self._memory = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        parts = [
            self._memory[start : start + count * kind.itemsize].view(torch.int64 if kind.itemsize == 8 else torch.int32)
            for start, count, kind in zip(starts, counts, types, strict=True)
        ]
        parts[-1] = parts[-1].view(sequences, blocks)
        self.on_device = Places(*parts)
        self._turn = 0

    def fill(self, inputs: StepInputs | None, tokens: int, sequences: int, feed: Feed | None = None) -> None:
        """Puts a step in place, padded to so many tokens and sequences; None: nothing but padding.

        A sequence that pads has no keys, its tokens no slots. In a step of as many tokens as sequences each has one;
        otherwise the tokens that pad belong to the last sequence.

        Args:
            inputs: the step.
            tokens: in all.
            sequences: in all.
            feed: where the step's tokens come from, if the host does not know them. They are taken before whatever is
                launched next.
        """
        self._turn ^= 1
        memory, to, copied = self._hosts[self._turn]
        if copied is not None:
            copied.synchronize()
        count = used = 0
        if inputs is not None:
            count, used = len(inputs.tokens), inputs.sequences
            to.tokens[:count], to.positions[:count], to.slots[:count] = inputs.tokens, inputs.positions, inputs.slots
            to.query_start[: used + 1], to.context_len[:used] = inputs.query_start, inputs.context_len
            to.last[:used] = inputs.query_start[1:] - 1
            to.block_table[:used, : inputs.block_table.shape[1]] = inputs.block_table
        if feed is not None:
            to.source[:count] = feed.rows
        to.tokens[count:tokens] = to.positions[count:tokens] = 0
        to.slots[count:tokens] = -1
        to.last[used:sequences] = to.context_len[used:sequences] = 0
        if tokens == sequences:
            to.query_start[used : sequences + 1] = np.arange(used, sequences + 1)
        else:
            to.query_start[used:sequences] = count
            to.query_start[sequences] = tokens
        end = self._head + used * self._row
        self._memory[:end].copy_(memory[:end], non_blocking=True)
        if copied is not None:
            copied.record()
        if feed is not None:
            here = self.on_device
            torch.index_select(feed.tokens, 0, here.source[:count], out=here.tokens[:count])
