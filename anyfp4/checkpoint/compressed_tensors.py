"""The compressed-tensors layout, as llm-compressor writes it: names, configuration, both directions.

Only E4M3 block scales of 16 (``nvfp4-pack-quantized``) and FP8 are read: ``float-quantized``, or ``naive-quantized``
where activations stay unquantized, which stores the same. A group names its modules by ``targets``: full names,
``re:`` patterns (matched from the start of the name), or ``Linear``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from anyfp4.checkpoint import emit
from anyfp4.checkpoint.layout import Suffixes
from anyfp4.checkpoint.scheme import (
    Group,
    KVCache,
    ModuleNames,
    QuantizationConfig,
    Scheme,
    expect_dict,
    expect_names,
    reject_unknown,
    unsupported,
)
from anyfp4.errors import CheckpointConfigError
from anyfp4.formats.nvfp4 import BLOCK_SIZE
from anyfp4.formats.weights import FP8_BLOCK_SIZE, LinearWeight

NAMES = Suffixes(
    packed="weight_packed",
    block_scale="weight_scale",
    weight_global="weight_global_scale",
    input_global="input_global_scale",
    divisors=True,
    pre_quant_scale=None,
    scalar_shape=(1,),
    column_row_scales=True,
    spread_block_scales=False,
)
#: the release of compressed-tensors whose conventions are written
VERSION = "0.19.0"
_NVFP4 = "nvfp4-pack-quantized"
_FP8 = "float-quantized"
_FP8_WEIGHT_ONLY = "naive-quantized"
_MIXED = "mixed-precision"
_FORMATS = f"{_NVFP4}, {_FP8}, {_FP8_WEIGHT_ONLY}, and {_MIXED} groups of these"
_BLOCK = [FP8_BLOCK_SIZE, FP8_BLOCK_SIZE]
_BLOCK_TEXT = f"{FP8_BLOCK_SIZE}x{FP8_BLOCK_SIZE}"  # as the library once spelt it
_FIELDS = (
    *("config_groups", "format", "ignore", "kv_cache_scheme", "quant_method", "quantization_status", "version"),
    *("global_compression_ratio", "run_compressed", "sparsity_config", "transform_config"),
)
_GROUP_FIELDS = ("targets", "weights", "input_activations", "output_activations", "format")
_ARGS_FIELDS = (
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
)


def kv_scale_names(attention: str) -> tuple[str, str]:
    """The tensors that hold the scales of an attention module's K and V cache."""
    return f"{attention}.k_scale", f"{attention}.v_scale"


def tensors(module: str, weight: LinearWeight) -> dict[str, Tensor]:
    """The tensors that a checkpoint stores for a module, by full name.

    The layout stores divisors, and about one multiplier in six is not the rounded reciprocal of any: that one comes
    back one unit in the last place off. ``storable_global_scale`` gives a multiplier that comes back exactly.

    Args:
        module: such as ``model.layers.0.mlp.up_proj``.
        weight: one projection.

    Raises:
        InvalidArgumentError: the weight is several shards fused into one.
        UnsupportedError: the weight has a ``pre_quant_scale``.
    """
    return emit.tensors(NAMES, module, weight)


def storable_global_scale(global_scale: Tensor) -> Tensor:
    """The nearest multiplier that the layout's divisors hold exactly: quantize with this one.

    Args:
        global_scale: float32, positive, any shape.

    Returns:
        float32, the same shape, at most one unit in the last place away.
    """
    return emit.reciprocal(emit.divisor(global_scale))


