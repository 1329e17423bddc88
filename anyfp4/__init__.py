"""anyfp4: NVFP4 language models on hardware that has no FP4 units.

The names below load on first use, so that ``import anyfp4`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyfp4.async_llm import AsyncLLM
    from anyfp4.engine.config import EngineConfig, SamplingParams
    from anyfp4.errors import AnyFP4Error
    from anyfp4.formats import NVFP4Tensor, dequantize, quantize
    from anyfp4.functional import linear
    from anyfp4.llm import LLM, CompletionOutput, RequestOutput

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AnyFP4Error",
    "AsyncLLM",
    "CompletionOutput",
    "EngineConfig",
    "NVFP4Tensor",
    "RequestOutput",
    "SamplingParams",
    "dequantize",
    "linear",
    "quantize",
]

_HOME = {
    "LLM": "anyfp4.llm",
    "AnyFP4Error": "anyfp4.errors",
    "AsyncLLM": "anyfp4.async_llm",
    "CompletionOutput": "anyfp4.llm",
    "EngineConfig": "anyfp4.engine.config",
    "NVFP4Tensor": "anyfp4.formats",
    "RequestOutput": "anyfp4.llm",
    "SamplingParams": "anyfp4.engine.config",
    "dequantize": "anyfp4.formats",
    "linear": "anyfp4.functional",
    "quantize": "anyfp4.formats",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'anyfp4' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
