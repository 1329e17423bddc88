"""What every benchmark shares: interleaved timing, a description of the machine, a table and one JSON line."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, seconds: float = 2.0, most: int = 50
) -> dict[str, list[float]]:
    """Times every candidate in turn, round after round, so that a noisy moment hits all of them alike.

    Args:
        candidates: name -> what to run once.
        seconds: stop after about this long (three rounds at least).
        most: rounds at most.

    Returns:
        name -> seconds of each round, the first (warm-up) round left out.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    for round_ in range(most + 1):
        for name, run in candidates.items():
            begin = time.perf_counter()
            run()
            if round_:
                times[name].append(time.perf_counter() - begin)
        if round_ >= 3 and time.perf_counter() - started > seconds:
            break
    return times


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def machine() -> dict[str, Any]:
    """Processor, threads, versions and date."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    versions = {}
    for package in ("anyfp4", "torch", "llama-cpp-python", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": model,
        "processors": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [list(map(str, header)), *[list(map(str, row)) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)


def report(name: str, rows: Sequence[Mapping[str, object]], **more: object) -> None:
    """The JSON line."""
    print(json.dumps({"benchmark": name, **machine(), **more, "rows": rows}))
