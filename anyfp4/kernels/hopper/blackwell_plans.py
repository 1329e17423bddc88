"""How a block of ``blackwell.cu`` is made, and which one a product takes. No plan changes a bit."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache

from anyfp4.kernels.hopper import layout
from anyfp4.kernels.hopper.compiler import Defines
from anyfp4.kernels.hopper.plan import PITCH_BYTES
from anyfp4.kernels.hopper.plans import MOST, REGISTERS

_STAGES = 12
#: bytes of shared memory that the kernel has besides, with what alignment takes
STATIC = 1 << 10
#: what linear_copy.cu and others want to know, and is the same for all
_FIXED = (("CLUSTER", 1), ("SETS", 1), ("FLOAT16", 0), ("BLOCKS", 1))


@dataclass(frozen=True)
class BlackwellPlan:
    """How a block is made; the names are those of ``blackwell.cu``.

    Attributes:
        tokens: of a tile: 8, 16, 32, 64 or 128.
        row_tiles: tiles of 64 rows that a block takes side by side.
        parts: of a stage, which warpgroups take side by side.
        step: chunks of 64 columns of a part.
        stages: of the ring.
        registers: of a thread that computes; 0 leaves it to the compiler.
        sync: 1 to multiply by ``mma.sync``, for few tokens, 0 by ``wgmma``.
    """

    tokens: int
    row_tiles: int
    parts: int
    step: int
    stages: int = 0
    registers: int = 0
    sync: int = 0

    @property
    def defines(self) -> Defines:
        """Macros for the compiler."""
        return (*((f.name.upper(), getattr(self, f.name)) for f in fields(self)), *_FIXED)

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.row_tiles * self.parts * 128 + (128 if self.registers else 64)

    def shared(self, k: int, stages: int | None = None) -> int:
        """Bytes of shared memory, with so many stages or the plan's own."""
        stages = self.stages if stages is None else stages
        chunks, warpgroups = math.ceil(k / layout.COLUMNS), self.row_tiles * self.parts
        stage = self.parts * self.step * (self.tokens * 128 + self.row_tiles * layout.RECORD)
        sums = warpgroups * (self.tokens * PITCH_BYTES + 32) + self.row_tiles * 512
        return stages * (stage + 16) + sums + 4 * (chunks * (3 + self.row_tiles) + 2)

    def fitted(self, k: int) -> BlackwellPlan:
        """With as many stages as fit, at least two, and no more than there are."""
        stages = max(2, min(_STAGES, math.ceil(math.ceil(k / layout.COLUMNS) / (self.parts * self.step))))
        while stages > 2 and self.shared(k, stages) > MOST - STATIC:
            stages -= 1
        return replace(self, stages=stages)


@lru_cache(maxsize=4096)
def choose(n: int, k: int, m: int, processors: int) -> BlackwellPlan:
    """The plan for m tokens and N × K weights on a GPU of so many multiprocessors."""
    tiles = math.ceil(n / layout.ROWS)
    if m <= 16:
        tokens = 8 if m <= 8 else 16
        rows = min(range(1, 8), key=lambda r: (math.ceil(math.ceil(tiles / r) / processors) * r, -r))
        if tiles <= processors:
            rows = 1
        plan = BlackwellPlan(tokens, rows, max(1, 6 // rows), 2, sync=1)
    elif m <= 64:
        tokens = 32 if m <= 32 or tiles <= 96 else 64
        rows = 3 if tiles > processors else 1
        plan = BlackwellPlan(tokens, rows, 3 // rows, 1, registers=REGISTERS[3])
    else:
        plan = BlackwellPlan(128, 2, 1, 1, registers=REGISTERS[2])
        if tiles * math.ceil(m / 128) < 2 * processors:
            plan = BlackwellPlan(64, 1, 3, 1, registers=REGISTERS[3])
    return plan.fitted(k)
