"""How a block of ``blackwell.cu`` is made, and which one a product takes: by measured times. No plan changes a bit.

Microseconds of the product alone on an H200, and times those of native numerics (CUDA graphs, weights larger than the
L2):

    rows × columns      1 token      16           64           256          4096
    57344 × 8192        78 (1.16)    123 (1.56)   170 (1.40)
    24576 × 4096        22 (1.15)    26 (1.26)    35 (1.31)    134 (1.71)   2112 (2.16)
    8192 × 8192         17 (1.26)    20 (1.32)    40 (1.73)
    4096 × 12288        20 (1.68)    21 (1.69)    44 (2.13)    71 (1.55)    988 (1.98)
    6144 × 4096         10 (1.36)    12 (1.36)    21 (1.79)
    4096 × 4096         9.1 (1.47)   10 (1.48)    17 (1.95)

With few rows the chain over K is what takes the time: parts of it wait for each other, so they are few and long.
"""

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


#: plans, with the microseconds that 64 columns of K take where a multiprocessor has one item, and where several in turn
MEASURED = (
    (BlackwellPlan(8, 1, 4, 4, sync=1), 0.10, 0.13), (BlackwellPlan(8, 3, 1, 4, sync=1), 0.29, 0.26),
    (BlackwellPlan(8, 4, 1, 4, sync=1), 0.35, 0.35), (BlackwellPlan(8, 7, 1, 4, sync=1), 0.59, 0.56),
    (BlackwellPlan(16, 1, 4, 4, sync=1), 0.13, 0.14), (BlackwellPlan(16, 3, 1, 4, sync=1), 0.37, 0.33),
    (BlackwellPlan(16, 4, 1, 2, sync=1), 0.46, 0.47),
    (BlackwellPlan(32, 1, 2, 2, registers=REGISTERS[2]), 0.22, 0.22),
    (BlackwellPlan(32, 2, 1, 2, registers=REGISTERS[2]), 0.30, 0.32),
    (BlackwellPlan(32, 3, 1, 2, registers=REGISTERS[3]), 0.40, 0.39),
    (BlackwellPlan(32, 4, 1, 1, registers=REGISTERS[4]), 0.52, 0.53),
    (BlackwellPlan(64, 1, 2, 2, registers=REGISTERS[2]), 0.28, 0.30),
    (BlackwellPlan(64, 2, 1, 2, registers=REGISTERS[2]), 0.36, 0.40),
    (BlackwellPlan(64, 3, 1, 2, registers=REGISTERS[3]), 0.49, 0.53),
    (BlackwellPlan(64, 4, 1, 1, registers=REGISTERS[4]), 0.65, 0.68),
)  # fmt: skip


@lru_cache(maxsize=4096)
def choose(n: int, k: int, m: int, processors: int) -> BlackwellPlan:
    """The plan for m tokens and N × K weights on a GPU of so many multiprocessors."""

    def time(measured: tuple[BlackwellPlan, float, float]) -> float:
        plan, once, in_turn = measured
        items = math.ceil(math.ceil(n / layout.ROWS) / plan.row_tiles) * math.ceil(m / plan.tokens)
        rounds = math.ceil(items / processors)
        return once if rounds == 1 else rounds * in_turn

    fitting = [measured for measured in MEASURED if measured[0].shared(k, 2) <= MOST - STATIC]
    return min(fitting or MEASURED[:1], key=time)[0].fitted(k)
