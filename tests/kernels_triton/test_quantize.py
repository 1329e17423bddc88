"""Activation quantization in Triton: every bit as ``formats/nvfp4.py``."""

from __future__ import annotations

import pytest
import torch

from anyfp4.formats import e2m1, e4m3
from anyfp4.formats.nvfp4 import dequantize_blocks, quantize_blocks
from anyfp4.formats.weights import FP8Weight
from anyfp4.kernels.triton.quantize import quantize_packed, quantize_values
from anyfp4.kernels.triton.quantize_fp8 import quantize_fp8
from anyfp4.ops.linear import linear
from anyfp4.testing.bitwise import assert_same_bits

# the interpreter is numpy, which warns of 1/0 and of infinity × 0
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(x: torch.Tensor, scale: float, device: torch.device) -> None:
    """Both forms against the reference, which runs on the CPU."""
    global_scale = torch.tensor([scale], dtype=torch.float32)
    packed, block_scale = quantize_blocks(x, global_scale)
    inverse = (1.0 / global_scale).to(device)
    got_packed, got_scale = quantize_packed(x.to(device), inverse)
    assert_same_bits(got_scale.view(torch.uint8), block_scale.view(torch.uint8), "block scales")
    assert_same_bits(got_packed, packed, "codes")
    expected = dequantize_blocks(packed, block_scale).half()
    values, scales = quantize_values(x.to(device), inverse.view(1))
    assert_same_bits(scales[0], block_scale.view(torch.uint8), "block scales")
    got = values[0].cpu()
    assert torch.equal(got.isnan(), expected.isnan())
    assert_same_bits(got.nan_to_num(7.0), expected.nan_to_num(7.0), "values")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0, 4, 12])
def test_random(dtype: torch.dtype, spread: int, device: torch.device) -> None:
    g = torch.Generator().manual_seed(spread)
    x = torch.randn(5, 304, generator=g) * torch.exp2(torch.randn(5, 304, generator=g) * spread)
    for scale in (1.0, 0.0037, 123.4, 2.0**-100, 2.0**100):
        check(x.to(dtype), scale, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.zeros(8, 32, dtype=torch.float32)
    x[0, 3] = torch.inf
    x[1, 3], x[1, 4] = -torch.inf, 2.0
    x[2, 5] = torch.nan
    x[3] = -0.0
    x[4, 1], x[4, 2] = torch.nan, torch.inf
    x[5] = torch.finfo(dtype).max
    x[6] = torch.finfo(dtype).tiny
    x[7, ::2] = torch.finfo(dtype).smallest_normal / 4
    for scale in (1.0, 2.0**-126, 2.0**120, 1e-38, 3e38 / 2):
        check(x.to(dtype), scale, device)


def test_ties_and_their_neighbours(device: torch.device) -> None:
    """With amax 6 · 2^e and global scale 1/g = 1 a block's scale is a power of two, and ties are hit exactly."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    points = torch.cat([ties, torch.nextafter(ties, torch.tensor(9.0)), torch.nextafter(ties, torch.tensor(0.0))])
    blocks = torch.zeros(2 * len(points), 16)
    blocks[:, 0] = 6.0
    blocks[:, 1] = torch.cat([points, -points])
    for exponent in (-6, 0, 5):
        check((blocks * 2.0**exponent).view(2, -1), 1.0, device)


def test_every_scale_tie(device: torch.device) -> None:
    """amax · (1/6) around each midpoint of two E4M3 numbers, subnormal ones included."""
    values = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (values[1:] + values[:-1]) / 2
    amax = (torch.cat([values, middle]) * 6).repeat_interleave(5)
    steps = torch.tensor([-2, -1, 0, 1, 2], dtype=torch.int32).repeat(len(amax) // 5)
    amax = (amax.view(torch.int32) + steps).clamp(min=0).view(torch.float32)
    x = torch.zeros(len(amax), 16)
    x[:, 7] = amax
    check(x.view(5, -1), 1.0, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pre_quant_scale_is_rounded_to_the_type_of_x(dtype: torch.dtype, device: torch.device) -> None:
    g = torch.Generator().manual_seed(1)
    x, pre = torch.randn(5, 48, generator=g).to(dtype), (torch.rand(48, generator=g) + 0.5).to(dtype)
    one = torch.ones(1)
    packed, scale = quantize_blocks(x * pre, one)
    got = quantize_packed(x.to(device), one.to(device), pre.to(device))
    assert_same_bits(got[0], packed)
    assert_same_bits(got[1].view(torch.uint8), scale.view(torch.uint8))


def test_a_row_on_its_own(device: torch.device) -> None:
    x = torch.randn(33, 64, generator=torch.Generator().manual_seed(2)).to(device)
    inverse = torch.ones(1, device=device)
    whole = quantize_values(x, inverse.view(1))[0][0]
    for i in (0, 7, 32):
        assert_same_bits(quantize_values(x[i : i + 1], inverse.view(1))[0][0], whole[i : i + 1])


def test_rows_may_lie_apart(device: torch.device) -> None:
    wide = torch.randn(9, 96, generator=torch.Generator().manual_seed(3)).to(device)
    inverse = torch.ones(1, device=device)
    part = wide[:, 16:80]
    assert_same_bits(quantize_values(part, inverse.view(1))[0], quantize_values(part.contiguous(), inverse.view(1))[0])


def test_range_of_the_formats() -> None:
    """The largest product must stay finite in float16, and the smallest must not be lost."""
    assert torch.tensor(e2m1.MAX * e4m3.MAX).half().item() == e2m1.MAX * e4m3.MAX
    assert torch.tensor(0.5 * 2.0**-9).half().item() == 2.0**-10


def test_dynamic_fp8_of_tiny_and_ordinary_rows(device: torch.device) -> None:
    """Times the identity, the reference shows code × scale; below 2⁻¹¹⁷ a row's scale is 1 and its codes are 0."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    x[1:] *= torch.tensor([0.0, 2.0**-130, 2.0**-118, 2.0**-117, 2.0**-116, 2.0**-60, 2.0**60])[:, None]
    x[3] = 2.0**-117  # the least amax that has a scale of its own
    x[4] = 2.0**-117 - 2.0**-141  # and the number below it
    values, scale = quantize_fp8(x.to(device), None)
    shown = linear(x, FP8Weight(torch.eye(64).to(torch.float8_e4m3fn), torch.ones(1)))
    assert scale[4].item() == 1.0 and scale[3].item() == (torch.tensor(2.0**-117) / 448).item()
    assert_same_bits((values.float() * scale[:, None]).cpu() + 0.0, shown)