def quantization_config(schemes: Mapping[str, Scheme], kv_cache: KVCache = "none") -> dict[str, Any]:
    """``quantization_config`` of config.json.

    Args:
        schemes: every linear module's scheme, dense ones and ``lm_head`` included.
        kv_cache: ``fp8`` if the checkpoint stores k_scale and v_scale.

    Raises:
        InvalidArgumentError: no module is quantized.
    """
    groups, dense = emit.by_scheme(schemes)
    formats = {_format_of(scheme) for scheme in groups}
    return {
        "config_groups": {
            f"group_{i}": _group(scheme, ["Linear"] if len(groups) == 1 else modules)
            for i, (scheme, modules) in enumerate(groups.items())
        },
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "global_compression_ratio": None,
        "ignore": dense,
        "kv_cache_scheme": _args(8, "tensor", dynamic=False) if kv_cache == "fp8" else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def parse(table: dict[str, Any], file: Path) -> QuantizationConfig:
    """Reads the ``quantization_config`` of config.json.

    Args:
        table: its content.
        file: config.json, for messages.

    Raises:
        CheckpointConfigError: it is malformed or contradicts itself.
        UnsupportedError: it asks for something that is not implemented; the message names it.
    """
    reject_unknown(table, _FIELDS, file, "quantization_config")
    status = table.get("quantization_status")
    if status not in (None, "compressed"):
        raise unsupported(file, "quantization_status", status, "compressed")
    if table.get("transform_config"):
        raise unsupported(file, "transform_config", table["transform_config"], "none")
    sparsity = expect_dict(table.get("sparsity_config") or {}, file, "sparsity_config")
    if sparsity.get("format", "dense") != "dense":
        raise unsupported(file, "sparsity_config format", sparsity["format"], "dense")
    algorithm = table.get("format")
    if algorithm not in (_NVFP4, _FP8, _FP8_WEIGHT_ONLY, _MIXED):
        raise unsupported(file, "quantization_config format", algorithm, _FORMATS)
    groups = expect_dict(table.get("config_groups"), file, "config_groups")
    if not groups:
        raise CheckpointConfigError("config_groups is empty", file=file)
    version = table.get("version")
    return QuantizationConfig(
        layout="compressed-tensors",
        producer=f"compressed-tensors {version}" if version else "compressed-tensors",
        algorithm=algorithm,
        kv_cache=_parse_kv_cache(table.get("kv_cache_scheme"), file),
        groups=tuple(_parse_group(name, group, algorithm, file) for name, group in groups.items()),
        ignore=_parse_names(expect_names(table.get("ignore"), file, "ignore"), file, "ignore"),
    )


def _parse_group(name: str, group: object, default_format: str, file: Path) -> Group:
    where = f"config_groups.{name}"
    table = expect_dict(group, file, where)
    reject_unknown(table, _GROUP_FIELDS, file, where)
    if table.get("output_activations"):
        raise unsupported(file, f"{where}.output_activations", table["output_activations"], "none")
    stored = table.get("format") or default_format
    if stored == _NVFP4:
        scheme = _parse_nvfp4(table, where, file)
    elif stored in (_FP8, _FP8_WEIGHT_ONLY):
        scheme = _parse_fp8(table, where, file)
    else:
        raise unsupported(file, f"{where}.format", stored, f"{_NVFP4}, {_FP8}, {_FP8_WEIGHT_ONLY}")
    targets = expect_names(table.get("targets"), file, f"{where}.targets")
    for target in targets:
        if target != "Linear" and target.isidentifier() and target[0].isupper():
            raise unsupported(file, f"{where}.targets", target, "Linear, module names, re: patterns")
    names = _parse_names([t for t in targets if t != "Linear"], file, f"{where}.targets")
    return Group(scheme, names, every_linear="Linear" in targets)


def _parse_nvfp4(group: dict[str, Any], where: str, file: Path) -> Scheme:
    weights = _parse_args(group.get("weights"), f"{where}.weights", file)
    _require(weights, f"{where}.weights", file, num_bits=4, group_size=BLOCK_SIZE, strategy="tensor_group")
    _require(weights, f"{where}.weights", file, dynamic=False)
    if group.get("input_activations") is None:
        return Scheme("nvfp4", weight_only=True)
    inputs = _parse_args(group["input_activations"], f"{where}.input_activations", file)
    _require(inputs, f"{where}.input_activations", file, num_bits=4, group_size=BLOCK_SIZE)
    _require(inputs, f"{where}.input_activations", file, strategy="tensor_group", dynamic="local")
    return Scheme("nvfp4")


def _parse_fp8(group: dict[str, Any], where: str, file: Path) -> Scheme:
    weights = _parse_args(group.get("weights"), f"{where}.weights", file)
    _require(weights, f"{where}.weights", file, num_bits=8, dynamic=False)
    strategy = weights.get("strategy")
    if strategy not in ("tensor", "channel", "block"):
        raise unsupported(file, f"{where}.weights.strategy", strategy, "tensor, channel, block")
    per_row, block_wise = strategy == "channel", strategy == "block"
    structure = weights.get("block_structure")
    if structure not in ((_BLOCK, _BLOCK_TEXT) if block_wise else (None,)):
        raise unsupported(file, f"{where}.weights.block_structure", structure, str(_BLOCK if block_wise else None))
    if group.get("input_activations") is None:
        return Scheme("fp8", weight_only=True, weight_per_row=per_row, block_wise=block_wise)
    inputs = _parse_args(group["input_activations"], f"{where}.input_activations", file)
    _require(inputs, f"{where}.input_activations", file, num_bits=8)
    how = (inputs.get("strategy"), inputs.get("dynamic", False))
    known = (("group", True),) if block_wise else (("tensor", False), ("token", True))
    if how not in known:
        supported = ", ".join(map(str, known))
        raise unsupported(file, f"{where}.input_activations (strategy, dynamic) of strategy {strategy}", how, supported)
    if block_wise:
        _require(inputs, f"{where}.input_activations", file, group_size=FP8_BLOCK_SIZE)
    return Scheme("fp8", input_dynamic=how[1], weight_per_row=per_row, block_wise=block_wise)


def _parse_args(value: object, where: str, file: Path) -> dict[str, Any]:
    if value is None:
        raise unsupported(file, where, None, "quantized weights")
    args = expect_dict(value, file, where)
    reject_unknown(args, _ARGS_FIELDS, file, where)
    _require(args, where, file, type="float")
    if not args.get("symmetric", True):
        raise unsupported(file, f"{where}.symmetric", args["symmetric"], "true")
    # the order in which calibration visited the columns leaves no trace in the file; a reordering by group does
    if args.get("actorder") not in (None, False, "weight", "static"):
        raise unsupported(file, f"{where}.actorder", args["actorder"], "null, weight, static")
    return args


def _require(args: dict[str, Any], where: str, file: Path, **wanted: object) -> None:
    for name, want in wanted.items():
        value = args.get(name, False if name == "dynamic" else None)
        if value != want or isinstance(value, bool) != isinstance(want, bool):
            raise unsupported(file, f"{where}.{name}", value, repr(want))


def _parse_kv_cache(value: object, file: Path) -> KVCache:
    if value is None:
        return "none"
    args = _parse_args(value, "kv_cache_scheme", file)
    _require(args, "kv_cache_scheme", file, num_bits=8, strategy="tensor", dynamic=False)
    return "fp8"


def _parse_names(names: Sequence[str], file: Path, what: str) -> ModuleNames:
    patterns = []
    for name in names:
        if name.startswith("re:"):
            try:
                patterns.append(re.compile(name.removeprefix("re:")))
            except re.error as error:
                raise CheckpointConfigError(
                    f"{what}: {name!r} is not a valid regular expression: {error}", file=file
                ) from error
    return ModuleNames(frozenset(n for n in names if not n.startswith("re:")), tuple(patterns))


def _format_of(scheme: Scheme) -> str:
    if scheme.kind == "nvfp4":
        return _NVFP4
    return _FP8_WEIGHT_ONLY if scheme.weight_only else _FP8


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    inputs: dict[str, Any] | None
    if scheme.kind == "nvfp4":
        weights = _args(4, "tensor_group", dynamic=False)
        inputs = None if scheme.weight_only else _args(4, "tensor_group", dynamic="local")
    else:
        strategy = "block" if scheme.block_wise else "channel" if scheme.weight_per_row else "tensor"
        weights = _args(8, strategy, dynamic=False)
        of_inputs = "group" if scheme.block_wise else "token" if scheme.input_dynamic else "tensor"
        inputs = None if scheme.weight_only else _args(8, of_inputs, dynamic=scheme.input_dynamic)
    return {
        "format": _format_of(scheme),
        "input_activations": inputs,
        "output_activations": None,
        "targets": targets,
        "weights": weights,
    }


def _args(num_bits: int, strategy: str, *, dynamic: bool | str) -> dict[str, Any]:
    grouped = strategy == "tensor_group"
    return {
        "actorder": None,
        "block_structure": list(_BLOCK) if strategy == "block" else None,
        "dynamic": dynamic,
        "group_size": BLOCK_SIZE if grouped else FP8_BLOCK_SIZE if strategy == "group" else None,
        "num_bits": num_bits,
        "observer": None if dynamic is True else "memoryless_minmax" if dynamic is False else "static_minmax",
        "observer_kwargs": {},
        "scale_dtype": "torch.float8_e4m3fn" if grouped else None,
        "strategy": strategy,
        "symmetric": True,
        "type": "float",
        "zp_dtype": None,
    }
