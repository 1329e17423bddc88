"""Quantization against a step-by-step float32 oracle, dequantization against exact arithmetic: equal bits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.formats import e2m1, e4m3, nvfp4
from anyfp4.testing.bitwise import assert_same_bits
from tests.formats import oracles

F32 = np.float32
SCALES = np.array([float(v) for v in oracles.E4M3], F32)


def quantize_block(block: np.ndarray, global_scale: np.float32) -> tuple[list[int], int]:
    """One block of 16 float32 numbers: codes and scale byte. numpy rounds each float32 operation once."""
    with np.errstate(over="ignore", invalid="ignore"):
        g = F32(1) / global_scale
        amax = np.abs(block).max()  # NaN if there is one
        s = g * (amax * (F32(1) / F32(6)))
        if np.isnan(s):
            return [], 0x7F
        byte = oracles.nearest(oracles.E4M3, float(min(s, F32(448))))
        if byte == 0:
            return [0] * 16, 0
        factor = g / SCALES[byte]
        scaled = [float(x * factor) for x in block]
    return [oracles.nearest(oracles.E2M1, x) | (8 if math.copysign(1, x) < 0 else 0) for x in scaled], byte


def check_against_oracle(x: Tensor, global_scale: float, what: str = "") -> None:
    packed, scale = nvfp4.quantize_blocks(x, torch.tensor(global_scale))
    codes = e2m1.unpack(packed).reshape(-1, 16).tolist()
    scale_bytes = scale.view(torch.uint8).flatten().tolist()
    blocks = x.to(torch.float32).reshape(-1, 16).numpy()
    for i, block in enumerate(blocks):
        expected, byte = quantize_block(block, F32(global_scale))
        if byte == 0x7F:
            assert scale_bytes[i] & 0x7F == 0x7F, (what, i)
        else:
            assert (codes[i], scale_bytes[i]) == (expected, byte), (what, i)


def inputs(k: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, float]]:
    """Yields a name, [M, k] of ``dtype``, and a global scale."""
    g = torch.Generator().manual_seed(k)
    x = torch.randn(6, k, generator=g)
    calibrated = float(x.abs().max()) / nvfp4.MAX
    yield "amax maps to the largest scale", x.to(dtype), calibrated
    yield "outside the calibrated range", (x * 40).to(dtype), calibrated
    yield "subnormal scales and zeros", (x * torch.exp2(-torch.arange(6.0) - 8)[:, None]).to(dtype), calibrated
    spread = torch.exp2(torch.randint(-14, 14, (6, k), generator=g).float())
    yield "wide", (x * spread).to(dtype), 0.37
    yield "far too large a global scale", x.to(dtype), 3e4
    blocks = x.clone().view(6, -1, 16)
    blocks[::2, 0] = 0
    blocks[1, -1] = -0.0
    yield "blocks of zeros", blocks.view(6, k).to(dtype), calibrated
    halves = torch.randint(-13, 14, (6, k), generator=g) / 4  # with g = 1 and amax 6 × s these are ties
    halves.view(6, -1, 16)[..., 3] = 6.0
    yield "ties", halves.to(dtype), 1.0
    odd = x.clone()
    odd[1, 3], odd[2, 5], odd[3, 7], odd[4, 8] = math.inf, -math.inf, math.nan, math.inf
    odd[4, 9] = math.nan
    yield "infinities and NaNs", odd.to(dtype), calibrated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [16, 576])
def test_quantize_blocks_equals_the_oracle(k: int, dtype: torch.dtype) -> None:
    for name, x, global_scale in inputs(k, dtype):
        check_against_oracle(x, global_scale, name)


@given(
    block=st.lists(st.floats(width=32, allow_nan=False), min_size=16, max_size=16),
    exponent=st.integers(-40, 40),
    mantissa=st.floats(1, 2, width=32),
)
@settings(max_examples=200, deadline=None)
def test_any_block_equals_the_oracle(block: list[float], exponent: int, mantissa: float) -> None:
    check_against_oracle(torch.tensor([block]), float(F32(mantissa) * F32(2.0**exponent)))


@given(block=st.lists(st.floats(-8, 8, width=16), min_size=16, max_size=16), exponent=st.integers(-6, 6))
@settings(max_examples=200, deadline=None)
def test_any_ordinary_block_equals_the_oracle(block: list[float], exponent: int) -> None:
    check_against_oracle(torch.tensor([block]), 1.1 * 2.0**exponent)


def test_the_order_of_operations_by_hand() -> None:
    """Multiplying by 1/6 and dividing by 6 round differently for some amax; the former is the rule."""
    amax = torch.arange(1, 2**16, dtype=torch.float32) / 997
    sixth = amax * torch.tensor(1 / 6, dtype=torch.float32)
    differ = sixth != amax / 6
    assert bool(differ.any())
    x = torch.zeros(len(amax), 16)
    x[:, 0] = amax
    _, scale = nvfp4.quantize_blocks(x, torch.tensor(0.3))
    g = 1 / torch.tensor(0.3)
    assert_same_bits(scale.flatten().view(torch.uint8), e4m3.encode(g * sixth).view(torch.uint8))


def test_infinity_saturates_and_nan_marks_its_block() -> None:
    x = torch.ones(2, 32)
    x[0, 1], x[0, 2] = math.inf, -math.inf
    x[1, 20] = math.nan
    packed, scale = nvfp4.quantize_blocks(x, torch.tensor(1.0))
    codes = e2m1.unpack(packed)
    assert scale[0, 0].item() == 448.0
    assert codes[0, :4].tolist() == [0, 7, 15, 0]
    assert e4m3.is_nan(scale).tolist() == [[False, False], [False, True]]
    clean, clean_scale = nvfp4.quantize_blocks(torch.ones(1, 16), torch.tensor(1.0))
    assert_same_bits(packed[1:, :8], clean)
    assert_same_bits(scale[1:, :1], clean_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    for name, x, global_scale in inputs(576, dtype):
        scale = torch.tensor(global_scale)
        packed, block_scale = nvfp4.quantize_blocks(x, scale)
        for i in range(x.shape[0]):
            one_packed, one_scale = nvfp4.quantize_blocks(x[i : i + 1], scale)
            assert_same_bits(one_packed, packed[i : i + 1], f"{name}, row {i}")
            assert_same_bits(one_scale, block_scale[i : i + 1], f"{name}, row {i}")


def test_leading_axes_and_empty_inputs() -> None:
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    packed, scale = nvfp4.quantize_blocks(x, torch.tensor([0.01]))
    assert packed.shape == (2, 3, 16) and scale.shape == (2, 3, 2)
    flat, flat_scale = nvfp4.quantize_blocks(x.view(6, 32), torch.tensor(0.01))
    assert_same_bits(packed.view(6, 16), flat)
    assert_same_bits(scale.view(6, 2), flat_scale)
    packed, scale = nvfp4.quantize_blocks(torch.zeros(0, 32), torch.tensor(1.0))
    assert packed.shape == (0, 16) and scale.shape == (0, 2)
    assert nvfp4.dequantize_blocks(packed, scale).shape == (0, 32)


def random_tensor(rows: int, k: int, global_scale: Tensor, shard_sizes: tuple[int, ...] = ()) -> nvfp4.NVFP4Tensor:
    g = torch.Generator().manual_seed(rows * k)
    packed = torch.randint(0, 256, (rows, k // 2), generator=g).to(torch.uint8)
    scale = torch.randint(0, 0x7F, (rows, k // 16), generator=g).to(torch.uint8).view(torch.float8_e4m3fn)
    return nvfp4.NVFP4Tensor(packed, scale, global_scale, shard_sizes)


def exact_values(t: nvfp4.NVFP4Tensor) -> np.ndarray:
    """code × scale in float64: at most 6 significant bits."""
    codes = e2m1.unpack(t.packed).numpy()
    values = np.array([float(v) for v in oracles.E2M1])[codes & 7] * np.where(codes & 8, -1.0, 1.0)
    return values * np.repeat(SCALES[t.block_scale.view(torch.uint8).numpy()].astype(np.float64), 16, axis=1)


def test_code_times_scale_is_exact_in_float32_bfloat16_and_float16() -> None:
    """All 16 codes with all 127 scales."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(127, 1)
    scale = torch.arange(127, dtype=torch.uint8)[:, None].view(torch.float8_e4m3fn)
    t = nvfp4.NVFP4Tensor(e2m1.pack(codes), scale, torch.ones(1))
    exact = torch.from_numpy(exact_values(t))
    values = nvfp4.dequantize_blocks(t.packed, t.block_scale)
    assert values.dtype == torch.float32
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_same_bits(values.to(dtype).to(torch.float64), exact, str(dtype))


