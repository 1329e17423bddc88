"""The layout of NVIDIA's ModelOpt: names, configuration, both directions.

The configuration stands in hf_quant_config.json, in config.json's ``quantization_config``, or in both, in two forms of
the same content. Excludes are module names or globs, and cover what lies below the module they name.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
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
from anyfp4.errors import CheckpointConfigError, UnsupportedError
from anyfp4.formats.nvfp4 import BLOCK_SIZE
from anyfp4.formats.weights import LinearWeight

NAMES = Suffixes(
    packed="weight",
    block_scale="weight_scale",
    weight_global="weight_scale_2",
    input_global="input_scale",
    divisors=False,
    pre_quant_scale="pre_quant_scale",
    scalar_shape=(),
    column_row_scales=False,
    spread_block_scales=True,
)
_SCHEMES = {
    "NVFP4": Scheme("nvfp4"),
    "NVFP4_AWQ": Scheme("nvfp4", pre_quant_scale_allowed=True),
    "W4A16_NVFP4": Scheme("nvfp4", weight_only=True),
    "FP8": Scheme("fp8"),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme("fp8", input_dynamic=True, weight_per_row=True),
    # block-wise, weight-only; ModelOpt itself writes this name in lower case
    "FP8_PB_WO": Scheme("fp8", weight_only=True, block_wise=True),
}
_ALGORITHMS = {scheme: name for name, scheme in _SCHEMES.items()}
_MIXED = "MIXED_PRECISION"
_SUPPORTED = ", ".join((*_SCHEMES, _MIXED))
_FIELDS = (
    *("quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules", "quantized_layers"),
    *("has_zero_point", "pre_quant_scale"),
)
#: the same in config.json, where group sizes and KV cache are spelt as compressed-tensors spells them
_CONFIG_FIELDS = (
    *("quant_algo", "kv_cache_scheme", "group_size", "ignore", "quantized_layers", "has_zero_point"),
    *("pre_quant_scale", "config_groups", "producer", "quant_method"),
)


def kv_scale_names(attention: str) -> tuple[str, str]:
    """The tensors that hold the scales of an attention module's K and V cache."""
    return f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale"


def tensors(module: str, weight: LinearWeight) -> dict[str, Tensor]:
    """The tensors that a checkpoint stores for a module, by full name; reading them gives the same bits.

    Args:
        module: such as ``model.layers.0.mlp.up_proj``.
        weight: one projection.

    Raises:
        InvalidArgumentError: the weight is several shards fused into one.
    """
    return emit.tensors(NAMES, module, weight)


def hf_quant_config(schemes: Mapping[str, Scheme], kv_cache: KVCache = "none") -> dict[str, Any]:
    """The content of hf_quant_config.json.

    Args:
        schemes: every linear module's scheme, dense ones, ``lm_head`` and the embedding included.
        kv_cache: ``fp8`` if the checkpoint stores k_scale and v_scale.

    Raises:
        InvalidArgumentError: no module is quantized.
        UnsupportedError: ModelOpt has no name for a scheme.
    """
    groups, dense = emit.by_scheme(_merge_awq(schemes))
    kv_cache_algorithm = "FP8" if kv_cache == "fp8" else None
    if len(groups) == 1:
        (scheme,) = groups
        quantization = _algorithm(scheme) | {"exclude_modules": dense}
    else:
        layers = {m: _algorithm(scheme) for scheme, modules in groups.items() for m in modules}
        quantization = {"quant_algo": _MIXED, "quantized_layers": dict(sorted(layers.items()))}
    first = {"quant_algo": quantization.pop("quant_algo"), "kv_cache_quant_algo": kv_cache_algorithm}
    return {"producer": _producer(), "quantization": first | quantization}


