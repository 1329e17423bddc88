"""Weights as the Triton kernels read them, and the order over K that all of them keep.

**Order over K.** K is cut at multiples of 1024 into segments. Within a segment one accumulator takes K upwards,
sixteen at a time; the segments' sums are added in order, in float32. The order depends on K alone, so any number of
tokens, any tile shape and any number of programs gives the same bits. (For numerics="blackwell" K is one chain, and
block-wise FP8 adds the product of each block: ``linear_fp8_block.py``.) Which sixteen columns one instruction takes is
exact for ``wgmma`` and ``tcgen05``; for ``mma.sync`` and ``v_mfma`` the compiler permutes columns within a step, always
alike for one kernel.

**Words.** A group of 8·W columns of a row is W words of 32 bits; a matrix is [groups, N, W], so that a tile of rows
lies in one piece. A group is four quarters of 2·W columns; word i holds columns 2i and 2i + 1 of each quarter, the even
one in the lower half. In each half the four codes lie so that a shift and a mask put sign and magnitude where float16
wants them (bit 15, and bits 9 to 11):

    bit       15   14   13   12   11…9   8…6   5…3   2…0
    quarter   s0   s2   s3   s1   m0     m1    m2    m3

and what float16 then reads is code × 2⁻¹⁴. Block scales are words of four bytes, see ``pack_scales``. FP8 weights are
words too: a group is two halves of 2·W columns, in the upper and the lower byte of each half word. A group of native
numerics is ``GROUP`` columns of either kind, eight of them a segment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: columns of K that one accumulator takes
SEGMENT = 1024
#: columns of a group for native numerics, and words of a row of it: NVFP4, FP8
GROUP, CODE_WORDS, BYTE_WORDS = 128, 16, 32
#: rows of a tile, for the kernels of native numerics
ROWS = (64, 128, 256)
#: places of sign and magnitude in a half word, by quarter
_SIGN, _MAGNITUDE = (15, 12, 14, 13), (9, 6, 3, 0)
#: weights repacked at a time, so that what is needed on the way stays near 16 MiB
PIECE = 1 << 22


def segments(k: int) -> int:
    """How many segments K columns are cut into."""
    return max(1, math.ceil(k / SEGMENT))


def pack_codes(packed: Tensor, w: int) -> Tensor:
    """Codes in words: packed uint8 [N, K/2] to int32 [⌈K/8w⌉, N, w], padded with zero codes."""
    n, k = packed.shape[0], 2 * packed.shape[1]
    groups, step = math.ceil(k / (8 * w)), max(1, PIECE // k)
    out = torch.empty((groups, n, w), dtype=torch.int32, device=packed.device)
    for start in range(0, n, step):
        rows = packed[start : start + step]
        rows = torch.nn.functional.pad(rows, (0, groups * 4 * w - rows.shape[1])).view(-1, groups, 4, w)
        words = torch.zeros_like(rows[:, :, 0], dtype=torch.int32)
        for quarter in range(4):
            pair = rows[:, :, quarter].to(torch.int32)
            pair = (pair & 0xF) | (pair >> 4 << 16)  # a code in each half, the even column's in the lower one
            words |= (pair & 0x00080008) << (_SIGN[quarter] - 3)
            words |= (pair & 0x00070007) << _MAGNITUDE[quarter]
        out[:, start : start + step] = words.transpose(0, 1)
    return out


def unpack_codes(words: Tensor, k: int) -> Tensor:
    """The inverse of :func:`pack_codes`: uint8 [N, K/2]."""
    groups, n, w = words.shape
    out = torch.empty((n, groups, 4, w), dtype=torch.uint8, device=words.device)
    step = max(1, PIECE // k)
    for start in range(0, n, step):
        rows = words[:, start : start + step].transpose(0, 1)
        for quarter in range(4):
            pair = (rows >> (_SIGN[quarter] - 3)) & 0x00080008
            pair |= (rows >> _MAGNITUDE[quarter]) & 0x00070007
            out[start : start + step, :, quarter] = ((pair & 0xF) | (pair >> 12)).to(torch.uint8)
    return out.view(n, -1)[:, : k // 2].contiguous()


def pack_scales(scale: Tensor, w: int) -> Tensor:
    """Block scales in words: uint8 [N, K/16] to int32 [⌈K/8w⌉, N, w/8], w 8 or 16.

    For w = 8 the bytes of a word are the blocks of a group in order. For w = 16 the first word is the first half of a
    group, its bytes 0 and 2 the blocks of the first quarter and 1 and 3 those of the second; the other word likewise.
    """
    n = scale.shape[0]
    groups = math.ceil(scale.shape[1] * 16 / (8 * w))
    padded = torch.nn.functional.pad(scale, (0, groups * w // 2 - scale.shape[1]))
    blocks = padded.view(n, -1, 4)
    if w == 16:
        blocks = blocks[:, :, [0, 2, 1, 3]]
    return blocks.contiguous().view(torch.int32).view(n, groups, w // 8).transpose(0, 1).contiguous()


def unpack_scales(words: Tensor, k: int) -> Tensor:
    """The inverse of :func:`pack_scales`: uint8 [N, K/16]."""
    _, n, w = words.shape
    blocks = words.transpose(0, 1).contiguous().view(torch.uint8).view(n, -1, 4)
    if w == 2:
        blocks = blocks[:, :, [0, 2, 1, 3]]
    return blocks.reshape(n, -1)[:, : k // 16].contiguous()


def pack_bytes(weight: Tensor, w: int) -> Tensor:
    """FP8 in words: uint8 [N, K] to int32 [⌈K/4w⌉, N, w], padded with zeros."""
    n, k = weight.shape
    groups, step = math.ceil(k / (4 * w)), max(1, PIECE // k)
    out = torch.empty((groups, n, w), dtype=torch.int32, device=weight.device)
    for start in range(0, n, step):
        rows = torch.nn.functional.pad(weight[start : start + step], (0, groups * 4 * w - k))
        # [rows, group, half of the group, word, even or odd]: the first half goes to the upper byte of a half word
        places = rows.view(-1, groups, 2, w, 2).flip(2).permute(0, 1, 3, 4, 2).contiguous()
        out[:, start : start + step] = places.view(-1, groups, w, 4).view(torch.int32).squeeze(-1).transpose(0, 1)
    return out


def unpack_bytes(words: Tensor, k: int) -> Tensor:
    """The inverse of :func:`pack_bytes`: uint8 [N, K]."""
    groups, n, w = words.shape
    places = words.transpose(0, 1).contiguous().view(torch.uint8).view(n, groups, w, 2, 2)
    return places.permute(0, 1, 4, 2, 3).flip(2).reshape(n, -1)[:, :k].contiguous()


@dataclass(frozen=True, eq=False)
class Tiles:
    """How the rows of a weight are cut into tiles.

    Attributes:
        table: int32 [T, 3]: first row, row after the last, index of the quantized activation.
        starts: the first rows, and the number of rows.
    """

    table: Tensor
    starts: tuple[int, ...]


def cut_all(runs: list[tuple[int, int]], device: torch.device) -> dict[int, Tiles]:
    """Tiles of each of ``ROWS``; arguments as :func:`cut`."""
    return {rows: cut(runs, rows, device) for rows in ROWS}


def cut(runs: list[tuple[int, int]], rows: int, device: torch.device) -> Tiles:
    """Tiles of at most ``rows`` rows, none across two quantizations of the activation.

    Args:
        runs: (rows, index of the quantized activation) of each run of rows.
        rows: of a tile.
        device: of the table.
    """
    tiles, first = [], 0
    for size, index in runs:
        tiles += [(i, min(i + rows, first + size), index) for i in range(first, first + size, rows)]
        first += size
    return Tiles(torch.tensor(tiles, dtype=torch.int32, device=device), (*(t[0] for t in tiles), first))
