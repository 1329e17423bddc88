"""Attention on a GPU: microseconds for each layer, against torch's scaled_dot_product_attention on contiguous K and V.

    python -m benchmarks.bench_attention [--cases 1x192,16x192,64x192,256x192,1x8192,p1x2048] [--variants]

A case SxL is a step of decode: S sequences with L keys on average (two thirds to four thirds of that, scattered in
blocks); pSxL is S prompts of L tokens. Every candidate runs as a CUDA graph over the caches of several layers, which
together exceed the L2 cache, candidates taking turns; figures are medians of replays. TB/s count keys and values, ``of
limit`` is against a plain copy; prompts count the products of what is visible, against cuBLAS on large matrices.
torch's is the fastest of its backends that runs, with the same average of keys for every sequence.

``--variants`` measures many ways to divide the work (``anyfp4.kernels.triton.attention.Launch``), compiled beforehand
by ``--jobs`` processes, and says of each whether it gives the bits of the first with its tile and sums, as it must;
``--variant tile=128,stages=3`` adds one more.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyfp4.device import architecture
from anyfp4.kernels.triton import attention, workspace
from anyfp4.kernels.triton.attention import Launch
from anyfp4.ops.attention import AttentionBatch
from benchmarks import harness
from benchmarks.bench_linear import copy_rate, time_graphs

#: bytes of keys and values that a graph reads, and layers at most
ROUND_BYTES, MOST_LAYERS = 512 << 20, 160
CASES = "1x192,16x192,64x192,256x192,1x8192,16x4096,p1x2048,p8x512"
CACHES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """What one step does. ``lengths``: keys of each sequence; ``new``: its tokens in this step."""

    name: str
    lengths: tuple[int, ...]
    new: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Case:
        count, length = map(int, text.removeprefix("p").split("x"))
        if text.startswith("p"):
            return cls(text, (length,) * count, (length,) * count)
        spread = [length * 2 // 3 + (length * 2 // 3) * i // max(1, count - 1) for i in range(count)]
        return cls(text, tuple(spread) if count > 1 else (length,), (1,) * count)

    @property
    def prompts(self) -> bool:
        return self.new[0] > 1

    def nbytes(self, shape: argparse.Namespace) -> int:
        """Of keys and values that are read at least once."""
        return 2 * sum(self.lengths) * shape.kv_heads * shape.dim * CACHES[shape.cache].itemsize

    def flop(self, shape: argparse.Namespace) -> int:
        visible = sum(n * (2 * length - n + 1) // 2 for length, n in zip(self.lengths, self.new, strict=True))
        return 4 * visible * shape.heads * shape.dim


@dataclass(frozen=True)
class Step:
    """A case's tensors: queries, caches of several layers, and where the keys lie."""

    q: Tensor
    k: Tensor
    v: Tensor
    batch: AttentionBatch
    scale: float

    def run(self, layer: int, division: Launch | None) -> Tensor:
        return attention.attention(
            self.q, self.k[layer], self.v[layer], self.batch, scale=self.scale, division=division
        )


