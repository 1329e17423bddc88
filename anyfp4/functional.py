"""The one-call form of the linear op: choose a backend, prepare the weight, run."""

from __future__ import annotations

import torch
from torch import Tensor

from anyfp4 import envs
from anyfp4.backends import registry
from anyfp4.formats import NVFP4Tensor
from anyfp4.formats.weights import NVFP4Weight


def linear(
    x: Tensor,
    weight: NVFP4Tensor,
    bias: Tensor | None = None,
    *,
    input_global_scale: Tensor | float | None = None,
    numerics: str | None = None,
    backend: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x · Wᵀ + bias for an NVFP4 weight, W4A4 or weight-only.

    It prepares the weight at each call; a layer that runs often keeps a prepared one (``anyfp4.layers.linear``).

    Args:
        x: [..., K] bfloat16, float16 or float32.
        weight: N rows, K columns, S shards.
        bias: [N] or None.
        input_global_scale: multiplier of the activation (amax / 2688 on calibration data), one number or float32 [S];
            None leaves activations unquantized (weight-only).
        numerics: ``native`` or ``blackwell``; by default $ANYFP4_NUMERICS, else native.
        backend: ``auto`` or a backend's name; by default $ANYFP4_BACKEND, else auto.
        out_dtype: of the result; that of ``x`` by default.

    Returns:
        [..., N].

    Raises:
        InvalidArgumentError: shapes or dtypes do not fit.
        BackendError: the backend that was asked for cannot run here.
    """
    environment = envs.read()
    scale = None
    if input_global_scale is not None:
        scale = torch.as_tensor(input_global_scale, dtype=torch.float32, device=weight.device).reshape(-1)
        scale = scale.expand(len(weight.shard_sizes)).contiguous()
    layer = NVFP4Weight(weight, scale, None, bias)
    numerics = numerics or environment.numerics
    chosen = registry.select(
        weight.device, shape=weight.shape, numerics=numerics, requested=backend or environment.backend
    )
    return chosen.linear(x, chosen.prepare(layer, numerics), out_dtype)
