"""The gated MLP: down(silu(gate(x)) × up(x)), gate and up fused."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from anyfp4.backends.base import Backend
from anyfp4.layers.linear import Linear


@dataclass(frozen=True, eq=False)
class MLP:
    """One MLP block.

    Attributes:
        gate_up: fused projection, [gate; up].
        down: back to the hidden size.
    """

    ops: Backend
    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] to [T, hidden]."""
        return self.down(self.ops.silu_mul(self.gate_up(x)))
