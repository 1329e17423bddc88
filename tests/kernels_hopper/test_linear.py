"""NVFP4 layers on an H100 or H200: every bit as the bit model has it, for any plan and any number of tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from anyfp4.backends.hopper import HopperBackend, HopperNVFP4
from anyfp4.backends.triton import TritonBackend
from anyfp4.formats import e4m3
from anyfp4.formats.nvfp4 import dequantize_blocks, quantize_blocks
from anyfp4.formats.weights import NVFP4Weight
from anyfp4.kernels import room
from anyfp4.kernels.hopper import dequantize, linear
from anyfp4.kernels.hopper.plan import SEGMENT, Plan
from anyfp4.kernels.hopper.quantize import quantize_values
from anyfp4.numerics import hopper
from anyfp4.ops import linear as reference
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels_hopper.sanitized import PLANS
from tests.kernels_triton.linears import activation, nvfp4, to, values

BACKEND = HopperBackend()
CUDA = torch.device("cuda", 0)
REASON = BACKEND.why_not(CUDA) if torch.cuda.is_available() else "torch sees no GPU"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"needs a Hopper GPU: {REASON}")]


def predicted(a: Tensor, w: Tensor) -> Tensor:
    """Hopper's bits: one chain for each segment, added in order."""
    total = torch.zeros(())
    for start in range(0, a.shape[1], SEGMENT):
        part = hopper.matmul(a[:, start : start + SEGMENT].half(), w[:, start : start + SEGMENT].half())
        total = part if start == 0 else total + part
    return total


def expected(x: Tensor, weight: NVFP4Weight) -> Tensor:
    """The definition, shard by shard; x [M, K] on the GPU as all else."""
    w, alpha = values(weight), reference.alpha(weight)
    parts, row = [], 0
    for i, size in enumerate(weight.weight.shard_sizes):
        a = x
        if weight.input_global_scale is not None:
            a = dequantize_blocks(*quantize_blocks(x, weight.input_global_scale[i]))
        parts.append(predicted(a, w[row : row + size]) * alpha[i])
        row += size
    y = torch.cat(parts, dim=1)
    return y if weight.bias is None else y + weight.bias


def prepared(weight: NVFP4Weight) -> linear.Records:
    data = BACKEND.prepare(weight).data
    assert isinstance(data, HopperNVFP4)
    records: linear.Records = data.packed
    return records


@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "m"), [(64, 64, 1), (130, 576, 5), (576, 1040, 33), (70, 4352, 130), (24, 9216, 3), (200, 768, 300)]
)
def test_the_bits_of_the_model(n: int, k: int, m: int, wild: bool) -> None:
    weight = nvfp4(n, k, m, wild=wild, inputs=(2.0**-7,), bias=m == 5)
    x = activation(m, k, n, spread=1.0).bfloat16().to(CUDA)
    weight = to(weight, CUDA)
    assert isinstance(weight, NVFP4Weight)
    assert_same_bits(BACKEND.linear(x, BACKEND.prepare(weight), torch.float32), expected(x, weight))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_any_plan_gives_the_same_bits(plan: Plan) -> None:
    for n, k, m in ((130, 576, 5), (520, 3072, 70), (24, 4352, 200)):
        weight = to(nvfp4(n, k, m, inputs=(0.01, 0.02, 0.01), bias=True, wild=True), CUDA)
        assert isinstance(weight, NVFP4Weight)
        x = activation(m, k, n, spread=1.0).bfloat16().to(CUDA)
        data = BACKEND.prepare(weight).data
        a = quantize_values(x, data.inverse_scales)
        assert a.shape[0] == 2
        assert_same_bits(linear.linear(a, data.packed, torch.float32, plan), expected(x, weight))
        row = torch.rand(m, device=CUDA)
        got = linear.linear(a, data.packed, torch.bfloat16, plan, row)
        assert_same_bits(got, linear.linear(a, data.packed, torch.bfloat16, PLANS[0], row))


@pytest.mark.parametrize(("n", "k"), [(576, 576), (1000, 4096), (512, 6144), (4096, 4096)])
@pytest.mark.parametrize("weight_only", [False, True])
def test_rows_never_depend_on_others(n: int, k: int, weight_only: bool) -> None:
    weight = to(nvfp4(n, k, weight_only=weight_only), CUDA)
    assert isinstance(weight, NVFP4Weight)
    layer = BACKEND.prepare(weight)
    x = activation(300, k, k, spread=1.0).bfloat16().to(CUDA)
    single = {i: BACKEND.linear(x[i : i + 1], layer) for i in (0, 1, 7, 15, 63, 64, 255, 299)}
    for m in (*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300):
        y = BACKEND.linear(x[:m], layer)
        for i, row in single.items():
            if i < m:
                assert_same_bits(y[i : i + 1], row, f"M={m}, row {i}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_only", [False, True])
