"""W4A4 linear on the CPU: bytes of packed weight per second, against plain reading of the same bytes, ggml and torch.

    BENCH_GGML_LIB=…/llama_cpp/lib python benchmarks/bench_cpu_linear.py [--shapes 4096x4096,…] [--tokens 1,4,16,128]

Every candidate multiplies the same activation by copies of the weight that together exceed the caches, in turn within
each round; figures are medians over rounds. GB/s count the bytes of the candidate's own weight format.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from anyfp4.backends.cpu import CpuBackend
from anyfp4.formats.nvfp4 import quantize
from anyfp4.formats.weights import NVFP4Weight
from benchmarks import ggml, harness

#: bytes of weight that a round reads: several times any last-level cache
ROUND_BYTES = 160 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,12288x4096,4096x12288", help="N×K, comma-separated")
    parser.add_argument("--tokens", default="1,4,16,128")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line")
    options = parser.parse_args()
    peer = ggml.load()
    if isinstance(peer, str):
        print(f"without ggml: {peer}")
        peer = None
    rows = []
    for shape in options.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for m in map(int, options.tokens.split(",")):
            for threads in map(int, options.threads.split(",")):
                rows.append(measure(peer, n, k, m, threads, options.seconds))
    columns = list(rows[0])
    print(harness.table(columns, [[row[c] for c in columns] for row in rows]))
    harness.report("cpu_linear", rows, ggml=peer.version if peer else None, isa=CpuBackend().native.isa())


def measure(peer: ggml.Ggml | None, n: int, k: int, m: int, threads: int, seconds: float) -> dict[str, object]:
    backend = CpuBackend()
    native = backend.native
    native.set_threads(threads)
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(n, k, generator=g), torch.randn(m, k, generator=g).bfloat16()
    weight = NVFP4Weight(quantize(w), (x.float().abs().amax() / 2688).reshape(1))
    copies = max(1, ROUND_BYTES // weight.nbytes) if m == 1 else 1
    prepared = [backend.prepare(weight) for _ in range(copies)]
    dense = [w.bfloat16() for _ in range(max(1, copies // 4))]
    handles = [p.data.handle for p in prepared]

    def plain() -> None:
        for h in handles:
            native.plain_read(h.weights, h.weight_bytes)

    def ours() -> None:
        for p in prepared:
            backend.linear(x, p)

    def bf16() -> None:
        for d in dense:
            torch.nn.functional.linear(x, d)

    candidates: dict[str, Callable[[], object]] = {"plain": plain, "anyfp4": ours, "torch": bf16}
    products = {}
    if peer is not None:
        products = {kind: peer.product(kind, w, x, copies) for kind in ("nvfp4", "q4_0") if kind in peer.types}
        own = backend.linear(x, prepared[0], torch.float32)
        for kind, product in products.items():
            product.run(threads)
            # both round weights and activations to few bits; a wrong layout would be off by far more
            error = float((product.result() - own).norm() / own.norm())
            if not error < 0.4:
                raise AssertionError(f"ggml {kind} gives other numbers: relative difference {error}")
            candidates[f"ggml_{kind}"] = lambda product=product: product.run(threads)
    times = {name: harness.median(t) for name, t in harness.interleaved(candidates, seconds=seconds).items()}
    bytes_ours = handles[0].weight_bytes * copies
    per = times["anyfp4"] / copies
    row: dict[str, object] = {
        "NxK": f"{n}x{k}",
        "M": m,
        "threads": threads,
        "us": round(per * 1e6),
        "GB/s": round(bytes_ours / times["anyfp4"] / 1e9, 1),
        "plain GB/s": round(bytes_ours / times["plain"] / 1e9, 1),
        "of plain": f"{times['plain'] / times['anyfp4']:.2f}",
        "x torch bf16": f"{times['torch'] / len(dense) / per:.1f}",
    }
    for kind, product in products.items():
        row[f"ggml {kind} GB/s"] = round(product.bytes * copies / times[f"ggml_{kind}"] / 1e9, 1)
        row[f"x ggml {kind}"] = f"{times[f'ggml_{kind}'] / times['anyfp4']:.2f}"
        product.close()
    return row


if __name__ == "__main__":
    main()
