"""All layers of a decoder in one call of the extension: the ops and bits of the op-by-op loop, less its overhead.

A decode step of a small model is some three hundred ops; at 10 µs of Python and allocation each they cost more than the
weights do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anyfp4.backends.base import CachePair, DecoderPlan, FusedDecoder, LayerPlan, PreparedLinear
from anyfp4.backends.cpu_weights import CACHE_CODE, CODE, CpuLinear, inverse_scale
from anyfp4.errors import InvalidArgumentError
from anyfp4.ops.attention import AttentionBatch


def fuse(native: Any, plan: DecoderPlan) -> FusedDecoder | None:
    """The compiled layers, or None where a norm's dtype differs from the activations'."""
    code = CODE.get(plan.norm.dtype)
    norms = [plan.norm, *(t for layer in plan.layers for t in _norms(layer) if t is not None)]
    if code is None or any(t.dtype != plan.norm.dtype or not t.is_contiguous() for t in norms):
        return None
    return _CpuLayers(native, plan, code)


class _CpuLayers:
    """The extension's object, the tensors it reads, and the caches of the last call."""

    def __init__(self, native: Any, plan: DecoderPlan, code: int) -> None:
        self.plan, self.code, self.dtype = plan, code, plan.norm.dtype
        self.hidden = plan.norm.shape[0]
        self.cos_sin = plan.cos_sin.contiguous()
        self.stack = native.DecoderStack(
            code,
            self.hidden,
            plan.num_heads,
            plan.num_kv_heads,
            plan.head_dim,
            plan.eps,
            plan.norm.data_ptr(),
            self.cos_sin.data_ptr(),
            self.cos_sin.shape[0],
        )
        for index, layer in enumerate(plan.layers):
            norms = [0 if t is None else t.data_ptr() for t in _norms(layer)]
            projections = [_handles(p) for p in (layer.qkv, layer.o, layer.gate_up, layer.down)]
            scales = [
                plan.head_dim**-0.5 * layer.k_scale,
                layer.v_scale,
                inverse_scale(layer.k_scale),
                inverse_scale(layer.v_scale),
            ]
            if not self.stack.add_layer(norms, projections, scales, layer.sliding_window or 0):
                raise InvalidArgumentError(f"layer {index}: the projections' shapes do not fit the decoder's")
        self._caches: Sequence[CachePair] = ()
        self._addresses: list[int] = []

    def __call__(
        self, residual: Tensor, positions: Tensor, caches: Sequence[CachePair], batch: AttentionBatch
    ) -> Tensor:
        """See :class:`FusedDecoder`."""
        if residual.dtype != self.dtype or residual.dim() != 2 or residual.shape[1] != self.hidden:
            raise InvalidArgumentError(
                f"the embedded tokens must be {self.dtype} [T, {self.hidden}], got {residual.dtype} "
                f"{list(residual.shape)}"
            )
        tokens = residual.shape[0]
        for name, t in (("positions", positions), ("slots", batch.slots)):
            if t.dtype != torch.int64 or t.shape != (tokens,) or not t.is_cpu:
                raise InvalidArgumentError(f"{name} must be int64 [{tokens}] on the CPU, got {t.dtype} {list(t.shape)}")
        self._bind(caches)
        starts, lengths, table = check_batch(batch)
        blocks, block_size = caches[0].k.shape[:2]
        # the call overwrites its input
        work = residual.clone(memory_format=torch.contiguous_format)
        out = torch.empty_like(work)
        positions, slots = positions.contiguous(), batch.slots.contiguous()
        try:
            self.stack.run(
                work.data_ptr(),
                out.data_ptr(),
                tokens,
                positions.data_ptr(),
                slots.data_ptr(),
                starts.data_ptr(),
                lengths.data_ptr(),
                table.data_ptr(),
                table.stride(0),
                lengths.shape[0],
                table.shape[1],
                self._addresses,
                CACHE_CODE[caches[0].k.dtype],
                blocks,
                block_size,
            )
        except ValueError as error:
            raise InvalidArgumentError(str(error)) from error
        return out

    def _bind(self, caches: Sequence[CachePair]) -> None:
        """Checks the caches and takes their addresses, once for as long as they stay the same."""
        if len(caches) == len(self._caches) and all(a is b for a, b in zip(caches, self._caches, strict=True)):
            return
        plan = self.plan
        if len(caches) != len(plan.layers) or not caches:
            raise InvalidArgumentError(f"{len(caches)} caches for {len(plan.layers)} layers")
        first = caches[0].k
        for pair in caches:
            for t in (pair.k, pair.v):
                if (
                    t.dtype not in CACHE_CODE
                    or t.dtype != first.dtype
                    or t.shape != first.shape
                    or t.dim() != 4
                    or t.shape[2:] != (plan.num_kv_heads, plan.head_dim)
                    or not (t.is_contiguous() and t.is_cpu)
                ):
                    raise InvalidArgumentError(
                        f"caches must be alike, contiguous, on the CPU and [blocks, block_size, {plan.num_kv_heads}, "
                        f"{plan.head_dim}], got {t.dtype} {list(t.shape)}"
                    )
        self._addresses = [t.data_ptr() for pair in caches for t in (pair.k, pair.v)]
        self._caches = tuple(caches)


def _norms(layer: LayerPlan) -> tuple[Tensor | None, ...]:
    return layer.input_norm, layer.post_attention_norm, layer.q_norm, layer.k_norm


def _handles(parts: Sequence[PreparedLinear]) -> list[Any]:
    found = []
    for part in parts:
        assert isinstance(part.data, CpuLinear)
        found.append(part.data.handle)
    return found


def check_batch(batch: AttentionBatch) -> tuple[Tensor, Tensor, Tensor]:
    """query_start, context_len and block_table, checked and with unit strides."""
    starts, lengths, table = batch.query_start, batch.context_len, batch.block_table
    for name, t, dim in (("query_start", starts, 1), ("context_len", lengths, 1), ("block_table", table, 2)):
        if t.dtype != torch.int32 or t.dim() != dim or not t.is_cpu:
            raise InvalidArgumentError(f"{name} must be int32 of {dim} axes on the CPU, got {t.dtype} {list(t.shape)}")
    if starts.shape[0] != lengths.shape[0] + 1 or table.shape[0] != lengths.shape[0]:
        raise InvalidArgumentError(
            f"query_start {list(starts.shape)}, context_len {list(lengths.shape)} and block_table "
            f"{list(table.shape)} must be [S + 1], [S] and [S, B]"
        )
    if table.stride(1) != 1 and table.shape[1] > 1:
        table = table.contiguous()
    return starts.contiguous(), lengths.contiguous(), table
