"""Serving SmolLM2-135M on the CPU: tokens per second and latencies for 1, 4 and 16 concurrent requests.

    BENCH_LLAMA_PYTHON=…/bin/python python -m benchmarks.bench_serve [--model FOLDER] [--rounds 2] [--threads 2]

anyfp4 is measured as its users see it: ``anyfp4 serve`` in a process of its own, HTTP, streaming, every request with a
prompt of its own. ``BENCH_LLAMA_PYTHON`` is an interpreter that has llama-cpp-python; its own server answers one
request at a time, so what is measured of llama.cpp is its batched decoding, called directly: no HTTP, all requests
begin at once, which favours it. ``--transformers`` adds transformers' ``generate`` on a batch (bf16), of which only
totals are known. Without ``--model`` the checkpoint is the demo's (run ``anyfp4 demo`` once); the others take the
demo's GGUF.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from anyfp4 import envs
from anyfp4.tools import demo
from benchmarks import harness

#: runs in the other interpreter: reads a number of sequences and a seed, answers with JSON
_LLAMA = r"""
import ctypes, json, random, sys, time
import llama_cpp as L
import numpy as np
source, target, threads, prompt, new, most = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7])
quiet = L.llama_log_callback(lambda level, text, data: None)
L.llama_log_set(quiet, ctypes.c_void_p(0))
q = L.llama_model_quantize_default_params()
q.ftype, q.allow_requantize, q.nthread = L.LLAMA_FTYPE_MOSTLY_Q4_0, True, threads
if L.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(q)):
    sys.exit("llama.cpp could not quantize " + source)
L.llama_backend_init()
model = L.llama_model_load_from_file(target.encode(), L.llama_model_default_params())
c = L.llama_context_default_params()
c.n_ctx, c.n_batch, c.n_ubatch, c.n_seq_max = most * (prompt + new + 8), most * prompt, 512, most
c.n_threads = c.n_threads_batch = threads
context = L.llama_init_from_model(model, c)
vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
batch = L.llama_batch_init(most * prompt, 0, 1)
def decode(rows):
    batch.n_tokens = len(rows)
    for i, (token, position, sequence, wanted) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
            token, position, 1, sequence, wanted)
    if L.llama_decode(context, batch):
        sys.exit("llama_decode failed")
    return [int(np.ctypeslib.as_array(L.llama_get_logits_ith(context, i), (vocab,)).argmax())
            for i, row in enumerate(rows) if row[3]]
print(L.__version__, flush=True)
for line in sys.stdin:
    count, seed = map(int, line.split())
    L.llama_memory_clear(L.llama_get_memory(context), True)
    rng = random.Random(seed)
    prompts = [[rng.randrange(100, 20000) for _ in range(prompt)] for _ in range(count)]
    begin = time.perf_counter()
    tokens = decode([(t, p, s, p == prompt - 1) for s, ids in enumerate(prompts) for p, t in enumerate(ids)])
    times = [time.perf_counter() - begin]
    for step in range(new - 1):
        tokens = decode([(t, prompt + step, s, True) for s, t in enumerate(tokens)])
        times.append(time.perf_counter() - begin)
    print(json.dumps(times), flush=True)
