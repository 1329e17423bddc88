"""Both bit models against the first author's own simulator, where it is installed (``pip install mmasim``)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyfp4.formats import e2m1
from anyfp4.numerics import blackwell, float64, hopper
from anyfp4.testing.bitwise import assert_same_bits
from tests.numerics.hopper_cases import SIZE
from tests.numerics.hopper_cases import cases as hopper_cases
from tests.numerics.test_blackwell import cases as blackwell_cases

sim = pytest.importorskip("mmasim.nv_ptx.sim", reason="mmasim is not installed")

BLACKWELL = "m16n8k64.kind::mxf4nvf4.block16.f32.e2m1.e2m1.f32.ue4m3"


def pairs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x with each row of y: [M, N, ...] twice."""
    m, n = x.shape[0], y.shape[0]
    return x[:, None].expand(m, n, -1), y[None].expand(m, n, -1)


@pytest.mark.parametrize("k", [64, 576])
def test_blackwell(k: int) -> None:
    instruction = sim.MMABlockScale("RTX Blackwell", BLACKWELL)
    for name, a, b in blackwell_cases(k, 8):
        # as float16 values, since the simulator's own unpacking takes the high nibble first
        x, y = pairs(e2m1.decode_packed(a[0]).half(), e2m1.decode_packed(b[0]).half())
        scales = pairs(a[1].view(torch.uint8), b[1].view(torch.uint8))
        alpha, beta = (s.contiguous().view(torch.float8_e4m3fn) for s in scales)
        pad = (0, -x.shape[-1] % 64)
        x, y = (torch.nn.functional.pad(t, pad) for t in (x, y))
        alpha, beta = (
            torch.nn.functional.pad(s.view(torch.uint8), (0, pad[1] // 16)).view(torch.float8_e4m3fn)
            for s in (alpha, beta)
        )
        expected = instruction.dpa(x, y, torch.zeros(x.shape[:2]), alpha, beta)
        assert_same_bits(blackwell.matmul(*a, *b), expected, f"{name}, K = {k}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hopper(dtype: torch.dtype) -> None:
    kind = "f16" if dtype == torch.float16 else "bf16"
    instruction = sim.MMA("Hopper", f"m16n8k16.f32.{kind}.{kind}.f32")
    for case in hopper_cases(dtype):
        pad = (0, -case.a.shape[1] % hopper.CHUNK)
        a, b = (torch.nn.functional.pad(x, pad) for x in (case.a, case.b))
        acc = case.acc.to(torch.float64)
        for start in range(0, a.shape[1], hopper.CHUNK):
            chunk = slice(start, start + hopper.CHUNK)
            acc = hopper.accumulate(acc, a[:, chunk], b[:, chunk])
        out = acc.to(torch.float32)
        out.view(torch.int32).masked_fill_(out.isnan(), float64.NAN_BITS)
        rows = torch.arange(0, SIZE, 4)
        expected = instruction.dpa(*pairs(a[rows], b), case.acc[rows])
        assert_same_bits(out[rows], expected, case.name)
