"""Linear layers on the device's own matrix units.

In the interpreter a product is numpy's float32 product of the tile, so sums are compared with float64, within
(K + 8) · 2⁻²⁴ · Σ|a·w|: K additions of float32 in any order, and a few roundings after them (Higham, *Accuracy and
Stability of Numerical Algorithms*, 2nd ed., section 3.1). On a Hopper GPU the bit model gives every bit.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyfp4.formats.nvfp4 import dequantize_blocks, quantize_blocks
from anyfp4.formats.weights import DenseWeight, FP8Weight, LinearWeight, NVFP4Weight
from anyfp4.kernels.triton import gemm, linear_packed
from anyfp4.kernels.triton.layout import SEGMENT
from anyfp4.ops import linear as reference
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels_triton import oracles
from tests.kernels_triton.linears import TRITON, activation, fp8, fp8_activation, nvfp4, prepare, values

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ON_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
needs_hopper = pytest.mark.skipif(
    not (ON_GPU and torch.cuda.get_device_capability()[0] == 9), reason="needs a Hopper GPU"
)


def operands(x: Tensor, weight: LinearWeight) -> tuple[list[Tensor], Tensor, Tensor]:
    """What is multiplied: one activation for each row of the weight's shards, the weight, and the factor of outputs."""
    n = weight.shape[0]
    if isinstance(weight, DenseWeight):
        return [x.double()], weight.weight.double(), torch.ones(1, n)
    if isinstance(weight, FP8Weight):
        codes, scale = (x, torch.ones(())) if weight.weight_only else fp8_activation(x, weight)
        w_scale = weight.weight_scale.double()
        if weight.block_wise:
            w_scale = w_scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, : x.shape[1]]
        else:
            w_scale = w_scale.reshape(-1, 1)
        return [codes.double() * scale.double()], weight.weight.double() * w_scale, torch.ones(1, n)
    if weight.pre_quant_scale is not None:
        x = x * weight.pre_quant_scale.to(x.dtype)
    factor = reference.alpha(weight).repeat_interleave(torch.tensor(weight.weight.shard_sizes)).double()
    if weight.input_global_scale is None:
        return [x.double()], values(weight), factor
    activations = [dequantize_blocks(*quantize_blocks(x, s)).double() for s in weight.input_global_scale]
    return activations, values(weight), factor


def check(x: Tensor, weight: LinearWeight, device: torch.device) -> None:
    a, w, factor = operands(x, weight)
    got = TRITON.linear(x.to(device), prepare(weight, device), torch.float32).cpu().double()
    sizes = weight.weight.shard_sizes if isinstance(weight, NVFP4Weight) else (weight.shape[0],)
    parts = list(zip(a if len(a) > 1 else a * len(sizes), w.split(list(sizes)), strict=True))
    exact = torch.cat([left @ right.T for left, right in parts], dim=1) * factor
    size = torch.cat([left.abs() @ right.abs().T for left, right in parts], dim=1) * factor.abs()
    if weight.bias is not None:
        exact, size = exact + weight.bias.double(), size + weight.bias.double().abs()
    bound = (x.shape[1] + 8) * 2.0**-24 * size
    worst = ((got - exact).abs() / bound.clamp(min=1e-300)).max().item()
    print(f"error {worst:.3f} of the bound")
    assert worst <= 1


@pytest.mark.parametrize(("n", "k", "m"), [(5, 16, 1), (70, 256, 3), (30, 576, 2), (9, SEGMENT + 256, 2)])
def test_w4a4(n: int, k: int, m: int, device: torch.device) -> None:
    check(activation(m, k), nvfp4(n, k, bias=n == 70), device)


def test_w4a4_shards_and_wild_scales(device: torch.device) -> None:
    check(activation(3, 128), nvfp4(150, 128, inputs=(0.01, 0.02, 0.01)), device)
    check(activation(3, 320), nvfp4(40, 320, wild=True), device)
    check(activation(3, 64).half(), nvfp4(20, 64, pre=True), device)


def test_negative_and_nan_scales_of_a_weight(device: torch.device) -> None:
    weight = nvfp4(6, 64)
    bits = weight.weight.block_scale.view(torch.uint8)
    bits[2, 2] |= 0x80
    check(activation(3, 64), weight, device)
    bits[1, 1] = 0x7F
    y = TRITON.linear(activation(3, 64).to(device), prepare(weight, device))
    assert y[:, 1].isnan().all() and not y[:, [0, 2, 3, 4, 5]].isnan().any()


def test_a_nan_shows_in_its_row_alone(device: torch.device) -> None:
    x = activation(3, 64)
    x[1, 5] = torch.nan
    y = TRITON.linear(x.to(device), prepare(nvfp4(6, 64), device))
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_weight_only(dtype: torch.dtype, device: torch.device) -> None:
    check(activation(3, 80).to(dtype), nvfp4(20, 80, weight_only=True, bias=True), device)


@pytest.mark.parametrize("types", [("half", "half"), ("float", "float"), ("half", "float"), ("bfloat16", "half")])
def test_dense(types: tuple[str, str], device: torch.device) -> None:
    x, w = activation(3, 100), activation(70, 100, 5)
    check(getattr(x, types[0])(), DenseWeight(getattr(w, types[1])(), torch.ones(70)), device)