def quantization_config(schemes: Mapping[str, Scheme], kv_cache: KVCache = "none") -> dict[str, Any]:
    """``quantization_config`` of config.json: the same content as ``hf_quant_config`` in the other form."""
    details = hf_quant_config(schemes, kv_cache)["quantization"]
    groups, _ = emit.by_scheme(_merge_awq(schemes))
    config: dict[str, Any] = {}
    if details["quant_algo"] in ("NVFP4", "W4A16_NVFP4", "FP8", _MIXED):  # the others get no groups
        config["config_groups"] = {
            f"group_{i}": _config_group(scheme) | {"targets": ["Linear"] if len(groups) == 1 else modules}
            for i, (scheme, modules) in enumerate(groups.items())
        }
    if "quantized_layers" in details:
        config["quantized_layers"] = details["quantized_layers"]
    config |= {"ignore": details.get("exclude_modules", []), "quant_algo": details["quant_algo"]}
    if kv_cache == "fp8":
        config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return config | {"producer": _producer(), "quant_method": "modelopt"}


def parse(table: dict[str, Any], file: Path) -> QuantizationConfig:
    """Reads config.json's ``quantization_config``.

    Args:
        table: its content.
        file: config.json, for messages.

    Raises:
        CheckpointConfigError: it is malformed or contradicts itself.
        UnsupportedError: it asks for something that is not implemented; the message names it.
    """
    if "quantization" in table:  # the form of hf_quant_config.json inside config.json
        return parse_hf_quant_config(table, file)
    reject_unknown(table, _CONFIG_FIELDS, file, "quantization_config")
    kv_cache = table.get("kv_cache_scheme")
    if isinstance(kv_cache, dict) and {**kv_cache, "dynamic": bool(kv_cache.get("dynamic"))} == {
        "dynamic": False,
        "num_bits": 8,
        "type": "float",
    }:
        kv_cache = "FP8"
    groups = expect_dict(table.get("config_groups") or {}, file, "config_groups")
    sizes = [table.get("group_size")] + [
        args.get("group_size")
        for group in groups.values()
        if isinstance(group, dict)
        for args in group.values()
        if isinstance(args, dict)
    ]
    size = next((s for s in sizes if s not in (None, BLOCK_SIZE)), None)
    return _parse({**table, "group_size": size}, table.get("ignore"), kv_cache, table.get("producer"), file, "ignore")


def parse_hf_quant_config(content: dict[str, Any], file: Path) -> QuantizationConfig:
    """Reads hf_quant_config.json.

    Args:
        content: its content.
        file: itself, for messages.

    Raises:
        CheckpointConfigError: it is malformed or contradicts itself.
        UnsupportedError: it asks for something that is not implemented; the message names it.
    """
    table = expect_dict(content.get("quantization"), file, "quantization")
    reject_unknown(table, _FIELDS, file, "quantization")
    return _parse(
        table,
        table.get("exclude_modules"),
        table.get("kv_cache_quant_algo"),
        content.get("producer"),
        file,
        "exclude_modules",
    )


def _parse(
    table: dict[str, Any], excludes: object, kv_cache: object, producer: object, file: Path, what: str
) -> QuantizationConfig:
    algorithm = table.get("quant_algo")
    if not isinstance(algorithm, str) or not algorithm:
        raise CheckpointConfigError(f"quant_algo is missing; supported: {_SUPPORTED}", file=file)
    algorithm = algorithm.upper()
    if kv_cache is not None and kv_cache != "FP8":
        raise unsupported(file, "KV cache quantization", kv_cache, "FP8, none")
    groups: tuple[Group, ...]
    if algorithm == _MIXED:
        groups = _parse_layers(table.get("quantized_layers"), file)
    else:
        if table.get("quantized_layers"):
            raise CheckpointConfigError(f"quantized_layers needs quant_algo {_MIXED}, not {algorithm}", file=file)
        groups = (Group(_parse_algorithm(table, "", file), every_linear=True),)
    who = producer if isinstance(producer, dict) else {}
    return QuantizationConfig(
        layout="modelopt",
        producer=" ".join(str(who[key]) for key in ("name", "version") if who.get(key)),
        algorithm=algorithm,
        kv_cache="fp8" if kv_cache == "FP8" else "none",
        groups=groups,
        ignore=_parse_excludes(expect_names(excludes, file, what), file, what),
    )


