"""The Hopper bit model against a real H100 or H200."""

from __future__ import annotations

import pytest
import torch

from anyfp4.numerics import hopper
from anyfp4.testing.bitwise import assert_same_bits

pytestmark = pytest.mark.gpu

triton = pytest.importorskip("triton", reason="Triton is not installed")
if not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

import triton.language as tl  # noqa: E402


@triton.jit
def _matmul(p_a, p_b, p_c, K, N: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, columns, ks = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((M, N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(p_a + rows[:, None] * K + k + ks[None, :])
        b = tl.load(p_b + columns[None, :] * K + k + ks[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(p_c + rows[:, None] * N + columns[None, :], acc)


def on_device(a: torch.Tensor, b: torch.Tensor, block_k: int, warps: int) -> torch.Tensor:
    """a · bᵀ on the tensor cores, K in order; ``warps`` below 4 gives ``mma.sync``, from 4 ``wgmma``."""
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.float32, device="cuda")
    _matmul[(1,)](a.cuda(), b.cuda(), out, a.shape[1], b.shape[0], a.shape[0], block_k, num_warps=warps)
    return out.cpu()


def operands(kind: str, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(64, 512, generator=g), torch.randn(64, 512, generator=g)
    if kind == "wide":
        spread = 12 if dtype == torch.float16 else 30
        a, b = (x * torch.exp2(torch.randint(-spread, spread // 2, x.shape, generator=g).float()) for x in (a, b))
    elif kind == "zeros":
        a, b = (x * (torch.rand(x.shape, generator=g) < 0.3) for x in (a, b))
        # large numbers that only ever meet zeros: do they still set the exponent that others are aligned to?
        a[:, ::2] *= 2.0**12
        b[:, ::2] = 0
        a[:, 1::2] *= 2.0**-9
    elif kind == "subnormal":
        tiny = 2.0**-16 if dtype == torch.float16 else 2.0**-66
        a, b = a * tiny, b * tiny
    elif kind == "cancel":
        b[:, 256:] = -b[:, :256] * (1 + 2.0**-7)
        a[:, 256:] = a[:, :256]
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("block_k", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "wide", "zeros", "subnormal", "cancel"])
def test_every_bit(kind: str, dtype: torch.dtype, block_k: int, warps: int) -> None:
    for seed in range(4):
        a, b = operands(kind, dtype, seed)
        assert_same_bits(on_device(a, b, block_k, warps), hopper.matmul(a, b), f"{kind} seed {seed}")
