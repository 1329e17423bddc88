"""NVFP4 weights as the kernels here read them: one copy, for few tokens and for many.

**Records.** Rows are cut into tiles of 64, K into chunks of 64 columns; N and K are padded to such multiples with zero
codes. A record is a tile's chunk, 2304 contiguous bytes: 2048 of codes, then 256 of scales. The records of a tile
follow each other along K, so a matrix is uint8 [tiles, chunks, 2304].

**Codes.** 16 bytes for each thread of a warpgroup, in the order of threads. Word j of thread 32·w + 4·g + t is the left
operand of ``wgmma`` m64k16 for columns 16j … 16j + 15, four pairs of bfloat16: of row r = 16w + g columns 2t and 2t + 1
(pair 0), of row r + 8 the same columns (pair 1), of row r columns 2t + 8 and 2t + 9 (pair 2), and of row r + 8 those
(pair 3). The even column is in the lower half of a pair.

A pair comes out of its word by a rotation and a mask, which leave the sign in bit 15 of each half and the magnitude in
bits 8 to 6: the low two bits of bfloat16's exponent and the high one of its mantissa. What bfloat16 then reads is
code × 2⁻¹²⁶, subnormal numbers included. Three pairs and the fourth's remains fill a word like this, with one rotation
and mask more than if the fourth were in one piece (no four places are):

    pair                        0    1    2    3: sign and exponent   3: mantissa
    word is rotated left by     0    4   10                      14             6

(For float16's places, bits 15 and 11 to 9, the best arrangement takes one instruction more.)

**Scales.** Eight bytes for each of the 32 pairs of rows r and r + 8 above, in the order of r: a word for r, a word for
r + 8. A word is the four blocks' scales, rotated left by 4, in eight bits: five of exponent, three of mantissa and
no sign, scale = (1 + m/8) · 2^(e − 22). All of E4M3's positive numbers fit, subnormal ones normalised. In bfloat16,
bits 11 to 4 with 0x7000 set are scale × 2¹¹⁹; in float16, bits 14 to 7 are scale × 2⁷. So one multiplication gives
code × scale × 2⁻⁷, exactly, and in bfloat16 never a subnormal number, which the matrix unit would align differently.
The codes of a block whose scale is zero are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

#: rows and columns of a record
ROWS, COLUMNS = 64, 64
CODE_BYTES, SCALE_BYTES = 2048, 256
RECORD = CODE_BYTES + SCALE_BYTES
#: what products are multiplied by to become code × scale
UNIT = 128.0
#: by pair and bit of a code (mantissa first, sign last): by how much the word is rotated left for it
ROTATION = ((0, 0, 0, 0), (4, 4, 4, 4), (10, 10, 10, 10), (6, 14, 14, 14))
#: where bfloat16 has those bits
PLACE = (6, 7, 8, 15)
#: codes repacked at a time; each takes some 8 bytes on the way, and a piece some 40 launches
_PIECE = 1 << 21


def pack(packed: Tensor, scale: Tensor, runs: Sequence[int] = ()) -> Tensor:
    """Records of a matrix.

    Args:
        packed: uint8 [N, K/2], the low nibble the even column; signs of scales moved into them.
        scale: uint8 [N, K/16], E4M3 bits without sign, no NaN.
        runs: rows of each run; a tile holds rows of one run alone. By default all are one run.

    Returns:
        uint8 [tiles, ⌈K/64⌉, 2304]; tiles = Σ ⌈rows of a run / 64⌉.
    """
    n, k = packed.shape[0], 2 * packed.shape[1]
    runs = runs or (n,)
    chunks = -(-k // COLUMNS)
    out = torch.empty((sum(-(-r // ROWS) for r in runs), chunks, RECORD), dtype=torch.uint8, device=packed.device)
    piece = max(1, _PIECE // (ROWS * k)) * ROWS
    start = tile = 0
    for rows in runs:
        for first in range(start, start + rows, piece):
            some = slice(first, min(first + piece, start + rows))
            tiles = -(-(some.stop - first) // ROWS)
            codes, bits = _padded(packed[some], tiles, chunks * 32), _padded(scale[some], tiles, chunks * 4)
            codes = codes.masked_fill((bits == 0).repeat_interleave(8, dim=2), 0)
            out[tile : tile + tiles, :, :CODE_BYTES] = _codes(codes)
            out[tile : tile + tiles, :, CODE_BYTES:] = _scales(bits)
            tile += tiles
        start += rows
    return out


def unpack(records: Tensor, k: int, runs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pack`, but for codes of blocks whose scale is zero: (uint8 [N, K/2], uint8 [N, K/16])."""
    n = sum(runs)
    packed = torch.empty((n, k // 2), dtype=torch.uint8, device=records.device)
    scale = torch.empty((n, k // 16), dtype=torch.uint8, device=records.device)
    piece = max(1, _PIECE // (ROWS * k))
    start = tile = 0
    for rows in runs:
        for first in range(0, rows, piece * ROWS):
            count = min(piece * ROWS, rows - first)
            some = records[tile : tile + -(-count // ROWS)]
            part = slice(start + first, start + first + count)
            packed[part] = _packed_of(some).flatten(0, 1)[:count, : k // 2]
            scale[part] = _bits_of(some).flatten(0, 1)[:count, : k // 16]
            tile += len(some)
        start += rows
    return packed, scale


def _packed_of(records: Tensor) -> Tensor:
    """uint8 [tiles, chunks, 2304] to [tiles, 64, 32·chunks]; the inverse of ``_codes``."""
    tiles, chunks, _ = records.shape
    word = _words(records[:, :, :CODE_BYTES]).view(tiles, chunks, 4, 8, 4, 4)  # warp, g, t, j
    byte = torch.zeros((*word.shape, 2, 2), dtype=torch.uint8, device=word.device)
    for pair in range(4):
        for bit in range(8):
            place = (16 * (bit >> 2) + PLACE[bit & 3] - ROTATION[pair][bit & 3]) % 32
            byte[..., pair >> 1, pair & 1] |= (((word >> place) & 1) << bit).to(torch.uint8)
    # tile, chunk, warp, g, t, j, right, lower
    return byte.permute(0, 2, 7, 3, 1, 5, 6, 4).reshape(tiles, ROWS, chunks * 32)


def _bits_of(records: Tensor) -> Tensor:
    """uint8 [tiles, chunks, 2304] to [tiles, 64, 4·chunks]; the inverse of ``_scales``."""
    tiles, chunks, _ = records.shape
    word = _words(records[:, :, CODE_BYTES:]).view(tiles, chunks, 4, 8, 2)  # warp, g, lower
    word = (word >> 4) | ((word & 0xF) << 28)
    wide = (word[..., None] >> torch.tensor((0, 8, 16, 24), device=word.device)) & 0xFF
    table = torch.zeros(256, dtype=torch.uint8, device=word.device)
    table[scale_table(word.device)[:127]] = torch.arange(127, dtype=torch.uint8, device=word.device)
    return table[wide].permute(0, 2, 4, 3, 1, 5).reshape(tiles, ROWS, chunks * 4)


def _words(data: Tensor) -> Tensor:
    """uint8 [..., 4·n] to int64 [..., n], the lowest byte first; the inverse of ``_bytes``."""
    return data.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def _padded(x: Tensor, tiles: int, width: int) -> Tensor:
    """[rows, w] to [tiles, 64, width] with zeros."""
    padding = (0, width - x.shape[1], 0, tiles * ROWS - x.shape[0])
    return torch.nn.functional.pad(x, padding).view(tiles, ROWS, width)


def _codes(packed: Tensor) -> Tensor:
    """uint8 [tiles, 64, K/2] to [tiles, chunks, 2048]."""
    tiles, _, width = packed.shape
    # row = (warp, upper or lower eight, g), byte, which is a pair = (chunk, j, left or right four, t)
    pairs = packed.view(tiles, 4, 2, 8, width // 32, 4, 2, 4)
    pairs = pairs.permute(0, 4, 1, 3, 7, 5, 6, 2)  # tile, chunk, warp, g, t, j, right, lower
    pairs = pairs.to(torch.int32, memory_format=torch.contiguous_format)
    tables = _pair_tables(packed.device)
    word = tables[0][pairs[..., 0, 0]]
    for pair in range(1, 4):
        word |= tables[pair][pairs[..., pair >> 1, pair & 1]]
    return word.view(torch.uint8).view(tiles, width // 32, CODE_BYTES)


def _scales(bits: Tensor) -> Tensor:
    """uint8 [tiles, 64, K/16] to [tiles, chunks, 256]."""
    tiles, _, width = bits.shape
    wide = scale_table(bits.device)[bits.to(torch.int64)].view(tiles, 4, 2, 8, width // 4, 4)
    wide = wide.permute(0, 4, 1, 3, 2, 5)  # tile, chunk, warp, g, lower, block
    word = wide[..., 0] | (wide[..., 1] << 8) | (wide[..., 2] << 16) | (wide[..., 3] << 24)
    word = _as_int32(((word << 4) | (word >> 28)) & 0xFFFFFFFF)
    return word.view(torch.uint8).view(tiles, width // 4, SCALE_BYTES)


@cache
def _pair_tables(device: torch.device) -> Tensor:
    """int32 [4, 256]: the bits of a word for each byte of two codes as each pair."""
    table = torch.zeros((4, 256), dtype=torch.int64)
    for pair in range(4):
        for bit in range(8):  # of the byte: half, then bit of the code
            place = (16 * (bit >> 2) + PLACE[bit & 3] - ROTATION[pair][bit & 3]) % 32
            table[pair] |= ((torch.arange(256) >> bit) & 1) << place
    return _as_int32(table).to(device)


@cache
def scale_table(device: torch.device) -> Tensor:
    """int64 [128]: the eight bits for each magnitude of E4M3; zero for zero and NaN."""
    table = [0] + [104, 112, 116, 120, 122, 124, 126] + [bits + 120 for bits in range(8, 127)] + [0]
    return torch.tensor(table, dtype=torch.int64, device=device)


def _as_int32(word: Tensor) -> Tensor:
    """The bits of int64 words below 2³²."""
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32).contiguous()
