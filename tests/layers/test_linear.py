"""Fused projections give the bits of separate ones, whatever the mixture of kinds."""

from __future__ import annotations

import pytest
import torch

from anyfp4.formats import e4m3, quantize
from anyfp4.formats.weights import DenseWeight, FP8Weight, LinearWeight, NVFP4Weight, fp8_grid
from anyfp4.layers.linear import Linear, fuse
from anyfp4.layers.rotary import cos_sin_table
from anyfp4.ops.linear import linear
from anyfp4.testing.bitwise import assert_same_bits

K = 192


def weight(kind: str, n: int, seed: int) -> LinearWeight:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, K, generator=g) * 2.0 ** (seed % 3)
    if kind == "dense":
        return DenseWeight(w.bfloat16())
    if kind == "fp8":
        return FP8Weight(e4m3.encode(w * 40), torch.tensor([0.025]), torch.tensor([0.01]))
    if kind.startswith("fp8 block"):
        codes = e4m3.encode(w.repeat(8 if "whole" in kind else 1, 1) * 40)  # a whole number of blocks
        grid = torch.rand(*fp8_grid(*codes.shape), generator=g)
        bias = torch.randn(codes.shape[0], generator=g) if "bias" in kind else None
        return FP8Weight(codes, grid, None, bias, "weight-only" in kind)
    scale = torch.tensor([0.002 * (1 + seed)]) if kind.startswith("w4a4") else None
    pre = (torch.rand(K, generator=g) + 0.5).bfloat16() if "awq" in kind else None
    bias = torch.randn(n, generator=g).bfloat16() if "bias" in kind else None
    return NVFP4Weight(quantize(w), scale, pre, bias)


@pytest.mark.parametrize(
    ("kinds", "parts"),
    [
        (["w4a4", "w4a4", "w4a4"], 1),
        (["w4a4 bias", "w4a4 bias", "w4a4 bias"], 1),
        (["w4a4 bias", "w4a4"], 2),
        (["weight_only", "weight_only"], 1),
        (["weight_only", "w4a4"], 2),
        (["w4a4", "fp8", "w4a4"], 3),
        (["w4a4 awq", "w4a4 awq"], 2),
        (["w4a4 awq", "w4a4"], 2),
        (["dense", "dense", "w4a4"], 2),
        (["fp8", "fp8"], 2),
        (["fp8 block whole", "fp8 block whole", "fp8 block whole"], 1),
        (["fp8 block whole", "fp8 block"], 1),  # the last one may end within a block
        (["fp8 block", "fp8 block whole"], 2),
        (["fp8 block whole", "fp8 block", "fp8 block whole"], 2),
        (["fp8 block whole weight-only", "fp8 block whole"], 2),
        (["fp8 block whole weight-only", "fp8 block weight-only"], 1),
        (["fp8 block whole bias", "fp8 block bias"], 1),
        (["fp8 block whole bias", "fp8 block whole"], 2),
        (["fp8 block whole", "fp8", "fp8 block whole"], 3),
        (["w4a4", "fp8 block whole", "fp8 block"], 2),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_fused_equals_separate(kinds: list[str], parts: int, backend: str) -> None:
    weights = [weight(kind, 16 * (2 + i), i) for i, kind in enumerate(kinds)]
    assert len(list(fuse(weights))) == parts
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(9)).bfloat16()
    fused = Linear(weights, backend=backend)
    assert fused.out_features == sum(w.shape[0] for w in weights)
    expected = torch.cat([linear(x, w) for w in weights], dim=-1)
    assert_same_bits(fused(x), expected)
    assert_same_bits(fused(x[2:3]), expected[2:3])


def test_equal_pre_quant_scales_fuse() -> None:
    a = weight("w4a4 awq", 16, 1)
    assert isinstance(a, NVFP4Weight)
    b = NVFP4Weight(quantize(torch.randn(16, K)), torch.tensor([0.001]), a.pre_quant_scale)
    assert len(list(fuse([a, b]))) == 1


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_a_position_does_not_depend_on_the_table(kind: str) -> None:
    """A request's rotation is the same whatever length the engine was set up for (YaRN given its original length)."""
    parameters = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters["original_max_position_embeddings"] = 64.0
    long = cos_sin_table(32, 201, kind, 10000.0, parameters)
    short = cos_sin_table(32, 77, kind, 10000.0, parameters)
    assert_same_bits(long[:77], short)