def _parse_layers(value: object, file: Path) -> tuple[Group, ...]:
    layers = expect_dict(value, file, "quantized_layers")
    if not layers:
        raise CheckpointConfigError(f"quantized_layers is empty, but quant_algo is {_MIXED}", file=file)
    modules: dict[Scheme, list[str]] = {}
    for name, layer in sorted(layers.items()):
        where = f"quantized_layers.{name}"
        table = expect_dict(layer, file, where)
        reject_unknown(table, ("quant_algo", "group_size", "has_zero_point", "pre_quant_scale"), file, where)
        modules.setdefault(_parse_algorithm(table, f"{where}.", file), []).append(name)
    return tuple(
        Group(scheme, ModuleNames(frozenset(names), tuple(_below(name) for name in names)))
        for scheme, names in modules.items()
    )


def _parse_algorithm(table: dict[str, Any], where: str, file: Path) -> Scheme:
    algorithm = str(table.get("quant_algo")).upper()
    if algorithm not in _SCHEMES:
        raise unsupported(file, f"{where}quant_algo", table.get("quant_algo"), _SUPPORTED)
    scheme = _SCHEMES[algorithm]
    size = table.get("group_size")
    if scheme.kind == "nvfp4" and size not in (None, BLOCK_SIZE):
        raise unsupported(file, f"{where}group_size", size, str(BLOCK_SIZE))
    if table.get("has_zero_point"):
        raise unsupported(file, f"{where}has_zero_point", True, "false")
    return scheme


def _parse_excludes(names: Sequence[str], file: Path, what: str) -> ModuleNames:
    exact, patterns = [], []
    for name in sorted(set(names)):
        if name.startswith("re:"):
            raise CheckpointConfigError(
                f"{what}: {name!r}: re: patterns belong to compressed-tensors; use a glob", file=file
            )
        if "[" in name and not re.search(r"\[!?[^]]+\]", name):
            raise CheckpointConfigError(f"{what}: {name!r} is not a valid glob: '[' is never closed", file=file)
        if any(c in name for c in "*?["):
            patterns.append(re.compile(fnmatch.translate(name)))
        else:
            exact.append(name)
            patterns.append(_below(name))
    return ModuleNames(frozenset(exact), tuple(patterns))


def _below(module: str) -> re.Pattern[str]:
    return re.compile(re.escape(module) + r"\.")


def _merge_awq(schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """NVFP4_AWQ means "may have a pre_quant_scale": if one W4A4 module has one, all are called so."""
    awq, plain = _SCHEMES["NVFP4_AWQ"], _SCHEMES["NVFP4"]
    merge = awq in schemes.values()
    return {module: awq if merge and scheme == plain else scheme for module, scheme in schemes.items()}


def _algorithm(scheme: Scheme) -> dict[str, Any]:
    if scheme not in _ALGORITHMS:
        raise UnsupportedError(f"the modelopt layout has no name for {scheme}; it has {_SUPPORTED}")
    named: dict[str, Any] = {"quant_algo": _ALGORITHMS[scheme]}
    if scheme.kind == "nvfp4":
        named["group_size"] = BLOCK_SIZE
    if scheme.pre_quant_scale_allowed:
        named |= {"has_zero_point": False, "pre_quant_scale": True}
    return named


def _config_group(scheme: Scheme) -> dict[str, Any]:
    if scheme.block_wise:
        return {"quant_algo": _ALGORITHMS[scheme]}
    args: dict[str, Any] = {"dynamic": False, "num_bits": 4 if scheme.kind == "nvfp4" else 8, "type": "float"}
    if scheme.kind == "nvfp4":
        args["group_size"] = BLOCK_SIZE
    weights = args | ({"strategy": "channel"} if scheme.weight_per_row else {})
    return {"weights": weights} if scheme.weight_only else {"input_activations": dict(args), "weights": weights}


def _producer() -> dict[str, str]:
    # readers of hf_quant_config.json take the name for the layout's and refuse any other; the version says who wrote it
    try:
        version = metadata.version("anyfp4")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        version = "unknown"
    return {"name": "modelopt", "version": f"anyfp4 {version}"}
