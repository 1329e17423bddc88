"""Activation quantization as the step before ``linear.py``: bfloat16 code × block_scale, which is exact."""

from __future__ import annotations

import torch
from torch import Tensor

from anyfp4.kernels import room
from anyfp4.kernels.hopper.runtime import Kernel, load

FILES = ("async.cu", "quantize.cu")
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_THREADS = 128


def kernel(dtype: torch.dtype, device: int) -> Kernel:
    """The compiled and loaded kernel for activations of a type."""
    return load(FILES, "quantize", "PPPPiii", device, (("KIND", KINDS[dtype]),))


def quantize_values(x: Tensor, inverse_scales: Tensor, pre_quant_scale: Tensor | None = None) -> Tensor:
    """code × block_scale of an activation, once for each global scale.

    Args:
        x: [M, K] bfloat16, float16 or float32, rows of unit stride, K a multiple of 16.
        inverse_scales: float32 [Q], 1 / input global_scale.
        pre_quant_scale: [K] in the dtype of x, or None.

    Returns:
        bfloat16 [Q, M, K].
    """
    m, k = x.shape
    q = inverse_scales.shape[0]
    values = room.empty(q, m, k, torch.bfloat16, x.device)
    # four elements are read at once
    if x.stride(0) % 4 or x.data_ptr() % (4 * x.element_size()):
        x = x.clone(memory_format=torch.contiguous_format)
    quarters = m * k // 4
    if quarters:
        arguments = (x, pre_quant_scale, inverse_scales, values, quarters, k, x.stride(0))
        kernel(x.dtype, x.get_device()).launch((-(-quarters // _THREADS), q, 1), _THREADS, arguments, overlap=True)
    return values
