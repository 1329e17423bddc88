"""Activation quantization as the step before ``linear.py``: bfloat16 code × block_scale, which is exact."""

from __future__ import annotations

import torch
from torch import Tensor

from anyfp4.kernels import room
from anyfp4.kernels.hopper.runtime import Kernel, load

FILES = ("async.cu", "quantize.cu")
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_THREADS = 128
#: numbers from which on a thread for each block of 16 is enough to keep the GPU busy
_MANY = 1 << 20


def kernel(dtype: torch.dtype, share: int, device: int) -> Kernel:
    """The compiled and loaded kernel for activations of a type, ``share`` threads for a block."""
    return load(FILES, "quantize", "PPPPPiii", device, (("KIND", KINDS[dtype]), ("SHARE", share)))


def quantize_values(
    x: Tensor, inverse_scales: Tensor, pre_quant_scale: Tensor | None = None, share: int | None = None
) -> Tensor:
    """code × block_scale of an activation, once for each global scale.

    Args:
        x: [M, K] bfloat16, float16 or float32, rows of unit stride, K a multiple of 16.
        inverse_scales: float32 [Q], 1 / input global_scale.
        pre_quant_scale: [K] in the dtype of x, or None.
        share: threads that share a block, 1 or 4; by default by the size of x. No bit depends on it.

    Returns:
        bfloat16 [Q, M, K].
    """
    return _quantize(x, inverse_scales, pre_quant_scale, share, None)


def quantize_blocks(
    x: Tensor, inverse_scales: Tensor, pre_quant_scale: Tensor | None = None, share: int | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`quantize_values`, and what ``blackwell.py`` needs to know of each block.

    Returns:
        (bfloat16 [Q, M, K], int16 [Q, M, K/16]: the block scale's bits, and above them a quarter of the sum of the
        squared codes, rounded up).
    """
    (m, k), q = x.shape, inverse_scales.shape[0]
    blocks = torch.empty((q, m, k // 16), dtype=torch.int16, device=x.device)
    return _quantize(x, inverse_scales, pre_quant_scale, share, blocks), blocks


def _quantize(
    x: Tensor, inverse_scales: Tensor, pre_quant_scale: Tensor | None, share: int | None, blocks: Tensor | None
) -> Tensor:
    m, k = x.shape
    q = inverse_scales.shape[0]
    values = room.empty(q, m, k, torch.bfloat16, x.device)
    share = share or (1 if m * k >= _MANY else 4)
    # so many bytes are read at once
    at_once = min(16, 16 // share * x.element_size())
    if x.stride(0) * x.element_size() % at_once or x.data_ptr() % at_once:
        x = x.clone(memory_format=torch.contiguous_format)
    if pre_quant_scale is not None and pre_quant_scale.data_ptr() % at_once:
        pre_quant_scale = pre_quant_scale.clone()
    parts = m * k * share // 16
    if parts:
        arguments = (x, pre_quant_scale, inverse_scales, values, blocks, parts, k, x.stride(0))
        kernel(x.dtype, share, x.get_device()).launch((-(-parts // _THREADS), q, 1), _THREADS, arguments, overlap=True)
    return values
