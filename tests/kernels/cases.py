"""Random operands: scales and magnitudes from tame to as wide as the formats go."""

from __future__ import annotations

import torch
from torch import Tensor

from anyfp4.formats.nvfp4 import NVFP4Tensor
from anyfp4.formats.weights import FP8Weight, NVFP4Weight, fp8_grid

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: how block scales are spread: about one octave; all bit patterns; either end of the range
SPREADS = ("tame", "wide", "normal", "extreme")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def block_scales(n: int, blocks: int, spread: str, g: torch.Generator) -> Tensor:
    if spread == "tame":
        return (torch.rand(n, blocks, generator=g) * 200 + 40).to(torch.float8_e4m3fn)
    bits = torch.randint(0, 0x7F, (n, blocks), generator=g, dtype=torch.uint8)
    if spread == "extreme":
        ends = torch.tensor([0, 1, 3, 7, 8, 0x78, 0x7D, 0x7E, 0x7E], dtype=torch.uint8)
        bits = ends[torch.randint(0, len(ends), (n, blocks), generator=g)]
    if spread == "normal":  # zeros, but no subnormal number
        bits = torch.where(bits < 8, torch.zeros_like(bits), bits)
    return bits.view(torch.float8_e4m3fn)


def nvfp4_weight(
    n: int,
    k: int,
    spread: str,
    seed: int,
    *,
    shards: int = 1,
    weight_only: bool = False,
    bias: bool = False,
    pre: torch.dtype | None = None,
) -> NVFP4Weight:
    g = generator(seed)
    shards = min(shards, n)
    cuts = sorted(torch.randperm(n - 1, generator=g)[: shards - 1].add(1).tolist()) if shards > 1 else []
    sizes = tuple(b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True))
    tensor = NVFP4Tensor(
        torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8),
        block_scales(n, k // 16, spread, g),
        torch.rand(shards, generator=g) * 0.01 + 1e-4,
        sizes,
    )
    # two distinct input scales, so that some shards share one
    inputs = torch.tensor([0.011, 0.0007])[torch.randint(0, 2, (shards,), generator=g)]
    return NVFP4Weight(
        tensor,
        None if weight_only else inputs,
        None if pre is None else (torch.rand(k, generator=g) + 0.5).to(pre),
        torch.randn(n, generator=g) if bias else None,
    )


def activation(m: int, k: int, spread: str, dtype: torch.dtype, seed: int) -> Tensor:
    g = generator(seed + 1)
    x = torch.randn(m, k, generator=g)
    if spread != "tame":
        # block by block, so that block scales differ as much as E4M3 lets them
        x = x * torch.exp2(torch.randint(-14, 6, (m, k // 16), generator=g).float()).repeat_interleave(16, dim=1)
    return x.to(dtype)


def fp8_weight(n: int, k: int, seed: int, *, inputs: str, per_row: bool, bias: bool) -> FP8Weight:
    """``inputs``: static, dynamic or weight-only."""
    g = generator(seed)
    return FP8Weight(
        torch.randn(n, k, generator=g).to(torch.float8_e4m3fn),
        torch.rand(n if per_row else 1, generator=g) * 0.01,
        torch.tensor([0.02]) if inputs == "static" else None,
        torch.randn(n, generator=g) if bias else None,
        inputs == "weight-only",
    )


def fp8_block_weight(n: int, k: int, spread: str, seed: int, *, weight_only: bool, bias: bool = False) -> FP8Weight:
    """Codes: about normal; all but NaN; the smallest and the largest. Scales as far apart as float32 lets them."""
    g = generator(seed)
    grid = torch.rand(*fp8_grid(n, k), generator=g) + 0.5
    if spread == "tame":
        codes = (torch.randn(n, k, generator=g) * 90).to(torch.float8_e4m3fn).view(torch.uint8)
        grid *= 0.01
    else:
        codes = torch.randint(0, 0x7F, (n, k), generator=g, dtype=torch.uint8)
        if spread == "extreme":
            ends = torch.tensor([0, 1, 2, 7, 8, 0x7D, 0x7E], dtype=torch.uint8)
            codes = ends[torch.randint(0, len(ends), (n, k), generator=g)]
        codes |= torch.randint(0, 2, (n, k), generator=g, dtype=torch.uint8) << 7
        octaves = 30 if spread == "wide" else 120
        grid *= torch.exp2(torch.randint(-octaves, octaves // 2, grid.shape, generator=g).float())
    bias_vector = torch.randn(n, generator=g) if bias else None
    return FP8Weight(codes.view(torch.float8_e4m3fn), grid, None, bias_vector, weight_only)
