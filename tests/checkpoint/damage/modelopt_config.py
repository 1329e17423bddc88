"""ModelOpt's configuration."""

from __future__ import annotations

from anyfp4.errors import CheckpointConfigError, TensorError, UnsupportedError
from tests.checkpoint.damage.case import DENSE, MO, Case, config, mixed, modelopt, replace
from tests.checkpoint.small import ATTENTION, LAYER, UP, put

CASES = (
    # ModelOpt
    Case(
        "unknown quant_algo",
        modelopt("quant_algo", "NVFP5"),
        UnsupportedError,
        r"config.json: quant_algo 'NVFP5' is not supported; supported: NVFP4,",
        MO,
    ),
    Case("W4A8", modelopt("quant_algo", "W4A8_NVFP4_FP8"), UnsupportedError, r"quant_algo 'W4A8_NVFP4_FP8'", MO),
    Case("FP8_PB_REAL", modelopt("quant_algo", "fp8_pb_real"), UnsupportedError, r"quant_algo 'fp8_pb_real'", MO),
    Case("SVDQuant", modelopt("quant_algo", "NVFP4_SVD"), UnsupportedError, r"quant_algo 'NVFP4_SVD'", MO),
    Case("no quant_algo", modelopt("quant_algo", None), CheckpointConfigError, r"quant_algo is missing", MO),
    Case(
        "group size 32",
        modelopt("group_size", 32),
        UnsupportedError,
        r"group_size 32 is not supported; supported: 16",
        MO,
    ),
    Case(
        "group size 32 in a group",
        config("config_groups", value={"group_0": {"weights": {"group_size": 32}, "targets": ["Linear"]}}),
        UnsupportedError,
        r"group_size 32",
        MO,
    ),
    Case("zero points", modelopt("has_zero_point", True), UnsupportedError, r"has_zero_point True", MO),
    Case(
        "NVFP4 KV cache",
        modelopt("kv_cache_quant_algo", "NVFP4"),
        UnsupportedError,
        r"KV cache quantization 'NVFP4' is not supported; supported: FP8, none",
        MO,
    ),
    Case("unknown field, modelopt", modelopt("lora_rank", 32), UnsupportedError, r"unknown field 'lora_rank'", MO),
    Case(
        "bad glob",
        modelopt("exclude_modules", ["model.layers.[0.self_attn*"]),
        CheckpointConfigError,
        r"ignore: 'model.layers.\[0.self_attn\*' is not a valid glob",
        MO,
    ),
    Case(
        "regex as glob",
        modelopt("exclude_modules", ["re:.*self_attn"]),
        CheckpointConfigError,
        r"re: patterns belong to compressed-tensors",
        MO,
    ),
    Case(
        "algorithms differ",
        config("quant_algo", value="NVFP4_AWQ"),
        CheckpointConfigError,
        r"config.json: contradicts hf_quant_config.json about quant_algo: 'NVFP4_AWQ', not 'NVFP4'",
        MO,
    ),
    Case(
        "excludes differ",
        config("ignore", value=["lm_head"]),
        CheckpointConfigError,
        r"contradicts hf_quant_config.json about the excluded modules",
        MO,
    ),
    Case(
        "KV caches differ",
        lambda s: s.hf_quant_config["quantization"].__setitem__("kv_cache_quant_algo", "FP8"),
        CheckpointConfigError,
        r"contradicts hf_quant_config.json about the KV cache: 'none', not 'fp8'",
        MO,
    ),
    Case(
        "excluded but quantized",
        modelopt("exclude_modules", [f"{LAYER}.self_attn*"]),
        CheckpointConfigError,
        rf"{ATTENTION}.*belongs to a quantized module",
        MO,
    ),
    Case(
        "dense but not excluded",
        lambda s: put(s, UP, {"weight": DENSE}),
        CheckpointConfigError,
        rf"{UP}.weight: is dense",
        MO,
    ),
    Case(
        "dense weight beside scales",
        replace(f"{UP}.weight", DENSE),
        TensorError,
        rf"{UP}.weight: must be uint8 .*, got bfloat16",
        MO,
    ),
    Case(
        "mixed without layers",
        modelopt("quant_algo", "MIXED_PRECISION"),
        CheckpointConfigError,
        r"quantized_layers must be an object",
        MO,
    ),
    Case(
        "mixed with an unknown layer",
        mixed({UP: {"quant_algo": "MXFP8"}}),
        UnsupportedError,
        rf"quantized_layers.{UP}.quant_algo 'MXFP8'",
        MO,
    ),
    Case(
        "mixed leaves a quantized layer out",
        mixed({UP: {"quant_algo": "NVFP4"}}),
        CheckpointConfigError,
        r"belongs to a quantized module",
        MO,
    ),
    Case(
        "layers without mixed",
        modelopt("quantized_layers", {UP: {"quant_algo": "NVFP4"}}),
        CheckpointConfigError,
        r"quantized_layers needs quant_algo MIXED_PRECISION",
        MO,
    ),
)
