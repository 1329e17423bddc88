"""E2M1: every code, every midpoint and its neighbours, packing; and agreement with compressed-tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from hypothesis import given
from hypothesis import strategies as st

from anyfp4.errors import InvalidArgumentError
from anyfp4.formats import e2m1
from anyfp4.testing.bitwise import assert_same_bits
from tests.formats import oracles


def code_of(x: float) -> int:
    return oracles.nearest(oracles.E2M1, x) | (8 if np.signbit(x) else 0)


def test_every_code_decodes_to_its_value() -> None:
    values = [float(oracles.e2m1_magnitude(c & 7)) * (-1.0 if c & 8 else 1.0) for c in range(16)]
    codes = torch.arange(16, dtype=torch.uint8)
    assert_same_bits(e2m1.decode(codes), torch.tensor(values))
    assert_same_bits(e2m1.encode(e2m1.decode(codes)), codes, "the sign of zero too")
    assert tuple(values) == e2m1.VALUES
    assert max(e2m1.MAGNITUDES) == e2m1.MAX


def test_rounding_at_every_midpoint_and_its_neighbours() -> None:
    x = oracles.probes(oracles.E2M1)
    expected = torch.tensor([code_of(float(v)) for v in x], dtype=torch.uint8)
    assert_same_bits(e2m1.encode(torch.from_numpy(x)), expected)


def test_ties_by_hand() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    rounded = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert_same_bits(e2m1.decode(e2m1.encode(x)), rounded)
    assert_same_bits(e2m1.decode(e2m1.encode(-x)), -rounded)


def test_every_bfloat16_number_rounds_to_nearest_even() -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).to(torch.float32)
    x = x[~x.isnan()]
    expected = torch.tensor([code_of(v) for v in x.tolist()], dtype=torch.uint8)
    assert_same_bits(e2m1.encode(x), expected)


@given(st.floats(width=32, allow_nan=False))
def test_any_number_rounds_to_nearest_even(x: float) -> None:
    assert e2m1.encode(torch.tensor([x])).item() == code_of(x)


def test_nan_is_a_zero() -> None:
    nans = torch.tensor([0x7FC00000, -0x400000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert bool(((e2m1.encode(nans) & 7) == 0).all())


def test_packing_puts_the_even_index_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 15, 0], [8, 7, 0, 9]], dtype=torch.uint8)
    packed = torch.tensor([[0x21, 0x0F], [0x78, 0x90]], dtype=torch.uint8)
    assert_same_bits(e2m1.pack(codes), packed)
    assert_same_bits(e2m1.unpack(packed), codes)


def test_every_byte_unpacks_and_packs() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(2, 4, 32)
    codes = e2m1.unpack(packed)
    assert codes.shape == (2, 4, 64)
    assert_same_bits(e2m1.pack(codes), packed)
    assert_same_bits(e2m1.decode_packed(packed), e2m1.decode(codes))


def test_decode_packed_of_a_view() -> None:
    packed = torch.randint(0, 256, (6, 10), dtype=torch.uint8)
    assert_same_bits(e2m1.decode_packed(packed.T), e2m1.decode_packed(packed.T.contiguous()))
    assert_same_bits(e2m1.decode_packed(packed[2:4, 1:7]), e2m1.decode_packed(packed)[2:4, 2:14].contiguous())
    assert e2m1.decode_packed(packed[:0]).shape == (0, 20)


def test_compressed_tensors_rounds_and_packs_the_same() -> None:
    x = torch.from_numpy(oracles.probes(oracles.E2M1))
    x = x[x.isfinite() & (x.abs() > 0)].reshape(2, -1)
    theirs = cast_to_fp4(x.clone())
    codes = e2m1.encode(x)
    assert_same_bits(e2m1.decode(codes), theirs)
    assert_same_bits(e2m1.pack(codes), pack_fp4_to_uint8(theirs))


def test_compressed_tensors_unpacks_the_same() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(8, 32)
    theirs = unpack_fp4_from_uint8(packed, 8, 64, dtype=torch.float32)
    assert_same_bits(e2m1.decode_packed(packed), theirs)


def test_wrong_arguments() -> None:
    with pytest.raises(InvalidArgumentError, match=r"encode takes float32, got torch\.bfloat16"):
        e2m1.encode(torch.zeros(4).bfloat16())
    with pytest.raises(InvalidArgumentError, match=r"pack takes uint8 \[\.\.\., even\], got torch.uint8 \[2, 3\]"):
        e2m1.pack(torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(InvalidArgumentError, match="pack takes uint8"):
        e2m1.pack(torch.zeros(2, 4))
    with pytest.raises(InvalidArgumentError, match="unpack takes uint8"):
        e2m1.unpack(torch.zeros(2, 4))
    with pytest.raises(InvalidArgumentError, match="decode_packed takes uint8"):
        e2m1.decode_packed(torch.zeros(2, 4, dtype=torch.int8))
