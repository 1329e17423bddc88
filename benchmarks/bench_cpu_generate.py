"""Decode and prefill of SmolLM2-135M on the CPU: anyfp4 against llama.cpp (Q4_0) and transformers (bf16), in one run.

    BENCH_LLAMA_PYTHON=…/bin/python python -m benchmarks.bench_cpu_generate [--rounds 5] [--threads 2]

``BENCH_LLAMA_PYTHON`` is an interpreter that has llama-cpp-python; without it that column is left out. The models are
the demo's: anyfp4 takes its NVFP4 checkpoint (run ``anyfp4 demo`` once), llama.cpp the GGUF requantized to Q4_0,
transformers the GGUF dequantized to bf16. Candidates take turns, so that a noisy moment hits all of them alike.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from anyfp4 import LLM, EngineConfig, SamplingParams, envs
from anyfp4.checkpoint.gguf import gguf_to_folder
from anyfp4.tools import demo
from benchmarks import harness

PROMPT_TOKENS, NEW_TOKENS = 512, 64

#: runs in the other interpreter: reads "prefill" or "decode" from stdin, answers with seconds
_LLAMA = r"""
import ctypes, sys, time
import llama_cpp
source, target, threads, prompt, new = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True, threads
if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
    sys.exit("llama.cpp could not quantize " + source)
model = llama_cpp.Llama(target, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
tokens = [100 + i % 1000 for i in range(prompt)]
print(llama_cpp.__version__, flush=True)
for line in sys.stdin:
    model.reset()
    if line.strip() == "prefill":
        begin = time.perf_counter()
        model.eval(tokens)
    else:
        model.eval(tokens[:8])
        begin = time.perf_counter()
        for i in range(new):
            model.eval([tokens[i]])
    print(time.perf_counter() - begin, flush=True)
"""


class Llama:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, gguf: Path, folder: Path, threads: int) -> None:
        words = [python, "-c", _LLAMA, str(gguf), str(folder / "q4_0.gguf")]
        words += [str(threads), str(PROMPT_TOKENS), str(NEW_TOKENS)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._line()

    def seconds(self, what: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit("llama.cpp ended early; see above")
        return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    os.environ["ANYFP4_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    cache = envs.read().cache
    checkpoint, gguf = demo.demo_checkpoint(cache), demo.fetch_demo_model(cache)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        candidates: dict[str, Any] = {"anyfp4": anyfp4_seconds(checkpoint)}
        candidates["transformers bf16"] = transformers_seconds(gguf, folder)
        python = os.environ.get("BENCH_LLAMA_PYTHON")
        llama = Llama(python, gguf, folder, options.threads) if python else None
        if llama is not None:
            candidates["llama.cpp Q4_0"] = llama.seconds
        else:
            print("without llama.cpp: BENCH_LLAMA_PYTHON is not set")
        rows = []
        for what, count in (("decode", NEW_TOKENS), ("prefill", PROMPT_TOKENS)):
            times: dict[str, list[float]] = {name: [] for name in candidates}
            for round_ in range(options.rounds + 1):
                for name, run in candidates.items():
                    seconds = run(what)
                    if round_:  # the first is a warm-up
                        times[name].append(seconds)
            rates = {name: count / harness.median(values) for name, values in times.items()}
            ours = rates["anyfp4"]
            rows += [
                {"what": what, "candidate": name, "tokens/s": round(rate, 1), "anyfp4 is": f"{ours / rate:.2f}x"}
                for name, rate in rates.items()
            ]
    columns = list(rows[0])
    print(harness.table(columns, [[row[c] for c in columns] for row in rows]))
    harness.report("cpu_generate", rows, threads=options.threads, llama=llama.version if llama else None)


def anyfp4_seconds(checkpoint: Path) -> Any:
    """Seconds of one prefill or of a run of decode steps, through the engine."""
    llm = LLM(checkpoint, config=EngineConfig(max_model_len=1024, max_num_seqs=1, enable_prefix_caching=False))
    tokens = [100 + i % 1000 for i in range(PROMPT_TOKENS)]

    def run(what: str) -> float:
        if what == "prefill":
            begin = time.perf_counter()
            llm.generate(tokens, SamplingParams(temperature=0, max_tokens=1))
            return time.perf_counter() - begin
        stream = llm.stream(tokens[:8], SamplingParams(temperature=0, max_tokens=NEW_TOKENS + 1, ignore_eos=True))
        next(stream)
        begin = time.perf_counter()
        for _ in stream:
            pass
        return time.perf_counter() - begin

    return run


def transformers_seconds(gguf: Path, folder: Path) -> Any:
    """The same with transformers, its cache on."""
    gguf_to_folder(gguf, folder / "bf16")
    model = AutoModelForCausalLM.from_pretrained(folder / "bf16", dtype=torch.bfloat16)
    tokens = torch.tensor([[100 + i % 1000 for i in range(PROMPT_TOKENS)]])

    def run(what: str) -> float:
        with torch.inference_mode():
            if what == "prefill":
                begin = time.perf_counter()
                model(tokens, logits_to_keep=1)
                return time.perf_counter() - begin
            state = model(tokens[:, :8], use_cache=True)
            begin = time.perf_counter()
            for _ in range(NEW_TOKENS):
                state = model(state.logits[:, -1:].argmax(-1), past_key_values=state.past_key_values, use_cache=True)
            return time.perf_counter() - begin

    return run


if __name__ == "__main__":
    main()
