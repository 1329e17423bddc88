"""vLLM in the test's own process, on the CPU, one model at a time.

One process, because starting vLLM's others takes longer than all that is tested here; test_compiled.py starts them too.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import real_checkpoint

#: read by vLLM when it is imported, or when an engine starts
VLLM_VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
LIMITS = {"max_model_len": 1100, "max_num_seqs": 16, "disable_log_stats": True}

Start = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VLLM_VARIABLES.items():
            patch.setenv(name, value)
        yield


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """``vllm.LLM``, eager unless told otherwise; gone afterwards."""
    from vllm import LLM

    llm = LLM(str(model), **{"enforce_eager": True, **LIMITS, **options})
    try:
        yield llm
    finally:
        del llm
        gc.collect()


def layers_of(llm: Any) -> dict[str, Any]:
    """The model's modules that anyfp4 serves, by name."""

    def find(model: Any) -> dict[str, Any]:
        return {name: m for name, m in model.named_modules() if hasattr(m, "_anyfp4_linear")}

    (found,) = llm.apply_model(find)
    return dict(found)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a real checkpoint, by its name."""
    folders: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in folders:
            folders[name] = real_checkpoint(name, tmp_path_factory)
        return folders[name]

    return find


@pytest.fixture
def anyfp4_variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """For setting ANYFP4_* in one test; none is set before."""
    for name in list(os.environ):
        if name.startswith("ANYFP4_") and name != "ANYFP4_TEST_CHECKPOINTS":
            monkeypatch.delenv(name)
    return monkeypatch
