"""The product of many tokens: float16 or bfloat16 operands in memory, the order over K of ``layout.py``.

A persistent kernel: one program for each multiprocessor takes tiles in turn, in columns of eight token tiles so that
programs that run together share what they read. Tiles come through tensor descriptors (the bulk copy engine where there
is one), which also fill what lies past an edge with zeros. A tile of 128 × 256 takes all registers for its accumulator
and the sum of the segments before; a few are spilled once in a segment, which costs less than a smaller tile.

Packed weights are dequantized first, code × scale being exact in 16 bits, into a workspace of bounded size: a slab of
rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.kernels.triton import division
from anyfp4.kernels.triton.epilogue import scaled
from anyfp4.kernels.triton.layout import GROUP, SEGMENT, Tiles
from anyfp4.kernels.triton.linear_packed import Packed, byte_values, code_values
from anyfp4.kernels.triton.numbers import rounded

#: tokens of a tile, columns of a step
TOKENS, STEP = 128, 64
#: elements of the workspace: 512 MiB
WORKSPACE = 1 << 28
#: rows that a program dequantizes
_ROWS = 64
_TOKEN_TILES = 8


@triton.jit
def _place(t, tiles, token_tiles, TOKEN_TILES: tl.constexpr):
    """(token tile, row tile) of the ``t``-th tile: columns of TOKEN_TILES token tiles."""
    column = t // (TOKEN_TILES * tiles)
    height = tl.minimum(token_tiles - column * TOKEN_TILES, TOKEN_TILES)
    inside = t % (TOKEN_TILES * tiles)
    return column * TOKEN_TILES + inside % height, inside // height


@triton.jit(do_not_specialize=["M", "first_tile", "tiles", "first_row"])
def _gemm(
    x_desc, w_desc, p_y, p_alpha, p_bias, p_row, p_tiles, M, N, K, first_tile, tiles, first_row,
    SEGMENT: tl.constexpr, ROW: tl.constexpr, BIAS: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
    STEP: tl.constexpr, TOKEN_TILES: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = SEGMENT // STEP
    token_tiles, steps = tl.cdiv(M, T), tl.cdiv(K, STEP)
    tl.assume(steps > 0)
    for t in range(tl.program_id(0), token_tiles * tiles, tl.num_programs(0)):
        token_tile, row_tile = _place(t, tiles, token_tiles, TOKEN_TILES)
        tile = p_tiles + 3 * (first_tile + row_tile)
        start, end, index = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
        x_row, w_row = index * M + token_tile * T, start - first_row
        acc = tl.zeros((T, R), tl.float32)
        total = tl.zeros((T, R), tl.float32)
        # one loop, so that copies run ahead across segments
        for i in range(0, steps):
            acc = tl.dot(x_desc.load([x_row, i * STEP]), w_desc.load([w_row, i * STEP]).T, acc)
            if i % STEPS == STEPS - 1:
                total += acc
                acc = tl.zeros((T, R), tl.float32)
        total += acc
        m, n = token_tile * T + tl.arange(0, T), start + tl.arange(0, R)
        written = (m[:, None] < M) & (n[None, :] < end)
        alpha = tl.load(p_alpha + n, mask=n < end, other=0.0)[None, :]
        row = tl.load(p_row + m, mask=m < M, other=0.0)[:, None] if ROW else alpha
        bias = tl.load(p_bias + n, mask=n < end, other=0.0)[None, :] if BIAS else alpha
        y = scaled(total, alpha, row, bias, ROW, BIAS)
        tl.store(p_y + m[:, None].to(tl.int64) * N + n[None, :], rounded(y, p_y.dtype.element_ty), mask=written)


@triton.jit
def _dequantize(
    p_w, p_s, p_out, first_row, N, rows, K, BITS: tl.constexpr, W: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    i = tl.program_id(0) * R + tl.arange(0, R)
    row = group.to(tl.int64) * N + tl.minimum(i, rows - 1) + first_row
    w = tl.load(p_w + row[:, None] * W + tl.arange(0, W)[None, :]).to(tl.uint32, bitcast=True)
    if BITS == 4:
        u = tl.load(p_s + row[:, None] * 2 + tl.arange(0, 2)[None, :]).to(tl.uint32, bitcast=True)
        values = code_values(w, u, R, W, True)
    else:
        values = byte_values(w, R, W)
    k = group * GROUP + tl.arange(0, GROUP)
    out = p_out + i[:, None].to(tl.int64) * K + k[None, :]
    tl.store(out, values.to(p_out.dtype.element_ty), mask=(i[:, None] < rows) & (k[None, :] < K))


def dequantize(weight: Packed, first: int, rows: int, dtype: torch.dtype) -> Tensor:
    """code × scale (or the E4M3 values) of ``rows`` rows from ``first`` on: [rows, K]; exact in any type."""
    out = torch.empty((rows, weight.k), dtype=dtype, device=weight.words.device)
    launch_dequantize(weight.words, weight.scales, out, first)
    return out


def launch_dequantize(words: Tensor, scales: Tensor | None, out: Tensor, first: int) -> None:
    """Writes the values of rows from ``first`` on to ``out`` [rows, K]."""
    groups, n, w = words.shape
    rows, k = out.shape
    _dequantize[(triton.cdiv(rows, _ROWS), groups)](
        words, words if scales is None else scales, out, first, n, rows, k, 8 if scales is None else 4, w, _ROWS, GROUP,
        num_warps=4,
    )  # fmt: skip


def packed_gemm(
    x: Tensor, weight: Packed, out_dtype: torch.dtype, row: Tensor | None = None, rows: int | None = None
) -> Tensor:
    """As ``linear_packed.packed_linear``, for many tokens, with the same bits.

    Args:
        x: [Q, M, K] float16 or bfloat16, K a multiple of 8.
        weight: N rows.
        out_dtype: of the result.
        row: float32 [M], a factor of each token, or None.
        rows: of a tile, 128 or 256; by default by N and M.

    Returns:
        [M, N].
    """
    most = max(256, WORKSPACE // weight.k)

    def slab(first: int, rows: int) -> Tensor:
        return dequantize(weight, first, rows, x.dtype)

    return _run(x, slab, most, weight.tiles, weight.alpha, weight.bias, out_dtype, row, rows)


def dense_gemm(
    x: Tensor, w: Tensor, tiles: Mapping[int, Tiles], alpha: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """x [1, M, K] · w [N, K]ᵀ, both float16 or both bfloat16, K a multiple of 8; otherwise as :func:`packed_gemm`."""
    return _run(x, lambda first, rows: w[first : first + rows], w.shape[0], tiles, alpha, bias, out_dtype, None, None)


def _run(
    x: Tensor, slab: Callable[[int, int], Tensor], most: int, tiles_by_rows: Mapping[int, Tiles], alpha: Tensor,
    bias: Tensor | None, out_dtype: torch.dtype, row: Tensor | None, rows: int | None,
) -> Tensor:  # fmt: skip
    from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: PLC0415

    q, m, k = x.shape
    n = alpha.shape[0]
    rows = rows or division.gemm_rows(n, m, multiprocessors(x.device))
    tiles = tiles_by_rows[rows]
    y = torch.empty((m, n), dtype=out_dtype, device=x.device)
    x_desc = TensorDescriptor.from_tensor(x.view(q * m, k), [TOKENS, STEP])
    starts, first = tiles.starts, 0
    while first < len(starts) - 1:
        last = first + 1
        while last < len(starts) - 1 and starts[last + 1] - starts[first] <= most:
            last += 1
        w = slab(starts[first], starts[last] - starts[first])
        count = (last - first) * triton.cdiv(m, TOKENS)
        _gemm[(min(count, multiprocessors(x.device)),)](
            x_desc, TensorDescriptor.from_tensor(w, [rows, STEP]), y, alpha, alpha if bias is None else bias,
            alpha if row is None else row, tiles.table, m, n, k, first, last - first, starts[first], SEGMENT,
            row is not None, bias is not None, TOKENS, rows, STEP, _TOKEN_TILES, num_warps=8, num_stages=4,
            enable_fp_fusion=False,
        )  # fmt: skip
        first = last
    return y


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; in the interpreter two."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
