"""Records back to rows, for products that have no kernel on records."""

from __future__ import annotations

import torch
from torch import Tensor

from anyfp4.kernels.hopper.linear import EXPONENT, Records
from anyfp4.kernels.hopper.runtime import Kernel, load

FILES = ("async.cu", "unpack.cu", "dequantize.cu")
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def kernel(dtype: torch.dtype, device: int) -> Kernel:
    """The compiled and loaded kernel for a type."""
    return load(FILES, "dequantize", "PPPiii", device, (("KIND", KINDS[dtype]),))


def dequantize(weight: Records, dtype: torch.dtype) -> Tensor:
    """code × block_scale: [N, K], exact in bfloat16, float16 and float32."""
    out = torch.empty((weight.n, weight.k), dtype=dtype, device=weight.records.device)
    tiles, chunks = weight.records.shape[:2]
    _, rows = weight.tables(1) or (None, None)
    arguments = (weight.records, rows, out, weight.n, weight.k, EXPONENT)
    kernel(dtype, out.get_device()).launch((tiles, chunks, 1), 128, arguments)
    return out
