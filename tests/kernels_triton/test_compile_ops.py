"""Kernels of the decoder's other ops compile for every family of GPUs, and attention keeps one order of its sums."""

from __future__ import annotations

import pytest

from tests.kernels_triton.child import run_compiler

#: instruction of large programs, and of small ones; bytes of shared memory that a program may take
TARGETS = {
    ("cuda", "80"): ("mma.sync", "mma.sync", 163 << 10),
    ("cuda", "90"): ("wgmma.mma_async", "mma.sync", 227 << 10),
    ("cuda", "100"): ("tcgen05.mma", "tcgen05.mma", 227 << 10),
    ("hip", "gfx942"): ("v_mfma", "v_mfma", 64 << 10),
    ("hip", "gfx950"): ("v_mfma", "v_mfma", 160 << 10),
}
ATTENTION = ("attention", "attention, fp8", "attention, heads of 80", "attention, fp32")
EACH_ROUNDED = (
    "rms_norm", "add_rms_norm", "silu_mul", "rope", "rope_and_write", "rope_and_write, fp8", "write_kv, fp8",
    "sum of pieces", "log_softmax", "norm_quantize", "norm_quantize, 1 row", "silu_mul_quantize",
    "silu_mul_quantize, 1 row", "weights of pieces", "draw", "keys of weights", "draw from the heaviest",
)  # fmt: skip
#: kernel -> exponentials of a thread, each of 12 multiply-adds that are fused on purpose
EXPONENTIALS = {
    "silu_mul": 8, "silu_mul_quantize": 16, "silu_mul_quantize, 1 row": 4, "sum of pieces": 32,
    "weights of pieces": 32, "draw": 32, "keys of weights": 32,
}  # fmt: skip


def built(backend: str, arch: str) -> dict[str, dict[str, int]]:
    """What ``compiling_ops.py`` says."""
    return run_compiler("compiling_ops", backend, arch)


@pytest.mark.parametrize(("backend", "arch"), TARGETS, ids=str)
def test_machine_code(backend: str, arch: str) -> None:
    large, small, most = TARGETS[backend, arch]
    found = built(backend, arch)
    for name, facts in found.items():
        assert facts["binary"] > 0, name
        assert facts["shared"] <= most, f"{name}: {facts}"
    for name in ATTENTION[:3]:
        if name not in found:
            continue
        assert found[name].get(large, 0) > 0, f"{name}: {found[name]}"
        assert found[f"{name}, few rows"].get(small, 0) > 0, f"{name}: {found[name]}"


@pytest.mark.parametrize(("backend", "arch"), TARGETS, ids=str)
def test_small_and_large_programs_add_in_one_order(backend: str, arch: str) -> None:
    """The same columns of K go into each step: the width of operands in registers, and AMD's shape of instruction."""
    for name in ATTENTION:
        if name not in built(backend, arch):
            continue
        large, small = (
            {f for f in built(backend, arch)[n] if f.startswith(("kWidth", "mfma"))}
            for n in (name, f"{name}, few rows")
        )
        if backend == "cuda":
            # two neighbours of 16 bits: columns in order, as wgmma has them from shared memory
            assert large | small <= {"kWidth 2"}, name
        else:
            assert large == small, name


@pytest.mark.parametrize("arch", ["90", "100"])
def test_kernels_that_may_start_early_wait_first(arch: str) -> None:
    """Nothing is read or written before, and no program ends without having waited."""
    early = {name: facts for name, facts in built("cuda", arch).items() if "griddepcontrol.wait" in facts}
    assert {"norm_quantize", "silu_mul_quantize", "rope_and_write", "attention", "attention, few rows"} <= set(early)
    for name, facts in early.items():
        assert (facts["griddepcontrol.wait"], facts["before waiting"]) == (1, 0), name
    assert not any("griddepcontrol.wait" in facts for facts in built("cuda", "80").values())


@pytest.mark.parametrize("arch", ["80", "90", "100"])
@pytest.mark.parametrize("name", EACH_ROUNDED)
def test_nothing_else_is_fused(arch: str, name: str) -> None:
    assert built("cuda", arch)[name]["fma"] == 12 * EXPONENTIALS.get(name, 0)
