"""Triton kernels are tested on the GPU if there is one, and otherwise in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.kernels_triton import child

collect_ignore_glob = [] if importlib.util.find_spec("triton") is not None else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU in the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    """Takes out of the interpreter what makes up more than half of its time and changes no result.

    It puts its own functions into ``triton.language`` anew for each call of a jit function inside a kernel, where once
    for each launch is enough; and it does integer arithmetic twice, to find overflows, which kernels may want.
    """
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    patch: Callable[[Any], Any] = interpreter._patch_lang
    patched: set[str] = set()  # since the launch began

    def once(fn: Any) -> Any:
        languages = {m.__name__ for m in fn.__globals__.values() if isinstance(m, ModuleType)}
        languages &= {"triton.language", "triton.language.core"}
        if languages <= patched:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        if not patched:
            restore = scope.restore

            def end() -> None:
                patched.clear()
                restore()

            scope.restore = end
        patched.update(languages)
        return scope

    interpreter._patch_lang = once
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _compiles(item: pytest.Item) -> bool:
    return item.path.name.startswith("test_compile")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need kernels compiled come last."""
    items.sort(key=_compiles)


@pytest.fixture(scope="session", autouse=True)
def compilers(request: pytest.FixtureRequest) -> None:
    """Kernels compile in other processes while the first tests run; where tests run side by side, when asked for."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    if alone and any(map(_compiles, request.session.items)):
        child.start_all()
