"""Which rows of a weight are multiplied with which quantization of the activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels.hopper.layout import ROWS

#: room of gemm_copy.cu
MOST = 128


@dataclass(frozen=True, eq=False)
class Runs:
    """Rows of a weight by the quantization of the activation that they are multiplied with.

    Attributes:
        table: int32 [R, 4]: first row, row after the last, index of the quantization, first tile of records.
        sizes: rows of each run.
    """

    table: Tensor
    sizes: tuple[int, ...]

    def tiles(self, rows: int) -> int:
        """Tiles of so many rows, none across two runs."""
        return sum(-(-size // rows) for size in self.sizes)


def runs_of(runs: Sequence[tuple[int, int]], device: torch.device) -> Runs:
    """Args: (rows, index) of each run, in order; each starts a new tile of records."""
    if len(runs) > MOST:
        raise InvalidArgumentError(f"at most {MOST} runs of rows, got {len(runs)}")
    table, row, tile = [], 0, 0
    for size, index in runs:
        table.append((row, row + size, index, tile))
        row, tile = row + size, tile + -(-size // ROWS)
    return Runs(torch.tensor(table, dtype=torch.int32, device=device), tuple(size for size, _ in runs))
