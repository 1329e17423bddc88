"""The order over K, and that no division of the work among programs changes a bit.

In the interpreter a product is numpy's, in numpy's order. So each segment here has one product that is not zero, which
no order rounds, and the sum of the segments is rounded, which shows their order. On a device the same must hold.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyfp4.formats.weights import DenseWeight, FP8Weight
from anyfp4.kernels.triton import division, gemm, layout, linear_dense, linear_fp8_block, linear_packed, workspace
from anyfp4.kernels.triton.division import Division
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels_triton.linears import TRITON, fp8, nvfp4, prepare, values
from tests.kernels_triton.oracles import in_order

ON_GPU = torch.cuda.is_available()
#: columns of a segment here: the interpreter is slow
SEGMENT = layout.SEGMENT if ON_GPU else 256
N, K = 70, 2 * SEGMENT + 80
DIVISIONS = [
    Division(64, 16, True), Division(64, 16, False), Division(64, 32, True), Division(64, 64, False),
    Division(64, 128, False), Division(128, 128, False, warps=8),
]  # fmt: skip


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layout, gemm, linear_dense, linear_fp8_block, linear_packed):
        monkeypatch.setattr(module, "SEGMENT", SEGMENT)


def sparse(m: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An activation with one number in each segment of a row, far apart in size, and their columns [segments]."""
    g = torch.Generator().manual_seed(seed)
    columns = torch.tensor([int(torch.randint(i, min(i + SEGMENT, K), (), generator=g)) for i in range(0, K, SEGMENT)])
    x = torch.zeros(m, K)
    x[:, columns] = torch.randn(m, len(columns), generator=g) * torch.tensor([1.0, 64.0, 1.0 / 16])
    return x.half(), columns


def expected(x: Tensor, w: Tensor, columns: Tensor) -> Tensor:
    """The products in float32, added in order."""
    parts = [x[:, c : c + 1].float() * w[:, c].float() for c in columns.tolist()]
    total = in_order(parts)
    assert not torch.equal(total, parts[0] + (parts[1] + parts[2])), "the order must show"
    return total


@pytest.mark.parametrize("work", DIVISIONS, ids=str)
def test_packed(work: Division, device: torch.device) -> None:
    x, columns = sparse(21)
    weight = nvfp4(N, K, weight_only=True, wild=work.tokens == 32)
    packed = prepare(weight, device).data.packed
    want = expected(x, values(weight), columns) * weight.weight.global_scale
    for _ in range(2 if work.split else 1):
        got = linear_packed.packed_linear(x.unsqueeze(0).to(device), packed, torch.float32, None, work)
        assert_same_bits(got.cpu(), want)
    assert not workspace.of(x.to(device)).counters.any(), "counters are zero between launches"


@pytest.mark.parametrize("rows", [128, 256])
def test_gemm(rows: int, device: torch.device) -> None:
    x, columns = sparse(21, 1)
    weight = nvfp4(N, K, weight_only=True)
    got = gemm.packed_gemm(x.unsqueeze(0).to(device), prepare(weight, device).data.packed, torch.float32, rows=rows)
    assert_same_bits(got.cpu(), expected(x, values(weight), columns) * weight.weight.global_scale)


@pytest.mark.parametrize("work", DIVISIONS[:4], ids=str)
def test_dense(work: Division, device: torch.device) -> None:
    x, columns = sparse(21, 2)
    data = prepare(DenseWeight(values(nvfp4(N, K)).half()), device).data
    got = linear_dense.dense_linear(x.to(device), data.weight, data.alpha, None, torch.float32, work)
    assert_same_bits(got.cpu(), expected(x, data.weight.cpu(), columns))


@pytest.mark.parametrize("work", DIVISIONS[:4], ids=str)
def test_fp8(work: Division, device: torch.device) -> None:
    x, columns = sparse(21, 3)
    weight = fp8(N, K, "weight-only")
    got = linear_packed.packed_linear(
        x.unsqueeze(0).to(device), prepare(weight, device).data.packed, torch.float32, None, work
    )
    assert_same_bits(got.cpu(), expected(x, weight.weight, columns) * weight.weight_scale)


@pytest.mark.parametrize("work", DIVISIONS[:4], ids=str)
@pytest.mark.parametrize("kind", ["block", "block-weight-only"])
def test_fp8_blocks(kind: str, work: Division, device: torch.device) -> None:
    x, columns = sparse(21, 4)
    weight = fp8(N + 128, K, kind)
    token_scale = None
    if kind == "block":
        token_scale = torch.rand(21, weight.weight_scale.shape[1], generator=torch.Generator().manual_seed(5)) + 0.5
    packed = prepare(weight, device).data.packed
    scale = None if token_scale is None else token_scale.to(device)
    got = linear_fp8_block.fp8_block_linear(x.to(device), scale, packed, torch.float32, work)
    assert_same_bits(got.cpu(), blocks_expected(x, weight, token_scale, columns))


def blocks_expected(x: Tensor, weight: FP8Weight, token_scale: Tensor | None, columns: Tensor) -> Tensor:
    parts = []
    for c in columns.tolist():
        factor = weight.weight_scale[:, c // 128].repeat_interleave(128)[: weight.shape[0]]
        if token_scale is not None:
            factor = token_scale[:, c // 128, None] * factor
        parts.append(x[:, c : c + 1].float() * weight.weight[:, c].float() * factor)
    return in_order(parts)


def test_a_product_without_room_for_its_sums_is_not_split(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Division(64, 16, True)
    assert division.fitted(work, 10, K) == work
    assert not division.fitted(work, 10, SEGMENT).split, "one segment"
    monkeypatch.setattr(workspace, "SUMS", 20 * layout.segments(K) * 64 * 16)
    assert division.fitted(work, 20, K).split and not division.fitted(work, 21, K).split


def test_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """All shapes are used, and any product gets one."""
    monkeypatch.setattr(layout, "SEGMENT", 1024)
    chosen = set()
    for n in (64, 576, 4096, 6144, 24576, 151936):
        for k in (576, 1024, 4096, 12288):
            for m in (1, 16, 17, 33, 64, 65, 100, 128, 256, 512, 1024, 8192):
                work = division.packed(n, k, m, 132)
                chosen.add(None if work is None else (work.rows, work.tokens, work.split))
                assert work is None or not work.split or k > 1024
                assert division.gemm_rows(n, m, 132) in (128, 256)
    assert chosen == {None, *((w.rows, w.tokens, w.split) for w in DIVISIONS), (64, 64, True), (64, 32, False)}


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_cuda_graphs(device: torch.device) -> None:
    """Replayed often and between other calls, a graph finds its counters as it left them."""
    prepared = prepare(nvfp4(300, 4096), device)
    x = torch.randn(20, 4096, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    eager = [TRITON.linear(x[:m], prepared) for m in (1, 20)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [TRITON.linear(x[:m], prepared) for m in (1, 20)]
    for _ in range(3):
        graph.replay()
        again = [TRITON.linear(x[:m], prepared) for m in (1, 20)]
        for want, replayed, called in zip(eager, captured, again, strict=True):
            assert_same_bits(replayed, want)
            assert_same_bits(called, want)
            replayed.zero_()
