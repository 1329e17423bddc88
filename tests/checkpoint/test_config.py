"""What the configurations say: schemes by module, both files, patterns; compared with compressed-tensors' matching."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from anyfp4.checkpoint import compressed_tensors, modelopt
from anyfp4.checkpoint.config import Scheme, read_config, read_quantization
from anyfp4.checkpoint.scheme import DENSE, QuantizationConfig
from anyfp4.errors import CheckpointConfigError, InvalidArgumentError, UnsupportedError
from tests.checkpoint.small import (
    KV_SCHEME,
    MODEL_CONFIG,
    ct_config,
    ct_fp8_block_group,
    ct_fp8_group,
    ct_group,
    modelopt_configs,
)
from tests.checkpoints import FULL, REFUSED_VARIANT, VARIANTS, real_checkpoint

W4A4 = Scheme("nvfp4")
WEIGHT_ONLY = Scheme("nvfp4", weight_only=True)
AWQ = Scheme("nvfp4", pre_quant_scale_allowed=True)
FP8 = Scheme("fp8")
FP8_ROWS = Scheme("fp8", input_dynamic=True, weight_per_row=True)
FP8_BLOCKS = Scheme("fp8", input_dynamic=True, block_wise=True)
FP8_BLOCKS_WEIGHT_ONLY = Scheme("fp8", weight_only=True, block_wise=True)
MODULES = [
    "lm_head",
    "model.embed_tokens",
    *(
        f"model.layers.{i}.{name}"
        for i in (0, 1, 10)
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.experts.3.up_proj")
    ),
]


def read(folder: Path, table: object, hf_quant_config: object = None) -> QuantizationConfig:
    if hf_quant_config is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(hf_quant_config))
    return read_quantization(folder, {**MODEL_CONFIG, "quantization_config": table})


def test_no_quantization(tmp_path: Path) -> None:
    quantization = read(tmp_path, None)
    assert quantization.layout == "none"
    assert quantization == read_quantization(tmp_path, MODEL_CONFIG) == read(tmp_path, {})
    assert all(quantization.scheme_of(module) == DENSE for module in MODULES)


@pytest.mark.parametrize(
    ("group", "scheme"),
    [
        (ct_group(), W4A4),
        (ct_group(weight_only=True), WEIGHT_ONLY),
        (ct_fp8_group(), FP8),
        (ct_fp8_group("channel", dynamic=True), FP8_ROWS),
        (ct_fp8_group("channel"), Scheme("fp8", weight_per_row=True)),
        (ct_fp8_group("tensor", dynamic=True), Scheme("fp8", input_dynamic=True)),
        (ct_fp8_block_group(), FP8_BLOCKS),
        (ct_fp8_block_group(weight_only=True), FP8_BLOCKS_WEIGHT_ONLY),
        (ct_fp8_block_group() | {"input_activations": None}, FP8_BLOCKS_WEIGHT_ONLY),
        (ct_fp8_group() | {"input_activations": None}, Scheme("fp8", weight_only=True)),
        (
            ct_fp8_group("channel") | {"input_activations": None, "format": "naive-quantized"},
            Scheme("fp8", weight_only=True, weight_per_row=True),
        ),
    ],
)
def test_compressed_tensors_schemes(group: dict[str, Any], scheme: Scheme, tmp_path: Path) -> None:
    quantization = read(tmp_path, ct_config(group))
    assert quantization.layout == "compressed-tensors"
    assert quantization.producer == "compressed-tensors 0.19.0"
    assert quantization.algorithm == group["format"]
    assert quantization.kv_cache == "none"
    assert quantization.scheme_of("model.layers.3.mlp.up_proj") == scheme
    assert quantization.scheme_of("lm_head") == DENSE


def test_the_preset_of_the_library_is_read(tmp_path: Path) -> None:
    """``FP8_BLOCK`` as compressed-tensors itself writes it, and its older spelling of the block."""
    library = pytest.importorskip("compressed_tensors.quantization")
    scheme = library.preset_name_to_scheme("FP8_BLOCK", ["Linear"])
    table = ct_config(json.loads(scheme.model_dump_json()) | {"format": "float-quantized"})
    assert read(tmp_path, table).scheme_of("a") == FP8_BLOCKS
    table["config_groups"]["group_0"]["weights"]["block_structure"] = "128x128"
    assert library.QuantizationArgs(**table["config_groups"]["group_0"]["weights"]).block_structure == [128, 128]
    assert read(tmp_path, table).scheme_of("a") == FP8_BLOCKS


def test_labels() -> None:
    assert FP8_BLOCKS.label == "FP8 block-wise dynamic" and FP8_BLOCKS_WEIGHT_ONLY.label == "FP8 block-wise weight-only"
    assert FP8.label == "FP8 static" and Scheme("fp8", weight_only=True).label == "FP8 weight-only"


def test_compressed_tensors_format_of_a_group_wins(tmp_path: Path) -> None:
    table = ct_config(ct_group(), ct_fp8_group(targets=["re:.*self_attn"]))
    assert table["format"] == "mixed-precision"
    assert read(tmp_path, table).scheme_of("model.layers.0.self_attn.q_proj") == FP8
    one = ct_config(ct_group())
    del one["config_groups"]["group_0"]["format"]  # older files have only the global one
    assert read(tmp_path, one).scheme_of("model.layers.0.mlp.up_proj") == W4A4


def test_compressed_tensors_kv_cache(tmp_path: Path) -> None:
    assert read(tmp_path, {**ct_config(), "kv_cache_scheme": KV_SCHEME}).kv_cache == "fp8"


def test_calibration_order_leaves_no_trace(tmp_path: Path) -> None:
    table = ct_config()
    table["config_groups"]["group_0"]["weights"]["actorder"] = "static"
    assert read(tmp_path, table).scheme_of("a") == W4A4


def test_dense_sparsity_config_is_none(tmp_path: Path) -> None:
    table = ct_config() | {"sparsity_config": {"format": "dense", "global_sparsity": 0.1}}
    assert read(tmp_path, table).scheme_of("a") == W4A4


@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        (["Linear"], ["lm_head"]),
        (["Linear"], ["re:.*self_attn.*", "lm_head"]),
        (["Linear"], ["re:self_attn", "model.layers.1.mlp.gate_proj", "model.layers.10.mlp"]),
        (["re:.*layers\\.1\\..*"], []),
        (["re:model.layers.1"], ["re:.*down_proj$"]),
        (["model.layers.0.mlp.down_proj", "re:.*q_proj"], ["model.layers.10.self_attn.q_proj"]),
        (["re:.*experts.*"], None),
    ],
)
def test_matching_is_that_of_compressed_tensors(targets: list[str], ignore: list[str] | None, tmp_path: Path) -> None:
    match = pytest.importorskip("compressed_tensors.utils.match")
    quantization = read(tmp_path, ct_config(ct_group(targets=targets)) | {"ignore": ignore})
    linear = torch.nn.Linear(1, 1)
    for module in MODULES:
        expected = match.is_match(module, linear, targets, ignore or [])
        assert (quantization.scheme_of(module) == W4A4) == expected, module


def test_precedence_is_that_of_compressed_tensors(tmp_path: Path) -> None:
    """A full name beats a pattern, a pattern beats the class, in whatever order the groups stand."""
    match = pytest.importorskip("compressed_tensors.utils.match")
    by_target = {
        "Linear": (ct_group(), W4A4),
        "re:.*self_attn.*": (ct_fp8_group(), FP8),
        "model.layers.0.self_attn.q_proj": (ct_fp8_group("channel", True), FP8_ROWS),
    }
    for order in (list(by_target), list(by_target)[::-1]):
        groups = [by_target[target][0] | {"targets": [target]} for target in order]
        quantization = read(tmp_path, ct_config(*groups))
        for module in MODULES[1:]:
            first = match.match_targets(module, torch.nn.Linear(1, 1), order)[0]
            assert quantization.scheme_of(module) == by_target[first][1], module


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json", "both"])
@pytest.mark.parametrize(
    ("algorithm", "scheme"),
    [
        ("NVFP4", W4A4),
        ("nvfp4", W4A4),
        ("W4A16_NVFP4", WEIGHT_ONLY),
        ("NVFP4_AWQ", AWQ),
        ("FP8", FP8),
        ("FP8_PER_CHANNEL_PER_TOKEN", FP8_ROWS),
        ("FP8_PB_WO", FP8_BLOCKS_WEIGHT_ONLY),
        ("fp8_pb_wo", FP8_BLOCKS_WEIGHT_ONLY),
    ],
)
def test_modelopt_schemes(where: str, algorithm: str, scheme: Scheme, tmp_path: Path) -> None:
    config, hf_quant_config = modelopt_configs(algorithm)
    quantization = read(
        tmp_path,
        None if where == "hf_quant_config.json" else config,
        None if where == "config.json" else hf_quant_config,
    )
    assert quantization.layout == "modelopt"
    assert quantization.producer == "modelopt 0.47.0"
    assert quantization.algorithm == algorithm.upper()
    assert quantization.scheme_of("model.layers.0.mlp.up_proj") == scheme
    assert quantization.scheme_of("lm_head") == quantization.scheme_of("model.embed_tokens") == DENSE


def test_modelopt_globs(tmp_path: Path) -> None:
    """As ModelOpt writes them: a name covers what lies below it, ``*`` crosses dots."""
    excludes = ["lm_head", "model.layers.1.self_attn*", "model.layers.0.mlp", "*.experts.?.up_proj"]
    quantization = read(tmp_path, *modelopt_configs(excludes=excludes))
    dense = {module for module in MODULES if quantization.scheme_of(module) == DENSE}
    assert dense == {
        "lm_head",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.experts.3.up_proj",
        "model.layers.1.mlp.experts.3.up_proj",
        "model.layers.10.mlp.experts.3.up_proj",
    }


def test_modelopt_mixed_precision(tmp_path: Path) -> None:
    """ModelOpt lists each quantized layer and no excludes; FP8 entries carry no group size."""
    layers = {
        "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
        "model.layers.0.mlp.gate_proj": {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.0.mlp.down_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "model.layers.0.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.1.mlp.gate_proj": {"quant_algo": "fp8_pb_wo"},
        "model.layers.0.self_attn.o_proj": {
            "quant_algo": "NVFP4_AWQ",
            "group_size": 16,
            "has_zero_point": False,
            "pre_quant_scale": True,
        },
    }
    config, hf_quant_config = modelopt_configs("MIXED_PRECISION", [])
    config["quantized_layers"] = layers
    details = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": layers}
    quantization = read(tmp_path, config, hf_quant_config | {"quantization": details})
    assert quantization.algorithm == "MIXED_PRECISION"
    schemes = {module: quantization.scheme_of(module) for module in MODULES}
    assert {module: scheme for module, scheme in schemes.items() if scheme != DENSE} == {
        "model.layers.0.self_attn.q_proj": FP8,
        "model.layers.0.mlp.gate_proj": W4A4,
        "model.layers.0.mlp.down_proj": WEIGHT_ONLY,
        "model.layers.0.mlp.experts.3.up_proj": W4A4,
        "model.layers.0.self_attn.o_proj": AWQ,
        "model.layers.1.mlp.gate_proj": FP8_BLOCKS_WEIGHT_ONLY,
    }


def test_modelopt_files_disagree_about_layers(tmp_path: Path) -> None:
    config, hf_quant_config = modelopt_configs("MIXED_PRECISION", [])
    config["quantized_layers"] = {"a": {"quant_algo": "FP8"}}
    hf_quant_config["quantization"]["quantized_layers"] = {"a": {"quant_algo": "NVFP4"}}
    with pytest.raises(CheckpointConfigError, match=r"contradicts hf_quant_config.json about the quantized layers"):
        read(tmp_path, config, hf_quant_config)


@pytest.mark.parametrize("form", ["config.json", "hf_quant_config.json"])
def test_modelopt_kv_cache(form: str, tmp_path: Path) -> None:
    config, hf_quant_config = modelopt_configs()
    config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    hf_quant_config["quantization"]["kv_cache_quant_algo"] = "FP8"
    quantization = read(tmp_path, config) if form == "config.json" else read(tmp_path, None, hf_quant_config)
    assert quantization.kv_cache == "fp8"


def test_modelopt_without_quant_method_is_known_by_its_producer(tmp_path: Path) -> None:
    config, _ = modelopt_configs()
    del config["quant_method"]
    assert read(tmp_path, config).layout == "modelopt"


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "fp8", "bitsandbytes", "mxfp4", "quark", "torchao", "hqq", "fbgemm_fp8"]
)
def test_other_methods_are_refused_by_name(method: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"quant_method '{method}' is not supported; supported: compressed"):
        read(tmp_path, {"quant_method": method})


SCHEME_SETS = {
    "one": {"a.up_proj": W4A4, "a.down_proj": W4A4, "lm_head": DENSE},
    "weight-only": {"a.up_proj": WEIGHT_ONLY, "lm_head": DENSE},
    "mixed": {"a.up_proj": W4A4, "a.q_proj": FP8, "a.k_proj": FP8_ROWS, "a.o_proj": WEIGHT_ONLY, "lm_head": DENSE},
    "FP8": {"a.up_proj": FP8, "lm_head": DENSE},
    "FP8 in blocks": {"a.up_proj": FP8_BLOCKS_WEIGHT_ONLY, "lm_head": DENSE},
    "FP8 in blocks beside NVFP4": {"a.up_proj": W4A4, "a.q_proj": FP8_BLOCKS_WEIGHT_ONLY, "lm_head": DENSE},
    "nothing dense": {"a.up_proj": W4A4},
}


@pytest.mark.parametrize("kv_cache", ["none", "fp8"])
@pytest.mark.parametrize("schemes", SCHEME_SETS.values(), ids=SCHEME_SETS)
def test_written_configurations_read_back(schemes: dict[str, Scheme], kv_cache: Any, tmp_path: Path) -> None:
    tables = (
        compressed_tensors.quantization_config(schemes, kv_cache),
        modelopt.quantization_config(schemes, kv_cache),
    )
    for table, hf_quant_config in zip(tables, (None, modelopt.hf_quant_config(schemes, kv_cache)), strict=True):
        quantization = read(tmp_path, json.loads(json.dumps(table)), hf_quant_config)
        assert {module: quantization.scheme_of(module) for module in schemes} == schemes
        assert quantization.kv_cache == kv_cache
    (tmp_path / "hf_quant_config.json").unlink()


@pytest.mark.parametrize("kv_cache", ["none", "fp8"])
@pytest.mark.parametrize("schemes", SCHEME_SETS.values(), ids=SCHEME_SETS)
def test_compressed_tensors_accepts_what_is_written(schemes: dict[str, Scheme], kv_cache: Any) -> None:
    """The library validates its own configuration, and infers the same storage format for each group."""
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.format import infer_module_format

    table = compressed_tensors.quantization_config(schemes, kv_cache)
    for key in ("sparsity_config", "transform_config", "version"):  # kept beside the library's own fields
        del table[key]
    parsed = library.QuantizationConfig.model_validate(table)
    assert (parsed.kv_cache_scheme is not None) == (kv_cache == "fp8")
    for group in parsed.config_groups.values():
        assert infer_module_format(torch.nn.Linear, group).value == group.format


def test_dynamic_blocks_are_compressed_tensors_own(tmp_path: Path) -> None:
    """ModelOpt has no name for them."""
    schemes = {"a.up_proj": W4A4, "a.q_proj": FP8_BLOCKS, "lm_head": DENSE}
    table = compressed_tensors.quantization_config(schemes)
    quantization = read(tmp_path, json.loads(json.dumps(table)))
    assert {module: quantization.scheme_of(module) for module in schemes} == schemes
    library = pytest.importorskip("compressed_tensors.quantization")
    for key in ("sparsity_config", "transform_config", "version"):
        del table[key]
    written = next(g for g in library.QuantizationConfig.model_validate(table).config_groups.values() if "q" in str(g))
    preset = library.preset_name_to_scheme("FP8_BLOCK", ["a.q_proj"])
    for ours, theirs in ((written.weights, preset.weights), (written.input_activations, preset.input_activations)):
        for field in ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic"):
            assert getattr(ours, field) == getattr(theirs, field), field
    with pytest.raises(UnsupportedError, match="modelopt layout has no name for"):
        modelopt.quantization_config(schemes)


def test_awq_in_one_layer_names_the_model(tmp_path: Path) -> None:
    schemes = {"a.up_proj": W4A4, "a.o_proj": AWQ, "lm_head": DENSE}
    assert modelopt.hf_quant_config(schemes)["quantization"] == {
        "quant_algo": "NVFP4_AWQ",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "has_zero_point": False,
        "pre_quant_scale": True,
        "exclude_modules": ["lm_head"],
    }


def test_what_cannot_be_written() -> None:
    with pytest.raises(InvalidArgumentError, match="no module is quantized"):
        compressed_tensors.quantization_config({"lm_head": DENSE})
    with pytest.raises(UnsupportedError, match="modelopt layout has no name for"):
        modelopt.quantization_config({"a": Scheme("fp8", input_dynamic=True)})


def test_import_is_light() -> None:
    heavy = ("transformers", "compressed_tensors", "huggingface_hub", "rich")
    code = f"import sys, anyfp4.checkpoint.reader; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.checkpoint
@pytest.mark.parametrize("name", [*FULL, *VARIANTS])
def test_real_configurations(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = real_checkpoint(name, tmp_path_factory)
    quantization = read_quantization(folder, read_config(folder))
    attention = quantization.scheme_of("model.layers.0.self_attn.o_proj")
    expected = WEIGHT_ONLY if "a16" in name else AWQ if "awq" in name else W4A4
    assert quantization.scheme_of("model.layers.0.mlp.up_proj") == expected
    assert attention == (DENSE if "mlponly" in name else expected)
    assert quantization.scheme_of("lm_head") == DENSE
    assert quantization.kv_cache == ("fp8" if "fp8kv" in name else "none")
    assert quantization.layout == ("modelopt" if "modelopt" in name else "compressed-tensors")


@pytest.mark.checkpoint
def test_real_refused_variant(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = real_checkpoint(REFUSED_VARIANT, tmp_path_factory)
    with pytest.raises(UnsupportedError, match=r"config.json: quant_algo 'W4A8_NVFP4_FP8' is not supported; supported"):
        read_quantization(folder, read_config(folder))
