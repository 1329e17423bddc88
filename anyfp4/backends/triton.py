"""The Triton backend: NVIDIA GPUs from Ampere on, and AMD's gfx942, gfx950 and gfx12.

Products use the device's matrix units; every tile shape keeps one order over K (``kernels/triton/layout.py``), so the
number of tokens never shows in the bits. With numerics="blackwell" W4A4 products have the CPU's bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from anyfp4 import envs
from anyfp4.backends import triton_weights
from anyfp4.backends.base import Backend, DecoderPlan, FusedDecoder, PreparedLinear
from anyfp4.backends.triton_layers import TritonLayers
from anyfp4.backends.triton_weights import TritonDense, TritonFP8, TritonFP8Blocks, TritonNVFP4, kernel
from anyfp4.device import architecture
from anyfp4.errors import InvalidArgumentError
from anyfp4.formats.weights import FP8Weight, LinearWeight, NVFP4Weight
from anyfp4.ops.attention import AttentionBatch
from anyfp4.ops.chosen import Chosen
from anyfp4.ops.linear import ACTIVATION_DTYPES
from anyfp4.ops.sampling import Choice

_HALVES = (torch.float16, torch.bfloat16)
#: where all kernels of a product keep one order over K. With ``mma.sync`` and ``v_mfma`` the compiler permutes K within
#: a step, by how an operand came to be, so that there one kernel serves all.
_ONE_ORDER = ("sm_90", "sm_100", "sm_103")
#: AMD's compiler may choose the instruction, and so K's grouping, by the tile's shape: one shape serves all
_HIP_TOKENS = 64
#: what ``triton_layers`` does without calling it
_FUSED_OPS = ("linear", "rms_norm", "add_rms_norm", "silu_mul", "apply_rope", "write_kv", "attention")


class TritonBackend(Backend):
    """Kernels in Triton for NVIDIA and AMD GPUs."""

    name = "triton"
    description = "Triton kernels for NVIDIA (from Ampere on) and AMD GPUs"

    def why_not(
        self, device: torch.device, shape: tuple[int, int] | None = None, numerics: str = "native"
    ) -> str | None:
        """See :meth:`Backend.why_not`."""
        del shape, numerics
        if device.type != "cuda":
            return f"does not run on {device.type} devices"
        if not torch.cuda.is_available():
            return "torch sees no GPU"
        if find_spec("triton") is None:
            return "Triton is not installed"
        arch = architecture(device)
        if arch.startswith("sm_"):
            return None if int(arch.removeprefix("sm_")) >= 80 else f"needs sm_80 or newer, this is {arch}"
        known = arch in ("gfx942", "gfx950") or arch.startswith("gfx12")
        return None if known else f"needs gfx942, gfx950 or gfx12, this is {arch}"

    def prepare(self, weight: LinearWeight, numerics: str = "native") -> PreparedLinear:
        """See :meth:`Backend.prepare`. NVFP4 and FP8 weights are repacked, dense ones kept."""
        if numerics not in envs.NUMERICS:
            raise InvalidArgumentError(f"numerics must be 'native' or 'blackwell', got {numerics!r}")
        # what CUDA graphs will use cannot be allocated while one is captured
        kernel("workspace").reserve(weight.weight.device)
        data: TritonNVFP4 | TritonFP8 | TritonFP8Blocks | TritonDense
        if isinstance(weight, NVFP4Weight):
            data = triton_weights.prepare_nvfp4(weight, numerics)
        elif isinstance(weight, FP8Weight):
            data = triton_weights.prepare_fp8(weight)
        else:
            data = triton_weights.prepare_dense(weight)
        return PreparedLinear(self.name, weight.shape, numerics, triton_weights.nbytes(data), data)

    def matrices(self, prepared: PreparedLinear) -> tuple[Tensor, ...]:
        """See :meth:`Backend.matrices`."""
        return triton_weights.matrices(prepared.data)

    def workspace_nbytes(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """See :meth:`Backend.workspace_nbytes`: a weight dequantized, states of attention's tiles, sums over K."""
        n, k = shape
        elements = n * k if dtype == torch.float32 else min(n * k, kernel("gemm").WORKSPACE)
        # the sums of a stream, and those of graphs
        sums = 2 * int(kernel("workspace").NBYTES)
        return max(elements * dtype.itemsize, int(kernel("attention").MAX_SCRATCH)) + sums

    def linear(self, x: Tensor, prepared: PreparedLinear, out_dtype: torch.dtype | None = None) -> Tensor:
        """See :func:`anyfp4.ops.linear.linear`."""
        n, k = prepared.shape
        data = prepared.data
        if x.dtype not in ACTIVATION_DTYPES or x.dim() < 1 or x.shape[-1] != k:
            raise InvalidArgumentError(
                f"x must be bfloat16, float16 or float32 [..., {k}], got {x.dtype} {list(x.shape)}"
            )
        out_dtype = out_dtype or x.dtype
        if out_dtype not in ACTIVATION_DTYPES:
            raise InvalidArgumentError(f"out_dtype must be bfloat16, float16 or float32, got {out_dtype}")
        rows = x.reshape(-1, k)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        if isinstance(data, TritonNVFP4):
            y = self._nvfp4(rows, prepared, out_dtype)
        elif isinstance(data, TritonFP8):
            y = self._fp8(rows, data, out_dtype)
        elif isinstance(data, TritonFP8Blocks):
            y = self._fp8_blocks(rows, data, out_dtype)
        else:
            y = self._dense(rows.contiguous(), data, out_dtype)
        return y.view(*x.shape[:-1], n)

    def fuse(self, plan: DecoderPlan) -> FusedDecoder | None:
        """See :meth:`Backend.fuse`. None for a subclass that changes an op which the fused kernels contain."""
        inherited = all(getattr(type(self), op) is getattr(TritonBackend, op) for op in _FUSED_OPS)
        return TritonLayers(self, plan) if inherited else None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See :func:`anyfp4.ops.norm.rms_norm`."""
        y: Tensor = kernel("norm").rms_norm(x, weight, eps)
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See :func:`anyfp4.ops.norm.add_rms_norm`."""
        y, total = kernel("norm").add_rms_norm(x, residual, weight, eps)
        return y, total

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See :func:`anyfp4.ops.activation.silu_mul`."""
        y: Tensor = kernel("activation").silu_mul(gate_up)
        return y

    def apply_rope(self, x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
        """See :func:`anyfp4.ops.rope.apply_rope`."""
        y: Tensor = kernel("rope").apply_rope(x, positions, cos_sin)
        return y

    def write_kv(
        self,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        """See :func:`anyfp4.ops.attention.write_kv`."""
        kernel("kv_cache").write_kv(k, v, k_cache, v_cache, slots, k_scale, v_scale)

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        sliding_window: int | None = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> Tensor:
        """See :func:`anyfp4.ops.attention.attention`."""
        options = {"scale": scale, "sliding_window": sliding_window, "k_scale": k_scale, "v_scale": v_scale}
        y: Tensor = kernel("attention").attention(q, k_cache, v_cache, batch, **options)
        return y

    def log_softmax(self, logits: Tensor) -> Tensor:
        """See :func:`anyfp4.ops.sampling.log_softmax`."""
        y: Tensor = kernel("softmax").log_softmax(logits)
        return y

    def greedy(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Backend.greedy`."""
        ids, values = kernel("softmax").greedy(logits)
        return ids, values

    def sample(self, logits: Tensor, choices: Sequence[Choice], best: tuple[Tensor, Tensor] | None = None) -> list[int]:
        """See :meth:`Backend.sample`."""
        tokens: list[int] = kernel("sampling").sample(logits, choices, best)
        return tokens

    def choose(self, logits: Tensor, choices: Sequence[Choice], best: tuple[Tensor, Tensor] | None = None) -> Chosen:
        """See :meth:`Backend.choose`."""
        chosen: Chosen = kernel("sampling").choose(logits, choices, best)
        return chosen

    def quantized_inputs(self, prepared: PreparedLinear) -> TritonNVFP4 | None:
        """How the input of a W4A4 layer is to be quantized for :meth:`quantized_linear`; None for other layers."""
        data = prepared.data
        return data if isinstance(data, TritonNVFP4) and data.inverse_scales.numel() else None

    def quantized_linear(
        self, values: Tensor, scale: Tensor, prepared: PreparedLinear, out_dtype: torch.dtype
    ) -> Tensor:
        """The product of a W4A4 layer with a quantized activation.

        Args:
            values: float16 [Q, M, K], code × block_scale for each of the layer's Q input scales.
            scale: uint8 [Q, M, K/16], the block scales. Both in the types that the layer asks for.
            prepared: a layer with :meth:`quantized_inputs`.
            out_dtype: of the result.

        Returns:
            [M, N].
        """
        if prepared.numerics == "blackwell":
            y: Tensor = kernel("linear_blackwell").blackwell_linear(values, scale, prepared.data.packed, out_dtype)
            return y
        return self._packed(values, prepared.data.packed, out_dtype, None)

    def _nvfp4(self, x: Tensor, prepared: PreparedLinear, out_dtype: torch.dtype) -> Tensor:
        data = prepared.data
        pre = None if data.pre_quant_scale is None else data.pre_quant_scale.to(x.dtype)
        if not data.inverse_scales.numel():
            x = x if pre is None else x * pre
            return self._packed(x.contiguous().unsqueeze(0), data.packed, out_dtype, None)
        values, scale = kernel("quantize").quantize_values(x, data.inverse_scales, pre)
        return self.quantized_linear(values, scale, prepared, out_dtype)

    def _fp8(self, x: Tensor, data: TritonFP8, out_dtype: torch.dtype) -> Tensor:
        if data.weight_only:
            return self._packed(x.contiguous().unsqueeze(0), data.packed, out_dtype, None)
        values, scale = kernel("quantize_fp8").quantize_fp8(x, data.input_scale)
        return self._packed(values.unsqueeze(0), data.packed, out_dtype, scale)

    def _fp8_blocks(self, x: Tensor, data: TritonFP8Blocks, out_dtype: torch.dtype) -> Tensor:
        linear, packed = kernel("linear_fp8_block"), data.packed
        work = self._few(x, packed.words.shape[1])
        y: Tensor
        if not data.weight_only:
            y = linear.fp8_block_linear(*kernel("quantize_fp8").quantize_fp8_blocks(x), packed, out_dtype, work)
        elif x.dtype == torch.float32:
            w = linear.dequantize(packed)
            y = kernel("linear_dense").dense_linear(x.contiguous(), w, packed.alpha, packed.bias, out_dtype)
        else:
            y = linear.fp8_block_linear(x.contiguous(), None, packed, out_dtype, work)
        return y

    def _packed(self, x: Tensor, packed: Any, out_dtype: torch.dtype, row: Tensor | None) -> Tensor:
        _, m, k = x.shape
        n = packed.alpha.shape[0]
        gemm, y = kernel("gemm"), None
        if x.dtype == torch.float32:
            w = gemm.dequantize(packed, 0, n, torch.float32)
            y = kernel("linear_dense").dense_linear(x[0], w, packed.alpha, packed.bias, out_dtype)
        elif self._one_order(x) and k % 8 == 0:
            work = kernel("division").packed(n, k, m, gemm.multiprocessors(x.device))
            if work is None:
                y = gemm.packed_gemm(x, packed, out_dtype, row)
        else:
            work = self._few(x[0], n)
        if y is None:
            y = kernel("linear_packed").packed_linear(x, packed, out_dtype, row, work)
        result: Tensor = y
        return result

    def _dense(self, x: Tensor, data: TritonDense, out_dtype: torch.dtype) -> Tensor:
        y: Tensor
        halves = x.dtype == data.weight.dtype and x.dtype in _HALVES
        if halves and x.shape[0] > 64 and x.shape[1] % 8 == 0 and self._one_order(x):
            y = kernel("gemm").dense_gemm(x.unsqueeze(0), data.weight, data.tiles, data.alpha, data.bias, out_dtype)
        else:
            work = self._few(x, data.weight.shape[0])
            y = kernel("linear_dense").dense_linear(x, data.weight, data.alpha, data.bias, out_dtype, work)
        return y

    @staticmethod
    def _few(x: Tensor, n: int) -> Any:
        """How to divide the work of a kernel for few tokens."""
        m, k = x.shape
        return kernel("division").few(n, k, m, _HIP_TOKENS if torch.version.hip else None)

    @staticmethod
    def _one_order(x: Tensor) -> bool:
        return x.device.type == "cuda" and architecture(x.device) in _ONE_ORDER
