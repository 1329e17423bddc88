"""A checkpoint of random weights in the shape of a published model: speed does not depend on the values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyfp4.checkpoint import compressed_tensors
from anyfp4.checkpoint.scheme import DENSE, Scheme
from anyfp4.checkpoint.writer import CheckpointWriter
from anyfp4.formats.nvfp4 import BLOCK_SIZE, NVFP4Tensor
from anyfp4.formats.weights import NVFP4Weight

#: the published config of Qwen3-8B, without its rotary table's length (40960 there)
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 4096,
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 151936,
    "eos_token_id": 151645, "bos_token_id": 151643,
}  # fmt: skip
W4A4 = Scheme("nvfp4")


def random_weight(n: int, k: int, device: torch.device) -> NVFP4Weight:
    """Codes and scales as a trained layer has them, drawn directly: quantizing would take longer than a benchmark.

    The weights' standard deviation is about 0.02, that of freshly initialised models.
    """
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    scale = (torch.rand(n, k // BLOCK_SIZE, device=device) * 100 + 20).to(torch.float8_e4m3fn)
    tensor = NVFP4Tensor(packed, scale, torch.tensor([2.0**-14], device=device))
    return NVFP4Weight(tensor, torch.tensor([2.0**-9], device=device))


def write(folder: Path, config: dict[str, Any], device: torch.device) -> Path:
    """Writes a W4A4 checkpoint in the compressed-tensors layout: everything but embedding, norms and head in NVFP4.

    Args:
        folder: to be made.
        config: of a Llama-like model, as its config.json holds it.
        device: on which numbers are drawn.
    """
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config["model_type"] == "qwen3":
        norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
    schemes: dict[str, Scheme] = {"lm_head": DENSE}

    def dense(*shape: int) -> Tensor:
        return (torch.randn(*shape, device=device) * 0.02).bfloat16().cpu()

    with CheckpointWriter(folder) as writer:
        for name in ("model.embed_tokens", "lm_head"):
            writer.add(f"{name}.weight", dense(config["vocab_size"], hidden))
        writer.add("model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16))
        for layer in (f"model.layers.{i}" for i in range(config["num_hidden_layers"])):
            for norm, size in norms.items():
                writer.add(f"{layer}.{norm}.weight", torch.ones(size, dtype=torch.bfloat16))
            for part, (n, k) in shapes.items():
                schemes[f"{layer}.{part}"] = W4A4
                weight = random_weight(n, k, device)
                for name, tensor in compressed_tensors.tensors(f"{layer}.{part}", weight).items():
                    writer.add(name, tensor.cpu())
        table = compressed_tensors.quantization_config(schemes)
        writer.write_json("config.json", {**config, "quantization_config": table})
        return writer.finish()
