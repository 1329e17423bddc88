"""Configuration files, and compressed-tensors' configuration."""

from __future__ import annotations

from anyfp4.errors import CheckpointConfigError, CheckpointFileError, UnsupportedError
from tests.checkpoint.damage.case import CT, DENSE, GROUP, MO, MODEL, Case, both, config, nothing, overwrite
from tests.checkpoint.small import UP, ct_fp8_block_group, ct_fp8_group, put, small, with_kv_scales


def fp8_blocks(part: str, **changes: object) -> Case:
    """Block-wise FP8 with other arguments."""
    group = ct_fp8_block_group()
    group[part] = group[part] | changes
    (field, value), *_ = changes.items()
    pair = part == "input_activations" and field in ("strategy", "dynamic")
    what = r"\(strategy, dynamic\) of strategy block" if pair else field
    where = rf"group_0.{part}[. ]{what}"
    name = f"block FP8, {part} {field} {value}"
    return Case(name, config("config_groups", "group_0", value=group), UnsupportedError, where)


CASES = (
    # configuration files
    Case(
        "no config.json",
        nothing,
        CheckpointFileError,
        r"config.json: does not exist",
        after=lambda f: (f / "config.json").unlink(),
    ),
    Case(
        "config.json is not JSON",
        nothing,
        CheckpointConfigError,
        r"config.json: is not valid JSON",
        after=overwrite("config.json", b"{'a': 1}"),
    ),
    Case(
        "config.json is a list",
        nothing,
        CheckpointConfigError,
        r"config.json: its content must be an object, not list",
        after=overwrite("config.json", b"[]"),
    ),
    Case(
        "config.json is not UTF-8",
        nothing,
        CheckpointConfigError,
        r"config.json: is not valid JSON",
        after=overwrite("config.json", b'{"a": "\xff\xfe"}'),
    ),
    Case(
        "quantization_config is a string",
        lambda s: setattr(s, "quantization_config", "NVFP4"),
        CheckpointConfigError,
        r"quantization_config must be an object",
    ),
    Case(
        "no quant_method",
        lambda s: s.quantization_config.pop("quant_method"),
        CheckpointConfigError,
        r"no quant_method",
    ),
    Case(
        "gptq",
        config("quant_method", value="gptq"),
        UnsupportedError,
        r"config.json: quant_method 'gptq' is not supported; supported: compressed-tensors, modelopt",
    ),
    Case(
        "bitsandbytes", config("quant_method", value="bitsandbytes"), UnsupportedError, r"quant_method 'bitsandbytes'"
    ),
    Case(
        "compressed-tensors beside hf_quant_config.json",
        lambda s: setattr(s, "quantization_config", small(CT).quantization_config),
        CheckpointConfigError,
        r"config.json: .*hf_quant_config.json",
        MO,
    ),
    # compressed-tensors
    Case(
        "group size 32",
        config(*GROUP, "weights", "group_size", value=32),
        UnsupportedError,
        r"config.json: config_groups.group_0.weights.group_size 32 is not supported; supported: 16",
    ),
    Case(
        "input group size 32",
        config(*GROUP, "input_activations", "group_size", value=32),
        UnsupportedError,
        r"input_activations.group_size 32",
    ),
    Case("integers", config(*GROUP, "weights", "type", value="int"), UnsupportedError, r"group_0.weights.type 'int'"),
    Case(
        "asymmetric",
        config(*GROUP, "weights", "symmetric", value=False),
        UnsupportedError,
        r"group_0.weights.symmetric",
    ),
    Case(
        "actorder",
        config(*GROUP, "weights", "actorder", value="group"),
        UnsupportedError,
        r"group_0.weights.actorder 'group'",
    ),
    Case(
        "W4A8",
        config(*GROUP, "input_activations", "num_bits", value=8),
        UnsupportedError,
        r"input_activations.num_bits 8",
    ),
    Case(
        "dynamic global scale",
        config(*GROUP, "input_activations", "dynamic", value=True),
        UnsupportedError,
        r"input_activations.dynamic True",
    ),
    Case(
        "output activations",
        config(*GROUP, "output_activations", value={"num_bits": 8}),
        UnsupportedError,
        r"group_0.output_activations",
    ),
    Case(
        "other format",
        config(*GROUP, "format", value="mxfp4-pack-quantized"),
        UnsupportedError,
        r"group_0.format 'mxfp4-pack-quantized'",
    ),
    Case(
        "global format",
        config("format", value="pack-quantized"),
        UnsupportedError,
        r"quantization_config format 'pack-quantized'",
    ),
    Case(
        "FP8 in groups",
        config("config_groups", "group_0", value=ct_fp8_group("group")),
        UnsupportedError,
        r"weights.strategy 'group' is not supported; supported: tensor, channel, block",
    ),
    Case(
        "block FP8 without a block",
        config("config_groups", "group_0", value=ct_fp8_group("block")),
        UnsupportedError,
        r"weights.block_structure None is not supported; supported: \[128, 128\]",
    ),
    Case(
        "a block without block FP8",
        config(
            "config_groups",
            "group_0",
            value=ct_fp8_block_group() | {"weights": {**ct_fp8_group()["weights"], "block_structure": [128, 128]}},
        ),
        UnsupportedError,
        r"weights.block_structure \[128, 128\] is not supported; supported: None",
    ),
    fp8_blocks("weights", block_structure=[64, 128]),
    fp8_blocks("weights", block_structure="128x64"),
    fp8_blocks("weights", num_bits=4),
    fp8_blocks("weights", symmetric=False),
    fp8_blocks("weights", type="int"),
    fp8_blocks("weights", dynamic=True),
    fp8_blocks("input_activations", group_size=64),
    fp8_blocks("input_activations", strategy="token"),
    fp8_blocks("input_activations", dynamic=False),
    fp8_blocks("input_activations", num_bits=4),
    Case(
        "naive integers",
        config(
            "config_groups",
            "group_0",
            value={**ct_fp8_block_group(weight_only=True), "weights": {**ct_fp8_group()["weights"], "type": "int"}},
        ),
        UnsupportedError,
        r"weights.type 'int' is not supported",
    ),
    Case(
        "class target",
        config(*GROUP, "targets", value=["LlamaAttention"]),
        UnsupportedError,
        r"group_0.targets 'LlamaAttention'",
    ),
    Case(
        "transform_config",
        config("transform_config", value={"config_groups": {"u": {}}}),
        UnsupportedError,
        r"config.json: transform_config .* is not supported",
    ),
    Case(
        "sparsity_config",
        config("sparsity_config", value={"format": "sparse-24-bitmask"}),
        UnsupportedError,
        r"sparsity_config format 'sparse-24-bitmask'",
    ),
    Case(
        "not compressed",
        config("quantization_status", value="frozen"),
        UnsupportedError,
        r"quantization_status 'frozen'",
    ),
    Case(
        "int8 KV cache",
        config("kv_cache_scheme", value={"num_bits": 8, "type": "int", "symmetric": True}),
        UnsupportedError,
        r"kv_cache_scheme.type 'int'",
    ),
    Case(
        "KV scale of each head",
        both(with_kv_scales, config("kv_cache_scheme", "strategy", value="attn_head")),
        UnsupportedError,
        r"kv_cache_scheme.strategy 'attn_head'",
    ),
    Case(
        "dynamic KV cache",
        both(with_kv_scales, config("kv_cache_scheme", "dynamic", value=True)),
        UnsupportedError,
        r"kv_cache_scheme.dynamic True",
    ),
    Case("unknown field", config("experts_scheme", value="x"), UnsupportedError, r"unknown field 'experts_scheme'"),
    Case(
        "unknown argument",
        config(*GROUP, "weights", "rotation", value="hadamard"),
        UnsupportedError,
        r"group_0.weights: unknown field 'rotation'",
    ),
    Case("no groups", config("config_groups", value={}), CheckpointConfigError, r"config.json: config_groups is empty"),
    Case(
        "bad regex in ignore",
        config("ignore", value=["re:.*(self_attn"]),
        CheckpointConfigError,
        r"config.json: ignore: 're:.\*\(self_attn' is not a valid regular",
    ),
    Case(
        "bad regex in targets",
        config(*GROUP, "targets", value=["re:[a"]),
        CheckpointConfigError,
        r"group_0.targets: 're:\[a'",
    ),
    Case(
        "ignore is a string",
        config("ignore", value="lm_head"),
        CheckpointConfigError,
        r"ignore must be a list of names",
    ),
    Case(
        "ignore holds null",
        config("ignore", value=[None]),
        CheckpointConfigError,
        r"ignore must hold non-empty names, not None",
    ),
    Case(
        "ignored but quantized",
        config("ignore", value=["re:.*up_proj"]),
        CheckpointConfigError,
        rf"{MODEL}: {UP}.\w+: belongs to a quantized module .*leaves {UP} unquantized",
    ),
    Case(
        "dense but not ignored",
        lambda s: put(s, UP, {"weight": DENSE}),
        CheckpointConfigError,
        rf"{MODEL}: {UP}.weight: is dense .*configuration says NVFP4",
    ),
    Case(
        "not a target but quantized",
        config(*GROUP, "targets", value=["re:.*self_attn"]),
        CheckpointConfigError,
        r"mlp.*belongs to a quantized module",
    ),
)
