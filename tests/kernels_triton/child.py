"""Compiling kernels in a process of its own, since the test process interprets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache


@cache
def run_compiler(module: str, backend: str, arch: str) -> dict[str, dict[str, int]]:
    """What a module of this folder prints of its kernels, compiled for one target; once for each."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels_triton.{module}", backend, arch],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found
