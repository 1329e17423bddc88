"""What a step of the engine costs besides the model: scheduling, the step's tensors, committing.

    python benchmarks/bench_scheduler.py [--running 16,64,256] [--context 1000] [--steps 200]

No model runs. All sequences share no prefix and generate; figures are microseconds per step, median and worst, over
the steps in which all of them run.
"""

from __future__ import annotations

import argparse
import random
import time
from types import SimpleNamespace
from typing import Any

import torch

from anyfp4.engine.config import SamplingParams
from anyfp4.engine.model_runner import ModelRunner
from anyfp4.engine.scheduler import Scheduler
from anyfp4.engine.sequence import Sequence
from benchmarks import harness

BLOCK_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", default="16,64,256")
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    rows = [measure(int(n), options.context, options.steps) for n in options.running.split(",")]
    columns = list(rows[0])
    print(harness.table(columns, [[row[c] for c in columns] for row in rows]))
    harness.report("scheduler", rows)


def measure(running: int, context: int, steps: int) -> dict[str, Any]:
    blocks = running * (-(-(context + steps + 1) // BLOCK_SIZE) + 1)
    scheduler = Scheduler(blocks, BLOCK_SIZE, running, 2048)
    model: Any = SimpleNamespace(device=torch.device("cpu"))
    runner = ModelRunner(model, [], BLOCK_SIZE)
    rng = random.Random(0)
    for i in range(running):
        tokens = [rng.randrange(50_000) for _ in range(context)]
        scheduler.add(Sequence(str(i), 0, tokens, context, SamplingParams(), 0, context + steps + 1))
    times: dict[str, list[float]] = {"schedule": [], "tensors": [], "commit": []}
    while scheduler.has_work:
        began = time.perf_counter()
        step = scheduler.schedule()
        scheduled = time.perf_counter()
        runner.inputs(step)
        built = time.perf_counter()
        for item in step:
            samples, s = item.samples, item.sequence
            scheduler.commit(item)
            if samples:
                s.tokens.append(1)
                if len(s.tokens) == s.max_length:
                    scheduler.finish(s)
        ended = time.perf_counter()
        if len(step) == running and all(item.count == 1 for item in step):
            for name, seconds in zip(times, (scheduled - began, built - scheduled, ended - built), strict=True):
                times[name].append(seconds)
    row: dict[str, Any] = {"running": running, "context": context}
    for name, values in times.items():
        row[f"{name} µs"] = round(harness.median(values) * 1e6)
        row[f"{name} worst"] = round(max(values) * 1e6)
    return row


if __name__ == "__main__":
    main()
