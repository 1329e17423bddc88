"""A vLLM of the few names that the plugin touches, in place of the real one."""

from __future__ import annotations

import enum
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

LINEAR = "vllm.model_executor.kernels.linear"
QUANTIZATION = "vllm.model_executor.layers.quantization"
COMPRESSED_TENSORS = f"{QUANTIZATION}.compressed_tensors.schemes.compressed_tensors_w4a4_nvfp4"


class PlatformEnum(enum.Enum):
    CPU, CUDA, ROCM, XPU = range(4)


class Platform:
    """A machine: ``kind`` cpu, cuda, rocm or xpu, and a compute capability times ten."""

    def __init__(self, kind: str, capability: int | None = None) -> None:
        self.kind, self.capability = kind, capability
        self.device_name = kind
        self.device_type = "cuda" if kind == "rocm" else kind
        self._enum = PlatformEnum[kind.upper()]

    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    def is_rocm(self) -> bool:
        return self.kind == "rocm"

    def get_device_capability(self) -> Any:
        return None if self.capability is None else SimpleNamespace(to_int=lambda: self.capability)


class OwnKernel:
    """What vLLM would choose."""


class BaseKernel:
    def __init__(self, config: Any) -> None:
        assert self.can_implement(config)[0]  # type: ignore[attr-defined]
        assert self.is_supported()[0]  # type: ignore[attr-defined]


def choose(use_a16: bool = False) -> OwnKernel:
    del use_a16
    return OwnKernel()


def method() -> type:
    """A quantization method that has its kernel from ``choose``."""

    class Method:
        def create_weights(self, layer: Any) -> None: ...

        def process_weights_after_loading(self, layer: Any) -> None: ...

    return Method


def install(patch: pytest.MonkeyPatch, platform: Platform, **modelopt: type) -> dict[str, ModuleType]:
    """Puts the modules where imports find them; ``modelopt`` are that module's classes, those of 0.32 by default."""
    kernels = {PlatformEnum.CUDA: [OwnKernel], PlatformEnum.ROCM: [OwnKernel]}
    kernel_config = SimpleNamespace(linear_backend="auto", linear_backend_per_quant=None)
    config = SimpleNamespace(kernel_config=kernel_config, load_config=SimpleNamespace(load_format="auto"))
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.envs": {"VLLM_DISABLED_KERNELS": []},
        "vllm.config": {"get_current_vllm_config_or_none": lambda: config},
        "vllm.platforms": {"PlatformEnum": PlatformEnum, "current_platform": platform},
        LINEAR: {
            "NvFp4LinearKernel": BaseKernel,
            "NvFp4LinearLayerConfig": SimpleNamespace,
            "init_nvfp4_linear_kernel": choose,
            "_POSSIBLE_NVFP4_KERNELS": kernels,
            "_LINEAR_BACKEND_KERNEL_MAP": {"own": {OwnKernel}},
        },
        COMPRESSED_TENSORS: {"CompressedTensorsW4A4Fp4": method(), "init_nvfp4_linear_kernel": choose},
        f"{QUANTIZATION}.modelopt": {
            **(modelopt or {"ModelOptLinearMethod": method()}),
            "init_nvfp4_linear_kernel": choose,
        },
    }
    modules = {}
    for name, attributes in contents.items():
        module = modules[name] = ModuleType(name)
        vars(module).update(attributes)
        patch.setitem(sys.modules, name, module)
    return modules
