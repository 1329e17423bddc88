"""The packer against plain indexing, and what the kernels make of its words, in integer arithmetic as PTX has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyfp4.formats import e2m1
from anyfp4.kernels.hopper import layout

#: masks of ``unpack_codes``
ALL, SIGN_EXPONENT, MANTISSA = 0x81C081C0, 0x81808180, 0x00400040


def rotate(w: Tensor, k: int) -> Tensor:
    return ((w << k) | (w >> (32 - k))) & 0xFFFFFFFF


def words(data: Tensor) -> Tensor:
    """uint8 [..., 4·n] to int64 [..., n], the lowest byte first."""
    return data.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def pairs(w: Tensor) -> Tensor:
    """``unpack_codes``: [...] to [..., 4]."""
    last = (rotate(w, 14) & SIGN_EXPONENT) | ((w << 6) & MANTISSA)
    return torch.stack((w & ALL, (w << 4) & ALL, rotate(w, 10) & ALL, last), dim=-1)


def halves(w: Tensor) -> Tensor:
    """The bfloat16 numbers in words as float64: [...] to [..., 2]."""
    bits = torch.stack((w & 0xFFFF, w >> 16), dim=-1)
    return torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16).view(torch.bfloat16).double()


def values(records: Tensor) -> Tensor:
    """All of ``unpack``, thread by thread: uint8 [tiles, chunks, 2304] to float64 [64·tiles, 64·chunks]."""
    tiles, chunks, _ = records.shape
    codes = words(records[..., : layout.CODE_BYTES]).view(tiles, chunks, 4, 8, 4, 4)  # warp, g, t, j
    scales = words(records[..., layout.CODE_BYTES :]).view(tiles, chunks, 4, 8, 2)  # warp, g, lower
    exponent = 0x70007000
    even, odd = (scales & 0x0FF00FF0) | exponent, (rotate(scales, 24) & 0x0FF00FF0) | exponent
    scale = torch.stack((halves(even), halves(odd)), dim=-1).flatten(-2)  # blocks 0, 1, 2, 3
    # [tile, chunk, warp, g, t, j, pair, half]; pair = 2 · right + lower
    unpacked = halves(pairs(codes)).unflatten(-2, (2, 2)) * layout.UNIT
    scaled = unpacked * scale.movedim(-1, -2)[:, :, :, :, None, :, None, :, None]
    # row = (warp, lower, g), column = (j, right, t, half)
    return scaled.permute(0, 2, 7, 3, 1, 5, 6, 4, 8).reshape(tiles * 64, chunks * 64)


def expected(packed: Tensor, scale: Tensor) -> Tensor:
    """By formats: float64 [N, K]."""
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)
    table = torch.tensor(e2m1.VALUES, dtype=torch.float64)
    return table[codes.long()] * scale.view(torch.float8_e4m3fn).double().repeat_interleave(16, dim=1)


@pytest.mark.parametrize(("n", "k"), [(64, 64), (100, 144), (200, 576), (5, 16)])
def test_records_hold_the_matrix(n: int, k: int) -> None:
    g = torch.Generator().manual_seed(n)
    packed = torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8)
    scale = torch.randint(0, 0x7F, (n, k // 16), generator=g, dtype=torch.uint8)
    records = layout.pack(packed, scale)
    assert records.shape == (-(-n // 64), -(-k // 64), layout.RECORD)
    got = values(records)
    assert torch.equal(got[:n, :k], expected(packed, scale))
    assert not got[n:].any() and not got[:, k:].any()


def test_every_code_with_every_scale() -> None:
    """16 codes × 127 scales, in each of the places that a code or a scale can have."""
    for shift in range(4):
        codes = torch.arange(16, dtype=torch.uint8).roll(shift)
        packed = (codes[0::2] | (codes[1::2] << 4)).repeat(127, 4)
        scale = torch.arange(127, dtype=torch.uint8)[:, None].repeat(1, 4)
        got = values(layout.pack(packed, scale))[:127]
        assert torch.equal(got, expected(packed, scale))


def test_products_are_normal_numbers_of_bfloat16() -> None:
    """So the matrix unit aligns them as it aligns the products themselves."""
    smallest, largest = 0.5 * 2.0**-9 / layout.UNIT, 6 * 448 / layout.UNIT
    assert smallest >= torch.finfo(torch.bfloat16).smallest_normal and largest <= torch.finfo(torch.bfloat16).max
    table = layout.scale_table(torch.device("cpu"))[1:127]
    number = (1 + (table & 7).double() / 8) * torch.exp2((table >> 3).double() - 22)
    assert torch.equal(number, torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double())
