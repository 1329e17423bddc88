"""Tiles of backend ``hopper`` for medium numbers of tokens: microseconds of the product alone, for every candidate.

    python -m benchmarks.bench_hopper [--shapes 24576x4096,…] [--tokens 64,96,128,192,256]

For each shape and number of tokens: the kernel for few tokens by the plan that ``plans.py`` chooses (``plan``), the
kernel for many tokens (``gemm.py``) with tiles of so many tokens (``columns/cluster/sets``), and cuBLAS in bfloat16,
all as CUDA graphs over rotating weights, taking turns. ``a step`` is the time that 64 columns of K take for a tile when
the tiles are dealt out to the multiprocessors: what ``gemm.py`` chooses by.
"""

from __future__ import annotations

import argparse
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from anyfp4.backends import registry
from anyfp4.errors import BackendError
from anyfp4.kernels.hopper import compiler, gemm, linear
from anyfp4.kernels.hopper.gemm import Shape
from benchmarks import harness
from benchmarks.bench_linear import SHAPES, copies, time_graphs
from benchmarks.random_model import random_weight

CANDIDATES = [
    Shape(columns, cluster, sets=2 if columns <= 160 else 1, batch=4 if columns <= 192 else 2, kept=kept)
    for columns, kept in (
        (32, 0),
        (48, 0),
        (64, 0),
        (80, 0),
        (96, 0),
        (112, 0),
        (128, 0),
        (160, 0),
        (192, 0),
        (256, 56),
    )
    for cluster in (1, 2)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="N×K, comma-separated")
    parser.add_argument("--tokens", default="64,96,128,192,256")
    options = parser.parse_args()
    try:
        backend = registry.select(torch.device("cuda"), requested="hopper")
    except BackendError as error:
        sys.exit(str(error))
    with ThreadPoolExecutor() as pool:
        jobs = [gemm.macros(shape, True, True, 2, False, False)[0] for shape in CANDIDATES]
        list(pool.map(lambda defines: compiler.compile_only(gemm.FILES, defines), jobs))
    rows = []
    for text in options.shapes.split(","):
        n, k = map(int, text.split("x"))
        weight = random_weight(n, k, torch.device("cuda"))
        records = [backend.prepare(weight).data.packed for _ in range(copies(n * k * 9 // 16))]
        dense = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(copies(2 * n * k))]
        for m in map(int, options.tokens.split(",")):
            rows += measure(records, dense, m)
            print(
                harness.table(
                    list(rows[0]), [list(row.values()) for row in rows if row["NxK"] == text and row["M"] == m]
                )
            )
    harness.report("hopper", rows, gpu=torch.cuda.get_device_properties(0).name, cuda=torch.version.cuda)


def measure(records: list[linear.Records], dense: list[torch.Tensor], m: int) -> list[dict[str, object]]:
    n, k = dense[0].shape
    x = torch.randn(1, m, k, device="cuda").bfloat16()
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    # a tile of which more than a third would be empty does not pay
    tried = [s for s in CANDIDATES if math.ceil(m / s.columns) * s.columns <= 1.34 * m]
    calls = {
        "plan": (lambda i: linear.linear(x, records[i], torch.bfloat16), len(records)),
        "cublas": (lambda i: torch.nn.functional.linear(x[0], dense[i]), len(dense)),
    } | {
        str(at): (lambda i, s=shape: gemm.packed_gemm(x, records[i], torch.bfloat16, None, s), len(records))
        for at, shape in enumerate(tried)
    }
    us = time_graphs(calls)
    found = [("plan", us["plan"], math.nan)]
    for at, shape in enumerate(tried):
        tiles = records[0].by_run.tiles(shape.rows) * math.ceil(m / shape.tokens)
        rounds = math.ceil(tiles / (processors // shape.cluster))
        took = us[str(at)]
        found.append((f"{shape.columns}/{shape.cluster}/{shape.sets}", took, took / rounds / (k / 64)))
    found.sort(key=lambda row: row[1])
    return [
        {
            "NxK": f"{n}x{k}", "M": m, "tiles": name, "us": round(took, 1), "a step": round(step, 3),
            "cublas us": round(us["cublas"], 1), "x cublas": round(us["cublas"] / took, 2),
        }
        for name, took, step in found
    ]  # fmt: skip


if __name__ == "__main__":
    main()
