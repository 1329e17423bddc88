"""Triton kernels are tested on the GPU if there is one, and otherwise in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.kernels_triton import child

collect_ignore_glob = [] if importlib.util.find_spec("triton") is not None else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU in the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def compilers(request: pytest.FixtureRequest) -> None:
    """Kernels compile in other processes while the first tests of this folder run."""
    if any(item.path.name.startswith("test_compile") for item in request.session.items):
        child.start_all()
