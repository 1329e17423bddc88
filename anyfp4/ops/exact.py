"""Sums whose order cannot matter: the exact value, rounded once.

Floating-point sums depend on their order, and so on tile sizes, vector widths and thread counts. Outside the NVFP4
product (which has a fixed order of its own) every reduction that anyfp4 does on a CPU is therefore *defined* as the
exact real sum of exact products, rounded once to float32 (nearest, ties to even). There is no order to keep, so the
bits depend on the operands alone: any BLAS, any tiling, any number of threads, any instruction set gives them.

How it is computed: products of float32 (or narrower) numbers are exact in float64. A float64 sum of K of them, in
whatever order, is off by at most K·2⁻⁵³·Σ|aₖbₖ| (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed.,
section 3.1), and Σ|aₖbₖ| ≤ ‖a‖‖b‖. Where both ends of that interval round to the same float32, that is the answer.
For the few elements (about one in 10⁵) that lie too near a rounding boundary, the sum is done exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anyfp4.errors import InvalidArgumentError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
#: float64 elements of workspace for one tile of columns (64 MB)
_TILE_ELEMENTS = 8 << 20


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a · bᵀ, each element the exact dot product rounded once to float32.

    A result of zero is +0. A NaN, or infinities of both signs, among the products gives the canonical NaN.

    Args:
        a: [..., M, K] float32, bfloat16, float16 or float8_e4m3fn.
        b: [..., N, K] likewise; the leading axes equal those of ``a``.

    Returns:
        float32 [..., M, N].

    Raises:
        InvalidArgumentError: shapes or dtypes do not fit.
    """
    for name, t in (("a", a), ("b", b)):
        if t.dtype not in _FLOATS:
            raise InvalidArgumentError(f"{name} must be a float tensor of 32 bits or fewer, got {t.dtype}")
    if a.dim() < 2 or a.dim() != b.dim() or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1]:
        raise InvalidArgumentError(f"cannot multiply {list(a.shape)} by the transpose of {list(b.shape)}")
    k, n = a.shape[-1], b.shape[-2]
    a64 = _to_float64(a)
    a_norm = _norm_bound(a64)
    batch = math.prod(a.shape[:-2])
    step = max(1, _TILE_ELEMENTS // max(1, batch * (k + a.shape[-2])))
    out = torch.empty((*a.shape[:-1], n), dtype=torch.float32, device=a.device)
    for start in range(0, n, step):
        b64 = _to_float64(b[..., start : start + step, :])
        approximate = a64 @ b64.transpose(-1, -2)
        bound = (a_norm * ((k + 3) * 2.0**-53)).unsqueeze(-1) * _norm_bound(b64).unsqueeze(-2)
        out[..., start : start + step] = _round_once(approximate, bound, a64, b64)
    return out


def total(x: Tensor) -> Tensor:
    """The exact sum along the last axis, rounded once to float32: [..., K] to float32 [...]."""
    rows = x.reshape(-1, x.shape[-1])
    ones = torch.ones((1, x.shape[-1]), dtype=torch.float32, device=x.device)
    return matmul(rows, ones).reshape(x.shape[:-1])


def square_sum(x: Tensor) -> Tensor:
    """The exact sum of squares along the last axis, rounded once to float32: [..., K] to float32 [...]."""
    rows = x.reshape(-1, 1, x.shape[-1])
    return matmul(rows, rows).reshape(x.shape[:-1])


def _to_float64(x: Tensor) -> Tensor:
    # torch casts float8 to float32 only
    return (x.to(torch.float32) if x.dtype == torch.float8_e4m3fn else x).to(torch.float64)


def _norm_bound(x64: Tensor) -> Tensor:
    """At least ‖x‖ along the last axis; the factor covers the rounding of the norm itself."""
    norm: Tensor = torch.linalg.vector_norm(x64, dim=-1)
    return norm * (1 + 2.0**-20)


def _round_once(approximate: Tensor, bound: Tensor, a64: Tensor, b64: Tensor) -> Tensor:
    low, high = (approximate - bound).to(torch.float32), (approximate + bound).to(torch.float32)
    result = low + 0.0  # −0 + 0 = +0
    # with an infinity or NaN among the products, float64 gives the right one in any order
    special = ~torch.isfinite(approximate)
    result = torch.where(special, approximate.to(torch.float32), result)
    result = torch.where(torch.isnan(result), torch.full_like(result, torch.nan), result)
    for index in ((low != high) & ~special).nonzero().tolist():
        *lead, i, j = index
        products = a64[(*lead, i)] * b64[(*lead, j)]
        result[(*lead, i, j)] = _exact_sum(products.tolist())
    return result


def _exact_sum(values: list[float]) -> float:
    """The exact sum as a float64 that rounds to the right float32.

    ``math.fsum`` gives the float64 nearest to the sum; rounding that to float32 would round twice. Rounding to odd
    (truncate, and set the last bit if anything was cut off) keeps the information that the second rounding needs.
    """
    nearest = math.fsum(values)
    rest = math.fsum([*values, -nearest])
    if rest == 0.0:
        return nearest
    truncated = nearest if (rest > 0) == (nearest > 0) else math.nextafter(nearest, 0.0)
    mantissa, exponent = math.frexp(abs(truncated))
    odd = math.ldexp(int(mantissa * 2**53) | 1, exponent - 53)
    return math.copysign(odd, truncated)
