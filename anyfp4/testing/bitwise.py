"""Bitwise assertions: equal means the same bytes, and a failure names the first differing coordinate."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGER_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The bit patterns of ``x`` as integers of the same width."""
    return x.contiguous().view(_INTEGER_VIEW[x.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Checks dtype, shape and every bit (−0 differs from 0; a NaN equals only the same NaN)."""
    prefix = f"{what}: " if what else ""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise AssertionError(
            f"{prefix}{actual.dtype} {list(actual.shape)} is not {expected.dtype} {list(expected.shape)}"
        )
    differ = bits(actual.cpu()) != bits(expected.cpu())
    if not bool(differ.any()):
        return
    where = tuple(differ.nonzero()[0].tolist())
    a, e = actual.cpu()[where], expected.cpu()[where]
    raise AssertionError(
        f"{prefix}{int(differ.sum())} of {differ.numel()} elements differ; first at {list(where)}: "
        f"{a.item()!r} (bits {bits(a.reshape(1)).item():#x}) is not "
        f"{e.item()!r} (bits {bits(e.reshape(1)).item():#x})"
    )
