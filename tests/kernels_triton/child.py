"""Compiling kernels in processes of their own, since the test process interprets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

MODULES = ("compiling", "compiling_ops")
TARGETS = (("cuda", "80"), ("cuda", "90"), ("cuda", "100"), ("hip", "gfx942"), ("hip", "gfx950"))
Found = dict[str, dict[str, int]]


def run_compiler(module: str, backend: str, arch: str) -> Found:
    """What a module of this folder prints of its kernels, compiled for one target; once for each."""
    return _started(module, backend, arch).result()


def start_all() -> None:
    """Begins to compile everything, so that it goes on while other tests run."""
    for backend, arch in TARGETS:
        for module in MODULES:
            _started(module, backend, arch)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


@cache
def _started(module: str, backend: str, arch: str) -> Future[Found]:
    return _pool().submit(_compile, module, backend, arch)


def _compile(module: str, backend: str, arch: str) -> Found:
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
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found
