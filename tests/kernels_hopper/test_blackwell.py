"""Blackwell numerics on an H100 or H200: every bit as the definition, by any plan, on every path of the kernel."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from anyfp4.backends.hopper import HopperBackend, HopperBlackwell
from anyfp4.formats import e2m1
from anyfp4.formats.nvfp4 import quantize_blocks
from anyfp4.formats.weights import NVFP4Weight
from anyfp4.kernels.hopper import blackwell, compiler, layout
from anyfp4.kernels.hopper import quantize as activations
from anyfp4.kernels.hopper.blackwell_plans import MEASURED, STATIC, BlackwellPlan, choose
from anyfp4.kernels.hopper.plans import MOST
from anyfp4.ops.linear import linear
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels_hopper.sanitized import BLACKWELL_PLANS
from tests.kernels_hopper.test_kernels import SHAPES, TOKENS, needs_nvrtc
from tests.kernels_triton.linears import activation, nvfp4, to

BACKEND = HopperBackend()
CUDA = torch.device("cuda", 0)
REASON = BACKEND.why_not(CUDA) if torch.cuda.is_available() else "torch sees no GPU"


def on_gpu(test: object) -> object:
    return pytest.mark.gpu(pytest.mark.skipif(REASON is not None, reason=f"needs a Hopper GPU: {REASON}")(test))


def layer(n: int, k: int, seed: int, **options: object) -> NVFP4Weight:
    weight = to(nvfp4(n, k, seed, **options), CUDA)  # type: ignore[arg-type]
    assert isinstance(weight, NVFP4Weight)
    return weight


def inputs(kind: str, m: int, k: int, seed: int) -> Tensor:
    """``even`` keeps to the cheap way, ``spread`` leaves it now and then, ``steps`` is cut, ``garbage`` everywhere."""
    x = activation(m, k, seed, spread={"even": 0.0, "spread": 2.0, "steps": 0.0, "garbage": 6.0}[kind])
    if kind == "steps":
        g = torch.Generator().manual_seed(seed)
        x *= torch.exp2(torch.randint(-9, 9, (m, k // 16), generator=g).float()).repeat_interleave(16, dim=1)
    return x.to(CUDA)


def check(
    x: Tensor, weight: NVFP4Weight, out_dtype: torch.dtype = torch.float32, plan: BlackwellPlan | None = None
) -> None:
    expected = linear(x, weight, numerics="blackwell", out_dtype=out_dtype)
    data = BACKEND.prepare(weight, "blackwell").data
    assert isinstance(data, HopperBlackwell)
    pre = None if data.pre_quant_scale is None else data.pre_quant_scale.to(x.dtype)
    values, blocks = activations.quantize_blocks(x, data.inverse_scales, pre)
    got = blackwell.linear(values, blocks, data.packed, out_dtype, plan)
    assert torch.equal(got.isnan(), expected.isnan())
    assert_same_bits(got.nan_to_num(7.0), expected.nan_to_num(7.0), str(plan))


@pytest.mark.parametrize("processors", [132, 114, 78])
def test_every_plan_fits_the_chip(processors: int) -> None:
    for n, k in SHAPES:
        for m in TOKENS:
            plan = choose(n, k, m, processors)
            assert plan.shared(k) <= MOST - STATIC and plan.stages >= 2 and plan.threads <= 1024, (n, k, m, plan)
            assert plan.parts * plan.step <= 32 and plan.row_tiles <= 7 and (plan.sync or plan.step <= 2)
            if plan.registers:
                launch = 65536 // plan.threads // 8 * 8
                assert plan.registers * (plan.threads - 128) + 40 * 128 <= launch * plan.threads


@needs_nvrtc
@pytest.mark.parametrize("plan", [plan.fitted(4096) for plan, *_ in MEASURED], ids=str)
def test_plans_compile_to_additions_toward_zero(plan: BlackwellPlan) -> None:
    cubin, log = compiler.compile_with_log(blackwell.FILES, plan.defines, ("--ptxas-options=-v",))
    spilled = re.search(r"(\d+) bytes spill stores", log)
    # what is spilled is of the way that is rarely taken
    assert spilled is not None and int(spilled[1]) <= 200, log
    assert "serialized" not in log and cubin[:4] == b"\x7fELF"


def test_what_is_said_of_records() -> None:
    weight = nvfp4(150, 208, 3, wild=True).weight
    scale = weight.block_scale.view(torch.uint8).clone()
    scale[5], scale[20:40, 4:8] = 0, 0
    found = blackwell.bounds(weight.packed, scale, (70, 80))
    assert found.shape == (4, 4, 3)
    value = scale.view(torch.float8_e4m3fn).double()
    numbers = e2m1.decode_packed(weight.packed).double() * value.repeat_interleave(16, dim=1)
    starts = ((0, 64), (64, 70), (70, 134), (134, 150))
    for tile, (first, last) in enumerate(starts):
        exponents = [v for v in value[first:last].flatten().tolist() if v > 0]
        lowest = min(map(exponent, exponents))
        whole = numbers[first:last].square().sum(dim=1).max().item()
        assert abs(found[tile, 0, 2:].view(torch.float32).item() - whole) <= 20 * 2.0**-24 * whole  # 16 are added
        for chunk in range(4):
            some = value[first:last, 4 * chunk : 4 * chunk + 4]
            norms, least, most = [0.0], [], []
            for row in range(last - first):
                here = [exponent(v) for v in some[row].tolist() if v > 0]
                if here:
                    least, most = [*least, min(here)], [*most, max(here)]
                    norm = numbers[first + row, 64 * chunk : 64 * chunk + 64].norm().item()
                    norms.append((norm / 2.0 ** min(here)) ** 2)
            bits = int(found[tile, chunk, 1])
            assert [(bits >> shift & 255) - 64 for shift in (0, 8, 16)] == [min(least), max(most), lowest]
            norm = found[tile, chunk, :1].view(torch.float32).item()
            # four float32 numbers are added: three roundings
            assert abs(norm - max(norms)) <= 3 * 2.0**-24 * max(norms)


def exponent(scale: float) -> int:
    return max(torch.tensor(scale).frexp().exponent.item() - 1, -6)


@on_gpu
@pytest.mark.parametrize("kind", ["even", "spread", "steps", "garbage"])
@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "m"),
    [(64, 64, 1), (5, 16, 2), (130, 592, 5), (576, 1040, 33), (70, 4352, 130), (24, 9216, 3), (1500, 768, 300)],
)
def test_the_bits_of_the_definition(n: int, k: int, m: int, wild: bool, kind: str) -> None:
    check(inputs(kind, m, k, n), layer(n, k, m, wild=wild, inputs=(2.0**-7,), bias=m == 5))


@on_gpu
@pytest.mark.parametrize("plan", BLACKWELL_PLANS, ids=str)
def test_any_plan_gives_the_same_bits(plan: BlackwellPlan) -> None:
    for kind, n, k, m in (
        ("even", 130, 592, 5),
        ("spread", 520, 3072, 70),
        ("steps", 24, 4352, 200),
        ("garbage", 300, 1104, 9),
    ):
        for wild in (False, True):
            weight = layer(n, k, m, inputs=(0.01, 0.02, 0.01), bias=True, wild=wild)
            check(inputs(kind, m, k, n), weight, plan=plan.fitted(k))


@on_gpu
@pytest.mark.parametrize(("n", "k"), [(576, 576), (1000, 4096), (9000, 1024)])
def test_rows_never_depend_on_others(n: int, k: int) -> None:
    prepared = BACKEND.prepare(layer(n, k, n), "blackwell")
    x = inputs("spread", 300, k, k).bfloat16()
    single = {i: BACKEND.linear(x[i : i + 1], prepared) for i in (0, 1, 7, 15, 63, 64, 255, 299)}
    for m in (*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300):
        y = BACKEND.linear(x[:m], prepared)
        for i, row in single.items():
            if i < m:
                assert_same_bits(y[i : i + 1], row, f"M={m}, row {i}")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_shards_scales_and_types(dtype: torch.dtype) -> None:
    for n, k, m in ((130, 576, 5), (300, 2064, 40), (64, 1024, 270)):
        x = inputs("spread", m, k, n).to(dtype)
        check(x, layer(n, k, m, inputs=(0.01, 0.03, 0.01), pre=True, bias=True), dtype)


@on_gpu
def test_special_numbers() -> None:
    weight = nvfp4(70, 128)
    bits = weight.weight.block_scale.view(torch.uint8)
    bits[0], bits[1, 1], bits[3, 0] = 0, 0x7F, 1
    bits[2, 2] |= 0x80
    on_device = to(weight, CUDA)
    assert isinstance(on_device, NVFP4Weight)
    x = inputs("even", 7, 128, 0)
    x[0], x[1, 20], x[2, 30], x[3, :48] = 0, torch.nan, torch.inf, -0.0
    check(x, on_device)


@on_gpu
@pytest.mark.parametrize("share", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_is_said_of_blocks(share: int, dtype: torch.dtype) -> None:
    x = inputs("spread", 33, 592, 1).to(dtype)
    x[3], x[4, 5] = 0, torch.nan
    scales = torch.tensor([0.01, 0.5], device=CUDA)
    values, blocks = activations.quantize_blocks(x, 1.0 / scales, None, share)
    assert_same_bits(values.nan_to_num(7.0), activations.quantize_values(x, 1.0 / scales).nan_to_num(7.0))
    for i in range(2):
        packed, scale = quantize_blocks(x, scales[i])
        assert torch.equal(blocks[i] & 0xFF, scale.view(torch.uint8).to(torch.int16))
        squares = e2m1.decode_packed(packed).square().view(33, -1, 16).sum(dim=2)
        assert torch.equal(blocks[i] >> 8 & 0xFF, torch.ceil(squares / 4).to(torch.int16))


def test_signs_of_scales_do_not_count() -> None:
    """And a weight comes back as it was, but for them and for the codes of blocks whose scale is zero."""
    weight = nvfp4(70, 144, 5)
    bits = weight.weight.block_scale.view(torch.uint8)
    bits[::3] |= 0x80
    data = BACKEND.prepare(weight, "blackwell").data
    assert isinstance(data, HopperBlackwell)
    packed, scale = layout.unpack(data.packed.records.records, 144, (70,))
    assert torch.equal(packed, weight.weight.packed) and torch.equal(scale, bits & 0x7F)