def test_the_bits_of_the_triton_backend(dtype: torch.dtype, weight_only: bool) -> None:
    triton = TritonBackend()
    for n, k, m in ((130, 576, 5), (300, 2064, 40), (64, 1024, 270)):
        weight = to(nvfp4(n, k, m, inputs=(0.01, 0.03), weight_only=weight_only, pre=True, bias=True), CUDA)
        assert isinstance(weight, NVFP4Weight)
        x = activation(m, k, n, spread=1.0).to(dtype).to(CUDA)
        assert_same_bits(BACKEND.linear(x, BACKEND.prepare(weight)), triton.linear(x, triton.prepare(weight)), f"M={m}")


@pytest.mark.parametrize("m", [40, 70, 144])
def test_what_lies_behind_an_activation_does_not_matter(m: int) -> None:
    weight = to(nvfp4(520, 3072, inputs=(0.01, 0.02, 0.01)), CUDA)
    assert isinstance(weight, NVFP4Weight)
    data = BACKEND.prepare(weight).data
    x = quantize_values(activation(m, 3072, spread=1.0).bfloat16().to(CUDA), data.inverse_scales)
    behind = torch.full((2 * m + 128, 3072), torch.nan, dtype=torch.bfloat16, device=CUDA)
    behind[: 2 * m] = x.flatten(0, 1)
    with_room = behind[: 2 * m].view(x.shape)
    without = behind[: 2 * m].clone().view(x.shape)
    for rows, tile in ((with_room, 128), (x, 128)):
        assert room.rows(rows, tile).shape[0] == m + -(-m // tile) * tile
    assert room.rows(without, 128).shape[0] == 2 * m
    want = linear.linear(without, data.packed, torch.float32)
    for rows in (with_room, x):
        assert_same_bits(linear.linear(rows, data.packed, torch.float32), want)


def test_nan_of_a_scale_or_an_activation_stays_in_its_row() -> None:
    weight = to(nvfp4(70, 128), CUDA)
    assert isinstance(weight, NVFP4Weight)
    weight.weight.block_scale.view(torch.uint8)[1, 1] = e4m3.NAN
    x = activation(3, 128).to(CUDA)
    x[1, 5] = torch.nan
    y = BACKEND.linear(x, BACKEND.prepare(weight))
    assert y[:, 1].isnan().all() and y[1].isnan().all()
    y[:, 1], y[1] = 0, 0
    assert not y.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quantized_and_dequantized_values(dtype: torch.dtype) -> None:
    x = activation(37, 144, spread=4.0).to(dtype).to(CUDA)
    x[3, 7], x[5, 9], x[6] = torch.nan, torch.inf, 0
    scales = torch.tensor([0.01, 3.0], device=CUDA)
    pre = torch.rand(144, device=CUDA).to(dtype) + 0.5
    for share, factor in itertools.product((1, 4), (None, pre)):
        for whole in (x, torch.cat((x, x), dim=1)[:, :144], torch.cat((x[:, :2], x), dim=1)[:, 2:]):
            got = quantize_values(whole, 1.0 / scales, factor, share)
            for i in range(2):
                want = dequantize_blocks(*quantize_blocks(x if factor is None else x * factor, scales[i])).double()
                assert torch.equal(got[i].double().nan_to_num(1234.0), want.nan_to_num(1234.0)), (share, i)
    weight = to(nvfp4(150, 144, wild=True, inputs=(0.1, 0.2)), CUDA)
    assert isinstance(weight, NVFP4Weight)
    assert torch.equal(dequantize.dequantize(prepared(weight), dtype).double(), values(weight))


def test_a_captured_graph_replays_the_same_bits() -> None:
    weight = to(nvfp4(512, 2048), CUDA)
    assert isinstance(weight, NVFP4Weight)
    layer, x = BACKEND.prepare(weight), activation(20, 2048).bfloat16().to(CUDA)
    want = BACKEND.linear(x, layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain = [BACKEND.linear(x, layer) for _ in range(20)]
    graph.replay()
    for y in chain:
        assert_same_bits(y, want)
