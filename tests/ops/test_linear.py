"""The reference linear op against exact arithmetic, and row by row."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from anyfp4.errors import InvalidArgumentError
from anyfp4.formats import NVFP4Tensor, e4m3, quantize
from anyfp4.formats.nvfp4 import dequantize_blocks, quantize_blocks
from anyfp4.formats.weights import DenseWeight, FP8Weight, LinearWeight, NVFP4Weight
from anyfp4.ops.linear import linear
from anyfp4.testing.bitwise import assert_same_bits
from tests.ops.test_exact import oracle


def make(kind: str, n: int = 24, k: int = 64, seed: int = 0) -> LinearWeight:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g)
    bias = torch.randn(n, generator=g)
    if kind == "dense":
        return DenseWeight(w.bfloat16(), bias)
    if kind == "fp8":
        return FP8Weight(e4m3.encode(w * 50), torch.tensor([0.02]), torch.tensor([0.01]), bias)
    if kind == "fp8_weight_only":
        return FP8Weight(e4m3.encode(w * 50), torch.rand(n, generator=g) * 0.02 + 0.01, None, bias, True)
    if kind == "fp8_dynamic":
        return FP8Weight(e4m3.encode(w * 50), torch.rand(n, generator=g) * 0.02 + 0.01, None, None)
    q = quantize(w)
    fused = NVFP4Tensor(q.packed, q.block_scale, torch.tensor([0.001, 0.0021]), (n // 3, n - n // 3))
    if kind == "weight_only":
        return NVFP4Weight(fused, None, None, bias)
    if kind == "awq":
        return NVFP4Weight(fused, torch.tensor([0.002, 0.002]), (torch.rand(k, generator=g) + 0.5).bfloat16())
    if kind == "two_input_scales":
        return NVFP4Weight(fused, torch.tensor([0.002, 0.0013]), None, bias)
    assert kind == "w4a4"
    return NVFP4Weight(fused, torch.tensor([0.002, 0.002]), None, None)


KINDS = ("dense", "fp8", "fp8_dynamic", "fp8_weight_only", "weight_only", "awq", "two_input_scales", "w4a4")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numerics", ["native", "blackwell"])
def test_rows_do_not_depend_on_each_other(kind: str, numerics: str) -> None:
    weight = make(kind)
    x = torch.randn(70, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    x[5] = 0
    full = linear(x, weight, numerics=numerics)
    for i in range(70):
        assert_same_bits(full[i : i + 1], linear(x[i : i + 1], weight, numerics=numerics), f"row {i}")
    for m in (2, 17, 64):
        assert_same_bits(full[:m], linear(x[:m], weight, numerics=numerics), f"M = {m}")


def test_w4a4_is_exact_within_one_chunk() -> None:
    """K = 64 is one Blackwell instruction: the exact sum, truncated to float32; then × alpha, + bias, one rounding."""
    weight = make("two_input_scales")
    assert isinstance(weight, NVFP4Weight) and weight.input_global_scale is not None and weight.bias is not None
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    got = linear(x, weight, out_dtype=torch.float32)
    w = dequantize_blocks(weight.weight.packed, weight.weight.block_scale)
    row = 0
    for shard, size in enumerate(weight.weight.shard_sizes):
        scale = weight.input_global_scale[shard]
        a = dequantize_blocks(*quantize_blocks(x, scale))
        alpha = scale * weight.weight.global_scale[shard]
        for n in range(row, row + size):
            for m in range(6):
                total = sum(Fraction(p) * Fraction(q) for p, q in zip(a[m].tolist(), w[n].tolist(), strict=True))
                acc = torch.tensor(_toward_zero(total), dtype=torch.float32)
                assert_same_bits(got[m, n], acc * alpha + weight.bias[n])
        row += size


def _toward_zero(value: Fraction) -> float:
    nearest = torch.tensor(float(value), dtype=torch.float32)  # value has few bits: float() is exact here
    if abs(Fraction(nearest.item())) > abs(value):
        nearest = torch.nextafter(nearest, torch.tensor(0.0))
    return nearest.item()


def test_weight_only_is_the_exact_product() -> None:
    weight = make("weight_only")
    assert isinstance(weight, NVFP4Weight) and weight.bias is not None
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    exact = oracle(x, dequantize_blocks(weight.weight.packed, weight.weight.block_scale))
    expected = exact * weight.weight.row_global_scale() + weight.bias
    assert_same_bits(linear(x, weight), expected.bfloat16())


def test_shards_keep_their_own_scales() -> None:
    """Fused shards give the bits of separate layers."""
    fused = make("two_input_scales")
    assert isinstance(fused, NVFP4Weight) and fused.input_global_scale is not None and fused.bias is not None
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(6)).bfloat16()
    parts, row = [], 0
    for s, size in enumerate(fused.weight.shard_sizes):
        rows = slice(row, row + size)
        t = NVFP4Tensor(fused.weight.packed[rows], fused.weight.block_scale[rows], fused.weight.global_scale[s : s + 1])
        parts.append(linear(x, NVFP4Weight(t, fused.input_global_scale[s : s + 1], None, fused.bias[rows])))
        row += size
    assert_same_bits(linear(x, fused), torch.cat(parts, dim=-1))


def test_pre_quant_scale_multiplies_in_the_activation_type() -> None:
    weight = make("awq")
    assert isinstance(weight, NVFP4Weight) and weight.pre_quant_scale is not None
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(7)).bfloat16()
    plain = NVFP4Weight(weight.weight, weight.input_global_scale)
    assert_same_bits(linear(x, weight), linear(x * weight.pre_quant_scale, plain))


def test_fp8_against_exact_arithmetic() -> None:
    weight = make("fp8")
    assert isinstance(weight, FP8Weight) and weight.input_scale is not None and weight.bias is not None
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(8))
    quantized = e4m3.encode(x * (1.0 / weight.input_scale))
    expected = oracle(quantized, weight.weight) * (weight.input_scale * weight.weight_scale) + weight.bias
    assert_same_bits(linear(x, weight), expected)


def test_fp8_weight_only_is_the_exact_product() -> None:
    weight = make("fp8_weight_only")
    assert isinstance(weight, FP8Weight) and weight.bias is not None
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(12)).bfloat16()
    expected = oracle(x, weight.weight) * weight.weight_scale + weight.bias
    assert_same_bits(linear(x, weight, out_dtype=torch.float32), expected)


def test_nan_shows_in_its_row_only() -> None:
    weight = make("w4a4")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(9)).bfloat16()
    clean = linear(x, weight)
    x[1, 20] = float("nan")
    got = linear(x, weight)
    assert got[1].isnan().all()
    assert_same_bits(got[[0, 2]], clean[[0, 2]])


def test_leading_axes_and_views() -> None:
    weight = make("w4a4")
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(10)).bfloat16()
    assert_same_bits(linear(x, weight).reshape(6, 24), linear(x.reshape(6, 64), weight))
    strided = torch.randn(4, 128, generator=torch.Generator().manual_seed(11)).bfloat16()[:, ::2]
    assert_same_bits(linear(strided, weight), linear(strided.contiguous(), weight))
    assert linear(x[0, :0], weight).shape == (0, 24)


@pytest.mark.parametrize(
    ("x", "numerics", "match"),
    [
        (torch.zeros(2, 63), "native", r"x must be \[\.\.\., 64\]"),
        (torch.zeros(2, 64, dtype=torch.float64), "native", "x must be bfloat16"),
        (torch.zeros(2, 64), "exact", "numerics must be"),
    ],
)
def test_bad_arguments(x: torch.Tensor, numerics: str, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        linear(x, make("w4a4"), numerics=numerics)
