"""A decoder's layers through fused kernels: the bits, and the cache, of the op-by-op loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from anyfp4.backends.triton import TritonBackend
from anyfp4.backends.triton_layers import TritonLayers
from anyfp4.formats.weights import DenseWeight, LinearWeight
from anyfp4.layers.attention import Attention, LayerCache
from anyfp4.layers.linear import Linear
from anyfp4.layers.mlp import MLP
from anyfp4.layers.rotary import cos_sin_table
from anyfp4.models.config import DecoderConfig
from anyfp4.models.decoder import Block, Decoder
from anyfp4.ops.attention import AttentionBatch
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels_triton.linears import TRITON, nvfp4, to

HIDDEN, HEADS, KV_HEADS, DIM, INNER, BLOCK_SIZE = 64, 4, 2, 16, 96, 4
CONFIG = {
    "model_type": "qwen3", "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": DIM, "intermediate_size": INNER, "vocab_size": 50,
    "max_position_embeddings": 64, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5,
}  # fmt: skip


def linear(weights: Sequence[LinearWeight], device: torch.device, numerics: str = "native") -> Linear:
    """A linear layer of the Triton backend, which the registry would not choose on a CPU."""
    layer = Linear.__new__(Linear)
    layer.parts = [(TRITON, TRITON.prepare(to(w, device), numerics)) for w in weights]
    layer.nbytes = 0
    return layer


def dense(n: int, k: int, seed: int) -> DenseWeight:
    return DenseWeight(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).bfloat16() * 0.1)


def weights(kind: str, n: int, k: int, seed: int) -> list[LinearWeight]:
    if kind == "dense":
        return [dense(n, k, seed)]
    if kind == "mixed":
        return [nvfp4(n // 2, k, seed, weight_only=True), dense(n - n // 2, k, seed)]
    options = {"pre": {"pre": True}, "scales": {"inputs": (0.01, 0.02)}}
    return [nvfp4(n, k, seed, **options.get(kind, {}))]  # type: ignore[arg-type]


def decoder(
    kind: str, device: torch.device, fp8_cache: bool = False, norm: bool = True, layers: int = 1
) -> Decoder:  # fmt: skip
    g = torch.Generator().manual_seed(9)

    def vector(size: int) -> torch.Tensor:
        return (torch.rand(size, generator=g) + 0.5).bfloat16().to(device)

    numerics = "blackwell" if kind == "blackwell" else "native"
    blocks = []
    for i in range(layers):
        qkv, o, gate_up, down = (
            linear(weights(kind, n, k, 10 * i + j), device, numerics)
            for j, (n, k) in enumerate(
                [((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), (HIDDEN, HEADS * DIM), (2 * INNER, HIDDEN), (HIDDEN, INNER)]
            )
        )
        norms = (vector(DIM), vector(DIM)) if norm else (None, None)
        scale = 0.05 if fp8_cache else 1.0
        attention = Attention(
            TRITON, qkv, o, HEADS, KV_HEADS, DIM, *norms, 1e-5, scale, scale, sliding_window=(5, None)[i]
        )
        blocks.append(Block(vector(HIDDEN), attention, vector(HIDDEN), MLP(TRITON, gate_up, down)))
    config = replace(DecoderConfig.from_hf(CONFIG, "config.json"), rms_norm_eps=1e-5)
    embedding = torch.randn(50, HIDDEN, generator=g).bfloat16().to(device)
    head = linear([DenseWeight(embedding.cpu())], device)
    table = cos_sin_table(DIM, 64, "default", 1e4, {}).to(device)
    kv_dtype = torch.float8_e4m3fn if fp8_cache else torch.bfloat16
    return Decoder(config, TRITON, embedding, blocks, vector(HIDDEN), head, table, kv_dtype, 0)


def run(model: Decoder) -> tuple[torch.Tensor, ...]:
    """A prompt and a single token: hidden states and caches as bytes."""
    shape = (8, BLOCK_SIZE, KV_HEADS, DIM)
    caches = [
        LayerCache(*(torch.zeros(shape, dtype=model.kv_dtype, device=model.device) for _ in "kv")) for _ in model.blocks
    ]
    out = []
    for tokens, start in (([3, 1, 4, 1, 5, 9], 0), ([2], 6)):
        positions = torch.arange(start, start + len(tokens))
        batch = AttentionBatch(
            torch.tensor([0, len(tokens)], dtype=torch.int32).to(model.device),
            torch.tensor([start + len(tokens)], dtype=torch.int32).to(model.device),
            torch.tensor([[2, 5]], dtype=torch.int32).to(model.device),
            (torch.tensor([2, 5])[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE).to(model.device),
        )
        ids = torch.tensor(tokens).to(model.device)
        out.append(model.forward(ids, positions.to(model.device), caches, batch))
    stored = [t.view(torch.uint8 if t.itemsize == 1 else torch.int16) for c in caches for t in (c.k, c.v)]
    return (torch.cat(out), *stored)


@pytest.mark.parametrize("kind", ["pre", "scales", "blackwell", "mixed"])
def test_fused_layers_have_the_bits_of_the_ops(kind: str, device: torch.device) -> None:
    check(decoder(kind, device))


def test_two_layers(device: torch.device) -> None:
    check(decoder("w4a4", device, layers=2))


def test_an_fp8_cache(device: torch.device) -> None:
    check(decoder("w4a4", device, fp8_cache=True))


def test_without_norms_of_q_and_k(device: torch.device) -> None:
    check(decoder("w4a4", device, norm=False))


def check(model: Decoder) -> None:
    assert isinstance(model.fused, TritonLayers)
    got = run(model)
    model.__dict__["fused"] = None
    for i, (a, b) in enumerate(zip(got, run(model), strict=True)):
        assert_same_bits(a, b, "hidden" if i == 0 else f"cache {i - 1}")


def test_a_changed_op_is_not_bypassed(device: torch.device) -> None:
    class Changed(TritonBackend):
        def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
            return super().silu_mul(gate_up)

    model = decoder("w4a4", device)
    assert replace(model, ops=Changed()).ops.fuse(model.fused.plan) is None  # type: ignore[union-attr]
