"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split form of the Llama family."""

from __future__ import annotations

import torch
from torch import Tensor

from anyfp4.errors import InvalidArgumentError


def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates the heads of ``x``: element j of the first half pairs with element j of the second.

    (a, b) becomes (a·cos − b·sin, b·cos + a·sin), each operation a float32 one, rounded once to the type of ``x``.

    Args:
        x: [T, H, D].
        positions: int64 [T], the absolute position of each token.
        cos_sin: float32 [P, 2, D/2], the cosines and sines of every position.

    Returns:
        [T, H, D], dtype of ``x``.

    Raises:
        InvalidArgumentError: shapes do not fit.
    """
    half = cos_sin.shape[-1]
    if x.dim() != 3 or x.shape[-1] != 2 * half or positions.shape != x.shape[:1]:
        raise InvalidArgumentError(
            f"x {list(x.shape)} must be [T, H, {2 * half}] and positions {list(positions.shape)} [T]"
        )
    cos, sin = cos_sin[positions].unsqueeze(2).unbind(1)  # [T, 1, D/2] each
    a, b = x.to(torch.float32).split(half, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