def make(case: Case, shape: argparse.Namespace, layers: int) -> Step:
    g = torch.Generator("cuda").manual_seed(1)
    size = shape.block_size
    needed = [-(-n // size) for n in case.lengths]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(1)).int()
    table = torch.zeros(len(needed), max(-(-shape.max_len // size), *needed), dtype=torch.int32)
    for row, mine in zip(table, order.split(needed), strict=True):
        row[: len(mine)] = mine
    caches = []
    for _ in "kv":
        blocks = (layers, sum(needed), size, shape.kv_heads, shape.dim)
        whole = torch.empty(blocks, dtype=CACHES[shape.cache], device="cuda")
        for layer in whole:
            layer.copy_(torch.randn(layer.shape, generator=g, device="cuda", dtype=torch.float16))
        caches.append(whole)
    dtype = torch.bfloat16 if shape.cache == "fp8" else CACHES[shape.cache]
    q = torch.randn(sum(case.new), shape.heads, shape.dim, generator=g, device="cuda").to(dtype)
    starts = torch.tensor([0, *case.new]).cumsum(0).int().cuda()
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device="cuda")
    batch = AttentionBatch(starts, lengths, table.cuda(), torch.empty(0, dtype=torch.int64, device="cuda"))
    return Step(q, *caches, batch, shape.dim**-0.5)


def torchs(case: Case, shape: argparse.Namespace, layers: int) -> dict[str, tuple[Callable[[int], object], int]]:
    """torch's attention by each of its backends that runs."""
    count, new, length = len(case.new), case.new[0], sum(case.lengths) // len(case.lengths)
    dtype = torch.bfloat16 if shape.cache == "fp8" else CACHES[shape.cache]
    q = torch.randn(count, shape.heads, new, shape.dim, device="cuda", dtype=dtype)
    k, v = (torch.randn(layers, count, shape.kv_heads, length, shape.dim, device="cuda", dtype=dtype) for _ in "kv")

    def call(backend: SDPBackend) -> Callable[[int], object]:
        def run(i: int) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k[i], v[i], is_causal=case.prompts, enable_gqa=True
                )

        return run

    found = {}
    for name, backend in BACKENDS.items():
        try:
            call(backend)(0)
        except RuntimeError as error:
            print(f"{case.name}: torch's {name} does not run: {str(error).splitlines()[0][:100]}", file=sys.stderr)
            continue
        found[f"torch {name}"] = (call(backend), layers)
    return found


def divisions(case: Case, usual: Launch, options: argparse.Namespace) -> list[Launch]:
    """The usual launch first, then what was asked for."""
    found = [usual]
    for text in options.variant:
        given = dict(part.split("=") for part in text.split(","))
        if unknown := set(given) - {f.name for f in fields(Launch)}:
            sys.exit(f"--variant {text}: a launch has no {', '.join(sorted(unknown))}")
        found.append(replace(usual, **{name: int(value) for name, value in given.items()}))
    if options.variants and case.prompts:
        for tile, (rows, warps), delay, sums in product((64, 128), ((128, 8), (64, 4)), (False, True), (8, 32)):
            found.append(Launch(rows, tile, sums, warps, 3, delay))
        for tile, stages in ((64, 2), (64, 4), (128, 2)):
            found.append(Launch(128, tile, 32, 8, stages))
    elif options.variants:
        for tile, stages, (warps, registers) in product((64, 128), (1, 2, 3), ((4, 0), (4, 128), (8, 0), (8, 64))):
            found.append(Launch(16, tile, 32, warps, stages, registers=registers))
        for programs in (0, 128, 256, 1024, 2048):
            found.append(replace(usual, programs=programs))
    return list(dict.fromkeys(found))


def compile_one(case: Case, shape: argparse.Namespace, division: Launch) -> str | None:
    """In a process of its own: fills Triton's cache, and says why a division does not run."""
    try:
        make(case, shape, 1).run(0, division)
        torch.cuda.synchronize()
    except Exception as error:  # of many kinds: out of shared memory, of registers, of what the compiler can do
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return None


def measure(case: Case, options: argparse.Namespace, pool: Any, limits: dict[str, float]) -> list[dict[str, Any]]:
    layers = max(2, min(MOST_LAYERS, ROUND_BYTES // case.nbytes(options)))
    step = make(case, options, layers)
    padded = max(16, 1 << (options.dim - 1).bit_length())
    group = options.heads // options.kv_heads
    few = sum(case.new) * group <= 16 * len(case.new)
    usual = attention.launch(architecture(step.q.device), padded, step.q.itemsize, few)
    tried = divisions(case, usual, options)
    if pool is not None:
        why = pool.starmap(compile_one, [(case, options, division) for division in tried])
        for division, reason in zip(tried, why, strict=True):
            if reason is not None:
                print(f"{case.name}: {asdict(division)}: {reason}", file=sys.stderr)
        tried = [division for division, reason in zip(tried, why, strict=True) if reason is None]
    same = compare(step, tried)
    candidates: dict[str, tuple[Callable[[int], object], int]] = {
        str(i): (lambda layer, d=division: step.run(layer, d), layers) for i, division in enumerate(tried)
    }
    us = time_graphs({**candidates, **torchs(case, options, layers)})
    reference = min(((t, name) for name, t in us.items() if name.startswith("torch")), default=(float("nan"), "-"))
    rows = []
    for i, division in enumerate(tried):
        took = us[str(i)]
        rate = (case.flop(options) if case.prompts else case.nbytes(options)) / took / 1e6
        rows.append({
            "case": case.name, **asdict(division), "us": round(took, 2), "T/s": round(rate, 2),
            "of": "FLOP" if case.prompts else "B", "of limit": f"{rate / limits['FLOP' if case.prompts else 'B']:.0%}",
            "torch us": round(reference[0], 2), "by": reference[1].removeprefix("torch "),
            "x torch": round(reference[0] / took, 2), "bits": "same" if same[i] else "DIFFER",
        })  # fmt: skip
    rows[1:] = sorted(rows[1:], key=lambda row: row["us"])
    return rows


def compare(step: Step, tried: Sequence[Launch]) -> list[bool]:
    """Whether each division gives the bits of the first of its definition, three times in a row."""
    first: dict[tuple[int, int], Tensor] = {}
    found = []
    for division in tried:
        outputs = [step.run(0, division).view(torch.int16) for _ in range(3)]
        expected = first.setdefault((division.tile, division.sums), outputs[0])
        found.append(all(torch.equal(output, expected) for output in outputs))
    if workspace.of(step.q).counters.any():
        sys.exit("counters are not zero after a launch")
    return found


def matrix_rate() -> float:
    """TFLOP/s of cuBLAS on large bfloat16 matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in "ab")
    return 2 * 8192**3 / time_graphs({"matrices": (lambda i: a @ b, 3)})["matrices"] / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--variants", action="store_true", help="measure many divisions of the work")
    parser.add_argument("--variant", action="append", default=[], help="one more, as changes of the usual one")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile variants")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-len", type=int, default=2176, help="keys for which the block table has room")
    parser.add_argument("--cache", default="bf16", choices=CACHES)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU")
    pool = None
    if options.variants or options.variant:
        pool = multiprocessing.get_context("spawn").Pool(options.jobs)
    limits = {"B": copy_rate(), "FLOP": matrix_rate()}
    rows = []
    for text in options.cases.split(","):
        found = measure(Case.parse(text), options, pool, limits)
        print(harness.table(list(found[0]), [list(row.values()) for row in found]), flush=True)
        rows += found
        torch.cuda.empty_cache()
    if pool is not None:
        pool.close()
    shape = {name: getattr(options, name) for name in ("heads", "kv_heads", "dim", "block_size", "max_len", "cache")}
    harness.report(
        "attention", rows, **shape, gpu=torch.cuda.get_device_properties(0).name, cuda=torch.version.cuda,
        triton=importlib.metadata.version("triton"), copy_tb_s=round(limits["B"], 2), tflop_s=round(limits["FLOP"]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
