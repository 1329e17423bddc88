"""``config.json`` from the metadata of a GGUF file. Whatever it does not know, it refuses by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from anyfp4.errors import CheckpointConfigError, UnsupportedError

#: GGUF architecture -> (model_type, class)
ARCHITECTURES: Final = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
#: metadata of an architecture that is read, or that does not change what the model computes
_KNOWN_KEYS: Final = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "expert_count",
        "expert_used_count",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "tensor_data_layout",
        "vocab_size",
    }
)
#: every Llama 3 model has these; the file holds only what follows from them
_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def hf_config(
    path: Path,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_divisors: Tensor | None,
) -> dict[str, Any]:
    """The Hugging Face configuration of a GGUF model.

    Args:
        path: the file, for messages.
        metadata: of the file.
        shapes: of the file's tensors, by GGUF name.
        rope_divisors: float32 [head_dim/2], the tensor ``rope_freqs.weight`` if the file has one.

    Raises:
        CheckpointConfigError: a key is missing, or one contradicts another.
        UnsupportedError: an architecture or feature that is not supported.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: GGUF architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    keys = _Keys(path, architecture, metadata)
    keys.refuse_unknown()
    model_type, class_name = ARCHITECTURES[architecture]
    heads = keys.integer("attention.head_count")
    hidden = keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", default=hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(name, default=head_dim) != head_dim:
            raise UnsupportedError(
                f"{path}: {architecture}.{name} is {keys.integer(name)}, the size of a head {head_dim}; "
                "only models in which they agree are supported"
            )
    if "token_embd.weight" not in shapes:
        raise CheckpointConfigError("there is no tensor token_embd.weight", file=path)
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "vocab_size": shapes["token_embd.weight"][0],
        "use_cache": True,
    }
    if model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = False
    theta = keys.number("rope.freq_base", default=10000.0)
    scaling = _rope_scaling(keys, rope_divisors, theta, head_dim)
    # both spellings: transformers 5 reads the first, everything older the other two
    config["rope_parameters"] = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    config["rope_theta"] = theta
    if scaling is not None:
        config["rope_scaling"] = scaling
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        identifier = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if identifier is not None:
            config[f"{ours}_token_id"] = int(identifier)
    return config


def llama3_scaling(divisors: Tensor, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The Llama 3 rope parameters that give these divisors of the rotary frequencies, if some do.

    Args:
        divisors: float32 [head_dim/2].
        theta: base of the frequencies.
        head_dim: size of a head.

    Returns:
        The parameters, or None.
    """
    factor = float(divisors.max())
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    context = _LLAMA3["original_max_position_embeddings"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelength = 2 * math.pi * theta**exponents
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    # the converter computes in float32: a few roundings of 2^-24, magnified by less than 2^4 in the ramp
    if divisors.shape != expected.shape or not torch.allclose(divisors.double(), expected, rtol=1e-5, atol=0):
        return None
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


class _Keys:
    """Typed reading of the metadata of one architecture."""

    def __init__(self, path: Path, architecture: str, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.architecture = architecture
        prefix = f"{architecture}."
        self._values = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}

    def refuse_unknown(self) -> None:
        for key, value in self._values.items():
            harmless = key in _KNOWN_KEYS and not (key.startswith("expert_") and value)
            if not harmless:
                shown = repr(value) if len(repr(value)) < 50 else "..."
                raise UnsupportedError(f"{self.path}: {self.architecture}.{key} = {shown} is not supported")

    def has(self, key: str) -> bool:
        return key in self._values

    def text(self, key: str, default: str) -> str:
        return str(self._values.get(key, default))

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise CheckpointConfigError(
                f"{self.architecture}.{key} must be a positive integer, got {value!r}", file=self.path
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A float32, as the shortest decimal that names it: 1e-05 rather than 9.999999747378752e-06."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise CheckpointConfigError(
                f"{self.architecture}.{key} must be a positive number, got {value!r}", file=self.path
            )
        return float(str(np.float32(value)))

    def _value(self, key: str, default: Any) -> Any:
        value = self._values.get(key, default)
        if value is None:
            raise CheckpointConfigError(f"metadata key {self.architecture}.{key} is missing", file=self.path)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedError(f"{self.path}: {self.architecture}.{key} differs between layers")
            value = value[0]
        return value


def _rope_scaling(keys: _Keys, divisors: Tensor | None, theta: float, head_dim: int) -> dict[str, Any] | None:
    kind = keys.text("rope.scaling.type", "none")
    if divisors is not None:
        found = llama3_scaling(divisors, theta, head_dim)
        if found is None or kind != "none":
            raise UnsupportedError(
                f"{keys.path}: rope_freqs.weight: these rope divisors are not Llama 3's; others are not supported"
            )
        return found
    if kind == "none":
        return None
    if keys.has("rope.scaling.attn_factor") and keys.number("rope.scaling.attn_factor") != 1.0:
        raise UnsupportedError(f"{keys.path}: {keys.architecture}.rope.scaling.attn_factor is not supported")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
    if kind == "linear":
        return scaling
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if keys.has(f"rope.scaling.{theirs}"):
                scaling[ours] = keys.number(f"rope.scaling.{theirs}")
        return scaling
    raise UnsupportedError(
        f"{keys.path}: {keys.architecture}.rope.scaling.type {kind!r} is not supported; supported: linear, yarn"
    )
