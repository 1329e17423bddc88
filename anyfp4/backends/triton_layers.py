"""All layers of a decoder through fused kernels: the ops and bits of the op-by-op loop, fewer launches and bytes.

A layer is, where its linear layers are W4A4: norm with quantization, q/k/v, norm of q and k with rotation and cache
write, attention with quantization (two launches for prompts), output projection, norm with quantization, gate/up,
silu × up with quantization, down: nine launches in place of seventeen, and the activation between an op and its
quantization is never written. Other kinds of linear layer take the plain ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyfp4.backends.base import CachePair, DecoderPlan, LayerPlan, PreparedLinear
from anyfp4.backends.triton_weights import kernel
from anyfp4.ops.attention import AttentionBatch

if TYPE_CHECKING:
    from anyfp4.backends.triton import TritonBackend


class TritonLayers:
    """Implements :class:`anyfp4.backends.base.FusedDecoder`; nothing in a call waits for the GPU or copies from it."""

    def __init__(self, backend: TritonBackend, plan: DecoderPlan) -> None:
        self.backend, self.plan = backend, plan
        self.layers = [_Layer(backend, layer, plan) for layer in plan.layers]

    def __call__(
        self, residual: Tensor, positions: Tensor, caches: Sequence[CachePair], batch: AttentionBatch
    ) -> Tensor:
        """See :class:`anyfp4.backends.base.FusedDecoder`."""
        update: Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=True):
            update, residual = layer(update, residual, positions, cache, batch)
        if update is None:
            return self.backend.rms_norm(residual, self.plan.norm, self.plan.eps)
        return self.backend.add_rms_norm(update, residual, self.plan.norm, self.plan.eps)[0]


class _Layer:
    def __init__(self, backend: TritonBackend, layer: LayerPlan, plan: DecoderPlan) -> None:
        self.backend, self.layer, self.plan = backend, layer, plan
        self.qkv, self.o, self.gate_up, self.down = (
            _Projection(backend, parts) for parts in (layer.qkv, layer.o, layer.gate_up, layer.down)
        )

    def __call__(
        self, update: Tensor | None, residual: Tensor, positions: Tensor, cache: CachePair, batch: AttentionBatch
    ) -> tuple[Tensor, Tensor]:
        """What the layer adds to the residual stream, and the stream before that: [T, hidden] each."""
        plan, layer = self.plan, self.layer
        qkv, residual = self.qkv.of_norm(update, residual, layer.input_norm, plan.eps)
        update = self.o.of_attention(*self._attention(qkv, positions, cache, batch))
        del qkv  # names keep memory: what is not needed any more makes room for the widest op, which comes last
        gate_up, residual = self.gate_up.of_norm(update, residual, layer.post_attention_norm, plan.eps)
        del update
        return self.down.of_gate_up(gate_up), residual

    def _attention(
        self, qkv: Tensor, positions: Tensor, cache: CachePair, batch: AttentionBatch
    ) -> tuple[tuple[Tensor, Tensor, Tensor, AttentionBatch], dict[str, Any]]:
        """Writes keys and values; arguments of attention."""
        plan, layer = self.plan, self.layer
        q = kernel("rope").rope_and_write(
            qkv.view(qkv.shape[0], plan.num_heads + 2 * plan.num_kv_heads, plan.head_dim), positions, plan.cos_sin,
            cache.k, cache.v, batch.slots, q_norm=layer.q_norm, k_norm=layer.k_norm, eps=plan.eps,
            k_scale=layer.k_scale, v_scale=layer.v_scale,
        )  # fmt: skip
        options = {
            "scale": plan.head_dim**-0.5, "sliding_window": layer.sliding_window, "k_scale": layer.k_scale,
            "v_scale": layer.v_scale,
        }  # fmt: skip
        return (q, cache.k, cache.v, batch), options


class _Projection:
    """A linear layer's parts, and how its input is quantized, if a fused kernel can do that."""

    def __init__(self, backend: TritonBackend, parts: Sequence[PreparedLinear]) -> None:
        self.backend, self.parts = backend, parts
        self.inputs = backend.quantized_inputs(parts[0]) if len(parts) == 1 else None

    def of_norm(self, update: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The projection of the norm of ``update + residual``, and that sum."""
        if self.inputs is None:
            if update is None:
                return self(self.backend.rms_norm(residual, weight, eps)), residual
            x, residual = self.backend.add_rms_norm(update, residual, weight, eps)
            return self(x), residual
        x, stream = (residual, None) if update is None else (update, residual)
        values, scale, residual = kernel("fused").norm_quantize(x, stream, weight, eps, *self._quantization(x.dtype))
        return self.backend.quantized_linear(values, scale, self.parts[0], x.dtype), residual

    def of_gate_up(self, gate_up: Tensor) -> Tensor:
        """The projection of silu(gate) × up."""
        if self.inputs is None:
            return self(self.backend.silu_mul(gate_up))
        values, scale = kernel("fused").silu_mul_quantize(gate_up, *self._quantization(gate_up.dtype))
        return self.backend.quantized_linear(values, scale, self.parts[0], gate_up.dtype)

    def of_attention(self, arguments: tuple[Tensor, Tensor, Tensor, AttentionBatch], options: dict[str, Any]) -> Tensor:
        """The projection of what attention gives for these arguments."""
        q, k_cache, _, batch = arguments
        attention = kernel("attention")
        # a program with many rows has no registers left to quantize them
        if self.inputs is None or q.shape[2] % 16 or not attention.few_rows(q, k_cache, batch):
            return self(self.backend.attention(*arguments, **options).view(q.shape[0], -1))
        values, scale = attention.attention_quantize(*arguments, *self._quantization(q.dtype), **options)
        return self.backend.quantized_linear(values, scale, self.parts[0], q.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        outputs = [self.backend.linear(x, part) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _quantization(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, torch.dtype, torch.dtype]:
        """Arguments of a kernel that quantizes an activation of this type."""
        inputs = self.inputs
        assert inputs is not None
        pre = None if inputs.pre_quant_scale is None else inputs.pre_quant_scale.to(dtype)
        return inputs.inverse_scales, pre, inputs.values_dtype, inputs.scales_dtype
