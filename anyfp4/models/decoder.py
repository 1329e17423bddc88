"""The decoder of the Llama/Mistral/Qwen family: a plain sequence of blocks, driven by its config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyfp4.backends.base import Backend
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
        eps = self.config.rms_norm_eps
        residual = self.embedding[tokens]
        update: Tensor | None = None
        for block, cache in zip(self.blocks, caches, strict=True):
            x, residual = self._norm(update, residual, block.input_norm, eps)
            x = block.attention(x, positions, self.cos_sin, cache, batch)
            x, residual = self._norm(x, residual, block.post_attention_norm, eps)
            update = block.mlp(x)
        return self._norm(update, residual, self.norm, eps)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, hidden] to float32 [T, vocab]."""
        return self.lm_head(hidden, torch.float32)

    def _norm(self, update: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if update is None:
            return self.ops.rms_norm(residual, weight, eps), residual
        return self.ops.add_rms_norm(update, residual, weight, eps)
