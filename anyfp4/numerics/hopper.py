"""Bit model of Hopper's fp16 and bf16 matrix instructions with fp32 accumulators.

These are ``wgmma`` and ``mma.sync.m16n8k16``. Sixteen k at a time, in order, 16 products are added to the
accumulator:

1. A product has the exponent exp(a) + exp(b) and a significand below 4, exact and not normalised; a
   subnormal input keeps its format's smallest exponent (−14 or −126). A product of zero has no exponent. The
   accumulator has its own exponent, −126 if subnormal and −133 if zero.
2. E is the largest of these exponents. Each of the 17 terms is truncated toward zero to a multiple of
   2^(E−25), they are added exactly, and the sum is truncated toward zero to fp32, subnormal numbers
   included. A sum of zero is +0; a sum that reaches 2^128 is infinite.
3. A NaN, 0 × ∞ or ∞ − ∞ gives the NaN 0x7FFFFFFF; any other infinity stays.

K is padded to 16 with zeros. Source: Xie et al., *MMA-Sim*, arXiv 2511.10909, and the first author's later
simulator (``mmasim`` 2.1) for the exponent of a zero accumulator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.numerics import float64

#: how much of K one instruction takes
CHUNK = 16
#: terms are truncated to this many bits below the largest exponent
FRACTION_BITS = 25
#: exponent of a zero accumulator; no E is below it
ZERO_EXPONENT = -133
_MIN_EXPONENT = {torch.float16: -14, torch.bfloat16: -126}
_FLOAT32_MIN_EXPONENT = -126
#: below the exponent of every product
_ABSENT = -1000
#: outputs treated at once, each with 16 products: 4 MiB an array, about six arrays
_TILE_ROWS = 128
_TILE_COLUMNS = 256


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T``, bit for bit as Hopper's tensor cores accumulate it.

    Output [i, j] depends on row i of a and row j of b alone. Memory beyond the result stays under 64 MiB.

    Args:
        a: float16 or bfloat16 [M, K], K at least 1.
        b: [N, K], the dtype of ``a``.

    Returns:
        float32 [M, N]; zeros are +0, NaNs are 0x7FFFFFFF.

    Raises:
        InvalidArgumentError: a wrong dtype, shape or device.
    """
    if a.dtype not in _MIN_EXPONENT or a.dim() != 2 or a.shape[1] == 0:
        raise InvalidArgumentError(f"a must be float16 or bfloat16 [M, K], got {a.dtype} {list(a.shape)}")
    if b.dtype != a.dtype or b.dim() != 2 or b.shape[1] != a.shape[1]:
        raise InvalidArgumentError(f"b must be {a.dtype} [N, {a.shape[1]}], got {b.dtype} {list(b.shape)}")
    if a.device != b.device:
        raise InvalidArgumentError(f"b must lie on the device of a, {a.device}, got {b.device}")
    out = a.new_zeros((a.shape[0], b.shape[0]), dtype=torch.float32)
    for row in range(0, a.shape[0], _TILE_ROWS):
        for column in range(0, b.shape[0], _TILE_COLUMNS):
            tile = out[row : row + _TILE_ROWS, column : column + _TILE_COLUMNS]
            tile.copy_(_tile(a[row : row + _TILE_ROWS], b[column : column + _TILE_COLUMNS]))
    out.view(torch.int32).masked_fill_(out.isnan(), float64.NAN_BITS)
    return out


def _tile(a: Tensor, b: Tensor) -> Tensor:
    acc = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], CHUNK):
        acc = accumulate(acc, a[:, start : start + CHUNK], b[:, start : start + CHUNK])
    return acc


def accumulate(acc: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One instruction: up to 16 products of each pair of rows added to the accumulators.

    Args:
        acc: float64 [M, N], each a float32 value.
        a: float16 or bfloat16 [M, k], k at most 16.
        b: [N, k], the dtype of ``a``.

    Returns:
        float64 [M, N], each a float32 value.
    """
    a_significand, a_exponent = _split(a)
    b_significand, b_exponent = _split(b)
    significand = a_significand[:, None, :] * b_significand  # [M, N, k]: at most 22 bits, exact
    product_exponent = (a_exponent[:, None, :] + b_exponent).masked_fill_(significand == 0, _ABSENT)
    finite = torch.where(acc.isfinite(), acc, 0.0)
    acc_exponent = float64.exponent(finite).clamp_(min=_FLOAT32_MIN_EXPONENT).masked_fill_(finite == 0, ZERO_EXPONENT)
    largest = torch.maximum(product_exponent.amax(dim=-1), acc_exponent)
    # what lies 60 or more below E is truncated to zero, and at 60 the factor is still a normal float64 number
    shift = (product_exponent - largest[..., None]).clamp_(min=-60) + FRACTION_BITS
    terms = (significand * float64.power_of_two(shift)).trunc_()
    # −133 ≤ E ≤ 254: all factors and sums are normal float64 numbers; the 17 integers are below 2^27: exact
    total = terms.sum(dim=-1) + (finite * float64.power_of_two(FRACTION_BITS - largest)).trunc()
    total = float64.truncate_(total * float64.power_of_two(largest - FRACTION_BITS)) + 0.0  # −0 + 0 is +0
    if bool(a.isfinite().all() and b.isfinite().all() and acc.isfinite().all()):
        return total
    # infinities and NaNs follow IEEE; no product or sum of finite numbers overflows float64
    ieee = (a.to(torch.float64)[:, None, :] * b.to(torch.float64)).sum(dim=-1) + acc
    return torch.where(ieee.isfinite(), total, ieee)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Significand (float64, below 2) and exponent (int64) of each number; zero for what is not finite."""
    value = x.to(torch.float64)
    value = torch.where(value.isfinite(), value, 0.0)
    exponent = float64.exponent(value).clamp_(min=_MIN_EXPONENT[x.dtype])
    return value * float64.power_of_two(-exponent), exponent
