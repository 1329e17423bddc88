"""What every launcher checks before it hands addresses to a kernel, and on which GPU it launches."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from triton import knobs

from anyfp4.errors import InvalidArgumentError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_NOTHING = nullcontext()


def check_float(name: str, x: Tensor) -> None:
    """Raises InvalidArgumentError unless ``x`` is a float tensor of 16 or 32 bits."""
    if x.dtype not in FLOATS:
        raise InvalidArgumentError(f"{name} must be bfloat16, float16 or float32, got {x.dtype}")


def check_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raises InvalidArgumentError unless ``x`` has this dtype."""
    if x.dtype != dtype:
        raise InvalidArgumentError(f"{name} must be {dtype}, got {x.dtype}")


def check_device(**tensors: Tensor) -> None:
    """Raises InvalidArgumentError unless all tensors lie on one GPU (in the interpreter: anywhere)."""
    (name, first), *others = tensors.items()
    if first.device.type != "cuda" and not interpreting():
        raise InvalidArgumentError(f"{name} lies on {first.device}; Triton kernels need a CUDA or ROCm device")
    for other, x in others:
        if x.device != first.device:
            raise InvalidArgumentError(f"{name} lies on {first.device}, but {other} on {x.device}")


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(knobs.runtime.interpret)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the GPU of ``x`` the current one, on which Triton launches."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _NOTHING


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(0, n - 1).bit_length()


def row_strides(x: Tensor) -> tuple[Tensor, int, int, int, int]:
    """``x`` [..., K] as rows for a kernel, copied only if its rows are not contiguous.

    Returns:
        (x, rows, inner, outer stride, inner stride): row r begins at (r // inner) × outer + (r % inner) × inner stride.
    """
    k = x.shape[-1]
    if x.dim() == 3 and x.stride(2) == 1:
        return x, x.shape[0] * x.shape[1], max(1, x.shape[1]), x.stride(0), x.stride(1)
    if x.dim() == 2 and x.stride(1) == 1:
        return x, x.shape[0], 1, x.stride(0), 0
    x = x.contiguous()
    return x, x.numel() // max(1, k), 1, k, 0
