"""Whether a checkpoint's tensors are those that its configuration promises, as far as headers tell."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from anyfp4.checkpoint import compressed_tensors, layout, modelopt
from anyfp4.checkpoint.layout import FLOATS, QUANTIZATION_SUFFIXES, TensorInfo
from anyfp4.checkpoint.scheme import QuantizationConfig
from anyfp4.errors import CheckpointConfigError, TensorError

#: dense matrices that no configuration needs to exclude, because they are not linear layers
_EMBEDDING = re.compile(r"(.*\.)?(\w*embed\w*|wte|wpe)")
_ROUTER = re.compile(r"(.*\.)?(router|gate)")  # of a mixture of experts
_PACKED_DTYPES = (torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
_KV_SUFFIXES = frozenset({"k_scale", "v_scale", "q_scale"})


def check_tensors(
    quantization: QuantizationConfig, infos: Mapping[str, TensorInfo]
) -> dict[str, dict[str, TensorInfo]]:
    """Checks that the tensors are those that the configuration promises.

    Args:
        quantization: the configuration.
        infos: every tensor's header.

    Returns:
        Each module's tensors by suffix, KV scales left out.

    Raises:
        CheckpointConfigError: a module is quantized although excluded, or dense although not.
        TensorError: a quantized module has not exactly the tensors of its scheme, or KV scales are missing or extra.
    """
    modules = by_module(quantization, infos)
    for module, tensors in modules.items():
        check_module(quantization, module, tensors)
    check_kv_scales(quantization, infos)
    return modules


def by_module(quantization: QuantizationConfig, infos: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Each module's tensors by suffix; KV scales are left out."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in infos.items():
        module, _, suffix = name.rpartition(".")
        if suffix not in _KV_SUFFIXES or quantization.layout == "none":
            modules.setdefault(module, {})[suffix] = info
    return modules


def is_embedding(module: str) -> bool:
    """Whether the name is that of an embedding: its matrix is a table, not a linear layer."""
    return _EMBEDDING.fullmatch(module) is not None


def is_router(module: str) -> bool:
    """Whether the name is that of the router of a mixture of experts, which no producer quantizes."""
    return _ROUTER.fullmatch(module) is not None


def check_module(quantization: QuantizationConfig, module: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Checks one module's tensors (by suffix, KV scales left out) against the configuration.

    Raises:
        CheckpointConfigError: the module is quantized although excluded, or dense although not.
        TensorError: it is quantized and has not exactly the tensors of its scheme.
    """
    scheme = quantization.scheme_of(module)
    marks = sorted(QUANTIZATION_SUFFIXES & tensors.keys())
    weight = tensors.get("weight")
    if not marks and weight is not None and weight.dtype in _PACKED_DTYPES:
        marks = ["weight"]
    if scheme.kind != "dense":
        is_matrix = weight is not None and len(weight.shape) == 2
        if marks or (is_matrix and not (is_embedding(module) or is_router(module))):
            layout.check_module(names_of(quantization), scheme, module, tensors)
    elif marks:
        info = tensors[marks[0]]
        why = (
            "config.json has no quantization_config"
            if quantization.layout == "none"
            else f"the configuration leaves {module} unquantized"
        )
        raise CheckpointConfigError(
            f"belongs to a quantized module ({layout.describe(info.dtype, info.shape)}), but {why}",
            file=info.file,
            tensor=f"{module}.{marks[0]}",
        )


def check_kv_scales(quantization: QuantizationConfig, infos: Mapping[str, TensorInfo]) -> list[str]:
    """Checks that the KV cache's scales are there where the configuration promises them, and only there.

    Returns:
        The attention modules that have scales, sorted; none where the cache is not quantized, or where ModelOpt
        stored none because it fixed all of them to 1.

    Raises:
        TensorError: a scale is missing, unexpected, or not one floating-point number.
    """
    if quantization.layout == "none":
        return []
    found = {name for name in infos if name.rpartition(".")[2] in _KV_SUFFIXES}
    attentions = set()
    if quantization.kv_cache == "fp8":
        attentions = {name.rpartition(".k_proj.")[0] for name in infos if ".k_proj." in name}
    expected = {name: module for module in attentions for name in kv_scale_names(quantization, module)}
    for name in sorted(found - expected.keys()):
        why = "does not quantize the KV cache" if quantization.kv_cache == "none" else "has no such KV scale"
        raise TensorError(f"is not expected: the configuration {why}", file=infos[name].file, tensor=name)
    if quantization.layout == "modelopt" and not found:
        return []
    for name in sorted(expected.keys() - found):
        file = next(info.file for other, info in infos.items() if other.startswith(f"{expected[name]}."))
        raise TensorError("is missing, but the KV cache is FP8", file=file, tensor=name)
    for name in sorted(found):
        info = infos[name]
        if info.dtype not in FLOATS or info.shape not in ((), (1,)):
            got = layout.describe(info.dtype, info.shape)
            raise TensorError(f"must be one floating-point number, got {got}", file=info.file, tensor=name)
    return sorted(attentions)


def names_of(quantization: QuantizationConfig) -> layout.Suffixes:
    """The tensor names of a configuration's layout."""
    return modelopt.NAMES if quantization.layout == "modelopt" else compressed_tensors.NAMES


def kv_scale_names(quantization: QuantizationConfig, attention: str) -> tuple[str, str]:
    """The tensors that hold the scales of an attention module's K and V cache."""
    if quantization.layout == "modelopt":
        return modelopt.kv_scale_names(attention)
    return compressed_tensors.kv_scale_names(attention)
