"""The native FP4 backend without the hardware: when it runs, its layouts, and what torch's product is called with."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from anyfp4.backends import base, cublas, hopper, registry, triton
from anyfp4.backends.cublas import CublasBackend, swizzled
from anyfp4.errors import BackendError, InvalidArgumentError
from anyfp4.formats import NVFP4Tensor, quantize
from anyfp4.formats.weights import NVFP4Weight
from anyfp4.numerics import blackwell
from anyfp4.ops.linear import linear
from anyfp4.testing.bitwise import assert_same_bits

GPU = torch.device("cuda", 0)


def place(row: int, column: int, columns: int) -> int:
    """Where NVIDIA's documentation says that a block scale lies (cuBLAS, "1D block scaling factors layout")."""
    tile = row // 128 * -(-columns // 4) + column // 4
    return 512 * tile + 16 * (row % 128 % 32) + 4 * (row % 128 // 32) + column % 4


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (5, 36), (129, 5), (300, 64)], ids=str)
def test_every_scale_lies_where_cublas_wants_it(shape: tuple[int, int]) -> None:
    rows, columns = shape
    scale = torch.randint(1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(-(-rows // 128) * -(-columns // 4) * 512, dtype=torch.uint8)
    for r in range(rows):
        for c in range(columns):
            expected[place(r, c, columns)] = scale[r, c]
    assert_same_bits(swizzled(scale), expected)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Pretends that there is a GPU of that architecture."""

    def pretend(arch: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(triton, "find_spec", lambda _: object())
        for module in (base, triton, cublas, hopper):
            monkeypatch.setattr(module, "architecture", lambda _: arch)

    return pretend


@pytest.mark.parametrize("arch", ["sm_100", "sm_103", "sm_120"])
def test_it_runs_only_if_asked_for(arch: str, gpu: Callable[[str], None]) -> None:
    gpu(arch)
    assert registry.select(GPU).name == "triton"
    assert registry.select(GPU, requested="cublas").name == "cublas"
    rows = {row.name: row for row in registry.table(GPU)}
    assert rows["triton"].chosen and not rows["cublas"].chosen
    assert "nobody has proved that a row's bits do not depend on the rest" in str(rows["cublas"].reason)
    rows = {row.name: row for row in registry.table(GPU, requested="cublas")}
    assert rows["cublas"].chosen and rows["cublas"].reason is None


def test_it_is_not_taken_for_want_of_another(gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu("sm_100")
    monkeypatch.setitem(registry.PREFERENCE, "cuda", (CublasBackend(),))
    with pytest.raises(BackendError, match="no backend can run on cuda:0: cublas: it runs only if asked for by name"):
        registry.select(GPU)


@pytest.mark.parametrize(
    ("arch", "numerics", "reason"),
    [
        ("sm_90", "native", r"needs a GPU with FP4 units \(sm_100, sm_103, sm_120\), this is sm_90"),
        ("sm_75", "native", "needs sm_80 or newer, this is sm_75"),
        ("gfx950", "native", "needs a GPU with FP4 units .*, this is gfx950"),
        ("sm_100", "blackwell", "does not say in which order it adds"),
    ],
)
def test_elsewhere_it_says_why_not(arch: str, numerics: str, reason: str, gpu: Callable[[str], None]) -> None:
    gpu(arch)
    with pytest.raises(BackendError, match=f"backend 'cublas' cannot run here: .*{reason}"):
        registry.select(GPU, numerics=numerics, requested="cublas")
    with pytest.raises(BackendError, match="does not run on cpu devices"):
        registry.select(torch.device("cpu"), requested="cublas")


def test_a_torch_without_the_product(gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu("sm_100")
    monkeypatch.delattr(functional, "scaled_mm")
    with pytest.raises(BackendError, match=r"has no torch\.nn\.functional\.scaled_mm"):
        registry.select(GPU, requested="cublas")


def weight(sizes: tuple[int, ...], k: int, input_scales: tuple[float, ...], options: str = "") -> NVFP4Weight:
    g = torch.Generator().manual_seed(len(sizes) + k)
    shards = [quantize(torch.randn(n, k, generator=g) * 2.0**i) for i, n in enumerate(sizes)]
    tensor = NVFP4Tensor(
        torch.cat([s.packed for s in shards]),
        torch.cat([s.block_scale.view(torch.uint8) for s in shards]).view(torch.float8_e4m3fn),
        torch.cat([s.global_scale for s in shards]),
        sizes,
    )
    pre = (torch.rand(k, generator=g) + 0.5).bfloat16() if "awq" in options else None
    bias = torch.randn(sum(sizes), generator=g).bfloat16() if "bias" in options else None
    return NVFP4Weight(tensor, torch.tensor(input_scales), pre, bias)


def product(calls: list[tuple[int, int, int]]) -> Callable[..., Tensor]:
    """What the hardware would give: torch's own checks of the arguments, then the bit model on the scales' places."""
    checked = functional.scaled_mm

    def plain(scale: Tensor, rows: int, columns: int) -> Tensor:
        at = torch.tensor([[place(r, c, columns) for c in range(columns)] for r in range(rows)])
        return scale.view(torch.uint8)[at].view(torch.float8_e4m3fn)

    def fake(a: Tensor, b: Tensor, a_scale: Tensor, recipe_a: Any, b_scale: Tensor, recipe_b: Any, *swizzles: Any,
             output_dtype: torch.dtype) -> Tensor:  # fmt: skip
        meta = [t.to("meta") if t.dtype != torch.float4_e2m1fn_x2 else _meta(t) for t in (a, b, a_scale, b_scale)]
        expected = checked(meta[0], meta[1], meta[2], recipe_a, meta[3], recipe_b, *swizzles, output_dtype=output_dtype)
        a, b = a.view(torch.uint8), b.t().view(torch.uint8)
        (m, k), n = (a.shape[0], 2 * a.shape[1]), b.shape[0]
        calls.append((m, n, k))
        y = blackwell.matmul(a, plain(a_scale, m, k // 16), b, plain(b_scale, n, k // 16))
        assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
        return y

    return fake


def _meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


@pytest.mark.parametrize(
    ("sizes", "k", "input_scales", "options", "calls"),
    [
        ((64,), 128, (0.003,), "", [(5, 64, 128)]),
        ((37,), 144, (0.003,), "bias", [(5, 48, 160)]),
        ((48, 16, 16), 576, (0.003, 0.003, 0.003), "", [(5, 80, 576)]),
        ((40, 24, 24), 64, (0.003, 0.007, 0.003), "bias awq", [(5, 64, 64), (5, 32, 64)]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_product(
    sizes: tuple[int, ...],
    k: int,
    input_scales: tuple[float, ...],
    options: str,
    calls: list[tuple[int, int, int]],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int, int]] = []
    monkeypatch.setattr(functional, "scaled_mm", product(seen))
    backend, w = CublasBackend(), weight(sizes, k, input_scales, options)
    prepared = backend.prepare(w)
    assert prepared.backend == "cublas" and prepared.nbytes >= w.nbytes
    x = torch.randn(5, k, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert_same_bits(backend.linear(x, prepared), linear(x, w))  # alpha and bias as everywhere
    assert seen == calls
    assert_same_bits(
        backend.linear(x[None, 2:3], prepared, torch.float32), linear(x[None, 2:3], w, out_dtype=torch.float32)
    )
    with pytest.raises(InvalidArgumentError, match=rf"\[\.\.\., {k}\]"):
        backend.linear(x[:, 1:], prepared)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_other_weights_are_tritons_affair() -> None:
    w = NVFP4Weight(weight((32,), 64, (0.1,)).weight)
    prepared = CublasBackend().prepare(w)
    assert isinstance(prepared.data, triton.TritonNVFP4) and prepared.backend == "cublas"
    with pytest.raises(InvalidArgumentError, match="must be 'native' in backend cublas"):
        CublasBackend().prepare(weight((32,), 64, (0.1,)), "blackwell")
