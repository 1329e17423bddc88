"""Plans of backend ``hopper`` for blackwell numerics: microseconds of the product alone, for every candidate.

    python -m benchmarks.bench_blackwell [--shapes 24576x4096,…] [--tokens 1,16,64,256]

For each shape and number of tokens: the product in native numerics, and in blackwell numerics by every plan that fits
(tokens/row tiles/parts/step), as CUDA graphs over rotating weights, taking turns; all plans must give the same bits.
``a step`` is the time that 64 columns of K take for an item where items are dealt out to the multiprocessors, less 3 µs
at both ends: what ``blackwell_plans.py`` chooses by.
"""

from __future__ import annotations

import argparse
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from anyfp4.backends import registry
from anyfp4.backends.base import PreparedLinear
from anyfp4.backends.triton import TritonBackend
from anyfp4.errors import BackendError
from anyfp4.kernels.hopper import blackwell, compiler, quantize
from anyfp4.kernels.hopper.blackwell_plans import STATIC, BlackwellPlan, choose
from anyfp4.kernels.hopper.plans import MOST, REGISTERS
from anyfp4.testing.bitwise import assert_same_bits
from benchmarks import harness
from benchmarks.bench_linear import SHAPES, copies, time_graphs
from benchmarks.random_model import random_weight

#: row tiles, parts, step
_SYNC = (
    (1, 2, 4), (1, 2, 8), (1, 3, 4), (1, 4, 2), (1, 4, 4), (1, 6, 2), (2, 2, 4), (3, 1, 2), (3, 1, 4), (3, 2, 2),
    (4, 1, 2), (4, 1, 4), (7, 1, 2), (7, 1, 4),
)  # fmt: skip
_WGMMA = ((1, 2, 2), (1, 3, 1), (2, 1, 2), (3, 1, 1), (3, 1, 2), (4, 1, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="N×K, comma-separated")
    parser.add_argument("--tokens", default="1,16,32,64,128,256")
    options = parser.parse_args()
    try:
        backend = registry.select(torch.device("cuda"), requested="hopper")
    except BackendError as error:
        sys.exit(str(error))
    assert isinstance(backend, TritonBackend)
    rows = []
    for text in options.shapes.split(","):
        n, k = map(int, text.split("x"))
        weight, count = random_weight(n, k, torch.device("cuda")), copies(n * k * 9 // 16)
        layers = {name: [backend.prepare(weight, name) for _ in range(count)] for name in ("native", "blackwell")}
        for m in map(int, options.tokens.split(",")):
            found = measure(backend, layers, n, k, m)
            print(harness.table(list(found[0]), [list(row.values()) for row in found]), flush=True)
            rows += found
    harness.report("blackwell", rows, gpu=torch.cuda.get_device_properties(0).name, cuda=torch.version.cuda)


def candidates(n: int, k: int, m: int, processors: int) -> list[BlackwellPlan]:
    """Plans for m tokens that fit the chip and do not leave most of it idle."""
    plans = [BlackwellPlan(tokens, *shape, sync=1) for tokens in (8, 16) if m <= 4 * tokens for shape in _SYNC]
    plans += [
        BlackwellPlan(tokens, rows, parts, step, registers=REGISTERS[rows * parts])
        for tokens in (32, 64) if m > tokens // 2 for rows, parts, step in _WGMMA
    ]  # fmt: skip
    busy = min(processors // 2, math.ceil(n / 64))
    return [
        plan.fitted(k)
        for plan in plans
        if plan.shared(k, 2) <= MOST - STATIC
        and math.ceil(n / 64 / plan.row_tiles) * math.ceil(m / plan.tokens) >= busy
    ]


def measure(
    backend: TritonBackend, layers: dict[str, list[PreparedLinear]], n: int, k: int, m: int
) -> list[dict[str, object]]:
    native, packed = layers["native"], [layer.data.packed for layer in layers["blackwell"]]
    x = torch.randn(m, k, device="cuda").bfloat16()
    values, blocks = quantize.quantize_blocks(x, native[0].data.inverse_scales)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    plans = candidates(n, k, m, processors)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda plan: compiler.compile_only(blackwell.FILES, plan.defines), plans))
    bits = [blackwell.linear(values, blocks, packed[0], torch.float32, plan) for plan in plans]
    for plan, y in zip(plans, bits, strict=True):
        assert_same_bits(y, bits[0], str(plan))
    us = time_graphs(
        {"native": (lambda i: backend.quantized_linear(values, blocks, native[i], torch.bfloat16), len(native))}
        | {
            str(at): (lambda i, p=plan: blackwell.linear(values, blocks, packed[i], torch.bfloat16, p), len(packed))
            for at, plan in enumerate(plans)
        }
    )
    chosen = choose(n, k, m, processors)
    found = []
    for at, plan in sorted(enumerate(plans), key=lambda pair: us[str(pair[0])]):
        rounds = math.ceil(math.ceil(math.ceil(n / 64) / plan.row_tiles) * math.ceil(m / plan.tokens) / processors)
        took = us[str(at)]
        found.append({
            "NxK": f"{n}x{k}", "M": m, "plan": f"{plan.tokens}/{plan.row_tiles}/{plan.parts}/{plan.step}",
            "us": round(took, 1), "a step": round((took - 3) / rounds / (k / 64), 3),
            "native us": round(us["native"], 1), "of native": round(took / us["native"], 2), "chosen": plan == chosen,
        })  # fmt: skip
    return found


if __name__ == "__main__":
    main()
