"""The write direction of both layouts: a weight to the tensors that a file holds, modules to groups."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from anyfp4.checkpoint.layout import Suffixes
from anyfp4.checkpoint.scheme import DENSE, Scheme
from anyfp4.errors import InvalidArgumentError, UnsupportedError
from anyfp4.formats.weights import DenseWeight, FP8Weight, LinearWeight, NVFP4Weight


def tensors(names: Suffixes, module: str, weight: LinearWeight) -> dict[str, Tensor]:
    """The tensors that a layout stores for a module; the inverse of ``linear``.

    Raises:
        InvalidArgumentError: the weight is several shards fused into one; split it first.
        UnsupportedError: the layout has no place for a ``pre_quant_scale``.
    """
    stored: dict[str, Tensor]
    if isinstance(weight, DenseWeight):
        stored = {"weight": weight.weight}
    elif isinstance(weight, FP8Weight):
        stored = {"weight": weight.weight, "weight_scale": weight.weight_scale.reshape(_scale_shape(names, weight))}
        if weight.input_scale is not None:
            stored["input_scale"] = weight.input_scale.reshape(names.scalar_shape)
    else:
        stored = _nvfp4_tensors(names, module, weight)
    if weight.bias is not None:
        stored["bias"] = weight.bias
    return {f"{module}.{suffix}": tensor for suffix, tensor in stored.items()}


def scheme_of_weight(weight: LinearWeight) -> Scheme:
    """The scheme under which ``tensors`` stores ``weight``."""
    if isinstance(weight, NVFP4Weight):
        return Scheme(
            "nvfp4",
            weight_only=weight.weight_only,
            pre_quant_scale_allowed=weight.pre_quant_scale is not None,
        )
    if isinstance(weight, FP8Weight):
        return Scheme(
            "fp8",
            weight_only=weight.weight_only,
            input_dynamic=weight.input_scale is None and not weight.weight_only,
            weight_per_row=not weight.block_wise and weight.weight_scale.numel() > 1,
            block_wise=weight.block_wise,
        )
    return Scheme("dense")


def reciprocal(x: Tensor) -> Tensor:
    """1/x, rounded once to fp32."""
    return torch.ones_like(x) / x


def divisor(multiplier: Tensor) -> Tensor:
    """The divisor whose reciprocal, rounded to fp32, is ``multiplier``, or comes nearest to it.

    1/x maps several divisors to one multiplier for significands below √2 and leaves gaps above, so that about one
    multiplier in six has no exact divisor; those come back one unit in the last place off.

    Args:
        multiplier: float32, any shape, positive.

    Returns:
        float32, shape of ``multiplier``.
    """
    near = reciprocal(multiplier)
    infinity = torch.full_like(near, torch.inf)
    candidates = torch.stack([near, torch.nextafter(near, infinity), torch.nextafter(near, torch.zeros_like(near))])
    error = (reciprocal(candidates) - multiplier).abs()
    return candidates.gather(0, error.argmin(dim=0, keepdim=True)).squeeze(0)


def _scale_shape(names: Suffixes, weight: FP8Weight) -> tuple[int, ...]:
    if weight.block_wise:
        rows, columns = weight.weight_scale.shape
        return (rows, 1, columns, 1) if names.spread_block_scales else (rows, columns)
    if weight.weight_scale.numel() > 1:
        return (-1, 1) if names.column_row_scales else (-1,)
    return names.scalar_shape


def _nvfp4_tensors(names: Suffixes, module: str, weight: NVFP4Weight) -> dict[str, Tensor]:
    if len(weight.weight.shard_sizes) > 1:
        raise InvalidArgumentError(
            f"{module} is {len(weight.weight.shard_sizes)} projections fused into one; a checkpoint stores them apart"
        )

    def stored_scale(scale: Tensor) -> Tensor:
        return (divisor(scale) if names.divisors else scale).reshape(names.scalar_shape)

    stored = {
        names.packed: weight.weight.packed,
        names.block_scale: weight.weight.block_scale,
        names.weight_global: stored_scale(weight.weight.global_scale),
    }
    if weight.input_global_scale is not None:
        stored[names.input_global] = stored_scale(weight.input_global_scale)
    if weight.pre_quant_scale is not None:
        if names.pre_quant_scale is None:
            raise UnsupportedError(
                f"{module} has a pre_quant_scale, for which compressed-tensors has no place; use the modelopt layout"
            )
        stored[names.pre_quant_scale] = weight.pre_quant_scale
    return stored


def by_scheme(schemes: Mapping[str, Scheme]) -> tuple[dict[Scheme, list[str]], list[str]]:
    """Sorts modules by scheme.

    Args:
        schemes: each module's scheme.

    Returns:
        (quantized scheme -> its modules, sorted, in order of the first; the dense modules, sorted).

    Raises:
        InvalidArgumentError: no module is quantized.
    """
    groups: dict[Scheme, list[str]] = {}
    dense = []
    for module in sorted(schemes):
        if schemes[module] == DENSE:
            dense.append(module)
        else:
            groups.setdefault(schemes[module], []).append(module)
    if not groups:
        raise InvalidArgumentError("no module is quantized, so there is no quantization to describe")
    return groups, dense