@pytest.mark.parametrize("k", [16, 576])
def test_dequantize_rounds_once(k: int) -> None:
    """6 bits times 24 is exact in float64, so rounding that product to float32 rounds once."""
    global_scale = torch.tensor([0.0123, 3.3e-5, 1.0])
    t = random_tensor(12, k, global_scale, (3, 7, 2))
    per_row = np.repeat(global_scale.numpy().astype(np.float64), (3, 7, 2))[:, None]
    expected = torch.from_numpy((exact_values(t) * per_row).astype(F32))
    assert_same_bits(nvfp4.dequantize(t), expected)
    assert_same_bits(nvfp4.dequantize(t, torch.bfloat16), expected.to(torch.bfloat16))


def test_compressed_tensors_dequantizes_the_same() -> None:
    """The library divides the scale by its global scale first; with a power of two that is exact."""
    t = random_tensor(8, 64, torch.tensor([2.0**-7]))
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    theirs = ct_dequantize(
        unpack_fp4_from_uint8(t.packed, 8, 64, dtype=torch.float32),
        t.block_scale.to(torch.float32),
        args=args,
        global_scale=torch.tensor([2.0**7]),
        dtype=torch.float32,
    )
    assert_same_bits(nvfp4.dequantize(t), theirs)


def test_quantize_chooses_the_global_scale() -> None:
    w = torch.randn(7, 48, generator=torch.Generator().manual_seed(2))
    t = nvfp4.quantize(w)
    assert t.global_scale.item() == F32(w.abs().max().item()) / F32(2688)
    assert t.shape == (7, 48) and t.shard_sizes == (7,)
    assert t.block_scale.to(torch.float32).max().item() == 448.0
    packed, scale = nvfp4.quantize_blocks(w, t.global_scale)
    assert_same_bits(t.packed, packed)
    assert_same_bits(t.block_scale, scale)
    assert nvfp4.quantize(w, 0.5).global_scale.tolist() == [0.5]
    assert nvfp4.quantize(w, torch.tensor([0.25])).global_scale.tolist() == [0.25]


