"""Rows of a batch for ``verify --layers``: any of them as a batch of its own, and where two results first differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyfp4.ops.attention import AttentionBatch

BLOCK = 16


class BatchRows:
    """The batch: S sequences, one after another, all of their tokens new."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths, self.device = lengths, device
        self.positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
        self._slots: dict[int, Tensor] = {}
        self.owner = [s for s, n in enumerate(lengths) for _ in range(n)]

    def blocks(self, block_size: int) -> list[list[int]]:
        """The cache blocks of each sequence; the last sequence's come first, so that no block number is a position."""
        first, tables = 0, []
        for n in reversed(self.lengths):
            count = -(-n // block_size)
            tables.append(list(range(first, first + count)))
            first += count
        return tables[::-1]

    def slots(self, block_size: int) -> Tensor:
        """int64 [T], where each token's key and value lie."""
        if block_size not in self._slots:
            tables = self.blocks(block_size)
            own = zip(self.owner, self.positions.tolist(), strict=True)
            self._slots[block_size] = torch.tensor(
                [tables[s][p // block_size] * block_size + p % block_size for s, p in own], device=self.device
            )
        return self._slots[block_size]

    def batch(self, rows: Sequence[int], block_size: int = BLOCK) -> AttentionBatch:
        """The batch of some rows: neighbours of one sequence run as one chunk, everything else by itself."""
        position = self.positions.tolist()
        starts: list[int] = []
        for i, row in enumerate(rows):
            follows = i > 0 and row == rows[i - 1] + 1 and self.owner[row] == self.owner[rows[i - 1]]
            if not follows:
                starts.append(i)
        ends = [*starts[1:], len(rows)]
        tables = self.blocks(block_size)
        own = [tables[self.owner[rows[i]]] for i in starts]
        width = max(map(len, own))
        return AttentionBatch(
            query_start=torch.tensor([*starts, len(rows)], dtype=torch.int32, device=self.device),
            context_len=torch.tensor([position[rows[e - 1]] + 1 for e in ends], dtype=torch.int32, device=self.device),
            block_table=torch.tensor([t + [0] * (width - len(t)) for t in own], dtype=torch.int32, device=self.device),
            slots=self.slots(block_size)[torch.tensor(rows, device=self.device)],
        )


@dataclass(frozen=True)
class OpDifference:
    """The first element that depends on the other rows.

    Attributes:
        row: of the batch.
        column: of the flattened result.
        variant: how the row was computed the second time.
        batch: the element in the batch of all rows.
        other: the element computed the second time.
    """

    row: int
    column: int
    variant: str
    batch: float
    other: float
    batch_bits: str
    other_bits: str


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def first_difference(batch: Tensor, other: Tensor, rows: Tensor, variant: str) -> OpDifference | None:
    """The first element whose bits differ.

    Args:
        batch: [M, ...], what the batch of all rows gave for ``rows``.
        other: likewise, computed in another way.
        rows: int64 [M], their numbers in the batch.
        variant: the other way, in words.
    """
    a, b = (t.reshape(t.shape[0], -1).contiguous() for t in (batch, other))
    integer = _INTEGERS[a.element_size()]
    differ = a.view(integer) != b.view(integer)
    if not bool(differ.any()):
        return None
    row, column = (int(i) for i in differ.nonzero()[0])
    width = 2 * a.element_size()

    def pattern(t: Tensor) -> str:
        return f"0x{int(t.view(integer)[row, column]) & ((1 << 4 * width) - 1):0{width}x}"

    return OpDifference(
        int(rows[row]), column, variant, float(a[row, column]), float(b[row, column]), pattern(a), pattern(b)
    )
