"""W4A4 linear on a GPU: microseconds for each call, against cuBLAS in bfloat16 and against plain emulation.

    python -m benchmarks.bench_linear [--backend NAME] [--shapes 24576x4096,…] [--tokens 1,16,64,256,1024,4096]

Every candidate runs as a CUDA graph over copies of its weight that together exceed the L2 cache several times; the
quantization of the activation is part of a W4A4 call (``us``; ``product us`` is without). ``emulation`` dequantizes the
weight to bfloat16 in each call and multiplies, as libraries without a kernel do. TB/s count the bytes of packed codes
and block scales, or of the bfloat16 weight; figures are medians of replays, candidates taking turns.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from anyfp4.backends import registry
from anyfp4.backends.triton import TritonBackend
from anyfp4.backends.triton_weights import kernel
from anyfp4.errors import BackendError
from anyfp4.formats import e2m1
from anyfp4.formats.nvfp4 import BLOCK_SIZE, NVFP4Tensor
from benchmarks import harness
from benchmarks.random_model import random_weight

#: bytes of weight that a graph reads: several times any L2 cache
ROUND_BYTES = 512 << 20
SHAPES = "24576x4096,8192x8192,4096x12288,6144x4096,4096x4096"
REPLAYS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="N×K, comma-separated")
    parser.add_argument("--tokens", default="1,16,64,256,1024,4096")
    parser.add_argument("--blackwell-tokens", type=int, default=256, help="most tokens for numerics='blackwell'")
    parser.add_argument("--backend", default="auto", help="auto, hopper or triton")
    options = parser.parse_args()
    device = torch.device("cuda")
    try:
        backend = registry.select(device, requested=options.backend)
    except BackendError as error:
        sys.exit(str(error))
    if not isinstance(backend, TritonBackend):
        sys.exit(f"{backend.name} has no kernels for GPUs")
    rows = []
    for shape in options.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for m in map(int, options.tokens.split(",")):
            rows.append(measure(backend, n, k, m, options.blackwell_tokens))
            print(rows[-1], file=sys.stderr, flush=True)
    columns = list(rows[0])
    print(harness.table(columns, [[row[c] for c in columns] for row in rows]))
    properties = torch.cuda.get_device_properties(device)
    harness.report(
        "linear", rows, backend=backend.name, gpu=properties.name, cuda=torch.version.cuda, hip=torch.version.hip,
        triton=importlib.metadata.version("triton"), copy_tb_s=round(copy_rate(), 2),
    )  # fmt: skip


def measure(backend: TritonBackend, n: int, k: int, m: int, blackwell_tokens: int) -> dict[str, object]:
    device = torch.device("cuda")
    x = torch.randn(m, k, device=device).bfloat16()
    weight = random_weight(n, k, device)
    packed_bytes = n * k * 9 // 16
    native = [backend.prepare(weight) for _ in range(copies(packed_bytes))]
    dense = [torch.randn(n, k, device=device).bfloat16() for _ in range(copies(2 * n * k))]
    plain = [random_weight(n, k, device).weight for _ in range(copies(packed_bytes))]
    inputs = native[0].data
    values, scale = kernel("quantize").quantize_values(x, inputs.inverse_scales)
    values = values.to(inputs.values_dtype)
    table = torch.tensor(e2m1.VALUES, dtype=torch.bfloat16, device=device)
    candidates: dict[str, tuple[Callable[[int], object], int]] = {
        "native": (lambda i: backend.linear(x, native[i]), len(native)),
        "product": (lambda i: backend.quantized_linear(values, scale, native[i], x.dtype), len(native)),
        "cublas": (lambda i: torch.nn.functional.linear(x, dense[i]), len(dense)),
        "emulation": (lambda i: emulate(x, plain[i], table), min(2, len(plain))),
    }
    if m <= blackwell_tokens:
        blackwell = [backend.prepare(weight, "blackwell") for _ in native]
        candidates["blackwell"] = (lambda i: backend.linear(x, blackwell[i]), len(blackwell))
    us = time_graphs(candidates)
    flop = 2 * m * n * k
    row: dict[str, object] = {
        "NxK": f"{n}x{k}",
        "M": m,
        "us": round(us["native"], 1),
        "product us": round(us["product"], 1),
        "TB/s": round(packed_bytes / us["native"] / 1e6, 2),
        "TFLOP/s": round(flop / us["native"] / 1e6, 1),
        "cublas us": round(us["cublas"], 1),
        "x cublas": round(us["cublas"] / us["native"], 2),
        "emulation us": round(us["emulation"], 1),
        "x emulation": round(us["emulation"] / us["native"], 1),
        "blackwell us": round(us["blackwell"], 1) if "blackwell" in us else "-",
        "of native": round(us["blackwell"] / us["native"], 2) if "blackwell" in us else "-",
    }
    return row


def copies(size: int) -> int:
    return max(2, min(24, ROUND_BYTES // size))


def emulate(x: Tensor, tensor: NVFP4Tensor, table: Tensor) -> Tensor:
    """Table lookup, scales, rounding to bfloat16, product: what emulation does in every call."""
    codes = torch.stack((tensor.packed & 0xF, tensor.packed >> 4), dim=-1).flatten(-2)
    values = table[codes.to(torch.int32)].unflatten(-1, (-1, BLOCK_SIZE))
    scale = (tensor.block_scale.to(torch.float32) * tensor.global_scale).to(torch.bfloat16)
    return torch.nn.functional.linear(x, (values * scale.unsqueeze(-1)).flatten(-2))


def time_graphs(candidates: dict[str, tuple[Callable[[int], object], int]]) -> dict[str, float]:
    """Median microseconds of one call of each candidate."""
    graphs = {}
    stream = torch.cuda.Stream()
    for name, (call, count) in candidates.items():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(count):
                call(i)
        graph.replay()
        torch.cuda.synchronize()
        graphs[name] = (graph, count)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(REPLAYS):
        for name, (graph, count) in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3 / count)
    return {name: harness.median(t) for name, t in times.items()}


def copy_rate() -> float:
    """TB/s of a large copy within the device, bytes read and written."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").fill_(1)
    b = torch.empty_like(a)
    us = time_graphs({"copy": (lambda i: b.copy_(a), 4)})["copy"]
    return 2 * a.numel() / us / 1e6


if __name__ == "__main__":
    main()
