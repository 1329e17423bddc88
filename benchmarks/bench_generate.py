"""A model of Qwen3-8B's shape on a GPU: tokens per second in decode and prefill, and which kernels take the time.

    python -m benchmarks.bench_generate [--batches 1,16,64,256] [--layers 36] [--backend auto] [--no-profile]

The checkpoint has random weights and is made on the spot (W4A4, compressed-tensors, loaded like any other).
``tokens/s`` is the number of new tokens over the whole time of a batch whose requests have 128 tokens and get 128, as
servers are compared; ``decode`` leaves the first token out. ``GB a step`` is the least that a decode step reads
(weights once, keys and values), ``TB/s`` that over the time of a step. Prefill counts the tokens of prompts of 2048.
transformers runs a bf16 model of the same shape in the same process, one batch size after the other.

``--prefix-caching`` finds the prompts in the prefix cache from the second round on, as when a server is asked the same
again; prefill is left out then.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from anyfp4 import EngineConfig, SamplingParams
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.engine import kv_cache
from anyfp4.engine.engine import Engine
from anyfp4.models.loader import load_decoder
from benchmarks import harness, random_model

PROMPT, NEW, LONG = 128, 128, 2048
PREFILLS = (1, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,16,64,256")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--numerics", default="native", choices=("native", "blackwell"))
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("--no-async-scheduling", action="store_true")
    parser.add_argument("--prefix-caching", action="store_true", help="find prompts of earlier rounds in the cache")
    parser.add_argument("--no-profile", action="store_true", help="leave the table of kernels out")
    parser.add_argument("--no-transformers", action="store_true", help="leave the comparison out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU")
    batches = [int(b) for b in options.batches.split(",")]
    config = {**random_model.QWEN3_8B, "num_hidden_layers": options.layers}
    ours = measure_anyfp4(config, batches, options)
    gc.collect()
    torch.cuda.empty_cache()
    theirs = {} if options.no_transformers else measure_transformers(config, batches)
    rows = [
        {
            **row,
            "bf16 tokens/s": round(theirs[name]) if name in theirs else "-",
            "ratio": round(row["tokens/s"] / theirs[name], 2) if name in theirs else "-",
        }
        for name, row in ours.items()
    ]
    columns = list(rows[0])
    print(harness.table(columns, [[row[c] for c in columns] for row in rows]))
    properties = torch.cuda.get_device_properties(0)
    harness.report(
        "generate", rows, gpu=properties.name, cuda=torch.version.cuda, layers=options.layers, backend=options.backend,
        numerics=options.numerics, cuda_graphs=not options.no_cuda_graphs, prefix_caching=options.prefix_caching,
        async_scheduling=not options.no_async_scheduling,
    )  # fmt: skip


def measure_anyfp4(config: dict[str, Any], batches: list[int], options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda")
    with tempfile.TemporaryDirectory() as temporary:
        began = time.perf_counter()
        folder = random_model.write(Path(temporary) / "model", config, device)
        written = time.perf_counter()
        with Checkpoint(folder) as checkpoint:
            model = load_decoder(
                checkpoint, device=device, numerics=options.numerics, backend=options.backend,
                max_positions=LONG + NEW,
            )  # fmt: skip
        loaded = time.perf_counter()
    print(
        f"checkpoint written in {written - began:.0f} s, loaded in {loaded - written:.1f} s, "
        f"{model.nbytes / 2**30:.2f} GiB of weights, peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB",
        file=sys.stderr,
    )
    engine = Engine(
        model,
        EngineConfig(
            max_model_len=LONG + NEW, max_num_seqs=max(*batches, 16), max_step_tokens=8192,
            kv_cache_bytes=24 << 30, enable_prefix_caching=options.prefix_caching,
            cuda_graphs=False if options.no_cuda_graphs else None,
            async_scheduling=False if options.no_async_scheduling else None,
        ),
    )  # fmt: skip
    found: dict[str, Any] = {}
    for batch in batches:
        generate(engine, batch, PROMPT, 4)  # compiles, captures
        timed = [generate(engine, batch, PROMPT, NEW) for _ in range(3 if batch < 64 else 2)]
        total, decode = min(t[0] for t in timed), min(t[1] for t in timed)
        found[f"decode {batch}"] = {
            "what": f"{batch} × {PROMPT} + {NEW}",
            "tokens/s": round(batch * NEW / total),
            "decode tokens/s": round(batch * (NEW - 1) / decode),
            "ms a step": round(decode / (NEW - 1) * 1e3, 2),
            "GB a step": round(step_bytes(engine, batch) / 1e9, 2),
            "TB/s": round(step_bytes(engine, batch) / (decode / (NEW - 1)) / 1e12, 2),
        }
        print(found[f"decode {batch}"], file=sys.stderr, flush=True)
        if not options.no_profile and batch in (batches[0], batches[-1]):
            generate(engine, batch, PROMPT, 2, running=True)
            kernels(f"a decode step of {batch}", engine.step)
            drain(engine)
    for count in () if options.prefix_caching else PREFILLS:
        generate(engine, count, LONG, 1)
        seconds = min(generate(engine, count, LONG, 1)[0] for _ in range(2))
        found[f"prefill {count}"] = {
            "what": f"prefill {count} × {LONG}",
            "tokens/s": round(count * LONG / seconds),
            "decode tokens/s": "-",
            "ms a step": round(seconds * 1e3, 1),
            "GB a step": "-",
            "TB/s": "-",
        }
        print(found[f"prefill {count}"], file=sys.stderr, flush=True)
    if not options.no_profile and not options.prefix_caching:
        add(engine, 1, LONG, 1)
        kernels(f"prefill of {LONG}", engine.step)
        drain(engine)
    return found


def step_bytes(engine: Engine, batch: int) -> float:
    """The least that a decode step must read: every weight but the embedding once, and the keys and values."""
    model = engine.model
    table = model.embedding.numel() * model.embedding.element_size()
    context = PROMPT + NEW / 2
    return model.nbytes - table + batch * context * kv_cache.block_bytes(model, 1)


def add(engine: Engine, batch: int, prompt: int, new: int) -> None:
    g = torch.Generator().manual_seed(batch)
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    for i in range(batch):
        engine.add(str(i), torch.randint(0, 100_000, (prompt,), generator=g).tolist(), params)


def drain(engine: Engine) -> None:
    while engine.has_work:
        if any(s.error for s in engine.step()):
            sys.exit("a request ended with an error")


def generate(engine: Engine, batch: int, prompt: int, new: int, running: bool = False) -> tuple[float, float]:
    """Seconds of a batch, and of its steps after the prompts; ``running``: stops after the prompts."""
    add(engine, batch, prompt, new if not running else NEW)
    torch.cuda.synchronize()
    began = time.perf_counter()
    while any(len(s.tokens) == s.prompt_length for s in (*engine.scheduler.running, *engine.scheduler.waiting)):
        engine.step()
    prompts = time.perf_counter()
    if running:
        engine.step()
        return 0.0, 0.0
    drain(engine)
    ended = time.perf_counter()
    return ended - began, ended - prompts


def kernels(title: str, run: Callable[[], object]) -> None:
    """Prints microseconds and launches of the kernels of one call, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    events = [e for e in trace.key_averages() if e.self_device_time_total > 0]
    total = sum(e.self_device_time_total for e in events)
    events.sort(key=lambda e: -e.self_device_time_total)
    print(f"{title}: {total / 1e3:.2f} ms of kernels, {sum(e.count for e in events)} launches")
    rows = [
        [f"{e.self_device_time_total:.0f}", f"{e.self_device_time_total / total:.1%}", e.count, e.key[:70]]
        for e in events[:14]
    ]
    print(harness.table(["us", "share", "launches", "kernel"], rows), flush=True)


def measure_transformers(config: dict[str, Any], batches: list[int]) -> dict[str, float]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    plain = {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")}
    settings = AutoConfig.for_model(plain.pop("model_type"), **plain)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).eval()
    found = {}
    for batch in batches:
        tokens = torch.randint(0, 100_000, (batch, PROMPT), device="cuda")
        found[f"decode {batch}"] = batch * NEW / timed(model, tokens, NEW)
    for count in PREFILLS:
        tokens = torch.randint(0, 100_000, (count, LONG), device="cuda")
        found[f"prefill {count}"] = count * LONG / timed(model, tokens, 1)
    return found


def timed(model: Any, tokens: torch.Tensor, new: int) -> float:
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    model.generate(tokens, attention_mask=mask, **{**options, "max_new_tokens": 1, "min_new_tokens": 1})
    torch.cuda.synchronize()
    began = time.perf_counter()
    model.generate(tokens, attention_mask=mask, **options)
    torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
