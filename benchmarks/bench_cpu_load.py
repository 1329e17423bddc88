"""Load time and peak memory of an NVFP4 checkpoint on the CPU: anyfp4 against transformers, in one run.

    python -m benchmarks.bench_cpu_load [FOLDER] [--rounds 5]

FOLDER is a checkpoint, by default the demo's (run ``anyfp4 demo`` once). Every load is a process of its own, which has
imported its library before the clock starts; memory is the growth of the largest resident set over that moment.
transformers reads the same folder through compressed-tensors, which decompresses the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from anyfp4 import envs
from anyfp4.tools import demo
from benchmarks import harness

_MEASURE = r"""
import json, re, sys, time
from pathlib import Path
folder = sys.argv[1]
{prepare}
def status(name):
    return int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = status("VmRSS")
begin = time.perf_counter()
{load}
seconds = time.perf_counter() - begin
print(json.dumps([seconds, status("VmHWM") - before]))
"""
CANDIDATES = {
    "anyfp4": _MEASURE.format(
        # the tokenizer once before: that is what imports transformers' modules
        prepare="from anyfp4 import LLM; from anyfp4.engine.tokenizer import Tokenizer; Tokenizer(Path(folder))",
        load="model = LLM(folder)",
    ),
    "transformers": _MEASURE.format(
        prepare="import torch; from transformers import AutoModelForCausalLM, AutoTokenizer; "
        "import compressed_tensors, transformers.models.llama.modeling_llama; AutoTokenizer.from_pretrained(folder)",
        load="model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16); "
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ),
}


def measure(code: str, folder: Path) -> tuple[float, int]:
    """Seconds and bytes of one load."""
    words = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, growth = json.loads(done.stdout.splitlines()[-1])
    return float(seconds), int(growth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder = options.folder or demo.demo_checkpoint(envs.read().cache)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in CANDIDATES}
    for _ in range(options.rounds):
        for name, code in CANDIDATES.items():
            results[name].append(measure(code, folder))
    rows = []
    for name, values in results.items():
        seconds = harness.median([v[0] for v in values])
        growth = harness.median([v[1] for v in values])
        rows.append(
            {
                "candidate": name,
                "checkpoint MB": round(size / 1e6),
                "seconds": round(seconds, 2),
                "slowest": round(max(v[0] for v in values), 2),
                "peak MB": round(growth / 1e6),
                "of the bytes": f"{growth / size:.2f}x",
            }
        )
    columns = list(rows[0])
    print(harness.table(columns, [[row[c] for c in columns] for row in rows]))
    harness.report("cpu_load", rows)


if __name__ == "__main__":
    main()
