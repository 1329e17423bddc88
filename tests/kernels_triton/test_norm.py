"""RMSNorm in Triton against the readable reference: every bit, and row by row."""

from __future__ import annotations

import pytest
import torch

from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels.triton import norm
from anyfp4.ops import norm as reference
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels.cases import DTYPES, generator

#: rows short, odd, just a power of two, and of real models
WIDTHS = (1, 16, 80, 128, 576, 1024, 1500, 4096)


def rand(*shape: int, seed: int, dtype: torch.dtype, octaves: float = 0.0) -> torch.Tensor:
    g = generator(seed)
    return (torch.randn(*shape, generator=g) * torch.exp2((torch.rand(*shape, generator=g) - 0.5) * octaves)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", WIDTHS)
def test_against_reference(device: torch.device, k: int, dtype: torch.dtype) -> None:
    """The definition rounds the exact sum; the float64 sum rounds alike for these seeds (see the module)."""
    x, r = (rand(5, k, seed=s, dtype=dtype, octaves=o) for s, o in ((0, 20.0), (1, 3.0)))
    w = rand(k, seed=2, dtype=torch.float32 if dtype == torch.float16 else dtype)
    y = norm.rms_norm(x.to(device), w.to(device), 1e-5)
    assert_same_bits(y.cpu(), reference.rms_norm(x, w, 1e-5))
    y, total = norm.add_rms_norm(x.to(device), r.to(device), w.to(device), 1e-6)
    expected, expected_total = reference.add_rms_norm(x, r, w, 1e-6)
    assert_same_bits(total.cpu(), expected_total)
    assert_same_bits(y.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "rows"), [(64, 41), (96, 33), (3000, 7)])
def test_rows_do_not_depend_on_each_other(device: torch.device, k: int, rows: int, dtype: torch.dtype) -> None:
    x, r = (rand(rows, k, seed=s, dtype=dtype).to(device) for s in (0, 1))
    w = rand(k, seed=2, dtype=dtype).to(device)
    y = norm.rms_norm(x, w, 1e-5)
    z, total = norm.add_rms_norm(x, r, w, 1e-5)
    for i in range(rows):
        one = slice(i, i + 1)
        assert_same_bits(norm.rms_norm(x[one], w, 1e-5), y[one])
        z_one, total_one = norm.add_rms_norm(x[one], r[one], w, 1e-5)
        assert_same_bits(z_one, z[one])
        assert_same_bits(total_one, total[one])


def test_sum_of_squares_has_one_order(device: torch.device) -> None:
    """A row whose squares do not fit float64: neighbours are added first, wherever the row lies in memory."""
    k = 1024
    x = rand(1, k, seed=3, dtype=torch.float32, octaves=120.0)
    sums = x[0].double() ** 2
    while sums.numel() > 1:
        sums = sums[0::2] + sums[1::2]
    mean = sums.to(torch.float32) / k
    inverse = 1.0 / torch.sqrt((mean + 1e-5).double()).to(torch.float32)
    for shift in range(4):  # addresses that are and are not multiples of 16
        memory = torch.zeros(k + shift, device=device)
        memory[shift:] = x[0]
        y = norm.rms_norm(memory[shift:].unsqueeze(0), torch.ones(k, device=device), 1e-5)
        assert_same_bits(y.cpu(), x * inverse)


def test_heads_of_a_fused_projection(device: torch.device) -> None:
    """q and k are views of q/k/v; they need no copy."""
    qkv = rand(5, 8, 80, seed=4, dtype=torch.bfloat16)
    w = rand(80, seed=5, dtype=torch.bfloat16)
    for view in (lambda t: t[:, :4], lambda t: t[:, 4:6], lambda t: t.transpose(0, 1)):
        got = norm.rms_norm(view(qkv.to(device)), w.to(device), 1e-6)
        assert_same_bits(got.cpu(), reference.rms_norm(view(qkv), w, 1e-6))


def test_special_rows(device: torch.device) -> None:
    x = torch.ones(4, 48)
    x[0, 3], x[1, 5], x[2] = float("nan"), float("inf"), 0.0
    y = norm.rms_norm(x.to(device), torch.ones(48, device=device), 1e-5).cpu()
    expected = reference.rms_norm(x, torch.ones(48), 1e-5)
    assert torch.equal(y.isnan(), expected.isnan())
    assert_same_bits(y[2:], expected[2:])
    assert norm.rms_norm(torch.empty(0, 48, device=device), torch.ones(48, device=device), 1e-5).shape == (0, 48)


def test_bad_arguments(device: torch.device) -> None:
    x, w = torch.zeros(2, 8, device=device), torch.zeros(8, device=device)
    with pytest.raises(InvalidArgumentError, match=r"weight must be \[8\]"):
        norm.rms_norm(x, w[:7], 1e-5)
    with pytest.raises(InvalidArgumentError, match="x must be bfloat16"):
        norm.rms_norm(x.double(), w, 1e-5)
    with pytest.raises(InvalidArgumentError, match="must be alike"):
        norm.add_rms_norm(x, x.bfloat16(), w, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [4096, 5120, 16384, 65536])
def test_large(device: torch.device, k: int) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    x, r = (rand(300, k, seed=s, dtype=torch.bfloat16) for s in (6, 7))
    w = rand(k, seed=8, dtype=torch.bfloat16)
    y, total = norm.add_rms_norm(x.to(device), r.to(device), w.to(device), 1e-6)
    expected, expected_total = reference.add_rms_norm(x, r, w, 1e-6)
    assert_same_bits(total.cpu(), expected_total)
    assert_same_bits(y.cpu(), expected)
    for i in (0, 17, 299):
        one = norm.add_rms_norm(x[i : i + 1].to(device), r[i : i + 1].to(device), w.to(device), 1e-6)
        assert_same_bits(one[0].cpu(), expected[i : i + 1])
