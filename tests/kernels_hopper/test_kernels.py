"""What can be said of the kernels without a GPU: they compile, fit the chip, and use its instructions."""

from __future__ import annotations

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from anyfp4.kernels.hopper import compiler, dequantize, linear, plans, quantize
from anyfp4.kernels.hopper.plan import Plan
from tests.kernels_hopper.sanitized import CONTROL

needs_nvrtc = pytest.mark.skipif(compiler.find_nvrtc() is None, reason="libnvrtc is not installed")
SHAPES = (
    (57344, 8192), (24576, 4096), (8192, 8192), (4096, 12288), (6144, 4096), (4096, 4096), (8192, 28672),
    (12288, 4096), (152064, 4096), (1024, 4096), (576, 576), (64, 64), (130, 4352), (4096, 65536),
)  # fmt: skip
TOKENS = (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 4096)
#: one plan of each kind that is chosen
KINDS = {plans.choose(n, k, m, 132) for n, k in SHAPES[:6] for m in (1, 16, 32, 64, 256)}


@pytest.mark.parametrize("processors", [132, 114, 78])
def test_every_plan_fits_the_chip(processors: int) -> None:
    for n, k in SHAPES:
        for m in TOKENS:
            plan = plans.choose(n, k, m, processors)
            assert plan.shared(k) <= plans.MOST and plan.stages >= 2 and plan.threads <= 1024, (n, k, m, plan)
            assert 16 % plan.step == 0 and plan.step % plan.sets == 0
            # a block finishes pairs of tokens, and the lanes of one warp copy
            assert plan.tokens // plan.cluster % 2 == 0 and plan.parts * plan.step <= 32
            segments = -(-k // 1024)
            assert plan.segments_each(k) * plan.parts * plan.cluster >= segments
            if plan.registers:
                # what computing threads gain, copying ones must have given up: 65536 registers, in eights
                launch = 65536 // plan.threads // 8 * 8
                assert plan.registers * (plan.threads - 128) + 40 * 128 <= launch * plan.threads


def sass(cubin: bytes, folder: Path) -> str:
    spec = find_spec("triton")
    tool = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump" if spec else Path("none")  # type: ignore[index]
    if not tool.exists():
        pytest.skip("cuobjdump is not installed (it comes with Triton)")
    (folder / "kernel.cubin").write_bytes(cubin)
    command = [str(tool), "-sass", str(folder / "kernel.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_nvrtc
@pytest.mark.parametrize("plan", sorted(KINDS, key=str), ids=str)
def test_plans_compile_to_matrix_instructions_without_spills(plan: Plan, tmp_path: Path) -> None:
    cubin, log = compiler.compile_with_log(linear.FILES, plan.defines, ("--ptxas-options=-v",))
    spilled = re.search(r"(\d+) bytes spill stores", log)
    assert spilled is not None and int(spilled[1]) <= 16, log
    assert "serialized" not in log
    text = sass(cubin, tmp_path)
    assert ("HMMA.16816" if plan.sync else f"HGMMA.64x{plan.tokens}x16") in text
    assert "UBLKCP" in text and "UTMALDG" in text


@needs_nvrtc
def test_unpacking_takes_two_instructions_for_a_code(tmp_path: Path) -> None:
    """For the 32 codes and 8 scales of a thread's chunk, as ``layout.py`` and ``unpack.cu`` promise."""
    text = sass(compiler.compile_only(dequantize.FILES, (("KIND", 2),)), tmp_path)
    rotations, products = text.count("SHF.L.W.U32.HI"), text.count("HMUL2.BF16_V2")
    masks = sum(text.count(f" {mask},") for mask in ("0x81c081c0", "0x81808180", "0x400040", "0xff00ff0"))
    assert (rotations, products, masks) == (8 + 2, 16, 12 + 4 + 4 + 4)


@needs_nvrtc
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_the_other_kernels_compile(kind: int) -> None:
    assert compiler.compile_only(dequantize.FILES, (("KIND", kind),))[:4] == b"\x7fELF"
    for share in (1, 4):
        defines, options = (("KIND", kind), ("SHARE", share)), ("--ptxas-options=-v",)
        cubin, log = compiler.compile_with_log(quantize.FILES, defines, options)
        assert cubin[:4] == b"\x7fELF" and "0 bytes spill stores" in log
    assert compiler.compile_only(("async.cu", CONTROL))[:4] == b"\x7fELF"
    assert compiler.compile_only(linear.FILES, Plan(8, 3, 1, 1, 4, 2, sync=1).defines, ("-DARRIVING=32",))
    plan = Plan(16, 3, 1, 1, 4, 2, sync=1, float16=1)
    assert compiler.compile_only(linear.FILES, plan.defines)[:4] == b"\x7fELF"
