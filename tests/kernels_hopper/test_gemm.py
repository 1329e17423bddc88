"""The product of many tokens: on a GPU the bits of the matrix unit's model; anywhere, what the compiler makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyfp4.formats.nvfp4 import dequantize_blocks
from anyfp4.kernels.hopper import compiler, gemm, layout
from anyfp4.kernels.hopper.gemm import Shape
from anyfp4.numerics import hopper
from anyfp4.testing.bitwise import assert_same_bits

SEGMENT = 1024
ROWS = {n: gemm.runs_of([(n, 0)], torch.device("cpu")) for n in (4096, 24576)}
PACKED = list(dict.fromkeys(gemm.packed_shape(m, runs) for m in range(257, 4097, 17) for runs in ROWS.values()))
PACKED += [Shape(64), Shape(176, cluster=2, lag=2), Shape(128, batch=2, prefetch=1), Shape(256, cluster=2, kept=56)]
DENSE = [gemm.dense_shape(m) for m in (1, 50, 128, 200, 256, 1024)]
DENSE += [Shape(192), Shape(64, cluster=2), Shape(192, cluster=2, swap=1, lag=2)]

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def predicted(a: Tensor, w: Tensor) -> Tensor:
    """One chain for each segment, added in order."""
    total = torch.zeros(())
    for start in range(0, a.shape[1], SEGMENT):
        part = hopper.matmul(a[:, start : start + SEGMENT], w[:, start : start + SEGMENT])
        total = part if start == 0 else total + part
    return total


def finished(sums: Tensor, alpha: Tensor, bias: Tensor | None, row: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = sums * alpha if row is None else sums * (row[:, None] * alpha)
    return (y if bias is None else y + bias).to(dtype)


def weight(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Any codes and scales but NaN."""
    g = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8)
    return packed, torch.randint(0, 0x7F, (n, k // 16), generator=g, dtype=torch.uint8)


def vectors(m: int, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, bias and a factor of each token."""
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=g) + 0.5, torch.randn(n, generator=g) * 1000, torch.rand(m, generator=g) + 0.5


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("shape", PACKED, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "options"),
    [
        (257, 200, 576, torch.bfloat16, ""),
        (300, 391, 1024, torch.float16, "bias"),
        (600, 640, 4352, torch.float32, "row"),
        (513, 136, 1552, torch.bfloat16, "bias row"),
    ],
)
def test_packed(shape: Shape, m: int, n: int, k: int, dtype: torch.dtype, options: str) -> None:
    packed, scale = (t.cuda() for t in weight(n, k, m))
    alpha, bias, row = (t.cuda() for t in vectors(m, n, k))
    x = torch.randn(1, m, k, device="cuda").bfloat16()
    one = None if "bias" not in options else bias
    factor = None if "row" not in options else row
    runs = gemm.runs_of([(n, 0)], x.device)
    y = gemm.packed_gemm(x, layout.pack(packed, scale), runs, alpha, one, dtype, factor, shape)
    w = dequantize_blocks(packed, scale.view(torch.float8_e4m3fn)).bfloat16()
    assert_same_bits(y, finished(predicted(x[0], w), alpha, one, factor, dtype))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("shape", PACKED, ids=str)
def test_runs_with_activations_of_their_own(shape: Shape) -> None:
    m, k, runs = 270, 640, [(320, 0), (100, 1), (60, 0), (220, 2)]
    x = torch.randn(3, m, k, device="cuda").bfloat16()
    alpha = vectors(m, 700, 0)[0].cuda()
    records, expected, first = [], [], 0
    for size, index in runs:
        packed, scale = (t.cuda() for t in weight(size, k, first))
        w = dequantize_blocks(packed, scale.view(torch.float8_e4m3fn)).bfloat16()
        records.append(layout.pack(packed, scale))
        expected.append(predicted(x[index], w) * alpha[first : first + size])
        first += size
    y = gemm.packed_gemm(x, torch.cat(records), gemm.runs_of(runs, x.device), alpha, None, torch.float32, None, shape)
    assert_same_bits(y, torch.cat(expected, dim=1))
    y = gemm.packed_gemm(x, torch.cat(records), gemm.runs_of(runs, x.device), alpha, None, torch.bfloat16, None, shape)
    assert_same_bits(y, torch.cat(expected, dim=1).bfloat16())


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("shape", DENSE, ids=str)
@pytest.mark.parametrize("operand", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 130, 1024), (50, 1000, 1544), (300, 408, 2048), (257, 411, 72)])
def test_dense(shape: Shape, operand: torch.dtype, m: int, n: int, k: int) -> None:
    x, w = torch.randn(m, k, device="cuda").to(operand), torch.randn(n, k, device="cuda").to(operand)
    bias = vectors(m, n, k)[1].cuda()
    runs = gemm.runs_of([(n, 0)], x.device)
    sums = predicted(x, w)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        y = gemm.dense_gemm(x, w, runs, bias, dtype, shape)
        assert_same_bits(y, (sums + bias).to(dtype))


@pytest.mark.gpu
@on_hopper
def test_rows_never_meet() -> None:
    """A NaN and an infinity in one token's activation show in that token alone; NaNs are the reference's."""
    m, n, k = 300, 192, 1088
    packed, scale = (t.cuda() for t in weight(n, k, 5))
    x, alpha = torch.randn(1, m, k, device="cuda").bfloat16(), torch.ones(n, device="cuda")
    runs = gemm.runs_of([(n, 0)], x.device)
    records = layout.pack(packed, scale)
    before = gemm.packed_gemm(x, records, runs, alpha, None, torch.bfloat16)
    x[0, 7, 3], x[0, 200, 1030] = torch.nan, torch.inf
    y = gemm.packed_gemm(x, records, runs, alpha, None, torch.bfloat16)
    kept = [i for i in range(m) if i not in (7, 200)]
    assert_same_bits(y[kept], before[kept])
    assert bool((y[7].view(torch.int16) == 0x7FC0).all())
    assert not bool(y[200].isfinite().all())


@pytest.mark.skipif(compiler.find_nvrtc() is None, reason="libnvrtc is not installed")
@pytest.mark.parametrize(
    ("packed", "out", "shapes"),
    [(True, 2, PACKED[:5]), (True, 0, PACKED[:1]), (True, 1, PACKED[4:5]), (False, 2, DENSE[:1] + DENSE[5:6])],
)
def test_compiles_without_spills(packed: bool, out: int, shapes: list[Shape]) -> None:
    """Nor does the compiler let matrix instructions wait for each other (it says so if it must)."""
    for shape in shapes:
        defines, _ = gemm.macros(shape, packed, True, out, False, True)
        cubin, log = compiler.compile_with_log(gemm.FILES, defines, ("--ptxas-options=-v",))
        assert cubin[:4] == b"\x7fELF"
        assert "0 bytes spill stores, 0 bytes spill loads" in log, f"{shape}: {log}"
        assert "wgmma" not in log, f"{shape}: {log}"
