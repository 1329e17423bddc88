"""The gated activation of the MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.ops import elementary


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) × up, with silu(g) = g / (1 + e⁻ᵍ), in float32, rounded once to the type of the input.

    Args:
        gate_up: [..., 2·I], the gate in the first half and up in the second.

    Returns:
        [..., I].

    Raises:
        InvalidArgumentError: the last axis is odd.
    """
    if gate_up.shape[-1] % 2:
        raise InvalidArgumentError(f"gate_up must be [..., even], got {list(gate_up.shape)}")
    gate, up = gate_up.to(torch.float32).chunk(2, dim=-1)
    return (gate / (1.0 + elementary.exp(-gate)) * up).to(gate_up.dtype)
