"""The product of many tokens: on a GPU the bits of the matrix unit's model; anywhere, what the compiler makes of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from anyfp4.backends.hopper import HopperBackend
from anyfp4.backends.triton import TritonBackend
from anyfp4.formats.nvfp4 import dequantize_blocks
from anyfp4.formats.weights import DenseWeight
from anyfp4.kernels.hopper import compiler, gemm, layout
from anyfp4.kernels.hopper.gemm import Shape
from anyfp4.kernels.hopper.linear import Records, linear
from anyfp4.kernels.hopper.plan import SEGMENT
from anyfp4.kernels.hopper.runs import runs_of
from anyfp4.numerics import hopper
from anyfp4.testing.bitwise import assert_same_bits

CHOSEN = list(gemm._MICROSECONDS)
PACKED = [
    *CHOSEN,
    Shape(64),
    Shape(176, cluster=2, lag=2),
    Shape(128, batch=2),
    Shape(256, cluster=2, kept=56),
]
DENSE = [gemm.dense_shape(m) for m in (1, 50, 128, 200, 256, 1024)]
DENSE += [Shape(192), Shape(64, cluster=2), Shape(192, cluster=2, swap=1, lag=2)]
TYPES = (torch.float32, torch.float16, torch.bfloat16)
#: M, N, K, operands, result, factors of tokens, bias
PACKED_CASES = [
    (257, 200, 576, torch.bfloat16, torch.bfloat16, False, False),
    (300, 391, 1024, torch.float16, torch.float16, False, True),
    (300, 320, 4352, torch.bfloat16, torch.float32, False, False),
    (513, 136, 1552, torch.bfloat16, torch.bfloat16, True, True),
]
DENSE_CASES = [
    (1, 130, 1024, torch.bfloat16, torch.bfloat16),
    (50, 1000, 1544, torch.float16, torch.float32),
    (300, 408, 2048, torch.bfloat16, torch.float16),
    (257, 411, 72, torch.bfloat16, torch.bfloat16),
]
RUNS = [(320, 0), (100, 1), (60, 0), (220, 2)]

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.fixture(scope="module")
def compiled() -> None:
    """All kernels of this file, compiled side by side: one after the other they would take minutes."""
    jobs = {
        gemm.macros(s, True, a == torch.bfloat16, TYPES.index(y), row, bias)[0]
        for s in PACKED
        for _, _, _, a, y, row, bias in PACKED_CASES
    }
    jobs |= {gemm.macros(s, True, True, i, False, False)[0] for s in PACKED for i in (0, 2)}
    jobs |= {
        gemm.macros(s, False, a == torch.bfloat16, TYPES.index(y), False, True)[0]
        for s in DENSE
        for _, _, _, a, y in DENSE_CASES
    }
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda defines: compiler.compile_only(gemm.FILES, defines), jobs))


def predicted(a: Tensor, w: Tensor) -> Tensor:
    """One chain for each segment, added in order."""
    total = torch.zeros(())
    for start in range(0, a.shape[1], SEGMENT):
        part = hopper.matmul(a[:, start : start + SEGMENT], w[:, start : start + SEGMENT])
        total = part if start == 0 else total + part
    return total


def weight(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Any codes and scales but NaN."""
    g = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8)
    return packed.cuda(), torch.randint(0, 0x7F, (n, k // 16), generator=g, dtype=torch.uint8).cuda()


def numbers(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.gpu
@on_hopper
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("case", PACKED_CASES, ids=str)
def test_packed(case: tuple[int, int, int, torch.dtype, torch.dtype, bool, bool]) -> None:
    m, n, k, operand, dtype, has_row, has_bias = case
    packed, scale = weight(n, k, m)
    alpha, bias = numbers(n, seed=1), numbers(n, seed=2) * 1000 if has_bias else None
    row = numbers(m, seed=3) if has_row else None
    records = Records(layout.pack(packed, scale), ((n, 0),), n, k, alpha, bias)
    x = numbers(1, m, k, seed=4).to(operand)
    sums = predicted(x[0], dequantize_blocks(packed, scale.view(torch.float8_e4m3fn)).to(operand))
    want = sums * alpha if row is None else sums * (row[:, None] * alpha)
    want = (want if bias is None else want + bias).to(dtype)
    for shape in PACKED:
        assert_same_bits(gemm.packed_gemm(x, records, dtype, row, shape), want, str(shape))
    assert_same_bits(linear(x, records, dtype, row=row), want, "few tokens")


@pytest.mark.gpu
@on_hopper
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_with_activations_of_their_own(dtype: torch.dtype) -> None:
    m, k, n = 270, 640, 700
    packed, scale = weight(n, k, 0)
    sizes = [size for size, _ in RUNS]
    x, alpha = numbers(3, m, k, seed=1).bfloat16(), numbers(n, seed=2)
    w = dequantize_blocks(packed, scale.view(torch.float8_e4m3fn)).bfloat16().split(sizes)
    sums = torch.cat([predicted(x[index], part) for (_, index), part in zip(RUNS, w, strict=True)], dim=1)
    records = Records(layout.pack(packed, scale, sizes), tuple(RUNS), n, k, alpha, None)
    for shape in PACKED:
        assert_same_bits(gemm.packed_gemm(x, records, dtype, None, shape), (sums * alpha).to(dtype), str(shape))


@pytest.mark.gpu
@on_hopper
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_dense(case: tuple[int, int, int, torch.dtype, torch.dtype]) -> None:
    m, n, k, operand, dtype = case
    x, w, bias = numbers(m, k, seed=1).to(operand), numbers(n, k, seed=2).to(operand), numbers(n, seed=3)
    want = (predicted(x, w) + bias).to(dtype)
    for shape in DENSE:
        y = gemm.dense_gemm(x, w, runs_of([(n, 0)], x.device), bias, dtype, shape)
        assert_same_bits(y, want, str(shape))


@pytest.mark.gpu
@on_hopper
def test_a_nan_stays_in_its_row() -> None:
    m, n, k = 300, 192, 1088
    packed, scale = weight(n, k, 5)
    records = Records(layout.pack(packed, scale), ((n, 0),), n, k, torch.ones(n, device="cuda"), None)
    x = numbers(1, m, k, seed=1).bfloat16()
    before = gemm.packed_gemm(x, records, torch.bfloat16)
    x[0, 7, 3], x[0, 200, 1030] = torch.nan, torch.inf
    y = gemm.packed_gemm(x, records, torch.bfloat16)
    kept = [i for i in range(m) if i not in (7, 200)]
    assert_same_bits(y[kept], before[kept])
    assert bool((y[7].view(torch.int16) == 0x7FC0).all())
    assert not bool(y[200].isfinite().all())


@pytest.mark.gpu
@on_hopper
def test_a_dense_layer_has_the_bits_of_the_triton_backend() -> None:
    w = numbers(12416, 1160, seed=1).bfloat16()
    layer = DenseWeight(w, torch.ones(12416, device="cuda"))
    own, triton = HopperBackend(), TritonBackend()
    for m in (1, 17, 64, 200, 300):
        x = numbers(m, 1160, seed=m).bfloat16()
        assert_same_bits(own.linear(x, own.prepare(layer)), triton.linear(x, triton.prepare(layer)), f"M={m}")


def test_the_choice_of_tiles() -> None:
    """Few left over: 1,024 tokens are four tiles of 256, or 128-token ones where those fill the last round better."""
    cpu = torch.device("cpu")
    assert gemm.packed_shape(1024, runs_of([(24576, 0)], cpu), 132).columns == 256
    assert gemm.packed_shape(1024, runs_of([(6144, 0)], cpu), 132).columns == 208
    assert gemm.packed_shape(300, runs_of([(24576, 0)], cpu), 132).columns == 160
    assert [gemm.dense_shape(m).columns for m in (1, 17, 129, 256, 257)] == [16, 32, 160, 256, 256]
    assert runs_of(RUNS, cpu).table.tolist() == [[0, 320, 0, 0], [320, 420, 1, 5], [420, 480, 0, 7], [480, 700, 2, 8]]


@pytest.mark.skipif(compiler.find_nvrtc() is None, reason="libnvrtc is not installed")
@pytest.mark.parametrize(
    ("packed", "bfloat", "out", "shapes"),
    [
        (True, True, 2, CHOSEN),
        (True, True, 0, CHOSEN[:1]),
        (True, False, 1, CHOSEN[4:5]),
        (False, True, 2, DENSE[:6:5]),
    ],
)
def test_compiles_without_spills(packed: bool, bfloat: bool, out: int, shapes: list[Shape]) -> None:
    """Nor does the compiler let matrix instructions wait for each other (it says so if it must)."""
    for shape in shapes:
        defines, _ = gemm.macros(shape, packed, bfloat, out, False, True)
        cubin, log = compiler.compile_with_log(gemm.FILES, defines, ("--ptxas-options=-v",))
        assert cubin[:4] == b"\x7fELF"
        assert "0 bytes spill stores, 0 bytes spill loads" in log, f"{shape}: {log}"
        assert "wgmma" not in log, f"{shape}: {log}"
