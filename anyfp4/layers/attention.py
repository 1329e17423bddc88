"""The attention block: fused q/k/v projection, optional norm of q and k, rotary embedding, cache, output projection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from anyfp4.backends.base import Backend
from anyfp4.layers.linear import Linear
from anyfp4.ops.attention import AttentionBatch


@dataclass(frozen=True, eq=False)
class LayerCache:
    """One layer's part of the paged KV cache, with the multipliers of an FP8 cache (1 otherwise).

    Attributes:
        k: [blocks, block_size, Hkv, D].
        v: likewise.
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention block.

    Attributes:
        qkv: fused projection, [q; k; v].
        o: output projection.
        q_norm: [D] or None.
        k_norm: [D] or None.
        k_scale: multiplier of cached keys in an FP8 cache.
        v_scale: multiplier of cached values in an FP8 cache.
        sliding_window: positions a query sees, itself included; None for all.
    """

    ops: Backend
    qkv: Linear
    o: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    k_scale: float
    v_scale: float
    sliding_window: int | None

    def __call__(
        self, x: Tensor, positions: Tensor, cos_sin: Tensor, cache: LayerCache, batch: AttentionBatch
    ) -> Tensor:
        """x [T, hidden] to [T, hidden]; writes the keys and values of the T tokens to the cache first."""
        tokens, heads, kv_heads, dim = x.shape[0], self.num_heads, self.num_kv_heads, self.head_dim
        qkv = self.qkv(x).view(tokens, heads + 2 * kv_heads, dim)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.ops.rms_norm(q, self.q_norm, self.eps)
            k = self.ops.rms_norm(k, self.k_norm, self.eps)
        q = self.ops.apply_rope(q, positions, cos_sin)
        k = self.ops.apply_rope(k, positions, cos_sin)
        self.ops.write_kv(k, v, cache.k, cache.v, batch.slots, self.k_scale, self.v_scale)
        attended = self.ops.attention(
            q,
            cache.k,
            cache.v,
            batch,
            scale=dim**-0.5,
            sliding_window=self.sliding_window,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
        )
        return self.o(attended.reshape(tokens, heads * dim))
