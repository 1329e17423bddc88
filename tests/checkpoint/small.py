"""Small checkpoints in both layouts, built from raw tensors without the package's own writers."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INTER, VOCAB, KV = 32, 48, 24, 16
LAYER = "model.layers.0"
ATTENTION = f"{LAYER}.self_attn"
LINEARS = {
    f"{ATTENTION}.q_proj": (HIDDEN, HIDDEN),
    f"{ATTENTION}.k_proj": (KV, HIDDEN),
    f"{ATTENTION}.v_proj": (KV, HIDDEN),
    f"{ATTENTION}.o_proj": (HIDDEN, HIDDEN),
    f"{LAYER}.mlp.gate_proj": (INTER, HIDDEN),
    f"{LAYER}.mlp.up_proj": (INTER, HIDDEN),
    f"{LAYER}.mlp.down_proj": (HIDDEN, INTER),
}
UP = f"{LAYER}.mlp.up_proj"
Q = f"{ATTENTION}.q_proj"
MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "vocab_size": VOCAB,
    "num_hidden_layers": 1,
}
_CT_ARGS = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "group_size": 16,
    "strategy": "tensor_group",
    "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
}
_FP8_ARGS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
KV_SCHEME = dict(_FP8_ARGS)


@dataclass
class Small:
    """A checkpoint that is not written yet: change it, then ``write`` it."""

    tensors: dict[str, Tensor]
    quantization_config: dict[str, Any] | None = None
    hf_quant_config: dict[str, Any] | None = None
    #: shard of the tensors named; everything else is in shard 0. Empty: one model.safetensors, no index
    shards: dict[str, int] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        config = dict(MODEL_CONFIG)
        if self.quantization_config is not None:
            config["quantization_config"] = self.quantization_config
        (folder / "config.json").write_text(json.dumps(config))
        if self.hf_quant_config is not None:
            (folder / "hf_quant_config.json").write_text(json.dumps(self.hf_quant_config))
        if not self.shards:
            save_file(self.tensors, folder / "model.safetensors", {"format": "pt"})
            return folder
        count = max(self.shards.values()) + 1
        weight_map = {}
        for i in range(count):
            name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            part = {t: x for t, x in self.tensors.items() if self.shards.get(t, 0) == i}
            save_file(part, folder / name, {"format": "pt"})
            weight_map |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    def drop(self, module: str) -> None:
        """Removes all tensors of a module."""
        for name in [n for n in self.tensors if n.startswith(f"{module}.")]:
            del self.tensors[name]


def block_scales(n: int, k: int, generator: torch.Generator) -> Tensor:
    """Any E4M3 number from 0 to 448, subnormal ones included: float8_e4m3fn [N, K/16]."""
    bits = torch.randint(0, 0x7F, (n, k // 16), generator=generator, dtype=torch.uint8)
    return bits.view(torch.float8_e4m3fn)


def nvfp4_tensors(n: int, k: int, seed: int, layout: str, weight_only: bool = False) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8)
    scale = block_scales(n, k, g)
    weight_global, input_global = (torch.rand(2, generator=g) + 0.5).unbind()
    if layout == "compressed-tensors":
        tensors = {
            "weight_packed": packed,
            "weight_scale": scale,
            "weight_global_scale": (1000 * weight_global).reshape(1).clone(),
            "input_global_scale": (100 * input_global).reshape(1).clone(),
        }
    else:
        tensors = {
            "weight": packed,
            "weight_scale": scale,
            "weight_scale_2": (weight_global / 1000).clone(),
            "input_scale": (input_global / 100).clone(),
        }
    if weight_only:
        del tensors["input_global_scale" if layout == "compressed-tensors" else "input_scale"]
    return tensors


def fp8_tensors(n: int, k: int, seed: int, scale: Tensor, input_scale: Tensor | None) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g).to(torch.float8_e4m3fn)
    tensors = {"weight": weight, "weight_scale": scale}
    return tensors if input_scale is None else tensors | {"input_scale": input_scale}


def dense_tensors() -> dict[str, Tensor]:
    """Embedding and norms."""
    g = torch.Generator().manual_seed(99)
    return {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=g, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        f"{LAYER}.input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        f"{LAYER}.post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }


def put(small: Small, module: str, tensors: dict[str, Tensor]) -> None:
    """Replaces a module's tensors."""
    small.drop(module)
    small.tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}


