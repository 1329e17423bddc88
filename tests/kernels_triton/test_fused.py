"""Norm and activation that quantize: the bits of the separate ops, and row by row."""

from __future__ import annotations

import pytest
import torch

from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels.triton import activation, fused, norm, quantize
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels.cases import DTYPES, generator

#: one scale that saturates nothing, one that makes zeros of small blocks
SCALES = torch.tensor([90.0, 0.3])


def rand(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(*shape, generator=generator(seed)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k"), [(1, 16), (5, 576), (2, 1040)])
@pytest.mark.parametrize(("add", "pre"), [(False, False), (True, False), (True, True)])
def test_norm(device: torch.device, rows: int, k: int, add: bool, pre: bool, dtype: torch.dtype) -> None:
    x, r = (rand(rows, k, seed=s, dtype=dtype).to(device) for s in (0, 1))
    x[0, 0] = torch.nan
    w, scales = rand(k, seed=2, dtype=dtype).to(device), SCALES.to(device)
    if add:
        y, total = norm.add_rms_norm(x, r, w, 1e-5)
    else:
        y, total = norm.rms_norm(x, w, 1e-5), x
    factor = rand(k, seed=7, dtype=dtype).to(device) if pre else None
    expected, expected_scale = quantize.quantize_values(y, scales, factor)
    values, scale, got_total = fused.norm_quantize(x, r if add else None, w, 1e-5, scales, factor)
    assert_same_bits(got_total[1:].cpu(), total[1:].cpu())
    for i in range(2):
        assert_same_bits(scale[i].cpu(), expected_scale[i].cpu())
        assert_same_bits(values[i, 1:].cpu(), expected[i, 1:].cpu())
        assert torch.equal(values[i, 0].isnan(), expected[i, 0].isnan())
    for row in range(1, min(rows, 3)):
        one = slice(row, row + 1)
        alone = fused.norm_quantize(x[one], r[one] if add else None, w, 1e-5, scales, factor)
        assert_same_bits(alone[0].cpu(), values[:, one].cpu().contiguous())
        assert_same_bits(alone[1].cpu(), scale[:, one].cpu().contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "pre"), [(1, 16, False), (2, 1536, False), (2, 1040, True)])
def test_silu_mul(device: torch.device, rows: int, width: int, pre: bool, dtype: torch.dtype) -> None:
    x, scales = rand(rows, 2 * width, seed=3, dtype=dtype).to(device), SCALES.to(device)
    factor = rand(width, seed=7, dtype=dtype).to(device) if pre else None
    expected, expected_scale = quantize.quantize_values(activation.silu_mul(x), scales, factor)
    values, scale = fused.silu_mul_quantize(x, scales, factor)
    assert_same_bits(values.cpu(), expected.cpu())
    assert_same_bits(scale.cpu(), expected_scale.cpu())
    for row in range(min(rows, 2)):
        alone, alone_scale = fused.silu_mul_quantize(x[row : row + 1], scales, factor)
        assert_same_bits(alone.cpu(), values[:, row : row + 1].cpu().contiguous())
        assert_same_bits(alone_scale.cpu(), scale[:, row : row + 1].cpu().contiguous())


@pytest.mark.parametrize(("rows", "k"), [(3, 592), (1, 4096)])
def test_scales_with_the_sizes_of_blocks(device: torch.device, rows: int, k: int) -> None:
    """As ``kernels/hopper/quantize.py`` has them: above the scale a quarter of the squared codes' sum, rounded up."""
    x, w = rand(rows, k, seed=0, dtype=torch.bfloat16).to(device), rand(k, seed=2, dtype=torch.bfloat16).to(device)
    x[0, :48] = 0
    if rows > 1:
        x[-1, 500] = torch.nan
    gate_up, scales = torch.cat((x, x.flip(0)), dim=1), SCALES.to(device)
    form = (None, torch.bfloat16, torch.int16)
    for plain, wide in (
        (fused.norm_quantize(x, None, w, 1e-5, scales)[:2], fused.norm_quantize(x, None, w, 1e-5, scales, *form)[:2]),
        (fused.silu_mul_quantize(gate_up, scales), fused.silu_mul_quantize(gate_up, scales, *form)),
    ):
        check_sizes(plain, wide)


def check_sizes(plain: tuple[torch.Tensor, torch.Tensor], wide: tuple[torch.Tensor, torch.Tensor]) -> None:
    """(values, scales) in float16 and bytes, and the same in bfloat16 and int16."""
    (values, scale), (same, blocks) = ([t.cpu() for t in pair] for pair in (plain, wide))
    assert_same_bits(same.half().nan_to_num(7.0), values.nan_to_num(7.0))
    assert blocks.dtype == torch.int16 and torch.equal(blocks & 0xFF, scale.to(torch.int16))
    number = scale.view(torch.float8_e4m3fn).float()[..., None]
    codes = torch.where(number > 0, values.float().unflatten(2, (-1, 16)) / number, 0.0)  # exact
    assert torch.equal(blocks >> 8 & 0xFF, torch.ceil(codes.square().sum(dim=3) / 4).to(torch.int16))


def test_bad_arguments(device: torch.device) -> None:
    x, scales = torch.zeros(2, 48, device=device), SCALES.to(device)
    with pytest.raises(InvalidArgumentError, match="a multiple of 16"):
        fused.norm_quantize(x[:, :40], None, x[0, :40], 1e-5, scales)
    with pytest.raises(InvalidArgumentError, match="a multiple of 32"):
        fused.silu_mul_quantize(x, scales)
    with pytest.raises(InvalidArgumentError, match=r"must be \[48\]"):
        fused.norm_quantize(x, None, x[0, :40], 1e-5, scales)
    with pytest.raises(InvalidArgumentError, match="inverse_scales must be"):
        fused.norm_quantize(x, None, x[0], 1e-5, scales.double())
    with pytest.raises(InvalidArgumentError, match=r"pre_quant_scale must be torch.float32 \[48\]"):
        fused.norm_quantize(x, None, x[0], 1e-5, scales, x[0].half())


@pytest.mark.gpu
@pytest.mark.parametrize("k", [4096, 12288])
def test_large(device: torch.device, k: int) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    x, r = (rand(300, k, seed=s, dtype=torch.bfloat16).to(device) for s in (4, 5))
    w, scales = rand(k, seed=6, dtype=torch.bfloat16).to(device), SCALES.to(device)
    y, _ = norm.add_rms_norm(x, r, w, 1e-5)
    expected = quantize.quantize_values(y, scales)
    got = fused.norm_quantize(x, r, w, 1e-5, scales)
    gate_up = torch.cat((x, r), dim=1)
    gated = quantize.quantize_values(activation.silu_mul(gate_up), scales)
    for a, b in zip((*got[:2], *fused.silu_mul_quantize(gate_up, scales)), (*expected, *gated), strict=True):
        assert_same_bits(a.cpu(), b.cpu())
