"""What headers tell of a linear layer: its weight on torch's meta device, with shapes and dtypes but no data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from anyfp4.checkpoint.checks import is_embedding, names_of
from anyfp4.checkpoint.layout import FLOATS, QUANTIZATION_SUFFIXES, TensorInfo
from anyfp4.checkpoint.scheme import QuantizationConfig
from anyfp4.formats.nvfp4 import NVFP4Tensor
from anyfp4.formats.weights import DenseWeight, FP8Weight, LinearWeight, NVFP4Weight, fp8_grid


def described(quantization: QuantizationConfig, module: str, infos: Mapping[str, TensorInfo]) -> LinearWeight | None:
    """A linear layer's weight without its data; None for a module that is none (an embedding, a norm).

    Args:
        quantization: what the configuration says.
        module: its name.
        infos: its tensors by suffix, checked (``checks.check_module``).
    """
    scheme = quantization.scheme_of(module)
    bias = _meta((infos["bias"].shape), infos["bias"].dtype) if "bias" in infos else None
    if scheme.kind == "dense" or not QUANTIZATION_SUFFIXES & infos.keys():
        info = infos.get("weight")
        if info is None or len(info.shape) != 2 or info.dtype not in FLOATS or is_embedding(module):
            return None
        return DenseWeight(_meta(info.shape, info.dtype), bias)
    names = names_of(quantization)
    one = _meta((1,))
    if scheme.kind == "fp8":
        n, k = infos["weight"].shape
        scale = _meta(fp8_grid(n, k)) if scheme.block_wise else _meta((n,)) if scheme.weight_per_row else one
        input_scale = None if scheme.input_dynamic or scheme.weight_only else one
        return FP8Weight(_meta((n, k), torch.float8_e4m3fn), scale, input_scale, bias, scheme.weight_only)
    packed, block_scale = infos[names.packed], infos[names.block_scale]
    weight = NVFP4Tensor(_meta(packed.shape, packed.dtype), _meta(block_scale.shape, block_scale.dtype), one)
    pre = infos.get(names.pre_quant_scale) if names.pre_quant_scale is not None else None
    pre_quant_scale = None if pre is None else _meta(pre.shape, pre.dtype)
    return NVFP4Weight(weight, None if scheme.weight_only else one, pre_quant_scale, bias)


def _meta(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
