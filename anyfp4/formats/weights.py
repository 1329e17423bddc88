"""What a linear layer's weight can be, as a checkpoint stores it and as ops and backends receive it.

Three kinds: NVFP4, FP8 with scales per tensor, row or block of 128 × 128 (both with activations quantized, or
weight-only), and dense.
Every scale is a multiplier (readers convert divisors once, at the door).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.formats.nvfp4 import NVFP4Tensor

#: rows and columns of a block of block-wise FP8, and activations that share a scale there
FP8_BLOCK_SIZE = 128


@dataclass(frozen=True, eq=False)
class NVFP4Weight:
    """An NVFP4 linear layer: W4A4 if ``input_global_scale`` is there, weight-only otherwise.

    Attributes:
        weight: N rows, K columns, S shards.
        input_global_scale: float32 [S], the multiplier for each shard's activations; None means weight-only.
        pre_quant_scale: [K], multiplies the activation (in the activation's dtype) before anything else; or None.
        bias: [N] or None.
    """

    weight: NVFP4Tensor
    input_global_scale: Tensor | None = None
    pre_quant_scale: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        shards = len(self.weight.shard_sizes)
        scale = self.input_global_scale
        if scale is not None and scale.dim() == 0:
            object.__setattr__(self, "input_global_scale", scale.reshape(1))
            scale = self.input_global_scale
        if scale is not None and (scale.dtype != torch.float32 or scale.shape != (shards,)):
            raise InvalidArgumentError(
                f"input_global_scale must be float32 [{shards}], got {scale.dtype} {list(scale.shape)}"
            )
        _check_vectors(self.shape, self.bias, self.pre_quant_scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight.shape

    @property
    def weight_only(self) -> bool:
        """Whether activations stay unquantized."""
        return self.input_global_scale is None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.weight.nbytes


@dataclass(frozen=True, eq=False)
class FP8Weight:
    """An FP8 linear layer: true weight = ``weight`` × ``weight_scale``.

    Attributes:
        weight: float8_e4m3fn [N, K].
        weight_scale: float32 [1] (whole tensor), [N] (per row) or [⌈N/128⌉, ⌈K/128⌉] (block-wise: one for each block
            of 128 × 128, those at the lower and right edge smaller), a multiplier.
        input_scale: float32 [1] static multiplier of the activation; None means dynamic, one scale per token, or
            block-wise one per token and 128 columns (amax / 448). Block-wise layers have no static one.
        bias: [N] or None.
        weight_only: activations stay unquantized.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None = None
    bias: Tensor | None = None
    weight_only: bool = False

    def __post_init__(self) -> None:
        if self.weight.dtype != torch.float8_e4m3fn or self.weight.dim() != 2:
            raise InvalidArgumentError(
                f"FP8 weight must be float8_e4m3fn [N, K], got {self.weight.dtype} {list(self.weight.shape)}"
            )
        n = self.weight.shape[0]
        grid = fp8_grid(*self.shape)
        if self.weight_scale.dtype != torch.float32 or self.weight_scale.shape not in ((1,), (n,), grid):
            raise InvalidArgumentError(
                f"weight_scale must be float32 [1] or [{n}] or {list(grid)}, got {self.weight_scale.dtype} "
                f"{list(self.weight_scale.shape)}"
            )
        if self.input_scale is not None and (self.input_scale.dtype != torch.float32 or self.input_scale.shape != (1,)):
            raise InvalidArgumentError(
                f"input_scale must be float32 [1], got {self.input_scale.dtype} {list(self.input_scale.shape)}"
            )
        if self.input_scale is not None and (self.block_wise or self.weight_only):
            kind = "weight-only" if self.weight_only else "block-wise"
            raise InvalidArgumentError(f"input_scale must be None: a {kind} FP8 layer has no static activation scale")
        _check_vectors(self.shape, self.bias, None)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def block_wise(self) -> bool:
        """Whether each block of 128 × 128 has a scale of its own."""
        return self.weight_scale.dim() == 2

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales."""
        return self.weight.numel() + 4 * self.weight_scale.numel()


def fp8_grid(n: int, k: int) -> tuple[int, int]:
    """(rows, columns) of the scales of a block-wise FP8 weight [N, K]."""
    return -(-n // FP8_BLOCK_SIZE), -(-k // FP8_BLOCK_SIZE)


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """An unquantized linear layer.

    Attributes:
        weight: bfloat16, float16 or float32 [N, K].
        bias: [N] or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight.dtype not in (torch.bfloat16, torch.float16, torch.float32) or self.weight.dim() != 2:
            raise InvalidArgumentError(
                f"dense weight must be bfloat16, float16 or float32 [N, K], got {self.weight.dtype} "
                f"{list(self.weight.shape)}"
            )
        _check_vectors(self.shape, self.bias, None)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of weights."""
        return self.weight.numel() * self.weight.element_size()


LinearWeight: TypeAlias = NVFP4Weight | FP8Weight | DenseWeight


def _check_vectors(shape: tuple[int, int], bias: Tensor | None, pre_quant_scale: Tensor | None) -> None:
    n, k = shape
    if bias is not None and bias.shape != (n,):
        raise InvalidArgumentError(f"bias must have shape [{n}], got {list(bias.shape)}")
    if pre_quant_scale is not None and pre_quant_scale.shape != (k,):
        raise InvalidArgumentError(f"pre_quant_scale must have shape [{k}], got {list(pre_quant_scale.shape)}")
