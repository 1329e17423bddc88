"""Ops that are wrong on purpose: right to a few bits, but dependent on the batch. `verify` must find each."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from anyfp4.backends.base import PreparedLinear
from anyfp4.engine.model_runner import ModelRunner
from anyfp4.formats import dequantize
from anyfp4.formats.weights import NVFP4Weight
from anyfp4.ops.attention import AttentionBatch, gather


def linear_in_pieces(x: Tensor, prepared: PreparedLinear, out_dtype: torch.dtype | None, pieces: int) -> Tensor:
    """A float32 product whose K is summed in so many pieces, last piece first."""
    weight = prepared.data
    dense = dequantize(weight.weight) if isinstance(weight, NVFP4Weight) else weight.weight
    total = torch.zeros((*x.shape[:-1], dense.shape[0]))
    for columns in reversed(torch.arange(x.shape[-1]).tensor_split(pieces)):
        total = total + x[..., columns].float() @ dense[:, columns].float().T
    return total.to(out_dtype or x.dtype)


def linear_by_rows(self: Any, x: Tensor, prepared: PreparedLinear, out_dtype: torch.dtype | None = None) -> Tensor:
    """The order over K depends on M."""
    del self
    return linear_in_pieces(x, prepared, out_dtype, 1 + x.reshape(-1, x.shape[-1]).shape[0] % 4)


def attention_by_batch(
    self: Any, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, *, scale: float, **_: Any
) -> Tensor:
    """Keys are reduced in as many splits as the batch has sequences."""
    del self
    splits = batch.context_len.shape[0]
    out = torch.empty_like(q)
    starts = batch.query_start.tolist()
    group = q.shape[1] // k_cache.shape[2]
    for s, length in enumerate(batch.context_len.tolist()):
        blocks = batch.block_table[s, : math.ceil(length / k_cache.shape[1])].long()
        k, v = (gather(c, blocks)[:length].float().repeat_interleave(group, dim=1) for c in (k_cache, v_cache))
        for row in range(starts[s], starts[s + 1]):
            seen = length - (starts[s + 1] - 1 - row)
            scores = (q[row].float() * k[:seen]).sum(-1) * scale  # [keys, H]
            weights = torch.exp(scores - scores.amax(0))
            top, bottom = torch.zeros(q.shape[1:]), torch.zeros(q.shape[1])
            for keys in torch.arange(seen).tensor_split(splits):
                top = top + (weights[keys, :, None] * v[keys]).sum(0)
                bottom = bottom + weights[keys].sum(0)
            out[row] = (top / bottom[:, None]).to(q.dtype)
    return out


def flip_a_bit_of_a_hit(original: Any) -> Any:
    """Wraps ``ModelRunner.run``: a sequence that begins behind a prefix hit finds one bit of its cache changed.

    As if the cached block had been computed in another chunking by kernels that care.
    """
    started: dict[Any, None] = {}

    def run(self: ModelRunner, step: Any) -> Tensor:
        for item in step:
            if item.sequence not in started and item.start > 0:
                block = self.caches[0].k[item.sequence.blocks[0]]
                block.view(torch.int16)[0, 0, 0] ^= 0x40  # the lowest bit of a bfloat16's exponent is 0x80
            started[item.sequence] = None
        result: Tensor = original(self, step)
        return result

    return run
