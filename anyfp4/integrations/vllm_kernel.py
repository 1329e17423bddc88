"""anyfp4's linear kernel in vLLM's terms: from a module's loaded tensors to a prepared layer, and its calls.

vLLM's quantization methods merge the global scales of a module's shards (q/k/v, gate/up) into their maximum before a
kernel sees them, which mis-scales all shards but one. So the plugin notes them before that (:func:`note`), and the
prepared layer has one alpha per shard.
"""

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

import anyfp4
from anyfp4 import envs
from anyfp4.backends import registry
from anyfp4.errors import TensorError, UnsupportedError
from anyfp4.formats.nvfp4 import BLOCK_SIZE, NVFP4Tensor
from anyfp4.formats.weights import LinearWeight, NVFP4Weight
from anyfp4.integrations import vllm_policy, vllm_threads
from anyfp4.integrations.vllm_op import HandledLinear, call

logger = logging.getLogger("vllm.anyfp4")  # below vLLM's own, so that its handlers and levels apply
_NOTE = "_anyfp4_scales"
_HELD = "_anyfp4_linear"


@dataclass(frozen=True)
class Names:
    """What a quantization method of vLLM calls the global scales, one for each shard, before it merges them.

    Attributes:
        divisor: whether their reciprocals multiply.
    """

    weight_scale: str
    input_scale: str
    divisor: bool


@dataclass(frozen=True)
class Scales:
    """Global scales as multipliers: ``weight`` float32 [S], ``input`` float32 [S], or None if weight-only."""

    weight: Tensor
    input: Tensor | None


def created(layer: Module, names: Names, weight_only: bool) -> None:
    """Checks a module whose tensors were just made, and marks its global scales as not loaded.

    Raises:
        UnsupportedError: this process's part of K is not whole blocks.
    """
    k = int(layer.input_size_per_partition)  # type: ignore[arg-type]
    if k % BLOCK_SIZE:
        raise UnsupportedError(
            f"{_name(layer)}: a tensor-parallel part of {k} columns is not a multiple of {BLOCK_SIZE}, NVFP4's block; "
            "use fewer tensor-parallel processes"
        )
    for attribute in _attributes(names, weight_only):
        getattr(layer, attribute).data.fill_(torch.nan)


def note(layer: Module, names: Names, weight_only: bool) -> None:
    """Keeps a loaded module's global scales of each shard, and sets them alike, so that merging them is no loss.

    Raises:
        TensorError: one was not in the checkpoint, or is not positive and finite.
    """
    found = []
    for attribute in _attributes(names, weight_only):
        stored = getattr(layer, attribute)
        scale = stored.data.to(torch.float32)
        if _dummy():
            scale = scale.abs().clamp(min=1e-6)
        scale = torch.ones_like(scale) / scale if names.divisor else scale.clone()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            missing = "was not in the checkpoint" if stored.isnan().any() else "is not positive and finite"
            raise TensorError(
                f"a shard's global scale {missing}: {stored.tolist()}", tensor=f"{_name(layer)}.{attribute}"
            )
        found.append(scale)
        stored.data.fill_(stored.data.max())
    setattr(layer, _NOTE, Scales(found[0], None if weight_only else found[1]))


def check_taken(layer: Module) -> None:
    """Raises UnsupportedError if a module was noted but vLLM went past its kernel."""
    if layer.__dict__.pop(_NOTE, None) is not None:
        raise UnsupportedError(
            f"{_name(layer)}: vLLM was given weights that another process has prepared; anyfp4 prepares its own, so "
            "load the checkpoint itself, or set ANYFP4_VLLM=off"
        )


