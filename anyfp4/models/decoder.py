"""The decoder of the Llama/Mistral/Qwen family: a plain sequence of blocks, driven by its config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from anyfp4.backends.base import Backend, DecoderPlan, FusedDecoder, LayerPlan, PreparedLinear
from anyfp4.layers.attention import Attention, LayerCache
from anyfp4.layers.linear import Linear
from anyfp4.layers.mlp import MLP
from anyfp4.models.config import DecoderConfig
from anyfp4.ops.attention import AttentionBatch


@dataclass(frozen=True, eq=False)
class Block:
    """One layer: norm, attention, norm, MLP.

    Attributes:
        input_norm: [hidden].
        post_attention_norm: [hidden].
    """

    input_norm: Tensor
    attention: Attention
    post_attention_norm: Tensor
    mlp: MLP


@dataclass(frozen=True, eq=False)
class Decoder:
    """A loaded model.

    Attributes:
        embedding: [vocab, hidden].
        blocks: the layers, in order.
        norm: [hidden], before the head.
        lm_head: hidden to vocab.
        cos_sin: float32 [positions, 2, D/2].
        kv_dtype: of the KV cache.
        nbytes: of all weights as they are held.
        workspace: bytes that a product takes for a moment, at most.
    """

    config: DecoderConfig
    ops: Backend
    embedding: Tensor
    blocks: Sequence[Block]
    norm: Tensor
    lm_head: Linear
    cos_sin: Tensor
    kv_dtype: torch.dtype
    nbytes: int
    workspace: int = 0

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embedding.device

    def forward(self, tokens: Tensor, positions: Tensor, caches: Sequence[LayerCache], batch: AttentionBatch) -> Tensor:
        """Runs T new tokens of a batch of sequences through all layers.

        Args:
            tokens: int64 [T].
            positions: int64 [T].
            caches: one for each layer; the tokens' keys and values are written to them.
            batch: which token belongs to which sequence.

        Returns:
            [T, hidden], normalised, ready for :meth:`logits`.
        """
        residual = self.embedding[tokens]
        if self.fused is not None:
            return self.fused(residual, positions, caches, batch)
        eps = self.config.rms_norm_eps
        update: Tensor | None = None
        for block, cache in zip(self.blocks, caches, strict=True):
            x, residual = self._norm(update, residual, block.input_norm, eps)
            x = block.attention(x, positions, self.cos_sin, cache, batch)
            x, residual = self._norm(x, residual, block.post_attention_norm, eps)
            update = block.mlp(x)
        return self._norm(update, residual, self.norm, eps)[0]

    @cached_property
    def fused(self) -> FusedDecoder | None:
        """The layers as one call of the backend, if it has such a thing and runs all of their linear layers."""
        layers = []
        for block in self.blocks:
            a, mlp = block.attention, block.mlp
            parts = [self._parts(linear) for linear in (a.qkv, a.o, mlp.gate_up, mlp.down)]
            if a.ops is not self.ops or mlp.ops is not self.ops or not all(parts):
                return None
            layers.append(
                LayerPlan(
                    input_norm=block.input_norm,
                    qkv=parts[0],
                    q_norm=a.q_norm,
                    k_norm=a.k_norm,
                    o=parts[1],
                    post_attention_norm=block.post_attention_norm,
                    gate_up=parts[2],
                    down=parts[3],
                    k_scale=a.k_scale,
                    v_scale=a.v_scale,
                    sliding_window=a.sliding_window,
                )
            )
        c = self.config
        return self.ops.fuse(
            DecoderPlan(layers, self.norm, self.cos_sin, c.num_heads, c.num_kv_heads, c.head_dim, c.rms_norm_eps)
        )

    def _parts(self, linear: Linear) -> list[PreparedLinear]:
        """A linear layer's parts, or none if another backend runs one of them."""
        found = [prepared for backend, prepared in linear.parts if backend is self.ops]
        return found if len(found) == len(linear.parts) else []

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, hidden] to float32 [T, vocab]."""
        return self.lm_head(hidden, torch.float32)

    def _norm(self, update: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if update is None:
            return self.ops.rms_norm(residual, weight, eps), residual
        return self.ops.add_rms_norm(update, residual, weight, eps)
