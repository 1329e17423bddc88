"""Tiny random models of transformers' architectures, and an independent computation of their quantized linear layers.

The reference shares no code with anyfp4: it reads the tensors of a compressed-tensors file, quantizes activations with
torch's own rounding, and adds up in float64 by the published rule of Blackwell's instruction (MMA-Sim, arXiv
2511.10909).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 96
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "head_dim": 16}
#: model type -> settings beside the common ones; None takes a common one away
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {**_SLIDING, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 16},
    "phi3": {"original_max_position_embeddings": 128},
    "olmo2": {},
    "gpt_oss": {**_SLIDING, "num_local_experts": 2, "num_experts_per_tok": 1},
    "granite": {},
    "cohere2": {**_SLIDING},
    "starcoder2": {"sliding_window": 5},
    "stablelm": {"use_qkv_bias": True},
    "phi": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True},
}
#: what must stay dense for a model to be quantized at all
IGNORE = {"gpt_oss": ["*.mlp.experts"]}


def write_model(model_type: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16, **more: Any) -> None:
    """A tiny random unquantized model of an architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**_COMMON, **ARCHITECTURES.get(model_type, {}), **more}
    config = AutoConfig.for_model(model_type, **{k: v for k, v in settings.items() if v is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(dtype).save_pretrained(folder)


def tokens(seed: int = 0, batch: int = 2, length: int = 9) -> Tensor:
    """Token ids [batch, length]."""
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def reference_model(dense: Path, stored: Mapping[str, Tensor]) -> nn.Module:
    """The unquantized model in float32 with every quantized linear layer computed by :func:`reference_linear`.

    Args:
        dense: the folder that was quantized.
        stored: the tensors of the quantized one, compressed-tensors layout.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    seen = set()
    for name, module in model.named_modules():
        packed = stored.get(f"{name}.weight_packed")
        if packed is not None:
            seen.add(name)
            parts = {
                s: stored.get(f"{name}.{s}") for s in ("weight_scale", "weight_global_scale", "input_global_scale")
            }
            module.forward = MethodType(_forward(packed, module.bias, **parts), module)
    assert seen == {n.removesuffix(".weight_packed") for n in stored if n.endswith(".weight_packed")}
    return model


def _forward(packed: Tensor, bias: Tensor | None, **scales: Tensor | None) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        y = reference_linear(x.reshape(-1, x.shape[-1]), packed, **scales)
        return (y if bias is None else y + bias).reshape(*x.shape[:-1], -1)

    return forward


def reference_linear(
    x: Tensor, packed: Tensor, weight_scale: Tensor, weight_global_scale: Tensor, input_global_scale: Tensor
) -> Tensor:
    """float32 [M, K] to float32 [M, N]: W4A4, Blackwell's accumulation; global scales are divisors, as stored."""
    w, w_scale = _codes(packed), weight_scale.to(torch.float64)
    inverse = 1.0 / (1.0 / input_global_scale)  # readers keep multipliers, rounded to float32
    a, a_scale = _quantize(x, inverse)
    m, n, blocks = x.shape[0], w.shape[0], w_scale.shape[1]
    dots = torch.einsum("mbk,nbk->mnb", a.reshape(m, blocks, 16), w.reshape(n, blocks, 16))
    _, exponent_a = torch.frexp(a_scale)
    _, exponent_w = torch.frexp(w_scale)
    exponents = (exponent_a - 1)[:, None, :] + (exponent_w - 1)[None, :, :]  # of the scales, [M, N, B]
    exponents = exponents.where((a_scale[:, None, :] != 0) & (w_scale[None] != 0), torch.tensor(-1000))
    terms = dots * a_scale[:, None, :] * w_scale[None, :, :]
    total = torch.zeros(m, n, dtype=torch.float64)
    for start in range(0, blocks, 4):
        chunk = slice(start, start + 4)
        largest = torch.maximum(exponents[..., chunk].amax(-1), torch.frexp(total)[1] - 1)
        unit = torch.ldexp(torch.ones_like(total), largest - 35)
        kept = (terms[..., chunk] / unit.unsqueeze(-1)).trunc().sum(-1) + (total / unit).trunc()
        total = _toward_zero(kept * unit)
    alpha = (1.0 / input_global_scale) * (1.0 / weight_global_scale)
    return total.to(torch.float32) * alpha


def _codes(packed: Tensor) -> Tensor:
    """uint8 [N, K/2] to float64 [N, K]."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    table = torch.cat([table, -table])
    return table[torch.stack([packed & 15, packed >> 4], dim=-1).long()].flatten(-2)


def _quantize(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [M, K] to codes and block scales, float64 [M, K] and [M, K/16]."""
    blocks = x.unflatten(-1, (-1, 16))
    scale = (g * (blocks.abs().amax(-1) * torch.tensor(1 / 6))).clamp(max=448).to(torch.float8_e4m3fn).float()
    y = blocks * (g / scale).unsqueeze(-1)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    middles = (table[1:] + table[:-1]) / 2
    # a tie goes to the even code: below the middle for 0, 2, 4, 6 and above it for 1, 3, 5
    up = torch.bucketize(y.abs(), middles, right=True)
    down = torch.bucketize(y.abs(), middles)
    code = torch.where(up % 2 == 0, up, down)
    codes = table[code].copysign(y).where(scale.unsqueeze(-1) != 0, torch.tensor(0.0))
    return codes.flatten(-2).double(), scale.double()


def _toward_zero(x: Tensor) -> Tensor:
    """float64 rounded toward zero to 24 significant bits."""
    significand, exponent = torch.frexp(x)
    return torch.ldexp((significand * 2**24).trunc(), exponent - 24)
