"""Linear weights in the extension: what the compiled CPU backend makes of each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyfp4.errors import UnsupportedError
from anyfp4.formats.weights import FP8Weight, LinearWeight, NVFP4Weight
from anyfp4.ops import linear as reference

#: what the extension calls the dtypes
CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CACHE_CODE = {**CODE, torch.float8_e4m3fn: 3}
FP8, _NVFP4 = 3, 4
_AS_IT_IS, _FP8_STATIC, _FP8_DYNAMIC = 0, 1, 2


@dataclass(frozen=True, eq=False)
class CpuLinear:
    """A layer in the extension, and the tensors whose memory it reads."""

    handle: Any
    tensors: tuple[Tensor, ...]


def prepare(native: Any, weight: LinearWeight) -> CpuLinear:
    """Brings a weight into the extension. W4A4 weights are copied, others kept as they are."""
    if isinstance(weight, NVFP4Weight) and not weight.weight_only:
        return CpuLinear(_w4a4(native, weight), ())
    if isinstance(weight, FP8Weight) and weight.block_wise:
        return _fp8_block(native, weight)
    return _dense(native, weight)


def _w4a4(native: Any, weight: NVFP4Weight) -> Any:
    tensor = weight.weight
    assert weight.input_global_scale is not None
    rows: list[int] = []
    inverses: list[float] = []
    for size, inverse in zip(tensor.shard_sizes, (1.0 / weight.input_global_scale).tolist(), strict=True):
        if inverses and inverses[-1] == inverse:
            rows[-1] += size
        else:
            rows.append(size)
            inverses.append(inverse)
    packed, scale = tensor.packed.contiguous(), tensor.block_scale.contiguous()
    vectors = [_row_alpha(weight), _float(weight.bias), _float(weight.pre_quant_scale)]
    return native.NvFP4Linear(
        packed.data_ptr(), scale.data_ptr(), *weight.shape, *map(_address, vectors), rows, inverses
    )


def _dense(native: Any, weight: LinearWeight) -> CpuLinear:
    block_scale: Tensor | None = None
    row_scale: Tensor | None = None
    pre: Tensor | None = None
    mode, input_scale = _AS_IT_IS, 1.0
    if isinstance(weight, NVFP4Weight):
        w, code = weight.weight.packed.contiguous(), _NVFP4
        block_scale = weight.weight.block_scale.contiguous()
        row_scale, pre = _row_alpha(weight), _float(weight.pre_quant_scale)
    elif isinstance(weight, FP8Weight):
        w, code = weight.weight.contiguous(), FP8
        row_scale = weight.weight_scale.expand(weight.shape[0]).contiguous()
        if not weight.weight_only:
            mode = _FP8_DYNAMIC if weight.input_scale is None else _FP8_STATIC
        input_scale = 1.0 if weight.input_scale is None else float(weight.input_scale)
    else:
        w, code = weight.weight.contiguous(), CODE[weight.weight.dtype]
    vectors = [row_scale, _float(weight.bias), pre]
    handle = native.DenseLinear(
        w.data_ptr(), code, _address(block_scale), *weight.shape, *map(_address, vectors), mode, input_scale
    )
    return CpuLinear(handle, (w,) if block_scale is None else (w, block_scale))


def _fp8_block(native: Any, weight: FP8Weight) -> CpuLinear:
    codes, scale, bias = weight.weight.contiguous(), weight.weight_scale.contiguous(), _float(weight.bias)
    handle = native.Fp8BlockLinear(
        codes.data_ptr(), *weight.shape, scale.data_ptr(), _address(bias), weight.weight_only
    )
    return CpuLinear(handle, (codes,))


def matrices(data: CpuLinear, shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """See :meth:`Backend.matrices`; ``shape`` (N, K)."""
    if data.tensors:
        return data.tensors
    n, k = shape
    packed, scale = torch.empty((n, k // 2), dtype=torch.uint8), torch.empty((n, k // 16), dtype=torch.uint8)
    if not data.handle.unpack(packed.data_ptr(), scale.data_ptr()):
        raise UnsupportedError("a scale of the weight is NaN; which, the prepared layout does not tell")
    return packed, scale.view(torch.float8_e4m3fn)


def inverse_scale(scale: float) -> float:
    """What values are multiplied by on their way into an FP8 cache: the float32 reciprocal."""
    return 1.0 if scale == 1.0 else float(1.0 / torch.tensor(scale, dtype=torch.float32))


def _row_alpha(weight: NVFP4Weight) -> Tensor:
    """The alpha of each row: float32 [N]."""
    sizes = torch.tensor(weight.weight.shard_sizes)
    return reference.alpha(weight).repeat_interleave(sizes)


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.float32).contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
