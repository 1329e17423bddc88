"""y = x · Wᵀ in blackwell numerics for any number of tokens: ``blackwell.cu``, W as ``layout.py`` has it.

Any plan gives the bits of ``numerics/blackwell.py``: an output is one chain over K, whoever computes its links.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyfp4.formats import e2m1, e4m3
from anyfp4.kernels.hopper import layout
from anyfp4.kernels.hopper.blackwell_plans import BlackwellPlan, choose
from anyfp4.kernels.hopper.linear import EXPONENT, KINDS, Records
from anyfp4.kernels.hopper.runtime import Kernel, load, tensor_map

FILES = (
    "async.cu", "unpack.cu", "unpack_half.cu", "unpack_chunk.cu", "multiply.cu", "linear_copy.cu", "linear_finish.cu",
    "blackwell_limits.cu", "blackwell_step.cu", "blackwell.cu",
)  # fmt: skip
#: added to exponents, so that they are bytes
_BIAS = 64
#: numbers of a weight looked at at a time
_PIECE = 1 << 22


def bounds(packed: Tensor, scale: Tensor, runs: Sequence[int]) -> Tensor:
    """What ``blackwell_limits.cu`` needs to know of each record.

    Args:
        packed: uint8 [N, K/2].
        scale: uint8 [N, K/16], E4M3 bits without sign, no NaN.
        runs: rows of each run.

    Returns:
        int32 [tiles, chunks, 3]: the bits of a float32, the largest (norm of 64 columns of a row / 2^low)², low the
        smallest exponent of the row's block scales there; in bytes, plus 64, the smallest and the largest exponent of
        the record's scales and the smallest of all of K; the bits of the largest norm² of a row of all of K.
    """
    k = 2 * packed.shape[1]
    chunks = math.ceil(k / layout.COLUMNS)
    pieces, start = [], 0
    step = max(1, _PIECE // (layout.ROWS * k)) * layout.ROWS
    for rows in runs:
        for first in range(start, start + rows, step):
            some = slice(first, min(first + step, start + rows))
            pieces.append(_bounds(packed[some], scale[some], chunks))
        start += rows
    return torch.cat(pieces)


def _bounds(packed: Tensor, scale: Tensor, chunks: int) -> Tensor:
    rows = packed.shape[0]
    tiles = math.ceil(rows / layout.ROWS)
    squares = e2m1.decode_packed(packed).square().view(rows, -1, 16).sum(dim=2)  # float32, exact
    value = scale.view(torch.float8_e4m3fn).to(torch.float32)
    padding = (0, 4 * chunks - scale.shape[1], 0, tiles * layout.ROWS - rows)
    norm = torch.nn.functional.pad(squares * value.square(), padding).view(tiles, layout.ROWS, chunks, 4).sum(dim=3)
    bits = torch.nn.functional.pad(scale, padding).view(tiles, layout.ROWS, chunks, 4)
    least = bits.masked_fill(bits == 0, e4m3.NAN).amin(dim=3)  # of a row's chunk
    low, high = _exponent(least.amin(dim=1)), _exponent(bits.amax(dim=3).amax(dim=1))
    whole = norm.sum(dim=2).amax(dim=1, keepdim=True).expand_as(low)
    norm = (norm * torch.exp2(-2.0 * _exponent(least))).amax(dim=1)
    lowest = low.amin(dim=1, keepdim=True).expand_as(low)
    exponents = (low + _BIAS) | ((high + _BIAS) << 8) | ((lowest + _BIAS) << 16)
    return torch.stack((norm.view(torch.int32), exponents, whole.contiguous().view(torch.int32)), dim=2)


def _exponent(bits: Tensor) -> Tensor:
    """Int32: the exponent of E4M3 numbers given by their bits; −6 for zero, 8 for NaN."""
    return e4m3.split(bits.view(torch.float8_e4m3fn))[1]


@dataclass(frozen=True, eq=False)
class BlackwellRecords:
    """A weight.

    Attributes:
        records: as in native numerics, but that signs of block scales are dropped.
        bounds: of :func:`bounds`.
    """

    records: Records
    bounds: Tensor


def kernel(plan: BlackwellPlan, k: int, device: int) -> Kernel:
    """The compiled and loaded kernel of a plan."""
    return load(FILES, "blackwell", "TPPPPPPPPiiiiiiiii", device, plan.defines, plan.shared(k))


def linear(
    x: Tensor, blocks: Tensor, weight: BlackwellRecords, out_dtype: torch.dtype, plan: BlackwellPlan | None = None
) -> Tensor:
    """x · Wᵀ × alpha + bias.

    Args:
        x: bfloat16 [Q, M, K], one for each quantization of the activation: code × block_scale. Contiguous.
        blocks: int16 [Q, M, K/16], of ``quantize.quantize_blocks``. Contiguous.
        weight: N rows.
        out_dtype: of the result.
        plan: how; by default by shape and M.

    Returns:
        [M, N].
    """
    q, m, k = x.shape
    w = weight.records
    if x.data_ptr() % 16:  # of the bulk copy engine
        x = x.clone()
    y = torch.empty((m, w.n), dtype=out_dtype, device=x.device)
    if m == 0:
        return y
    plan = plan or choose(w.n, k, m, torch.cuda.get_device_properties(x.device).multi_processor_count)
    tiles, chunks = w.records.shape[:2]
    groups, rows = w.tables(plan.row_tiles) or (None, None)
    token_tiles = math.ceil(m / plan.tokens)
    items = token_tiles * (math.ceil(tiles / plan.row_tiles) if groups is None else groups.shape[0])
    kernel(plan, k, x.get_device()).launch(
        (items, 1, 1),
        plan.threads,
        (
            tensor_map(x.view(q * m, k), (plan.tokens, layout.COLUMNS)), blocks, w.records, weight.bounds, y, w.alpha,
            w.bias, groups, rows, m, w.n, k // 16, chunks, tiles, token_tiles, items, KINDS[out_dtype], EXPONENT,
        ),
        overlap=True,
    )  # fmt: skip
    return y
