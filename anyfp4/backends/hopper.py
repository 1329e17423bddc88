"""The Hopper backend: NVFP4 and dense layers through CUDA C++ on sm_90, everything else as the Triton backend.

One copy of a weight (``kernels/hopper/layout.py``) serves few tokens and many. Products keep the Triton backend's order
over K and so its bits. The kernels are compiled by NVRTC when they are first used.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from anyfp4.backends import triton_weights
from anyfp4.backends.base import PreparedLinear
from anyfp4.backends.triton import TritonBackend
from anyfp4.backends.triton_weights import TritonDense, TritonNVFP4
from anyfp4.device import architecture
from anyfp4.formats.weights import DenseWeight, LinearWeight, NVFP4Weight

#: up to so many tokens the kernel that has as many blocks as it can is faster, beyond so many the one of large tiles
_FEW, _MANY = 64, 256
_HALVES = (torch.bfloat16, torch.float16)

#: side by side in any plan
MOST_ROW_TILES = 7


class _Bfloat16Values(TritonNVFP4):
    @property
    def values_dtype(self) -> torch.dtype:
        """The kernels multiply in bfloat16."""
        return torch.bfloat16


@dataclass(frozen=True, eq=False)
class HopperNVFP4(_Bfloat16Values):
    """An NVFP4 layer; ``packed`` is ``kernels.hopper.linear.Records``."""


@dataclass(frozen=True, eq=False)
class HopperBlackwell(_Bfloat16Values):
    """An NVFP4 layer for numerics="blackwell"; ``packed`` is ``kernels.hopper.blackwell.BlackwellRecords``."""

    @property
    def scales_dtype(self) -> torch.dtype:
        """Block scales and norms, see ``kernels.hopper.quantize.quantize_blocks``."""
        return torch.int16


@dataclass(frozen=True, eq=False)
class HopperDense(TritonDense):
    """An unquantized layer; ``runs`` is ``kernels.hopper.runs.Runs``."""

    runs: Any


class HopperBackend(TritonBackend):
    """Kernels in CUDA C++ for H100 and H200."""

    name = "hopper"
    description = "CUDA C++ kernels for NVFP4 on H100 and H200 (sm_90), otherwise as triton"

    def why_not(
        self, device: torch.device, shape: tuple[int, int] | None = None, numerics: str = "native"
    ) -> str | None:
        """See :meth:`Backend.why_not`."""
        reason = super().why_not(device, shape, numerics)
        if reason is not None:
            return reason
        if architecture(device) != "sm_90":
            return f"needs sm_90 (H100, H200), this is {architecture(device)}"
        if _kernel("compiler").find_nvrtc() is None:
            return "libnvrtc was not found (package nvidia-cuda-nvrtc)"
        why_no_driver: str | None = _kernel("runtime").why_no_driver()
        return why_no_driver

    def prepare(self, weight: LinearWeight, numerics: str = "native") -> PreparedLinear:
        """See :meth:`Backend.prepare`."""
        if isinstance(weight, DenseWeight) and weight.weight.dtype in _HALVES:
            dense = prepare_dense(weight)
            return PreparedLinear(self.name, weight.shape, numerics, triton_weights.nbytes(dense), dense)
        if not isinstance(weight, NVFP4Weight) or numerics not in ("native", "blackwell"):
            return super().prepare(weight, numerics)
        data = prepare_nvfp4(weight) if numerics == "native" or weight.weight_only else prepare_blackwell(weight)
        return PreparedLinear(self.name, weight.shape, numerics, triton_weights.nbytes(data), data)

    def matrices(self, prepared: PreparedLinear) -> tuple[Tensor, ...]:
        """See :meth:`Backend.matrices`."""
        data = prepared.data
        if isinstance(data, HopperNVFP4):
            records = data.packed
        elif isinstance(data, HopperBlackwell):
            records = data.packed.records
        else:
            return super().matrices(prepared)
        triton_weights.require_numbers(records.alpha)
        packed, scale = _kernel("layout").unpack(records.records, records.k, [rows for rows, _ in records.runs])
        return packed, scale.view(torch.float8_e4m3fn)

    def quantized_linear(
        self, values: Tensor, scale: Tensor, prepared: PreparedLinear, out_dtype: torch.dtype
    ) -> Tensor:
        """See :meth:`TritonBackend.quantized_linear`."""
        data = prepared.data
        if isinstance(data, HopperBlackwell):
            y: Tensor = _kernel("blackwell").linear(values, scale, data.packed, out_dtype)
            return y
        if not isinstance(data, HopperNVFP4):
            return super().quantized_linear(values, scale, prepared, out_dtype)
        return self._records(values, data.packed, out_dtype)

    def _nvfp4(self, x: Tensor, prepared: PreparedLinear, out_dtype: torch.dtype) -> Tensor:
        data = prepared.data
        if not isinstance(data, HopperNVFP4 | HopperBlackwell):
            return super()._nvfp4(x, prepared, out_dtype)
        pre = None if data.pre_quant_scale is None else data.pre_quant_scale.to(x.dtype)
        if isinstance(data, HopperBlackwell):
            values, blocks = _kernel("quantize").quantize_blocks(x, data.inverse_scales, pre)
            return self.quantized_linear(values, blocks, prepared, out_dtype)
        if not data.inverse_scales.numel():
            x = x if pre is None else x * pre
            return self._records(x.contiguous().unsqueeze(0), data.packed, out_dtype)
        values = _kernel("quantize").quantize_values(x, data.inverse_scales, pre)
        return self._records(values, data.packed, out_dtype)

    def _records(self, x: Tensor, records: Any, out_dtype: torch.dtype) -> Tensor:
        y: Tensor
        if x.dtype == torch.float32:
            w = _kernel("dequantize").dequantize(records, torch.float32)
            y = triton_weights.kernel("linear_dense").dense_linear(x[0], w, records.alpha, records.bias, out_dtype)
        elif _many(x, records):
            y = _kernel("gemm").packed_gemm(_aligned(x), records, out_dtype)
        else:
            y = _kernel("linear").linear(x, records, out_dtype)
        return y

    def _dense(self, x: Tensor, data: TritonDense, out_dtype: torch.dtype) -> Tensor:
        (m, k), w = x.shape, data.weight
        own = isinstance(data, HopperDense) and x.dtype == w.dtype and k % 8 == 0 and m > 0
        if not own or w.data_ptr() % 16 or not _kernel("gemm").dense_pays(m, w.shape[0]):
            return super()._dense(x, data, out_dtype)
        assert isinstance(data, HopperDense)
        y: Tensor = _kernel("gemm").dense_gemm(_aligned(x), w, data.runs, data.bias, out_dtype)
        return y


def prepare_nvfp4(weight: NVFP4Weight) -> HopperNVFP4:
    """Records of each run of rows; what is rare is folded in, as the Triton backend does."""
    records, inverses, _ = _records_of(weight, triton_weights.signed_codes(weight))
    return HopperNVFP4(records, inverses, weight.pre_quant_scale)


def prepare_blackwell(weight: NVFP4Weight) -> HopperBlackwell:
    """Records, and what is to be known of them; these numerics ignore the signs of block scales."""
    blackwell, packed = _kernel("blackwell"), weight.weight.packed
    records, inverses, magnitude = _records_of(weight, packed)
    bounds = blackwell.bounds(packed, magnitude, [rows for rows, _ in records.runs])
    return HopperBlackwell(blackwell.BlackwellRecords(records, bounds), inverses, weight.pre_quant_scale)


def _records_of(weight: NVFP4Weight, codes: Tensor) -> tuple[Any, Tensor, Tensor]:
    """``kernels.hopper.linear.Records``, the inverse input scales and the magnitudes of the block scales."""
    runs, inverses = triton_weights.runs_of(weight)
    alpha, magnitude = triton_weights.alpha_and_scales(weight)
    packed = _kernel("layout").pack(codes, magnitude, [rows for rows, _ in runs])
    bias = None if weight.bias is None else weight.bias.to(torch.float32).contiguous()
    records = _kernel("linear").Records(packed, tuple(runs), *weight.shape, alpha, bias)
    for row_tiles in range(1, MOST_ROW_TILES + 1):
        records.tables(row_tiles)  # now, for a copy from the host cannot be captured in a graph
    return records, inverses, magnitude


def prepare_dense(weight: DenseWeight) -> HopperDense:
    """As it is."""
    data = triton_weights.prepare_dense(weight)
    runs = _kernel("runs").runs_of([(weight.shape[0], 0)], data.weight.device)
    return HopperDense(data.weight, data.tiles, data.alpha, data.bias, runs)


def _many(x: Tensor, records: Any) -> bool:
    """Whether the kernel of large tiles is faster for x [Q, M, K]: by measured times where either may be."""
    m, k = x.shape[1:]
    if not _FEW < m <= _MANY:
        return m > _MANY
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    plans, gemm = _kernel("plans"), _kernel("gemm")
    plan = plans.choose(records.n, k, m, processors, x.dtype == torch.float16)
    return bool(gemm.packed_time(m, records.by_run, k, processors) < plans.time(plan, records.n, k, m, processors))


def _aligned(x: Tensor) -> Tensor:
    """The bulk copy engine reads from multiples of 16 bytes."""
    return x.clone() if x.data_ptr() % 16 else x


def _kernel(name: str) -> Any:
    return import_module(f"anyfp4.kernels.hopper.{name}")
