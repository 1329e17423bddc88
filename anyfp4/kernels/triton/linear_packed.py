"""y = x · Wᵀ with W in words (``layout.py``), unpacked in the kernel: W4A4 in native numerics, weight-only, FP8.

The weight is the left operand: its rows are the M side of the matrix instruction and tokens the N side, so a few tokens
waste little of it, and on Hopper ``wgmma`` takes the unpacked weight from registers. A half word becomes two float16
numbers by one shift and one mask, and one ``mul.f16x2`` applies the block scale. The product is code × scale × 2⁻⁷: the
factor of 2⁻¹⁴ that the codes' places bring does not fit into the scale at once. Where a block scale is subnormal such a
product may be one too, which the matrix unit would align differently, so then (``SUBNORMAL``) 2⁷ is multiplied back
before the product; otherwise after it, with the same bits.

Every division of the work gives the same bits (order over K: ``layout.py``), so it may depend on M (``division.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.device import architecture
from anyfp4.kernels.triton import division, workspace
from anyfp4.kernels.triton.division import Division
from anyfp4.kernels.triton.epilogue import finish, sum_of_segments
from anyfp4.kernels.triton.layout import GROUP, SEGMENT, Tiles, segments

#: where the bulk copy engine fills shared memory
_COPY_ENGINE = ("sm_90", "sm_100", "sm_103", "sm_120")


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight in words.

    Attributes:
        words: int32 [groups, N, W].
        scales: int32 [groups, N, 2], or None for FP8.
        subnormal: whether a block scale is subnormal.
        tiles: by rows of a tile.
        k: columns.
        alpha: float32 [N].
        bias: float32 [N] or None.
    """

    words: Tensor
    scales: Tensor | None
    subnormal: bool
    tiles: Mapping[int, Tiles]
    k: int
    alpha: Tensor
    bias: Tensor | None

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 8 if self.scales is None else 4

    @property
    def unit(self) -> float:
        """What sums are multiplied by."""
        return 1.0 if self.subnormal or self.scales is None else 128.0


@triton.jit
def concatenated(a, b):
    """[R, C] and [R, C] side by side: [R, 2·C]."""
    R: tl.constexpr = a.shape[0]
    C: tl.constexpr = a.shape[1]
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (R, 2 * C))


