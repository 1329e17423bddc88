"""y = x · Wᵀ for up to a few hundred tokens: W as ``layout.py`` has it, unpacked in the kernel (``linear.cu``).

A plan says how a block is made. Any plan gives the same bits, for the order over K depends on K alone: segments of 1024
columns, each one chain of ``wgmma``, added in order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anyfp4.kernels import room
from anyfp4.kernels.hopper import layout
from anyfp4.kernels.hopper.plan import SEGMENT, Plan
from anyfp4.kernels.hopper.plans import choose
from anyfp4.kernels.hopper.runs import Runs, runs_of
from anyfp4.kernels.hopper.runtime import Kernel, load, tensor_map

FILES = (
    "async.cu", "unpack.cu", "unpack_half.cu", "unpack_chunk.cu", "multiply.cu", "linear_copy.cu", "linear_finish.cu",
    "linear.cu",
)  # fmt: skip
#: see ``unpack_scales``
EXPONENT = 0x70007000
#: of results, as the kernels number them
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@dataclass(frozen=True, eq=False)
class Records:
    """A weight.

    Attributes:
        records: uint8 [tiles, chunks, 2304], see ``layout.py``.
        runs: (rows, index of the quantized activation) of each run of rows; a tile is of one run.
        n: rows.
        k: columns.
        alpha: float32 [N].
        bias: float32 [N] or None.
        by_run: the runs as ``gemm.cu`` reads them.
    """

    records: Tensor
    runs: tuple[tuple[int, int], ...]
    n: int
    k: int
    alpha: Tensor
    bias: Tensor | None
    by_run: Runs = field(init=False)
    _tables: dict[int, tuple[Tensor, Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        # at once, for a copy from the host cannot be captured in a graph
        object.__setattr__(self, "by_run", runs_of(self.runs, self.records.device))

    def tables(self, row_tiles: int) -> tuple[Tensor, Tensor] | None:
        """What ``linear.cu`` calls groups and rows; None if all rows are of one run."""
        if len(self.runs) == 1:
            return None
        if row_tiles not in self._tables:
            groups: list[tuple[int, int, int]] = []
            rows: list[tuple[int, int]] = []
            first = 0
            for size, index in self.runs:
                tiles = math.ceil(size / layout.ROWS)
                for tile in range(0, tiles, row_tiles):
                    groups.append((len(rows) + tile, min(row_tiles, tiles - tile), index))
                rows += [(first + at, min(layout.ROWS, size - at)) for at in range(0, size, layout.ROWS)]
                first += size
            device = self.records.device
            self._tables[row_tiles] = (
                torch.tensor(groups, dtype=torch.int32, device=device),
                torch.tensor(rows, dtype=torch.int32, device=device),
            )
        return self._tables[row_tiles]


def kernel(plan: Plan, k: int, device: int) -> Kernel:
    """The compiled and loaded kernel of a plan."""
    return load(FILES, "linear", "TPPPPPPPiiiiiiiiii", device, plan.defines, plan.shared(k))


def linear(
    x: Tensor,
    weight: Records,
    out_dtype: torch.dtype,
    plan: Plan | None = None,
    row: Tensor | None = None,
    overlap: bool = True,
) -> Tensor:
    """x · Wᵀ × alpha + bias.

    Args:
        x: bfloat16 [Q, M, K], one for each quantization of the activation: code × block_scale; or, Q = 1, an
            unquantized activation in bfloat16 or float16. Contiguous, K a multiple of 8; faster from ``room.empty``.
        weight: N rows.
        out_dtype: of the result.
        plan: how; by default by shape and M. It must be for the type of x.
        row: float32 [M], a factor of each token, or None.
        overlap: the kernel may start before the one ahead of it has ended.

    Returns:
        [M, N].
    """
    m, k = x.shape[1:]
    n = weight.n
    y = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if m == 0:
        return y
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    plan = plan or choose(n, k, m, processors, x.dtype == torch.float16)
    if x.data_ptr() % 16:  # of the bulk copy engine
        x = x.clone()
    tiles, chunks = weight.records.shape[:2]
    tables = weight.tables(plan.row_tiles)
    groups, rows = tables or (None, None)
    token_tiles = math.ceil(m / plan.tokens)
    items = token_tiles * (math.ceil(tiles / plan.row_tiles) if groups is None else groups.shape[0])
    blocks = items
    if plan.parts * plan.cluster == 1:
        blocks = min(items, plan.blocks * processors)
    kernel(plan, k, x.get_device()).launch(
        (blocks * plan.cluster, 1, 1),
        plan.threads,
        (
            tensor_map(room.rows(x, plan.tokens), (plan.tokens, 64)), weight.records, y, weight.alpha, weight.bias, row,
            groups, rows, m, n, chunks, tiles, token_tiles, items, plan.segments_each(k), math.ceil(k / SEGMENT),
            KINDS[out_dtype], EXPONENT,
        ),
        cluster=plan.cluster,
        overlap=overlap,
    )  # fmt: skip
    return y
