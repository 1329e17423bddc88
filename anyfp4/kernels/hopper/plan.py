"""How a block of ``linear.cu`` is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from anyfp4.kernels.hopper import layout
from anyfp4.kernels.hopper.compiler import Defines

#: columns of K that one accumulator takes
SEGMENT = 1024
#: of a token's sums for a tile of rows
PITCH_BYTES = (64 + 4) * 4


@dataclass(frozen=True)
class Plan:
    """How a block is made; the names are those of ``linear.cu``.

    Attributes:
        tokens: of a tile: 8, 16, 32, 64 or 128.
        row_tiles: tiles of 64 rows that a block takes side by side.
        parts: of K that a block takes side by side.
        cluster: blocks that share the segments of K.
        stages: of the ring.
        step: chunks of 64 columns in a stage.
        sets: of registers for the unpacked weight.
        registers: of a thread that computes; 0 leaves it to the compiler.
        blocks: that should fit on a multiprocessor.
        sync: 1 to multiply by ``mma.sync``, for few tokens, 0 by ``wgmma``.
        float16: 1 for activations in float16, 0 for bfloat16.
    """

    tokens: int
    row_tiles: int
    parts: int
    cluster: int
    stages: int
    step: int
    sets: int = 1
    registers: int = 0
    blocks: int = 1
    sync: int = 0
    float16: int = 0

    @property
    def defines(self) -> Defines:
        """Macros for the compiler."""
        return tuple((f.name.upper(), getattr(self, f.name)) for f in fields(self))

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.row_tiles * self.parts * 128 + (128 if self.registers else 64)

    def segments_each(self, k: int) -> int:
        """How many segments one warpgroup takes."""
        return math.ceil(math.ceil(k / SEGMENT) / (self.parts * self.cluster))

    def shared(self, k: int, stages: int | None = None) -> int:
        """Bytes of shared memory, with so many stages or the plan's own."""
        stages = self.stages if stages is None else stages
        split = self.parts * self.cluster > 1
        sums = 1 + max(0, math.ceil(k / SEGMENT) - self.segments_each(k)) if split else 1
        stage = self.parts * self.step * self.tokens * 128 + self.row_tiles * self.parts * self.step * layout.RECORD
        own = self.row_tiles * self.tokens // self.cluster * PITCH_BYTES
        return stages * (stage + 16) + sums * own + self.row_tiles * 512