def ct_group(weight_only: bool = False, targets: list[str] | None = None) -> dict[str, Any]:
    return {
        "format": "nvfp4-pack-quantized",
        "targets": targets or ["Linear"],
        "weights": dict(_CT_ARGS),
        "input_activations": None if weight_only else {**_CT_ARGS, "dynamic": "local"},
        "output_activations": None,
    }


def ct_fp8_group(strategy: str = "tensor", dynamic: bool = False, targets: list[str] | None = None) -> dict[str, Any]:
    inputs = {**_FP8_ARGS, "strategy": "token", "dynamic": True} if dynamic else dict(_FP8_ARGS)
    return {
        "format": "float-quantized",
        "targets": targets or ["Linear"],
        "weights": {**_FP8_ARGS, "strategy": strategy},
        "input_activations": inputs,
        "output_activations": None,
    }


def ct_fp8_block_group(weight_only: bool = False, targets: list[str] | None = None) -> dict[str, Any]:
    """As compressed-tensors' preset FP8_BLOCK; the library stores weight-only layers as ``naive-quantized``."""
    inputs = {**_FP8_ARGS, "strategy": "group", "group_size": 128, "dynamic": True}
    return {
        "format": "naive-quantized" if weight_only else "float-quantized",
        "targets": targets or ["Linear"],
        "weights": {**_FP8_ARGS, "strategy": "block", "block_structure": [128, 128]},
        "input_activations": None if weight_only else inputs,
        "output_activations": None,
    }


def ct_config(*groups: dict[str, Any]) -> dict[str, Any]:
    groups = groups or (ct_group(),)
    formats = {group["format"] for group in groups}
    return {
        "config_groups": {f"group_{i}": copy.deepcopy(group) for i, group in enumerate(groups)},
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }


def modelopt_configs(
    algorithm: str = "NVFP4", excludes: list[str] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json's quantization_config, hf_quant_config.json)."""
    producer = {"name": "modelopt", "version": "0.47.0"}
    excludes = ["lm_head", "model.embed_tokens"] if excludes is None else excludes
    config = {"ignore": list(excludes), "quant_algo": algorithm, "producer": producer, "quant_method": "modelopt"}
    hf: dict[str, Any] = {
        "producer": producer,
        "quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": list(excludes)},
    }
    if "NVFP4" in algorithm:
        hf["quantization"]["group_size"] = 16
    return config, hf


def small(layout: str = "compressed-tensors", weight_only: bool = False) -> Small:
    """One decoder layer, every linear module NVFP4."""
    made = Small(dense_tensors())
    for seed, (module, (n, k)) in enumerate(LINEARS.items()):
        put(made, module, nvfp4_tensors(n, k, seed, layout, weight_only))
    if layout == "compressed-tensors":
        made.quantization_config = ct_config(ct_group(weight_only))
    else:
        made.quantization_config, made.hf_quant_config = modelopt_configs("W4A16_NVFP4" if weight_only else "NVFP4")
    return made


def with_kv_scales(made: Small) -> Small:
    """Adds an FP8 KV cache to a small checkpoint, k 0.5 and v 0.25."""
    assert made.quantization_config is not None
    k, v = torch.tensor(0.5), torch.tensor(0.25)
    if made.hf_quant_config is None:
        made.quantization_config["kv_cache_scheme"] = dict(KV_SCHEME)
        made.tensors |= {f"{ATTENTION}.k_scale": k.reshape(1), f"{ATTENTION}.v_scale": v.reshape(1)}
    else:
        made.quantization_config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
        made.hf_quant_config["quantization"]["kv_cache_quant_algo"] = "FP8"
        made.tensors |= {f"{ATTENTION}.k_proj.k_scale": k, f"{ATTENTION}.v_proj.v_scale": v}
    return made
