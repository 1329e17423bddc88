"""The compiled CPU backend: every op of the decoder in C++, bit for bit as the reference, for both numerics.

A call passes addresses and sizes to the extension, so this module checks all shapes, dtypes, devices and strides
first. A decoder's layers usually run as one call (``cpu_layers``).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from anyfp4 import envs
from anyfp4.backends import cpu_layers
from anyfp4.backends.base import Backend, DecoderPlan, FusedDecoder, PreparedLinear
from anyfp4.backends.cpu_layers import check_batch
from anyfp4.backends.cpu_weights import CACHE_CODE, CODE, FP8, inverse_scale, matrices, prepare
from anyfp4.device import processors
from anyfp4.errors import BackendError, InvalidArgumentError
from anyfp4.formats.weights import LinearWeight
from anyfp4.ops.attention import AttentionBatch

_MODULE = "anyfp4.kernels.cpu._native"


class CpuBackend(Backend):
    """Compiled kernels for x86-64 and, in portable C++, any other processor."""

    name = "cpu"
    description = "compiled C++ kernels, exact at the speed of memory"

    def why_not(
        self, device: torch.device, shape: tuple[int, int] | None = None, numerics: str = "native"
    ) -> str | None:
        """See :meth:`Backend.why_not`."""
        if device.type != "cpu":
            return f"does not run on {device.type} devices"
        return None if isinstance(self._found, ModuleType) else self._found

    @cached_property
    def _found(self) -> ModuleType | str:
        """The extension, set up as the environment says, or why there is none."""
        try:
            native = importlib.import_module(_MODULE)
        except ImportError as error:
            return (
                f"the extension {_MODULE} is not there ({error}): anyfp4 was installed without a C++ compiler; "
                "install GCC or Clang and reinstall it"
            )
        environment = envs.read()
        if not native.select_isa(environment.cpu_isa):
            raise BackendError(
                f"ANYFP4_CPU_ISA={environment.cpu_isa}: this processor or build has only "
                + ", ".join(native.available_isas())
            )
        native.set_threads(environment.num_threads or processors())
        # torch's conversion of NaN to bfloat16 differs by platform, and its result is what the reference gives
        nan = torch.full((64,), torch.nan).to(torch.bfloat16)
        native.set_bf16_nan(int(nan.view(torch.int16)[0]) & 0xFFFF)
        return native

    @cached_property
    def native(self) -> Any:
        """The extension module.

        Raises:
            BackendError: it is not there.
        """
        if isinstance(self._found, str):
            raise BackendError(f"backend 'cpu' cannot run here: {self._found}")
        return self._found

    def prepare(self, weight: LinearWeight, numerics: str = "native") -> PreparedLinear:
        """See :meth:`Backend.prepare`. W4A4 weights are copied, others kept as they are."""
        if weight.weight.device.type != "cpu":
            raise InvalidArgumentError(f"the weight lies on {weight.weight.device}, not on the CPU")
        if numerics not in envs.NUMERICS:
            raise InvalidArgumentError(f"numerics must be 'native' or 'blackwell', got {numerics!r}")
        data = prepare(self.native, weight)
        nbytes = data.handle.nbytes + sum(t.nbytes for t in data.tensors)
        return PreparedLinear(self.name, weight.shape, numerics, nbytes, data)

    def matrices(self, prepared: PreparedLinear) -> tuple[Tensor, ...]:
        """See :meth:`Backend.matrices`."""
        return matrices(prepared.data, prepared.shape)

    def fuse(self, plan: DecoderPlan) -> FusedDecoder | None:
        """See :meth:`Backend.fuse`."""
        # a subclass may have changed a single op, which the compiled layers would not notice
        return cpu_layers.fuse(self.native, plan) if type(self) is CpuBackend else None

    def linear(self, x: Tensor, prepared: PreparedLinear, out_dtype: torch.dtype | None = None) -> Tensor:
        """See :func:`anyfp4.ops.linear.linear`."""
        n, k = prepared.shape
        shape = x.shape
        code = CODE.get(x.dtype)
        if code is None or not shape or shape[-1] != k or not x.is_cpu:
            raise InvalidArgumentError(
                f"x must be bfloat16, float16 or float32 [..., {k}] on the CPU, got {x.dtype} {list(shape)} "
                f"on {x.device}"
            )
        out_dtype = out_dtype or x.dtype
        out_code = CODE.get(out_dtype)
        if out_code is None:
            raise InvalidArgumentError(f"out_dtype must be bfloat16, float16 or float32, got {out_dtype}")
        x = x.contiguous()
        out = torch.empty((*shape[:-1], n), dtype=out_dtype)
        prepared.data.handle.run(x.data_ptr(), x.numel() // k, code, out.data_ptr(), out_code)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See :func:`anyfp4.ops.norm.rms_norm`."""
        code, weight_code, k = self._check_norm(x, weight)
        x = x.contiguous()
        y = torch.empty_like(x)
        self.native.rms_norm(
            x.data_ptr(), 0, 0, weight.data_ptr(), weight_code, y.data_ptr(), x.numel() // k, k, code, eps
        )
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See :func:`anyfp4.ops.norm.add_rms_norm`."""
        code, weight_code, k = self._check_norm(x, weight)
        if x.shape != residual.shape or x.dtype != residual.dtype or not residual.is_cpu:
            raise InvalidArgumentError(
                f"x {x.dtype} {list(x.shape)} and residual {residual.dtype} {list(residual.shape)} must be alike"
            )
        x, residual = x.contiguous(), residual.contiguous()
        y, total = torch.empty_like(x), torch.empty_like(x)
        self.native.rms_norm(
            x.data_ptr(),
            residual.data_ptr(),
            total.data_ptr(),
            weight.data_ptr(),
            weight_code,
            y.data_ptr(),
            x.numel() // k,
            k,
            code,
            eps,
        )
        return y, total

    @staticmethod
    def _check_norm(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
        code, weight_code = CODE.get(x.dtype), CODE.get(weight.dtype)
        if (
            code is None
            or weight_code is None
            or weight.dim() != 1
            or weight.shape != x.shape[-1:]
            or weight.shape[0] == 0
            or not (weight.is_contiguous() and x.is_cpu and weight.is_cpu)
        ):
            raise InvalidArgumentError(
                f"x {x.dtype} {list(x.shape)} and weight {weight.dtype} {list(weight.shape)} must be floats of 16 or "
                "32 bits on the CPU, [..., K] and contiguous [K]"
            )
        return code, weight_code, weight.shape[0]

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See :func:`anyfp4.ops.activation.silu_mul`."""
        code, shape = CODE.get(gate_up.dtype), gate_up.shape
        if code is None or not shape or shape[-1] % 2 or not gate_up.is_cpu:
            raise InvalidArgumentError(
                f"gate_up must be a float [..., even] on the CPU, got {gate_up.dtype} {list(shape)}"
            )
        width = shape[-1] // 2
        gate_up = gate_up.contiguous()
        y = torch.empty((*shape[:-1], width), dtype=gate_up.dtype)
        if width:
            rows = gate_up.numel() // (2 * width)
            self.native.silu_mul(gate_up.data_ptr(), y.data_ptr(), rows, width, code)
        return y

    def apply_rope(self, x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
        """See :func:`anyfp4.ops.rope.apply_rope`."""
        code, half = CODE.get(x.dtype), cos_sin.shape[-1]
        if code is None or x.dim() != 3 or x.shape[2] != 2 * half or positions.shape != x.shape[:1] or not x.is_cpu:
            raise InvalidArgumentError(
                f"x {x.dtype} {list(x.shape)} must be [T, H, {2 * half}] and positions {list(positions.shape)} [T]"
            )
        if (
            cos_sin.dtype != torch.float32
            or cos_sin.dim() != 3
            or cos_sin.shape[1] != 2
            or positions.dtype != torch.int64
            or not (cos_sin.is_cpu and positions.is_cpu)
        ):
            raise InvalidArgumentError(
                f"cos_sin must be float32 [P, 2, D/2] and positions int64, got {cos_sin.dtype} "
                f"{list(cos_sin.shape)} and {positions.dtype}"
            )
        tokens, heads, dim = x.shape
        x, stride = _token_stride(x)
        cos_sin, positions = cos_sin.contiguous(), positions.contiguous()
        y = torch.empty((tokens, heads, dim), dtype=x.dtype)
        limit = cos_sin.shape[0]
        if not self.native.rope(
            x.data_ptr(),
            stride,
            y.data_ptr(),
            positions.data_ptr(),
            limit,
            cos_sin.data_ptr(),
            tokens,
            heads,
            half,
            code,
        ):
            raise InvalidArgumentError(f"positions must lie in 0…{limit - 1}, got {positions.tolist()}")
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
        if slots.dtype != torch.int64 or slots.dim() != 1 or not slots.is_cpu:
            raise InvalidArgumentError(f"slots must be int64 [T], got {slots.dtype} {list(slots.shape)}")
        slots = slots.contiguous()
        for new, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
            code, cache_code = CODE.get(new.dtype), CACHE_CODE.get(cache.dtype)
            if (
                code is None
                or cache_code is None
                or new.dim() != 3
                or cache.dim() != 4
                or new.shape[1:] != cache.shape[2:]
                or new.shape[0] != slots.shape[0]
                or not (cache.is_contiguous() and cache.is_cpu and new.is_cpu)
            ):
                raise InvalidArgumentError(
                    f"{new.dtype} {list(new.shape)} with {slots.shape[0]} slots does not fit the cache {cache.dtype} "
                    f"{list(cache.shape)} (contiguous, on the CPU)"
                )
            tokens, heads, dim = new.shape
            rows, stride = _token_stride(new)
            inverse = inverse_scale(scale) if cache_code == FP8 else 1.0
            if not self.native.write_cache(
                rows.data_ptr(),
                stride,
                code,
                cache.data_ptr(),
                cache_code,
                slots.data_ptr(),
                cache.shape[0] * cache.shape[1],
                tokens,
                heads * dim,
                inverse,
            ):
                raise InvalidArgumentError(
                    f"slots must lie in 0…{cache.shape[0] * cache.shape[1] - 1}, got {slots.tolist()}"
                )

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
        code, cache_code = CODE.get(q.dtype), CACHE_CODE.get(k_cache.dtype)
        if (
            code is None
            or cache_code is None
            or q.dim() != 3
            or k_cache.dim() != 4
            or q.shape[2] != k_cache.shape[3]
            or k_cache.shape != v_cache.shape
            or k_cache.dtype != v_cache.dtype
            or q.shape[1] % k_cache.shape[2]
            or not (k_cache.is_contiguous() and v_cache.is_contiguous())
            or not (q.is_cpu and k_cache.is_cpu and v_cache.is_cpu)
        ):
            raise InvalidArgumentError(
                f"q {q.dtype} {list(q.shape)} does not fit caches {k_cache.dtype} {list(k_cache.shape)} and "
                f"{v_cache.dtype} {list(v_cache.shape)} (contiguous, on the CPU)"
            )
        if sliding_window is not None and sliding_window < 1:
            raise InvalidArgumentError(f"sliding_window must be at least 1, got {sliding_window}")
        tokens, heads, dim = q.shape
        q, stride = _token_stride(q)
        starts, lengths, table = check_batch(batch)
        out = torch.empty((tokens, heads, dim), dtype=q.dtype)
        blocks, block_size, kv_heads, _ = k_cache.shape
        try:
            self.native.attention(
                q.data_ptr(),
                stride,
                out.data_ptr(),
                k_cache.data_ptr(),
                v_cache.data_ptr(),
                code,
                cache_code,
                tokens,
                heads,
                kv_heads,
                dim,
                blocks,
                block_size,
                starts.data_ptr(),
                lengths.data_ptr(),
                table.data_ptr(),
                table.stride(0),
                lengths.shape[0],
                table.shape[1],
                scale * k_scale,
                v_scale,
                sliding_window or 0,
            )
        except ValueError as error:
            raise InvalidArgumentError(str(error)) from error
        return out

    def set_threads(self, count: int) -> None:
        """See :meth:`Backend.set_threads`."""
        self.native.set_threads(count)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """See :meth:`Backend.quiet`. torch's threads spin for milliseconds after use, on the cores that ours need."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def log_softmax(self, logits: Tensor) -> Tensor:
        """See :func:`anyfp4.ops.sampling.log_softmax`."""
        if logits.dtype != torch.float32 or not logits.dim() or not logits.shape[-1] or not logits.is_cpu:
            raise InvalidArgumentError(
                f"logits must be float32 [..., V] on the CPU, got {logits.dtype} {list(logits.shape)}"
            )
        logits = logits.contiguous()
        out = torch.empty_like(logits)
        n = logits.shape[-1]
        self.native.log_softmax(logits.data_ptr(), out.data_ptr(), logits.numel() // n, n)
        return out


def _token_stride(x: Tensor) -> tuple[Tensor, int]:
    """[T, H, D] with heads side by side, and the elements from token to token; a view if it can be."""
    _, heads, dim = x.shape
    strides = x.stride()
    if strides[2] == 1 and (strides[1] == dim or heads == 1):
        return x, strides[0]
    return x.contiguous(), heads * dim
