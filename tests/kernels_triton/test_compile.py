"""Every linear kernel compiles for every family of GPUs, to machine code with the matrix instructions meant there."""

from __future__ import annotations

import pytest

from tests.kernels_triton.child import run_compiler

TARGETS = {
    ("cuda", "80"): "mma.sync",
    ("cuda", "90"): "wgmma.mma_async",
    ("cuda", "100"): "tcgen05.mma",
    ("hip", "gfx942"): "v_mfma",
    ("hip", "gfx950"): "v_mfma",
}
PRODUCTS = (
    "packed", "packed, in turn", "packed, wide", "weight-only", "fp8", "fp8 blocks", "fp8 blocks, weight-only", "dense",
    "gemm", "gemm, narrow",
)  # fmt: skip


def built(backend: str, arch: str) -> dict[str, dict[str, int]]:
    """What ``compiling.py`` says."""
    return run_compiler("compiling", backend, arch)


@pytest.mark.parametrize(("backend", "arch"), TARGETS, ids=str)
def test_matrix_instructions(backend: str, arch: str) -> None:
    for name, found in built(backend, arch).items():
        assert found["cubin" if backend == "cuda" else "hsaco"] > 0, name
        if name in PRODUCTS:
            assert found.get(TARGETS[backend, arch], 0) > 0, f"{name} for {arch}: {found}"
    # blocks of 16 columns: small tiles take the older instruction on NVIDIA
    small, large = ("mma.sync", TARGETS[backend, arch]) if backend == "cuda" else ("v_mfma", "v_mfma")
    for name in ("blackwell, few tokens", "blackwell again"):
        assert built(backend, arch)[name].get(small, 0) > 0
    found = built(backend, arch)["blackwell"]
    assert found.get(large, 0) + found.get(small, 0) > 0


def test_k_is_in_order_on_a_hopper() -> None:
    """Operands in registers hold two neighbours of K: the compiler has not permuted columns within a step."""
    for name in PRODUCTS:
        widths = {w for w in built("cuda", "90")[name] if w.startswith("kWidth")}
        assert widths <= {"kWidth 2"}, f"{name}: {widths}"


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_nothing_is_fused(arch: str) -> None:
    """The quantization and the epilogue round each operation."""
    found = built("cuda", arch)
    for name in found:
        if name != "dense, float32":
            assert found[name]["fma"] == 0, name


@pytest.mark.parametrize(("backend", "arch"), TARGETS, ids=str)
def test_float32_stays_float32(backend: str, arch: str) -> None:
    for name, found in built(backend, arch).items():
        assert not found.get("tf32"), name
