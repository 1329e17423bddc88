"""exp and log in Triton against the definition: every bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from anyfp4.kernels.triton import elementary
from anyfp4.ops import elementary as reference
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels.cases import generator

BLOCK = 4096


@triton.jit
def _exp(p_x, p_y, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + i, elementary.exp(tl.load(p_x + i)))


@triton.jit
def _log(p_x, p_y, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + i, elementary.log(tl.load(p_x + i)))


@triton.jit
def _largest(p_x, p_y, BLOCK: tl.constexpr):
    tl.store(p_y, elementary.largest(tl.load(p_x + tl.arange(0, BLOCK))))


def run(kernel, x: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The elementwise ``kernel`` on x [a multiple of BLOCK]."""
    y = torch.empty_like(x)
    kernel[(x.numel() // BLOCK,)](x, y, BLOCK=BLOCK, enable_fp_fusion=False)
    return y


def test_exp(device: torch.device) -> None:
    x = torch.linspace(-110, 95, 4 * BLOCK)
    x[:6] = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -1e30])
    assert_same_bits(run(_exp, x.to(device)).cpu(), reference.exp(x))
    assert run(_exp, torch.full((BLOCK,), torch.nan, device=device)).isnan().all()


def test_log(device: torch.device) -> None:
    x = torch.exp2(torch.rand(2 * BLOCK, generator=generator(1)) * 270 - 148)
    x[:3] = torch.tensor([torch.inf, 0.0, 1.0])
    assert_same_bits(run(_log, x.to(device)).cpu(), reference.log(x))


def test_largest(device: torch.device) -> None:
    x, y = torch.randn(64, generator=generator(2)).to(device), torch.empty(1, device=device)
    for value in (9.0, torch.inf, torch.nan, -torch.nan):
        x[17] = value
        _largest[(1,)](x, y, BLOCK=64)
        assert torch.equal(y.isnan(), x.max().view(1).isnan())
        assert y.isnan() or y.item() == value
    x[:] = -torch.inf
    _largest[(1,)](x, y, BLOCK=64)
    assert y.item() == -torch.inf


@pytest.mark.gpu
def test_exp_of_every_float32(device: torch.device) -> None:
    """Fused multiply-adds give the float32 bits of the definition, whose products are rounded, on all inputs."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    step = 1 << 26
    for start in range(-(1 << 31), 1 << 31, step):
        x = torch.arange(start, start + step, device=device).to(torch.int32).view(torch.float32)
        got, expected = run(_exp, x), reference.exp(x)
        differs = (got.view(torch.int32) != expected.view(torch.int32)) & ~(got.isnan() & expected.isnan())
        assert not differs.any(), x[differs][:10].tolist()
