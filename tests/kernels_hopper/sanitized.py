"""Every kind of plan and of tiles once on small shapes, for NVIDIA's checkers:

compute-sanitizer --tool memcheck python -m tests.kernels_hopper.sanitized
compute-sanitizer --tool racecheck python -m tests.kernels_hopper.sanitized
compute-sanitizer --tool racecheck python -m tests.kernels_hopper.sanitized --every-lane
compute-sanitizer --tool racecheck python -m tests.kernels_hopper.sanitized --control

racecheck follows barriers in shared memory, but not that a warp meets before one of its lanes arrives at one: of what a
warp reads of a slot before the next copy into it, it reports the bytes of 31 lanes of 32. ``--every-lane`` compiles the
kernels so that all lanes arrive. ``--control`` runs a kernel of a few lines that copies in bulk, waits for the barrier
as NVIDIA documents it, and reads: what a checker reports of it, it reports of any such kernel.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from anyfp4.kernels.hopper import blackwell, compiler, dequantize, gemm, layout, linear, runtime
from anyfp4.kernels.hopper.blackwell_plans import MEASURED, BlackwellPlan
from anyfp4.kernels.hopper.gemm import Shape
from anyfp4.kernels.hopper.plan import Plan
from anyfp4.kernels.hopper.quantize import quantize_blocks, quantize_values
from anyfp4.kernels.hopper.runs import runs_of

#: every kind of plan: both instructions, parts and clusters, one and two sets of registers
PLANS = (
    Plan(8, 3, 2, 1, 4, 2, sync=1), Plan(16, 2, 3, 4, 3, 2, sync=1), Plan(32, 3, 1, 1, 4, 2, sync=1),
    Plan(8, 7, 1, 1, 4, 2), Plan(16, 3, 1, 4, 4, 2, 2), Plan(64, 2, 1, 4, 3, 2), Plan(64, 3, 1, 1, 3, 2, 2, 152),
    Plan(64, 4, 1, 1, 2, 2, 1, 104), Plan(128, 2, 1, 1, 3, 2, 2, 232), Plan(128, 1, 1, 1, 5, 2, 2),
    Plan(64, 1, 2, 1, 3, 2), Plan(64, 1, 1, 1, 10, 2, 2),
)  # fmt: skip
#: the same for blackwell numerics
BLACKWELL_PLANS = (
    BlackwellPlan(8, 3, 2, 2, 3, sync=1), BlackwellPlan(8, 7, 1, 2, 2, sync=1), BlackwellPlan(16, 1, 6, 2, 2, sync=1),
    BlackwellPlan(16, 2, 3, 1, 2, sync=1), BlackwellPlan(32, 1, 3, 1, 4, 152), BlackwellPlan(64, 3, 1, 1, 3, 152),
    BlackwellPlan(64, 1, 3, 1, 2, 152), BlackwellPlan(64, 2, 1, 2, 2, 232), BlackwellPlan(128, 2, 1, 1, 4, 232),
    *(plan for plan, *_ in MEASURED),
)  # fmt: skip
SHAPES = (Shape(96, sets=2), Shape(176, cluster=2, batch=2), Shape(256, batch=2, kept=56))
CONTROL = str(Path(__file__).with_name("control.cu"))


def control() -> None:
    """One copy, one barrier, one read."""
    x = torch.arange(256, dtype=torch.int32, device="cuda")
    y = torch.empty(64, dtype=torch.int32, device="cuda")
    runtime.load(("async.cu", CONTROL), "control", "PP", x.get_device()).launch((1, 1, 1), 64, (x, y))
    assert torch.equal(y, x[::4])
    print("control")


def main() -> None:
    g = torch.Generator(device="cuda").manual_seed(0)
    for n, k, m in ((70, 1104, 5), (200, 576, 130)):
        packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda", generator=g)
        scale = torch.randint(0, 127, (n, k // 16), dtype=torch.uint8, device="cuda", generator=g)
        runs = ((n // 3, 0), (n - n // 3, 1))
        records = layout.pack(packed, scale, [rows for rows, _ in runs])
        weight = linear.Records(records, runs, n, k, torch.ones(n, device="cuda"), torch.ones(n, device="cuda"))
        x = torch.randn(m, k, device="cuda", generator=g).bfloat16()
        values = quantize_values(x, torch.ones(2, device="cuda"))
        sums = [linear.linear(values, weight, torch.bfloat16, plan).float().abs().sum().item() for plan in PLANS]
        for shape in SHAPES:
            sums.append(gemm.packed_gemm(values, weight, torch.bfloat16, None, shape).float().abs().sum().item())
        dense = torch.randn(n, k, device="cuda", generator=g).bfloat16()
        gemm.dense_gemm(x, dense, runs_of([(n, 0)], x.device), None, torch.float32)
        assert len(set(sums)) == 1, sums
        dequantize.dequantize(weight, torch.float32)
        bounds = blackwell.bounds(packed, scale, [rows for rows, _ in runs])
        values, blocks = quantize_blocks(x, torch.ones(2, device="cuda"))
        layer = blackwell.BlackwellRecords(weight, bounds)
        products = [blackwell.linear(values, blocks, layer, torch.bfloat16, plan.fitted(k)) for plan in BLACKWELL_PLANS]
        assert all(torch.equal(y, products[0]) for y in products)
        torch.cuda.synchronize()
        print(f"N={n} K={k} M={m}: {len(PLANS)} + {len(BLACKWELL_PLANS)} plans, {len(SHAPES)} tiles")


if __name__ == "__main__":
    if "--every-lane" in sys.argv:
        compiler.OPTIONS = (*compiler.OPTIONS, "-DARRIVING=32")
    control() if "--control" in sys.argv else main()