@triton.jit
def half_pair(t):
    """The two float16 numbers of each word, side by side: uint32 [R, W] to float16 [R, W, 2]."""
    high = (t >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    low = t.to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def code_bits(w, quarter: tl.constexpr):
    """The codes of a quarter as the bits of float16 pairs, value × 2⁻¹⁴."""
    if quarter == 0:
        t = w & 0x8E008E00
    elif quarter == 1:
        t = (w << 3) & 0x8E008E00
    elif quarter == 2:
        t = ((w << 6) & 0x0E000E00) | ((w << 1) & 0x80008000)
    else:
        t = ((w << 9) & 0x0E000E00) | ((w << 2) & 0x80008000)
    return t


@triton.jit
def _quarter(w, s, quarter: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """code × scale × 2⁻⁷ of a quarter: words [R, W], scales [R, W / 8] to float16 [R, 2·W]."""
    t = code_bits(w, quarter)
    s = tl.reshape(tl.broadcast_to(s[:, :, None], (R, W // 8, 8)), (R, W))
    # in this form and order LLVM multiplies both halves of a word at once without swapping them on the way
    high = (t >> 16).to(tl.uint16).to(tl.float16, bitcast=True) * s
    low = t.to(tl.uint16).to(tl.float16, bitcast=True) * s
    return tl.reshape(tl.join(low, high), (R, 2 * W))


@triton.jit
def code_values(w, u, R: tl.constexpr, W: tl.constexpr, SUBNORMAL: tl.constexpr):
    """code × scale × 2⁻⁷ (or × 1) of a group: words [R, W], scale words [R, 2] to float16 [R, 8·W]."""
    first, second = tl.split(u)
    # bytes read in float16's places are scale × 2⁻⁸
    q0 = _quarter(w, half_pair((first << 7) & 0x7F807F80) * 32768.0, 0, R, W)
    q1 = _quarter(w, half_pair((first >> 1) & 0x7F807F80) * 32768.0, 1, R, W)
    q2 = _quarter(w, half_pair((second << 7) & 0x7F807F80) * 32768.0, 2, R, W)
    q3 = _quarter(w, half_pair((second >> 1) & 0x7F807F80) * 32768.0, 3, R, W)
    values = concatenated(concatenated(q0, q1), concatenated(q2, q3))
    if SUBNORMAL:
        values = values * 128.0
    return values


@triton.jit
def byte_values(w, R: tl.constexpr, W: tl.constexpr):
    """E4M3 values of a group: words [R, W] to float16 [R, 4·W]."""
    first = tl.reshape(half_pair((w & 0x80008000) | ((w & 0x7F007F00) >> 1)), (R, 2 * W))
    second = tl.reshape(half_pair(((w << 8) & 0x80008000) | ((w & 0x007F007F) << 7)), (R, 2 * W))
    return concatenated(first, second) * 256.0


@triton.jit
def group_values(
    p_w, p_s, near, g, N, BITS: tl.constexpr, SUBNORMAL: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Group ``g`` of rows ``near`` [R] in float16: code × scale × 2⁻⁷ (or × 1), or E4M3 values."""
    row = tl.cast(g, tl.int64) * N + near
    w = tl.load(p_w + row[:, None] * W + tl.arange(0, W)[None, :]).to(tl.uint32, bitcast=True)
    if BITS == 4:
        u = tl.load(p_s + row[:, None] * 2 + tl.arange(0, 2)[None, :]).to(tl.uint32, bitcast=True)
        values = code_values(w, u, R, W, SUBNORMAL)
    else:
        values = byte_values(w, R, W)
    return values


@triton.jit
def _segment(
    x_desc, p_x, p_w, p_s, near, live, x_row, segment, N, K, groups,
    BITS: tl.constexpr, W: tl.constexpr, SUBNORMAL: tl.constexpr, EVEN_K: tl.constexpr, DESCRIPTOR: tl.constexpr,
    WHOLE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, SEGMENT_GROUPS: tl.constexpr,
):  # fmt: skip
    """The sum over one segment of K: float32 [R, T]."""
    column = tl.arange(0, GROUP)
    first = segment * SEGMENT_GROUPS
    count = SEGMENT_GROUPS if WHOLE else tl.minimum(SEGMENT_GROUPS, groups - first)
    acc = tl.zeros((R, T), tl.float32)
    # a path round the loop would write to the accumulator while wgmma may be under way, and so make it wait each time
    tl.assume(count > 0)
    for i in range(count):
        g = first + i
        values = group_values(p_w, p_s, near, g, N, BITS, SUBNORMAL, R, W)
        if DESCRIPTOR:
            x = x_desc.load([x_row, g * GROUP])
        elif EVEN_K:
            x = tl.load(p_x + g * GROUP + column[None, :], mask=live[:, None], other=0.0)
        else:
            inside = live[:, None] & (g * GROUP + column[None, :] < K)
            x = tl.load(p_x + g * GROUP + column[None, :], mask=inside, other=0.0)
        acc = tl.dot(values.to(x.dtype), x.T, acc)
    return acc


@triton.jit(do_not_specialize=["M", "groups"])
def _packed_linear(
    x_desc, p_x, p_w, p_s, p_y, p_alpha, p_bias, p_row, p_tiles, p_sums, p_counters, M, N, K, groups, unit,
    SEGMENTS: tl.constexpr, SPLIT: tl.constexpr, DESCRIPTOR: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr,
    SUBNORMAL: tl.constexpr, EVEN_K: tl.constexpr, WHOLE: tl.constexpr, ROW: tl.constexpr, BIAS: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr, SEGMENT_GROUPS: tl.constexpr,
):  # fmt: skip
    # programs that run together share the rows of the weight
    tokens, tile = tl.program_id(0), tl.program_id(1)
    start, end, index = tl.load(p_tiles + 3 * tile), tl.load(p_tiles + 3 * tile + 1), tl.load(p_tiles + 3 * tile + 2)
    n = start + tl.arange(0, R)
    # rows past the end repeat the last one: no mask on the loads
    near = tl.minimum(n, end - 1)
    m = tokens * T + tl.arange(0, T)
    x_row = index * M + tokens * T
    p_x += (index.to(tl.int64) * M + m[:, None]) * K
    if SPLIT:
        acc = _segment(
            x_desc, p_x, p_w, p_s, near, m < M, x_row, tl.program_id(2), N, K, groups, BITS, W, SUBNORMAL, EVEN_K,
            DESCRIPTOR, WHOLE, T, R, GROUP, SEGMENT_GROUPS,
        )  # fmt: skip
        slot = tile * tl.num_programs(0) + tokens
        last, total = sum_of_segments(acc, p_sums, p_counters, slot, tl.program_id(2), SEGMENTS)
        if last:
            finish(total, p_y, p_alpha, p_bias, p_row, n, end, m, M, N, unit, ROW, BIAS)
    else:
        total = tl.zeros((R, T), tl.float32)
        for segment in range(SEGMENTS):
            total += _segment(
                x_desc, p_x, p_w, p_s, near, m < M, x_row, segment, N, K, groups, BITS, W, SUBNORMAL, EVEN_K,
                DESCRIPTOR, WHOLE, T, R, GROUP, SEGMENT_GROUPS,
            )  # fmt: skip
        finish(total, p_y, p_alpha, p_bias, p_row, n, end, m, M, N, unit, ROW, BIAS)


def packed_linear(
    x: Tensor, weight: Packed, out_dtype: torch.dtype, row: Tensor | None = None, work: Division | None = None
) -> Tensor:
    """x · Wᵀ × alpha + bias.

    Args:
        x: [Q, M, K], one for each quantization of the activation: float16 code × block_scale; or, Q = 1, an
            unquantized activation in float16 or bfloat16, or float16 E4M3 values.
        weight: N rows.
        out_dtype: of the result.
        row: float32 [M], a factor of each token, or None.
        work: how it is divided; by default by M.

    Returns:
        [M, N].
    """
    q, m, k = x.shape
    groups, n, w = weight.words.shape
    y = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if m == 0:
        return y
    work = work or division.few(n, k, m)
    parts, tiles, token_tiles = segments(k), weight.tiles[work.rows].table, triton.cdiv(m, work.tokens)
    work = division.fitted(work, tiles.shape[0] * token_tiles, k)
    descriptor = work.tokens >= 32 and k % 8 == 0 and _copy_engine(x.device)
    space, alpha, bias = workspace.of(x), weight.alpha, weight.bias
    _packed_linear[(token_tiles, tiles.shape[0], parts if work.split else 1)](
        _descriptor(x.view(q * m, k), work.tokens) if descriptor else None, x, weight.words,
        weight.words if weight.scales is None else weight.scales, y, alpha, alpha if bias is None else bias,
        alpha if row is None else row, tiles, space.sums, space.counters, m, n, k, groups, weight.unit, parts,
        work.split, descriptor, weight.bits, w, weight.subnormal, k % GROUP == 0, k % SEGMENT == 0, row is not None,
        bias is not None, work.rows, work.tokens, GROUP, SEGMENT // GROUP, **launch_options(work, x.device),
    )  # fmt: skip
    return y


def launch_options(work: Division, device: torch.device) -> dict[str, Any]:
    """Triton's options for a program of this kind."""
    options: dict[str, Any] = {"num_warps": work.warps, "num_stages": work.stages, "enable_fp_fusion": False}
    if work.registers and device.type == "cuda" and architecture(device) == "sm_90":
        options["maxnreg"] = work.registers
    return options


def _copy_engine(device: torch.device) -> bool:
    return device.type != "cuda" or architecture(device) in _COPY_ENGINE


def _descriptor(x: Tensor, tokens: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: PLC0415

    return TensorDescriptor.from_tensor(x, [tokens, GROUP])