def prepare(layer: Module, scales: Scales, environment: envs.Environment) -> None:
    """Brings a module's weight into anyfp4's form, and lets go of vLLM's.

    Raises:
        BackendError: the backend that was asked for cannot run it.
        TensorError: a block scale is NaN or negative.
        UnsupportedError: the module was prepared before, on a GPU, where CUDA graphs hold the old weight's address.
    """
    module: Any = layer
    weight, block_scale = module.weight.data, module.weight_scale.data
    if not _dummy() and bool(((block_scale.view(torch.uint8) & 0x7F) == 0x7F).any() | (block_scale.float() < 0).any()):
        raise TensorError("a block scale is NaN or negative", tensor=f"{_name(layer)}.weight_scale")
    held: HandledLinear | None = getattr(layer, _HELD, None)
    device = weight.device
    if held is not None and device.type != "cpu":
        raise UnsupportedError(f"{_name(layer)}: weights cannot be loaded anew on a GPU; ANYFP4_VLLM=off can")
    tensor = NVFP4Tensor(weight, block_scale, scales.weight, tuple(module.logical_widths))
    weights: list[LinearWeight] = [NVFP4Weight(tensor, scales.input)]
    del tensor, weight, block_scale
    options = {"numerics": environment.numerics, "backend": environment.backend}
    if held is None:
        held = HandledLinear(_drain(weights), device, **options)
        setattr(layer, _HELD, held)
    else:
        held.replace(_drain(weights), **options)
    module.weight = Parameter(held.handle, requires_grad=False)
    module.weight_scale = Parameter(torch.empty(0, dtype=torch.float8_e4m3fn, device=device), requires_grad=False)


def apply(layer: Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] to [..., N]; in code that is being compiled, as an op."""
    held: HandledLinear = getattr(layer, _HELD)
    if torch.compiler.is_compiling():
        weight: Any = layer.weight
        return call(x, weight, bias, held.out_features)
    return held(x, bias)


@functools.cache
def kernel_class(base: type) -> type:
    """The kernel as a subclass of vLLM's ``NvFp4LinearKernel``."""

    class AnyFP4NvFp4LinearKernel(base):  # type: ignore[misc]
        """NVFP4 linear layers by anyfp4: W4A4, or weight-only if the module has no input scale."""

        def __init__(self, config: Any, weight_only: bool | None = None) -> None:
            super().__init__(config)
            self.weight_only = weight_only
            self.environment = envs.read()
            announce(self.environment)

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            del compute_capability
            reason = vllm_policy.why_not_here(envs.read())
            return reason is None, reason

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            del config
            return True, None

        def process_weights_after_loading(self, layer: Module) -> None:
            scales = layer.__dict__.pop(_NOTE, None) or _merged(layer, self.weight_only)
            prepare(layer, scales, self.environment)

        def apply_weights(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return apply(layer, x, bias)

    assert AnyFP4NvFp4LinearKernel.__name__ == vllm_policy.KERNEL
    return AnyFP4NvFp4LinearKernel


@functools.cache
def announce(environment: envs.Environment) -> None:
    """Says once in vLLM's log what runs, and readies the threads."""
    device = vllm_policy.device()
    backend = registry.select(device, numerics=environment.numerics, requested=environment.backend)
    if device.type == "cpu":
        vllm_threads.ready(backend, environment)
    logger.info(
        "anyfp4 %s serves NVFP4 linear layers: backend %s (%s), numerics %s",
        anyfp4.__version__,
        backend.name,
        backend.description,
        environment.numerics,
    )


def _merged(layer: Module, weight_only: bool | None) -> Scales:
    """The scales that vLLM gives every kernel: for a quantization method that the plugin does not know."""
    module: Any = layer
    shards = len(module.logical_widths)
    weight = module.weight_global_scale.data.to(torch.float32).reshape(1).repeat(shards)
    given = getattr(layer, "input_global_scale", None)
    if weight_only or given is None:
        return Scales(weight, None)
    return Scales(weight, given.data.to(torch.float32).reshape(1).repeat(shards))


def _attributes(names: Names, weight_only: bool) -> tuple[str, ...]:
    return (names.weight_scale,) if weight_only else (names.weight_scale, names.input_scale)


def _drain(weights: list[LinearWeight]) -> Any:
    while weights:
        yield weights.pop()


def _dummy() -> bool:
    """Whether vLLM fills weights with random numbers instead of loading them."""
    config = importlib.import_module("vllm.config").get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def _name(layer: Module) -> str:
    return str(getattr(layer, "prefix", "") or type(layer).__name__)
