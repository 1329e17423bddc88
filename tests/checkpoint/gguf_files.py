"""Small GGUF files for tests, written with the ``gguf`` package as llama.cpp's converter would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TEXT = (
    "The quick brown fox jumps over the lazy dog. It's 1984, and we've 12345 reasons to go on: 3.14, 2024-01-31.\n\n"
    "\tdef f(x):  # a comment\n        return x  *  2\n\nCafé déjà vu, naïve Straße, 北京 東京, привет мир, 🙂🙂!\n"
) * 4
#: GGUF name of a layer's module -> Hugging Face name
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CLASSES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def small_model(architecture: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model whose weights are bf16 numbers, in float32."""
    config_class, model_class = CLASSES[architecture]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SMALL, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as constants, which would hide mistakes
            parameter.copy_((torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1)).bfloat16())
    return model


def metadata_of(model: PreTrainedModel) -> dict[str, Any]:
    """What llama.cpp's converter writes about a model."""
    c = model.config
    return {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim if hasattr(c, "head_dim") else c.hidden_size // c.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.freq_base": float(c.rope_parameters["rope_theta"]),
    }


def tensors_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """A model's weights under GGUF names, query and key rows reordered as the converter does for ``llama``."""
    state = {name: t.detach().numpy() for name, t in model.state_dict().items()}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if not model.config.tie_word_embeddings:
        tensors["output.weight"] = state["lm_head.weight"]
    for i in range(model.config.num_hidden_layers):
        for short, name in LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                data = state.get(f"model.layers.{i}.{name}.{kind}")
                if data is None:
                    continue
                if model.config.model_type == "llama" and short in ("attn_q", "attn_k"):
                    heads = model.config.num_attention_heads if short == "attn_q" else model.config.num_key_value_heads
                    data = permuted(data, heads)
                tensors[f"blk.{i}.{short}.{kind}"] = data
    return tensors


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row (half h, pair p) of each head becomes row 2p + h."""
    out = np.empty_like(rows)
    size = rows.shape[0] // heads
    for head in range(heads):
        for half in range(2):
            for pair in range(size // 2):
                out[head * size + 2 * pair + half] = rows[head * size + half * (size // 2) + pair]
    return out


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    extra: Mapping[str, Any] | None = None,
    kind: Callable[[str, np.ndarray], gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """Writes a GGUF file; ``metadata`` keys get the architecture's prefix, ``extra`` keys do not."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**{f"{architecture}.{k}": v for k, v in metadata.items()}, **(extra or {})}.items():
        _add(writer, key, value)
    for name, data in tensors.items():
        wanted = gguf.GGMLQuantizationType.F32 if kind is None or data.ndim == 1 else kind(name, data)
        writer.add_tensor(name, gguf.quants.quantize(data, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_file(path: Path, model: PreTrainedModel, *, tokenizer: Tokenizer | None = None, **options: Any) -> Path:
    """A whole small model as a GGUF file."""
    extra = {**(tokenizer_metadata(tokenizer, "smollm") if tokenizer else {}), **options.pop("extra", {})}
    metadata = {**metadata_of(model), **options.pop("metadata", {})}
    return write_gguf(path, model.config.model_type, metadata, tensors_of(model), extra=extra, **options)


def trained_tokenizer(pre_tokenizer: pre_tokenizers.PreTokenizer, vocab_size: int = 320, **options: Any) -> Tokenizer:
    """A byte-level BPE tokenizer, trained on ``TEXT``."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def digits_first() -> pre_tokenizers.PreTokenizer:
    """The rule called ``smollm``."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def tokenizer_metadata(tokenizer: Tokenizer, rule: str, **more: Any) -> dict[str, Any]:
    """The metadata of a byte-level BPE tokenizer."""
    import json

    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in ("<unk>", "<s>", "</s>") else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.{k}": v for k, v in more.items()},
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
