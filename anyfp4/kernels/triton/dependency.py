# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Kernels that follow one another overlap, on NVIDIA from Hopper on (programmatic dependent launch).

A kernel launched so may start while the one before it still runs: its launch costs nothing then, and a kernel behind it
that first copies a weight (``kernels/hopper``) has begun before its input exists. It must wait before it reads what
others wrote, or writes: in every program, also in one that has nothing to do, for a kernel whose programs have all
ended is taken to have waited.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from anyfp4.device import architecture


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """First in a kernel that is launched with :func:`overlapping`: lets the next one start, and waits for inputs."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def overlapping(x: Tensor) -> dict[str, bool]:
    """What a launch on the device of ``x`` is told so that the kernel may start early; nothing where it cannot."""
    return _options(x.device) if x.device.type == "cuda" else {}


@cache
def _options(device: torch.device) -> dict[str, bool]:
    arch = architecture(device)
    known = hasattr(cuda, "gdc_wait") and hasattr(cuda, "gdc_launch_dependents")
    if not known or not arch.startswith("sm_") or int(arch[3:]) < 90:
        return {}
    return {"OVERLAP": True, "launch_pdl": True}
