"""Linear layers for the tests: NVFP4 with one or more scales, and what the backend makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from anyfp4.backends.base import PreparedLinear
from anyfp4.backends.triton import TritonBackend
from anyfp4.formats import e4m3
from anyfp4.formats.nvfp4 import NVFP4Tensor, dequantize_blocks, quantize
from anyfp4.formats.weights import FP8_BLOCK_SIZE, DenseWeight, FP8Weight, LinearWeight, NVFP4Weight, fp8_grid
from anyfp4.ops import linear as reference

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
        scales = (weight.weight_scale.to(device), move(weight.input_scale))
        return FP8Weight(weight.weight.to(device), *scales, move(weight.bias), weight.weight_only)
    w = weight.weight
    tensor = NVFP4Tensor(w.packed.to(device), w.block_scale.to(device), w.global_scale.to(device), w.shard_sizes)
    return NVFP4Weight(tensor, move(weight.input_global_scale), move(weight.pre_quant_scale), move(weight.bias))


def prepare(weight: LinearWeight, device: torch.device, numerics: str = "native") -> PreparedLinear:
    return TRITON.prepare(to(weight, device), numerics)


def activation(m: int, k: int, seed: int = 1, spread: float = 0.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=g) * torch.exp2(torch.randn(m, k, generator=g) * spread)


def fp8(n: int, k: int, kind: str, seed: int = 0, *, bias: bool = False) -> FP8Weight:
    """A random layer; ``kind``: tensor, row, static, weight-only, block or block-weight-only."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) * torch.exp2(torch.randn(n, k, generator=g) * 4)
    shape = fp8_grid(n, k) if kind.startswith("block") else (1,) if kind in ("tensor", "static") else (n,)
    return FP8Weight(
        e4m3.encode(w),
        torch.rand(shape, generator=g) + 0.5,
        torch.tensor([0.01]) if kind == "static" else None,
        torch.randn(n, generator=g) if bias else None,
        kind.endswith("weight-only"),
    )


def fp8_activation(x: Tensor, weight: FP8Weight) -> tuple[Tensor, Tensor]:
    """(E4M3 values float32 [M, K], scale of each float32 [M, K]) by the definition in ``ops/linear.py``."""
    m, k = x.shape
    x32 = x.float()
    if weight.input_scale is not None:
        scale = weight.input_scale.reshape(1, 1).expand(m, k)
    else:
        size = FP8_BLOCK_SIZE if weight.block_wise else k
        blocks = torch.nn.functional.pad(x32, (0, -k % size)).view(m, -1, size)
        scale = reference._fp8_scale(blocks).expand(blocks.shape).reshape(m, -1)[:, :k]
    return reference._fp8_codes(x32, scale).float(), scale


def values(weight: NVFP4Weight) -> Tensor:
    """code × block_scale: float64 [N, K]."""
    return dequantize_blocks(weight.weight.packed, weight.weight.block_scale).double()
