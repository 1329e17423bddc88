"""Linear layers for the tests: NVFP4 with one or more scales, and what the backend makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from anyfp4.backends.base import PreparedLinear
from anyfp4.backends.triton import TritonBackend
from anyfp4.formats.nvfp4 import NVFP4Tensor, dequantize_blocks, quantize
from anyfp4.formats.weights import DenseWeight, FP8Weight, LinearWeight, NVFP4Weight

TRITON = TritonBackend()


def nvfp4(
    n: int, k: int, seed: int = 0, *, inputs: tuple[float, ...] = (0.01,), bias: bool = False, pre: bool = False,
    weight_only: bool = False, wild: bool = False,
) -> NVFP4Weight:  # fmt: skip
    """A random layer with one shard for each of ``inputs``; ``wild``: any codes and scales but NaN, global scale 1."""
    g = torch.Generator().manual_seed(seed)
    q = quantize(torch.randn(n, k, generator=g))
    packed, scale = q.packed, q.block_scale
    if wild:
        packed = torch.randint(0, 256, packed.shape, generator=g, dtype=torch.uint8)
        scale = torch.randint(0, 0x7F, scale.shape, generator=g, dtype=torch.uint8).view(torch.float8_e4m3fn)
    shards = len(inputs)
    sizes = (*(n // shards for _ in inputs[1:]), n - (shards - 1) * (n // shards))
    # a factor that is no power of two could round a difference of one bit away
    global_scale = torch.ones(shards) if wild else torch.rand(shards, generator=g) + 0.5
    tensor = NVFP4Tensor(packed, scale, global_scale, sizes)
    return NVFP4Weight(
        tensor,
        None if weight_only else torch.tensor(inputs),
        torch.rand(k, generator=g) + 0.5 if pre else None,
        torch.randn(n, generator=g) if bias else None,
    )


def to(weight: LinearWeight, device: torch.device) -> LinearWeight:
    def move(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(device)

    if isinstance(weight, DenseWeight):
        return DenseWeight(weight.weight.to(device), move(weight.bias))
    if isinstance(weight, FP8Weight):
        return FP8Weight(
            weight.weight.to(device), weight.weight_scale.to(device), move(weight.input_scale), move(weight.bias)
        )
    w = weight.weight
    tensor = NVFP4Tensor(w.packed.to(device), w.block_scale.to(device), w.global_scale.to(device), w.shard_sizes)
    return NVFP4Weight(tensor, move(weight.input_global_scale), move(weight.pre_quant_scale), move(weight.bias))


def prepare(weight: LinearWeight, device: torch.device, numerics: str = "native") -> PreparedLinear:
    return TRITON.prepare(to(weight, device), numerics)


def activation(m: int, k: int, seed: int = 1, spread: float = 0.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=g) * torch.exp2(torch.randn(m, k, generator=g) * spread)


def values(weight: NVFP4Weight) -> Tensor:
    """code × block_scale: float64 [N, K]."""
    return dequantize_blocks(weight.weight.packed, weight.weight.block_scale).double()
