"""What a scheduled step asks of the model, as arrays on the host."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anyfp4.engine.scheduler import Scheduled
from anyfp4.ops.attention import AttentionBatch


@dataclass(frozen=True)
class StepInputs:
    """The T new tokens of S sequences, one sequence after another; see :class:`AttentionBatch`.

    Attributes:
        tokens: int64 [T].
        positions: int64 [T].
        query_start: int32 [S + 1].
        context_len: int32 [S].
        block_table: int32 [S, B].
        slots: int64 [T].
    """

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    query_start: npt.NDArray[np.int32]
    context_len: npt.NDArray[np.int32]
    block_table: npt.NDArray[np.int32]
    slots: npt.NDArray[np.int64]

    @property
    def sequences(self) -> int:
        """S."""
        return len(self.context_len)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, AttentionBatch]:
        """Tokens, positions and batch as tensors."""

        def move(values: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(values).to(device)

        batch = AttentionBatch(
            query_start=move(self.query_start),
            context_len=move(self.context_len),
            block_table=move(self.block_table),
            slots=move(self.slots),
        )
        return move(self.tokens), move(self.positions), batch


@dataclass(frozen=True)
class Feed:
    """The tokens of a step, where the step before has chosen them and the host does not know them.

    Attributes:
        tokens: int64 [R] on the device, of the step before.
        rows: int64 [T], which of them each token of this step is.
    """

    tokens: Tensor
    rows: npt.NDArray[np.int64]


def gather(step: SequenceOf[Scheduled], block_size: int) -> StepInputs:
    """The inputs of a step over a cache with blocks of ``block_size`` tokens; tokens that are not known yet are 0."""
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
        known = item.sequence.tokens[item.start : item.start + item.count]
        tokens += known
        tokens += [0] * (item.count - len(known))
    slots = table[owner, positions // block_size] * np.int64(block_size) + positions % block_size
    return StepInputs(
        tokens=np.array(tokens, dtype=np.int64),
        positions=positions,
        query_start=starts.astype(np.int32),
        context_len=(first + counts).astype(np.int32),
        block_table=table,
        slots=slots,
    )
