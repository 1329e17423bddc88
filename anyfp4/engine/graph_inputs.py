"""The inputs of CUDA graphs: fixed places on the GPU, filled by one copy from pinned memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyfp4.engine.inputs import StepInputs


class _Views:
    """Where a step's inputs lie in one piece of memory, the block table last.

    Attributes:
        tokens, positions, slots: int64 [T].
        last: int64 [S], the last token of each sequence.
        query_start: int32 [S + 1].
        context_len: int32 [S].
        block_table: int32 [S, B].
    """

    def __init__(self, memory: Tensor, tokens: int, sequences: int, blocks: int) -> None:
        place = 0

        def take(count: int, dtype: torch.dtype) -> Tensor:
            nonlocal place
            size = count * dtype.itemsize
            found = memory[place : place + size].view(dtype)
            place += size + -size % 16
            return found

        self.tokens, self.positions, self.slots = (take(tokens, torch.int64) for _ in range(3))
        self.last = take(sequences, torch.int64)
        self.query_start = take(sequences + 1, torch.int32)
        self.context_len = take(sequences, torch.int32)
        self.head = place
        self.block_table = take(sequences * blocks, torch.int32).view(sequences, blocks)
        self.nbytes = place


class GraphInputs:
    """Memory on the GPU, and two pieces of pinned memory that take turns, so that none is written while it is read."""

    def __init__(self, tokens: int, sequences: int, blocks: int, device: torch.device) -> None:
        """Allocates for so many tokens, sequences, and blocks of a sequence."""
        sizes = (tokens, sequences, blocks)
        most = 8 * (3 * tokens + sequences) + 4 * sequences * (blocks + 2) + 8 * 16
        cuda = device.type == "cuda"
        self._device_memory = torch.zeros(most, dtype=torch.uint8, device=device)
        self.on_device = _Views(self._device_memory, *sizes)
        self._hosts = [torch.zeros(most, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
        self._host_views = [_Views(memory, *sizes) for memory in self._hosts]
        self._copied: list[Any] = [torch.cuda.Event() if cuda else None for _ in range(2)]
        self._turn = 0

    def fill(self, inputs: StepInputs | None, tokens: int, sequences: int) -> None:
        """Puts a step in place, padded to so many tokens and sequences; None: nothing but padding.

        A sequence that pads has no keys, its tokens no slots. In a step of as many tokens as sequences each has one;
        otherwise the tokens that pad belong to the last sequence.
        """
        self._turn ^= 1
        memory, to, copied = self._hosts[self._turn], self._host_views[self._turn], self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        used_tokens = used = width = 0
        if inputs is not None:
            used_tokens, used, width = len(inputs.tokens), inputs.sequences, inputs.block_table.shape[1]
            for name in ("tokens", "positions", "slots"):
                getattr(to, name)[:used_tokens] = torch.from_numpy(getattr(inputs, name))
            starts = torch.from_numpy(inputs.query_start)
            to.query_start[: used + 1] = starts
            to.last[:used] = starts[1:] - 1
            to.context_len[:used] = torch.from_numpy(inputs.context_len)
            to.block_table[:used, :width] = torch.from_numpy(inputs.block_table)
        for name, padding in (("tokens", 0), ("positions", 0), ("slots", -1)):
            getattr(to, name)[used_tokens:tokens] = padding
        to.last[used:sequences] = 0
        to.context_len[used:sequences] = 0
        if tokens == sequences:
            to.query_start[used : sequences + 1] = torch.arange(used, sequences + 1, dtype=torch.int32)
        else:
            to.query_start[used:sequences] = used_tokens
            to.query_start[sequences] = tokens
        end = to.head + 4 * used * to.block_table.shape[1]
        self._device_memory[:end].copy_(memory[:end], non_blocking=True)
        if copied is not None:
            copied.record()
