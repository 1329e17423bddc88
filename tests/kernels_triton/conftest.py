"""Triton kernels are tested on the GPU if there is one, and otherwise in Triton's interpreter, on CPU tensors.

The interpreter is chosen by a variable that must be set before Triton is first imported. On a machine without a GPU
nothing else of the suite runs Triton kernels, so it is set here for the whole process; tests that compile kernels do so
in a process of their own (``compiling.py``).
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


def _why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
        return "no GPU, and Triton was imported before its interpreter could be chosen"
    return None


REASON = _why_not()
collect_ignore_glob = [] if REASON is None else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU in the interpreter."""
    return torch.device("cuda" if ON_GPU else "cpu")
