"""Every kind of plan once on small shapes, for NVIDIA's checkers:

compute-sanitizer --tool memcheck python -m tests.kernels_hopper.sanitized
compute-sanitizer --tool racecheck python -m tests.kernels_hopper.sanitized
"""

from __future__ import annotations

import torch

from anyfp4.kernels.hopper import dequantize, layout, linear
from anyfp4.kernels.hopper.plan import Plan
from anyfp4.kernels.hopper.quantize import quantize_values

#: every kind of plan: both instructions, parts and clusters, one and two sets of registers
PLANS = (
    Plan(8, 3, 2, 1, 4, 2, sync=1), Plan(16, 2, 3, 4, 3, 2, sync=1), Plan(32, 3, 1, 1, 4, 2, sync=1),
    Plan(8, 7, 1, 1, 4, 2), Plan(16, 3, 1, 4, 4, 2, 2), Plan(64, 2, 1, 4, 3, 2), Plan(64, 3, 1, 1, 3, 2, 2, 152),
    Plan(64, 4, 1, 1, 2, 2, 1, 104), Plan(128, 2, 1, 1, 3, 2, 2, 232), Plan(128, 1, 1, 1, 5, 2, 2),
)  # fmt: skip


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
        assert len(set(sums)) == 1, sums
        dequantize.dequantize(weight, torch.float32)
        torch.cuda.synchronize()
        print(f"N={n} K={k} M={m}: {len(PLANS)} plans")


if __name__ == "__main__":
    main()