"""


@dataclass
class Run:
    """What one run of concurrent requests took.

    Attributes:
        seconds: from the first request to the last answer.
        tokens: generated.
        first: seconds to the first token, of each request.
        between: seconds between tokens.
        whole: seconds of each request.
    """

    seconds: float
    tokens: int
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


@contextlib.contextmanager
def our_server(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """``anyfp4 serve``; yields its URL."""
    words = [sys.executable, "-m", "anyfp4.entrypoints.cli", "serve", str(folder), "--port", "0", "--no-log-requests"]
    words += ["--served-model-name", "model", "--max-model-len", str(options.prompt + options.new + 8)]
    environment = {**os.environ, "ANYFP4_NUM_THREADS": str(options.threads)}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        said = ""
        for line in process.stderr:
            said += line
            if match := re.search(r"serves model on (\S+)", line):
                yield match[1]
                break
        else:
            raise SystemExit("the server did not start:\n" + said)
    finally:
        process.terminate()
        process.wait()


async def _one(client: httpx.AsyncClient, url: str, prompt: Sequence[int], new: int, run: Run) -> None:
    body = {"model": "model", "prompt": list(prompt), "max_tokens": new, "temperature": 0, "ignore_eos": True}
    started = last = time.perf_counter()
    count = 0
    async with client.stream(
        "POST", url + "/v1/completions", json={**body, "stream": True, "return_token_ids": True}
    ) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            fresh = len(json.loads(line[6:])["choices"][0]["token_ids"])
            now = time.perf_counter()
            if fresh and not count:
                run.first.append(now - started)
            elif fresh:
                run.between += [(now - last) / fresh] * fresh
            count, last = count + fresh, now if fresh else last
    run.whole.append(time.perf_counter() - started)
    run.tokens += count


def ours(url: str, options: argparse.Namespace) -> Callable[[int, int], Run]:
    async def measure(count: int, seed: int) -> Run:
        rng = random.Random(seed)
        prompts = [[rng.randrange(100, 20000) for _ in range(options.prompt)] for _ in range(count)]
        run = Run(0.0, 0)
        async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=count)) as client:
            started = time.perf_counter()
            await asyncio.gather(*(_one(client, url, prompt, options.new, run) for prompt in prompts))
            run.seconds = time.perf_counter() - started
        return run

    return lambda count, seed: asyncio.run(measure(count, seed))


class Llama:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, gguf: Path, folder: Path, options: argparse.Namespace) -> None:
        sizes = [options.threads, options.prompt, options.new, max(options.concurrency)]
        words = [python, "-c", _LLAMA, str(gguf), str(folder / "q4_0.gguf"), *map(str, sizes)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._line()

    def __call__(self, count: int, seed: int) -> Run:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count} {seed}\n")
        self.process.stdin.flush()
        times = json.loads(self._line())
        between = [b - a for a, b in itertools.pairwise(times)]
        return Run(times[-1], count * len(times), [times[0]] * count, between * count, [times[-1]] * count)

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit("llama.cpp ended early; see above")
        return line


def transformers_generate(gguf: Path, folder: Path, options: argparse.Namespace) -> Callable[[int, int], Run]:
    """A whole batch at a time; there is no first token to see."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    from anyfp4.checkpoint.gguf import gguf_to_folder  # noqa: PLC0415

    torch.set_num_threads(options.threads)
    gguf_to_folder(gguf, folder / "bf16")
    model = AutoModelForCausalLM.from_pretrained(folder / "bf16", dtype=torch.bfloat16)

    def run(count: int, seed: int) -> Run:
        rng = random.Random(seed)
        ids = torch.tensor([[rng.randrange(100, 20000) for _ in range(options.prompt)] for _ in range(count)])
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=options.new, min_new_tokens=options.new, do_sample=False, pad_token_id=0)
        seconds = time.perf_counter() - started
        return Run(seconds, count * options.new, whole=[seconds] * count)

    return run


def summary(name: str, concurrency: int, runs: Sequence[Run], alone: float | None) -> dict[str, object]:
    """One row; ``alone`` is the tokens per second of one request at a time."""
    rate = statistics.median(run.tokens / run.seconds for run in runs)

    def percentiles(values: Sequence[float]) -> str:
        if len(values) < 2:
            return f"{1000 * values[0]:.0f}" if values else "-"
        cuts = statistics.quantiles(values, n=20, method="inclusive")
        return f"{1000 * cuts[9]:.0f} / {1000 * cuts[18]:.0f}"

    steps = [v for run in runs for v in run.between]
    return {
        "candidate": name,
        "requests": concurrency,
        "tokens/s": round(rate, 1),
        "to one": f"{rate / (alone or rate):.2f}x",
        # what it would be without prompts
        "decode tokens/s": round(concurrency / statistics.mean(steps), 1) if steps else None,
        "first token ms": percentiles([v for run in runs for v in run.first]),
        "between tokens ms": percentiles(steps),
        "whole ms": percentiles([v for run in runs for v in run.whole]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="NVFP4 folder; the demo's by default")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--transformers", action="store_true", help="measure transformers' generate too")
    options = parser.parse_args()
    cache = envs.read().cache
    folder = options.model or demo.demo_checkpoint(cache)
    python = os.environ.get("BENCH_LLAMA_PYTHON")
    with tempfile.TemporaryDirectory() as temporary, our_server(folder, options) as url:
        candidates: dict[str, Callable[[int, int], Run]] = {"anyfp4 serve": ours(url, options)}
        llama = Llama(python, demo.fetch_demo_model(cache), Path(temporary), options) if python else None
        if llama is not None:
            candidates["llama.cpp Q4_0, batched, no HTTP"] = llama
        else:
            print("without llama.cpp: BENCH_LLAMA_PYTHON is not set")
        if options.transformers:
            gguf = demo.fetch_demo_model(cache)
            candidates["transformers bf16 generate"] = transformers_generate(gguf, Path(temporary), options)
        results: dict[tuple[str, int], list[Run]] = {}
        for round_ in range(options.rounds + 1):
            for concurrency in options.concurrency:
                for index, (name, run) in enumerate(candidates.items()):
                    # prompts differ from run to run, so that no prefix cache helps
                    result = run(concurrency, 1000 * round_ + 10 * concurrency + index)
                    if round_:  # the first is a warm-up
                        results.setdefault((name, concurrency), []).append(result)
        if llama is not None:
            llama.process.kill()
    rows = []
    for name in candidates:
        alone = None
        for concurrency in options.concurrency:
            row = summary(name, concurrency, results[name, concurrency], alone)
            alone = alone or float(str(row["tokens/s"])) if concurrency == 1 else alone
            rows.append(row)
    columns = list(rows[0])
    print(harness.table(columns, [[row[c] for c in columns] for row in rows]))
    print("latencies: median / 95th percentile")
    sizes = {"prompt": options.prompt, "new": options.new, "threads": options.threads}
    harness.report("serve", rows, **sizes, model=folder.name, llama=llama.version if llama else None)


if __name__ == "__main__":
    main()
