"""W4A4 in blackwell numerics: every bit as the CPU, in the interpreter and on every device."""

from __future__ import annotations

import pytest
import torch

from anyfp4.ops.linear import linear
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels_triton.linears import TRITON, activation, nvfp4, prepare

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check(x: torch.Tensor, weight: object, device: torch.device, out_dtype: torch.dtype = torch.float32) -> None:
    expected = linear(x, weight, numerics="blackwell", out_dtype=out_dtype)
    got = TRITON.linear(x.to(device), prepare(weight, device, "blackwell"), out_dtype).cpu()
    assert torch.equal(got.isnan(), expected.isnan())
    assert_same_bits(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize(("n", "k", "m"), [(5, 16, 1), (33, 80, 3), (40, 576, 17), (7, 1024, 2)])
def test_random(n: int, k: int, m: int, device: torch.device) -> None:
    check(activation(m, k), nvfp4(n, k), device)
    check(activation(m, k, spread=4.0), nvfp4(n, k, 3, bias=True), device, torch.bfloat16)


@pytest.mark.parametrize("seed", range(3))
def test_truncated_terms(seed: int, device: torch.device) -> None:
    """Any codes and scales, and activations whose blocks differ by up to 2²⁰: the slow path."""
    g = torch.Generator().manual_seed(seed)
    x = activation(4, 576, seed)
    x *= torch.exp2(torch.randint(-9, 9, (4, 36), generator=g).float()).repeat_interleave(16, dim=1)
    x[1, 64:] *= 2.0**-12
    check(x, nvfp4(24, 576, seed, wild=True, inputs=(2.0**-9,)), device)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_small_term_is_cut_before_it_is_added(sign: int, code: int, device: torch.device) -> None:
    """A large accumulator, then blocks below 2^(E−35): added exactly they would cost it its last bit."""
    x = torch.zeros(2, 128)
    x[:, :16] = 6.0 * 448.0
    x[:, 64:] = -sign * 6.0 * 2.0**-9
    weight = nvfp4(3, 128, inputs=(1.0,), wild=True)
    scale = weight.weight.block_scale.view(torch.uint8)
    scale[:, :4], scale[:, 4:] = 0x7E, 1
    codes = 7 if sign > 0 else 15
    weight.weight.packed[:, :8] = codes | codes << 4
    weight.weight.packed[:, 8:] = code | code << 4
    expected = linear(x, weight, numerics="blackwell", out_dtype=torch.float32)
    no_scales = linear(x.index_fill(1, torch.arange(64, 128), 0.0), weight, numerics="blackwell")
    assert torch.equal(expected, no_scales), "the terms must be too small to count"
    check(x, weight, device)


def test_shards_scales_and_pre_quant_scale(device: torch.device) -> None:
    check(activation(5, 128), nvfp4(72, 128, inputs=(0.01, 0.02, 0.01), bias=True), device)
    check(activation(5, 128).bfloat16(), nvfp4(40, 128, pre=True), device, torch.bfloat16)


def test_special_activations(device: torch.device) -> None:
    x = activation(5, 96)
    x[0] = 0
    x[1, 20] = torch.nan
    x[2, 30] = torch.inf
    x[3, :48] = -0.0
    check(x, nvfp4(20, 96), device)


def test_special_scales(device: torch.device) -> None:
    weight = nvfp4(6, 64)
    bits = weight.weight.block_scale.view(torch.uint8)
    bits[0] = 0
    bits[1, 1] = 0x7F
    bits[2, 2] |= 0x80
    bits[3, 0] = 1
    check(activation(3, 64), weight, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 31, 33, 64, 100, 255, 256, 257, 512])
def test_many_tokens_on_the_device(m: int, device: torch.device) -> None:
    check(activation(m, 1024, m, spread=1.0).bfloat16(), nvfp4(300, 1024, m), device, torch.bfloat16)
    check(activation(m, 576, m).bfloat16(), nvfp4(96, 576, m, wild=True), device)
