"""Whether anyfp4 serves the NVFP4 linear layers of a vLLM process, or vLLM's own kernels do, and why."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from anyfp4.backends import registry
from anyfp4.envs import Environment

#: compute capability, times ten, from which NVIDIA's GPUs have FP4 units
BLACKWELL = 100
KERNEL = "AnyFP4NvFp4LinearKernel"


def device() -> torch.device:
    """The kind of device that vLLM's layers lie on."""
    return torch.device(_platform().device_type)


def why_not_here(environment: Environment) -> str | None:
    """Why anyfp4 leaves this machine's NVFP4 linear layers to vLLM's own kernels; None if it serves them.

    Raises:
        BackendError: ``ANYFP4_BACKEND`` names a backend that cannot run here.
    """
    platform = _platform()
    if environment.vllm == "off":
        return "ANYFP4_VLLM=off"
    if KERNEL in importlib.import_module("vllm.envs").VLLM_DISABLED_KERNELS:
        return f"VLLM_DISABLED_KERNELS names {KERNEL}"
    if not (platform.is_cpu() or platform.is_cuda() or platform.is_rocm()):
        return f"anyfp4 runs on CPUs and on NVIDIA's and AMD's GPUs, not on {platform.device_name}"
    capability = platform.get_device_capability() if platform.is_cuda() else None
    if environment.vllm == "auto" and capability is not None and capability.to_int() >= BLACKWELL:
        return "this GPU has FP4 units, which vLLM's own kernels use (ANYFP4_VLLM=always takes over)"
    backend = registry.select(device(), numerics=environment.numerics, requested=environment.backend)
    asked_for = environment.vllm == "always" or environment.backend != "auto" or platform.is_cpu()
    if backend is registry.REFERENCE and not asked_for:
        return "anyfp4 has only readable torch code for this GPU, which is slow (ANYFP4_VLLM=always runs it)"
    return None


def why_not_asked(weight_only: bool) -> str | None:
    """The user's own choice of a linear backend for these layers, as a reason to leave them to vLLM; or None.

    A backend that has no NVFP4 kernel for this platform is no choice: vLLM itself then goes on as with ``auto``.
    """
    config = importlib.import_module("vllm.config").get_current_vllm_config_or_none()
    if config is None:
        return None
    quantization = "nvfp4_w4a16" if weight_only else "nvfp4_w4a4"
    overrides = getattr(config.kernel_config, "linear_backend_per_quant", None) or {}
    asked = overrides.get(quantization) or config.kernel_config.linear_backend
    linear = importlib.import_module("vllm.model_executor.kernels.linear")
    there = linear._POSSIBLE_NVFP4_KERNELS.get(_platform()._enum, [])
    if asked == "auto" or not linear._LINEAR_BACKEND_KERNEL_MAP.get(asked, set()) & set(there):
        return None
    return f"vLLM was told to use the linear backend {asked!r}"


def _platform() -> Any:
    return importlib.import_module("vllm.platforms").current_platform