def test_quantized_values_quantize_to_themselves() -> None:
    """A block that holds 6 × its scale is a fixed point where g/s and the products are exact: powers of two."""
    t = random_tensor(20, 64, torch.tensor([2.0**-5]))
    powers = torch.randint(2, 16, (20, 4), generator=torch.Generator().manual_seed(3)) * 8  # 2^-5…2^8
    codes = e2m1.unpack(t.packed) & 7 | (e2m1.unpack(t.packed) & 8) * ((e2m1.unpack(t.packed) & 7) > 0)
    codes.view(20, 4, 16)[..., 5] = 7
    t = nvfp4.NVFP4Tensor(e2m1.pack(codes), powers.to(torch.uint8).view(torch.float8_e4m3fn), t.global_scale)
    packed, scale = nvfp4.quantize_blocks(nvfp4.dequantize(t), t.global_scale)
    assert_same_bits(scale, t.block_scale)
    assert_same_bits(packed, t.packed)


def test_a_tensor_of_zeros() -> None:
    t = nvfp4.quantize(torch.zeros(4, 32))
    assert t.global_scale.tolist() == [1.0]
    assert not t.packed.any() and not t.block_scale.view(torch.uint8).any()
    assert_same_bits(nvfp4.dequantize(t), torch.zeros(4, 32))


def test_the_smallest_tensors_quantize() -> None:
    for magnitude in (1e-30, 1e-38, 1e-45):
        t = nvfp4.quantize(torch.full((1, 16), magnitude))
        assert math.isfinite(1 / t.global_scale.item())
        assert bool(nvfp4.dequantize(t).isfinite().all())


def test_row_global_scale_and_sizes() -> None:
    t = random_tensor(6, 32, torch.tensor([1.0, 2.0, 3.0]), (1, 3, 2))
    assert t.row_global_scale().tolist() == [1, 2, 2, 2, 3, 3]
    assert t.nbytes == 6 * 16 + 6 * 2 + 3 * 4
    assert t.device == torch.device("cpu")
    assert random_tensor(6, 32, torch.tensor(2.0)).global_scale.shape == (1,)


