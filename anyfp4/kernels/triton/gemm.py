"""The product of many tokens: float16 or bfloat16 operands in memory, the order over K of ``layout.py``.

A persistent kernel: one program for each multiprocessor takes tiles in turn, in columns of eight row tiles so that
programs that run together share what they read. Tiles come through tensor descriptors (the bulk copy engine where there
is one), which also fill what lies past an edge with zeros.

Packed weights are dequantized first, code × scale being exact in 16 bits, into a workspace of bounded size: a slab of
rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.kernels.triton.epilogue import scaled
from anyfp4.kernels.triton.layout import SEGMENT, Tiles, segments
from anyfp4.kernels.triton.linear_packed import Packed, byte_values, quarter_values
from anyfp4.kernels.triton.numbers import rounded

#: weight rows and tokens of a tile, columns of a step
BN, BM, BK = 128, 128, 64
#: elements of the workspace: 512 MiB
WORKSPACE = 1 << 28
_ROW_GROUP = 8


@triton.jit(do_not_specialize=["M", "first_tile", "tiles", "first_row"])
def _gemm(
    x_desc, w_desc, p_y, p_alpha, p_bias, p_row, p_tiles, M, N, K, first_tile, tiles, first_row, unit,
    SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, ROW: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(M, BM)
    for t in range(tl.program_id(0), row_tiles * tiles, tl.num_programs(0)):
        # columns of GROUP row tiles
        column = t // (GROUP * tiles)
        height = tl.minimum(row_tiles - column * GROUP, GROUP)
        inside = t % (GROUP * tiles)
        row_tile = column * GROUP + inside % height
        tile = p_tiles + 3 * (first_tile + inside // height)
        start, end, index = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
        x_row, w_row = index * M + row_tile * BM, start - first_row
        total = tl.zeros((BM, BN), tl.float32)
        for s in tl.static_range(SEGMENTS):
            acc = tl.zeros((BM, BN), tl.float32)
            for k in range(s * SEGMENT, tl.minimum(K, (s + 1) * SEGMENT), BK):
                acc = tl.dot(x_desc.load([x_row, k]), w_desc.load([w_row, k]).T, acc)
            if s == 0:
                total = acc
            else:
                total = total + acc
        m, n = row_tile * BM + tl.arange(0, BM), start + tl.arange(0, BN)
        written = (m[:, None] < M) & (n[None, :] < end)
        alpha = tl.load(p_alpha + n, mask=n < end, other=0.0)[None, :]
        row = tl.load(p_row + m, mask=m < M, other=0.0)[:, None] if ROW else alpha
        bias = tl.load(p_bias + n, mask=n < end, other=0.0)[None, :] if BIAS else alpha
        y = scaled(total * unit, alpha, row, bias, ROW, BIAS)
        tl.store(p_y + m[:, None].to(tl.int64) * N + n[None, :], rounded(y, p_y.dtype.element_ty), mask=written)


@triton.jit
def _dequantize(
    p_w, p_s, p_out, first_row, N, rows, K, BITS: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = 4 if BITS == 4 else 2
    group = tl.program_id(1)
    i = tl.program_id(0) * R + tl.arange(0, R)
    near = tl.minimum(i, rows - 1) + first_row
    step = tl.cast(N, tl.int64) * W
    w = tl.load(p_w + group * step + near[:, None] * W + tl.arange(0, W)[None, :]).to(tl.uint32, bitcast=True)
    for part in tl.static_range(PARTS):
        if BITS == 4:
            u = tl.load(p_s + group * (step // 8) + (part * W // 32) * N + near).to(tl.uint32, bitcast=True)
            values = quarter_values(w, u, part, R, W, True)
        else:
            values = byte_values(w, part, R, W) * 256.0
        k = (group * PARTS + part) * 2 * W + tl.arange(0, 2 * W)
        out = p_out + i[:, None].to(tl.int64) * K + k[None, :]
        tl.store(out, values.to(p_out.dtype.element_ty), mask=(i[:, None] < rows) & (k[None, :] < K))


def dequantize(weight: Packed, first: int, rows: int, dtype: torch.dtype) -> Tensor:
    """code × scale (or the E4M3 values) of ``rows`` rows from ``first`` on: [rows, K]; exact in any type."""
    groups, n, w = weight.words.shape
    out = torch.empty((rows, weight.k), dtype=dtype, device=weight.words.device)
    _dequantize[(triton.cdiv(rows, 32), groups)](
        weight.words, weight.words if weight.scales is None else weight.scales, out, first, n, rows, weight.k,
        8 if weight.scales is None else 4, w, 32, num_warps=4,
    )  # fmt: skip
    return out


def packed_gemm(x: Tensor, weight: Packed, out_dtype: torch.dtype, row: Tensor | None = None) -> Tensor:
    """As ``linear_packed.packed_linear``, for many tokens, with the same bits.

    Args:
        x: [Q, M, K] float16 or bfloat16.
        weight: N rows.
        out_dtype: of the result.
        row: float32 [M], a factor of each token, or None.

    Returns:
        [M, N].
    """
    most = max(BN, WORKSPACE // weight.k)

    def slab(first: int, rows: int) -> Tensor:
        return dequantize(weight, first, rows, x.dtype)

    return _run(x, slab, most, weight.large_tiles, weight.alpha, weight.bias, out_dtype, row)


def dense_gemm(
    x: Tensor, w: Tensor, tiles: Tiles, alpha: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """x [1, M, K] · w [N, K]ᵀ, both float16 or both bfloat16, K a multiple of 8; otherwise as :func:`packed_gemm`."""
    return _run(x, lambda first, rows: w[first : first + rows], w.shape[0], tiles, alpha, bias, out_dtype, None)


def _run(
    x: Tensor, slab: Callable[[int, int], Tensor], most: int, tiles: Tiles, alpha: Tensor, bias: Tensor | None,
    out_dtype: torch.dtype, row: Tensor | None,
) -> Tensor:  # fmt: skip
    from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: PLC0415

    q, m, k = x.shape
    n = alpha.shape[0]
    y = torch.empty((m, n), dtype=out_dtype, device=x.device)
    x_desc = TensorDescriptor.from_tensor(x.view(q * m, k), [BM, BK])
    starts, first = tiles.starts, 0
    while first < len(starts) - 1:
        last = first + 1
        while last < len(starts) - 1 and starts[last + 1] - starts[first] <= most:
            last += 1
        w = slab(starts[first], starts[last] - starts[first])
        w_desc = TensorDescriptor.from_tensor(w, [BN, BK])
        count = (last - first) * triton.cdiv(m, BM)
        _gemm[(min(count, _programs(x.device)),)](
            x_desc, w_desc, y, alpha, alpha if bias is None else bias, alpha if row is None else row, tiles.table, m, n,
            k, first, last - first, starts[first], 1.0, SEGMENT, segments(k), row is not None, bias is not None, BM, BN,
            BK, _ROW_GROUP, num_warps=8, num_stages=4, enable_fp_fusion=False,
        )  # fmt: skip
        first = last
    return y


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
