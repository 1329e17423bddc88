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


def _compiles(item: pytest.Item) -> bool:
    return item.path.name.startswith("test_compile")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need kernels compiled come last."""
    items.sort(key=_compiles)


@pytest.fixture(scope="session", autouse=True)
def compilers(request: pytest.FixtureRequest) -> None:
    """Kernels compile in other processes while the first tests of this folder run."""
    if any(map(_compiles, request.session.items)):
        child.start_all()