@pytest.mark.parametrize(
    ("x", "global_scale", "message"),
    [
        (torch.zeros(2, 16, dtype=torch.float64), torch.tensor(1.0), r"^x must be float32, bfloat16 or float16"),
        (torch.zeros(2, 24), torch.tensor(1.0), r"last axis of x must be a positive multiple of 16, got \[2, 24\]"),
        (torch.zeros(2, 0), torch.tensor(1.0), r"last axis of x"),
        (torch.tensor(1.0), torch.tensor(1.0), r"last axis of x"),
        (torch.zeros(2, 16), torch.ones(2), r"^global_scale must be float32 \[\]"),
        (torch.zeros(2, 16), torch.ones(1, dtype=torch.float64), r"^global_scale must be float32"),
    ],
)
def test_wrong_arguments_of_quantize_blocks(x: Tensor, global_scale: Tensor, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        nvfp4.quantize_blocks(x, global_scale)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan, 1e-39])
def test_wrong_global_scales(bad: float) -> None:
    with pytest.raises(InvalidArgumentError, match="global_scale must be positive and finite"):
        nvfp4.quantize(torch.ones(2, 16), bad)
    with pytest.raises(InvalidArgumentError, match="global_scale must be positive and finite"):
        nvfp4.check_global_scale(torch.tensor([1.0, bad]))


def test_wrong_arguments_of_quantize() -> None:
    with pytest.raises(InvalidArgumentError, match=r"w must be a matrix \[N, K\], got \[16\]"):
        nvfp4.quantize(torch.ones(16))
    for bad in (math.nan, math.inf):
        with pytest.raises(InvalidArgumentError, match="w holds a NaN or an infinity"):
            nvfp4.quantize(torch.full((2, 16), bad))
        with pytest.raises(InvalidArgumentError, match="holds"):
            nvfp4.default_global_scale(torch.full((2, 16), bad))
    with pytest.raises(InvalidArgumentError, match="global_scale must be float32"):
        nvfp4.check_global_scale(torch.ones(1, dtype=torch.float64))


U8, F8, F32T = torch.uint8, torch.float8_e4m3fn, torch.float32


@pytest.mark.parametrize(
    ("packed", "block_scale", "global_scale", "shard_sizes", "message"),
    [
        ((torch.int8, 4, 8), (F8, 4, 1), (F32T, 1), (), r"^packed must be uint8 \[N, K/2\]"),
        ((U8, 8), (F8, 4, 1), (F32T, 1), (), r"^packed must be"),
        ((U8, 4, 12), (F8, 4, 1), (F32T, 1), (), r"^K = 24 is not a positive multiple of 16"),
        ((U8, 4, 0), (F8, 4, 0), (F32T, 1), (), r"^K = 0"),
        ((U8, 4, 8), (F8, 4, 2), (F32T, 1), (), r"^block_scale must be float8_e4m3fn \[4, 1\]"),
        ((U8, 4, 8), (U8, 4, 1), (F32T, 1), (), r"^block_scale must be"),
        ((U8, 4, 8), (F8, 4, 1), (F32T, 2), (), r"^global_scale must be float32 \[1\]"),
        ((U8, 4, 8), (F8, 4, 1), (torch.float64, 1), (), r"^global_scale must be float32"),
        ((U8, 4, 8), (F8, 4, 1), (F32T, 2), (2, 1), r"^shard_sizes \(2, 1\) do not add up to 4"),
        ((U8, 4, 8), (F8, 4, 1), (F32T, 2), (4, 0), r"^shard_sizes"),
        ((U8, 4, 8), (F8, 4, 1), (F32T, 1), (2, 2), r"^global_scale must be float32 \[2\]"),
    ],
)
def test_wrong_tensors(
    packed: tuple[torch.dtype, int],
    block_scale: tuple[torch.dtype, int],
    global_scale: tuple[torch.dtype, int],
    shard_sizes: tuple[int, ...],
    message: str,
) -> None:
    tensors = [torch.zeros(shape).to(dtype) for dtype, *shape in (packed, block_scale, global_scale)]
    with pytest.raises(InvalidArgumentError, match=message):
        nvfp4.NVFP4Tensor(*tensors, shard_sizes)


def test_tensors_on_two_devices() -> None:
    with pytest.raises(InvalidArgumentError, match="devices"):
        nvfp4.NVFP4Tensor(torch.zeros(1, 8, dtype=U8), torch.zeros(1, 1).to(F8), torch.ones(1, device="meta"))
