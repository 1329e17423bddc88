"""The CPU backend's threads in a worker process of vLLM.

vLLM gives each worker a list of processors and tells OpenMP to pin one thread to each of them, the main thread to the
first. Threads started by the main thread inherit that, so without care all of anyfp4's would share one processor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch

from anyfp4.backends.base import Backend
from anyfp4.backends.cpu import CpuBackend
from anyfp4.envs import Environment


def bound_processors(environ: Mapping[str, str]) -> frozenset[int] | None:
    """The processors that vLLM gave this worker, as the variables of whichever OpenMP it found say; None if it did not.

    Args:
        environ: the process's variables.
    """
    for name, pattern in (
        ("KMP_AFFINITY", r"granularity=fine,explicit,proclist=\[([0-9,]+)\]"),
        ("GOMP_CPU_AFFINITY", r"([0-9 ]+)"),
        ("OMP_PLACES", r"\{([0-9,]+)\}"),
    ):
        match = re.fullmatch(pattern, environ.get(name, ""))
        if match and (found := re.findall(r"\d+", match[1])):
            return frozenset(int(number) for number in found)
    return None


def ready(backend: Backend, environment: Environment) -> None:
    """Starts the CPU backend's threads on all of this worker's processors; no bit depends on it."""
    cpus = bound_processors(os.environ)
    if cpus is None or not isinstance(backend, CpuBackend) or not hasattr(os, "sched_setaffinity"):
        return
    backend.set_threads(environment.num_threads or len(cpus))
    own = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cpus)
    except OSError:  # not this process's to use: then where it is
        return
    try:
        start(backend)
    finally:
        os.sched_setaffinity(0, own)


def start(backend: CpuBackend) -> None:
    """Gives the threads something to do, which makes the backend start them."""
    backend.log_softmax(torch.zeros(64, 1024, dtype=torch.float32, device="cpu"))  # vLLM changes the default of both