FP8_KINDS = ("tensor", "row", "static", "weight-only", "block", "block-weight-only")


@pytest.mark.parametrize("kind", FP8_KINDS)
def test_fp8(kind: str, device: torch.device) -> None:
    x = activation(4, 200)
    x[2] = 0
    check(x.half(), fp8(150, 200, kind, bias=True), device)


@pytest.mark.parametrize("kind", ["weight-only", "block-weight-only"])
def test_fp8_with_float32_activations(kind: str, device: torch.device) -> None:
    check(activation(4, 200), fp8(150, 200, kind), device)


@pytest.mark.parametrize("kind", FP8_KINDS)
def test_special_fp8_values(kind: str, device: torch.device) -> None:
    """A NaN spoils its row of either side, an infinity too, and nothing else; a row of zeros gives zeros."""
    weight = fp8(40, 160, kind)
    weight.weight.view(torch.uint8)[3, 140] = 0x7F
    x = activation(5, 160).half()
    x[0, 7], x[1, 130], x[2] = torch.nan, torch.inf, 0
    y = TRITON.linear(x.to(device), prepare(weight, device), torch.float32).cpu()
    expected = reference.linear(x, weight, out_dtype=torch.float32)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[2].nan_to_num(7.0), expected[2].nan_to_num(7.0))


def test_many_tokens_take_another_kernel(device: torch.device) -> None:
    """Both kernels on the same operands: on a device the same bits, in the interpreter within the rounding of sums."""
    x = activation(40, 192, 3).half().unsqueeze(0).to(device)
    packed = prepare(nvfp4(150, 192, weight_only=True, bias=True), device).data.packed
    few = linear_packed.packed_linear(x, packed, torch.float32)
    many = gemm.packed_gemm(x, packed, torch.float32)
    if ON_GPU:
        assert_same_bits(many, few)
    else:
        # 192 roundings of 2⁻²⁴ each, and as norms of random errors they stay far below their sum
        assert (many - few).norm() <= 192 * 2.0**-24 * few.norm()


def test_dequantized_weights_are_exact(device: torch.device) -> None:
    for k in (576, 512):
        weight = nvfp4(40, k, wild=True)
        packed = prepare(weight, device).data.packed
        assert torch.equal(gemm.dequantize(packed, 5, 30, torch.float16).cpu().double(), values(weight)[5:35])


def test_a_row_on_its_own(device: torch.device) -> None:
    """Powers of two, so that the interpreter's sums are exact whatever numpy does: rows must not meet."""
    g = torch.Generator().manual_seed(0)
    x = torch.exp2(torch.randint(-1, 2, (21, 64), generator=g).float())
    for weight in (nvfp4(70, 64), nvfp4(70, 64, weight_only=True)):
        prepared = prepare(weight, device)
        whole = TRITON.linear(x.to(device), prepared)
        for i in (0, 16, 20):
            assert_same_bits(TRITON.linear(x[i : i + 1].to(device), prepared), whole[i : i + 1])


def layer(kind: str, n: int, k: int, seed: int) -> LinearWeight:
    if kind.startswith("fp8"):
        return fp8(n, k, kind.removeprefix("fp8-"), seed, bias=True)
    if kind == "dense":
        return DenseWeight(activation(n, k, seed).bfloat16())
    return nvfp4(n, k, seed, weight_only=kind == "weight-only", wild=kind == "wild", inputs=(2.0**-7,))


KINDS = ("w4a4", "wild", "weight-only", "dense", *(f"fp8-{kind}" for kind in FP8_KINDS))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "k", "m"), [(64, 64, 1), (130, 576, 5), (70, 2048, 33), (40, 3184, 3), (200, 1104, 300), (24, 9216, 2)]
)
def test_the_bits_of_a_hopper(n: int, k: int, m: int, kind: str, device: torch.device) -> None:
    weight, x = layer(kind, n, k, m), activation(m, k, n, spread=1.0).bfloat16()
    got = TRITON.linear(x.to(device), prepare(weight, device), torch.float32)
    assert_same_bits(got, oracles.linear(x, weight))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["blackwell", *KINDS])
@pytest.mark.parametrize(("n", "k"), [(576, 576), (1000, 4096), (512, 6144)])
def test_rows_never_depend_on_others(kind: str, n: int, k: int, device: torch.device) -> None:
    prepared = prepare(layer(kind, n, k, n), device, "blackwell" if kind == "blackwell" else "native")
    x = activation(8192, k, k, spread=1.0).bfloat16().to(device)
    single = {i: TRITON.linear(x[i : i + 1], prepared) for i in (0, 1, 15, 16, 63, 64, 255, 256, 1000, 4095, 8191)}
    for m in (1, 2, 8, 16, 17, 32, 64, 65, 128, 256, 512, 1024, 8192):
        y = TRITON.linear(x[:m], prepared)
        for i, row in single.items():
            if i < m:
                assert_same_bits(y[i : i + 1], row, f"M={m}, row {i}")
