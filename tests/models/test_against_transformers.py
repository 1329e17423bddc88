"""Logits of tiny random models against transformers, in float32, for every supported family and option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.models.loader import load_decoder
from anyfp4.testing.bitwise import assert_same_bits
from anyfp4.testing.models import all_logits

BASE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": ("Llama", {"head_dim": 16}),
    "llama multi-head": ("Llama", {"num_key_value_heads": 6}),
    "llama rope llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama rope yarn": ("Llama", {"rope_parameters": YARN}),
    "llama rope yarn factor": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0}}),
    "llama rope yarn bare": ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}),
    "llama rope linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 11}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
    "qwen2 window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 bias": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
}


def make(case: str, folder: Path) -> tuple[Any, list[int]]:
    """A random model saved in ``folder``, and a sequence of tokens."""
    import transformers

    name, options = CASES[case]
    torch.manual_seed(sorted(CASES).index(case))
    config = getattr(transformers, f"{name}Config")(**{**BASE, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms are all ones and biases all zeros by default: make them tell
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "embed" not in parameter_name:
                parameter.mul_(5)
    model.save_pretrained(folder)
    return model, torch.randint(3, 97, (90,)).tolist()


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    model, tokens = make(case, tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        decoder = load_decoder(checkpoint, device=torch.device("cpu"))
    got = all_logits(decoder, tokens).double()
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].double()
        truth = model.double()(torch.tensor([tokens])).logits[0]
    # Measured against the same model in float64 we must not be further off than transformers' own float32 run, up to
    # a factor of two for luck: both have a rounding of 2⁻²⁴ after each of the same operations, ours fewer inside sums.
    # The frequency table, which transformers rounds to float32 in either run, is common to all three.
    scale = truth.abs().max()
    our_error, their_error = ((x - truth).abs().max() / scale for x in (got, theirs))
    assert our_error <= max(2 * their_error, 3e-7), f"ours {our_error:.2e}, transformers {their_error:.2e}"
    assert our_error < 5e-6


@pytest.mark.parametrize("case", ["llama", "mistral window", "qwen3"])
def test_chunks_and_blocks_do_not_matter(case: str, tmp_path: Path) -> None:
    _, tokens = make(case, tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        decoder = load_decoder(checkpoint, device=torch.device("cpu"), dtype=torch.bfloat16)
    whole = all_logits(decoder, tokens)
    assert_same_bits(all_logits(decoder, tokens, chunks=[1] * 90), whole, "token by token")
    assert_same_bits(all_logits(decoder, tokens, chunks=[37, 1, 52], block_size=4), whole, "three chunks")
    assert_same_bits(all_logits(decoder, tokens[:50]), whole[:50], "a prefix")
